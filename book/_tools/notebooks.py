"""Execute, normalise and check the book's notebooks.

    python book/_tools/notebooks.py execute   [NAME ...]   run, normalise and save, each in a fresh kernel
    python book/_tools/notebooks.py normalise [NAME ...]   save in the one form that git keeps
    python book/_tools/notebooks.py check     [NAME ...]   say what is out of date; exit 1 if anything is

NAME is a chapter (``polyak``) or a path; without names all notebooks of ``book/`` are meant.

A notebook stores what it was executed with: a fingerprint of the sources of ``pslib``, one of its own
code cells, and the versions of the main packages. ``check`` fails when either fingerprint no longer
fits, so neither a change of ``pslib`` nor an edited cell can leave old outputs behind unnoticed.
"""

import argparse
import hashlib
import json
import os
import re
import sys
import time
from concurrent.futures import ThreadPoolExecutor, as_completed
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import nbformat
from nbformat.v4.rwbase import rejoin_lines, split_lines

ROOT = Path(__file__).resolve().parents[2]
BOOK = ROOT / "book"
MAX_CODE_CELLS = 28
KERNELSPEC = {"name": "python3", "display_name": "Python 3", "language": "python"}
LANGUAGE = {"name": "python", "pygments_lexer": "ipython3"}
VERSIONED = ["torch", "numpy", "sympy", "matplotlib"]
VOLATILE_CELL_METADATA = ["execution", "ExecuteTime", "collapsed", "scrolled", "vscode"]
VOLATILE_METADATA = ["widgets", "vscode", "toc", "varInspector", "orig_nbformat", "signature"]


class NotebookError(Exception):
    """A notebook that cannot be used; the message is one sentence for the reader."""


# --- fingerprints -----------------------------------------------------------------------------------

def pslib_fingerprint(package=ROOT / "pslib"):
    """SHA-256 over the names and bytes of every Python file of ``pslib``."""
    digest = hashlib.sha256()
    for path in sorted(package.rglob("*.py"), key=lambda p: p.relative_to(package).as_posix()):
        data = path.read_bytes()
        digest.update(f"{path.relative_to(package).as_posix()}\0{len(data)}\0".encode())
        digest.update(data)
    return digest.hexdigest()


def code_fingerprint(nb):
    """SHA-256 over the sources of the code cells, in order."""
    sources = [cell.source for cell in nb.cells if cell.cell_type == "code"]
    return hashlib.sha256(json.dumps(sources).encode()).hexdigest()


def executed_with():
    """Versions that outputs may depend on."""
    found = {"python": f"{sys.version_info.major}.{sys.version_info.minor}"}
    for name in VERSIONED:
        try:
            found[name] = version(name).split("+")[0]
        except PackageNotFoundError:
            found[name] = "not installed"
    return found


# --- one form ---------------------------------------------------------------------------------------

def read(path):
    """Read a notebook without letting nbformat invent random cell ids."""
    try:
        raw = json.loads(Path(path).read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        raise NotebookError(f"{path} is not a notebook: {error}") from None
    if not isinstance(raw, dict) or raw.get("nbformat") != 4 or "cells" not in raw:
        raise NotebookError(f"{path} is not a notebook of format 4.")
    return rejoin_lines(nbformat.from_dict(raw))


def _set_ids(nb):
    seen = set()
    for number, cell in enumerate(nb.cells, 1):
        if not cell.get("id"):
            text = f"{number}\0{cell.cell_type}\0{cell.source}"
            cell.id = "cell-" + hashlib.sha256(text.encode()).hexdigest()[:12]
        if cell.id in seen:
            raise NotebookError(f"two cells have the id {cell.id!r}")
        seen.add(cell.id)


def _merge_streams(outputs):
    merged = []
    for output in outputs:
        previous = merged[-1] if merged else None
        if previous and output.output_type == previous.output_type == "stream" and output.name == previous.name:
            previous.text += output.text
        else:
            merged.append(output)
    return merged


def normalise(nb):
    """Bring a notebook into the form git keeps, in place."""
    nb.nbformat, nb.nbformat_minor = 4, 5
    _set_ids(nb)
    for key in VOLATILE_METADATA:
        nb.metadata.pop(key, None)
    nb.metadata.kernelspec = nbformat.from_dict(KERNELSPEC)
    nb.metadata.language_info = nbformat.from_dict(LANGUAGE)
    count = 0
    for cell in nb.cells:
        for key in VOLATILE_CELL_METADATA:
            cell.metadata.pop(key, None)
        if cell.cell_type != "code":
            cell.pop("outputs", None)
            cell.pop("execution_count", None)
            continue
        cell.setdefault("execution_count", None)
        cell.outputs = _merge_streams(cell.get("outputs", []))
        if cell.execution_count is not None:
            count += 1
            cell.execution_count = count
        for output in cell.outputs:
            output.pop("transient", None)
            if output.output_type == "execute_result":
                output.execution_count = cell.execution_count
    nbformat.validate(nb)
    return nb


def dumps(nb):
    return json.dumps(split_lines(nbformat.from_dict(nb)), indent=1, sort_keys=True, ensure_ascii=False) + "\n"


def write(path, nb):
    """Replace the file in one step, so that an interrupted run leaves the old one."""
    path = Path(path)
    scratch = path.with_name(path.name + ".tmp")
    scratch.write_text(dumps(nb), encoding="utf-8")
    os.replace(scratch, path)


# --- commands ---------------------------------------------------------------------------------------

def _plain(text):
    return re.sub(r"\x1b\[[0-9;]*m", "", text)


def _failure(nb, error):
    """The failing cell and its error, readable in a terminal."""
    for number, cell in enumerate(nb.cells):
        for output in cell.get("outputs", []):
            if output.output_type == "error":
                trace = _plain("\n".join(output.traceback))
                return f"cell {cell.id!r} (number {number}) failed:\n{cell.source}\n\n{trace}"
    return f"{type(error).__name__}: {_plain(str(error))}"


def execute(path, timeout=600):
    """Run one notebook in a fresh kernel and save it; on failure raise and leave the file as it was."""
    from nbclient import NotebookClient
    from nbclient.exceptions import CellControlSignal, CellExecutionError, DeadKernelError

    path = Path(path).resolve()
    nb = normalise(read(path))
    stamp = pslib_fingerprint()       # before the run: a change during the run must count as stale
    for cell in nb.cells:
        if cell.cell_type == "code":
            cell.outputs, cell.execution_count = [], None
    client = NotebookClient(nb, timeout=timeout, kernel_name="python3", record_timing=False,
                            extra_arguments=["--log-level=ERROR"], resources={"metadata": {"path": str(path.parent)}})
    try:
        client.execute()
    except (CellExecutionError, CellControlSignal, DeadKernelError) as error:
        raise NotebookError(_failure(nb, error)) from None
    nb.metadata.pslib_sha256 = stamp
    nb.metadata.code_sha256 = code_fingerprint(nb)
    nb.metadata.executed_with = nbformat.from_dict(executed_with())
    write(path, normalise(nb))


def problems(path, fingerprint=None):
    """Everything that is wrong with a notebook as it lies on disk, one sentence each."""
    path = Path(path)
    text = path.read_text(encoding="utf-8")
    try:
        nb = read(path)
        if dumps(normalise(read(path))) != text:
            yield "is not normalised: run 'python book/_tools/notebooks.py normalise'"
    except (NotebookError, nbformat.ValidationError) as error:
        yield str(error)
        return
    code = [cell for cell in nb.cells if cell.cell_type == "code"]
    if nb.metadata.get("pslib_sha256") != (fingerprint or pslib_fingerprint()):
        yield f"was executed with another pslib: run 'make execute CHAPTER={path.stem}'"
    if nb.metadata.get("code_sha256") != code_fingerprint(nb):
        yield f"was edited after it was executed: run 'make execute CHAPTER={path.stem}'"
    if len(code) > MAX_CODE_CELLS:
        yield f"has {len(code)} code cells; {MAX_CODE_CELLS} is the limit"
    for cell in code:
        name = f"cell {cell.get('id')!r}"
        if cell.get("execution_count") is None:
            yield f"{name} has not been executed, so nothing checks it"
        for output in cell.get("outputs", []):
            if output.output_type == "stream" and output.name == "stderr":
                yield f"{name} writes to stderr: {output.text.strip().splitlines()[-1][:120]}"
            if output.output_type == "error":
                yield f"{name} ends in {output.ename}"


def find(names):
    """The notebooks meant by chapter names or paths; all of the book without names."""
    if not names:
        return sorted(BOOK.glob("*.ipynb"))
    found = []
    for name in names:
        path = next((p for p in (Path(name), BOOK / name, BOOK / f"{name}.ipynb") if p.is_file()), None)
        if path is None:
            known = ", ".join(p.stem for p in sorted(BOOK.glob("*.ipynb"))) or "none yet"
            raise NotebookError(f"There is no notebook {name!r}; the book has: {known}.")
        found.append(path)
    return found


def _timed(path):
    start = time.perf_counter()
    try:
        execute(path)
    except NotebookError as error:
        return str(error), time.perf_counter() - start
    return None, time.perf_counter() - start


def run_execute(paths, jobs):
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    failed, start = 0, time.perf_counter()
    with ThreadPoolExecutor(max(1, min(jobs, len(paths)))) as pool:   # each kernel is a process of its own
        waiting = {pool.submit(_timed, path): path for path in paths}
        for done, future in enumerate(as_completed(waiting), 1):
            error, seconds = future.result()
            state = "FAILED, left as it was" if error else "executed"
            print(f"[{done}/{len(paths)}] {waiting[future].name}: {state}, {seconds:.1f} s", flush=True)
            if error:
                failed += 1
                print(error, file=sys.stderr, flush=True)
    print(f"{len(paths) - failed} of {len(paths)} notebooks executed in {time.perf_counter() - start:.1f} s")
    return 1 if failed else 0


def run_normalise(paths):
    for path in paths:
        text = dumps(normalise(read(path)))
        if text != path.read_text(encoding="utf-8"):
            write(path, normalise(read(path)))
            print(f"{path.name}: normalised")
    return 0


def run_check(paths):
    found = [f"{path.name} {problem}" for path in paths for problem in problems(path)]
    print("\n".join(found) if found else f"{len(paths)} notebooks are up to date")
    return 1 if found else 0


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("command", choices=["execute", "normalise", "check"])
    parser.add_argument("names", nargs="*", metavar="NAME")
    parser.add_argument("--jobs", type=int, default=2, help="notebooks executed at the same time (default 2)")
    args = parser.parse_args(argv)
    try:
        paths = find(args.names)
        if args.command == "execute":
            return run_execute(paths, args.jobs)
        return {"normalise": run_normalise, "check": run_check}[args.command](paths)
    except NotebookError as error:
        print(error, file=sys.stderr)
        return 1


if __name__ == "__main__":
    sys.exit(main())
