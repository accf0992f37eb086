"""The two passes of the fast path in C (`kernels.c`): compiled with the machine's compiler at first use, kept in the user's cache.

The C code is given addresses, and one row of a table of scalars for each tensor; several threads take chunks of coordinates
from a shared counter.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import hashlib
import os
import platform
import shlex
import shutil
import subprocess
import sysconfig
import tempfile
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from .estimators import SLICE

if TYPE_CHECKING:
    from .fused import Plan

__all__ = ["Passes", "compiler", "library"]

# Coordinates a thread takes at a time: 16·p of the largest stride divide it or it is rounded up to that.
CHUNK = 2**15
TYPES = {torch.float32: "float32", torch.float64: "float64", torch.bfloat16: "bfloat16"}
FLAGS = ("-O3", "-march=native", "-fno-math-errno", "-fno-trapping-math", "-ffp-contract=off", "-shared", "-fPIC")


def compiler() -> list[str] | None:
    """The command of the C compiler: the environment's CC, else cc, gcc or clang; None if there is none."""
    named = [shlex.split(os.environ["CC"])] if os.environ.get("CC") else [["cc"], ["gcc"], ["clang"]]
    return next((command for command in named if shutil.which(command[0])), None)


@functools.cache
def library() -> ctypes.CDLL | None:
    """The compiled passes, or None where they cannot be had (no C compiler, or one that fails)."""
    source = Path(__file__).with_name("kernels.c")
    cc = compiler()
    if cc is None:
        return None
    cpuinfo = Path("/proc/cpuinfo")
    processor = next((line for line in cpuinfo.read_text().splitlines() if line.startswith("flags")), "") if cpuinfo.exists() else ""
    key = hashlib.sha256("\n".join([source.read_text(), *FLAGS, *cc, platform.machine(), processor]).encode()).hexdigest()[:16]
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "pslib"
    target = cache / f"kernels-{key}{sysconfig.get_config_var('SHLIB_SUFFIX') or '.so'}"
    if target.exists():
        with contextlib.suppress(OSError):
            return ctypes.CDLL(str(target))
    with tempfile.TemporaryDirectory() as folder:
        made = Path(folder) / target.name
        try:
            subprocess.run([*cc, *FLAGS, str(source), "-o", str(made), "-lm"], check=True, capture_output=True)
            found = ctypes.CDLL(str(made))
        except (OSError, subprocess.CalledProcessError):
            return None
        with contextlib.suppress(OSError):  # a cache that cannot be written costs a compilation in each process
            cache.mkdir(parents=True, exist_ok=True)
            part = target.with_suffix(f".{os.getpid()}")
            shutil.copyfile(made, part)
            os.replace(part, target)
    return found


@functools.cache
def workers(threads: int, process: int) -> ThreadPoolExecutor:
    """Threads for the passes; calls into C let go of the interpreter.  One pool for each process, because threads do not fork."""
    return ThreadPoolExecutor(threads, thread_name_prefix="pslib")


@dataclass
class Table:
    """The tensors of one type.

    Attributes:
        type: the name of the passes for it.
        at: which of the plan's tensors they are.
        index: the same, to index with.
        chunks: [chunks, 3], (tensor, first coordinate, count).
        stride: of the slice, one a tensor.
        buffers: [4, tensors] addresses of m, v, s and x₀; [2, tensors] without s and x₀.
        coordinates: how many there are in all.
        grads: the addresses of this step's gradients.
    """

    type: str
    at: list[int]
    index: Tensor | slice
    chunks: Tensor
    stride: Tensor
    buffers: Tensor
    coordinates: int
    grads: Tensor | None = None


def addresses(tensors: list[Tensor | None]) -> Tensor:
    """Where the tensors are in memory, 0 for none."""
    return torch.tensor([0 if t is None else t.data_ptr() for t in tensors], dtype=torch.int64)


def _argument(value: Any) -> Any:
    return ctypes.c_void_p(value.data_ptr()) if isinstance(value, Tensor) else value


class Passes:
    """The two passes in C; the same as `pslib.fused.Passes`, to the rounding of the sums.

    Args:
        plan: its tensors, their state and the table of scalars.
        shards: this process's part of the parameters.
    """

    def __init__(self, plan: Plan, shards: list[Tensor]):
        self.plan = plan
        self.tables = []
        for dtype in dict.fromkeys(x.dtype for x in shards):
            at = [i for i, x in enumerate(shards) if x.dtype == dtype]
            chunks = []
            for row, i in enumerate(at):
                run = plan.strides[i] * SLICE
                size = -(-CHUNK // run) * run
                chunks += [(row, a, min(size, shards[i].numel() - a)) for a in range(0, shards[i].numel(), size)]
            buffers = [[s[n].data_ptr() for s in (plan.states[i] for i in at)] for n in ("exp_avg", "exp_avg_sq")]
            if plan.learns:
                buffers += [[plan.states[i][n].data_ptr() for i in at] for n in ("weighted_grad_sum", "initial")]
            self.tables.append(Table(
                TYPES[dtype], at, torch.tensor(at) if len(at) < len(shards) else slice(None),
                torch.tensor(chunks, dtype=torch.int64).reshape(-1, 3), torch.tensor([plan.strides[i] for i in at]), torch.tensor(buffers),
                sum(shards[i].numel() for i in at),
            ))
        self.order = torch.tensor([i for table in self.tables for i in table.at]).argsort()

    def _run(self, table: Table, function: str, sums: int, *arguments: Any) -> Tensor:
        """Call one pass over the chunks of one type, on as many threads as torch uses; [tensors, sums]."""
        native: Any = library()
        partial = torch.empty(len(table.chunks), sums, dtype=torch.float64)
        following, total = torch.zeros(1, dtype=torch.int64), torch.zeros(len(table.at), sums, dtype=torch.float64)
        chunks = ctypes.c_int64(len(table.chunks))
        given = [chunks, *map(_argument, (following, table.chunks, table.stride, *arguments, partial))]
        call = functools.partial(getattr(native, f"{function}_{table.type}"), *given)
        threads = min(torch.get_num_threads(), len(table.chunks)) if table.coordinates > CHUNK else 1
        if threads > 1:
            pool = workers(threads - 1, os.getpid())
            others = [pool.submit(call) for _ in range(threads - 1)]
            call()
            for other in others:
                other.result()
        else:
            call()
        native.add_up(chunks, ctypes.c_int64(sums), *map(_argument, (table.chunks, partial, total)))
        return total

    def observe(self, grads: list[Tensor | None]) -> Tensor:
        """As `pslib.fused.Passes.observe`; Σ(ug)²/α² is 0 unless Polyak's step needs it."""
        seen = []
        for table in self.tables:
            table.grads = addresses([grads[i] for i in table.at])
            scalars, ratio = self.plan.scalars[table.index], int(not self.plan.learns)
            seen.append(self._run(table, "observe", 4, table.grads, table.buffers[1], scalars, ratio))
        return self._together(seen)

    def move(self, xs: list[Tensor], grads: list[Tensor | None]) -> Tensor:
        """As `pslib.fused.Passes.move`, with the gradients of `observe`."""
        sums = []
        for table in self.tables:
            buffers = [*table.buffers, *[None] * (4 - len(table.buffers))]
            x = addresses([xs[i] for i in table.at])
            sums.append(self._run(table, "move", 3, x, table.grads, *buffers, self.plan.scalars[table.index], self.plan.ok))
        return self._together(sums)

    def _together(self, rows: list[Tensor]) -> Tensor:
        """The rows of all tables in the order of the plan's tensors."""
        return rows[0] if len(rows) == 1 else torch.cat(rows)[self.order]
