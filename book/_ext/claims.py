"""Claims: marked where a chapter makes them, collected in one table, and refused without evidence.

A mark is a directive in a chapter::

    ```{claim}
    :label: claim-loss-scale
    :status: proved
    :evidence: thm-loss-scale cell:check-loss-scale
    :tests: test_atlas.py::test_adam_ignores_the_scale_of_the_loss
    Adam's iterates do not change when the loss is multiplied by a power of two and $\\varepsilon = 0$.
    ```

* ``label`` is unique in the book and begins with ``claim-``; it is the mark's anchor.
* ``status`` is ``proved``, ``measured``, ``conjectured`` or ``refuted`` (then the false claim is stated).
* ``evidence`` names theorems by label and cells by id: ``cell:ID`` in the same notebook,
  ``cell:CHAPTER#ID`` in another. A measured claim needs a cell, a conjecture needs no evidence.
* ``tests`` names functions of the tests folder, ``test_file.py::test_function``; a conjecture needs none.
* ``seeds`` and ``hardware`` say what was run; a measured claim needs both. ``seeds`` is a number, ``none`` where
  nothing is random, or words such as ``8 starts``.
* ``source`` says whose claim it is: ``book`` (unless said otherwise), ``paper`` or ``seeds``. A second
  paragraph of a mark with another source says what this book found.
* ``only-in-index`` shows no box; the claim's place is its row in the index.

``{claims-counts}`` counts the claims by source and status. ``{claims-index}`` is a table of claims in the
order of the contents, of those with ``:source:`` (several with spaces between) and ``:part:`` (a caption of
the contents) if given. Every code cell of a notebook gets the anchor ``cell-ID``.

What is wrong with a mark is a warning, so that a strict build fails: see ``complaints`` for what can be
seen in the mark alone, and ``Claims.check_consistency`` for what needs the other pages. The first half of
this module needs no Sphinx page: the tests read the chapters with it.
"""

import ast
import json
import posixpath
import re
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path

from docutils import nodes
from docutils.parsers.rst import directives
from sphinx import addnodes
from sphinx.domains import Domain
from sphinx.util import logging
from sphinx.util.docutils import SphinxDirective
from sphinx.util.nodes import make_refnode

logger = logging.getLogger(__name__)

STATUSES = ("proved", "measured", "conjectured", "refuted")
SOURCES = {"book": "this book", "paper": "the paper", "seeds": "the two posts"}
OPTIONS = ("label", "status", "evidence", "tests", "seeds", "hardware", "source", "only-in-index")
LABEL = re.compile(r"claim-[a-z0-9]+(-[a-z0-9]+)*")
CELL = re.compile(r"cell:(?:(?P<chapter>[\w-]+)#)?(?P<id>[\w-]+)")
ROLE = re.compile(r"\{[\w:-]+\}`")
LINK = re.compile(r"\]\(|<https?:")


# --- marks as text ------------------------------------------------------------------------------------

@dataclass
class Mark:
    """One claim: its options as written, its statement, and the line of the text it begins in."""

    options: dict
    content: str
    line: int = 0
    docname: str = ""
    paragraphs: list = field(default_factory=list)

    @property
    def label(self):
        return self.options.get("label", "").strip()

    @property
    def status(self):
        return self.options.get("status", "").strip()

    @property
    def source(self):
        return self.options.get("source", "").strip() or "book"

    @property
    def evidence(self):
        return self.options.get("evidence", "").split()

    @property
    def tests(self):
        return self.options.get("tests", "").split()

    @property
    def cells(self):
        """(chapter or None, id) of each cell that is evidence."""
        return [(match["chapter"], match["id"]) for e in self.evidence if (match := CELL.fullmatch(e))]

    @property
    def theorems(self):
        """The labels among the evidence."""
        return [e for e in self.evidence if not e.startswith("cell:")]

    @property
    def runs(self):
        """What was run, in words: seeds and hardware."""
        seeds, hardware = (self.options.get(key, "").strip() for key in ("seeds", "hardware"))
        if seeds:
            seeds = {"none": "no randomness", "1": "1 seed"}.get(seeds, f"{seeds} seeds" if seeds[-1].isdigit() else seeds)
        return ", ".join(part for part in (seeds, hardware) if part)

    def document_of(self, chapter):
        """The name of the page that a cell's CHAPTER means, seen from this mark."""
        return posixpath.join(posixpath.dirname(self.docname), chapter) if chapter else self.docname


def marks(text):
    """The marks of a Markdown text, in order."""
    found, lines, number = [], text.splitlines(), 0
    while number < len(lines):
        match = re.fullmatch(r"\s*(`{3,}|:{3,})\{claim\}\s*", lines[number])
        number += 1
        if not match:
            continue
        first, fence, body = number, match[1], []
        while number < len(lines) and not re.fullmatch(rf"\s*{fence}{fence[0]}*\s*", lines[number]):
            body.append(lines[number])
            number += 1
        options = {}
        while body and (option := re.fullmatch(r"\s*:([\w-]+):\s*(.*?)\s*", body[0])):
            options[option[1]] = option[2]
            body.pop(0)
        found.append(Mark(options, "\n".join(body).strip(), first))
    return found


def complaints(mark, tests):
    """What is wrong with a mark, as far as the mark alone and the names of the ``tests`` can say."""
    name = f"The claim {mark.label!r}" if mark.label else "A claim"
    for key in mark.options:
        if key not in OPTIONS:
            yield f"{name} has the unknown option {key!r}; the options are {', '.join(OPTIONS)}."
    if not LABEL.fullmatch(mark.label):
        yield f"{name} needs a label of the form claim-some-words."
    if mark.status not in STATUSES:
        yield f"{name} has the status {mark.status!r}; a status is one of {', '.join(STATUSES)}."
    if mark.source not in SOURCES:
        yield f"{name} has the source {mark.source!r}; a source is one of {', '.join(SOURCES)}."
    if not mark.content:
        yield f"{name} states nothing."
    if ROLE.search(mark.content) or LINK.search(mark.content):
        yield f"{name} refers to something that the index on another page cannot show; evidence is what links are for."
    if mark.status != "conjectured":
        if not mark.evidence:
            yield f"{name} is {mark.status or 'stated'} without evidence."
        if not mark.tests:
            yield f"{name} is {mark.status or 'stated'} without a test."
    for piece in mark.evidence:
        if piece.startswith("cell:") and not CELL.fullmatch(piece):
            yield f"{name} has the evidence {piece!r}; a cell is written cell:ID or cell:CHAPTER#ID."
    for test in mark.tests:
        if test not in tests:
            yield f"{name} names the test {test!r}, which does not exist."
    if mark.status == "measured":
        if mark.evidence and not mark.cells:
            yield f"{name} is measured, but no cell is its evidence."
        for key in ("seeds", "hardware"):
            if not mark.options.get(key, "").strip():
                yield f"{name} is measured, but does not say the {key}."


@cache
def _tests_of(path, _changed):
    found = set()
    for node in ast.parse(path.read_text(encoding="utf-8")).body:
        if isinstance(node, ast.FunctionDef) and node.name.startswith("test"):
            found.add(f"{path.name}::{node.name}")
        elif isinstance(node, ast.ClassDef):
            found |= {f"{path.name}::{node.name}::{part.name}" for part in node.body
                      if isinstance(part, ast.FunctionDef) and part.name.startswith("test")}
    return found


def tests_in(folder):
    """Names of the test functions of a folder, as pytest writes them without parameters."""
    return set().union(*(_tests_of(path, path.stat().st_mtime_ns) for path in Path(folder).glob("test_*.py")))


def cells_of(path):
    """Number and id of every code cell of a notebook."""
    cells = json.loads(Path(path).read_text(encoding="utf-8"))["cells"]
    return {number: cell.get("id", "") for number, cell in enumerate(cells) if cell["cell_type"] == "code"}


# --- what Sphinx collects -----------------------------------------------------------------------------

class claim_evidence(nodes.General, nodes.Element):
    """Where the line under a statement goes, once every page has been read."""


class claims_index(nodes.General, nodes.Element):
    """Where a table of claims goes."""


class Claims(Domain):
    """The marks, the indexes and the code cells of every page."""

    name = "claims"
    label = "Claims"
    initial_data = {"marks": {}, "indexes": {}, "cells": {}}  # noqa: RUF012 (Sphinx copies it)

    def clear_doc(self, docname):
        for kept in self.data.values():
            if isinstance(kept, dict):
                kept.pop(docname, None)

    def merge_domaindata(self, docnames, otherdata):
        for key in self.initial_data:
            self.data[key].update({d: found for d, found in otherdata[key].items() if d in docnames})

    def process_doc(self, env, docname, document):
        """Keep each statement as it was read, for the index."""
        found = {mark.label: mark for mark in self.data["marks"].get(docname, [])}
        for box in document.findall(lambda node: isinstance(node, nodes.container) and "claim" in node["classes"]):
            if mark := found.get(box.get("claim")):
                mark.paragraphs = [plain_copy(part) for part in box.children if isinstance(part, nodes.paragraph)]

    def resolve_any_xref(self, env, fromdocname, builder, target, node, contnode):
        return []

    @property
    def order(self):
        """The pages in the order of the contents, each with the caption of its part."""
        found, root = {}, self.env.config.root_doc

        def visit(docname, part):
            if docname in found:
                return
            found[docname] = part
            for toctree in self.env.tocs.get(docname, nodes.Element()).findall(addnodes.toctree):
                for child in toctree["includefiles"]:
                    visit(child, toctree.get("caption") or part)

        visit(root, "")
        return found

    def listed(self, sources=(), part=None):
        """The claims of some sources and of a part, in the order of the contents."""
        parts = self.order
        return [mark for docname in parts if part in (None, parts[docname])
                for mark in self.data["marks"].get(docname, []) if not sources or mark.source in sources]

    def check_consistency(self):
        proofs, seen = getattr(self.env, "proof_list", {}), {}
        every = [mark for found in self.data["marks"].values() for mark in found]
        for mark in every:
            place = (mark.docname, mark.line)
            if mark.label in seen:
                other = seen[mark.label]
                warn(f"The claim {mark.label!r} is marked twice, first in {other.docname}.", place)
            seen.setdefault(mark.label, mark)
            for label in mark.theorems:
                if label not in proofs:
                    warn(f"The claim {mark.label!r} has the evidence {label!r}, which is the label of no theorem or definition.", place)
            for chapter, cell in mark.cells:
                if cell not in self.data["cells"].get(mark.document_of(chapter), ()):
                    warn(f"The claim {mark.label!r} has as evidence the cell {cell!r}, "
                         f"which {mark.document_of(chapter)} does not have.", place)
        indexes = [index for found in self.data["indexes"].values() for index in found]
        for index in indexes:
            if index["part"] is not None and index["part"] not in self.order.values():
                warn(f"No part of the contents is called {index['part']!r}.", index["place"])
        if indexes or any("only-in-index" in mark.options for mark in every):
            shown = {id(mark) for index in indexes for mark in self.listed(index["sources"], index["part"])}
            for mark in every:
                if id(mark) not in shown:
                    warn(f"The claim {mark.label!r} stands in no index of claims.", (mark.docname, mark.line))


def warn(message, place):
    logger.warning(message, location=place, type="claims")


def plain_copy(node):
    """A copy without ties to the page it was read from."""
    copy = node.deepcopy()
    for part in copy.findall():
        part.document = None
    return copy


class ClaimDirective(SphinxDirective):
    has_content = True
    option_spec = dict.fromkeys(OPTIONS, directives.unchanged)

    def run(self):
        options = {key: value or "" for key, value in self.options.items()}
        mark = Mark(options, "\n".join(self.content).strip(), self.lineno, self.env.docname)
        tests = tests_in(Path(self.env.srcdir) / self.config.claims_tests)
        wrong = list(complaints(mark, tests))
        for complaint in wrong:
            warn(complaint, (mark.docname, mark.line))
        if wrong:
            return []
        self.env.get_domain("claims").data["marks"].setdefault(mark.docname, []).append(mark)
        box = nodes.container(classes=["claim", f"claim-{mark.status}"], claim=mark.label)
        self.set_source_info(box)
        self.state.nested_parse(self.content, self.content_offset, box)
        document = self.state.document
        if "only-in-index" in options:
            box["classes"].append("claim-only-in-index")
        elif mark.label not in document.nameids:
            box["names"].append(mark.label)
            document.note_explicit_target(box)
        box.append(claim_evidence(claim=mark.label))
        return [box]


class ClaimsIndexDirective(SphinxDirective):
    option_spec = {"source": directives.unchanged, "part": directives.unchanged}  # noqa: RUF012

    def run(self):
        sources = tuple(self.options.get("source", "").split())
        place = (self.env.docname, self.lineno)
        for source in set(sources) - set(SOURCES):
            warn(f"An index of claims asks for the source {source!r}; a source is one of {', '.join(SOURCES)}.", place)
        wanted = {"sources": sources, "part": self.options.get("part"), "place": place}
        self.env.get_domain("claims").data["indexes"].setdefault(self.env.docname, []).append(wanted)
        return [claims_index(sources=sources, part=wanted["part"], counts=False)]


class ClaimsCountsDirective(SphinxDirective):
    def run(self):
        return [claims_index(sources=(), part=None, counts=True)]


def anchor_cells(app, doctree):
    """Give every code cell of a notebook an anchor, and remember which cells there are."""
    path = Path(app.env.doc2path(app.env.docname))
    if path.suffix != ".ipynb":
        return
    ids = cells_of(path)
    for cell in doctree.findall(nodes.container):
        if cell.get("nb_element") == "cell_code" and (name := ids.get(cell["cell_index"])) and f"cell-{name}" not in doctree.ids:
            cell["ids"].append(f"cell-{name}")
            doctree.ids[f"cell-{name}"] = cell
    app.env.get_domain("claims").data["cells"][app.env.docname] = set(ids.values())


# --- what the reader sees -----------------------------------------------------------------------------

class Writer:
    """Builds what is shown of the claims on one page."""

    def __init__(self, app, docname):
        self.app, self.env, self.builder, self.docname = app, app.env, app.builder, docname
        self.claims = app.env.get_domain("claims")

    def link(self, docname, anchor, *content):
        return make_refnode(self.builder, self.docname, docname, anchor, list(content))

    def evidence(self, mark):
        """Links to the theorems and cells, in groups by page; a page that is not the mark's own is named."""
        found = {}
        for piece in mark.evidence:
            if match := CELL.fullmatch(piece):
                docname = mark.document_of(match["chapter"])
                if match["id"] not in self.claims.data["cells"].get(docname, ()):
                    continue
                link = [nodes.Text("cell "), self.link(docname, f"cell-{match['id']}", nodes.literal("", match["id"]))]
            else:
                docname = getattr(self.env, "proof_list", {}).get(piece, {}).get("docname")
                if docname is None:
                    continue
                name = nodes.inline("", piece)
                wanted = addnodes.pending_xref("", name, refdomain="prf", reftype="ref", reftarget=piece, refdoc=self.docname)
                link = [self.env.get_domain("prf").resolve_xref(self.env, self.docname, self.builder, "ref", piece, wanted, name)]
            found.setdefault(docname, []).append(link)
        groups = []
        for docname, links in found.items():
            groups.append(joined(links, ", "))
            if docname != mark.docname:
                groups[-1] += [nodes.Text(" of "), nodes.emphasis("", self.env.titles[docname].astext())]
        return groups

    def line(self, mark):
        """The quiet line below a statement in its chapter."""
        parts = []
        if found := self.evidence(mark):
            parts.append([nodes.Text("Evidence: "), *joined(found, "; ")])
        if mark.tests:
            word = "Tests: " if len(mark.tests) > 1 else "Test: "
            parts.append([nodes.Text(word), *joined([[nodes.literal("", test)] for test in mark.tests], ", ")])
        if mark.runs:
            parts.append([nodes.Text(mark.runs)])
        if mark.source != "book":
            parts.append([nodes.Text(f"claim of {SOURCES[mark.source]}")])
        return nodes.paragraph("", "", *joined(parts, " · "), classes=["claim-evidence"])

    def row(self, mark, anchored):
        statement = [plain_copy(part) for part in mark.paragraphs]
        if statement and "only-in-index" in mark.options and mark.docname == self.docname and mark.label not in anchored:
            anchored.add(mark.label)
            statement[0]["ids"] = [mark.label]
        status = [nodes.paragraph("", "", tag(mark.status))]
        if mark.runs:
            status.append(nodes.paragraph("", mark.runs, classes=["claim-runs"]))
        evidence = self.evidence(mark)
        if "only-in-index" not in mark.options:
            evidence.insert(0, [self.link(mark.docname, mark.label, nodes.inline("", "in the text"))])
        where = [nodes.paragraph("", "", *joined(evidence, "; "))] if evidence else []
        return cells(statement, status, where + [nodes.paragraph("", "", nodes.literal("", test)) for test in mark.tests])

    def index(self, sources, part):
        found, rows, chapter, anchored = self.claims.listed(sources, part), [], None, set()
        for mark in found:
            if mark.docname != chapter and len({m.docname for m in found}) > 1:
                chapter = mark.docname
                title = nodes.strong("", self.env.titles[chapter].astext())
                rows.append(cells([nodes.paragraph("", "", self.link(chapter, "", title))], wide=2, classes=["claims-chapter"]))
            rows.append(self.row(mark, anchored))
        return table(["Claim", "Status", "Evidence and test"], [48, 17, 35], rows, "claims-index")

    def counts(self):
        every, rows = self.claims.listed(), []
        for source, whose in [*SOURCES.items(), ("", "all")]:
            own = [mark for mark in every if source in ("", mark.source)]
            numbers = [sum(mark.status == status for mark in own) for status in STATUSES]
            if own:
                rows.append(cells(*([nodes.paragraph("", str(entry))] for entry in [whose, *numbers, len(own)])))
        header = ["claims of", *(tag(status) for status in STATUSES), "all"]
        return table(header, [20, 16, 16, 16, 16, 16], rows, "claims-counts")


def joined(parts, separator):
    """Lists of nodes in one list, with a text between each two."""
    found = []
    for part in parts:
        found += [nodes.Text(separator), *part] if found else part
    return found


def tag(status):
    return nodes.inline("", status, classes=["claim-status", f"claim-status-{status}"])


def cells(*contents, wide=0, classes=()):
    """A row of a table; the last cell reaches over ``wide`` more columns."""
    row = nodes.row(classes=list(classes))
    for content in contents:
        row += nodes.entry("", *content)
    if wide:
        row[-1]["morecols"] = wide
    return row


def table(header, widths, rows, name):
    group = nodes.tgroup(cols=len(header))
    group += [nodes.colspec(colwidth=width) for width in widths]
    heads = [nodes.paragraph("", "", head if isinstance(head, nodes.Node) else nodes.Text(head)) for head in header]
    group += nodes.thead("", cells(*([head] for head in heads)))
    group += nodes.tbody("", *rows)
    return nodes.table("", group, classes=[name])


def show(app, doctree, docname):
    """Put the evidence under each statement, and the tables in their places."""
    writer = Writer(app, docname)
    found = {mark.label: mark for mark in writer.claims.data["marks"].get(docname, [])}
    for place in list(doctree.findall(claim_evidence)):
        mark, box = found[place["claim"]], place.parent
        if "only-in-index" in mark.options:
            box.parent.remove(box)
            continue
        if box.children and isinstance(box[0], nodes.paragraph):
            box[0].insert(0, nodes.Text(" "))
            box[0].insert(0, tag(mark.status))
        line = writer.line(mark)
        place.replace_self(line if line.children else [])
    for place in list(doctree.findall(claims_index)):
        place.replace_self(writer.counts() if place["counts"] else writer.index(place["sources"], place["part"]))


def pages_with_an_index(app, env):
    """An index changes with any chapter, and its formulas need the page to load MathJax."""
    found = list(env.get_domain("claims").data["indexes"])
    for docname in found:
        env.get_domain("math").data["has_equations"][docname] = True
    return found


def setup(app):
    app.add_config_value("claims_tests", "tests", "env")
    app.add_domain(Claims)
    app.add_node(claim_evidence)
    app.add_node(claims_index)
    app.add_directive("claim", ClaimDirective)
    app.add_directive("claims-index", ClaimsIndexDirective)
    app.add_directive("claims-counts", ClaimsCountsDirective)
    app.connect("doctree-read", anchor_cells)
    app.connect("env-updated", pages_with_an_index)
    app.connect("doctree-resolved", show)
    return {"version": "1", "env_version": 1, "parallel_read_safe": True, "parallel_write_safe": True}
