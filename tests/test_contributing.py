"""CONTRIBUTING.md is followed to the letter in a copy of the repository, and the citations agree with each other."""

import datetime
import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
import tomllib
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import yaml

import pslib

ROOT = Path(__file__).resolve().parents[1]
PAGE = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
# The only chapter that the copy has; the others, the recorded runs and what is built are not needed.
CHAPTER = "parameter_scaling.ipynb"
LEFT_OUT = {".git", ".venv", "_build", "runs", "speed", "images", "pretrained", "data", "build", "dist", "trial", "__pycache__"}


# --- following a page -------------------------------------------------------------------------------

PLACE = re.compile(r"`(?P<file>[^`]+)`, (?P<how>a new file|at the end|(?:before|after|in place of) `(?P<line>.+)`):")
FENCE = re.compile(r"(?P<fence>`{3,})(?P<language>\w+)")
PROMISE = "Among other things this prints "


@dataclass
class Step:
    """A block of the page: put into a file, or run, and then `promises` are what it prints."""

    code: str
    file: str = ""
    how: str = ""
    line: str = ""
    promises: list = field(default_factory=list)


def steps_of(text):
    """The blocks of a part of the page in order; every one must say where it goes, and every promise follow a run."""
    found, lines, before = [], text.splitlines(), ""
    while lines:
        line = lines.pop(0)
        if fence := FENCE.fullmatch(line):
            end = lines.index(fence["fence"])
            code = "".join(f"{part}\n" for part in lines[:end])
            del lines[: end + 1]
            if place := PLACE.fullmatch(before):
                found.append(Step(code, place["file"], place["how"].split(" `")[0], place["line"] or ""))
            else:
                assert fence["language"] == "bash" and before.endswith("Run:"), f"it is not said what to do with:\n{code}"
                found.append(Step(code))
        elif line.startswith(PROMISE):
            paragraph = " ".join([line, *lines[: next((i for i, part in enumerate(lines) if not part), len(lines))]])
            listed = re.match(rf"{PROMISE}`[^`]+`((, | and )`[^`]+`)*", paragraph)
            assert found and not found[-1].file and listed, f"nothing was run that could print it, or nothing is promised: {line}"
            found[-1].promises = re.findall(r"`([^`]+)`", listed[0])
        before = line if line else before
    return found


def part(title):
    """What stands under a heading of the page."""
    (found,) = re.findall(rf"^## {title}\n(.*?)(?=^## |\Z)", PAGE, re.M | re.S)
    return found


def put(step, folder):
    """Put the block of a step where the step says."""
    path = folder / step.file
    if step.how == "a new file":
        assert not path.exists(), f"{step.file} is not new"
        path.write_text(step.code, encoding="utf-8")
        return
    assert path.is_file(), f"there is no {step.file}"
    lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
    gap = "\n\n" if re.match(r"class |def |@", step.code) else ""
    if step.how == "at the end":
        path.write_text("".join(lines) + gap + step.code, encoding="utf-8")
        return
    at = [i for i, line in enumerate(lines) if line.strip().startswith(step.line)]
    assert len(at) == 1, f"{len(at)} lines of {step.file} begin with {step.line!r}"
    first, last = {"before": (at[0], at[0]), "after": (at[0] + 1, at[0] + 1), "in place of": (at[0], at[0] + 1)}[step.how]
    lines[first:last] = [step.code + gap]
    path.write_text("".join(lines), encoding="utf-8")


def run(code, folder):
    """What commands print; every one of them must succeed."""
    kept = {key: value for key, value in os.environ.items() if not key.startswith("PYTEST") and key != "SITE_REQUIRED"}
    kept |= {"PYTHONPATH": str(folder), "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        ["bash", "-euo", "pipefail", "-c", code], cwd=folder, env=kept, capture_output=True, text=True, timeout=600, check=False,
    )
    printed = done.stdout + done.stderr
    assert done.returncode == 0, printed[-6000:]
    return printed


def follow(text, folder, running=True):
    """Do everything that a part of the page says; the steps."""
    found = steps_of(text)
    for step in found:
        if step.file:
            put(step, folder)
        elif running:
            printed = run(step.code, folder)
            missing = [promise for promise in step.promises if promise not in printed]
            assert not missing, f"{missing} was not printed:\n{printed[-6000:]}"
    return found


def linted(steps, folder):
    """The steps, once ruff has nothing to say about the Python files of the package and of the tests that they changed."""
    run("python -m ruff check --no-cache " + " ".join({s.file for s in steps if re.match(r"(pslib|tests)/", s.file)}), folder)
    return steps


def copied(folder):
    """The repository, but for what no example needs."""
    def left_out(_, names):
        return {n for n in names if n in LEFT_OUT or n.startswith(".") or (n.endswith(".ipynb") and n != CHAPTER)}

    return Path(shutil.copytree(ROOT, folder, ignore=left_out))


@pytest.fixture
def repository(tmp_path):
    folder = copied(tmp_path / "repository")
    where = "from importlib.util import find_spec; print(find_spec('pslib').origin)"
    assert run(f'python -c "{where}"', folder).strip() == str(folder / "pslib" / "__init__.py")
    return folder


# --- the examples -----------------------------------------------------------------------------------

def test_a_scaling(repository):
    steps = linted(follow(part("A scaling"), repository), repository)
    assert [step.file for step in steps] == [*3 * ["pslib/scalings.py"], "tests/test_average.py", ""]


def test_an_optimizer(repository):
    steps = linted(follow(part("An optimizer"), repository), repository)
    assert [step.file for step in steps] == [
        "pslib/contenders.py", "pslib/plotting.py", "tests/test_adamax.py", "pslib/experiments.py", "",
    ]
    losses = {p.stem: json.loads(p.read_text())["final_loss"] for p in (repository / "trial" / "smoke" / "digits-mlp").glob("*.json")}
    assert len(losses) == 2 * 7 * 3
    # The label says AdaMax; what was trained is not Adam under another name.
    assert all(losses[name.replace("adamax", "adamw")] != loss for name, loss in losses.items() if name.startswith("adamax"))


WINES = """
import torch
from sklearn.datasets import load_wine
from pathlib import Path
from pslib import datasets, experiments

d, whole = datasets.wine(), load_wine()
assert d.x_train.shape == (128, 13) and d.x_test.shape == (50, 13)
# sums of 128 numbers of order 1 in float32
assert torch.allclose(d.x_train.mean(0), torch.zeros(13), atol=1e-5) and torch.allclose(d.x_train.std(0), torch.ones(13), atol=1e-5)
# Ordering by the strength of the wine is invariant to the unit: every wine still has its grower.
x, y = torch.cat([d.x_train, d.x_test])[:, 12], torch.cat([d.y_train, d.y_test])
proline, target = torch.from_numpy(whole.data[:, 12]), torch.from_numpy(whole.target)
assert [sorted(y[x == v].tolist()) for v in x.unique()] == [sorted(target[proline == v].tolist()) for v in proline.unique()]
runs = experiments.collect("wine-beside", folder=Path("trial"))
print(min(experiments.metric(r) for group in experiments.best(runs).values() for r in group))
"""


def test_a_task(repository):
    steps = linted(follow(part("A task"), repository), repository)
    assert [step.file for step in steps] == [
        "pslib/datasets.py", "pslib/networks.py", "pslib/tasks.py", "pslib/experiments.py", "tests/test_wine.py", "",
    ]
    accuracy = run(f"export PSLIB_DATA=data\npython - <<'END'{WINES}END", repository)
    assert float(accuracy) > 0.9     # the largest class has 0.4 of the wines; all runs end at 0.96 or more
    assert "/data/" in (ROOT / ".gitignore").read_text().splitlines()


def test_a_chapter(repository):
    follow(part("A scaling"), repository, running=False)
    steps = follow(part("A chapter"), repository)
    assert [step.file for step in steps] == ["write_average.py", "_toc.yml", ""]
    contents = yaml.safe_load((repository / "_toc.yml").read_text())
    (chapters,) = [[c["file"] for c in p["chapters"]] for p in contents["parts"] if p["caption"] == "Parameter scaling"]
    assert chapters == ["book/parameter_scaling", "book/average"]


# --- the rest of the page ---------------------------------------------------------------------------

def names_that_are_nowhere(text, made=()):
    """Files, modules and targets of make that a page names in backticks and that do not exist."""
    found, targets = [], re.findall(r"^(\w+):", (ROOT / "Makefile").read_text(), re.M)
    # Blocks are followed; what they hold are no names.
    prose = re.sub(r"^(`{3,})\w+\n.*?^\1$", "", text, flags=re.M | re.S)
    for name in re.findall(r"`([^`\n]+)`", prose):
        for target in re.findall(r"\bmake (\w+)", name):
            found += [] if target in targets else [name]
        for module in re.findall(r"\bpython -m ([\w.]+)", name):
            found += [] if importlib.util.find_spec(module) else [name]
        for word in name.split():
            file = re.fullmatch(r"[\w./-]+\.(py|md|yml|bib|cfg|ipynb)|book/[\w/]+/|LICENSE", word)
            found += [word] if file and not (ROOT / word).exists() and word not in made else []
        for chapter in re.findall(r"-k (\w+)$", name):
            found += [] if (ROOT / "book" / f"{chapter}.ipynb").exists() else [name]
    return found


def test_everything_that_the_page_names_exists():
    made = {step.file for title in TITLES for step in steps_of(part(title)) if step.how == "a new file"}
    assert names_that_are_nowhere(PAGE, made) == []
    assert {"`make book`", "`make execute`", "`make test`"} <= set(re.findall(r"`make \w+`", PAGE))


TITLES = ["A scaling", "An optimizer", "A task", "A chapter"]


def test_the_page_is_short_and_has_four_examples():
    assert len(PAGE.splitlines()) <= 250 and max(map(len, PAGE.splitlines())) <= 140
    outside = PAGE[: PAGE.index("\n## ")]
    assert "```" not in outside     # every block belongs to an example, which is followed
    assert re.findall(r"^## (.+)$", PAGE, re.M) == TITLES


@pytest.mark.parametrize("text", ["See `tests/test_nothing.py`.", "Run `make nothing`.", "Run `python -m pslib.nothing`.",
                                  "Run `python -m pytest -k nothing`.", "They go to `book/nothing/`."])
def test_a_name_that_is_nowhere_is_seen(text):
    assert len(names_that_are_nowhere(text)) == 1


BLOCK = "```python\nb = 2\n```\n"


@pytest.mark.parametrize("place, becomes", [
    ("`a.py`, at the end:", "a = 1\nc = 3\nb = 2\n"), ("`a.py`, before `c`:", "a = 1\nb = 2\nc = 3\n"),
    ("`a.py`, after `c = `:", "a = 1\nc = 3\nb = 2\n"), ("`a.py`, in place of `a`:", "b = 2\nc = 3\n"),
])
def test_a_block_goes_where_the_line_above_it_says(place, becomes, tmp_path):
    (tmp_path / "a.py").write_text("a = 1\nc = 3\n")
    follow(f"{place}\n{BLOCK}", tmp_path)
    assert (tmp_path / "a.py").read_text() == becomes


@pytest.mark.parametrize("text, says", [
    (f"`b.py`, at the end:\n{BLOCK}", "there is no b.py"), (f"`a.py`, a new file:\n{BLOCK}", "is not new"),
    (f"`a.py`, after `d`:\n{BLOCK}", "0 lines"), (f"`a.py`, after `a`:\n{BLOCK}", "2 lines"),
    (f"Somewhere:\n{BLOCK}", "not said what to do"), (f"`a.py`, at the end:\n{BLOCK}{PROMISE}`2`.", "nothing was run"),
    ("Run:\n```bash\nno-such-command\n```", "no-such-command"), ("Run:\n```bash\necho first\nfalse\ntrue\n```", "first"),
    (f"Run:\n```bash\necho 1\n```\n{PROMISE}`1` and `2`.", "'2'. was not printed"),
])
def test_a_page_that_cannot_be_followed_is_seen(text, says, tmp_path):
    (tmp_path / "a.py").write_text("a = 1\nab = 3\n")
    with pytest.raises(AssertionError, match=says):
        follow(text, tmp_path)


# --- citations --------------------------------------------------------------------------------------

def cff():
    return yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))


def fields_of(entry):
    """The fields of a BibTeX entry, without braces."""
    return {key: value.replace("{", "").replace("}", "") for key, value in re.findall(r"^ +(\w+) += \{(.*)\},?$", entry, re.M)}


def book():
    """The BibTeX entry that the book asks to be cited by."""
    page = (ROOT / "book" / "bibliography.md").read_text(encoding="utf-8")
    (entry,) = re.findall(r"^## Citing this book\n.*?^```bibtex\n(@\w+\{.*?^\})\n```$", page, re.M | re.S)
    return fields_of(entry)


def test_the_citation_file_has_what_its_format_demands():
    """The fields that version 1.2.0 of the Citation File Format requires, and none that this file would misspell."""
    c = cff()
    assert c["cff-version"] == "1.2.0" and c["type"] == "software"
    assert all(isinstance(c[key], str) and c[key].strip() for key in ("message", "title", "version", "license", "abstract"))
    assert c["authors"] and all(set(author) in ({"name"}, {"family-names", "given-names"}) for author in c["authors"])
    assert isinstance(c["date-released"], datetime.date)
    assert set(c) == {
        "cff-version", "message", "type", "title", "abstract", "authors", "version", "date-released", "license", "keywords", "references",
    }
    assert len(set(c["keywords"])) == len(c["keywords"])
    for reference in c["references"]:
        assert {"type", "title", "authors"} <= set(reference) <= {"type", "title", "authors", "year", "doi", "url", "notes"}
        assert all(set(author) == {"family-names", "given-names"} for author in reference["authors"])


def test_the_citations_agree_with_each_other_and_with_the_package():
    c, entry = cff(), book()
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    config = yaml.safe_load((ROOT / "_config.yml").read_text(encoding="utf-8"))
    assert c["title"] == entry["title"] == config["title"] and c["title"] in project["description"]
    assert c["version"] == project["version"] == pslib.__version__ and entry["version"] == c["version"]
    assert str(c["date-released"].year) == entry["year"] == config["copyright"]
    assert c["license"] == project["license"]
    assert [author["name"] for author in c["authors"]] == [entry["author"]] == [config["author"]]
    assert f"Copyright (c) {entry['year']} {entry['author']}" in (ROOT / "LICENSE").read_text()


def test_the_papers_authors_and_title_are_those_of_the_bibliography():
    (reference,) = cff()["references"]
    text = (ROOT / "book" / "references.bib").read_text(encoding="utf-8")
    paper = fields_of(re.search(r"^@article\{suh2024interpreting,\n.*?^\}", text, re.M | re.S)[0])
    assert reference["title"] == paper["title"] and str(reference["year"]) == paper["year"]
    assert " and ".join(f"{a['family-names']}, {a['given-names']}" for a in reference["authors"]) == paper["author"]
    number = re.search(r"arXiv:(\d{4}\.\d{5})", paper["journal"])[1]
    assert reference["url"] == f"https://arxiv.org/abs/{number}" and reference["doi"] == f"10.48550/arXiv.{number}"
