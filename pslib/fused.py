"""The fast path: the update of `pslib.optimizers` in two passes over memory, for all tensors at once.

The first pass reads the gradient and v and returns, for each tensor, Σg², a² = Σα² and G² = Σv̂/α²; from these the estimator
knows the step and the weight of this gradient, and whether everything is finite.  The second pass reads and writes the rest
once and returns Σg(x₀ − x) and ‖s/α‖².  Everything between is arithmetic on vectors with one number a tensor, by the same
formulas as in the reference loop (`pslib.estimators`).  Nothing is read back by the host.

The passes are C (`kernels.c`), compiled with the machine's C compiler at first use and kept in the user's cache.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import math
import os
import platform
import shutil
import subprocess
import sysconfig
import tempfile
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from . import distributed, scalings
from .estimators import SLICE, Blocks, DAdaptation, Estimator, Polyak, completed, dense, dot, part, real

__all__ = ["Plan", "reason_against"]

# Coordinates a thread takes at a time: 16·p of the largest stride divide it or it is rounded up to that.
CHUNK = 2**15
# Columns of the table of scalars that change with every step; all of them are named in kernels.c.
R, U, NEW1, NEW3, H = 2, 4, 6, 8, 9
TYPES = {torch.float32: "float32", torch.float64: "float64", torch.bfloat16: "bfloat16"}
FLAGS = ("-O3", "-march=native", "-fno-math-errno", "-fno-trapping-math", "-ffp-contract=off", "-shared", "-fPIC")


def compiler() -> str | None:
    """The path of the C compiler: that of the environment's CC, else cc, gcc or clang; None if there is none."""
    named = os.environ.get("CC")
    return shutil.which(named) if named else next(filter(None, map(shutil.which, ("cc", "gcc", "clang"))), None)


@functools.cache
def library() -> ctypes.CDLL | None:
    """The compiled passes, or None where they cannot be had (no C compiler, or one that fails)."""
    source = Path(__file__).with_name("kernels.c")
    cc = compiler()
    if cc is None:
        return None
    cpuinfo = Path("/proc/cpuinfo")
    processor = next((line for line in cpuinfo.read_text().splitlines() if line.startswith("flags")), "") if cpuinfo.exists() else ""
    key = hashlib.sha256("\n".join([source.read_text(), *FLAGS, cc, platform.machine(), processor]).encode()).hexdigest()[:16]
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "pslib"
    target = cache / f"kernels-{key}{sysconfig.get_config_var('SHLIB_SUFFIX') or '.so'}"
    try:
        if not target.exists():
            cache.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryDirectory(dir=cache) as folder:
                made = Path(folder) / target.name
                subprocess.run([cc, *FLAGS, str(source), "-o", str(made), "-lm"], check=True, capture_output=True)
                os.replace(made, target)
        return ctypes.CDLL(str(target))
    except (OSError, subprocess.CalledProcessError):
        return None


@functools.cache
def workers(threads: int, process: int) -> ThreadPoolExecutor:
    """Threads for the passes; calls into C let go of the interpreter.  One pool for each process, because threads do not fork."""
    return ThreadPoolExecutor(threads, thread_name_prefix="pslib")


def reason_against(optimizer) -> str | None:
    """Why this optimizer cannot use the fast path, in half a sentence; None if it can."""
    if type(optimizer.scaling) is not scalings.Adam or optimizer.scaling.refresh != 1:
        return "it needs scaling='adam', refreshed at every step"
    if type(optimizer.estimator) not in (DAdaptation, Polyak):
        return f"it knows D-Adaptation and Polyak's step, not {type(optimizer.estimator).__name__}"
    if optimizer.per not in ("model", "module", "tensor") or optimizer.units not in (None, "tensor"):
        return "it needs blocks no finer than a tensor and units of a tensor"
    for group in optimizer.param_groups:
        if optimizer.units is not None and group["eps"] != 0:
            return "with units it needs eps=0"
        for p in group["params"]:
            x = distributed.local(p)
            if x.device.type != "cpu":
                return f"it runs on the CPU, not on {x.device.type}"
            if (torch.view_as_real(x) if x.is_complex() else x).dtype not in TYPES:
                return f"it needs float32, float64 or bfloat16 parameters, not {x.dtype}"
            if not dense(x):
                return "it needs parameters without gaps in memory"
    return "it needs a C compiler (set CC, or install gcc or clang)" if library() is None else None


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


def _argument(value):
    return ctypes.c_void_p(value.data_ptr()) if isinstance(value, Tensor) else value


class Vectors(Blocks):
    """Blocks whose numbers are vectors with one number a tensor; what `Blocks` adds up by loops, the passes have added up.

    Args:
        plan: whose tensors they are.
    """

    def __init__(self, plan: Plan):
        self.plan = plan
        self.device = plan.device

    def join(self, numbers: Tensor) -> Tensor:
        members = self.plan.members
        return numbers if members is None else torch.where(self.plan.filled, numbers[members], 0.0).sum(1)

    def spread(self, values: Tensor) -> Tensor:
        return values if self.plan.block is None else values[self.plan.block]

    def read(self, name: str, start: float) -> Tensor:
        """The block numbers `name`, `start` where there is none yet: nan, in the vectors."""
        values = self.plan.vectors[name]
        if self.plan.members is not None:
            values = torch.where(self.plan.filled & ~values[self.plan.members].isnan(), values[self.plan.members], -math.inf).amax(1)
            values = torch.where(values == -math.inf, math.nan, values)
        return torch.where(values.isnan(), start, values)

    def write(self, name: str, values: Tensor) -> None:
        self.plan.write(name, self.spread(values))

    @property
    def sized(self) -> bool:
        return self.plan.sized

    def count(self) -> Tensor:
        return self.join(self.plan.sizes)

    def start_squares(self) -> Tensor:
        return self.join(self.plan.vectors["initial_sq"])

    def squares(self) -> tuple[Tensor, Tensor]:
        return self.join(self.plan.seen[:, 1]), self.join(self.plan.seen[:, 2])

    def gradient_squares(self) -> Tensor:
        return self.join(self.plan.seen[:, 0])

    def scaled_gradient_squares(self) -> Tensor:
        return self.join(self.plan.seen[:, 3])

    def multiplier(self) -> Tensor:
        gamma = self.plan.hyper["lr"]
        return gamma if self.plan.members is None else torch.where(self.plan.filled, gamma[self.plan.members], 0.0).amax(1)

    def decay(self) -> Tensor:
        return self.plan.hyper["beta3"] if self.plan.block is None else self.plan.hyper["beta3"][self.plan.first]


class Plan:
    """The tensors of one optimizer that have had a gradient, laid out for the passes; it is made again when they change.

    The big buffers are the tensors in the optimizer's state.  Its small numbers are the elements of float64 vectors, one
    vector a name; the state holds views of them.

    Args:
        optimizer: its parameters, state and settings.
    """

    def __init__(self, optimizer):
        self.optimizer = optimizer
        estimator: Estimator = optimizer.estimator
        self.learns = isinstance(estimator, DAdaptation)
        self.tensors, self.waiting, rows = [], [], []
        for number, group in enumerate(optimizer.param_groups):
            names = group.get("param_names") or [""] * len(group["params"])
            for p, name in zip(group["params"], names, strict=True):
                if p.grad is None and not optimizer.state.get(p):
                    self.waiting.append(p)
                    continue
                self.tensors.append(p)
                rows.append((number, name.rpartition(".")[0]))
        self.count = sum(len(g["params"]) for g in optimizer.param_groups)
        self.groups = [r[0] for r in rows]
        self.states = [optimizer.state[p] for p in self.tensors]
        if not self.tensors:
            return
        self.reduce = distributed.Sums(self.tensors)
        self.device = distributed.local(self.tensors[0]).device
        self.blocks = Vectors(self)
        self._layout(optimizer.per, [r[1] for r in rows])
        locals_ = [real(distributed.local(p)) for p in self.tensors]
        self.strides = [optimizer.stride(p) for p in self.tensors]
        new = [i for i, s in enumerate(self.states) if "exp_avg" not in s]
        self._start(new, locals_)
        self._numbers(new, locals_)
        self._tables(locals_)
        self.hyper, self.settings = {}, None
        self.everywhere = torch.ones(len(self.tensors), dtype=torch.float64)
        self.sized = bool((self.blocks.start_squares() > 0).all())

    def current(self) -> bool:
        """Whether the optimizer still has these tensors and states, and none that waited has a gradient now."""
        state = self.optimizer.state
        return (
            sum(len(g["params"]) for g in self.optimizer.param_groups) == self.count
            and all(p.grad is None for p in self.waiting)
            and all(state.get(p) is s and s["exp_avg"] is m for p, s, m in zip(self.tensors, self.states, self.momenta, strict=True))
        )

    def _layout(self, per: str, modules: list[str]) -> None:
        """Which block each tensor belongs to, and the members of each block in a table filled up with zeros."""
        self.members = self.block = None
        if per == "tensor":
            return
        keys = [""] * len(modules) if per == "model" else modules
        blocks = list(dict.fromkeys(keys))
        rows: list[list[int]] = [[] for _ in blocks]
        self.block = torch.tensor([blocks.index(k) for k in keys], device=self.device)
        for i, b in enumerate(self.block.tolist()):
            rows[b].append(i)
        width = max(map(len, rows))
        self.members = torch.tensor([r + [0] * (width - len(r)) for r in rows], device=self.device)
        self.filled = torch.tensor([[True] * len(r) + [False] * (width - len(r)) for r in rows], device=self.device)
        self.first = self.members[:, 0]

    def _start(self, new: list[int], locals_: list[Tensor]) -> None:
        """Make the buffers of tensors that have none yet."""
        for i in new:
            x, state = locals_[i], self.states[i]
            statistics = torch.float32 if x.dtype == torch.bfloat16 else x.dtype
            state["exp_avg"] = torch.zeros_like(x, dtype=statistics)
            state["exp_avg_sq"] = torch.zeros_like(x, dtype=statistics)
            if self.learns:
                state["initial"] = part(x, self.strides[i]).clone()
                state["weighted_grad_sum"] = torch.zeros_like(state["initial"], dtype=statistics)
        for i, (x, state) in enumerate(zip(locals_, self.states, strict=True)):
            statistics, kept = state["exp_avg_sq"].dtype, part(x, self.strides[i])
            for name, form, dtype in (
                ("exp_avg", x, statistics), ("exp_avg_sq", x, statistics), ("initial", kept, x.dtype), ("weighted_grad_sum", kept, statistics),
            ):
                if name in state and (state[name].stride() != form.stride() or state[name].dtype != dtype):
                    state[name] = torch.empty_like(form, dtype=dtype).copy_(state[name])
        self.momenta = [s["exp_avg"] for s in self.states]

    def _numbers(self, new: list[int], locals_: list[Tensor]) -> None:
        """Gather the state's small numbers into vectors, and let the state view them."""
        self.sizes = torch.tensor([float(distributed.numel(p)) * (2 if p.is_complex() else 1) for p in self.tensors], dtype=torch.float64)
        units = [self.optimizer.param_groups[g].get("unit") for g in self.groups]
        self.given = torch.tensor([math.nan if u is None else float(u) for u in units], dtype=torch.float64)
        own = ("distance_numerator", "first_distance") if self.learns else ("polyak_bound",)
        names = ("step", "rate", "distance", "initial_sq", *own, *(("unit",) if self.optimizer.units else ()))
        start = {"step": 0.0, "unit": 0.0}
        self.numbers = torch.tensor([[float(s.get(n, start.get(n, math.nan))) for s in self.states] for n in names], dtype=torch.float64)
        self.vectors = dict(zip(names, self.numbers, strict=True))
        fresh = torch.zeros(len(self.tensors), 1, dtype=torch.float64)
        for i in new:
            fresh[i] = dot(locals_[i], locals_[i])
        fresh = torch.where(self.given.isnan(), self.reduce(fresh)[:, 0], self.sizes * self.given**2)
        known = self.vectors["initial_sq"]
        known.copy_(torch.where(known.isnan(), fresh, known))
        for i, s in enumerate(self.states):
            s.pop("alpha_sq", None)
            s.update({name: vector[i] for name, vector in self.vectors.items()})

    def _tables(self, locals_: list[Tensor]) -> None:
        """For each type: its tensors, the chunks, and the addresses of the buffers."""
        self.tables = []
        for dtype in dict.fromkeys(x.dtype for x in locals_):
            at = [i for i, x in enumerate(locals_) if x.dtype == dtype]
            chunks = []
            for row, i in enumerate(at):
                run = self.strides[i] * SLICE
                size = -(-CHUNK // run) * run
                chunks += [(row, a, min(size, locals_[i].numel() - a)) for a in range(0, locals_[i].numel(), size)]
            buffers = [[s[n].data_ptr() for s in (self.states[i] for i in at)] for n in ("exp_avg", "exp_avg_sq")]
            if self.learns:
                buffers += [[self.states[i][n].data_ptr() for i in at] for n in ("weighted_grad_sum", "initial")]
            self.tables.append(Table(
                TYPES[dtype], at, torch.tensor(at) if len(at) < len(locals_) else slice(None), torch.tensor(chunks, dtype=torch.int64).reshape(-1, 3),
                torch.tensor([self.strides[i] for i in at]), torch.tensor(buffers),
                sum(locals_[i].numel() for i in at),
            ))
        self.order = torch.tensor([i for table in self.tables for i in table.at]).argsort()
        self.single = torch.tensor([x.dtype != torch.float64 for x in locals_])
        self.scale = torch.tensor(self.strides, dtype=torch.float64)[:, None]
        self.sliced = max(self.strides) > 1

    def _settings(self) -> None:
        """The groups' settings as vectors and in the table of scalars; made again only when they change."""
        groups = self.optimizer.param_groups
        now = [(g["lr"], g["weight_decay"], g["betas"], g["eps"], g.get("maximize", False)) for g in groups]
        if not any(isinstance(g["lr"], Tensor) for g in groups) and now == self.settings:
            return
        self.settings = now
        columns = {
            "lr": [lr for lr, *_ in now], "decay": [d for _, d, *_ in now], "beta1": [b[0] for _, _, b, *_ in now],
            "beta2": [b[1] for _, _, b, *_ in now], "beta3": [math.sqrt(b[1]) for _, _, b, *_ in now], "eps": [e for *_, e, _ in now],
            "sign": [-1.0 if up else 1.0 for *_, up in now],
        }
        index = torch.tensor(self.groups)
        self.hyper = {name: torch.stack([torch.as_tensor(v, dtype=torch.float64) for v in values])[index] for name, values in columns.items()}
        h = self.hyper
        h["new1"], h["new2"], h["new3"] = 1 - h["beta1"], 1 - h["beta2"], 1 - h["beta3"]
        self.scalars = torch.stack([
            h["beta2"], h["new2"], h["beta2"], h["eps"], h["sign"], h["beta1"], h["beta1"], h["beta3"], h["beta3"], h["lr"],
            1 - h["lr"] * h["decay"], h["sign"],
        ], 1)

    def write(self, name: str, values: Tensor) -> None:
        """Numbers to keep at the end of this step, unless it is skipped."""
        self.written[name] = values

    def step(self, loss: Tensor | None) -> None:
        """Take one step with the gradients as they are."""
        optimizer, estimator = self.optimizer, self.optimizer.estimator
        self._settings()
        hyper, scalars, self.written = self.hyper, self.scalars, {}
        xs, grads = self._gradients()
        active = self.everywhere
        if any(g is None for g in grads):
            active = torch.tensor([g is not None for g in grads], dtype=torch.float64)
        k = (self.vectors["step"] + active).clamp(min=1.0)
        scalars[:, R] = (1 - hyper["beta2"] ** k).rsqrt()
        if optimizer.units:
            unit = self.vectors["unit"]
            seen_in = torch.where(unit > 0, unit, 1.0)
            scalars[:, U] = hyper["sign"] * seen_in
        self.seen = self.reduce(self._observe(grads))
        finite = torch.isfinite(self.seen[:, 0]).all()
        self.ok = finite if loss is None else finite & torch.isfinite(loss)
        if self.sliced:
            self.seen[:, 1:3] *= self.scale
        if optimizer.units:
            unit = self._units(unit, seen_in)
            scalars[:, U] = hyper["sign"] * unit
        if self.learns:
            inside, outside, weight, a_sq = estimator.weigh(self.blocks)
            scalars[:, NEW3] = hyper["new3"] * self.blocks.spread(weight)
        else:
            inside, outside = estimator.rate(self.blocks, loss)
        self.blocks.write("rate", inside * outside)
        self.write("step", torch.where(active > 0, k, self.vectors["step"]))
        scalars[:, NEW1] = hyper["new1"] * self.blocks.spread(inside)
        length = hyper["lr"] * self.blocks.spread(outside) / (1 - hyper["beta1"] ** k)
        scalars[:, H] = length * unit if optimizer.units else length
        sums = self._move(xs, grads)
        if self.learns:
            sums = self.reduce(sums)
            if self.sliced:
                sums *= self.scale
            progress, s_sq = self.blocks.join(sums[:, 0]), self.blocks.join(sums[:, 1])
            self.blocks.write("distance", estimator.estimate(self.blocks, inside, weight, a_sq, progress, s_sq))
        new = torch.stack([self.written.get(name, vector) for name, vector in self.vectors.items()])
        self.numbers.copy_(torch.where(self.ok, new, self.numbers))
        optimizer.count_skip(self.ok)

    def _units(self, unit: Tensor, seen_in: Tensor) -> Tensor:
        """Give a unit to tensors that have none and a gradient now; what was seen of them is put into it (ε = 0)."""
        size = (self.vectors["initial_sq"] / self.sizes).sqrt()
        size = torch.where(self.given.isnan(), size, self.given)
        found = torch.where(unit > 0, unit, completed(size, (self.seen[:, 0] / self.sizes).sqrt() / seen_in))
        found = torch.where(self.single, found.float().double(), found)  # the precision that it has in the reference loop
        self.seen[:, 1:3] *= (found / seen_in)[:, None]
        self.write("unit", found)
        return found

    def _gradients(self) -> tuple[list[Tensor], list[Tensor | None]]:
        """The shards of parameters and gradients, in the same order in memory."""
        xs = [real(distributed.local(p)) for p in self.tensors]
        grads: list[Tensor | None] = []
        for p, x in zip(self.tensors, xs, strict=True):
            g = p.grad
            if g is not None:
                g = real(self.optimizer.gradient(p))
                if g.dtype != x.dtype or g.stride() != x.stride():
                    g = torch.empty_like(x).copy_(g)
            grads.append(g)
        return xs, grads

    def _run(self, table: Table, function: str, sums: int, *arguments) -> Tensor:
        """Call one pass over the chunks of one type, on as many threads as torch uses; [tensors, sums]."""
        native = library()
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

    def _observe(self, grads: list[Tensor | None]) -> Tensor:
        """[tensors, 4]: Σ(ug)², Σα², Σv̂/α² and, for Polyak's step, Σ(ug)²/α²; of this process's shards and of the slice."""
        seen = []
        for table in self.tables:
            table.grads = addresses([grads[i] for i in table.at])
            seen.append(self._run(table, "observe", 4, table.grads, table.buffers[1], self.scalars[table.index], int(not self.learns)))
        return self._together(seen)

    def _move(self, xs: list[Tensor], grads: list[Tensor | None]) -> Tensor:
        """[tensors, 2]: Σg(x₀ − x) and Σs²/α²; and the step is taken."""
        sums = []
        moved = [p for p, g in zip(self.tensors, grads, strict=True) if g is not None]
        for table in self.tables:
            buffers = [*table.buffers, *[None] * (4 - len(table.buffers))]
            x = addresses([xs[i] for i in table.at])
            sums.append(self._run(table, "move", 2, x, table.grads, *buffers, self.scalars[table.index], self.ok))
        torch.autograd.graph.increment_version(moved)
        return self._together(sums)

    def _together(self, rows: list[Tensor]) -> Tensor:
        """The rows of all tables in the order of the plan's tensors."""
        return rows[0] if len(rows) == 1 else torch.cat(rows)[self.order]
