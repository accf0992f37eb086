"""Rows 5, 6 and 7 of what must hold: the size of α, no scaling at all, and the explicitly rescaled network.

Rounding bounds are measured, as in `pslib.invariance.certify`: 64 times the drift of a control run that is disturbed
by one machine epsilon at every step. Where no bound is needed, the comparison is `torch.equal`.
"""

import math

import pytest
import sympy as sp
import torch
from torch.nn.utils import parameters_to_vector

from pslib import PSDASGD, PSSPS, ScaledSGD, rescaled, scalings, tasks
from pslib.estimators import DAdaptation
from pslib.invariance import TensorUnits, Transformation, certify, network_problem, trajectory
from pslib.invariance import relative_gap as gap
from pslib.optimizers import ParameterScaled
from pslib.rescaled import RescaledNetwork, side_by_side
from pslib.scalings import Multiplied, PowerOfTwo
from pslib.training import train

STEPS = 200
ADAPTIVE = ["rmsprop", "adam", "amsgrad", "adagrad"]
RATES = {"adagrad": 2.0**-5}
DTYPES = [torch.float32, torch.float64]
INF = math.inf
CASES = {
    "ps-sps": dict(method="polyak"),
    "psdasgd-model": dict(method="d-adaptation", per="model", d0=1e-3),
    "psdasgd-tensor": dict(method="d-adaptation", per="tensor"),
}


def fixed(name):
    return dict(lr=RATES.get(name, 2.0**-9))


# --- the identity, symbolically ---------------------------------------------------------------------

def test_the_identity_holds_for_an_arbitrary_function():
    a = sp.symbols("a1:4", positive=True)
    x, xs = sp.symbols("x1:4"), sp.symbols("xs1:4")
    eta, f = sp.symbols("eta"), sp.Function("f")
    back = {s: ai * xi for s, ai, xi in zip(xs, a, x, strict=True)}
    scaled = f(*[s / ai for s, ai in zip(xs, a, strict=True)])
    for i in range(3):
        g, g_scaled = sp.diff(f(*x), x[i]), sp.diff(scaled, xs[i]).subs(back).doit()
        assert sp.simplify(g_scaled - g / a[i]) == 0
        assert sp.simplify((a[i] * x[i] - eta * g_scaled) / a[i] - (x[i] - eta * g / a[i] ** 2)) == 0
        assert sp.simplify((a[i] * x[i] - eta * g_scaled) / a[i] - (x[i] - eta * g / a[i])) != 0  # one α is not enough


# --- row 7: the explicitly rescaled network -----------------------------------------------------------

@pytest.mark.parametrize("task, name", [("mnist1d-cnn", "adam"), *(("digits-mlp", name) for name in ADAPTIVE)])
def test_row_7_the_four_optimizers_within_the_rounding_bound(name, task):
    run = side_by_side(name, task=task, steps=STEPS, **fixed(name))
    assert run.within and len(run.gaps) == STEPS
    assert run.bounds[-1] < 1e-9  # the bound says something
    assert run.losses[-20:].mean() < run.losses[0] - 0.5  # and something was trained


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("task, name", [("mnist1d-cnn", "adam"), *(("digits-mlp", name) for name in ["none", *ADAPTIVE])])
def test_row_7_the_four_optimizers_bit_for_bit(name, task, dtype):
    lr = 2.0**-5 if name == "none" else fixed(name)["lr"]
    assert side_by_side(PowerOfTwo(name), task=task, steps=STEPS, dtype=dtype, lr=lr, control=False).identical


@pytest.mark.parametrize("name", ADAPTIVE)
def test_row_7_with_momentum(name):
    assert side_by_side(name, steps=STEPS, betas=(0.9, 0.98), **fixed(name)).within


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("name", ADAPTIVE)
def test_row_7_learning_rate_free_within_the_rounding_bound(case, name):
    run = side_by_side(name, steps=STEPS, betas=(0.9, 0.98), **CASES[case])
    assert run.within and run.bounds[-1] < 1e-6
    if len(run.distances):
        ours, theirs = run.distances.T
        assert torch.allclose(ours, theirs, rtol=max(1e-9, run.bounds[-1].item()), atol=0)
        assert ours[-1] > ours[0]  # the estimate was learned


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("name", ADAPTIVE)
def test_row_7_learning_rate_free_bit_for_bit(case, name, dtype):
    run = side_by_side(PowerOfTwo(name), steps=STEPS, dtype=dtype, betas=(0.9, 0.98), control=False, **CASES[case])
    assert run.identical
    assert torch.equal(run.distances[:, 0], run.distances[:, 1])


@pytest.mark.parametrize("case", ["ps-sps", "psdasgd-tensor"])
def test_row_7_on_a_convolutional_network(case):
    run = side_by_side(PowerOfTwo("adam"), task="mnist1d-cnn", steps=STEPS, betas=(0.9, 0.98), control=False, **CASES[case])
    assert run.identical


def test_without_powers_of_two_it_is_not_bit_for_bit():
    assert not side_by_side("adam", steps=5, control=False).identical


@pytest.mark.parametrize("kind", [rescaled._PlainSGD, rescaled._MomentumSGD])
def test_a_buffer_left_behind_is_seen(monkeypatch, kind):
    monkeypatch.setattr(kind, "carried", [])
    case = fixed("adam") if kind is rescaled._MomentumSGD else CASES["ps-sps"]
    assert not side_by_side("adam", steps=20, betas=(0.9, 0.98), **case).within


@pytest.mark.parametrize("wrong", [lambda a: a.sqrt(), lambda a: a * a, torch.ones_like])
def test_a_wrong_scaling_is_seen(monkeypatch, wrong):
    right = RescaledNetwork.move
    monkeypatch.setattr(RescaledNetwork, "move", lambda self, alpha_sq, carried=(): right(self, [wrong(a) for a in alpha_sq], carried))
    assert not side_by_side("adam", steps=5).within


def test_the_rescaled_network_is_the_same_function_with_the_gradient_divided_by_alpha():
    task = tasks.get("digits-mlp")
    data = task.load()
    torch.manual_seed(0)
    model = task.build(data).double()
    batch = data.x_train[:50].double(), data.y_train[:50]
    net = RescaledNetwork(model, task.loss)
    loss = net.backward(*batch)
    plain = [p.grad.clone() for p in net.scaled]
    net.move([torch.exp2(torch.randint(-6, 7, p.shape) * 2.0).to(p) for p in net.scaled])
    carried = [p.grad.clone() for p in net.scaled]
    assert torch.equal(net.backward(*batch), loss)
    for p, scaled, alpha, g, c, x in zip(model.parameters(), net.scaled, net.alpha, plain, carried, net.original(), strict=True):
        assert torch.equal(x, p) and torch.equal(scaled, alpha * p)
        assert torch.equal(scaled.grad, g / alpha) and torch.equal(scaled.grad, c)
    assert sum((a != 1).sum() for a in net.alpha) > 0


def test_a_dead_coordinate_keeps_its_scale_and_its_value():
    net = RescaledNetwork(torch.nn.Linear(2, 1, bias=False), lambda out, target: (out - target).square().mean())
    before = net.original()[0].clone()
    inputs, targets = torch.tensor([[1.0, 0.0]]), torch.ones(1, 1)
    net.backward(inputs, targets)
    net.move([g.abs() for g in net.original_gradient()])
    assert net.alpha[0][0, 1] == 1 and net.alpha[0][0, 0] != 1
    assert net.original()[0][0, 1] == before[0, 1]


def test_unknown_names_are_refused():
    with pytest.raises(ValueError, match="no method"):
        side_by_side("adam", method="newton")
    with pytest.raises(ValueError, match="unknown scaling"):
        side_by_side("newton")


# --- row 5: the size of α -----------------------------------------------------------------------------

def powers_of_four(k):
    return 4.0 ** ((7 * k) % 11 - 5)


def final(make, dtype, task="digits-mlp"):
    model = train(task, make, steps=STEPS, evaluations=1, dtype=dtype, device="cpu").model
    return parameters_to_vector(model.parameters()).detach()


FREE = {
    "ps-sps": lambda p, s: PSSPS(p, scaling=s),
    "psdasgd-model": lambda p, s: PSDASGD(p, scaling=s, per="model", d0=1e-3),
    "psdasgd-tensor": lambda p, s: PSDASGD(p, scaling=s),
}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("inner", ["adam", "adagrad"])
@pytest.mark.parametrize("name", FREE)
def test_row_5_the_size_of_alpha_does_not_matter(name, inner, dtype):
    make = FREE[name]
    once, changing = (final(lambda p: make(p, Multiplied(inner, f)), dtype) for f in (lambda k: 1.0, powers_of_four))  # noqa: B023
    assert torch.equal(once, changing)


@pytest.mark.parametrize("name", FREE)
def test_row_5_for_any_factor_up_to_rounding(name):
    make = FREE[name]
    x = final(lambda p: make(p, "adam"), torch.float64)
    y = final(lambda p: make(p, Multiplied("adam", lambda k: 3.0 ** ((7 * k) % 11 - 5))), torch.float64)
    assert not torch.equal(x, y)
    assert (x - y).norm() < 1e-7 * x.norm()


def test_row_5_a_fixed_learning_rate_does_notice():
    x = final(lambda p: ScaledSGD(p, 2.0**-9), torch.float64)
    y = final(lambda p: ScaledSGD(p, 2.0**-9, scaling=Multiplied("adam", powers_of_four)), torch.float64)
    assert (x - y).norm() > 0.01 * x.norm()


# --- row 6: α ≡ 1 -------------------------------------------------------------------------------------

def network_run(rule, task="digits-mlp", nudge=0.0):
    """Steepest descent in a real network, float64, the step from `rule(loss, g, x)`; the parameters after every step."""
    task = tasks.get(task)
    model = rescaled._fresh(task, 0, torch.float64)
    noise, path = torch.Generator().manual_seed(1), []
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(1 + nudge * (2 * torch.rand(p.shape, generator=noise, dtype=p.dtype) - 1))
    for inputs, targets in rescaled._batches(task, STEPS, 0, torch.float64):
        model.zero_grad()
        loss = task.loss(model(inputs), targets)
        loss.backward()
        rule(model, loss.detach())
        with torch.no_grad():
            for p in model.parameters():
                p.mul_(1 + nudge * (2 * torch.rand(p.shape, generator=noise, dtype=p.dtype) - 1))
        path.append([p.detach().clone() for p in model.parameters()])
    return path


def by_optimizer(make):
    """A rule that lets an optimizer take the step."""
    held = []

    def rule(model, loss):
        if not held:
            held.append(make(model.parameters()))
        held[0].step(loss=loss) if type(held[0]).__name__ in ("PSSPS", "Momo") else held[0].step()

    return rule


def by_rate(rate):
    """A rule that steps by −η g with η = rate(loss, g, x), all of them flat."""

    def rule(model, loss):
        with torch.no_grad():
            g = parameters_to_vector([p.grad for p in model.parameters()])
            eta = rate(loss, g, parameters_to_vector(model.parameters()))
            for p in model.parameters():
                p -= eta * p.grad

    return rule


def sps_rate(c):
    return lambda loss, g, x: loss / (c * g.dot(g))


class DAdaptRate:
    """D-Adapt SGD with a running root mean square G, D a length."""

    def __init__(self, d0, beta2):
        self.d0, self.beta2, self.beta3, self.k, self.v, self.n, self.s = d0, beta2, math.sqrt(beta2), 0, 0.0, 0.0, 0.0

    def __call__(self, loss, g, x):
        if self.k == 0:
            self.x0, self.distance = x.clone(), self.d0 * math.sqrt(len(x))
        self.k += 1
        self.v = self.beta2 * self.v + (1 - self.beta2) * g.dot(g)
        eta = self.distance / math.sqrt(self.v / (1 - self.beta2**self.k))
        self.n = self.beta3 * self.n + (1 - self.beta3) * eta * g.dot(self.x0 - x)
        self.s = self.beta3 * self.s + (1 - self.beta3) * eta * g
        self.distance = max(self.distance, (self.n / self.s.norm()).item())
        return eta


def assert_same(rule, other, control):
    """Compare two paths, after every step, with the bound that the disturbed `control` gives."""
    x, y, z = network_run(rule()), network_run(other()), network_run(control(), nudge=torch.finfo(torch.float64).eps)
    assert all(torch.isfinite(p).all() for p in x[-1])
    bound = torch.finfo(torch.float64).eps
    for a, b, c in zip(x, y, z, strict=True):
        bound = max(bound, gap(a, c))
        assert gap(a, b) <= 64 * bound
    assert 64 * bound < 1e-4


def plain_sps(c=1.0):
    return lambda: by_optimizer(lambda p: PSSPS(p, c=c, betas=(0.0, 0.98), d0=INF, growth_rate=INF, scaling="none"))


def plain_d_adapt(d0=1e-3):
    return lambda: by_optimizer(lambda p: PSDASGD(p, d0=d0, per="model", betas=(0.0, 0.98), scaling="none"))


def test_row_6_ps_sps_without_scaling_is_sps():
    assert_same(plain_sps(), lambda: by_rate(sps_rate(1.0)), plain_sps())


def test_row_6_ps_sps_without_scaling_is_momo_without_momentum():
    momo = pytest.importorskip("momo")
    assert_same(plain_sps(), lambda: by_optimizer(lambda p: momo.Momo(p, lr=INF, beta=0.0, lb=0.0)), plain_sps())


def test_row_6_ps_da_sgd_without_scaling_is_d_adapt_sgd_with_a_running_g():
    assert_same(plain_d_adapt(), lambda: by_rate(DAdaptRate(1e-3, 0.98)), plain_d_adapt())


@pytest.mark.parametrize("mine, other", [
    (plain_sps(), lambda: by_rate(sps_rate(1.01))),
    (plain_d_adapt(), lambda: by_rate(DAdaptRate(1.01e-3, 0.98))),
    (plain_d_adapt(), lambda: by_rate(DAdaptRate(1e-3, 0.981))),
])
def test_row_6_another_constant_is_seen(mine, other):
    with pytest.raises(AssertionError):
        assert_same(mine, other, mine)


class Doubled(DAdaptation):
    """The package's estimate is twice the lower bound (its `d_hat = 2 * …`)."""

    def learn(self, blocks, delta, weight, a_sq):
        return torch.maximum(delta, 2 * super().learn(blocks, torch.zeros_like(delta), weight, a_sq))


def d_adapt_package(mine, norms):
    """Our D-Adapt SGD and the package's on linear losses ⟨g_k, x⟩; both paths and both final distances, as lengths.

    With gradients of one norm a running G is the package's ‖g₀‖; with β₂ → 1 our averages become its sums up to a
    factor that cancels. The gradients do not depend on x, so nothing amplifies the remaining difference.
    """
    package = pytest.importorskip("dadaptation")
    n, d0, generator = 20, 1e-3, torch.Generator().manual_seed(0)
    drift = torch.randn(n, generator=generator, dtype=torch.float64)
    grads = [torch.randn(n, generator=generator, dtype=torch.float64) + 0.5 * drift for _ in norms]
    grads = [r * g / g.norm() for g, r in zip(grads, norms, strict=True)]
    start = torch.randn(n, generator=generator, dtype=torch.float64)
    paths, distances = [], []
    for make in (mine, lambda p, d0: package.DAdaptSGD(p, lr=1.0, d0=d0 * math.sqrt(n))):
        x = torch.nn.Parameter(start.clone())
        opt = make([x], d0)
        path = []
        for g in grads:
            x.grad = g.clone()
            opt.step()
            path.append(x.detach().clone())
        paths.append(torch.stack(path))
        state = opt.state[x].get("distance")
        distances.append(opt.param_groups[0]["d"] if state is None else state.item() * math.sqrt(n))
    return paths, distances


class DoubledSGD(ParameterScaled):
    """PSDASGD(scaling="none", per="model") with the doubled estimate and sums for averages."""

    def __init__(self, params, d0):
        defaults = dict(lr=1.0, betas=(0.0, 1 - 2.0**-24), eps=0.0, weight_decay=0.0)
        super().__init__(params, defaults, scaling="none", estimator=Doubled(d0, INF, False), per="model")


def test_row_6_the_package_d_adapt_sgd_where_the_definitions_coincide():
    (x, y), (d, e) = d_adapt_package(DoubledSGD, [1.0] * STEPS)
    scale = (y - y[0]).norm(dim=1).max()
    assert e > 2e-3 * math.sqrt(20)  # the distance has grown
    assert abs(d - e) < 1e-3 * e
    assert (x - y).norm(dim=1).max() < 1e-3 * scale


@pytest.mark.parametrize("mine, norms", [
    (DoubledSGD, [1.0 + 0.5 * math.sin(k) for k in range(STEPS)]),  # gradients of different norms: another G
    (lambda p, d0: PSDASGD(p, d0=d0, per="model", scaling="none", betas=(0.0, 1 - 2.0**-24)), [1.0] * STEPS),  # no factor 2
    (lambda p, d0: PSDASGD(p, d0=d0, per="model", scaling="none", betas=(0.0, 0.98)), [1.0] * STEPS),  # averages, not sums
], ids=["norms", "factor", "averages"])
def test_row_6_and_where_they_do_not(mine, norms):
    _, (d, e) = d_adapt_package(mine, norms)
    assert abs(d - e) > 1e-2 * e


# --- ScaledSGD against torch --------------------------------------------------------------------------

B2, EPS, LR, DECAY = 0.98, 1e-8, 2.0**-7, 0.1
TORCH = {
    "sgd": (dict(scaling="none", betas=(0.0, B2)), lambda p: torch.optim.SGD(p, lr=LR)),
    "rmsprop": (dict(scaling="rmsprop", betas=(0.0, B2)), lambda p: torch.optim.RMSprop(p, lr=LR, alpha=B2, eps=EPS)),
    "adam": (dict(scaling="adam", betas=(0.9, B2)), lambda p: torch.optim.Adam(p, lr=LR, betas=(0.9, B2), eps=EPS)),
    "amsgrad": (dict(scaling="amsgrad", betas=(0.9, B2)), lambda p: torch.optim.Adam(p, lr=LR, betas=(0.9, B2), eps=EPS, amsgrad=True)),
    "adagrad": (dict(scaling="adagrad", betas=(0.0, B2)), lambda p: torch.optim.Adagrad(p, lr=LR, eps=EPS)),
    "adamw": (
        dict(scaling="adam", betas=(0.9, B2), weight_decay=DECAY),
        lambda p: torch.optim.AdamW(p, lr=LR, betas=(0.9, B2), eps=EPS, weight_decay=DECAY),
    ),
}


def scheduled(make):
    """The same optimizer under a scheduler that takes its learning rate down and up again."""

    def built(params):
        opt = make(params)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(opt, 60)
        opt.register_step_post_hook(lambda *_: schedule.step())
        return opt

    return built


def assert_follows(ours, theirs, steps=STEPS):
    problem = network_problem()
    identity, eps = Transformation(), torch.finfo(torch.float64).eps
    x, y = (trajectory(scheduled(m), problem, identity, steps) for m in (ours, theirs))
    control = trajectory(scheduled(theirs), problem, identity, steps, nudge=eps)
    bound = eps
    for a, b, c in zip(x, y, control, strict=True):
        bound = max(bound, gap(b, c))
        assert gap(b, a) <= 64 * bound
    assert 64 * bound < 1e-7


@pytest.mark.parametrize("name", TORCH)
def test_scaled_sgd_is_torchs_optimizer(name):
    settings, theirs = TORCH[name]
    assert_follows(lambda p: ScaledSGD(p, LR, eps=EPS, **settings), theirs)


@pytest.mark.parametrize("name, change", [
    ("sgd", dict(scaling="adam")), ("rmsprop", dict(scaling="adam")), ("adam", dict(betas=(0.9, 0.981))), ("adam", dict(eps=1e-5)),
    ("amsgrad", dict(scaling="adam")), ("adagrad", dict(scaling="adam")), ("adamw", dict(weight_decay=0.0)),
])
def test_another_optimizer_is_seen(name, change):
    settings, theirs = TORCH[name]
    with pytest.raises(AssertionError):
        assert_follows(lambda p: ScaledSGD(p, LR, **{"eps": EPS, **settings, **change}), theirs)


@pytest.mark.parametrize("make", [lambda p: ScaledSGD(p, 0.1), PSDASGD])
def test_step_hooks_run_once_even_after_the_base_class_was_used(make):
    ParameterScaled([torch.nn.Parameter(torch.ones(2))], dict(lr=1.0, betas=(0.0, 0.9), eps=0.0, weight_decay=0.0),
                    scaling="none", estimator=DAdaptation(0.1, INF, True), per="tensor")
    x, calls = torch.nn.Parameter(torch.ones(2)), []
    opt = make([x])
    opt.register_step_post_hook(lambda *_: calls.append(1))
    x.grad = torch.ones(2)
    opt.step()
    assert len(calls) == 1


def test_a_learning_rate_relative_to_each_tensor_has_no_units():
    def relative(params):
        return ScaledSGD([{"params": [p], "lr": 2.0**-6 * p.detach().square().mean().sqrt().item()} for p in params], 1.0)

    assert certify(relative, TensorUnits(), network_problem()).verdict == "bit-exact"
    assert certify(lambda p: ScaledSGD(p, 2.0**-6), TensorUnits(), network_problem()).verdict == "broken"


def test_a_scaling_that_may_shrink_can_go_the_wrong_way():
    ends = {}
    for name in ("adam", "amsgrad"):
        x = torch.nn.Parameter(torch.zeros(1, dtype=torch.float64))
        opt = ScaledSGD([x], 0.5, betas=(0.0, 0.1), scaling=scalings.get(name))
        for k in range(1, 3001):
            opt.param_groups[0]["lr"] = 0.5 / k**0.5
            x.grad = torch.full_like(x, 3.0 if k % 3 == 1 else -1.0)
            opt.step()
            x.data.clamp_(-1, 1)
        ends[name] = x.item()
    assert ends["adam"] > 0.9 and ends["amsgrad"] < -0.9
