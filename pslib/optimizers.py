"""Scaling × step-size estimator → optimizer::

    PSSPS    = scaling × Polyak's step
    PSDASGD  = scaling × D-Adaptation
    ScaledSGD = scaling × a fixed rate: torch's SGD, RMSprop, Adam, AMSGrad and Adagrad in one class

Plain reference implementations: one readable loop over the parameters, every scalar a lazy tensor.
PS-SPS and PS-DA-SGD are derived here from the principles published in Suh & Seo (arXiv 2401.03240); they are
not a transcription of that paper's pseudo-code.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable

import torch
from torch import Tensor

from . import scalings, units
from .estimators import Blocks, DAdaptation, Entry, Estimator, Fixed, Polyak, dot, over_scaling

UNITS = units.KINDS

__all__ = ["PSDASGD", "PSSPS", "ParameterScaled", "ScaledSGD"]


def require(ok: bool, sentence: str) -> None:
    """Refuse a setting with that sentence.

    Raises:
        ValueError: unless `ok`.
    """
    if not ok:
        raise ValueError(sentence)


def _number(value) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and not math.isnan(value)


class ParameterScaled(torch.optim.Optimizer):
    """Steepest descent in the scaled space x' = α∘x, with momentum and decoupled weight decay.

    One step, for each parameter x with gradient g::

        v ← β₂v + (1 − β₂)g²,   α² from the scaling
        (inside, outside) from the estimator
        m ← β₁m + (1 − β₁)·inside·g,   m̂ = m/(1 − β₁ᵏ)
        x ← (1 − γ·weight_decay)·x − γ·outside·m̂/α²

    Weight decay is the fraction of the parameter removed per step at γ = `lr` = 1, as in Loshchilov & Hutter
    (2019, algorithm 2): a pure number, so that it does not bring units back.

    With `units`, all of this happens to y = x/σ, whose gradient is σ∘g (see `pslib.units`).

    A step in which a gradient's square (or, where it is needed, the loss) is not finite is skipped whole: parameters and
    state stay as they are, `skipped_steps` counts it, and the first one warns.
    """

    offered = ("model", "module", "tensor")

    def __init__(self, params, defaults: dict, *, scaling, estimator: Estimator, per: str, units: str | None = None):
        require(per in self.offered, f"per must be one of {', '.join(map(repr, self.offered))}, not {per!r}.")
        require(units in (None, *UNITS), f"units must be one of None, {', '.join(map(repr, UNITS))}, not {units!r}.")
        self.scaling = scalings.get(scaling)
        self.estimator = estimator
        self.per, self.units = per, units
        self.skipped_steps = 0
        super().__init__(params, defaults)

    def add_param_group(self, param_group: dict) -> None:
        """Add a group, its settings checked.

        Raises:
            ValueError: if a setting is out of range, or β₂ differs between groups that share one distance.
        """
        group = {**self.defaults, **param_group}
        betas = group["betas"]
        require(isinstance(betas, (tuple, list)) and len(betas) == 2, f"betas must be a pair of numbers, not {betas!r}.")
        b1, b2 = betas
        require(_number(b1) and 0 <= b1 < 1, f"betas[0] must be in [0, 1), not {b1!r}.")
        require(_number(b2) and 0 <= b2 < 1, f"betas[1] must be in [0, 1), not {b2!r}.")
        for name in ("lr", "eps", "weight_decay"):
            value = float(group[name]) if isinstance(group[name], Tensor) else group[name]
            require(_number(value) and 0 <= value < math.inf, f"{name} must be a finite number ≥ 0, not {value!r}.")
        unit = group.get("unit")
        require(unit is None or (_number(unit) and 0 < unit < math.inf), f"unit must be None or a finite number > 0, not {unit!r}.")
        if self.param_groups and self.per in ("model", "module"):
            shared = self.param_groups[0]["betas"][1]
            require(b2 == shared, f"per={self.per!r} shares one distance, so betas[1] must be {shared} in every group, not {b2}.")
        super().add_param_group(param_group)
        require(
            self.per != "module" or "param_names" in self.param_groups[-1],
            "per='module' needs names; pass model.named_parameters().",
        )
        for p in self.param_groups[-1]["params"]:
            require(not p.is_complex(), "complex parameters are not supported; optimize torch.view_as_real(p) instead.")

    def step(self, closure: Callable[[], Tensor] | None = None, *, loss: Tensor | float | None = None):
        """Take one step and return the loss, if there is one.

        Args:
            closure: re-evaluates the model with gradients and returns the loss.
            loss: the loss at which the gradients were taken, for an estimator that needs it.
        """
        return self._step(closure, loss)

    # Public step methods call this and not each other: torch wraps every class's step with its hooks once.
    @torch.no_grad()
    def _step(self, closure: Callable[[], Tensor] | None, loss: Tensor | float | None = None):
        if closure is not None:
            require(loss is None, "give step a closure or a loss, not both.")
            with torch.enable_grad():
                loss = closure()
        if self.estimator.needs_loss:
            require(
                loss is not None,
                f"{type(self).__name__}.step needs the loss: call step(loss=loss) after loss.backward(), or pass a closure.",
            )
            value = torch.as_tensor(loss).detach()
            require(value.numel() == 1, f"the loss must be a scalar, not a tensor of shape {tuple(value.shape)}.")
            value = value.reshape(())
        else:
            value = None
        entries = self._entries()
        if not entries:
            return loss
        finite = [torch.isfinite(dot(e.grad, e.grad)) for e in entries if e.grad is not None]
        if value is not None:
            finite.append(torch.isfinite(value).to(finite[0].device))
        if not bool(torch.stack(finite).all()):
            self._skip()
            return loss
        if self.units is not None:
            units.assign(entries, self.units)
        for e in entries:
            if e.grad is not None:
                self._observe(e)
        blocks = Blocks(entries, self.per)
        inside, outside = self.estimator.rate(blocks, None if value is None else value.to(entries[0].param.device))
        blocks.write("rate", inside * outside)
        for e, i, o in zip(entries, blocks.spread(inside), blocks.spread(outside), strict=True):
            if e.grad is not None:
                self._move(e, i, o)
        return loss

    def _entries(self) -> list[Entry]:
        entries = []
        for group in self.param_groups:
            names = group.get("param_names") or [""] * len(group["params"])
            for p, name in zip(group["params"], names, strict=True):
                grad = p.grad
                if grad is None and not self.state.get(p):
                    continue
                if grad is not None:
                    if grad.is_sparse:
                        raise RuntimeError(
                            f"{type(self).__name__} does not support sparse gradients; make the embedding with sparse=False."
                        )
                    statistics = torch.float32 if p.dtype in (torch.float16, torch.bfloat16) else p.dtype
                    grad = grad.to(statistics)
                    grad = -grad if group.get("maximize", False) else grad
                entries.append(Entry(p, grad, self.state[p], group, self.state[p].get("alpha_sq"), name.rpartition(".")[0]))
        return entries if any(e.grad is not None for e in entries) else []

    def _skip(self) -> None:
        if self.skipped_steps == 0:
            warnings.warn(
                f"{type(self).__name__}: a gradient, its square or the loss is not finite; this step was skipped and nothing was changed "
                "(further ones are only counted, in skipped_steps).",
                stacklevel=6,
            )
        self.skipped_steps += 1

    def _observe(self, e: Entry) -> None:
        """Take the gradient into v and α²."""
        beta2 = e.group["betas"][1]
        if "unit" in e.state:
            e.grad = e.grad * e.state["unit"]
        if "step" not in e.state:
            e.state["step"] = 0
            e.state["exp_avg"] = torch.zeros_like(e.grad)
            e.state["exp_avg_sq"] = torch.zeros_like(e.grad)
            self.estimator.start(e)
        e.state["step"] += 1
        e.state["exp_avg_sq"].mul_(beta2).addcmul_(e.grad, e.grad, value=1 - beta2)
        e.alpha_sq = self.scaling.update(e.state, e.grad, beta2, e.group["eps"])

    def _move(self, e: Entry, inside: Tensor, outside: Tensor) -> None:
        """Take the step."""
        beta1, gamma, m = e.group["betas"][0], e.group["lr"], e.state["exp_avg"]
        m.mul_(beta1).add_(e.grad * inside.to(m.dtype), alpha=1 - beta1)
        m_hat = m / (1 - beta1 ** e.state["step"])
        step = (gamma * outside).to(m.dtype) * over_scaling(m_hat, e.alpha_sq)
        if "unit" in e.state:
            step = step * e.state["unit"]
        kept = 1 - gamma * e.group["weight_decay"]
        e.param.copy_(e.param * kept - step)

    def _block_values(self, name: str, factor: Callable[[dict], float]) -> Tensor:
        blocks: dict[object, Tensor | None] = {}
        for group in self.param_groups:
            names = group.get("param_names") or [""] * len(group["params"])
            for p, full in zip(group["params"], names, strict=True):
                block = {"model": "", "module": full.rpartition(".")[0]}.get(self.per, p)
                value = self.state.get(p, {}).get(name)
                if blocks.get(block) is None:
                    blocks[block] = None if value is None else (value * factor(group)).reshape(-1)
        unknown = torch.full((1,), math.nan, dtype=torch.float64)
        return torch.cat([unknown if v is None else v for v in blocks.values()])

    @property
    def block_names(self) -> list[str]:
        """The blocks' names, "model", or those of the modules or parameters (positions, if they were given without).

        For blocks finer than a tensor these are the names of the tensors, with one block or more in each.
        """
        if self.per == "model":
            return ["model"]
        names = [g.get("param_names") or [None] * len(g["params"]) for g in self.param_groups]
        names = [n if n is not None else str(i) for i, n in enumerate(n for group in names for n in group)]
        return list(dict.fromkeys(n.rpartition(".")[0] for n in names)) if self.per == "module" else names

    @property
    def effective_lr(self) -> Tensor:
        """η of the last step, one float64 number a block (nan before a block's first step), as a lazy tensor.

        Units: the step is η·m̂/α², so those of the learning rate of the optimizer with that scaling:
        [x] for an adaptive scaling, [x]²/[f] for "none".  With several groups in one block, the first group's.
        """
        return self._block_values("rate", lambda group: group["lr"])

    def __getstate__(self) -> dict:
        own = ("scaling", "estimator", "per", "units", "skipped_steps")
        return {**super().__getstate__(), **{name: getattr(self, name) for name in own}}

    def load_state_dict(self, state_dict: dict) -> None:
        """Load a state; unlike torch's default, the statistics keep the precision in which they were saved.

        What is not set per group (scaling, per, units, d0, growth_rate, c, f_star) is not part of the state: give it again.
        """
        super().load_state_dict(state_dict)
        params = [p for group in self.param_groups for p in group["params"]]
        numbers = [n for group in state_dict["param_groups"] for n in group["params"]]
        for p, n in zip(params, numbers, strict=True):
            for name, value in state_dict["state"].get(n, {}).items():
                if isinstance(value, Tensor):
                    self.state[p][name] = value.detach().to(device=p.device, copy=True)


class ScaledSGD(ParameterScaled):
    """Steepest descent with a fixed learning rate under a scaling: Adam(W), RMSprop, AMSGrad, Adagrad and SGD in one.

    Args:
        params: tensors, groups, or named parameters.
        lr: the learning rate, in the units of the parameter under an adaptive scaling ([x]²/[f] under "none").
        betas: decay rates (β₁ of the momentum, β₂ of the second moment), without units.
        eps: added to √v̂, in the gradient's units [f]/[x].
        scaling: "none", "rmsprop", "adam", "amsgrad", "adagrad", or a `pslib.scalings.Scaling`.
        weight_decay: decoupled; the fraction removed per step is lr·weight_decay, as in torch's AdamW.
        maximize: ascend instead.

    Raises:
        ValueError: for a setting out of range.
        RuntimeError: for sparse gradients.
    """

    def __init__(
        self, params, lr: float, *, betas=(0.9, 0.999), eps: float = 0.0, scaling="adam", weight_decay: float = 0.0,
        maximize: bool = False,
    ):
        defaults = dict(lr=lr, betas=betas, eps=eps, weight_decay=weight_decay, maximize=maximize)
        super().__init__(params, defaults, scaling=scaling, estimator=Fixed(), per="model")

    def step(self, closure=None):
        """Take one step; `closure` re-evaluates the loss and returns it."""
        return self._step(closure)


class PSSPS(ParameterScaled):
    """Polyak's step size in a scaled parameter space; no learning rate, but the loss's floor f* must be known.

    One step takes η = min((f − f*)₊ / (c‖g/α‖²), bound) and x ← x − γ·m̂/α², with m the momentum average of ηg.

    Args:
        params: tensors, groups, or named parameters.
        lr: γ, the schedule's multiplier; leave it at 1 and let a scheduler drive it.  No units.
        betas: decay rates (β₁ of the momentum, β₂ of the second moment).
        eps: added to √v̂, in the gradient's units [f]/[x]; the default 0 keeps every invariance exact.
        c: the constant of Polyak's step, no units.
        f_star: the lowest value the loss can take, in the loss's units.
        d0: the first step is at most d0·rms(x₀) long; no units, `math.inf` turns this off.
        growth_rate: η/‖α‖² grows at most by this factor a step, no units; `math.inf` turns this off.
        scaling: "none" (plain SPS), "rmsprop", "adam", "amsgrad", "adagrad", or a `pslib.scalings.Scaling`.
        weight_decay: decoupled; the fraction of the parameter removed per step, times γ.  No units.

    Raises:
        ValueError: for a setting out of range, or `step` without a loss.
        RuntimeError: for sparse gradients.

    Source: derived from the principles of Suh & Seo (arXiv 2401.03240, section 4), not transcribed; the step is
    Polyak's (1987), the stochastic form and the smoothed bound Loizou et al.'s (2021).
    """

    def __init__(
        self, params, lr: float = 1.0, *, betas=(0.9, 0.98), eps: float = 0.0, c: float = 0.2, f_star: float = 0.0,
        d0: float = 2.0**-8, growth_rate: float = 2 ** (1 / 20), scaling="adam", weight_decay: float = 0.0,
    ):
        require(_number(c) and 0 < c < math.inf, f"c must be a finite number > 0, not {c!r}.")
        require(_number(f_star) and abs(f_star) < math.inf, f"f_star must be a finite number, not {f_star!r}.")
        require(_number(d0) and d0 > 0, f"d0 must be > 0, not {d0!r}.")
        require(_number(growth_rate) and growth_rate >= 1, f"growth_rate must be ≥ 1, not {growth_rate!r}.")
        defaults = dict(lr=lr, betas=betas, eps=eps, weight_decay=weight_decay)
        super().__init__(params, defaults, scaling=scaling, estimator=Polyak(c, f_star, d0, growth_rate), per="model")

    @property
    def distance(self) -> Tensor:
        """The last Polyak step as a distance, ηG/a (what δ is to PSDASGD), one number a block, in the parameter's units."""
        return self._block_values("distance", lambda group: 1.0)


class PSDASGD(ParameterScaled):
    """D-Adaptation in a scaled parameter space: the learning rate is a distance, and the distance is measured.

    One step, with sums over one block of parameters::

        v ← β₂v + (1 − β₂)g²,   α² from the scaling,   a² = Σα²,   G² = Σv̂/α²
        w = γδ/(aG)                                  β₃ = √β₂
        N ← β₃N + (1 − β₃)w⟨g, x₀ − x⟩
        s ← β₃s + (1 − β₃)w g
        m ← β₁m + (1 − β₁)δg
        x ← (1 − γ·weight_decay)x − γ(a/G)m̂/α²
        δ ← max(δ, min(growth_rate·δ, N/(a‖s/α‖)))    (used from the next step on)

    Args:
        params: tensors, groups, or named parameters.
        lr: γ, the schedule's multiplier; leave it at 1 and let a scheduler drive it.  No units.
        betas: decay rates (β₁ of the momentum, β₂ of the second moment).
        eps: added to √v̂, in the gradient's units [f]/[x]; the default 0 keeps every invariance exact.
        d0: the first distance.  per="model" without `units`: in the parameter's units, default 1e-6.  Otherwise in units
            of each block's own root mean square or of σ, default 2⁻⁸.
        per: "model", one distance for all parameters (the paper's reading), "module", one for each module (needs named
            parameters), or "tensor", one for each parameter tensor.
        units: None: x is measured as it is.  "tensor" or "neuron": all of the above happens to y = x/σ, with σ one number
            a tensor, rms(x₀), or of rank one in rows and columns, so that training does not depend on the units of
            single neurons either.  The distance is then a pure number.
        unit: what replaces rms(x₀) as the unit of a group's parameters, in their own units; for tensors that start at zero
            and should not borrow one.
        scaling: "none" (D-Adapt SGD), "rmsprop", "adam", "amsgrad", "adagrad", or a `pslib.scalings.Scaling`.
        weight_decay: decoupled; the fraction of the parameter removed per step, times γ.  No units.
        growth_rate: the distance grows at most by this factor a step (> 1).
        maximize: ascend instead.

    Raises:
        ValueError: for a setting out of range.
        RuntimeError: for sparse gradients.

    Source: derived from the principles of Suh & Seo (arXiv 2401.03240, section 4), not transcribed; the bound is
    that of Defazio & Mishchenko (2023) in the scaled space; per="tensor" is this book's extension.
    """

    def __init__(
        self, params, lr: float = 1.0, *, betas=(0.9, 0.98), eps: float = 0.0, d0: float | None = None,
        per: str = "tensor", units: str | None = None, unit: float | None = None, scaling="adam", weight_decay: float = 0.0,
        growth_rate: float = math.inf, maximize: bool = False,
    ):
        absolute = per == "model" and units is None
        if d0 is None:
            d0 = 1e-6 if absolute else 2.0**-8
        require(_number(d0) and 0 < d0 < math.inf, f"d0 must be a finite number > 0, not {d0!r}.")
        require(_number(growth_rate) and growth_rate > 1, f"growth_rate must be > 1, not {growth_rate!r}.")
        defaults = dict(lr=lr, betas=betas, eps=eps, weight_decay=weight_decay, maximize=maximize, unit=unit)
        estimator = DAdaptation(d0, growth_rate, relative=not absolute and units is None)
        super().__init__(params, defaults, scaling=scaling, estimator=estimator, per=per, units=units)

    def step(self, closure=None):
        """Take one step; `closure` re-evaluates the loss and returns it."""
        return self._step(closure)

    @property
    def distance(self) -> Tensor:
        """δ, the distance estimate, one float64 number a block, in the parameter's units (with `units`: in σ), as a lazy tensor."""
        return self._block_values("distance", lambda group: 1.0)
