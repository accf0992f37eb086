"""PS-DA-SGD with one part changed, and other step-size estimators in its frame: for asking which part matters.

What the book concludes from them is in its chapters "What matters" and "A better method?"; they are slow, and nothing here is
meant for use.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from . import scalings
from .estimators import Blocks, DAdaptation, Entry, Estimator, dot
from .optimizers import PSDASGD, ParameterScaled, require

__all__ = ["Changed", "DoG", "Frozen", "ScaledDoG", "Variant", "WEIGHTS"]

# w of a step in units of ours, w = γδ/(aG), from δ and the step's number k.
WEIGHTS = {"distance": lambda delta, k: 1.0, "square": lambda delta, k: delta, "uniform": lambda delta, k: 1 / delta,
           "growing": lambda delta, k: math.sqrt(k)}


class Frozen(scalings.Scaling):
    """Another scaling that is held from a step on.

    Args:
        inner: that scaling, or its name.
        after: the last step at which α² is computed.
    """

    def __init__(self, inner: scalings.Scaling | str, after: int):
        self.inner, self.after = scalings.get(inner), after
        super().__init__(self.inner.refresh)

    def update(self, state: dict[str, Any], grad: Tensor, beta2: float, eps: float) -> Tensor:
        if state["step"] > self.after:
            return state["alpha_sq"]
        state["alpha_sq"] = self.inner.update(state, grad, beta2, eps)
        return state["alpha_sq"]


class Changed(DAdaptation):
    """The distance estimate of `DAdaptation` with parts changed.

    Args:
        original: the estimate that is changed; the rest of its settings stay.
        weights, beta3, cap, storage: as in `Variant`, storage as a type.
    """

    def __init__(
        self, original: DAdaptation, weights: str, beta3: float | None, cap: float | None, storage: torch.dtype | None
    ):
        super().__init__(original.d0, original.growth_rate, original.relative, original.travel)
        self.weights, self.beta3, self.cap, self.storage = weights, beta3, cap, storage
        self.needs_loss = cap is not None

    def _stored(self, values: Tensor) -> Tensor:
        return values if self.storage is None else values.to(self.storage).to(values.dtype)

    def shares(self, beta3: Any) -> tuple[Any, Any]:
        """As given: 1 keeps plain sums."""
        if self.beta3 is None:
            return super().shares(beta3)
        return self.beta3, 1 - self.beta3 if self.beta3 < 1 else 1.0

    def start(self, entry: Entry) -> None:
        super().start(entry)
        entry.state["initial"] = self._stored(entry.state["initial"])

    def weigh(self, blocks: Blocks) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """As in `DAdaptation`, with another weight."""
        delta, outside, weight, a_sq = super().weigh(blocks)
        steps = max(int(e.state["step"]) for e in blocks.entries)
        factor = WEIGHTS[self.weights](delta, steps)
        return delta, outside, torch.where(weight > 0, weight * factor, 0.0), a_sq

    def rate(self, blocks: Blocks, loss: Tensor | None) -> tuple[Tensor, Tensor]:
        delta, outside = super().rate(blocks, loss)
        if self.cap is None:
            return delta, outside
        assert loss is not None
        # Polyak's step for the whole model: no block's share of the decrease that it expects is more than what is left.
        expected = (delta * outside * blocks.scaled_gradient_squares()).sum() * self.cap
        return delta, outside * (loss.to(torch.float64) / expected).nan_to_num(nan=1.0).clamp(0, 1)

    def learn(self, blocks: Blocks, delta: Tensor, weight: Tensor, a_sq: Tensor) -> Tensor:
        """As in `DAdaptation`, and s is rounded to what is stored of it."""
        learned = super().learn(blocks, delta, weight, a_sq)
        for e in blocks.entries:
            e.state["weighted_grad_sum"] = self._stored(e.state["weighted_grad_sum"])
        return learned


class Variant(PSDASGD):
    """PS-DA-SGD with parts changed.

    Args:
        params: as in `PSDASGD`.
        refresh: α² is computed every so many steps.
        frozen: α² is not computed after this step.
        weights: of a step in N and s: "distance" (δ, the optimizer's own), "square" (δ², Prodigy's), "uniform" (without δ) or
            "growing" (δ√k); all times γ/(aG).
        beta3: the memory of N and s (default √β₂); 1 makes plain sums of them.
        cap: the whole step is shortened where it expects the loss to fall by more than loss/cap (its floor being 0).
        storage: the precision in which x₀ and s are kept (default: that of v).
        scaling, settings: for `PSDASGD`.

    Raises:
        ValueError: for a setting out of range.
    """

    step = ParameterScaled.step  # with `cap` it needs the loss

    def __init__(
        self, params: Any, *, refresh: int = 1, frozen: int | None = None, weights: str = "distance", beta3: float | None = None,
        cap: float | None = None, storage: str | None = None, scaling: str = "adam", **settings: Any,
    ):
        require(weights in WEIGHTS, f"weights must be one of {', '.join(map(repr, WEIGHTS))}, not {weights!r}.")
        require(beta3 is None or 0 <= beta3 <= 1, f"beta3 must be in [0, 1], not {beta3!r}.")
        chosen: scalings.Scaling = scalings.NAMES[scaling](refresh)
        super().__init__(params, scaling=chosen if frozen is None else Frozen(chosen, frozen), fused=False, **settings)
        assert isinstance(self.estimator, DAdaptation)
        self.estimator = Changed(self.estimator, weights, beta3, cap, None if storage is None else getattr(torch, storage))


class DoG(Estimator):
    """The step of DoG (Ivgi et al. 2023) in the scaled space, one for each block.

    η = r̄·a²/√(Σ_i a_i²‖g_i/α_i‖²), where r̄ is the largest distance from x₀ so far, ‖α∘(x − x₀)‖/a, at least `d0` times
    the block's root mean square.  It does not change when α is multiplied by a number.

    Args:
        d0: as in `DAdaptation`, relative.
    """

    def __init__(self, d0: float):
        self.first = DAdaptation(d0, math.inf, relative=True)

    def start(self, entry: Entry) -> None:
        entry.state["initial"] = entry.param.detach().clone()
        entry.state["initial_sq"] = dot(entry.param, entry.param)

    def rate(self, blocks: Blocks, loss: Tensor | None) -> tuple[Tensor, Tensor]:
        a_sq = blocks.sum(lambda e: e.alpha_sq)
        gone = blocks.sum(lambda e: e.moved.square() * e.alpha_sq)
        distance = torch.maximum(self.first.first_distance(blocks), torch.where(a_sq > 0, (gone / a_sq).sqrt(), 0.0))
        total = blocks.read("sum_sq_gradients", 0.0) + a_sq * blocks.scaled_gradient_squares()
        blocks.write("distance", distance)
        blocks.write("sum_sq_gradients", total)
        return distance, torch.where(total > 0, a_sq / total.sqrt(), 0.0)


class ScaledDoG(ParameterScaled):
    """`DoG` under any scaling, one step size a tensor.

    Args:
        params: tensors, groups, or named parameters.
        lr: γ, the schedule's multiplier.
        betas: decay rates (β₁ of the momentum, β₂ of the second moment).
        d0: as in `DoG`.
        scaling: the name of a scaling.
    """

    def __init__(
        self, params: Any, lr: float = 1.0, *, betas: tuple[float, float] = (0.9, 0.98), d0: float = 2.0**-8, scaling: str = "adam"
    ):
        defaults = dict(lr=lr, betas=betas, eps=0.0, weight_decay=0.0)
        super().__init__(params, defaults, scaling=scaling, estimator=DoG(d0), per="tensor")

    @property
    def distance(self) -> Tensor:
        """r̄, one number a tensor, in the parameter's units."""
        return self._block_values("distance", lambda group: 1.0)
