"""The notebooks are up to date and built as a chapter is, and the tool that says so can be trusted."""

import ast
import importlib.util
import json
import re
from pathlib import Path

import nbformat
import pytest
import yaml
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook, new_output

ROOT = Path(__file__).resolve().parents[1]
_spec = importlib.util.spec_from_file_location("notebooks", ROOT / "book" / "_tools" / "notebooks.py")
tool = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(tool)

NOTEBOOKS = sorted((ROOT / "book").glob("*.ipynb"))
each_notebook = pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda p: p.stem)


# --- every notebook ---------------------------------------------------------------------------------

def test_every_chapter_of_the_contents_has_a_source():
    toc = yaml.safe_load((ROOT / "_toc.yml").read_text())
    files = [toc["root"]] + [c["file"] for part in toc["parts"] for c in part["chapters"]]
    missing = [f for f in files if not any((ROOT / f"{f}{end}").is_file() for end in (".ipynb", ".md"))]
    stray = [p.name for p in NOTEBOOKS if f"book/{p.stem}" not in files]
    assert not missing and not stray


@each_notebook
def test_notebook_is_up_to_date(path):
    assert list(tool.problems(path)) == []


# --- the parts of a chapter -------------------------------------------------------------------------

IGNORE_TAG, IGNORE_COMMENT = "nbval-ignore-output", re.compile(r"^\s*#\s*NBVAL_IGNORE_OUTPUT", re.I | re.M)
ERROR_TAGS = {"raises-exception", "nbval-raises-exception", "nbval-skip", "skip-execution", "nbval-check-output-lax"}
ERROR_COMMENT = re.compile(r"^\s*#\s*(NBVAL_SKIP|NBVAL_RAISES_EXCEPTION|PYTEST_VALIDATE_IGNORE_OUTPUT)", re.I | re.M)


def text_of(nb):
    return "\n\n".join(cell.source for cell in nb.cells if cell.cell_type == "markdown")


def code_of(nb):
    return [cell for cell in nb.cells if cell.cell_type == "code"]


def tags(cell):
    return set(cell.metadata.get("tags", []))


def missing_parts(nb):
    """What a chapter must have and this one has not."""
    text, missing = text_of(nb), []
    for what, pattern in {
        "a title": r"\A# \S", "'You will' (objectives)": r"You will", "'You need' (prerequisites)": r"You need",
        "minutes to read": r"\bminutes?\b", "a 'Summary' heading": r"^##+ .*Summary", "an 'Exercises' heading": r"^##+ .*Exercises",
        "'What comes next'": r"^##+ .*What comes next",
    }.items():
        if not re.search(pattern, text, re.M):
            missing.append(what)
    if not re.search(r"break it", text + "\n".join(c.source for c in code_of(nb)), re.I):
        missing.append("'Break it'")
    return missing


def unsolved_exercises(nb):
    """Labels of exercises without a solution, and a complaint when there are fewer than three."""
    text = text_of(nb)
    label = re.compile(r"^[`:]{3,}\{exercise(?:-start)?\}[^\n]*\n(?:\s*:[\w-]+:[^\n]*\n)*?\s*:label:\s*(\S+)", re.M)
    exercises = label.findall(text)
    solved = set(re.findall(r"^[`:]{3,}\{solution(?:-start)?\}\s+(\S+)", text, re.M))
    found = [e for e in exercises if e not in solved]
    return found + ([f"only {len(exercises)} exercises"] if len(exercises) < 3 else [])


def figures_without_alt(nb):
    """Code cells that draw a figure and do not say what is seen."""
    found, seen = [], set()
    for cell in code_of(nb):
        if any(mime in output.get("data", {}) for output in cell.outputs for mime in ("image/png", "image/svg+xml")):
            alt = cell.metadata.get("mystnb", {}).get("image", {}).get("alt", "").strip()
            if not alt or alt in seen:
                found.append(cell.id)
            seen.add(alt)
    return found


def hidden_failures(nb):
    """Cells that are told to fail quietly, or that nbval is told not to run."""
    return [cell.id for cell in code_of(nb) if tags(cell) & ERROR_TAGS or ERROR_COMMENT.search(cell.source)]


def uses_of_outputs(nb):
    """Cells through which an unchecked output could reach a checked one.

    A cell whose output nbval ignores can reach a later cell in two ways only. Through the variables it
    sets: those are computed again at every check, so a checked cell that prints them is still compared.
    Or through its output: IPython's history (``_``, ``__``, ``_12``, ``Out[12]``), captured output
    (``%%capture``), or a value glued into the prose. So no cell may read the history or capture
    output, and an ignored cell that glues a value must assert something about it.
    """
    found = []
    for cell in code_of(nb):
        ignored = IGNORE_TAG in tags(cell) or IGNORE_COMMENT.search(cell.source)
        if re.search(r"^\s*%%?(capture|store|macro)\b|get_ipython|capture_output", cell.source, re.M):
            found.append(f"{cell.id}: captures output or talks to IPython")
            continue
        tree = ast.parse(re.sub(r"^\s*[%!].*$", "pass", cell.source, flags=re.M))
        stored = {n.id for n in ast.walk(tree) if isinstance(n, ast.Name) and isinstance(n.ctx, ast.Store)}
        for node in ast.walk(tree):
            if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Load) and node.id not in stored \
                    and re.fullmatch(r"_{1,3}|_i*\d+|_o?h|Out|In", node.id):
                found.append(f"{cell.id}: reads {node.id}")
        glues = any(isinstance(n, ast.Call) and getattr(n.func, "id", "") == "glue" for n in ast.walk(tree))
        if ignored and glues and not any(isinstance(n, ast.Assert) for n in ast.walk(tree)):
            found.append(f"{cell.id}: glues a value that nothing checks")
    return found


def glued_pictures(nb):
    """Pictures glued for later: nbval compares them byte for byte, so they fail on another machine."""
    return [cell.id for cell in code_of(nb) for output in cell.outputs
            if any(m.startswith("application/papermill.record/image/") for m in output.get("data", {}))]


def glued_representations(nb):
    """Numbers glued as NumPy's or torch's own, which the text would show as np.int64(6)."""
    return [cell.id for cell in code_of(nb) for output in cell.outputs
            if re.match(r"np\.|tensor\(", output.get("data", {}).get("application/papermill.record/text/plain", ""))]


CHAPTER_CHECKS = [
    missing_parts, unsolved_exercises, figures_without_alt, hidden_failures, uses_of_outputs, glued_pictures, glued_representations,
]


@each_notebook
@pytest.mark.parametrize("check", CHAPTER_CHECKS, ids=lambda c: c.__name__)
def test_chapter(path, check):
    assert check(tool.read(path)) == []


# --- the checks go red ------------------------------------------------------------------------------

SOLVED = "".join(f"```{{exercise}} Title\n:label: ex-t-{n}\nx\n```\n\n````{{solution-start}} ex-t-{n}\n:class: dropdown\n````\n\n"
                 for n in (1, 2, 3))
GOOD = ("# Title\n\n**You will** x. **You need** x. About 5 minutes.\n\n## Break it\n\n## Summary\n\n## Exercises\n\n"
        f"{SOLVED}\n## What comes next\n")


def notebook(*cells):
    return new_notebook(cells=list(cells))


def code(source="x = 1", outputs=(), **metadata):
    return new_code_cell(source, outputs=list(outputs), metadata=metadata)


def test_a_complete_chapter_passes():
    picture = new_output("display_data", {"image/png": "eA=="})
    nb = notebook(new_markdown_cell(GOOD), code("_ = 1\nglue('a', 1)"),
                  code("y", [picture], mystnb={"image": {"alt": "A curve."}}))
    assert [found for check in CHAPTER_CHECKS if (found := check(nb))] == []


@pytest.mark.parametrize("gone", ["# Title", "You will", "You need", "minutes", "## Break it", "## Summary",
                                  "## Exercises", "## What comes next"])
def test_a_missing_part_is_seen(gone):
    assert missing_parts(notebook(new_markdown_cell(GOOD.replace(gone, "x"))))


def test_missing_and_unsolved_exercises_are_seen():
    assert unsolved_exercises(notebook(new_markdown_cell(SOLVED.replace("{solution-start} ex-t-2", "{solution-start} ex-t-9"))))
    assert unsolved_exercises(notebook(new_markdown_cell(SOLVED[:SOLVED.index("ex-t-3") - 30])))


def test_a_figure_without_alt_text_is_seen():
    picture = new_output("display_data", {"image/png": "eA=="})
    alt = {"image": {"alt": "A curve."}}
    assert figures_without_alt(notebook(code("y", [picture])))
    assert figures_without_alt(notebook(code("y", [picture], mystnb=alt), code("z", [picture], mystnb=alt)))


@pytest.mark.parametrize("cell", [code(tags=["raises-exception"]), code(tags=["nbval-skip"]), code("# NBVAL_SKIP\nx = 1")])
def test_a_cell_that_hides_errors_is_seen(cell):
    assert hidden_failures(notebook(cell))


@pytest.mark.parametrize("cell", [
    code("print(_)"), code("print(_12)"), code("y = Out[3]"), code("%%capture out\nprint(1)"),
    code("glue('a', 1.5)", tags=[IGNORE_TAG]), code("# NBVAL_IGNORE_OUTPUT\nglue('a', 1.5)"),
])
def test_a_use_of_an_output_is_seen(cell):
    assert uses_of_outputs(notebook(cell))


def test_glued_pictures_are_seen():
    output = new_output("display_data", {"application/papermill.record/image/png": "eA=="})
    assert glued_pictures(notebook(code("glue('f', f)", [output])))


def test_glued_representations_are_seen():
    output = new_output("display_data", {"application/papermill.record/text/plain": "np.int64(6)"})
    assert glued_representations(notebook(code("glue('n', n)", [output])))


# --- the tool ---------------------------------------------------------------------------------------

@pytest.fixture(scope="module")
def executed(tmp_path_factory):
    """A notebook as 'execute' leaves it, and its bytes."""
    path = tmp_path_factory.mktemp("book") / "trial.ipynb"
    cells = [new_markdown_cell("# Trial", id="title"), code("print('a')\nprint('b')"), code("1 + 1")]
    nbformat.write(new_notebook(cells=cells), path)
    tool.execute(path)
    return path


@pytest.fixture
def copy(executed, tmp_path):
    path = tmp_path / executed.name
    path.write_bytes(executed.read_bytes())
    return path


def edit(path, change):
    nb = tool.read(path)
    change(nb)
    path.write_text(tool.dumps(nb), encoding="utf-8")


def test_an_executed_notebook_has_nothing_wrong(executed):
    assert list(tool.problems(executed)) == []
    nb = tool.read(executed)
    assert [c.execution_count for c in code_of(nb)] == [1, 2]
    assert code_of(nb)[0].outputs[0].text == "a\nb\n"
    assert "version" not in nb.metadata.language_info
    assert set(nb.metadata.executed_with) == {"python", *tool.VERSIONED}
    assert all("execution" not in c.metadata for c in nb.cells)


def test_normalising_twice_changes_nothing(executed):
    assert tool.dumps(tool.normalise(tool.read(executed))) == executed.read_text(encoding="utf-8")


@pytest.mark.parametrize("change", [
    lambda nb: nb.metadata.language_info.update(version="3.11.7"),
    lambda nb: nb.metadata.kernelspec.update(display_name="my kernel"),
    lambda nb: nb.cells[1].metadata.update(execution={"iopub.execute_input": "2026-01-01T00:00:00Z"}),
    lambda nb: nb.cells[2].update(execution_count=7),
    lambda nb: nb.cells[1].pop("id"),
    lambda nb: nb.cells[1].outputs.append(new_output("stream", name="stdout", text="c")),
])
def test_a_notebook_in_another_form_is_reported_and_repaired(copy, change, capsys):
    edit(copy, change)
    assert any("not normalised" in p for p in tool.problems(copy))
    tool.run_normalise([copy])
    assert not any("not normalised" in p for p in tool.problems(copy))


def test_indentation_is_part_of_the_form(copy):
    copy.write_text(json.dumps(json.loads(copy.read_text()), indent=2), encoding="utf-8")
    assert any("not normalised" in p for p in tool.problems(copy))


def test_ids_are_kept_made_the_same_way_twice_and_unique(copy):
    before = [c.id for c in tool.read(copy).cells]
    assert [c.id for c in tool.normalise(tool.read(copy)).cells] == before
    edit(copy, lambda nb: nb.cells[1].pop("id"))
    assert tool.normalise(tool.read(copy)).cells[1].id == tool.normalise(tool.read(copy)).cells[1].id
    edit(copy, lambda nb: nb.cells[1].update(id=nb.cells[0].id))
    assert any("two cells" in p for p in tool.problems(copy))


def test_a_change_of_pslib_is_reported(copy, tmp_path):
    package = tmp_path / "pslib"
    (package / "sub").mkdir(parents=True)
    (package / "sub" / "a.py").write_text("x = 1\n")
    before = tool.pslib_fingerprint(package)
    edit(copy, lambda nb: nb.metadata.update(pslib_sha256=before))
    assert list(tool.problems(copy, before)) == []
    (package / "sub" / "a.py").write_text("x = 2\n")
    changed = tool.pslib_fingerprint(package)
    assert any("another pslib" in p for p in tool.problems(copy, changed))
    (package / "sub" / "a.py").rename(package / "a.py")
    assert tool.pslib_fingerprint(package) != changed


@pytest.mark.parametrize("change, word", [
    (lambda nb: nb.cells[2].update(source="1 + 2"), "edited after"),
    (lambda nb: nb.metadata.pop("pslib_sha256"), "another pslib"),
    (lambda nb: nb.cells[2].update(execution_count=None), "has not been executed"),
    (lambda nb: nb.cells[1].outputs.append(new_output("stream", name="stderr", text="UserWarning: x")), "stderr"),
    (lambda nb: nb.cells[1].outputs.append(new_output("error", ename="ValueError", evalue="", traceback=[])), "ValueError"),
    (lambda nb: nb.cells.extend(code() for _ in range(tool.MAX_CODE_CELLS)), "is the limit"),
])
def test_other_problems_are_reported(copy, change, word):
    edit(copy, change)
    assert any(word in problem for problem in tool.problems(copy))
    assert tool.run_check([copy]) == 1


def test_a_failing_notebook_is_left_as_it_was(tmp_path, capsys):
    path = tmp_path / "failing.ipynb"
    nbformat.write(new_notebook(cells=[code("x = 1"), new_code_cell("1 / 0", id="the-culprit")]), path)
    before = path.read_bytes()
    assert tool.run_execute([path], jobs=1) == 1
    printed = capsys.readouterr()
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]
    assert "failing.ipynb: FAILED" in printed.out
    assert "the-culprit" in printed.err and "ZeroDivisionError" in printed.err


@pytest.mark.parametrize("content", ["", "{}", "[1]", '{"nbformat": 3}'])
def test_a_file_that_is_no_notebook_is_one_sentence(tmp_path, content):
    path = tmp_path / "broken.ipynb"
    path.write_text(content)
    assert [p for p in tool.problems(path) if "is not a notebook" in p]


def test_an_unknown_chapter_is_one_sentence(capsys):
    assert tool.main(["check", "no_such_chapter"]) == 1
    assert "There is no notebook 'no_such_chapter'" in capsys.readouterr().err
