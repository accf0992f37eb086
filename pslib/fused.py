"""The fast path: the update of `pslib.optimizers` in two passes over memory, for all tensors at once.

The first pass reads the gradient and v and returns, for each tensor, Σg², a² = Σα² and G² = Σv̂/α²; from these the estimator
knows the step and the weight of this gradient, and whether everything is finite.  The second pass reads and writes the rest
once and returns Σg(x₀ − x) and ‖s/α‖².  Everything between is arithmetic on vectors with one number a tensor, by the same
formulas as in the reference loop (`pslib.estimators`).  Nothing is read back by the host, so that a step can be captured in a
CUDA graph (with `lr` a tensor, if a schedule is to drive it).

On the CPU the passes are C (`pslib.native`); without a C compiler, and on other devices, they are torch's operations.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from . import distributed, native, scalings
from .estimators import Blocks, DAdaptation, Estimator, Polyak, completed, dense, dot, over_scaling, part, real

__all__ = ["Plan", "reason_against"]


def reason_against(optimizer: Any) -> str | None:
    """Why this optimizer cannot use the fast path, in half a sentence; None if it can.

    Args:
        optimizer: a `pslib.optimizers.ParameterScaled`.

    >>> from pslib import PSDASGD
    >>> reason_against(PSDASGD([torch.nn.Parameter(torch.ones(2))], scaling="none"))
    "it needs scaling='adam', refreshed at every step"
    """
    if type(optimizer.scaling) is not scalings.Adam or optimizer.scaling.refresh != 1:
        return "it needs scaling='adam', refreshed at every step"
    if type(optimizer.estimator) not in (DAdaptation, Polyak):
        return f"it knows D-Adaptation and Polyak's step, not {type(optimizer.estimator).__name__}"
    if optimizer.per not in ("model", "module", "tensor") or optimizer.units not in (None, "tensor"):
        return "it needs blocks no finer than a tensor and units of a tensor"
    for group in optimizer.param_groups:
        if optimizer.units is not None and group["eps"] != 0:
            return "with units it needs eps=0"
    shards = [distributed.local(p) for group in optimizer.param_groups for p in group["params"]]
    if any(x.device.type == "meta" for x in shards):
        return "parameters on the meta device have no values"
    if len({x.device for x in shards}) > 1:
        return "it needs all parameters on one device"
    if not all(map(dense, shards)):
        return "it needs parameters without gaps in memory"
    return None


# Columns of the table of scalars, one row a tensor; the same order as in kernels.c.
BETA2, NEW2, R, EPS, U, BETA1, NEW1, BETA3, NEW3, H, KEPT, SIGN = range(12)


class Passes:
    """The two passes in torch's operations, tensor by tensor; `pslib.native.Passes` has them in C.

    Args:
        plan: its tensors, their state and the table of scalars.
    """

    def __init__(self, plan: Plan):
        self.plan = plan

    def observe(self, grads: list[Tensor | None]) -> Tensor:
        """[tensors, 4]: Σ(ug)², Σα², Σv̂/α² and Σ(ug)²/α²; of this process's shards and, but for the first, of the slice."""
        return torch.stack([torch.stack(self._observe(i, g)) for i, g in enumerate(grads)])

    def _observe(self, i: int, g: Tensor | None) -> list[Tensor]:
        v = self.plan.states[i]["exp_avg_sq"]
        k, stride = self.plan.scalars[i].to(v.dtype), self.plan.strides[i]
        square = torch.zeros_like(v) if g is None else (k[U] * g.to(v.dtype)).square()
        v, sliced = part(v, stride), part(square, stride)
        if g is not None:
            v = k[BETA2] * v + k[NEW2] * sliced
        alpha_sq = v.sqrt() * k[R] + k[EPS]
        terms = (square, alpha_sq, over_scaling(v * (k[R] * k[R]), alpha_sq), over_scaling(sliced, alpha_sq))
        return [t.sum(dtype=torch.float64) for t in terms]

    def move(self, xs: list[Tensor], grads: list[Tensor | None]) -> Tensor:
        """[tensors, 3]: Σg(x₀ − x), Σs²/α² and Σα²(x₀ − x)²; and the step is taken, unless it is skipped."""
        return torch.stack([torch.stack(self._move(i, x, g)) for i, (x, g) in enumerate(zip(xs, grads, strict=True))])

    def _move(self, i: int, x: Tensor, g: Tensor | None) -> list[Tensor]:
        state, stride, ok = self.plan.states[i], self.plan.strides[i], self.plan.ok
        m, v = state["exp_avg"], state["exp_avg_sq"]
        k = self.plan.scalars[i].to(v.dtype)
        old, new_v = x.to(v.dtype), v
        if g is not None:
            g = g.to(v.dtype)
            ug = k[U] * g
            new_v = k[BETA2] * v + k[NEW2] * (ug * ug)
        alpha_sq = new_v.sqrt() * k[R] + k[EPS]
        sums = [alpha_sq.new_zeros((), dtype=torch.float64)] * 3
        if self.plan.learns:
            s = k[BETA3] * state["weighted_grad_sum"]
            gone, sliced = state["initial"].to(v.dtype) - part(old, stride), part(alpha_sq, stride)
            if g is not None:
                s = s + k[NEW3] * part(ug, stride)
                sums[0] = (k[SIGN] * part(g, stride) * gone).sum(dtype=torch.float64)
            sums[1] = (s * over_scaling(s, sliced)).sum(dtype=torch.float64)
            sums[2] = (gone * gone * sliced).sum(dtype=torch.float64)
            state["weighted_grad_sum"].copy_(torch.where(ok, s, state["weighted_grad_sum"]))
        if g is not None:
            new_m = k[BETA1] * m + k[NEW1] * ug
            new_x = (k[KEPT] * old - k[H] * over_scaling(new_m, alpha_sq)).to(x.dtype)
            for tensor, new in ((m, new_m), (v, new_v), (x, new_x)):
                tensor.copy_(torch.where(ok, new, tensor))
        return sums


class Vectors(Blocks):
    """Blocks whose numbers are vectors with one number a tensor; what `Blocks` adds up by loops, the passes have added up.

    Args:
        plan: whose tensors they are.
    """

    def __init__(self, plan: Plan):
        self.plan = plan
        self.device = plan.device

    def join(self, numbers: Tensor) -> Tensor:  # type: ignore[override]
        members = self.plan.members
        return numbers if members is None else torch.where(self.plan.filled, numbers[members], 0.0).sum(1)

    def spread(self, values: Tensor) -> Tensor:  # type: ignore[override]
        return values if self.plan.block is None else values[self.plan.block]

    def read(self, name: str, start: float) -> Tensor:
        """The block numbers `name`, `start` where there is none yet: nan, in the vectors."""
        values = self.plan.vectors[name]
        if self.plan.members is not None:
            # Of the parameter with most steps: one whose state was made for loading, by a gradient of zero, knows nothing.
            known = self.plan.filled & ~values[self.plan.members].isnan()
            most = torch.where(known, self.plan.vectors["step"][self.plan.members], -1.0).argmax(1, keepdim=True)
            values = values[self.plan.members].gather(1, most)[:, 0]
        return torch.where(values.isnan(), start, values)

    def write(self, name: str, values: Tensor) -> None:
        self.plan.write(name, self.spread(values))

    @property
    def sized(self) -> bool:  # type: ignore[override]
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

    def __init__(self, optimizer: Any):
        self.optimizer = optimizer
        self.skips: int | Tensor = 0
        self.written: dict[str, Tensor] = {}
        estimator: Estimator = optimizer.estimator
        self.learns = isinstance(estimator, DAdaptation)
        self.tensors: list[Tensor] = []
        self.waiting: list[Tensor] = []
        self.held: list[dict[str, Tensor]] = []
        rows = []
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
        self.members_of = [self.groups.count(number) for number in range(len(optimizer.param_groups))]
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
        self.single = self._vector([x.dtype != torch.float64 for x in locals_], torch.bool)
        self.scale = self._vector(self.strides)[:, None]
        self.sliced = max(self.strides) > 1
        fits = self.device.type == "cpu" and native.library() is not None and all(x.dtype in native.TYPES for x in locals_)
        self.passes = native.Passes(self, locals_) if fits else Passes(self)
        self.hyper: dict[str, Tensor] = {}
        self.settings: list | None = None
        self.active: dict[tuple[bool, ...], Tensor] = {}
        self.skips = torch.zeros((), dtype=torch.int64, device=self.device)
        self.sized = bool((self.blocks.start_squares() > 0).all())

    def current(self) -> bool:
        """Whether the optimizer still has these tensors and states, and none that waited has a gradient now."""
        state = self.optimizer.state
        return (
            sum(len(g["params"]) for g in self.optimizer.param_groups) == self.count
            and all(p.grad is None for p in self.waiting)
            and all(
                state.get(p) is s and all(s.get(name) is tensor for name, tensor in held.items())
                for p, s, held in zip(self.tensors, self.states, self.held, strict=True)
            )
        )

    def __reduce__(self) -> tuple:
        # A copy, or what is read from a file, has other memory: the optimizer that finds None there makes a plan of its own.
        return type(None), ()

    def _vector(self, values: Sequence, dtype: torch.dtype = torch.float64) -> Tensor:
        return torch.tensor(values, dtype=dtype, device=self.device)

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
            statistics = torch.float32 if x.dtype in (torch.bfloat16, torch.float16) else x.dtype
            state["exp_avg"] = torch.zeros_like(x, dtype=statistics)
            state["exp_avg_sq"] = torch.zeros_like(x, dtype=statistics)
            if self.learns:
                state["initial"] = part(x, self.strides[i]).clone()
                state["weighted_grad_sum"] = torch.zeros_like(state["initial"], dtype=statistics)
        for i, (x, state) in enumerate(zip(locals_, self.states, strict=True)):
            statistics, kept = state["exp_avg_sq"].dtype, part(x, self.strides[i])
            for name, form, dtype in (
                ("exp_avg", x, statistics), ("exp_avg_sq", x, statistics), ("initial", kept, x.dtype),
                ("weighted_grad_sum", kept, statistics),
            ):
                if name in state and (state[name].stride() != form.stride() or state[name].dtype != dtype):
                    state[name] = torch.empty_like(form, dtype=dtype).copy_(state[name])

    def _numbers(self, new: list[int], locals_: list[Tensor]) -> None:
        """Gather the state's small numbers into vectors, and let the state view them."""
        self.sizes = self._vector([distributed.numel(p) * (2 if p.is_complex() else 1) for p in self.tensors])
        units = [self.optimizer.param_groups[g].get("unit") for g in self.groups]
        self.given = self._vector([math.nan if u is None else float(u) for u in units])
        names = ("step", "rate", "distance", "initial_sq", *self.optimizer.estimator.kept, *(("unit",) if self.optimizer.units else ()))
        start = {"step": 0.0, "unit": 0.0}
        self.numbers = self._vector([[float(s.get(n, start.get(n, math.nan))) for s in self.states] for n in names])
        self.vectors: dict[str, Tensor] = dict(zip(names, self.numbers, strict=True))
        fresh = torch.zeros(len(self.tensors), 1, dtype=torch.float64, device=self.device)
        for i in new:
            fresh[i] = dot(locals_[i], locals_[i])
        fresh = torch.where(self.given.isnan(), self.reduce(fresh)[:, 0], self.sizes * self.given**2)
        known = self.vectors["initial_sq"]
        known.copy_(torch.where(known.isnan(), fresh, known))
        for i, s in enumerate(self.states):
            s.pop("alpha_sq", None)
            s.update({name: vector[i] for name, vector in self.vectors.items()})
        # To notice a tensor that somebody replaces: the passes know the old one's address.
        self.held = [{name: t for name, t in s.items() if isinstance(t, Tensor)} for s in self.states]

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
        for name, values in columns.items():
            # Filled in on the device: copying numbers to it would make the host wait.
            self.hyper[name] = torch.cat([
                value.to(self.device, torch.float64).reshape(()).expand(count) if isinstance(value, Tensor)
                else torch.full((count,), value, dtype=torch.float64, device=self.device)
                for value, count in zip(values, self.members_of, strict=True)
            ])
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
        xs, grads = self._gradients()
        pattern = tuple(g is not None for g in grads)
        if not any(pattern):
            return
        self._settings()
        hyper, scalars, self.written = self.hyper, self.scalars, {}
        if pattern not in self.active:
            self.active[pattern] = self._vector(pattern)
        active = self.active[pattern]
        k = (self.vectors["step"] + active).clamp(min=1.0)
        scalars[:, R] = (1 - hyper["beta2"] ** k).rsqrt()
        if optimizer.units:
            unit = self.vectors["unit"]
            seen_in = torch.where(unit > 0, unit, 1.0)
            scalars[:, U] = hyper["sign"] * seen_in
        self.seen = self.reduce(self.passes.observe(grads))
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
        sums = self.passes.move(xs, grads)
        torch.autograd.graph.increment_version([p for p, g in zip(self.tensors, grads, strict=True) if g is not None])
        if self.learns:
            sums = self.reduce(sums)
            if self.sliced:
                sums *= self.scale
            if estimator.travel and optimizer.units:
                sums[:, 2] /= torch.where(unit > 0, unit, 1.0).square()
            progress, s_sq, gone = (self.blocks.join(column) for column in sums.T)
            learned = estimator.estimate(self.blocks, inside, weight, a_sq, progress, s_sq, gone if estimator.travel else None)
            self.blocks.write("distance", learned)
        new = torch.stack([self.written.get(name, vector) for name, vector in self.vectors.items()])
        self.numbers.copy_(torch.where(self.ok, new, self.numbers))
        self.skips += self.ok.logical_not()

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
