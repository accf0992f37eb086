"""The theorems of "Diagonal rescaling": symbolically, and bit for bit in real trainings."""

from dataclasses import dataclass
from functools import lru_cache, partial

import pytest
import sympy as sp
import torch

from pslib import ScaledSGD
from pslib.invariance import DiagonalGradient, LossScale, Rotation, Sign, Transformation, certify, network_problem, trajectory
from pslib.tasks import Task, get
from pslib.training import train

b1, b2, c, eta, q, s, eps = sp.symbols("beta1 beta2 c eta q s epsilon", positive=True)
m, g = sp.symbols("m g", real=True)
history = sp.symbols("g1:4", real=True)
closed_out = c * (1 + q) / (c + q)
closed_in = sp.sqrt(c**2 * (1 + q) / (c**2 + q))


def outside(m, s):
    return -eta * m / (s + eps)


def inside(m, s):
    return -eta * m / sp.sqrt(s**2 + eps)


def zero(expression):
    return sp.simplify(expression) == 0


def adam_step(gradients, eps=0, corrected=True):
    m = v = sp.Integer(0)
    for gradient in gradients:
        m, v = b1 * m + (1 - b1) * gradient, b2 * v + (1 - b2) * gradient**2
    t = len(gradients)
    return -eta * (m / (1 - b1**t)) / (sp.sqrt(v / (1 - b2**t)) + eps) if corrected else -eta * m / (sp.sqrt(v) + eps)


# --- theorems, symbolically ---------------------------------------------------------------------------

def test_moments_scale_by_induction():
    v = sp.symbols("v", positive=True)
    assert zero(b1 * (c * m) + (1 - b1) * (c * g) - c * (b1 * m + (1 - b1) * g))
    assert zero(b2 * (c**2 * v) + (1 - b2) * (c * g) ** 2 - c**2 * (b2 * v + (1 - b2) * g**2))


@pytest.mark.parametrize("corrected", [True, False])
@pytest.mark.parametrize("t", [1, 2, 3])
def test_the_step_is_homogeneous_of_degree_zero(t, corrected):
    n = sp.symbols("n", negative=True)
    step = adam_step(history[:t], corrected=corrected)
    assert sp.simplify(adam_step([c * x for x in history[:t]], corrected=corrected) / step) == 1
    assert sp.simplify(adam_step([n * x for x in history[:t]], corrected=corrected) / step) == -1


def test_a_factor_that_changes_is_seen():
    p1, p2 = sp.symbols("p1 p2", positive=True)
    assert not zero(sp.diff(adam_step([p1, c * p2]), c))
    assert zero(sp.limit((b1 * p1 + c * p2) / sp.sqrt(b2 * p1**2 + c**2 * p2**2), c, sp.oo) - 1)


@pytest.mark.parametrize("placed, closed, unit", [(outside, closed_out, s), (inside, closed_in, s**2)])
def test_the_residual(placed, closed, unit):
    ratio = (placed(c * m, c * s) / placed(m, s)).subs(eps, q * unit)
    assert zero(ratio**2 - closed**2)
    power = 1 if placed is outside else 2
    assert zero(sp.diff(closed, q).subs(q, 0) - (1 - c**-power) / power)
    # closed ** power is 1 plus a positive multiple of c ** power - 1, and c ** power minus another
    above, below = (sp.simplify(d / (c**power - 1)) for d in (closed**power - 1, c**power - closed**power))
    assert above.is_positive and below.is_positive
    assert sp.limit(closed, q, 0) == 1 and zero(sp.limit(closed**2, q, sp.oo) - c**2)
    assert sp.limit(closed, c, 0) == 0 and zero(sp.limit(closed**2, c, sp.oo) - (1 + q) ** (2 / sp.Integer(power)))


def test_epsilon_has_units():
    assert zero(outside(c * m, c * s) - outside(m, s).subs(eps, eps / c))
    assert zero(inside(c * m, c * s) ** 2 - inside(m, s).subs(eps, eps / c**2) ** 2)
    free = -eta * m / s
    assert zero(outside(c * m, c * s).subs(c, eps / s) / free - sp.Rational(1, 2))
    assert zero((inside(c * m, c * s).subs(c, sp.sqrt(eps) / s) / free) ** 2 - sp.Rational(1, 2))
    tau = sp.symbols("tau", positive=True)
    assert zero((1 - closed_out).subs(c, q * (1 - tau) / (q + tau)) - tau)


def test_the_limits_do_not_commute():
    step = outside(c * m, c * s)
    assert sp.limit(sp.limit(step, eps, 0), c, 0, "+") == -eta * m / s
    assert sp.limit(sp.limit(step, c, 0, "+"), eps, 0) == 0


def test_only_positive_diagonal_matrices():
    def sign(x):
        return (x > 0) - (x < 0)

    probes = [(x, y) for x in (-7, -1, 1, 7) for y in (-7, -1, 1, 7)]
    entries = range(-2, 3)
    for a in entries:
        for b in entries:
            for d in entries:
                for e in entries:
                    kept = all(sign(a * x + b * y) == sign(x) and sign(d * x + e * y) == sign(y) for x, y in probes)
                    assert kept == (a > 0 and e > 0 and b == d == 0)


def test_contrast_and_decay():
    lam, x, mu, u = sp.symbols("lambda x mu u", real=True)
    assert zero(mu * c * u + c * g - c * (mu * u + g))

    def two_steps(decoupled, c, lam):
        position, shown = x, []
        for gradient in history[:2]:
            shown.append(c * gradient + (0 if decoupled else lam * position))
            position = (1 - eta * lam if decoupled else 1) * position + adam_step(shown)
        return position

    values = {b1: sp.Rational(1, 2), b2: sp.Rational(3, 4), eta: sp.Rational(1, 10), x: 2, history[0]: 1, history[1]: -3, lam: 1}
    assert zero(two_steps(True, c, lam) - two_steps(True, 1, lam))
    assert not zero((two_steps(False, 5, lam) - two_steps(False, 1, lam)).subs(values))
    assert zero((two_steps(False, 5, lam) - two_steps(False, 1, lam / 5)).subs(values))


def test_rescaling_a_parameter_is_another_thing():
    a, b, kappa = sp.symbols("a b kappa", positive=True)
    slope = sp.symbols("L1", real=True, nonzero=True)
    w1, w2 = kappa * a, b / kappa

    def change(step1, step2):
        return sp.diff((w1 + step1) * (w2 + step2), eta).subs(eta, 0)

    assert zero(change(-eta * slope * w2, -eta * slope * w1) + slope * (kappa**2 * a**2 + b**2 / kappa**2))
    assert zero(change(-eta * sp.sign(slope), -eta * sp.sign(slope)) + sp.sign(slope) * (kappa * a + b / kappa))


def test_a_rescaled_gradient_need_not_be_a_gradient():
    x, y = sp.symbols("x y", real=True)
    c1, c2 = sp.symbols("c1 c2", positive=True)
    f = x**2 + x * y + 2 * y**2
    assert sp.solve(sp.diff(c2 * sp.diff(f, y), x) - sp.diff(c1 * sp.diff(f, x), y), c1) == [c2]


# --- trainings, bit for bit -----------------------------------------------------------------------------

STEPS = 200
OPTIMIZERS = {
    "adam": partial(torch.optim.Adam, lr=0.01, eps=0),
    "amsgrad": partial(torch.optim.Adam, lr=0.01, eps=0, amsgrad=True),
    "adamw": partial(torch.optim.AdamW, lr=0.01, eps=0, weight_decay=0.1),
    "scaled": partial(ScaledSGD, lr=0.01, scaling="adam"),
    "scaled with decay": partial(ScaledSGD, lr=0.01, scaling="adam", weight_decay=0.1),
}
SCALES = {"loss / 2^20": LossScale(2.0**-20), "loss * 2^20": LossScale(2.0**20), "diagonal": DiagonalGradient(10)}
each_dtype = pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["float32", "float64"])


@lru_cache
def plain(name, dtype):
    return trajectory(OPTIMIZERS[name], network_problem(dtype), Transformation(), STEPS)


def same(x, y):
    return len(x) == len(y) and all(torch.equal(a, b) for p, r in zip(x, y, strict=True) for a, b in zip(p, r, strict=True))


@each_dtype
@pytest.mark.parametrize("name", OPTIMIZERS)
@pytest.mark.parametrize("scale", SCALES)
def test_equal_bit_for_bit(name, scale, dtype):
    reference = plain(name, dtype)
    assert all(torch.isfinite(p).all() for p in reference[-1])
    assert not torch.equal(reference[0][0], reference[-1][0])
    assert same(trajectory(OPTIMIZERS[name], network_problem(dtype), SCALES[scale], STEPS), reference)


@dataclass(frozen=True)
class Multiplied(Task):
    factor: float = 1.0

    def loss(self, logits, target):
        return self.factor * super().loss(logits, target)


@lru_cache
def cnn(factor=1.0, spread=0, eps=0.0, dtype=torch.float32, weight_decay=0.0):
    """Losses and parameters after STEPS steps of the ReLU network."""
    def rescale(model):
        params = list(model.parameters())
        for p, d in zip(params, DiagonalGradient(spread).factors(params), strict=True):
            p.register_hook(lambda gradient, d=d: gradient * d)

    history = train(
        Multiplied(**vars(get("mnist1d-cnn")), factor=factor), partial(ScaledSGD, lr=0.01, eps=eps, weight_decay=weight_decay),
        steps=STEPS, dtype=dtype, prepare=rescale if spread else None, evaluations=1,
    )
    assert not history.diverged
    return [history.losses / factor, *(p.detach() for p in history.model.parameters())]


@each_dtype
@pytest.mark.parametrize("change", [dict(factor=2.0**-20), dict(spread=10)], ids=["loss", "diagonal"])
def test_a_relu_network_with_dead_coordinates(change, dtype):
    assert same([cnn(**change, dtype=dtype, weight_decay=0.1)], [cnn(dtype=dtype, weight_decay=0.1)])


def test_epsilon_carried_along_restores_equality():
    factor = 2.0**-20
    assert same([cnn(factor=factor, eps=1e-8 * factor)], [cnn(eps=1e-8)])


def test_dead_coordinates_break_torch_at_zero_epsilon():
    p = torch.nn.Parameter(torch.ones(2))
    for optimizer, dead in ((torch.optim.Adam([p], lr=0.01, eps=0), True), (ScaledSGD([p], lr=0.01), False)):
        with torch.no_grad():
            p.fill_(1)
        p.grad = torch.tensor([1.0, 0.0])
        optimizer.step()
        assert bool(p.isnan()[1]) == dead and (dead or p[1] == 1)


# --- the same checks go red -----------------------------------------------------------------------------

def test_epsilon_is_seen():
    assert not same([cnn(factor=2.0**-20, eps=1e-8)], [cnn(eps=1e-8)])


def test_underflow_is_seen():
    assert not same([cnn(factor=2.0**-60)], [cnn()])


@each_dtype
def test_a_factor_that_is_no_power_of_two_is_seen(dtype):
    assert not same(trajectory(OPTIMIZERS["adam"], network_problem(dtype), LossScale(3.0), STEPS), plain("adam", dtype))


@pytest.mark.parametrize("optimizer", [
    partial(torch.optim.SGD, lr=0.1), partial(torch.optim.SGD, lr=0.1, momentum=0.9),
    partial(torch.optim.Adam, lr=0.01, eps=0, weight_decay=0.1), partial(torch.optim.Adam, lr=0.01, eps=1e-8),
], ids=["sgd", "momentum", "L2", "epsilon"])
@pytest.mark.parametrize("change", [LossScale(2.0**-20), DiagonalGradient()], ids=["loss", "diagonal"])
def test_other_optimizers_break(optimizer, change):
    assert certify(optimizer, change, network_problem()).verdict == "broken"


def test_sign_and_rotation():
    problem = network_problem()
    assert certify(OPTIMIZERS["adam"], Sign(), problem).verdict == "bit-exact"
    assert certify(OPTIMIZERS["adam"], Rotation(), problem).verdict == "broken"
    assert certify(OPTIMIZERS["adam"], LossScale(-1.0), problem).verdict == "broken"


@pytest.mark.parametrize("exponent", [-6, 6])
def test_the_residual_predicts_the_first_step(exponent):
    value, factor, problem = 1e-4, 2.0**exponent, network_problem()
    start = [p.clone().requires_grad_() for p in problem.start]
    gradient = torch.autograd.grad(problem.loss(start, 0), start)
    adam = partial(torch.optim.Adam, lr=0.01, eps=value)
    before, after = (trajectory(adam, problem, t, 1)[0] for t in (Transformation(), LossScale(factor)))
    for x, p, r, d in zip(problem.start, before, after, gradient, strict=True):
        relative = value / d.abs()
        assert torch.allclose((r - x) / (p - x), factor * (1 + relative) / (factor + relative), rtol=1e-6)
