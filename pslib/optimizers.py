"""Scaling × step-size estimator → optimizer::

    PSSPS    = scaling × Polyak's step
    PSDASGD  = scaling × D-Adaptation
    ScaledSGD = scaling × a fixed rate: torch's SGD, RMSprop, Adam, AMSGrad and Adagrad in one class

Here is the reference implementation, one readable loop over the parameters; `pslib.fused` has the fast one, which keeps the
same state and takes the same steps.
PS-SPS and PS-DA-SGD are derived here from the principles published in Suh & Seo (arXiv 2401.03240); they are
not a transcription of that paper's pseudo-code.
"""

from __future__ import annotations

import math
import os
import sys
import warnings
from collections.abc import Callable

import torch
from torch import Tensor
from torch.optim.optimizer import ParamsT

from . import distributed, fused, scalings, units
from .estimators import SLICE, Blocks, DAdaptation, Entry, Estimator, Fixed, Polyak, dot, over_scaling, part, real
from .fused import Plan

UNITS = units.KINDS
# After so many steps a distance that never grew is worth a word.
PATIENCE = 100
OURS = (os.path.dirname(__file__), os.path.dirname(torch.__file__))
# Numbers of blocks, which belong to no coordinate.
BLOCKWISE = ("step", "rate", "distance", "distance_numerator", "first_distance", "initial_sq", "schedule_sq", "polyak_bound")

__all__ = ["PSDASGD", "PSSPS", "ParameterScaled", "ScaledSGD"]


def require(ok: bool, sentence: str) -> None:
    """Refuse a setting with that sentence.

    Raises:
        ValueError: unless `ok`.
    """
    if not ok:
        raise ValueError(sentence)


def _number(value: object) -> bool:
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
    state stay as they are, and `skipped_steps` counts it.  The reference loop warns of the first one at once, the fast path
    when `skipped_steps` or `state_dict()` is next read.

    A complex parameter is optimized as the real one of its parts.  Shards of a `DTensor` are stepped where they are; only
    sums over blocks are reduced.

    Args:
        params: tensors, groups, or named parameters.
        defaults: what groups do not set themselves: lr, betas, eps and weight_decay; and maximize and unit, where offered.
        scaling: the name of a scaling, or a `pslib.scalings.Scaling`.
        estimator: finds the step size.
        per: what shares one step size, one of `offered`.
        units: None, "tensor" or "neuron".
        fused: None, True or False, as in `PSDASGD`.
        slice_p: as in `PSDASGD`.

    Raises:
        ValueError: for a setting out of range.

    Example: a step of a tenth of what the scaling says.

    >>> from pslib.estimators import Estimator
    >>> class Tenth(Estimator):
    ...     def rate(self, blocks, loss):
    ...         one = blocks.largest(lambda entry: 1.0)
    ...         return one, 0.1 * one
    >>> x = torch.nn.Parameter(torch.tensor([3.0, -4.0]))
    >>> x.grad = torch.tensor([5.0, -0.01])
    >>> settings = {"lr": 1.0, "betas": (0.0, 0.0), "eps": 0.0, "weight_decay": 0.0}
    >>> ParameterScaled([x], settings, scaling="adam", estimator=Tenth(), per="model").step()
    >>> [round(number, 4) for number in x.tolist()]
    [2.9, -3.9]
    """

    offered: tuple[str, ...] = ("model", "module", "tensor")

    def __init__(
        self, params: ParamsT, defaults: dict, *, scaling: scalings.Scaling | str, estimator: Estimator, per: str, units: str | None = None,
        fused: bool | None = False, slice_p: int = 1,
    ):
        require(per in self.offered, f"per must be one of {', '.join(map(repr, self.offered))}, not {per!r}.")
        require(units in (None, *UNITS), f"units must be one of None, {', '.join(map(repr, UNITS))}, not {units!r}.")
        self.scaling = scalings.get(scaling)
        self.estimator = estimator
        self.per, self.units = per, units
        require(fused in (None, True, False), f"fused must be None, True or False, not {fused!r}.")
        require(isinstance(slice_p, int) and slice_p >= 1, f"slice_p must be a positive integer, not {slice_p!r}.")
        require(slice_p == 1 or per in ("model", "module", "tensor"), "slice_p needs blocks no finer than a tensor.")
        self.fused, self.slice_p = fused, slice_p
        self._plan: Plan | None = None
        self._skips, self._warned = 0, set[str]()
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
            single = not isinstance(group[name], Tensor) or group[name].numel() == 1
            require(single, f"{name} must be a number or a tensor of one element.")
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
        self._forget_plan()

    def step(  # type: ignore[override]  # torch's takes no loss
        self, closure: Callable[[], Tensor] | None = None, *, loss: Tensor | float | None = None
    ) -> Tensor | float | None:
        """Take one step and return the loss, if there is one.

        Args:
            closure: re-evaluates the model with gradients and returns the loss.
            loss: the loss at which the gradients were taken, for an estimator that needs it.
        """
        return self._step(closure, loss)

    # Public step methods call this and not each other: torch wraps every class's step with its hooks once.
    @torch.no_grad()
    def _step(self, closure: Callable[[], Tensor] | None, loss: Tensor | float | None = None) -> Tensor | float | None:
        if closure is not None:
            require(loss is None, "give step a closure or a loss, not both.")
            with torch.enable_grad():
                loss = closure()
        if self.estimator.needs_loss:
            if loss is None and all(float(g["lr"]) == 0 for g in self.param_groups):
                # Nothing moves: torch.distributed.checkpoint takes such a step to make the state that it then loads.
                loss = self.estimator.f_star
            require(
                loss is not None,
                f"{type(self).__name__}.step needs the loss: call step(loss=loss) after loss.backward(), or pass a closure.",
            )
            value = torch.as_tensor(loss).detach()
            require(value.numel() == 1, f"the loss must be a scalar, not a tensor of shape {tuple(value.shape)}.")
            value = value.reshape(())
        else:
            value = None
        if value is not None:
            value = distributed.mean_loss(value.to(distributed.local(self.param_groups[0]["params"][0]).device))
        plan = self._fast()
        if plan is None:
            self._reference(value)
        elif plan.tensors:
            plan.step(None if value is None else value.to(plan.device, torch.float64))
        return loss

    def _fast(self) -> Plan | None:
        """What the fast path works with, or None where the reference loop is to be used."""
        if self.fused is False:
            return None
        if self._plan is None or not self._plan.current():
            self._forget_plan()
            reason = fused.reason_against(self)
            require(reason is None or self.fused is None, f"fused=True is not possible: {reason}.")
            if reason is None:
                self._plan = Plan(self)
        return self._plan

    def _forget_plan(self) -> None:
        self._skips, self._plan = self._skipped(), None

    def _reference(self, value: Tensor | None) -> None:
        entries = self._entries()
        if not entries:
            return
        zero = entries[0].param.new_zeros((), dtype=torch.float64)
        squares = torch.stack([zero if e.grad is None else dot(e.grad, e.grad).to(zero.device) for e in entries])
        finite = torch.isfinite(distributed.Sums([e.whole for e in entries])(squares[:, None])).all()
        if value is not None:
            finite = finite & torch.isfinite(value).to(finite.device)
        if not bool(finite):
            self._skips += 1
            self._report()
            return
        if self.units is not None:
            units.assign(entries, self.units)
        for e in entries:
            self._observe(e)
        blocks = Blocks(entries, self.per)
        inside, outside = self.estimator.rate(blocks, None if value is None else value.to(entries[0].param.device))
        blocks.write("rate", inside * outside)
        for e, i, o in zip(entries, blocks.spread(inside), blocks.spread(outside), strict=True):
            if e.grad is not None:
                self._move(e, i, o)

    def stride(self, p: Tensor) -> int:
        """One in how many of a parameter's runs of 16 coordinates the distance is estimated from: `slice_p`, less for small ones.

        Raises:
            ValueError: for a sharded parameter with slice_p > 1.
        """
        require(self.slice_p == 1 or distributed.local(p) is p, "slice_p must be 1 for sharded parameters, which are sliced already.")
        return max(1, min(self.slice_p, real(p).numel() // (16 * SLICE)))

    def gradient(self, p: Tensor) -> Tensor:
        """This process's part of the gradient.

        Raises:
            RuntimeError: if it is sparse.
        """
        assert p.grad is not None
        if p.grad.is_sparse:
            raise RuntimeError(f"{type(self).__name__} does not support sparse gradients; make the embedding with sparse=False.")
        return distributed.local(p.grad, p)

    @property
    def skipped_steps(self) -> int:
        """How many steps were skipped because something was not finite; reading it waits for the device."""
        self._report()
        return self._skipped()

    def _skipped(self) -> int:
        return self._skips + (0 if self._plan is None else int(self._plan.skips))

    def _report(self) -> None:
        """Warn, once for each reason, of what a user would want to know."""
        if "skipped" not in self._warned and self._skipped():
            self._warn("skipped", (
                "a gradient, its square or the loss is not finite; this step was skipped and nothing was changed "
                "(further ones are only counted, in skipped_steps)."
            ))
        if "stuck" not in self._warned and isinstance(self.estimator, DAdaptation):
            states = [s for s in self.state.values() if "first_distance" in s]
            steps = max((int(s["step"]) for s in states), default=0)
            if steps < PATIENCE:
                return
            if all(bool((s["distance"] <= s["first_distance"]).all()) for s in states):
                self._warn("stuck", (
                    f"after {steps} steps no distance has grown beyond its first guess, d0; if training is slow, the gradients may "
                    "be too noisy for the bound to see further: try travel=1.5, larger batches or a larger d0."
                ))
            else:
                self._warned.add("stuck")  # distances never shrink

    def _warn(self, reason: str, sentence: str) -> None:
        """Warn, pointing at the line outside pslib and torch that led here."""
        self._warned.add(reason)
        level, frame = 1, sys._getframe()
        while frame.f_back is not None and frame.f_code.co_filename.startswith(OURS):
            level, frame = level + 1, frame.f_back
        warnings.warn(f"{type(self).__name__}: {sentence}", stacklevel=level)

    def _entries(self) -> list[Entry]:
        entries = []
        for group in self.param_groups:
            names = group.get("param_names") or [""] * len(group["params"])
            for p, name in zip(group["params"], names, strict=True):
                state, grad = self.state.get(p, {}), None
                if p.grad is None and not state:
                    continue
                x, stride = real(distributed.local(p)), self.stride(p)
                if p.grad is not None:
                    statistics = torch.float32 if x.dtype in (torch.float16, torch.bfloat16) else x.dtype
                    grad = real(self.gradient(p)).to(statistics)
                    if stride > 1 and grad.stride() != x.stride():
                        grad = torch.empty_like(x, dtype=grad.dtype).copy_(grad)
                    grad = -grad if group.get("maximize", False) else grad
                entries.append(Entry(x, grad, self.state[p], group, state.get("alpha_sq"), name.rpartition(".")[0], stride, p))
        return entries if any(e.grad is not None for e in entries) else []

    def _observe(self, e: Entry) -> None:
        """Take the gradient into v and α²."""
        beta2, eps = e.group["betas"][1], e.group["eps"]
        if e.grad is None:
            if e.alpha_sq is None:  # the fast path was used before, and does not keep it
                e.alpha_sq = e.state["alpha_sq"] = self.scaling.compute(e.state, beta2, eps)
            return
        if "unit" in e.state:
            e.grad = e.grad * e.state["unit"].to(e.grad.dtype)
        if "step" not in e.state:
            e.state["step"] = 0
            e.state["exp_avg"] = torch.zeros_like(e.grad)
            e.state["exp_avg_sq"] = torch.zeros_like(e.grad)
            self.estimator.start(e)
        e.state["step"] = int(e.state["step"]) + 1
        e.state["exp_avg_sq"].mul_(beta2).add_((e.grad * e.grad) * (1 - beta2))
        e.alpha_sq = self.scaling.update(e.state, e.grad, beta2, eps)

    def _move(self, e: Entry, inside: Tensor, outside: Tensor) -> None:
        """Take the step."""
        assert e.grad is not None
        beta1, gamma, m = e.group["betas"][0], e.group["lr"], e.state["exp_avg"]
        gamma = gamma.reshape(()) if isinstance(gamma, Tensor) else gamma
        m.mul_(beta1).add_(e.grad * ((1 - beta1) * inside).to(m))
        length = gamma * outside / (1 - beta1 ** e.state["step"])
        step = over_scaling(m, e.alpha_sq) * length.to(m)
        if "unit" in e.state:
            step = step * e.state["unit"].to(m.dtype)
        kept = 1 - gamma * e.group["weight_decay"]
        e.param.copy_(e.param.to(m.dtype) * kept - step)

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
        given = [g.get("param_names") or [None] * len(g["params"]) for g in self.param_groups]
        names = [n if n is not None else str(i) for i, n in enumerate(n for group in given for n in group)]
        return list(dict.fromkeys(n.rpartition(".")[0] for n in names)) if self.per == "module" else names

    @property
    def effective_lr(self) -> Tensor:
        """η of the last step, one float64 number a block (nan before a block's first step), as a lazy tensor.

        Units: the step is η·m̂/α², so those of the learning rate of the optimizer with that scaling:
        [x] for an adaptive scaling, [x]²/[f] for "none".  With several groups in one block, the first group's.
        """
        return self._block_values("rate", lambda group: group["lr"])

    def __getstate__(self) -> dict:
        own = ("scaling", "estimator", "per", "units", "fused", "slice_p", "_warned")
        return {**super().__getstate__(), **{name: getattr(self, name) for name in own}, "_skips": self._skipped()}

    def __setstate__(self, state: dict) -> None:
        # torch calls this in load_state_dict too, with the state alone; a pickle of version 0.1 lacks what is newer than that.
        defaults = {"fused": False, "slice_p": 1, "_warned": set(), "_skips": state.pop("skipped_steps", 0)}
        missing = {name: value for name, value in {**defaults, "_plan": None}.items() if not hasattr(self, name)}
        super().__setstate__({**missing, **state})
        self._forget_plan()

    def state_dict(self) -> dict:
        """The state as torch's optimizers give it; that of a sharded parameter is sharded like the parameter."""
        self._report()
        state_dict = super().state_dict()
        params = [p for group in self.param_groups for p in group["params"]]
        numbers = [n for group in state_dict["param_groups"] for n in group["params"]]
        for p, n in zip(params, numbers, strict=True):
            state = state_dict["state"].get(n)
            if state is not None:
                # The same names after every step, whichever path took it: torch.distributed.checkpoint loads by name.
                state = state_dict["state"][n] = {**self._empty(), **state}
                if self.scaling.refresh == 1:
                    state.pop("alpha_sq", None)
            if state is not None and distributed.local(p) is not p:
                state_dict["state"][n] = {
                    name: distributed.like(p, v) if isinstance(v, Tensor) and v.dim() and name not in BLOCKWISE else v
                    for name, v in state.items()
                }
        return state_dict

    def _empty(self) -> dict[str, Tensor]:
        """Numbers that a parameter's state may still lack."""
        numbers = {name: torch.full((), math.nan, dtype=torch.float64) for name in self.estimator.kept}
        return {**numbers, "unit": torch.zeros((), dtype=torch.float64)} if self.units is not None else numbers

    def load_state_dict(self, state_dict: dict) -> None:
        """Load a state; unlike torch's default, the statistics keep the precision in which they were saved.

        What is not set per group (scaling, per, units, d0, growth_rate, travel, c, f_star, slice_p) is not part of the state: give it
        again.  States of version 0.1 and those of the fast path and of the reference loop are read by both.

        Raises:
            ValueError: if the state was made with another slice_p, or by another optimizer.
        """
        kept = state_dict["state"].values()
        others = isinstance(self.estimator, DAdaptation) and any("exp_avg" in s and "initial" not in s for s in kept)
        require(not others, "the state is another optimizer's: it does not say where the parameters started; begin without it.")
        given: list[dict] = []  # as the hooks of the state leave it
        last = self.register_load_state_dict_pre_hook(lambda _, final: given.append(final))
        try:
            super().load_state_dict(state_dict)
        finally:
            last.remove()
        [state_dict] = given
        params = [p for group in self.param_groups for p in group["params"]]
        numbers = [n for group in state_dict["param_groups"] for n in group["params"]]
        for p, n in zip(params, numbers, strict=True):
            state, x = self.state[p], real(distributed.local(p))
            for name, value in state_dict["state"].get(n, {}).items():
                if isinstance(value, Tensor):
                    state[name] = distributed.local(value.detach()).to(device=x.device, copy=True)
            if "unit" in state and state["unit"].dim() == 0 and not state["unit"] > 0:
                del state["unit"]
            if "initial" in state:
                size = part(x, self.stride(p)).numel()
                require(
                    state["initial"].numel() == size,
                    f"the state was made with another slice_p than {self.slice_p}; give the one it had.",
                )
                if "initial_sq" not in state:
                    state["initial_sq"] = dot(state["initial"], state["initial"])
                if "distance" in state and "first_distance" not in state:
                    state["first_distance"] = torch.zeros_like(state["distance"])  # not known: anything has grown from it
                if "distance" in state and "schedule_sq" in self.estimator.kept and "schedule_sq" not in state:
                    state["schedule_sq"] = torch.full_like(state["distance"], float(state["step"]))  # as if γ had been 1


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

    Example: the step of `torch.optim.Adam`.

    >>> x, y = (torch.nn.Parameter(torch.tensor([3.0, -4.0])) for _ in range(2))
    >>> x.grad, y.grad = torch.tensor([5.0, -0.01]), torch.tensor([5.0, -0.01])
    >>> ScaledSGD([x], lr=0.1, eps=1e-8).step()
    >>> torch.optim.Adam([y], lr=0.1, eps=1e-8).step()
    >>> torch.allclose(x, y)
    True
    """

    def __init__(
        self, params: ParamsT, lr: float, *, betas: tuple[float, float] = (0.9, 0.999), eps: float = 0.0,
        scaling: scalings.Scaling | str = "adam", weight_decay: float = 0.0, maximize: bool = False,
    ):
        defaults = dict(lr=lr, betas=betas, eps=eps, weight_decay=weight_decay, maximize=maximize)
        super().__init__(params, defaults, scaling=scaling, estimator=Fixed(), per="model")

    def step(self, closure: Callable[[], Tensor] | None = None) -> Tensor | float | None:  # type: ignore[override]
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
        fused: as in `PSDASGD`.

    Raises:
        ValueError: for a setting out of range, or `step` without a loss.
        RuntimeError: for sparse gradients.

    Source: derived from the principles of Suh & Seo (arXiv 2401.03240, section 4), not transcribed; the step is
    Polyak's (1987), the stochastic form and the smoothed bound Loizou et al.'s (2021).

    Example: `step` is given the loss, and its lowest value is 0 here.

    >>> import torch
    >>> from pslib import PSSPS
    >>> x = torch.nn.Parameter(torch.tensor([3.0, -4.0]))
    >>> optimizer = PSSPS([x])
    >>> for _ in range(300):
    ...     optimizer.zero_grad()
    ...     loss = x.square().sum()
    ...     loss.backward()
    ...     loss = optimizer.step(loss=loss)
    >>> bool(loss < 0.01)
    True
    """

    def __init__(
        self, params: ParamsT, lr: float = 1.0, *, betas: tuple[float, float] = (0.9, 0.98), eps: float = 0.0, c: float = 0.2,
        f_star: float = 0.0, d0: float = 2.0**-8, growth_rate: float = 2 ** (1 / 20), scaling: scalings.Scaling | str = "adam",
        weight_decay: float = 0.0, fused: bool | None = None,
    ):
        require(_number(c) and 0 < c < math.inf, f"c must be a finite number > 0, not {c!r}.")
        require(_number(f_star) and abs(f_star) < math.inf, f"f_star must be a finite number, not {f_star!r}.")
        require(_number(d0) and d0 > 0, f"d0 must be > 0, not {d0!r}.")
        require(_number(growth_rate) and growth_rate >= 1, f"growth_rate must be ≥ 1, not {growth_rate!r}.")
        defaults = dict(lr=lr, betas=betas, eps=eps, weight_decay=weight_decay)
        super().__init__(params, defaults, scaling=scaling, estimator=Polyak(c, f_star, d0, growth_rate), per="model", fused=fused)

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
        travel: the distance is at least so many times rms|x − x₀|/√Σγ², α²-weighted, at each step; no units.  1 is what a random
            walk with steps γδ would show.  With 0, the default, the bound alone decides.  1.5 helps where gradients are so noisy
            that the bound never sees beyond d0, and 2 more, but only in short runs under a schedule that falls to zero.  The
            distance is then no lower bound any more, even for convex losses.
        maximize: ascend instead.
        fused: None: the fast path of `pslib.fused` where it applies (scaling="adam", all parameters on one device), else the
            reference loop; True: the fast path or an error; False: the reference loop.
        slice_p: x₀ and s are kept, and the distance estimated, on one in `slice_p` runs of 16 coordinates of each tensor
            (never on fewer than 256 of them); 11 leaves 8.7 bytes of state a float32 parameter instead of 16.

    Raises:
        ValueError: for a setting out of range.
        RuntimeError: for sparse gradients.

    Source: derived from the principles of Suh & Seo (arXiv 2401.03240, section 4), not transcribed; the bound is
    that of Defazio & Mishchenko (2023) in the scaled space; per="tensor" is this book's extension.

    Example: no learning rate, and what was learned instead of one.

    >>> import torch
    >>> from pslib import PSDASGD
    >>> x = torch.nn.Parameter(torch.tensor([3.0, -4.0]))
    >>> optimizer = PSDASGD({"x": x}.items())
    >>> for _ in range(300):
    ...     optimizer.zero_grad()
    ...     loss = x.square().sum()
    ...     loss.backward()
    ...     optimizer.step()
    >>> bool(loss < 0.01), optimizer.block_names
    (True, ['x'])
    >>> 0.01 < optimizer.distance.item() < 5
    True
    """

    def __init__(
        self, params: ParamsT, lr: float = 1.0, *, betas: tuple[float, float] = (0.9, 0.98), eps: float = 0.0,
        d0: float | None = None, per: str = "tensor", units: str | None = None, unit: float | None = None,
        scaling: scalings.Scaling | str = "adam", weight_decay: float = 0.0, growth_rate: float = math.inf, travel: float = 0.0,
        maximize: bool = False, fused: bool | None = None, slice_p: int = 1,
    ):
        absolute = per == "model" and units is None
        if d0 is None:
            d0 = 1e-6 if absolute else 2.0**-8
        require(_number(d0) and 0 < d0 < math.inf, f"d0 must be a finite number > 0, not {d0!r}.")
        require(_number(growth_rate) and growth_rate > 1, f"growth_rate must be > 1, not {growth_rate!r}.")
        require(_number(travel) and 0 <= travel < math.inf, f"travel must be a finite number ≥ 0, not {travel!r}.")
        defaults = dict(lr=lr, betas=betas, eps=eps, weight_decay=weight_decay, maximize=maximize, unit=unit)
        estimator = DAdaptation(d0, growth_rate, relative=not absolute and units is None, travel=travel)
        super().__init__(params, defaults, scaling=scaling, estimator=estimator, per=per, units=units, fused=fused, slice_p=slice_p)

    def step(self, closure: Callable[[], Tensor] | None = None) -> Tensor | float | None:  # type: ignore[override]
        """Take one step; `closure` re-evaluates the loss and returns it."""
        return self._step(closure)

    @property
    def distance(self) -> Tensor:
        """δ, the distance estimate, one float64 number a block, in the parameter's units (with `units`: in σ), as a lazy tensor."""
        return self._block_values("distance", lambda group: 1.0)
