"""Polyak's step and PS-SPS: the theorems, the invariances bit for bit, and what happens at the edges."""

import copy
import io
import math
import warnings

import pytest
import sympy as sp
import torch
from torch import nn
from torch.func import functional_call

from pslib import PSSPS, scalings, tasks
from pslib.invariance import (
    CoordinateUnits,
    LossScale,
    Problem,
    TensorUnits,
    Transformation,
    UniformUnits,
    certify,
    trajectory,
)
from pslib.training import train

INF = math.inf
DTYPES = [torch.float32, torch.float64]


def polyak(params, *, c=1.0, scaling="none", f_star=0.0, betas=(0.0, 0.98)):
    """The bare step of the theorems: no momentum, no bound."""
    return PSSPS(params, c=c, scaling=scaling, f_star=f_star, betas=betas, d0=INF, growth_rate=INF)


def bits(state):
    """A deep copy of a nested state, tensors cloned."""
    return copy.deepcopy(state)


def same(a, b) -> bool:
    """Whether two nested states are equal bit for bit (nan equal to nan)."""
    if isinstance(a, torch.Tensor):
        return a.dtype == b.dtype and a.shape == b.shape and torch.equal(torch.nan_to_num(a, 12345.0), torch.nan_to_num(b, 12345.0))
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[k], b[k]) for k in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(same(x, y) for x, y in zip(a, b, strict=True))
    return a == b


def network(name: str, dtype=torch.float64, seed=0) -> Problem:
    """A task of the book as a problem of the invariance kit: the task's network, batches and loss."""
    task = tasks.get(name)
    data = task.load()
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = task.build(data).to(dtype)
    names = [n for n, _ in model.named_parameters()]
    x, y = data.x_train.to(dtype), data.y_train
    generator = torch.Generator().manual_seed(seed)
    batches = [torch.randperm(len(x), generator=generator)[: task.batch_size] for _ in range(64)]

    def loss(params, step):
        now = batches[step % len(batches)]
        return task.loss(functional_call(model, dict(zip(names, params, strict=True)), (x[now],)), y[now])

    return Problem([p.detach().clone() for p in model.parameters()], loss)


def moves(problem, path) -> bool:
    """Whether every tensor has moved and is finite: an invariance of an optimizer that stands still proves nothing."""
    return all(torch.isfinite(p).all() and not torch.equal(p, s) for p, s in zip(path[-1], problem.start, strict=True))


# --- theorems -----------------------------------------------------------------------------------------

def test_the_step_minimises_the_bound_and_guarantees_the_decrease():
    eta, gap, g_sq, distance_sq = sp.symbols("eta gap g_sq distance_sq", positive=True)
    bound = distance_sq - 2 * eta * gap + eta**2 * g_sq
    [best] = sp.solve(sp.diff(bound, eta), eta)
    assert sp.simplify(best - gap / g_sq) == 0 and sp.diff(bound, eta, 2) == 2 * g_sq
    assert sp.simplify(distance_sq - bound.subs(eta, best) - gap**2 / g_sq) == 0


def test_the_constant_guarantees_a_decrease_exactly_from_one_half_on():
    c, gap, g_sq = sp.symbols("c gap g_sq", positive=True)
    eta = gap / (c * g_sq)
    decrease = 2 * eta * gap - eta**2 * g_sq
    assert sp.simplify(decrease - (2 * c - 1) / c**2 * gap**2 / g_sq) == 0
    assert sp.solve(decrease > 0, c) == (sp.Rational(1, 2) < c)
    [best] = sp.solve(sp.diff((2 * c - 1) / c**2, c), c)
    assert best == 1


def test_in_one_dimension_the_step_is_newtons_method_for_a_root():
    x, f_star = sp.symbols("x f_star", real=True)
    f = sp.Function("f")(x)
    polyak_step = x - (f - f_star) / sp.diff(f, x) ** 2 * sp.diff(f, x)
    assert sp.simplify(polyak_step - (x - (f - f_star) / sp.diff(f - f_star, x))) == 0


def units_of(expression, changes):
    """The factor by which an expression changes; a symbol's absence means that it has no units."""
    changed = expression.subs(changes, simultaneous=True)
    return sp.simplify(changed / expression)


def test_units_of_the_step():
    f, f_star, g, v, c, kappa, u = sp.symbols("f f_star g v c kappa u", positive=True)
    loss = {f: kappa * f, f_star: kappa * f_star, g: kappa * g, v: kappa**2 * v}
    units = {g: u * g, v: u**2 * v}  # x = u·x̃, so g̃ = u·g
    plain = (f - f_star) / (c * g**2)
    scaled = (f - f_star) / (c * g**2 / sp.sqrt(v))
    assert units_of(plain, loss) == 1 / kappa and units_of(plain, units) == u**-2
    assert units_of(scaled, loss) == 1 and units_of(scaled, units) == 1 / u
    for eta, alpha_sq in ((plain, sp.Integer(1)), (scaled, sp.sqrt(v))):
        step = eta * g / alpha_sq
        assert units_of(step, loss) == 1 and units_of(step, units) == 1 / u
    assert units_of(plain, {f: kappa * f, g: kappa * g}) != 1 / kappa  # f* left behind


def convex_problem(seed=0, n=6, pieces=9):
    """f(x) = max over rows of a·(x − x*), with a row average of 0: convex, not smooth, minimum 0 at x*."""
    generator = torch.Generator().manual_seed(seed)
    a = torch.randn(pieces, n, generator=generator, dtype=torch.float64) * torch.logspace(-1, 1, n, dtype=torch.float64)
    a -= a.mean(0)
    target = torch.randn(n, generator=generator, dtype=torch.float64)
    return lambda x: (a @ (x - target)).max(), target


def distances(make, f, target, alpha_sq=None, steps=60):
    """After each step (α-weighted distance², its bound from the theorem) for the optimizer's own frozen α²."""
    x = nn.Parameter(torch.zeros_like(target))
    opt = make([x])
    rows = []
    for _ in range(steps):
        opt.zero_grad()
        loss = f(x)
        loss.backward()
        before, g = x.detach().clone(), x.grad.clone()
        opt.step(loss=loss.detach())
        a = opt.state[x]["alpha_sq"] if alpha_sq is None else alpha_sq
        def norm_sq(d, a=a):
            return (a * d * d).sum().item()
        rows.append((norm_sq(x.detach() - target), norm_sq(before - target), loss.item() ** 2 / (g * g / a).sum().item()))
    return rows


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("c", [0.5, 0.75, 1.0, 2.0])
@pytest.mark.parametrize("scaling", ["none", "frozen"])
def test_the_distance_shrinks_as_proved(c, scaling, seed):
    f, target = convex_problem(seed)
    chosen = scalings.Adam(refresh=10**6) if scaling == "frozen" else "none"
    for after, before, progress in distances(lambda p: polyak(p, c=c, scaling=chosen), f, target):
        assert after <= before - (2 * c - 1) / c**2 * progress + 1e-12 * before


def test_the_theorem_is_about_c_from_one_half_and_about_the_right_norm():
    f, target = convex_problem()
    def broken(rows, c):
        return any(after > before - (2 * c - 1) / c**2 * progress + 1e-9 * before for after, before, progress in rows)
    assert any(after > before * 1.01 for after, before, _ in distances(lambda p: polyak(p, c=0.2), f, target))
    frozen = lambda p: polyak(p, scaling=scalings.Adam(refresh=10**6))  # noqa: E731
    assert not broken(distances(frozen, f, target), 1.0)
    assert broken(distances(frozen, f, target, alpha_sq=torch.ones(6, dtype=torch.float64)), 1.0)


def least_squares(noise=0.0, seed=0, samples=40, n=8):
    """Samples a_i·x = b_i with a known solution (or, with noise, none)."""
    generator = torch.Generator().manual_seed(seed)
    a = torch.randn(samples, n, generator=generator, dtype=torch.float64)
    solution = torch.randn(n, generator=generator, dtype=torch.float64)
    b = a @ solution + noise * torch.randn(samples, generator=generator, dtype=torch.float64)
    return a, b, solution


def stochastic_run(a, b, make, steps, seed=0):
    """One sample a step; the losses seen and the final point."""
    x = nn.Parameter(torch.zeros(a.shape[1], dtype=a.dtype))
    opt = make([x])
    losses, generator = [], torch.Generator().manual_seed(seed)
    for i in torch.randint(len(a), (steps,), generator=generator).tolist():
        opt.zero_grad()
        loss = (a[i] @ x - b[i]).square() / 2
        loss.backward()
        opt.step(loss=loss.detach())
        losses.append(loss.item())
    return losses, x.detach(), opt


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("c", [0.75, 1.0, 2.0])
def test_interpolating_least_squares_meets_its_bound(c, seed):
    a, b, solution = least_squares(seed=seed)
    smoothness = a.square().sum(1).max().item()
    losses, x, _ = stochastic_run(a, b, lambda p: polyak(p, c=c), 400, seed)
    bound = 2 * smoothness * c**2 / (2 * c - 1) * solution.square().sum().item()
    assert all(sum(losses[:k]) <= bound for k in range(1, 401))
    assert (x - solution).norm() < 1e-2 * solution.norm()


def test_without_interpolation_the_same_run_does_not_converge():
    a, b, _ = least_squares(noise=1.0)
    solution = torch.linalg.lstsq(a, b[:, None]).solution[:, 0]
    _, x, _ = stochastic_run(a, b, lambda p: polyak(p, c=1.0), 400)
    assert (x - solution).norm() > 1e-2 * solution.norm()


def test_with_half_the_step_is_kaczmarzs_projection():
    a, b, _ = least_squares()
    x = nn.Parameter(torch.zeros(8, dtype=torch.float64))
    opt = polyak([x], c=0.5)
    for i in range(40):
        opt.zero_grad()
        before = x.detach().clone()
        loss = (a[i] @ x - b[i]).square() / 2
        loss.backward()
        opt.step(loss=loss.detach())
        projected = before - (a[i] @ before - b[i]) / a[i].square().sum() * a[i]
        assert torch.allclose(x.detach(), projected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("scaling", ["none", "adam"])
def test_the_bounded_step_with_momentum_solves_least_squares_too(scaling):
    a, b, solution = least_squares()
    _, x, _ = stochastic_run(a, b, lambda p: PSSPS(p, c=1.0, scaling=scaling), 1500)
    assert (x - solution).norm() < 1e-3 * solution.norm()


def test_a_floor_that_is_too_high_stalls_and_one_too_low_never_settles():
    def last(f_star):
        x = nn.Parameter(torch.tensor([3.0], dtype=torch.float64))
        opt, path = polyak([x], f_star=f_star), []
        for _ in range(300):
            opt.zero_grad()
            loss = x.square().sum() / 2
            loss.backward()
            opt.step(loss=loss.detach())
            path.append(loss.item())
        return path[-100:]
    assert max(last(0.0)) < 1e-20
    assert min(last(0.5)) > 0.4999 and max(last(0.5)) < 0.5001
    assert max(last(-0.5)) > 1.0


# --- invariances, bit for bit ---------------------------------------------------------------------------

CASES = [("digits-mlp", 200), ("mnist1d-cnn", 200)]


@pytest.mark.parametrize("name, steps", CASES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_loss_scale_uniform_units_and_factors_of_alpha_change_nothing(name, steps, dtype):
    problem = network(name, dtype)
    original = trajectory(PSSPS, problem, Transformation(), steps)
    assert moves(problem, original)
    reference = trajectory(lambda p: PSSPS(p, fused=False), problem, Transformation(), steps)
    changes = (LossScale(2.0**-9), LossScale(2.0**6), UniformUnits(2.0**5), UniformUnits(2.0**-4))
    others = [trajectory(PSSPS, problem, t, steps) for t in changes]
    factor = lambda k: 2.0 ** ((k * k) % 11 - 5)  # noqa: E731
    multiplied = trajectory(lambda p: PSSPS(p, scaling=scalings.Multiplied("adam", factor)), problem, Transformation(), steps)
    for one, other in [*((original, o) for o in others), (reference, multiplied)]:
        assert all(torch.equal(p, q) for x, y in zip(one, other, strict=True) for p, q in zip(x, y, strict=True))


def test_other_changes_of_units_are_noticed():
    problem = network("digits-mlp")
    assert certify(PSSPS, TensorUnits(), problem, steps=20).verdict == "broken"
    assert certify(PSSPS, CoordinateUnits(), problem, steps=20).verdict == "broken"
    assert certify(lambda p: PSSPS(p, eps=1e-3), LossScale(), problem, steps=20).verdict == "broken"
    assert certify(lambda p: PSSPS(p, f_star=0.5), LossScale(), problem, steps=20).verdict == "broken"


@pytest.mark.parametrize("scaling", ["none", "rmsprop", "adam", "amsgrad", "adagrad", "power of two"])
def test_every_scaling_keeps_loss_scale_and_uniform_units(scaling):
    chosen = (lambda: scalings.PowerOfTwo("adam")) if scaling == "power of two" else lambda: scaling
    problem = network("digits-mlp")
    for t in (LossScale(2.0**-8), UniformUnits(2.0**4)):
        certificate = certify(lambda p: PSSPS(p, scaling=chosen(), c=1.0), t, problem, steps=40)
        assert certificate.verdict == "bit-exact", str(certificate)


def test_a_floor_scaled_with_the_loss_changes_nothing():
    problem, k = network("digits-mlp"), 2.0**-6
    original = trajectory(lambda p: PSSPS(p, f_star=0.25), problem, Transformation(), 200)
    scaled = trajectory(lambda p: PSSPS(p, f_star=0.25 * k), problem, LossScale(k), 200)
    assert moves(problem, original)
    assert all(torch.equal(p, q) for x, y in zip(original, scaled, strict=True) for p, q in zip(x, y, strict=True))


def test_the_effective_learning_rate_has_the_stated_units():
    problem = network("digits-mlp")
    def last(scaling, t):
        made = []
        def make(params):
            made.append(PSSPS(params, scaling=scaling))
            return made[-1]
        trajectory(make, problem, t, 30)
        return made[-1].effective_lr.item(), made[-1].distance.item()
    for scaling, of_loss, of_units in (("none", 2.0**-3, 2.0**8), ("adam", 1.0, 2.0**4)):
        rate, distance = last(scaling, Transformation())
        assert last(scaling, LossScale(2.0**-3)) == (rate / of_loss, distance)
        assert last(scaling, UniformUnits(2.0**4)) == (rate / of_units, distance / 2.0**4)


def test_a_closure_and_a_loss_are_the_same_thing():
    problem = network("digits-mlp", torch.float32)
    by_closure = trajectory(PSSPS, problem, Transformation(), 60)
    params = [nn.Parameter(p.clone()) for p in problem.start]
    opt = PSSPS(params)
    for k in range(60):
        opt.zero_grad()
        loss = problem.loss(params, k)
        loss.backward()
        assert opt.step(loss=loss.detach()) is not None
        assert all(torch.equal(p, q) for p, q in zip(params, by_closure[k], strict=True))


# --- the bound ------------------------------------------------------------------------------------------

def run(opt, params, problem, steps, start=0, scheduler=None):
    for k in range(start, start + steps):
        opt.zero_grad()
        loss = problem.loss(params, k)
        loss.backward()
        opt.step(loss=loss.detach())
        if scheduler is not None:
            scheduler.step()
        yield loss


def rho(opt):
    a_sq = sum(s["alpha_sq"].sum(dtype=torch.float64) for s in opt.state.values())
    return (opt.effective_lr / a_sq).item()


@pytest.mark.parametrize("scaling", ["none", "adam"])
def test_the_first_step_and_the_growth_are_bounded(scaling):
    problem = network("mnist1d-cnn")
    growth, d0 = 1.03, 2.0**-7
    params = [nn.Parameter(p.clone()) for p in problem.start]
    opt = PSSPS(params, d0=d0, growth_rate=growth, scaling=scaling, fused=False)
    everything = lambda: torch.cat([p.detach().flatten() for p in params])  # noqa: E731
    start, last, at_bound = everything(), None, 0
    for k, _ in enumerate(run(opt, params, problem, 150)):
        if k == 0:
            allowed = d0 * start.square().mean().sqrt().item()
            assert opt.distance.item() <= allowed * (1 + 1e-12)
            step = everything() - start
            assert step.square().mean().sqrt().item() <= allowed * (1 + 1e-12)
        else:
            assert rho(opt) <= growth * last * (1 + 1e-12)
            at_bound += rho(opt) > growth * last * (1 - 1e-9)
        last = rho(opt)
    assert at_bound > 10  # the bound was at work, not merely true


def test_without_scaling_it_is_sps_with_its_authors_smoothed_bound():
    problem, c, growth = network("digits-mlp"), 0.2, 2 ** (1 / 30)
    settings = dict(scaling="none", betas=(0.0, 0.98), c=c, d0=1e-3, growth_rate=growth)
    ours = trajectory(lambda p: PSSPS(p, **settings), problem, Transformation(), 60)
    params, last = [p.clone().requires_grad_() for p in problem.start], None
    for k, expected in enumerate(ours):
        loss = problem.loss(params, k)
        grads = torch.autograd.grad(loss, params)
        g_sq = sum(g.square().sum() for g in grads)
        if last is None:  # η‖g‖/√n ≤ d0·rms(x₀)
            last = 1e-3 * sum(p.detach().square().sum() for p in params).sqrt() / g_sq.sqrt() / growth
        last = torch.minimum(loss.detach() / (c * g_sq), growth * last)
        with torch.no_grad():
            for p, g in zip(params, grads, strict=True):
                p -= last * g
        assert all(torch.allclose(p.detach(), e, rtol=1e-9, atol=1e-12) for p, e in zip(params, expected, strict=True))


def test_without_the_bound_the_growth_is_exceeded():
    problem = network("digits-mlp")
    params = [nn.Parameter(p.clone()) for p in problem.start]
    opt = PSSPS(params, growth_rate=INF, fused=False)
    rhos = [rho(opt) for _ in run(opt, params, problem, 3)]
    assert rhos[1] > 1.03 * rhos[0]


def two_tensors(dtype=torch.float64, **settings):
    params = [nn.Parameter(torch.tensor([1.0, -2.0, 0.5], dtype=dtype)), nn.Parameter(torch.tensor([[3.0], [1.0]], dtype=dtype))]
    return params, PSSPS(params, **settings)


def set_grads(params, *values):
    for p, v in zip(params, values, strict=True):
        p.grad = None if v is None else torch.full_like(p, v)


def test_one_zero_loss_does_not_pin_the_step():
    params, opt = two_tensors(fused=False)
    for _ in range(5):
        set_grads(params, 0.5, -0.25)
        opt.step(loss=1.0)
    bound = opt.state[params[0]]["polyak_bound"].clone()
    set_grads(params, 0.5, -0.25)
    opt.step(loss=0.0)
    assert opt.effective_lr.item() == 0 and torch.equal(opt.state[params[0]]["polyak_bound"], bound)
    set_grads(params, 0.5, -0.25)
    opt.step(loss=1.0)
    a_sq = sum(s["alpha_sq"].sum() for s in opt.state.values()).item()
    assert opt.effective_lr.item() == pytest.approx(bound.item() * a_sq, rel=1e-12)


def test_a_nearly_zero_loss_is_forgotten_at_the_growth_rate():
    params, opt = two_tensors(growth_rate=2.0)
    rates = []
    for loss in [1.0] * 5 + [2.0**-30] + [1.0] * 12:
        set_grads(params, 0.5, -0.25)
        opt.step(loss=loss)
        rates.append(opt.effective_lr.item())
    later = rates[5:]
    assert later[0] < 1e-5 * rates[4]
    for previous, now in zip(later, later[1:], strict=False):
        assert now == pytest.approx(2 * previous, rel=1e-6)


@pytest.mark.parametrize("loss", [0.25, -3.0, 0.5])
def test_a_loss_at_or_below_the_floor_gives_a_zero_step(loss):
    params, opt = two_tensors(f_star=0.5, betas=(0.0, 0.98))
    before = bits([p.detach() for p in params])
    set_grads(params, 0.5, -0.25)
    opt.step(loss=loss)
    assert opt.effective_lr.item() == 0 and same(before, [p.detach() for p in params])
    opt.step(loss=0.75)
    assert opt.effective_lr.item() > 0 and not same(before, [p.detach() for p in params])


# --- edges ----------------------------------------------------------------------------------------------

@pytest.mark.parametrize("settings, sentence", [
    ({"c": 0.0}, "c must be a finite number > 0"), ({"c": -1.0}, "c must be"), ({"c": INF}, "c must be"), ({"c": math.nan}, "c must be"),
    ({"c": "1"}, "c must be"), ({"f_star": INF}, "f_star must be a finite number"), ({"f_star": math.nan}, "f_star must be"),
    ({"f_star": None}, "f_star must be"), ({"d0": -1.0}, "d0 must be > 0"), ({"d0": 0.0}, "d0 must be > 0"),
    ({"d0": math.nan}, "d0 must be"),
    ({"growth_rate": 0.99}, "growth_rate must be ≥ 1"), ({"growth_rate": math.nan}, "growth_rate must be"),
    ({"betas": (1.0, 0.9)}, r"betas\[0\] must be in \[0, 1\)"), ({"betas": (0.9, -0.1)}, r"betas\[1\] must be in"),
    ({"lr": -1.0}, "lr must be a finite number ≥ 0"), ({"eps": INF}, "eps must be a finite number"),
    ({"weight_decay": -0.1}, "weight_decay must be a finite number"), ({"scaling": "adamm"}, "unknown scaling 'adamm'"),
])
def test_a_bad_setting_is_named(settings, sentence):
    with pytest.raises(ValueError, match=sentence):
        PSSPS([nn.Parameter(torch.ones(2))], **settings)


def test_a_step_without_a_loss_says_what_to_do():
    params, opt = two_tensors()
    set_grads(params, 1.0, 1.0)
    before = bits([p.detach() for p in params])
    for call in (opt.step, lambda: opt.step(lambda: None)):
        with pytest.raises(ValueError, match=r"PSSPS\.step needs the loss: call step\(loss=loss\)"):
            call()
    assert same(before, [p.detach() for p in params]) and not opt.state


def test_sparse_gradients_are_refused():
    table = nn.Embedding(5, 2, sparse=True)
    opt = PSSPS(table.parameters())
    loss = table(torch.tensor([1, 2])).sum()
    loss.backward()
    with pytest.raises(RuntimeError, match="does not support sparse gradients"):
        opt.step(loss=loss)


@pytest.mark.parametrize("loss, grad", [(math.nan, 0.5), (INF, 0.5), (-INF, 0.5), (1.0, math.nan), (1.0, INF)])
@pytest.mark.parametrize("warm", [0, 3])
def test_a_step_that_is_not_finite_changes_nothing_and_warns_once(loss, grad, warm):
    params, opt = two_tensors(fused=False)
    for _ in range(warm):
        set_grads(params, 0.5, -0.25)
        opt.step(loss=1.0)
    before = bits([[p.detach() for p in params], [dict(opt.state[p]) for p in params]])
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(3):
            set_grads(params, grad, -0.25)
            opt.step(loss=loss)
    assert same(before, [[p.detach() for p in params], [dict(opt.state[p]) for p in params]])
    assert [str(w.message).startswith("PSSPS: a gradient, its square or the loss is not finite") for w in caught] == [True]
    assert opt.skipped_steps == 3
    set_grads(params, 0.5, -0.25)
    opt.step(loss=1.0)
    assert not same(before[0], [p.detach() for p in params])


def test_a_parameter_without_gradient_stays_and_may_join_later():
    params, opt = two_tensors(weight_decay=0.1)
    idle = params[1].detach().clone()
    for _ in range(3):
        set_grads(params, 0.5, None)
        opt.step(loss=1.0)
    assert torch.equal(params[1], idle) and not opt.state.get(params[1])
    set_grads(params, 0.5, -0.25)
    opt.step(loss=1.0)
    assert not torch.equal(params[1], idle) and all(torch.isfinite(p).all() for p in params)
    moved = [p.detach().clone() for p in params]
    set_grads(params, None, -0.25)
    opt.step(loss=1.0)
    assert torch.equal(params[0], moved[0]) and not torch.equal(params[1], moved[1])


def test_no_gradient_at_all_is_no_step():
    params, opt = two_tensors()
    before = [p.detach().clone() for p in params]
    opt.step(loss=1.0)
    assert all(torch.equal(p, b) for p, b in zip(params, before, strict=True)) and opt.effective_lr.isnan().all()


def test_a_dead_coordinate_stays_and_disturbs_nothing():
    x, y = nn.Parameter(torch.tensor([1.0, 2.0, 3.0])), nn.Parameter(torch.tensor([1.0, 3.0]))
    for p, g in ((x, [0.5, 0.0, -0.25]), (y, [0.5, -0.25])):
        opt = PSSPS([p], d0=INF)
        for _ in range(10):
            p.grad = torch.tensor(g)
            opt.step(loss=1e-3)
    assert x[1] == 2.0 and torch.equal(x[[0, 2]], y)


def test_an_all_zero_first_gradient_moves_nothing_and_leaves_the_first_bound_for_later():
    params, opt = two_tensors()
    before = torch.cat([p.detach().flatten().clone() for p in params])
    set_grads(params, 0.0, 0.0)
    opt.step(loss=1.0)
    assert torch.equal(torch.cat([p.detach().flatten() for p in params]), before)
    set_grads(params, 0.5, -0.25)
    opt.step(loss=1.0)
    assert opt.distance.item() <= 2.0**-8 * before.square().mean().sqrt().item() * (1 + 1e-12)


def test_parameters_that_all_start_at_zero_have_a_unit_of_one():
    x = nn.Parameter(torch.zeros(4, dtype=torch.float64))
    opt = PSSPS([x])
    x.grad = torch.full_like(x, 1e-3)
    opt.step(loss=1.0)
    assert x.detach().square().mean().sqrt().item() == pytest.approx(2.0**-8, rel=1e-12)


@pytest.mark.parametrize("loss", [torch.ones(2), torch.ones(3)])
def test_a_loss_that_is_not_a_scalar_is_refused(loss):
    params, opt = two_tensors()
    set_grads(params, 0.5, -0.25)
    with pytest.raises(ValueError, match="scalar"):
        opt.step(loss=loss)


# --- state, groups, schedules -----------------------------------------------------------------------------

@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("through", ["dictionary", "file"])
def test_a_run_goes_on_from_its_state_bit_for_bit(dtype, through):
    problem = network("digits-mlp", dtype)

    def fresh(start):
        params = [nn.Parameter(p.clone()) for p in start]
        opt = PSSPS(params, weight_decay=1e-3)
        return params, opt, torch.optim.lr_scheduler.CosineAnnealingLR(opt, 80)

    whole, opt, scheduler = fresh(problem.start)
    for _ in run(opt, whole, problem, 80, scheduler=scheduler):
        pass
    first, opt, scheduler = fresh(problem.start)
    for _ in run(opt, first, problem, 30, scheduler=scheduler):
        pass
    saved = bits({"opt": opt.state_dict(), "scheduler": scheduler.state_dict(), "params": [p.detach() for p in first]})
    if through == "file":
        file = io.BytesIO()
        torch.save(saved, file)
        file.seek(0)
        saved = torch.load(file, weights_only=True)
    second, opt, scheduler = fresh(saved["params"])
    opt.load_state_dict(saved["opt"])
    scheduler.load_state_dict(saved["scheduler"])
    for _ in run(opt, second, problem, 50, start=30, scheduler=scheduler):
        pass
    assert all(torch.equal(p, q) for p, q in zip(whole, second, strict=True))
    assert not any(torch.equal(p, q) for p, q in zip(whole, first, strict=True))


def test_without_its_state_a_run_does_not_go_on_the_same():
    problem = network("digits-mlp")
    whole = trajectory(PSSPS, problem, Transformation(), 20)
    params = [nn.Parameter(p.clone()) for p in whole[9]]
    opt = PSSPS(params)
    for _ in run(opt, params, problem, 10, start=10):
        pass
    assert not any(torch.equal(p, q) for p, q in zip(params, whole[-1], strict=True))


def test_groups_have_their_own_weight_decay():
    x, y = (nn.Parameter(torch.tensor([1.0, -2.0], dtype=torch.float64)) for _ in range(2))
    opt = PSSPS([{"params": [x], "weight_decay": 0.25}, {"params": [y]}], lr=0.5)
    set_grads([x, y], 0.5, 0.5)
    opt.step(loss=0.0)  # a zero step: decay alone
    assert x.tolist() == [1 - 0.125, -2 + 0.25] and y.tolist() == [1.0, -2.0]


def test_decay_has_no_units():
    problem = network("digits-mlp")
    for t in (LossScale(), UniformUnits()):
        assert certify(lambda p: PSSPS(p, weight_decay=2.0**-6), t, problem, steps=40).verdict == "bit-exact"


def test_a_scheduler_drives_the_step():
    def path(multipliers):
        params, opt = two_tensors(betas=(0.0, 0.98))
        scheduler = torch.optim.lr_scheduler.LambdaLR(opt, lambda k: multipliers[k])
        points = [torch.cat([p.detach().flatten() for p in params])]
        for _ in multipliers[:-1]:
            set_grads(params, 0.5, -0.25)
            opt.step(loss=1.0)
            scheduler.step()
            points.append(torch.cat([p.detach().flatten() for p in params]))
        return torch.stack(points).diff(dim=0), opt
    full, _ = path([1.0, 1.0, 1.0, 1.0])
    driven, opt = path([1.0, 0.5, 0.0, 0.0])
    assert torch.equal(driven[0], full[0])
    assert torch.allclose(driven[1], full[1] / 2, rtol=1e-9, atol=1e-15)
    assert driven[2].abs().max() == 0 and opt.effective_lr.item() == 0


def test_named_parameters_and_one_block():
    model = nn.Linear(3, 2)
    opt = PSSPS(model.named_parameters())
    loss = model(torch.ones(4, 3)).square().mean()
    loss.backward()
    opt.step(loss=loss)
    assert opt.block_names == ["model"] and opt.effective_lr.shape == opt.distance.shape == (1,)


def test_half_precision_parameters_keep_their_statistics_in_single():
    x = nn.Parameter(torch.ones(4, dtype=torch.bfloat16))
    opt = PSSPS([x])
    for _ in range(20):
        x.grad = torch.full_like(x, 0.5)
        opt.step(loss=torch.tensor(1.0, dtype=torch.bfloat16))
    assert opt.state[x]["exp_avg_sq"].dtype == torch.float32 and x.dtype == torch.bfloat16 and x[0] < 1


# --- what a user might get wrong ----------------------------------------------------------------------------

def test_a_gradient_whose_square_overflows_is_skipped_and_the_warning_points_here():
    x = nn.Parameter(torch.ones(3))
    opt = PSSPS([x], fused=False)
    x.grad = torch.tensor([1e30, 1.0, 1.0])
    with pytest.warns(UserWarning, match="its square") as caught:
        opt.step(loss=1.0)
    assert caught[0].filename == __file__
    assert torch.equal(x, torch.ones(3)) and opt.skipped_steps == 1 and not opt.state[x]
    x.grad = torch.tensor([1e-2, 1.0, 1.0])
    opt.step(loss=1.0)
    assert torch.isfinite(x).all() and not torch.equal(x, torch.ones(3))


def test_a_closure_and_a_loss_together_are_refused():
    _, opt = two_tensors()
    with pytest.raises(ValueError, match="give step a closure or a loss, not both"):
        opt.step(lambda: torch.tensor(1.0), loss=1.0)


@pytest.mark.parametrize("betas", [0.9, (0.9,), (0.9, 0.98, 0.99), "ab"])
def test_betas_that_are_not_a_pair_of_numbers_are_refused(betas):
    with pytest.raises(ValueError, match="betas"):
        PSSPS([nn.Parameter(torch.ones(1))], betas=betas)


@pytest.mark.parametrize("settings, trains", [({}, False), ({"c": 0.5}, True), ({"betas": (0.9, 0.98)}, True)], ids=str)
def test_plain_sps_lacks_momentum_or_a_larger_c(settings, trains):
    make = lambda p: PSSPS(p, **{"scaling": "none", "betas": (0.0, 0.98), **settings})  # noqa: E731
    assert (train("mnist1d-cnn", make, steps=200, schedule="constant", evaluations=1).final_loss < 1.8) == trains
