"""Parameter scalings: the diagonal α of the scaled space x' = α∘x.

A scaling turns the gradient's history into α² ("alpha_sq", one positive number per coordinate).
Steepest descent in the scaled space divides the gradient by α²: `none` gives gradient descent,
`adam` (α² = √v̂ + ε) gives Adam.  Units of α² under every adaptive scaling: those of the gradient,
[f]/[x].  A coordinate whose gradient has always been zero has α² = 0; it is *dead*, and optimizers
leave it where it is.

Source: Suh & Seo, arXiv 2401.03240, section 3, for the identity; the papers named below for each α.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

__all__ = ["Adagrad", "AMSGrad", "Adam", "Multiplied", "NoScaling", "PowerOfTwo", "RMSprop", "Scaling", "get"]


class Scaling:
    """Base class: α² from the running second moment of the gradient.

    Args:
        refresh: recompute α² every `refresh`-th step and hold it in between (default 1, every step).

    Raises:
        ValueError: if `refresh` is not a positive integer.

    A subclass defines `compute`.  It may keep buffers of its own in `state`, shaped like the parameter.

    >>> Adam().compute({"step": 1, "exp_avg_sq": torch.tensor([4.0])}, beta2=0.75, eps=0.0)
    tensor([4.])
    """

    def __init__(self, refresh: int = 1):
        if not isinstance(refresh, int) or refresh < 1:
            raise ValueError(f"refresh must be a positive integer, not {refresh!r}.")
        self.refresh = refresh

    def update(self, state: dict[str, Any], grad: Tensor, beta2: float, eps: float) -> Tensor:
        """Advance by one gradient and return α².

        Args:
            state: the parameter's optimizer state; holds "step" (already counting this gradient) and
                "exp_avg_sq" (v, already holding this gradient, not bias-corrected).
            grad: the gradient, units [f]/[x].
            beta2: the decay rate of v.
            eps: added to α², units [f]/[x].

        Returns:
            α², shaped like the parameter.
        """
        self.observe(state, grad)
        if "alpha_sq" not in state or (state["step"] - 1) % self.refresh == 0:
            state["alpha_sq"] = self.compute(state, beta2, eps)
        return state["alpha_sq"]

    def observe(self, state: dict[str, Any], grad: Tensor) -> None:
        """See every gradient, also between refreshes.  The default keeps nothing."""

    def compute(self, state: dict[str, Any], beta2: float, eps: float) -> Tensor:
        """Return a fresh α², shaped like the parameter."""
        raise TypeError(f"{type(self).__name__} must define compute(state, beta2, eps).")

    def __repr__(self) -> str:
        return f"{type(self).__name__}(refresh={self.refresh})"


class NoScaling(Scaling):
    """α ≡ 1: the unscaled space (gradient descent, plain SPS, plain D-Adaptation).  ε is not used."""

    def compute(self, state: dict[str, Any], beta2: float, eps: float) -> Tensor:
        return torch.ones_like(state["exp_avg_sq"])


class RMSprop(Scaling):
    """α² = √v + ε without bias correction (Tieleman & Hinton, 2012)."""

    def compute(self, state: dict[str, Any], beta2: float, eps: float) -> Tensor:
        return state["exp_avg_sq"].sqrt() + eps


class Adam(Scaling):
    """α² = √v̂ + ε with v̂ = v/(1 − β₂ᵏ) (Kingma & Ba, 2015, algorithm 1)."""

    def compute(self, state: dict[str, Any], beta2: float, eps: float) -> Tensor:
        return state["exp_avg_sq"].sqrt() / math.sqrt(1 - beta2 ** state["step"]) + eps


class AMSGrad(Scaling):
    """α² = √(max over time of v)/√(1 − β₂ᵏ) + ε (Reddi et al., 2018, with the bias correction torch uses).

    The bias correction falls: after large gradients α² sinks to nearly √(1 − β₂) of what it was, and only α²√k never falls.
    """

    def observe(self, state: dict[str, Any], grad: Tensor) -> None:
        v = state["exp_avg_sq"]
        state["max_exp_avg_sq"] = torch.maximum(state["max_exp_avg_sq"], v) if "max_exp_avg_sq" in state else v.clone()

    def compute(self, state: dict[str, Any], beta2: float, eps: float) -> Tensor:
        return state["max_exp_avg_sq"].sqrt() / math.sqrt(1 - beta2 ** state["step"]) + eps


class Adagrad(Scaling):
    """α² = √(Σ g²) + ε, the sum over all steps so far (Duchi et al., 2011, the diagonal form)."""

    def observe(self, state: dict[str, Any], grad: Tensor) -> None:
        state["sum_sq"] = state["sum_sq"] + grad * grad if "sum_sq" in state else grad * grad

    def compute(self, state: dict[str, Any], beta2: float, eps: float) -> Tensor:
        return state["sum_sq"].sqrt() + eps


class PowerOfTwo(Scaling):
    """Another scaling with every α² rounded to the nearest power of four, so that α is a power of two.

    Powers of two commute with floating-point arithmetic: identities that hold on paper then hold bit for bit.

    Args:
        inner: that scaling, or its name.
    """

    def __init__(self, inner: Scaling | str):
        self.inner = get(inner)
        super().__init__(self.inner.refresh)

    def observe(self, state: dict[str, Any], grad: Tensor) -> None:
        self.inner.observe(state, grad)

    def compute(self, state: dict[str, Any], beta2: float, eps: float) -> Tensor:
        alpha_sq = self.inner.compute(state, beta2, eps)
        exponent = torch.round(torch.log2(alpha_sq) / 2) * 2
        return torch.where(alpha_sq > 0, torch.exp2(exponent), torch.zeros_like(alpha_sq))


class Multiplied(Scaling):
    """Another scaling with α² multiplied, at step k, by `factor(k)` > 0: the update must not notice.

    Args:
        inner: that scaling, or its name.
        factor: maps the step's number, from 1 on, to the multiplier.
    """

    def __init__(self, inner: Scaling | str, factor: Callable[[int], float]):
        self.inner, self.factor = get(inner), factor
        super().__init__(self.inner.refresh)

    def observe(self, state: dict[str, Any], grad: Tensor) -> None:
        self.inner.observe(state, grad)

    def compute(self, state: dict[str, Any], beta2: float, eps: float) -> Tensor:
        return self.inner.compute(state, beta2, eps) * self.factor(state["step"])


NAMES = {"none": NoScaling, "rmsprop": RMSprop, "adam": Adam, "amsgrad": AMSGrad, "adagrad": Adagrad}


def get(scaling: Scaling | str) -> Scaling:
    """Return a scaling from its name ("none", "rmsprop", "adam", "amsgrad", "adagrad") or unchanged.

    Raises:
        ValueError: if the name is unknown.

    >>> get("adam")
    Adam(refresh=1)
    """
    if isinstance(scaling, Scaling):
        return scaling
    if not isinstance(scaling, str) or scaling not in NAMES:
        raise ValueError(f"unknown scaling {scaling!r}; choose one of {', '.join(map(repr, NAMES))} or pass a Scaling.")
    return NAMES[scaling]()
