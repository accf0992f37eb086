"""What is installed: its files, imports and metadata, its types, its docstrings and their examples, its settings table."""

import dataclasses
import doctest
import importlib
import importlib.metadata
import importlib.util
import inspect
import io
import math
import os
import pkgutil
import re
import shutil
import subprocess
import sys
import tempfile
import tomllib
from pathlib import Path

import pytest

import pslib

ROOT = Path(__file__).resolve().parents[1]
MODULES = ["pslib", *(f"pslib.{m.name}" for m in pkgutil.iter_modules(pslib.__path__))]
# What a reader meets first has an example that runs.
SHOWN = [
    "pslib", "pslib.optimizers.PSDASGD", "pslib.optimizers.PSSPS", "pslib.optimizers.ScaledSGD", "pslib.optimizers.ParameterScaled",
    "pslib.scalings.Scaling", "pslib.scalings.get", "pslib.estimators.Blocks", "pslib.estimators.completed", "pslib.units.assign",
    "pslib.distributed.Sums", "pslib.distributed.like", "pslib.distributed.local", "pslib.distributed.mean_loss",
    "pslib.distributed.numel", "pslib.fused.reason_against", "pslib.invariance.certify", "pslib.twins.symmetries", "pslib.twins.twin",
]


def project():
    return tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


def run(*command, **settings):
    """The completed process; its output is in the failure's message."""
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False, **settings)
    assert done.returncode == 0, f"{' '.join(map(str, command[:4]))} …\n{done.stdout[-6000:]}{done.stderr[-6000:]}"
    return done.stdout


# --- linters ----------------------------------------------------------------------------------------

def installed(tool):
    return pytest.mark.skipif(importlib.util.find_spec(tool) is None, reason=f"{tool} is not installed; pip install {tool} to check this.")


@installed("ruff")
def test_ruff_finds_nothing():
    run(sys.executable, "-m", "ruff", "check", "--no-cache", "pslib", "tests", "book/_tools", cwd=ROOT)


@installed("mypy")
def test_mypy_finds_nothing():
    # Kept between runs: reading torch's types again would take twenty seconds.
    cache = Path(tempfile.gettempdir()) / f"pslib-mypy-{os.getuid()}"
    run(sys.executable, "-m", "mypy", "--cache-dir", cache, "pslib", cwd=ROOT)


@installed("mypy")
def test_mypy_sees_the_types_of_the_public_interface(tmp_path):
    """Two mistakes that a user could make, and nothing else, are found in a user's program."""
    program = tmp_path / "program.py"
    program.write_text(
        "import torch\nimport pslib\n"
        "x = torch.nn.Parameter(torch.ones(2))\n"
        "good = pslib.PSDASGD([x], d0=0.1, per='model').distance\n"
        "bad = pslib.PSDASGD([x], d0='0.1')\n"
        "worse = pslib.PSSPS([x], betas=0.9)\n"
        "reveal_type(good)\n"
    )
    cache = Path(tempfile.gettempdir()) / f"pslib-mypy-{os.getuid()}"
    command = [sys.executable, "-m", "mypy", "--config-file", str(ROOT / "pyproject.toml"), "--cache-dir", str(cache), str(program)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False, cwd=ROOT)
    assert [line.split(":")[1] for line in done.stdout.splitlines() if " error: " in line] == ["5", "6"], done.stdout
    assert 'Revealed type is "torch._tensor.Tensor"' in done.stdout


# --- what pip installs ------------------------------------------------------------------------------

@pytest.fixture(scope="module")
def target(tmp_path_factory):
    """A folder with what `pip install .` puts into site-packages."""
    source, folder = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("installed")
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    shutil.copytree(ROOT / "pslib", source / "pslib", ignore=shutil.ignore_patterns("__pycache__"))
    run(
        sys.executable, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", "--no-index", "--no-deps", "--no-build-isolation",
        "--no-compile", "--target", folder, source,
    )
    return folder


def test_everything_that_belongs_to_the_package_is_installed_and_nothing_else(target):
    kept = {p.relative_to(ROOT).as_posix() for p in (ROOT / "pslib").iterdir() if p.suffix in (".py", ".c") or p.name == "py.typed"}
    found = {p.relative_to(target).as_posix() for p in (target / "pslib").rglob("*") if p.is_file()}
    assert found == kept
    assert {"pslib/kernels.c", "pslib/py.typed", "pslib/optimizers.py"} <= found
    assert {p.name for p in target.iterdir()} == {"pslib", f"pslib-{pslib.__version__}.dist-info"}


def test_torch_is_the_only_hard_dependency(target):
    (folder,) = target.glob("*.dist-info")
    metadata = importlib.metadata.Distribution.at(folder)
    hard = [r for r in metadata.requires if "extra ==" not in r]
    assert [re.match(r"[\w-]+", r)[0] for r in hard] == ["torch"]
    assert metadata.version == project()["version"] == pslib.__version__
    assert metadata.metadata["License-Expression"] == "MIT"


ALONE = """
import builtins, sys
sys.path.insert(0, sys.argv[1])
allowed, found = {"pslib", "torch", *sys.stdlib_module_names}, builtins.__import__

def guarded(name, globals=None, locals=None, fromlist=(), level=0):
    asks = (globals or {}).get("__name__") or ""
    if level == 0 and asks.partition(".")[0] == "pslib" and name.partition(".")[0] not in allowed:
        raise ImportError(f"{asks} imports {name}")
    return found(name, globals, locals, fromlist, level)

builtins.__import__ = guarded
import torch, pslib
assert pslib.__file__.startswith(sys.argv[1]), pslib.__file__
for fused in (None, False):
    for make in (pslib.PSDASGD, pslib.PSSPS):
        x = torch.nn.Parameter(torch.ones(3))
        optimizer = make([x], fused=fused)
        for _ in range(2):
            x.grad = 2 * x.detach()
            optimizer.step(**({"loss": 3.0} if make is pslib.PSSPS else {}))
        optimizer.load_state_dict(optimizer.state_dict())
        assert (x < 1).all()
import pslib.distributed, pslib.estimators, pslib.invariance, pslib.scalings, pslib.units
"""


def test_the_installed_package_trains_and_imports_nothing_but_torch(target):
    run(sys.executable, "-P", "-c", ALONE, target, cwd=target)


def test_the_guard_of_that_test_would_see_another_import(tmp_path, target):
    """The same program fails where a copy of the package imports numpy."""
    broken = tmp_path / "broken"
    shutil.copytree(target, broken)
    with (broken / "pslib" / "units.py").open("a") as file:
        file.write("\nimport numpy\n")
    with pytest.raises(AssertionError, match=r"pslib\.units imports numpy"):
        run(sys.executable, "-P", "-c", ALONE, broken, cwd=broken)


# --- versions ---------------------------------------------------------------------------------------

def released():
    return re.findall(r"^## (.*)$", (ROOT / "book" / "changelog.md").read_text(), re.M)


def test_the_version_is_semantic_and_the_newest_of_the_change_log():
    assert re.fullmatch(r"(0|[1-9]\d*)\.(0|[1-9]\d*)\.(0|[1-9]\d*)", pslib.__version__)
    assert released()[0] == pslib.__version__ == project()["version"]


def test_the_change_log_has_every_version_once_newest_first():
    versions = [tuple(map(int, version.split("."))) for version in released()]
    assert versions == sorted(set(versions), reverse=True)
    assert versions[-1] == (0, 1, 0)


# --- docstrings -------------------------------------------------------------------------------------

def source(thing):
    try:
        return inspect.getsource(thing)
    except (OSError, TypeError):  # made by dataclass
        return ""


def section(doc, title):
    """The lines of a section of a docstring, up to the next blank line that is not followed by an indented one."""
    found = re.search(rf"^( *){title}:\n((?:\1 +.*\n|\s*\n(?=\1 ))*)", doc + "\n", re.M)
    return found[2] if found else ""


def listed(doc, title):
    """The names in a section: `name: …`, or several with commas between."""
    names = re.findall(r"^ +((?:\*{0,2}\w+, )*\*{0,2}\w+): ", section(doc, title), re.M)
    return {name.lstrip("*") for several in names for name in several.split(", ")}


def raises(function):
    return re.search(r"^\s*(raise ValueError|require\()", source(function), re.M) is not None


def own(thing):
    """Public methods and properties that a class defines: (name, function)."""
    for name, value in vars(thing).items():
        function = value.fget if isinstance(value, property) else getattr(value, "__func__", value)
        if not name.startswith("_") and inspect.isfunction(function):
            yield name, function


def incomplete(thing, name):
    """What a docstring lacks: itself; the parameters of a constructor (or fields of a dataclass), one by one; the parameters of
    a function with several; that a ValueError is raised, where the function itself does so."""
    doc = (thing.__doc__ if inspect.isclass(thing) else inspect.getdoc(thing)) or ""
    if not doc:
        return [f"{name} has no docstring"]
    if not inspect.isclass(thing):
        parameters = list(inspect.signature(thing).parameters)
        found = [f"{name} does not say what {p} is" for p in parameters if len(parameters) > 1 and not re.search(rf"\b{p}\b", doc)]
        return found + ([f"{name} does not say that it raises"] if raises(thing) and "ValueError:" not in section(doc, "Raises") else [])
    found = []
    if dataclasses.is_dataclass(thing):
        text = section(doc, "Attributes") or doc
        # What is inherited is described where it comes from.
        fields = [f.name for f in dataclasses.fields(thing) if f.name in vars(thing).get("__annotations__", {})]
        found += [f"{name} does not say what {field} is" for field in fields if not re.search(rf"\b{field}\b", text)]
    elif "__init__" in vars(thing):
        parameters = list(inspect.signature(thing.__init__).parameters)[1:]
        found += [f"{name} does not list {p} under Args" for p in parameters if p not in listed(doc, "Args")]
        if raises(thing.__init__) and "ValueError:" not in section(doc, "Raises"):
            found.append(f"{name} does not say that it raises")
    for method, function in own(thing):
        # A method that overrides a documented one may leave it at that.
        if not any(inspect.getdoc(vars(base)[method]) for base in thing.__mro__ if method in vars(base)):
            found.append(f"{name}.{method} has no docstring")
        if raises(function) and "ValueError:" not in section(inspect.getdoc(function) or "", "Raises"):
            found.append(f"{name}.{method} does not say that it raises")
    return found


class Complete:
    """Something.

    Args:
        first, second: two of them.
        *rest: more, which
            are explained at length.

    Raises:
        ValueError: always.
    """

    def __init__(self, first, second, *rest):
        raise ValueError

    def method(self):
        """Do it.

        Raises:
            ValueError: sometimes.
        """
        raise ValueError


class Silent(Complete):
    """Something else.

    Args:
        first: one.
    """

    def __init__(self, first, second):
        if second:
            raise ValueError

    def method(self):
        raise ValueError

    def other(self):
        pass

    def another(self):
        """Do it."""
        raise ValueError


def test_the_rule_for_docstrings_sees_what_is_missing():
    def function(first, second):
        """Use the first."""
        raise ValueError

    assert incomplete(Complete, "C") == []
    assert incomplete(Silent, "S") == [
        "S does not list second under Args", "S does not say that it raises", "S.other has no docstring",
        "S.another does not say that it raises",
    ]
    assert incomplete(function, "f") == ["f does not say what second is", "f does not say that it raises"]
    assert incomplete(lambda: 0, "l") == ["l has no docstring"]


@pytest.mark.parametrize("module", MODULES)
def test_public_docstrings_are_complete(module):
    module = importlib.import_module(module)
    assert module.__doc__
    assert len(set(module.__all__)) == len(module.__all__)
    things = [(name, getattr(module, name)) for name in module.__all__]
    documented = [(name, t) for name, t in things if inspect.isclass(t) or inspect.isfunction(t)]
    assert [complaint for name, t in documented for complaint in incomplete(t, name)] == []


@pytest.mark.parametrize("module", MODULES)
def test_the_examples_in_docstrings_run(module):
    printed = io.StringIO()
    runner = doctest.DocTestRunner()
    for test in doctest.DocTestFinder().find(importlib.import_module(module)):
        runner.run(test, out=printed.write)
    assert runner.failures == 0, printed.getvalue()


def test_what_a_reader_meets_first_has_an_example():
    found = set()
    for module in MODULES:
        found |= {test.name for test in doctest.DocTestFinder().find(importlib.import_module(module)) if test.examples}
    assert [name for name in SHOWN if name not in found] == []
    assert {f"pslib.optimizers.{name}" for name in pslib.__all__ if inspect.isclass(getattr(pslib, name))} <= set(SHOWN)


# --- the page ---------------------------------------------------------------------------------------

def table(page, heading):
    """The rows of the first table under a heading: [{column: cell}]."""
    lines = page.split(f"\n### {heading}\n", 1)[1].splitlines()
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines[1 : lines.index("", 1)]]
    head, _, *body = rows
    return [dict(zip(head, row, strict=True)) for row in body]


@pytest.mark.parametrize("make", [pslib.PSDASGD, pslib.PSSPS])
def test_the_settings_table_has_every_setting_with_its_default(make):
    rows = table((ROOT / "book" / "api.md").read_text(), make.__name__)
    settings = [p for name, p in inspect.signature(make).parameters.items() if name != "params"]
    told = {row["setting"].strip("`"): eval(row["default"].strip("`"), {"inf": math.inf}) for row in rows}
    assert set(told) == {p.name for p in settings} and len(rows) == len(told)
    assert {p.name: p.default for p in settings} == told
    assert all(row[column] for row in rows for column in ("range", "units", "when to touch it"))


@pytest.mark.parametrize("module", MODULES[1:])
def test_the_api_page_lists_every_module(module):
    assert f".. automodule:: {module}\n" in (ROOT / "book" / "api.md").read_text()
