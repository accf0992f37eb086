"""The explicitly rescaled network: what is trained is x' = α∘x, and what is run on it is steepest descent.

The claim to be checked is that an adaptive optimizer on x *is* steepest descent on x'.  So the parameters x' are made
for real: the network computes f'(x') = f(x'/α), autograd differentiates with respect to x', and an optimizer that
knows nothing of α (`torch.optim.SGD`, `PolyakSGD`, `DAdaptSGD`) takes the step.  When α moves, everything that lives
in the scaled space is written in the new scale::

    vectors (x', x'₀)       × α_new/α_old
    covectors (g', m', s')  ÷ α_new/α_old
    squared covectors (v')  ÷ (α_new/α_old)²

`side_by_side` runs the two and says how far apart they are.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from . import scalings
from .estimators import dot
from .invariance import relative_gap
from .optimizers import PSDASGD, PSSPS, ScaledSGD
from .tasks import Task, supervised

__all__ = ["Comparison", "DAdaptSGD", "PolyakSGD", "RescaledNetwork", "side_by_side"]


class RescaledNetwork:
    """A network whose trained parameters are x' = α∘x; it starts at α = 1.

    Args:
        model: a network at its starting point x₀; its own parameters are not changed.
        loss: maps (outputs, targets) to a scalar.

    Attributes:
        scaled: the trained parameters x', leaves of the autograd graph.
        alpha: α, one tensor a parameter, always positive.
    """

    def __init__(self, model: nn.Module, loss):
        self.model, self.loss = model, loss
        self.names = [name for name, _ in model.named_parameters()]
        self.scaled = [nn.Parameter(p.detach().clone()) for p in model.parameters()]
        self.alpha = [torch.ones_like(p) for p in self.scaled]

    def backward(self, inputs: Tensor, targets: Tensor) -> Tensor:
        """Put g' = ∂f'/∂x' in `.grad` of the scaled parameters and return the loss f'(x') = f(x'/α)."""
        for p in self.scaled:
            p.grad = None
        original = {name: p / alpha for name, p, alpha in zip(self.names, self.scaled, self.alpha, strict=True)}
        loss = self.loss(functional_call(self.model, original, (inputs,)), targets)
        loss.backward()
        return loss.detach()

    @torch.no_grad()
    def original(self) -> list[Tensor]:
        """x = x'/α."""
        return [p / alpha for p, alpha in zip(self.scaled, self.alpha, strict=True)]

    @torch.no_grad()
    def original_gradient(self) -> list[Tensor]:
        """g = α∘g', the gradient with respect to x, from the one with respect to x'."""
        return [alpha * _gradient(p) for p, alpha in zip(self.scaled, self.alpha, strict=True)]

    @torch.no_grad()
    def move(self, alpha_sq: list[Tensor], carried: Sequence[tuple[Sequence[Tensor], int]] = ()) -> None:
        """Change α and write x', g' and whatever else lives in the scaled space in the new scale.

        Args:
            alpha_sq: the new α², one tensor a parameter.  Where it is 0 (a dead coordinate) the new scale is
                undefined: x' would be 0 whatever x is.  Such a coordinate keeps the α it has.
            carried: pairs (tensors, power): power +1 for vectors, −1 for covectors, −2 for squared covectors.
        """
        new = [torch.where(a > 0, a.sqrt(), old) for a, old in zip(alpha_sq, self.alpha, strict=True)]
        own: list[tuple[Sequence[Tensor], int]] = [(self.scaled, 1), ([_gradient(p) for p in self.scaled], -1)]
        for tensors, power in [*own, *carried]:
            for t, to, old in zip(tensors, new, self.alpha, strict=True):
                for _ in range(abs(power)):
                    t.mul_(to / old if power > 0 else old / to)
        self.alpha = new


def _gradient(p: Tensor) -> Tensor:
    assert p.grad is not None
    return p.grad


def _blocks(terms: list[Tensor], per: str) -> Tensor:
    """One number a block from one number a tensor."""
    numbers = torch.stack(terms)
    return numbers.sum(0, keepdim=True) if per == "model" else numbers


class _PlainSGD:
    """Steepest descent x ← x − outside·m̂, m the EMA of inside·g; subclasses say what inside and outside are.

    Knows nothing of α.  `ones_sq`, one number a tensor, is the squared length of the vector of ones: the count of
    coordinates in an unscaled space, Σα² in a scaled one.  It turns lengths into distances per parameter.
    """

    def __init__(self, params: list[Tensor], lr: float, betas: tuple[float, float], per: str):
        self.params, self.lr, self.betas, self.per, self.k = list(params), lr, betas, per, 0
        self.start = [p.detach().clone() for p in self.params]
        self.m, self.v, self.s = ([torch.zeros_like(p) for p in self.start] for _ in range(3))

    @property
    def carried(self) -> list[tuple[list[Tensor], int]]:
        """What must be re-expressed when the space is: see `RescaledNetwork.move`."""
        return [(self.start, 1), (self.m, -1), (self.s, -1), (self.v, -2)]

    def sum(self, terms) -> Tensor:
        return _blocks(list(terms), self.per)

    @torch.no_grad()
    def step(self, loss: Tensor, ones_sq: list[Tensor]) -> None:
        """Take one step; `loss` is where the gradients in `.grad` were taken."""
        self.k += 1
        beta1, beta2 = self.betas
        for p, v in zip(self.params, self.v, strict=True):
            v.mul_(beta2).add_(_gradient(p) * _gradient(p) * (1 - beta2))
        inside, outside = self.rate(loss.double(), self.sum(ones_sq))
        count = len(self.params)
        for p, m, i, o in zip(self.params, self.m, inside.expand(count), outside.expand(count), strict=True):
            m.mul_(beta1).add_(_gradient(p) * ((1 - beta1) * i).to(m.dtype))
            p.sub_(m * (self.lr * o / (1 - beta1**self.k)).to(m.dtype))

    def rate(self, loss: Tensor, ones_sq: Tensor) -> tuple[Tensor, Tensor]:
        """(inside, outside), one number a block each."""
        raise NotImplementedError

    def mean_sq(self) -> Tensor:
        """G², the running mean square of the gradient's norm."""
        return self.sum((v / (1 - self.betas[1] ** self.k)).sum(dtype=torch.float64) for v in self.v)


class PolyakSGD(_PlainSGD):
    """SPS: η = min((f − f*)₊/(c‖g‖²), bound); the bound on η/‖1‖² grows by `growth_rate` a step.

    Args:
        params: the parameters.
        lr, betas, c, d0, growth_rate, f_star: as in `pslib.PSSPS`.
    """

    def __init__(self, params, lr=1.0, *, betas, c, d0, growth_rate, f_star=0.0):
        super().__init__(params, lr, betas, "model")
        self.c, self.f_star, self.d0, self.growth_rate, self.bound = c, f_star, d0, growth_rate, None
        entries = sum(p.numel() for p in self.start)
        self.rms = (self.sum(dot(p, p) for p in self.start) / entries).sqrt()

    def rate(self, loss, ones_sq):
        norm_sq = self.sum(dot(_gradient(p), _gradient(p)) for p in self.params)
        rho = (loss - self.f_star).clamp(min=0) / (self.c * norm_sq * ones_sq)
        if self.bound is None:
            self.bound = self.d0 * self.rms / (ones_sq * self.mean_sq()).sqrt()
        rho = torch.minimum(rho, self.bound)
        self.bound = torch.where(rho > 0, rho * self.growth_rate, self.bound)
        return rho, ones_sq


class DAdaptSGD(_PlainSGD):
    """SGD with D-Adaptation and a running G: η = δ‖1‖/G, δ the largest N/(‖s‖‖1‖) so far.

    Args:
        params: the parameters, none of them a tensor of zeros.
        lr, betas, d0, per: as in `pslib.PSDASGD`.
    """

    def __init__(self, params, lr=1.0, *, betas, d0, per):
        super().__init__(params, lr, betas, per)
        rms = [(dot(p, p) / p.numel()).sqrt() for p in self.start]
        self.distance = d0 * torch.stack(rms) if per == "tensor" else torch.tensor([d0], dtype=torch.float64)
        self.numerator = torch.zeros_like(self.distance)

    def rate(self, loss, ones_sq):
        beta3, delta, mean_sq = math.sqrt(self.betas[1]), self.distance, self.mean_sq()
        weight = self.lr * delta / (ones_sq * mean_sq).sqrt()
        progress = self.sum(dot(_gradient(p), p0 - p) for p, p0 in zip(self.params, self.start, strict=True))
        self.numerator = beta3 * self.numerator + (1 - beta3) * weight * progress
        for s, p, w in zip(self.s, self.params, weight.expand(len(self.s)), strict=True):
            s.mul_(beta3).add_(_gradient(p) * ((1 - beta3) * w).to(s.dtype))
        s_sq = self.sum(dot(s, s) for s in self.s)
        self.distance = torch.maximum(delta, self.numerator / (s_sq * ones_sq).sqrt())
        return delta, (ones_sq / mean_sq).sqrt()


class _MomentumSGD:
    """`torch.optim.SGD`, its momentum buffer an average as in Adam (started at zero, bias-corrected through lr)."""

    def __init__(self, params, lr, betas):
        self.lr, self.beta1, self.k = lr, betas[0], 0
        self.sgd = torch.optim.SGD(params, lr, momentum=self.beta1, dampening=self.beta1)
        self.m = [torch.zeros_like(p) for p in params] if self.beta1 else []
        for p, m in zip(params, self.m, strict=False):
            self.sgd.state[p]["momentum_buffer"] = m

    @property
    def carried(self):
        return [(self.m, -1)] if self.m else []

    def step(self, loss, ones_sq):
        self.k += 1
        self.sgd.param_groups[0]["lr"] = self.lr / (1 - self.beta1**self.k)
        self.sgd.step()


# the adaptive optimizer, the plain one, and the settings that both are given
METHODS: dict[str, tuple[Any, Any, dict]] = {
    "fixed": (ScaledSGD, _MomentumSGD, {}),
    "polyak": (PSSPS, PolyakSGD, {"c": 0.2, "d0": 2.0**-8, "growth_rate": 2 ** (1 / 20)}),
    "d-adaptation": (PSDASGD, DAdaptSGD, {"d0": 2.0**-8, "per": "tensor"}),
}


@dataclass(frozen=True)
class Comparison:
    """An adaptive optimizer and steepest descent in the explicitly rescaled network, from the same start.

    Attributes:
        gaps: ‖x − x'/α‖/‖x‖ over all parameters, after each step.
        bounds: the rounding bound on them (see `side_by_side`); empty if no control was run.
        losses: of the adaptive run, nats.
        identical: whether x'/α equals x, by `torch.equal`, after every step.
        distances: after each step, one row a side: the δ of adaptive and of plain D-Adaptation, largest block.
    """

    gaps: Tensor
    bounds: Tensor
    losses: Tensor
    identical: bool
    distances: Tensor

    @property
    def within(self) -> bool:
        """Whether every gap is within its bound."""
        return bool((self.gaps <= self.bounds).all())


def _fresh(task: Task, seed: int, dtype: torch.dtype) -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return task.build(task.load()).to(dtype)


def _batches(task: Task, steps: int, seed: int, dtype: torch.dtype) -> list[tuple[Tensor, Tensor]]:
    data, generator = task.load(), torch.Generator().manual_seed(seed)
    picks = [torch.randint(len(data.x_train), (task.batch_size,), generator=generator) for _ in range(steps)]
    return [(data.x_train[i].to(dtype), data.y_train[i]) for i in picks]


def _adaptive(task, seed, dtype, batches, make, nudge=0.0):
    """Train x with the adaptive optimizer; yield (loss, parameters, optimizer) after every step."""
    model = _fresh(task, seed, dtype)
    params, noise = [p.detach() for p in model.parameters()], torch.Generator().manual_seed(1)

    def disturb():
        for p in params if nudge else []:
            p.mul_(1 + nudge * (2 * torch.rand(p.shape, generator=noise, dtype=torch.float64) - 1).to(p))

    disturb()
    opt = make(model.parameters())
    for inputs, targets in batches:
        opt.zero_grad()
        loss = task.loss(model(inputs), targets)
        loss.backward()
        opt.step(loss=loss.detach()) if isinstance(opt, PSSPS) else opt.step()
        disturb()
        yield loss.detach(), params, opt


def _rescaled(task, seed, dtype, batches, scaling, make, beta2):
    """Train x' = α∘x with a plain optimizer; yield (x'/α, optimizer) after every step."""
    network = RescaledNetwork(_fresh(task, seed, dtype), task.loss)
    opt = make(network.scaled)
    states: list[dict[str, Any]] = [{"step": 0, "exp_avg_sq": torch.zeros_like(p.detach())} for p in network.scaled]
    for inputs, targets in batches:
        loss = network.backward(inputs, targets)
        alpha_sq = []
        for state, g in zip(states, network.original_gradient(), strict=True):
            state["step"] += 1
            state["exp_avg_sq"].mul_(beta2).add_(g * g * (1 - beta2))
            alpha_sq.append(scaling.update(state, g, beta2, 0.0))
        network.move(alpha_sq, opt.carried)  # before the step, because Adam's α contains this step's gradient
        opt.step(loss, [a.sum(dtype=torch.float64) for a in alpha_sq])
        yield network.original(), opt


def side_by_side(
    scaling, *, method: str = "fixed", task: str | Task = "digits-mlp", steps: int = 200, seed: int = 0,
    dtype: torch.dtype = torch.float64, lr: float | None = None, betas: tuple[float, float] = (0.0, 0.98),
    control: bool = True, **settings,
) -> Comparison:
    """Train a network with an adaptive optimizer, and its explicitly rescaled twin with steepest descent.

    Args:
        scaling: a `pslib.scalings.Scaling` or its name; ε = 0.
        method: "fixed" (`ScaledSGD` against `torch.optim.SGD`), "polyak" (`PSSPS` against `PolyakSGD`) or
            "d-adaptation" (`PSDASGD` against `DAdaptSGD`).
        task, steps, seed, dtype: what is trained, and how long.
        lr: default 2⁻⁹ for "fixed" (a power of two: SGD's fused multiply-add then rounds as ScaledSGD does), else 1.
        betas: decay rates.
        control: also measure the rounding bound.
        settings: for both optimizers of the method; "polyak": `c` (default 0.2), `d0` (2⁻⁸), `growth_rate` (2^(1/20)),
            `f_star` (0); "d-adaptation": `d0` (2⁻⁸), `per` ("tensor").

    The bound is that of `pslib.invariance.certify`: 64 times the drift, so far, of a control run of the adaptive
    optimizer in which every parameter is disturbed by up to one machine epsilon at the start and after every step.

    Raises:
        ValueError: for an unknown method, task or scaling.
    """
    if method not in METHODS:
        raise ValueError(f"there is no method {method!r}; choose one of {', '.join(METHODS)}.")
    task, scaling = supervised(task), scalings.get(scaling)
    lr = (2.0**-9 if method == "fixed" else 1.0) if lr is None else lr
    adaptive, plain, defaults = METHODS[method]
    settings = {**defaults, **settings}
    batches = _batches(task, steps, seed, dtype)

    def make(params):
        return adaptive(params, lr, betas=betas, scaling=scaling, **settings)

    def make_plain(params):
        return plain(params, lr, betas=betas, **settings)

    epsilon, drift = torch.finfo(dtype).eps, 0.0
    gaps, bounds, losses, distances, identical = [], [], [], [], True
    nudged = _adaptive(task, seed, dtype, batches, make, nudge=epsilon) if control else [None] * steps
    runs = zip(
        _adaptive(task, seed, dtype, batches, make),
        _rescaled(task, seed, dtype, batches, scaling, make_plain, betas[1]),
        nudged, strict=True,
    )
    for (loss, x, opt), (y, plain_opt), disturbed in runs:
        gaps.append(relative_gap(x, y))
        identical &= all(torch.equal(a, b) for a, b in zip(x, y, strict=True))
        losses.append(loss)
        if disturbed is not None:
            drift = max(drift, relative_gap(x, disturbed[1]))
            bounds.append(64 * max(epsilon, drift))
        if method == "d-adaptation":
            distances.append(torch.stack([opt.distance.max(), plain_opt.distance.max()]))
    return Comparison(
        torch.tensor(gaps, dtype=torch.float64), torch.tensor(bounds, dtype=torch.float64), torch.stack(losses), identical,
        torch.stack(distances) if distances else torch.empty(0, 2, dtype=torch.float64),
    )
