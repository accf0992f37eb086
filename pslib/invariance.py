"""Invariance certificates: which changes of units does an optimizer not notice?

A `Transformation` turns an optimization problem into an equivalent one, and its parameters back.  `certify` runs
an optimizer on both and says whether the mapped-back trajectories are the same: bit for bit, up to rounding, or
not, and then how different and from which step on.  Factors are powers of two, which commute with floating-point
arithmetic: a true invariance is then exact, and a difference cannot be blamed on rounding.

Works with every `torch.optim.Optimizer` whose `step` takes a closure, third-party ones included.
"""

from __future__ import annotations

import html
import math
import warnings
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

__all__ = [
    "Certificate", "CoordinateUnits", "DiagonalGradient", "LossScale", "Problem", "Rotation", "Sign", "TensorUnits",
    "Transformation", "Translation", "UniformUnits", "as_html", "as_text", "atlas", "certify", "draw", "groups", "relative_gap",
    "network_problem", "trajectory",
]

Params = list[Tensor]
OptimizerFactory = Callable[[Params], torch.optim.Optimizer]
Atlas = Mapping[str, Mapping[str, "Certificate"]]

VACUOUS = 0.01  # a rounding bound above one per cent tells nothing
SYMBOLS = {"bit-exact": "=", "rounding": "≈", "broken": "×"}


@dataclass(frozen=True)
class Problem:
    """Starting values and a loss.

    Attributes:
        start: the initial parameters, a list of tensors.
        loss: maps (parameters, step) to a scalar; the step selects the batch.
    """

    start: Params
    loss: Callable[[Params, int], Tensor]


class Transformation:
    """A change of description: x̃ = forward(x), x = back(x̃); the loss is that of the mapped-back parameters.

    Subclasses override what differs from the identity.  `seed` draws whatever is random, once.
    """

    name = "identity"

    def forward(self, params: Params) -> Params:
        """Express parameters in the new description."""
        return [p.clone() for p in params]

    def back(self, params: Params) -> Params:
        """Express them in the old one (differentiable)."""
        return params

    def loss_factor(self) -> float:
        """What the loss is multiplied by."""
        return 1.0

    def gradient(self, grads: Params) -> Params:
        """What the optimizer is shown instead of the gradient."""
        return grads


class LossScale(Transformation):
    """The loss in other units: f̃ = c·f.

    Args:
        c: the factor.
    """

    name = "loss scale"

    def __init__(self, c: float = 2.0**-7):
        self.c = c

    def loss_factor(self) -> float:
        return self.c


class _Factors(Transformation):
    """Elementwise factors drawn as powers of two, 2^−`spread` to 2^`spread`, fixed by the shapes and the seed."""

    def __init__(self, spread: int = 5, seed: int = 0):
        self.spread, self.seed = spread, seed

    def shape(self, p: Tensor) -> tuple[int, ...]:
        """Of the factors of p."""
        return tuple(p.shape)

    def draw(self, p: Tensor, generator: torch.Generator) -> Tensor:
        """The factors of p."""
        exponents = torch.randint(-self.spread, self.spread + 1, self.shape(p), generator=generator)
        return torch.exp2(exponents.to(p.dtype)).to(p.device)

    def factors(self, params: Params) -> Params:
        """The factors of all parameters."""
        generator = torch.Generator().manual_seed(self.seed)
        return [self.draw(p, generator) for p in params]

    def forward(self, params: Params) -> Params:
        return [p / u for p, u in zip(params, self.factors(params), strict=True)]

    def back(self, params: Params) -> Params:
        return [p * u for p, u in zip(params, self.factors(params), strict=True)]


class DiagonalGradient(_Factors):
    """The gradient alone is multiplied by a positive diagonal D; parameters and loss stay (Kingma & Ba, 2015, section 2.1)."""

    name = "diagonal gradient"

    def forward(self, params: Params) -> Params:
        return [p.clone() for p in params]

    def back(self, params: Params) -> Params:
        return params

    def gradient(self, grads: Params) -> Params:
        return [g * d for g, d in zip(grads, self.factors(grads), strict=True)]


class UniformUnits(_Factors):
    """All parameters in one other unit: x = u·x̃.

    Args:
        u: the new unit, in the old one.
    """

    name = "uniform units"

    def __init__(self, u: float = 2.0**4):
        self.u = u

    def factors(self, params: Params) -> Params:
        return [torch.tensor(self.u, dtype=p.dtype, device=p.device) for p in params]


class TensorUnits(_Factors):
    """Every tensor in its own unit: x_b = u_b·x̃_b."""

    name = "units per tensor"

    def shape(self, p: Tensor) -> tuple[int, ...]:
        return ()


class CoordinateUnits(_Factors):
    """Every coordinate in its own unit: x = u∘x̃."""

    name = "units per coordinate"


class Sign(_Factors):
    """Some coordinates change their sign: x = ±x̃."""

    name = "sign"

    def draw(self, p: Tensor, generator: torch.Generator) -> Tensor:
        return (2 * torch.randint(0, 2, self.shape(p), generator=generator) - 1).to(p)


class Rotation(Transformation):
    """Every tensor is turned by an orthogonal matrix along its first dimension: x = Q x̃.  Exact only up to rounding.

    For a weight [out, in] that mixes its rows: a subgroup of all rotations of the parameter vector, which is enough
    to break an optimizer, and the largest one that a method made for matrices can respect from the left.

    Args:
        seed: of the matrices.
    """

    name = "rotation"

    def __init__(self, seed: int = 0):
        self.seed = seed

    def _matrices(self, params: Params) -> Params:
        generator = torch.Generator().manual_seed(self.seed)
        return [
            torch.linalg.qr(torch.randn(len(p), len(p), generator=generator, dtype=torch.float64)).Q.to(p) for p in params
        ]

    def forward(self, params: Params) -> Params:
        return [torch.tensordot(q.T, p, 1) for p, q in zip(params, self._matrices(params), strict=True)]

    def back(self, params: Params) -> Params:
        return [torch.tensordot(q, p, 1) for p, q in zip(params, self._matrices(params), strict=True)]


class Translation(Transformation):
    """The origin moves: x = x̃ + t.  Exact only up to rounding.

    Args:
        size: the standard deviation of t's entries, in the parameter's units.
        seed: of t.
    """

    name = "translation"

    def __init__(self, size: float = 1.0, seed: int = 0):
        self.size, self.seed = size, seed

    def _shifts(self, params: Params) -> Params:
        generator = torch.Generator().manual_seed(self.seed)
        return [self.size * torch.randn(p.shape, generator=generator, dtype=torch.float64).to(p) for p in params]

    def forward(self, params: Params) -> Params:
        return [p - t for p, t in zip(params, self._shifts(params), strict=True)]

    def back(self, params: Params) -> Params:
        return [p + t for p, t in zip(params, self._shifts(params), strict=True)]


def groups() -> list[Transformation]:
    """The transformations of the atlas, in its order."""
    return [
        LossScale(), DiagonalGradient(), UniformUnits(), TensorUnits(), CoordinateUnits(), Sign(), Rotation(), Translation(),
    ]


@dataclass(frozen=True)
class Certificate:
    """The verdict on one optimizer under one transformation.

    Attributes:
        transformation: its name.
        verdict: "bit-exact" (torch.equal after every step), "rounding" (within the bound after every step) or "broken".
        step: the first step after which the trajectories differ by more than the bound; None unless broken.
        size: the largest relative difference between the trajectories, ‖x − back(x̃)‖/‖x‖ over all tensors.
        bound: the rounding bound in the same measure, at `step` if broken, otherwise at the last step (see `certify`).
        steps: how many steps were compared; fewer than asked for where rounding alone makes a difference of 1 %.
    """

    transformation: str
    verdict: str
    step: int | None
    size: float
    bound: float
    steps: int

    @property
    def symbol(self) -> str:
        """The verdict as one character, = bit-exact, ≈ rounding, × broken."""
        return SYMBOLS[self.verdict]

    def __str__(self) -> str:
        if self.verdict == "bit-exact":
            return f"{self.transformation}: bit-exact over {self.steps} steps"
        if self.verdict == "rounding":
            return f"{self.transformation}: exact up to rounding ({self.size:.0e} ≤ {self.bound:.0e}) over {self.steps} steps"
        return f"{self.transformation}: broken from step {self.step} on, by {self.size:.0e} within {self.steps} steps"


def trajectory(
    optimizer: OptimizerFactory, problem: Problem, transformation: Transformation, steps: int, nudge: float = 0.0
) -> list[Params]:
    """Run the optimizer on the transformed problem; the parameters after every step, mapped back.

    Args:
        optimizer: makes the optimizer from a list of parameters.
        problem: where to run.
        transformation: of the problem.
        steps: how many.
        nudge: disturbs every number at the start and after every step, by at most that fraction of the largest entry of
            its tensor (for the rounding bound).
    """
    noise = torch.Generator().manual_seed(1)

    def disturb(p: Tensor) -> Tensor:
        return p + nudge * p.abs().max() * (2 * torch.rand(p.shape, generator=noise, dtype=torch.float64) - 1).to(p)

    start = transformation.forward(problem.start)
    params: Params = [torch.nn.Parameter(disturb(p) if nudge else p) for p in start]
    opt: Any = optimizer(params)
    if callable(getattr(opt, "train", None)):
        opt.train()
    path = []
    for k in range(steps):

        def closure(k: int = k) -> Tensor:
            opt.zero_grad()
            loss = transformation.loss_factor() * problem.loss(transformation.back(params), k)
            loss.backward()
            grads: list[Any] = [p.grad for p in params]
            shown = transformation.gradient(grads)
            for p, g in zip(params, shown, strict=True):
                p.grad = g
            return loss.detach()

        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            opt.step(closure)
        with torch.no_grad():
            if nudge:
                for p in params:
                    p.copy_(disturb(p))
            path.append([p.detach().clone() for p in transformation.back(params)])
    return path


def relative_gap(x: Params, y: Params) -> float:
    """‖x − y‖/‖x‖ over all tensors, in float64; inf where either is not finite."""
    difference: Any = sum((a.double() - b.double()).square().sum() for a, b in zip(x, y, strict=True))
    gap = (difference / sum(a.double().square().sum() for a in x)).sqrt().item()
    return gap if math.isfinite(gap) else math.inf


def _reference(optimizer: OptimizerFactory, problem: Problem, steps: int) -> tuple[list[Params], list[float]]:
    """The run on the original problem, and the rounding bound after each of its steps."""
    identity = Transformation()
    original = trajectory(optimizer, problem, identity, steps)
    if not all(torch.isfinite(p).all() for p in original[-1]):
        raise ValueError("the optimizer's run on the original problem is not finite; choose another setting or problem.")
    epsilon = torch.finfo(problem.start[0].dtype).eps
    control = trajectory(optimizer, problem, identity, steps, nudge=epsilon)
    drift = accumulate((relative_gap(x, y) for x, y in zip(original, control, strict=True)), max)
    return original, [64 * max(epsilon, d) for d in drift]


def _certificate(original: list[Params], bounds: list[float], mapped: list[Params], name: str) -> Certificate:
    exact = all(torch.equal(a, b) for x, y in zip(original, mapped, strict=True) for a, b in zip(x, y, strict=True))
    gaps = [relative_gap(x, y) for x, y in zip(original, mapped, strict=True)]
    if exact:
        return Certificate(name, "bit-exact", None, 0.0, bounds[-1], len(gaps))
    pairs = enumerate(zip(gaps, bounds, strict=True), 1)
    broken = next((k for k, (gap, bound) in pairs if gap > bound and bound < VACUOUS), None)
    if broken:
        return Certificate(name, "broken", broken, max(gaps), bounds[broken - 1], len(gaps))
    told = sum(bound < VACUOUS for bound in bounds)
    if not told:
        raise ValueError("this run amplifies rounding so much that nothing can be certified; choose another setting or problem.")
    return Certificate(name, "rounding", None, max(gaps[:told]), bounds[told - 1], told)


def certify(
    optimizer: OptimizerFactory, transformation: Transformation, problem: Problem, *, steps: int = 50,
    carried: OptimizerFactory | None = None,
) -> Certificate:
    """Compare an optimizer's run on a problem with its run on the transformed problem.

    Args:
        optimizer: makes the optimizer from a list of parameters.
        transformation: see `groups`.
        problem: where to run, for instance `network_problem()`.
        steps: how many steps to compare.
        carried: makes the optimizer of the transformed run, when its settings have units and are to be changed along
            with the problem (the same one by default).

    The rounding bound is measured, not guessed: after step k it is 64 times the largest drift, over the first k steps,
    of a control run of the untransformed problem in which every parameter is disturbed, at the start and after every
    step, by up to one machine epsilon of its tensor's largest entry (and it is at least 64 machine epsilons).  So it
    accounts for how much this problem and this optimizer amplify rounding.

    Raises:
        ValueError: if the run on the original problem is not finite, or so chaotic that no step can be compared.

    >>> from pslib import PSDASGD
    >>> start = [torch.tensor([3.0, -4.0], dtype=torch.float64)]
    >>> problem = Problem(start, lambda params, step: params[0].square().sum())
    >>> certify(lambda params: torch.optim.SGD(params, 0.1), LossScale(), problem, steps=5).verdict
    'broken'
    >>> print(certify(PSDASGD, LossScale(), problem, steps=5))
    loss scale: bit-exact over 5 steps
    """
    original, bounds = _reference(optimizer, problem, steps)
    mapped = trajectory(carried or optimizer, problem, transformation, steps)
    return _certificate(original, bounds, mapped, transformation.name)


def atlas(
    optimizers: Mapping[str, OptimizerFactory], problem: Problem, *, transformations: Iterable[Transformation] | None = None,
    steps: int = 50,
) -> dict[str, dict[str, Certificate]]:
    """Certify every optimizer under every transformation.

    Args:
        optimizers: what each row is called, and the optimizer's factory.
        problem: where to run.
        transformations: the columns, default `groups`.
        steps: how many steps to compare.

    Returns:
        Certificates by row, then by the transformation's name; print them with `as_text`, show them with `as_html` or `draw`.
    """
    columns = groups() if transformations is None else list(transformations)
    table = {}
    for row, optimizer in optimizers.items():
        original, bounds = _reference(optimizer, problem, steps)
        table[row] = {
            t.name: _certificate(original, bounds, trajectory(optimizer, problem, t, steps), t.name) for t in columns
        }
    return table


def as_text(table: Atlas) -> str:
    """The verdicts as a plain-text table of symbols (= bit-exact, ≈ rounding, × broken)."""
    columns = list(next(iter(table.values())))
    width = max(map(len, table))
    lines = [f"{i}. {name}" for i, name in enumerate(columns, 1)]
    lines += ["", " " * width + "".join(f"{i:>3}" for i in range(1, len(columns) + 1))]
    lines += [row.ljust(width) + "".join(f"{c.symbol:>3}" for c in cells.values()) for row, cells in table.items()]
    return "\n".join(lines)


def _magnitude(size: float) -> str:
    return "∞" if math.isinf(size) else f"1e{math.floor(math.log10(size) + 0.5):d}"


def as_html(table: Atlas, caption: str) -> str:
    """The certificates as an HTML table in words, with row and column headers: verdict, first step, order of size.

    Args:
        table: from `atlas`.
        caption: the table's.
    """

    def words(c: Certificate) -> str:
        if c.verdict == "bit-exact":
            return "= bit-exact"
        if c.verdict == "rounding":
            return f"≈ rounding, {_magnitude(c.size)}"
        return f"× broken, step {c.step}, {_magnitude(c.size)}"

    columns = next(iter(table.values()))
    rows = ["".join(["<th scope='col'>optimizer</th>", *(f"<th scope='col'>{html.escape(name)}</th>" for name in columns)])]
    for row, cells in table.items():
        rows.append(f"<th scope='row'>{html.escape(row)}</th>" + "".join(f"<td>{words(c)}</td>" for c in cells.values()))
    return (
        f"<table class='dataframe'><caption>{html.escape(caption)}</caption><thead><tr>{rows[0]}</tr></thead><tbody>"
        + "".join(f"<tr>{row}</tr>" for row in rows[1:]) + "</tbody></table>"
    )


def draw(table: Atlas, ax: Any) -> None:
    """Draw the verdicts as a grid of colours and symbols; under ≈ and × the order of magnitude of the difference.

    Args:
        table: from `atlas`.
        ax: matplotlib axes, about 0.8 inches a column and 0.33 a row.
    """
    look = {"bit-exact": ("#0072B2", "white"), "rounding": ("#9BD0F0", "black"), "broken": ("#FBE3B6", "black")}
    columns = list(next(iter(table.values())))
    for y, cells in enumerate(table.values()):
        for x, c in enumerate(cells.values()):
            face, ink = look[c.verdict]
            ax.fill_between([x - 0.5, x + 0.5], y - 0.5, y + 0.5, facecolor=face, edgecolor="white", linewidth=1.5)
            side = 0 if c.verdict == "bit-exact" else -0.22
            ax.text(x + side, y, c.symbol, color=ink, ha="center", va="center", fontweight="bold", fontsize=12)
            if c.verdict != "bit-exact":
                ax.text(x + 0.16, y, _magnitude(c.size), color=ink, ha="center", va="center", fontsize=8)
    ax.set_xticks(range(len(columns)), [name.replace(" ", "\n") for name in columns])
    ax.set_yticks(range(len(table)), list(table))
    ax.set(xlim=(-0.5, len(columns) - 0.5), ylim=(len(table) - 0.5, -0.5))
    ax.xaxis.tick_top()
    ax.tick_params(length=0)
    ax.grid(visible=False)
    ax.spines[:].set_visible(False)


def network_problem(
    dtype: torch.dtype = torch.float64, *, widths: tuple[int, ...] = (40, 16, 10), bias: bool = True, batch: int = 64, seed: int = 0
) -> Problem:
    """A tanh network on MNIST-1D, one batch a step: weights of shape [out, in], then the layer's bias [out].

    Args:
        dtype: of the parameters and the data.
        widths: of the layers, from the 40 inputs to the 10 classes.
        bias: whether layers have one.
        batch: how many examples a step sees.
        seed: of the parameters and the batches.

    No partial derivative is ever exactly zero, so that optimizers with ε = 0 that do not guard 0/0 can run.
    """
    from .tasks import get

    data = get("mnist1d-cnn").load()
    x, y = data.x_train.to(dtype), data.y_train
    generator = torch.Generator().manual_seed(seed)
    start = []
    for fan_in, fan_out in zip(widths, widths[1:], strict=False):
        start.append((torch.randn(fan_out, fan_in, generator=generator, dtype=torch.float64) / fan_in**0.5).to(dtype))
        if bias:
            start.append((torch.randn(fan_out, generator=generator, dtype=torch.float64) * 0.1).to(dtype))
    orders = torch.stack([torch.randperm(len(x), generator=generator)[:batch] for _ in range(64)])

    def loss(params: Params, step: int) -> Tensor:
        now = orders[step % len(orders)]
        h = x[now]
        layers: list[Any] = [params[i : i + 2] if bias else [params[i], None] for i in range(0, len(params), 2 if bias else 1)]
        for i, (weight, b) in enumerate(layers):
            h = F.linear(torch.tanh(h) if i else h, weight, b)
        return F.cross_entropy(h, y[now])

    return Problem(start, loss)
