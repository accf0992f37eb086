"""Step-size estimators: how far to step in the scaled space.

An estimator sees sums over blocks of parameters and returns, per block, the pair (inside, outside) of::

    m ← β₁m + (1 − β₁)·inside·g,        x ← x − γ·outside·m̂/α²,

so that the effective learning rate is η = γ·inside·outside.  For `Polyak` and `DAdaptation` both parts are
unchanged, or change as α² does, when α is multiplied by any positive number: the update does not notice.

Units, with [x] a parameter's and [f] the loss's: α² in [f]/[x] under an adaptive scaling; a², G² in [f]/[x]
(α ≡ 1: none, and ([f]/[x])²); the distance δ in [x].
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from . import distributed

# The coordinates of a slice come in runs of this length: a line of a processor's cache.
SLICE = 16

__all__ = ["DAdaptation", "Entry", "Estimator", "Fixed", "Blocks", "Polyak"]


@dataclass
class Entry:
    """One parameter tensor x in one step; `grad` is None where there was no gradient this time.

    With a unit σ in its state, the estimator works on y = x/σ: `grad` and everything made from it belong to y.
    `module` names the module that the parameter belongs to; `owner` is the parameter itself where `param` is a shard or a
    real view of it; `stride` tells which coordinates the distance is estimated from; `group` has the parameter's settings and
    `alpha_sq` the scaling's α².
    """

    param: Tensor
    grad: Tensor | None
    state: dict[str, Any]
    group: dict[str, Any]
    alpha_sq: Tensor
    module: str = ""
    stride: int = 1
    owner: Tensor | None = None

    @property
    def whole(self) -> Tensor:
        """The parameter as the optimizer was given it."""
        return self.param if self.owner is None else self.owner

    def total(self, number: Tensor) -> Tensor:
        """A sum over this process's shard of the parameter as the sum over all of it."""
        return number if self.owner is None else distributed.Sums([self.owner])(number.reshape(1, 1)).reshape(())

    def part(self, values: Tensor) -> Tensor:
        """The coordinates that the distance is estimated from: all, or the first 16 of every 16·stride, as a flat view."""
        return part(values, self.stride)

    @property
    def second_moment(self) -> Tensor:
        """v̂, bias-corrected, shaped like the parameter, units ([f]/[x])²."""
        return self.state["exp_avg_sq"] / (1 - self.group["betas"][1] ** self.state["step"])

    @property
    def moved(self) -> Tensor:
        """x₀ − x on `part`, in the unit of the parameter if it has one."""
        statistics = self.state["exp_avg_sq"].dtype
        difference = self.state["initial"].to(statistics) - self.part(self.param).to(statistics)
        unit = self.state.get("unit")
        return difference if unit is None else difference / (self.part(unit) if unit.dim() else unit)


def dense(x: Tensor) -> bool:
    """Whether x fills its memory without gaps, in whatever order."""
    return torch.ops.aten.is_non_overlapping_and_dense.default(x)


def real(x: Tensor) -> Tensor:
    """A complex tensor as the real one of its parts, on the same memory; any other as it is."""
    return torch.view_as_real(x) if x.is_complex() else x


def part(values: Tensor, stride: int) -> Tensor:
    """All coordinates for stride 1; else the first 16 of every 16·stride, in the order of memory, as a vector."""
    if stride == 1:
        return values
    rows = values.as_strided((values.numel(),), (1,)) if dense(values) else values.flatten()
    return rows[: len(rows) // SLICE * SLICE].view(-1, SLICE)[::stride].flatten()


def over_scaling(numerator: Tensor, alpha_sq: Tensor) -> Tensor:
    """numerator/α², and 0 on dead coordinates (α² = 0): they add nothing to any sum and never move."""
    return torch.where(alpha_sq > 0, numerator / alpha_sq, torch.zeros_like(numerator))


def dot(x: Tensor, y: Tensor) -> Tensor:
    """⟨x, y⟩ as a float64 scalar; products of half-precision numbers are taken in single precision."""
    if x.dtype in (torch.float16, torch.bfloat16):
        x, y = x.float(), y.float()
    return (x * y).sum(dtype=torch.float64)


def _number(entry: Entry, value: float) -> Tensor:
    return torch.full((), value, dtype=torch.float64, device=entry.param.device)


def completed(units: Tensor, grad_rms: Tensor) -> Tensor:
    """Units, with one borrowed for each block that has none because it starts at zero.

    Args:
        units: [blocks], the root mean square of each block's start, 0 where it starts at zero.
        grad_rms: [blocks], the root mean square of its gradient, 0 where there is none yet.

    The borrowed unit is e/grad_rms, with e the mean of units·grad_rms (in the loss's unit [f]) over the blocks that have
    both.  It is 0, to be borrowed later, for a block without a gradient.  Where there is nothing to borrow from, because
    every block with a gradient starts at zero, it is 1: no rule that sees gradients alone can do better (the chapter
    "Units restored" proves it); set `unit` for such parameters.

    >>> completed(torch.tensor([2.0, 0.0, 0.0]), torch.tensor([1.0, 4.0, 0.0])).tolist()
    [2.0, 0.5, 0.0]
    """
    known = (units > 0) & (grad_rms > 0)
    mean = torch.where(known, units * grad_rms, 0.0).sum() / known.sum()
    energy = torch.where(known.any(), mean, grad_rms)
    return torch.where(units > 0, units, torch.where(grad_rms > 0, energy / grad_rms, 0.0))


class Blocks:
    """The parameters of one step, and sums over blocks of them.

    Args:
        entries: the parameters that have optimizer state.
        per: what one block is: "model" (everything), "module" (the parameters of one module), "tensor", "neuron" (a row
            of a matrix or filter; a vector is one block) or "coordinate".

    A block's numbers are kept in the state of each of its parameters, so that any subset of the
    state still says everything about its own blocks.

    >>> x = torch.tensor([[1.0, 2.0], [3.0, 4.0]])
    >>> entries = [Entry(x, torch.ones(2, 2), {}, {"lr": 1.0}, torch.ones(2, 2))]
    >>> Blocks(entries, "tensor").sum(lambda entry: entry.param).tolist()
    [10.0]
    >>> Blocks(entries, "neuron").sum(lambda entry: entry.param).tolist()
    [3.0, 7.0]
    """

    KINDS = ("model", "module", "tensor", "neuron", "coordinate")
    # Whether every block is known to have started away from zero.
    sized = False

    def __init__(self, entries: list[Entry], per: str):
        self.entries, self.per = entries, per
        self.device = entries[0].param.device
        modules = list(dict.fromkeys(e.module for e in entries))
        self.shared = {"model": [0] * len(entries), "module": [modules.index(e.module) for e in entries]}.get(per)
        self.reduce = distributed.Sums([e.whole for e in entries])

    def sum(self, term: Callable[[Any], Tensor]) -> Tensor:
        """Σ over each block of `term(entry)`, which is shaped like the parameter: a float64 vector, one number a block."""
        return self.join(self._whole([self._reduced(e, term(e)) for e in self.entries]))

    def grad_sum(self, term: Callable[[Any], Tensor]) -> Tensor:
        """Like `sum`, over the parameters that have a gradient in this step."""
        return self.sum(lambda e: torch.zeros_like(e.param) if e.grad is None else term(e))

    def part_sum(self, term: Callable[[Any], Tensor]) -> Tensor:
        """Σ of `term(entry)`, which is shaped like `entry.part`, as an estimate of the sum over all coordinates."""
        return self.join(self._whole([self._reduced(e, term(e)) * e.stride for e in self.entries]))

    def squares(self) -> tuple[Tensor, Tensor]:
        """a² = Σα² and G² = Σv̂/α², both estimated from `part`."""
        a_sq = self.part_sum(lambda e: e.part(e.alpha_sq))
        return a_sq, self.part_sum(lambda e: over_scaling(e.part(e.second_moment), e.part(e.alpha_sq)))

    def gradient_squares(self) -> Tensor:
        """Σg²."""
        return self.grad_sum(lambda e: e.grad * e.grad)

    def scaled_gradient_squares(self) -> Tensor:
        """‖g/α‖² = Σg²/α²."""
        return self.grad_sum(lambda e: e.grad * over_scaling(e.grad, e.alpha_sq))

    def start_squares(self) -> Tensor:
        """Σx₀², with a group's `unit` for each x₀ if it has one."""
        if self.per not in ("neuron", "coordinate"):
            return self.join([e.state["initial_sq"].to(self.device) for e in self.entries])
        unit = [e.group.get("unit") for e in self.entries]
        start = [e.state["initial"] if u is None else torch.full_like(e.param, u) for e, u in zip(self.entries, unit, strict=True)]
        return self.join([self._reduced(e, x.square()) for e, x in zip(self.entries, start, strict=True)])

    def multiplier(self) -> Tensor:
        """The schedule's γ; the largest, where a block's groups differ."""
        return self.largest(lambda e: float(e.group["lr"]))

    def decay(self) -> Tensor:
        """β₃ = √β₂."""
        return self.largest(lambda e: math.sqrt(e.group["betas"][1]))

    def count(self) -> Tensor:
        """How many coordinates each block has."""
        return self.sum(lambda e: torch.ones_like(e.param))

    def join(self, numbers: list[Tensor]) -> Tensor:
        """One number a block, from sums over what each parameter has of it."""
        if self.shared is None:
            return torch.cat([n.reshape(-1) for n in numbers])
        return torch.stack([torch.stack(ns).sum(0) for ns in self._of_blocks(numbers)])

    def largest(self, value: Callable[[Entry], float]) -> Tensor:
        """The largest `value(entry)`, a Python number, in each block."""
        values = [float(value(e)) for e in self.entries]
        if self.shared is None:
            values = [v for e, v in zip(self.entries, values, strict=True) for _ in range(math.prod(self._shape(e)))]
        else:
            values = [max(vs) for vs in self._of_blocks(values)]
        if len(set(values)) == 1:
            # Filled there, not copied from here: a copy would make a GPU's step wait.
            return torch.full((len(values),), values[0], dtype=torch.float64, device=self.device)
        return torch.tensor(values, dtype=torch.float64, device=self.device)

    def read(self, name: str, start: float) -> Tensor:
        """The block numbers `name`, `start` for a block that has none yet (or nan)."""
        new = torch.full((), start, dtype=torch.float64, device=self.device)
        kept = [e.state.get(name) for e in self.entries]
        values = [None if v is None else torch.where(v.to(self.device).isnan(), new, v.to(self.device)) for v in kept]
        if self.shared is None:
            return torch.cat([
                new.expand(math.prod(self._shape(e))) if v is None else v.reshape(-1) for e, v in zip(self.entries, values, strict=True)
            ])
        # Of the parameter with most steps: one whose state was made for loading, by a gradient of zero, knows nothing.
        known = [None if v is None else (int(e.state.get("step", 0)), v) for e, v in zip(self.entries, values, strict=True)]
        chosen = [
            max((pair for pair in block if pair is not None), key=lambda pair: pair[0], default=(0, new))
            for block in self._of_blocks(known)
        ]
        return torch.stack([v for _, v in chosen])

    def write(self, name: str, values: Tensor) -> None:
        """Keep the block numbers `name` in the state of every parameter of the block."""
        for entry, value in zip(self.entries, self.spread(values), strict=True):
            entry.state[name] = value

    def spread(self, values: Tensor) -> list[Tensor]:
        """Block numbers as one tensor a parameter, which broadcasts over it."""
        if self.shared is not None:
            return [values[b] for b in self.shared]
        parts = values.split([math.prod(self._shape(e)) for e in self.entries])
        return [part.reshape(self._shape(e)) for e, part in zip(self.entries, parts, strict=True)]

    def _shape(self, e: Entry) -> tuple[int, ...]:
        """The shape of one parameter's own block numbers."""
        shape = tuple(e.param.shape)
        if self.per == "coordinate":
            return shape
        return (shape[0],) + (1,) * (len(shape) - 1) if self.per == "neuron" and len(shape) > 1 else ()

    def _reduced(self, e: Entry, values: Tensor) -> Tensor:
        if self.per == "coordinate":
            return values.double().to(self.device)
        rows = self._shape(e)
        return (values.flatten(1).sum(1, dtype=torch.float64) if rows else values.sum(dtype=torch.float64)).to(self.device)

    def _whole(self, numbers: list[Tensor]) -> list[Tensor]:
        """Sums over shards as sums over whole parameters; blocks finer than a tensor are not offered for shards."""
        if self.per in ("neuron", "coordinate"):
            return numbers
        return list(self.reduce(torch.stack(numbers).unsqueeze(1)).squeeze(1))

    def _of_blocks(self, values: list) -> list[list]:
        assert self.shared is not None
        return [[v for v, b in zip(values, self.shared, strict=True) if b == block] for block in range(max(self.shared) + 1)]


class Estimator:
    """Base class.

    `needs_loss` says whether `rate` must be given the loss, `f_star` its lowest value; `kept` names the block numbers that the
    estimator keeps besides the rate and the distance.
    """

    needs_loss = False
    f_star = 0.0
    kept: tuple[str, ...] = ()

    def start(self, entry: Entry) -> None:
        """Make the parameter's buffers at its first gradient."""

    def rate(self, blocks: Blocks, loss: Tensor | None) -> tuple[Tensor, Tensor]:
        """Return (inside, outside), one float64 number a block each."""
        raise TypeError(f"{type(self).__name__} must define rate(blocks, loss).")


class Fixed(Estimator):
    """No estimate: inside = outside = 1, so that `lr` itself is the learning rate, as in torch's optimizers."""

    def rate(self, blocks: Blocks, loss: Tensor | None) -> tuple[Tensor, Tensor]:
        one = blocks.largest(lambda e: 1.0)
        return one, one


class Polyak(Estimator):
    """Polyak's step in the scaled space, η = (f − f*)₊ / (c‖g/α‖²) (Polyak 1987; Loizou et al. 2021, SPS).

    Args:
        c: the constant in the denominator, without units (> 0).
        f_star: the loss's known lower bound f*, in the loss's units.
        d0: the first step is at most d0·rms(x₀) long (ηG/a, > 0; `inf`: no such bound).
        growth_rate: η/a² grows at most by this factor a step (≥ 1; `inf`: no bound after the first step).

    The bound is on ρ = η/a², which does not change when α is multiplied by a number; with α ≡ 1 and d0 = inf it is
    the smoothed bound of the SPS authors' code.  A loss at or below f* gives η = 0 and leaves the bound alone.
    """

    needs_loss = True
    kept = ("polyak_bound",)

    def __init__(self, c: float, f_star: float, d0: float, growth_rate: float):
        self.c, self.f_star, self.d0, self.growth_rate = c, f_star, d0, growth_rate

    def start(self, entry: Entry) -> None:
        entry.state["initial_sq"] = entry.total(dot(entry.param, entry.param))

    def rate(self, blocks: Blocks, loss: Tensor | None) -> tuple[Tensor, Tensor]:
        assert loss is not None
        a_sq, mean_sq = blocks.squares()
        g_sq = blocks.scaled_gradient_squares()
        gap = (loss.to(torch.float64) - self.f_star).clamp(min=0)
        length = (a_sq * mean_sq).sqrt()
        rho = torch.where(g_sq * a_sq > 0, gap / (self.c * g_sq * a_sq), 0.0)
        bound = blocks.read("polyak_bound", math.nan)
        bound = torch.where(bound.isnan(), self.first_bound(blocks, length), bound)
        rho = torch.minimum(rho, bound)
        # A first gradient of zero says nothing about lengths: the first bound waits for the next one.
        kept = torch.where(length > 0, bound, math.nan)
        blocks.write("polyak_bound", torch.where(rho > 0, rho * self.growth_rate, kept))
        blocks.write("distance", rho * length)
        return rho, a_sq

    def first_bound(self, blocks: Blocks, length: Tensor) -> Tensor:
        """The bound on ρ before the first step; 1 stands in for the scale of parameters that all start at zero."""
        rms = (blocks.start_squares() / blocks.count()).sqrt()
        return torch.where(length > 0, self.d0 * torch.where(rms > 0, rms, 1.0) / length, math.inf)


class DAdaptation(Estimator):
    """The distance to the solution, estimated from below while training (Defazio & Mishchenko 2023, in the scaled space).

    With any weights w ≥ 0 and any positive α, convexity gives  max|x₀ − x*| ≥ N/(‖s/α‖·‖α‖)  for
    N = Σ w⟨g, x₀ − x⟩ and s = Σ w g.  Both sums are exponential averages with rate β₃ = √β₂ so that s²/α²
    forgets as fast as α² does; the same rate is used, for unscaled sums, by D-Adapt Adam and Prodigy.

    Args:
        d0: the first estimate; in the parameter's units for one block, in units of each tensor's own
            root mean square for `per="tensor"` (> 0).
        growth_rate: the estimate grows at most by this factor a step (> 1; `inf`: no bound).
        relative: whether d0 is relative to each block's own scale.
        travel: the estimate is at least so many times rms|x − x₀|/√Σγ², α²-weighted: with 1, what a random walk of steps γδ
            would show.  0 turns this off; otherwise the estimate is no lower bound any more.

    A block that starts at zero has no scale of its own.  Its unit is then e/rms(g), with e the mean over the
    blocks that do have one of rms(x₀)·rms(g), taken at its first nonzero gradient; if no block has one, it is 1.
    """

    def __init__(self, d0: float, growth_rate: float, relative: bool, travel: float = 0.0):
        self.d0, self.growth_rate, self.relative, self.travel = d0, growth_rate, relative, travel
        self.kept = ("distance_numerator", "first_distance", *(("schedule_sq",) if travel else ()))

    def start(self, entry: Entry) -> None:
        unit = entry.group.get("unit")
        squares = dot(entry.param, entry.param) if unit is None else _number(entry, entry.param.numel() * unit**2)
        entry.state["initial_sq"] = entry.total(squares)
        entry.state["initial"] = entry.part(entry.param.detach()).clone()
        entry.state["weighted_grad_sum"] = torch.zeros_like(entry.part(entry.state["exp_avg_sq"]))

    def first_distance(self, blocks: Blocks) -> Tensor:
        """δ before this step: as learned, or d0 in the block's own unit."""
        if not self.relative:
            return blocks.read("distance", self.d0)
        distance, count = blocks.read("distance", 0.0), blocks.count()
        unit = (blocks.start_squares() / count).sqrt()
        if not blocks.sized:
            unit = completed(unit, (blocks.gradient_squares() / count).sqrt())
        return torch.where(distance > 0, distance, self.d0 * unit)

    def weigh(self, blocks: Blocks) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """(δ, a/G, w, a²) of this step, from what was known before it; a block without a gradient so far gets zeros."""
        delta = self.first_distance(blocks)
        first = blocks.read("first_distance", math.nan)
        blocks.write("first_distance", torch.where(first.isnan(), delta, first))
        a_sq, mean_sq = blocks.squares()
        alive = mean_sq > 0
        weight = torch.where(alive, blocks.multiplier() * delta / (a_sq * mean_sq).sqrt(), 0.0)
        return delta, torch.where(alive, (a_sq / mean_sq).sqrt(), 0.0), weight, a_sq

    def rate(self, blocks: Blocks, loss: Tensor | None) -> tuple[Tensor, Tensor]:
        delta, outside, weight, a_sq = self.weigh(blocks)
        blocks.write("distance", self.learn(blocks, delta, weight, a_sq))
        return delta, outside

    def shares(self, beta3: Any) -> tuple[Any, Any]:
        """What N and s keep of themselves and take of the new term."""
        return beta3, 1 - beta3

    def learn(self, blocks: Blocks, delta: Tensor, weight: Tensor, a_sq: Tensor) -> Tensor:
        """Add this step's gradient to N and s and return the next δ."""
        progress = blocks.part_sum(lambda e: torch.zeros_like(e.state["initial"]) if e.grad is None else e.part(e.grad) * e.moved)
        for entry, w in zip(blocks.entries, blocks.spread(weight), strict=True):
            s, (kept, new) = entry.state["weighted_grad_sum"], self.shares(math.sqrt(entry.group["betas"][1]))
            s.mul_(kept)
            if entry.grad is not None:
                s.add_(entry.part(entry.grad) * (new * w).to(s))
        s_sq = blocks.part_sum(
            lambda e: e.state["weighted_grad_sum"] * over_scaling(e.state["weighted_grad_sum"], e.part(e.alpha_sq))
        )
        gone = blocks.part_sum(lambda e: e.moved.square() * e.part(e.alpha_sq)) if self.travel else None
        return self.estimate(blocks, delta, weight, a_sq, progress, s_sq, gone)

    def estimate(
        self, blocks: Blocks, delta: Tensor, weight: Tensor, a_sq: Tensor, progress: Tensor, s_sq: Tensor, gone: Tensor | None
    ) -> Tensor:
        """Take Σg(x₀ − x) into N and return the next δ, from ‖s/α‖² and, with `travel`, ‖α∘(x₀ − x)‖²."""
        kept, new = self.shares(blocks.decay())
        numerator = kept * blocks.read("distance_numerator", 0.0) + new * weight * progress
        blocks.write("distance_numerator", numerator)
        bound = torch.where(s_sq > 0, numerator / (s_sq * a_sq).sqrt(), 0.0)
        if gone is not None:
            steps = blocks.read("schedule_sq", 0.0)
            walked = torch.where((a_sq > 0) & (steps > 0), (gone / (a_sq * steps)).sqrt(), 0.0)
            bound = torch.maximum(bound, self.travel * walked)
            blocks.write("schedule_sq", steps + torch.where(blocks.gradient_squares() > 0, blocks.multiplier().square(), 0.0))
        if self.growth_rate < math.inf:
            bound = torch.minimum(self.growth_rate * delta, bound)
        return torch.maximum(delta, bound)
