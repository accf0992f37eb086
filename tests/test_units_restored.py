"""Units per tensor and per neuron: whole trainings are identical, zero starts, decay, and the limits of the split."""

import copy
import math
from dataclasses import replace
from fractions import Fraction
from functools import lru_cache

import pytest
import sympy as sp
import torch
from torch import nn
from torch.nn import functional as F

from pslib import PSDASGD, estimators, tasks, units
from pslib.contenders import AnyBlock
from pslib.estimators import Entry
from pslib.tasks import CharacterTransformer, Convolutional, mlp
from pslib.training import train
from pslib.twins import rescale, symmetries

DTYPES = [torch.float32, torch.float64]
WIDTH, STEPS = 16, 20
DIGITS, MNIST, CHARS = map(tasks.get, ("digits-mlp", "mnist1d-cnn", "chars-transformer"))


class Tied(CharacterTransformer):
    """The token embedding is the output layer, too."""

    def __init__(self, classes):
        super().__init__(classes, WIDTH, 2, 1)
        self.head.weight = self.token.weight


def leaky(data):
    return nn.Sequential(nn.Linear(64, WIDTH), nn.LeakyReLU(0.1), nn.Linear(WIDTH, WIDTH), nn.LeakyReLU(0.1), nn.Linear(WIDTH, 10))


def layer_normed(data):
    return nn.Sequential(nn.Linear(64, WIDTH), nn.LayerNorm(WIDTH), nn.Linear(WIDTH, WIDTH), nn.ReLU(), nn.Linear(WIDTH, 10))


NETWORKS = {
    "mlp": replace(DIGITS, build=lambda d: mlp(64, 10, WIDTH)),
    "leaky": replace(DIGITS, build=leaky),
    "layer-norm": replace(DIGITS, build=layer_normed),
    "cnn": replace(MNIST, build=lambda d: Convolutional(10, channels=8), batch_size=20),
    "transformer": replace(CHARS, build=lambda d: CharacterTransformer(d.classes, WIDTH, 2, 1), batch_size=4),
    "tied": replace(CHARS, build=lambda d: Tied(d.classes), batch_size=4),
}


def zero_biases(model):
    for name, p in model.named_parameters():
        p.data.mul_(not name.endswith("bias"))


def nothing(model):
    pass


@lru_cache
def trained(name, settings=(), dtype=torch.float32, before=nothing, steps=STEPS):
    return twin_trained(name, settings, dtype, before, steps)


def twin_trained(name, settings=(), dtype=torch.float32, before=nothing, steps=STEPS, at=(), c=1.0):
    """Losses, and the parameters with their factors undone."""
    factors = {}

    def prepare(model):
        before(model)
        factors.update(rescale(model, at, c) if at else {})

    run = train(NETWORKS[name], lambda params: PSDASGD(params, **dict(settings)), steps=steps, prepare=prepare, evaluations=1, dtype=dtype)
    return run.losses, {name: p.detach() / factors.get(name, 1) for name, p in run.model.named_parameters()}


def same(one, other):
    assert one[0][-5:].mean() < one[0][:3].mean() and all(bool(torch.isfinite(p).all()) for p in one[1].values())
    return torch.equal(one[0], other[0]) and all(torch.equal(p, other[1][name]) for name, p in one[1].items())


def powers(count, seed=0, spread=6):
    return torch.exp2(torch.randint(-spread, spread + 1, (count,), generator=torch.Generator().manual_seed(seed)))


# --- the theorem --------------------------------------------------------------------------------------

def induction_step(**wrong):
    u, c = sp.symbols("u c", positive=True)
    q, b1, b2, b3, gamma = sp.symbols("q beta1 beta2 beta3 gamma", positive=True)
    state = {name: sp.symbols(f"{name}1:3", positive=True) for name in ("g", "v", "vhat", "A", "s", "m", "x0", "x")}
    state |= {name: (sp.Symbol(name, positive=True),) for name in ("N", "delta", "w")}
    factor = dict(
        g=c * u, v=(c * u) ** 2, vhat=(c * u) ** 2, A=(c * u) ** q, s=1 / u, m=c, x0=1 / u, x=1 / u, N=u**-2, delta=1 / u,
        w=1 / (c * u**2),
    )
    factor |= {name: value(c, u) for name, value in wrong.items()}

    def step(t):
        (N,), (delta,), (w,) = t["N"], t["delta"], t["w"]
        a_sq, G_sq = sum(t["A"]), sum(v / A for v, A in zip(t["vhat"], t["A"], strict=True))
        N = b3 * N + (1 - b3) * w * sum(g * (y - z) for g, y, z in zip(t["g"], t["x0"], t["x"], strict=True))
        s = [b3 * old + (1 - b3) * w * g for old, g in zip(t["s"], t["g"], strict=True)]
        m = b1 * t["m"][0] + (1 - b1) * delta * t["g"][0]
        bound = N**2 / (sum(z**2 / A for z, A in zip(s, t["A"], strict=True)) * a_sq)
        return {
            "v": b2 * t["v"][0] + (1 - b2) * t["g"][0] ** 2, "w": (gamma * delta) ** 2 / (a_sq * G_sq), "N": N, "s": s[0], "m": m,
            "delta": bound, "x": a_sq / G_sq * (gamma * m / t["A"][0]) ** 2,
        }

    old, new = step(state), step({name: tuple(z * factor[name] for z in value) for name, value in state.items()})
    squared = ("w", "delta", "x")
    return all(sp.simplify(new[k] / old[k] / factor[k] ** (2 if k in squared else 1)) == 1 for k in old)


def test_the_induction_step_and_that_it_can_fail():
    assert induction_step()
    assert not induction_step(w=lambda c, u: 1 / u**2)
    assert not induction_step(delta=lambda c, u: 1)


def two_steps(u, w, c):
    """Two steps of the algorithm in high precision, written out; tensor one has two coordinates in units u, tensor two one in w."""
    unit, blocks = (u, u, w), ((0, 1), (2,))
    start = [sp.Float(n, 40) / p for n, p in zip((3, 1, 2), unit, strict=True)]
    x, v, s, m, N = list(start), [sp.Float(0, 40)] * 3, [sp.Float(0, 40)] * 3, [sp.Float(0, 40)] * 3, [sp.Float(0, 40)] * 2
    delta = [sp.sqrt(sum(start[i] ** 2 for i in b) / len(b)) / 100 for b in blocks]
    for k in (1, 2):
        z = [p * q for p, q in zip(unit, x, strict=True)]
        r, t = z[0] + 2 * z[1] - z[2] - 1, z[0] - z[1] * z[2] + 3
        g = [c * p * d for p, d in zip(unit, (r + t, 2 * r - t * z[2], -r - t * z[1]), strict=True)]
        v = [p / 4 + q**2 * 3 / 4 for p, q in zip(v, g, strict=True)]
        alpha_sq = [sp.sqrt(p / (1 - sp.Rational(1, 4) ** k)) for p in v]
        for j, b in enumerate(blocks):
            a_sq = sum(alpha_sq[i] for i in b)
            N[j] = (N[j] + delta[j] / a_sq * sum(g[i] * (start[i] - x[i]) for i in b)) / 2
            for i in b:
                s[i], m[i] = (s[i] + delta[j] / a_sq * g[i]) / 2, (m[i] + delta[j] * g[i]) / 2
        x = [x[i] - m[i] / (1 - sp.Rational(1, 2) ** k) / alpha_sq[i] for i in range(3)]
        delta = [
            max(d, N[j] / sp.sqrt(sum(s[i] ** 2 / alpha_sq[i] for i in b) * sum(alpha_sq[i] for i in b)))
            for j, (d, b) in enumerate(zip(delta, blocks, strict=True))
        ]
    return [*x, *delta], start


def test_two_steps_written_out_and_in_pslib():
    ones, start = two_steps(1, 1, 1)
    other, _ = two_steps(sp.Rational(7, 3), sp.Rational(1, 5), 11)
    for p, q, unit in zip(other, ones, (*2 * [sp.Rational(7, 3)], sp.Rational(1, 5), sp.Rational(7, 3), sp.Rational(1, 5)), strict=True):
        assert abs(p * unit / q - 1) < 1e-35
    x = [nn.Parameter(torch.tensor([float(v) for v in values], dtype=torch.float64)) for values in (start[:2], start[2:3])]
    opt = PSDASGD(x, betas=(0.5, 0.25), d0=0.01)
    for _ in range(2):
        opt.zero_grad()
        (((x[0][0] + 2 * x[0][1] - x[1] - 1) ** 2 + (x[0][0] - x[0][1] * x[1] + 3) ** 2) / 2).sum().backward()
        opt.step()
    found = torch.cat([*x, opt.distance]).detach()
    torch.testing.assert_close(found, torch.tensor([float(v) for v in ones], dtype=torch.float64), rtol=1e-13, atol=0)


def test_the_bound_in_sigma_units_holds_for_one_block():
    for seed in range(10):
        g = torch.Generator().manual_seed(seed)
        M, start, solution = (torch.randn(*shape, generator=g, dtype=torch.float64) for shape in ((7, 6), (6,), (6,)))
        start = start * torch.tensor([1e3, 1e3, 1.0, 1.0, 1e-3, 1e-3])
        x = [nn.Parameter(p.clone()) for p in start.split(2)]
        opt = PSDASGD(x, per="model", units="tensor")
        for _ in range(100):
            opt.zero_grad()
            (M @ (torch.cat(x) - solution)).abs().sum().backward()
            opt.step()
        sigma = torch.cat([opt.state[p]["unit"].expand(2) for p in x])
        assert 2**-8 < opt.distance.item() <= ((start - solution).abs() / sigma).max().item()


def test_a_block_alone_is_not_bounded():
    points = [(Fraction(1), Fraction(0)), (Fraction(0), Fraction(-1)), (Fraction(1), Fraction(299, 100))]
    g = [(x - y, 2 * y - x) for x, y in points]
    N = [sum(p[j] * (points[0][j] - z[j]) for p, z in zip(g, points, strict=True)) for j in (0, 1)]
    s = [sum(p[j] for p in g) for j in (0, 1)]
    assert N[0] / abs(s[0]) == 100 > abs(points[0][0])
    assert sum(N) <= 0 or sum(N) ** 2 <= 2 * sum(t * t for t in s)


def test_small_blocks_overestimate_and_large_ones_do_not():
    g = torch.Generator().manual_seed(0)
    Q, _ = torch.linalg.qr(torch.randn(60, 32, 32, generator=g, dtype=torch.float64))
    H = Q @ (10 ** (-2 * torch.rand(60, 32, 1, generator=g, dtype=torch.float64)) * Q.mT)
    start, solution = (torch.randn(60, 32, generator=g, dtype=torch.float64) for _ in range(2))
    worst = {}
    for size in (1, 16, 32):
        x = nn.Parameter(start.reshape(-1, size).clone())
        opt = AnyBlock([x], per="neuron")
        for _ in range(150):
            x.grad = (H @ (x.detach().view_as(start) - solution).unsqueeze(-1)).reshape(-1, size)
            opt.step()
        worst[size] = (opt.distance.reshape(-1) / (start - solution).abs().reshape(-1, size).amax(1)).max().item()
    assert worst[1] > 10 and worst[16] < 1 and worst[32] < 1


# --- sigma --------------------------------------------------------------------------------------------

def entry(x, grad=None, module="", **group):
    return Entry(nn.Parameter(x), torch.ones_like(x) if grad is None else grad, {}, group, None, module)


def sigmas(kind, *entries):
    units.assign(list(entries), kind)
    return [e.state.get("unit") for e in entries]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_sigma_follows_rows_and_columns_exactly(dtype):
    x = torch.randn(20, 30, generator=torch.Generator().manual_seed(0), dtype=dtype)
    factors = (powers(20, 1, 9).reshape(-1, 1) * powers(30, 2, 9)).to(dtype)
    (old,), (new,) = sigmas("neuron", entry(x)), sigmas("neuron", entry(x * factors))
    assert torch.equal(new, old * factors)
    (third,) = sigmas("neuron", entry(x * 3))
    torch.testing.assert_close(third, old * 3)
    assert torch.isclose((x / old).double().square().mean(), torch.tensor(1.0, dtype=torch.float64))
    filters = x.reshape(4, 5, 30)
    per_filter = (powers(4, 1).reshape(-1, 1, 1) * powers(5, 2).reshape(-1, 1)).to(dtype)
    (old,), (new,) = sigmas("neuron", entry(filters)), sigmas("neuron", entry(filters * per_filter))
    assert torch.equal(new, old * per_filter) and old.shape == (4, 5, 1)


def test_sigma_of_vectors_numbers_and_zeros():
    x, bias = torch.randn(4, 6, dtype=torch.float64), torch.zeros(4, dtype=torch.float64)
    rows = powers(4, 3).double()
    old = sigmas("neuron", entry(x, module="a"), entry(bias, module="a"))
    new = sigmas("neuron", entry(x * rows.reshape(-1, 1), torch.ones_like(x) / rows.reshape(-1, 1), "a"), entry(bias, 1 / rows, "a"))
    assert torch.equal(new[1], old[1] * rows) and old[1].shape == (4,)
    holed = x.clone()
    holed[1, 2] = 0
    assert sigmas("neuron", entry(holed))[0].shape == ()  # a zero has no logarithm: one number for all
    number = torch.tensor(-3.0, dtype=torch.float64)
    assert sigmas("neuron", entry(number)) == sigmas("tensor", entry(number)) == [3.0]
    assert sigmas("tensor", entry(bias, unit=0.25), entry(x, unit=8.0)) == [0.25, 8.0]


def test_completed_borrows_and_waits():
    sizes, grads = torch.tensor([2.0, 0.0, 0.0, 4.0]), torch.tensor([3.0, 0.5, 0.0, 0.0])
    assert estimators.completed(sizes, grads).tolist() == [2.0, 12.0, 0.0, 4.0]
    assert estimators.completed(torch.zeros(2), torch.tensor([3.0, 0.0])).tolist() == [1.0, 0.0]


def test_a_late_tensor_borrows_from_the_starts_of_the_others():
    old, new = entry(torch.full((3,), 8.0), torch.full((3,), 3.0)), entry(torch.zeros(2), torch.full((2,), 0.5))
    old.state.update(initial=torch.full((3,), 2.0), unit=torch.tensor(2.0))
    assert sigmas("tensor", old, new) == [2.0, 12.0]


# --- whole trainings ----------------------------------------------------------------------------------

NEURONS = [  # network, modules whose neurons get factors, how many neurons
    ("mlp", ("0", "2"), (WIDTH, WIDTH)), ("leaky", ("0", "2"), (WIDTH, WIDTH)),
    ("cnn", ("convs.0", "convs.1"), (8, 8)), ("transformer", ("blocks.0.up",), (4 * WIDTH,)),
    ("transformer", ("blocks.0.query",), (WIDTH,)), ("transformer", ("blocks.0.value",), (WIDTH,)),
    ("transformer", ("blocks.0.norm1", "norm"), (WIDTH, WIDTH)), ("layer-norm", ("1", "2"), (WIDTH, WIDTH)),
]
NEURON_UNITS = (("units", "neuron"),)


@pytest.mark.parametrize("per, dtype", [("tensor", torch.float32), ("model", torch.float64), ("model", torch.float32)], ids=str)
@pytest.mark.parametrize("name, at, sizes", NEURONS, ids=[f"{n}-{at[0]}" for n, at, _ in NEURONS])
def test_neuron_wise_twins_train_alike(name, at, sizes, per, dtype):
    settings = (*NEURON_UNITS, ("per", per))
    before = zero_biases if dtype == torch.float32 else nothing
    factors = [powers(n, seed, 5) for seed, n in enumerate(sizes)]
    assert same(trained(name, settings, dtype, before), twin_trained(name, settings, dtype, before, at=list(at), c=factors))


def test_units_per_tensor_are_not_enough_for_neurons():
    for settings in ((), (("units", "tensor"),), (("per", "model"), ("units", "tensor"))):
        assert not same(trained("mlp", settings), twin_trained("mlp", settings, at=["0"], c=[powers(WIDTH)]))


@pytest.mark.parametrize("per", ["model", "module", "tensor"])
@pytest.mark.parametrize("kind", units.KINDS)
@pytest.mark.parametrize("name", ["mlp", "cnn", "transformer", "tied"])
def test_all_generators_at_once(name, kind, per):
    task = NETWORKS[name]
    group = symmetries(task.build(task.load()))
    settings = (("per", per), ("units", kind))
    factors = powers(len(group), seed=len(name)).tolist()
    assert len(set(factors)) > 1
    assert same(trained(name, settings, before=zero_biases), twin_trained(name, settings, before=zero_biases, at=group, c=factors))


def test_one_distance_without_units_is_not_enough():
    settings = (("per", "model"), ("d0", 2.0**-8))
    assert not same(trained("mlp", settings), twin_trained("mlp", settings, at=["0"], c=[4.0]))


def zero_output(model):
    (model.head if hasattr(model, "head") else model[-1]).weight.data.zero_()
    zero_biases(model)


def zero_branches(model):
    block = model.blocks[0]
    for p in (block.out.weight, block.down.weight, block.norm2.weight, block.out.bias):
        p.data.zero_()


ZEROS = [("mlp", zero_output, ["0"]), ("cnn", zero_output, ["convs.0"]), ("transformer", zero_output, ["blocks.0.norm1", "blocks.0.query"]),
         ("transformer", zero_branches, ["blocks.0.value", "blocks.0.up", "blocks.0.norm2"])]


@pytest.mark.parametrize("kind, dtype", [(None, torch.float32), ("tensor", torch.float64)], ids=str)
@pytest.mark.parametrize("name, before, at", ZEROS, ids=[f"{n}-{b.__name__}" for n, b, _ in ZEROS])
def test_layers_that_start_at_zero(name, before, at, kind, dtype):
    settings, c = (("units", kind),), [2.0 ** (3 * k - 7) for k in range(len(at))]
    one = trained(name, settings, dtype, before)
    zeros = NETWORKS[name].build(NETWORKS[name].load())
    before(zeros)
    started = {n for n, p in zeros.named_parameters() if not p.any()}
    assert started and all(bool(one[1][n].any()) for n in started)
    assert same(one, twin_trained(name, settings, dtype, before, at=at, c=c))


def headed(at, c, given):
    """A perceptron whose output layer starts at zero; `given`: its units come from its input, and outputs are pure numbers."""
    models, factors = [], {}

    def prepare(model):
        zero_output(model)
        factors.update(rescale(model, at, c) if at else {})
        models.append(model)

    def make(params):
        with torch.no_grad():
            size = models[-1][:-1](tasks.get("digits-mlp").load().x_train[:50]).double().square().mean().sqrt().item()
        found = {"4.weight": 1 / size, "4.bias": 1.0} if given else {}
        return PSDASGD([dict(params=[(name, p)], unit=found.get(name)) for name, p in params])

    run = train(NETWORKS["mlp"], make, steps=STEPS, evaluations=1, prepare=prepare)
    return run.losses, {n: p.detach() / factors.get(n, 1) for n, p in run.model.named_parameters()}


def test_an_output_layer_at_zero_is_the_impossible_case_in_disguise():
    assert same(headed([], 1.0, False), headed(["0"], 2.0**8, False))
    assert not same(headed([], 1.0, False), headed(["2"], 2.0**8, False))
    assert same(headed([], 1.0, True), headed(["0", "2"], [2.0**5, 2.0**8], True))


# --- dead inputs, decay, given units ------------------------------------------------------------------

def test_dead_inputs_add_nothing():
    dead = ~tasks.get("digits-mlp").load().x_train.any(0)
    start = {}
    for settings in ((), (("units", "tensor"),), (("units", "neuron"),)):
        losses, params = twin_trained("mlp", settings, before=lambda model: start.update(w=model[0].weight.detach().clone()))
        assert dead.any() and torch.equal(params["0.weight"][:, dead], start["w"][:, dead])
        assert (params["0.weight"] != start["w"])[:, ~dead].double().mean() > 0.8 and bool(torch.isfinite(losses).all())


class RateTimesDecay(PSDASGD):
    """Decay by the learning rate times 1/16, as AdamW does it."""

    def step(self, closure=None):
        for p, rate in zip(self.param_groups[0]["params"], self.effective_lr.nan_to_num(), strict=True):
            p.data.mul_(1 - rate.item() / 16)
        super().step(closure)


def test_decay_is_a_pure_number():
    for settings in ((("weight_decay", 2.0**-6),), (("weight_decay", 2.0**-6), ("units", "neuron"), ("per", "model"))):
        one = trained("mlp", settings)
        assert same(one, twin_trained("mlp", settings, at=["0", "2"], c=[2.0**9, 2.0**-5]))
        assert not same(one, trained("mlp", settings[1:]))
    runs = []
    for at in ([], ["0"]):
        factors = {}
        prepare = lambda m, at=at, factors=factors: factors.update(rescale(m, at, 2.0**8) if at else {})  # noqa: E731
        run = train(NETWORKS["mlp"], RateTimesDecay, steps=STEPS, evaluations=1, prepare=prepare)
        runs.append((run.losses, {n: p.detach() / factors.get(n, 1) for n, p in run.model.named_parameters()}))
    assert not same(*runs)


def linear_problem(opt_factory, unit=1.0, loss_unit=1.0, start=0.0, steps=40):
    """A convex problem with one tensor; its course in the original units."""
    g = torch.Generator().manual_seed(0)
    A, b = torch.randn(8, 5, generator=g, dtype=torch.float64), torch.randn(8, generator=g, dtype=torch.float64)
    x = nn.Parameter(torch.full((5,), start / unit, dtype=torch.float64))
    f = lambda: loss_unit * (A @ (unit * x) - b).square().sum()  # noqa: E731
    loss = f()
    (grad,) = torch.autograd.grad(loss, x)
    opt, course = opt_factory([x], loss.item(), grad), []
    for _ in range(steps):
        opt.zero_grad()
        f().backward()
        opt.step()
        course.append(x.detach() * unit)
    return torch.stack(course)


@pytest.mark.parametrize("kind", [None, "tensor"])
def test_everything_at_zero_needs_the_loss(kind):
    plain = lambda params, f0, g: PSDASGD(params, units=kind)  # noqa: E731
    polyak = lambda params, f0, g: PSDASGD(params, units=kind, unit=f0 / g.abs().sum().item())  # noqa: E731
    for make, exact in ((plain, False), (polyak, True)):
        base = linear_problem(make)
        assert base.any() and torch.equal(base, linear_problem(make, loss_unit=2.0**9))
        assert torch.equal(base, linear_problem(make, unit=2.0**7)) == exact
        assert torch.equal(base, linear_problem(make, unit=2.0**-7, loss_unit=2.0**5)) == exact
    assert torch.equal(linear_problem(plain, start=1.0), linear_problem(plain, unit=2.0**7, start=1.0))


@pytest.mark.parametrize("kind", [None, "tensor"])
def test_unit_replaces_the_root_mean_square(kind):
    x = [nn.Parameter(torch.full((3,), 2.0)), nn.Parameter(torch.zeros(3))]
    opt = PSDASGD([dict(params=[x[0]], unit=2.0**4), dict(params=[x[1]], unit=2.0**-3)], units=kind)
    (x[0] + x[1]).sum().backward()
    opt.step()
    moved = [(2.0 - x[0]).detach(), -x[1].detach()]
    for way, expected in zip(moved, [2.0**-4, 2.0**-11], strict=True):  # one step is δ up to the rounding of √v̂ and of the bias corrections
        assert way.unique().tolist() == [pytest.approx(expected, rel=1e-6)]
    assert opt.distance.tolist() == ([2.0**-4, 2.0**-11] if kind is None else [2.0**-8, 2.0**-8])


class LowRank(nn.Module):
    def __init__(self):
        super().__init__()
        g = torch.Generator().manual_seed(0)
        self.A, self.B = nn.Parameter(torch.randn(4, 6, generator=g)), nn.Parameter(torch.zeros(5, 4))

    def forward(self, x):
        return F.linear(F.linear(x, self.A), self.B)


@pytest.mark.parametrize("settings", [
    dict(), dict(units="tensor"), dict(units="neuron"), dict(per="model", units="tensor"), dict(per="module"),
], ids=str)
def test_a_low_rank_pair_trains(settings):
    g = torch.Generator().manual_seed(1)
    x, model = torch.randn(50, 6, generator=g), LowRank()
    y = x @ torch.randn(6, 4, generator=g) @ torch.randn(4, 5, generator=g)
    opt, losses = PSDASGD(model.named_parameters(), **settings), []
    for _ in range(200):
        opt.zero_grad()
        loss = F.mse_loss(model(x), y)
        loss.backward()
        losses.append(loss.item())
        if len(losses) == 1:
            assert not model.A.grad.any() and model.B.grad.any()
        opt.step()
    assert losses[-1] < losses[0] / 10 and opt.skipped_steps == 0


# --- tensors that come late ---------------------------------------------------------------------------

def late(kind, per, c=1.0, steps=30, zero=False):
    """The second pair of layers is used from step 10 on; the twin has its rows in other units."""
    g = torch.Generator().manual_seed(0)
    x, y = torch.randn(20, 4, generator=g, dtype=torch.float64), torch.randn(20, 3, generator=g, dtype=torch.float64)
    layers = nn.ModuleDict({n: nn.Linear(i, o).double() for n, i, o in (("a", 4, 3), ("b", 4, 5), ("c", 5, 3))})
    for p in layers.parameters():
        p.data = torch.randn(p.shape, generator=g, dtype=torch.float64)
    if zero:
        layers["b"].bias.data.zero_()
    layers["b"].weight.data *= c
    layers["b"].bias.data *= c
    layers["c"].weight.data /= c
    opt = PSDASGD(layers.named_parameters(), per=per, units=kind)
    for k in range(steps):
        opt.zero_grad()
        out = layers["a"](x) + (layers["c"](F.relu(layers["b"](x))) if k >= 10 else 0)
        F.mse_loss(out, y).backward()
        opt.step()
        if k == 9:
            assert layers["b"].weight not in opt.state or not opt.state[layers["b"].weight]
    return {n: p.detach() / {"b.weight": c, "b.bias": c, "c.weight": 1 / c}.get(n, 1) for n, p in layers.named_parameters()}


@pytest.mark.parametrize("zero", [False, True])
@pytest.mark.parametrize("kind, per", [
    (None, "tensor"), ("tensor", "tensor"), ("tensor", "model"), ("neuron", "model"), ("tensor", "module"),
])
def test_tensors_that_appear_late(kind, per, zero):
    one, other = late(kind, per, zero=zero), late(kind, per, 2.0**9, zero=zero)
    assert all(torch.equal(p, other[n]) for n, p in one.items())
    assert not torch.equal(one["b.weight"], late(kind, per, steps=29, zero=zero)["b.weight"])


# --- state --------------------------------------------------------------------------------------------

@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("settings", [
    dict(units="tensor"), dict(units="neuron"), dict(units="neuron", per="model"), dict(units="tensor", per="module"),
], ids=str)
def test_state_goes_through_a_dictionary(settings, dtype):
    data = tasks.get("digits-mlp").load()
    x, y = data.x_train[:100].to(dtype), data.y_train[:100]

    def fit(model, opt, steps):
        for _ in range(steps):
            opt.zero_grad()
            F.cross_entropy(model(x), y).backward()
            opt.step()

    torch.manual_seed(0)
    model = mlp(64, 10, WIDTH).to(dtype)
    zero_biases(model)
    opt = PSDASGD(model.named_parameters(), **settings)
    fit(model, opt, 7)
    other = copy.deepcopy(model)
    again = PSDASGD(other.named_parameters(), **settings)
    again.load_state_dict(copy.deepcopy(opt.state_dict()))
    fit(model, opt, 7)
    fit(other, again, 7)
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), other.parameters(), strict=True))
    assert torch.equal(opt.distance, again.distance)
    fresh = PSDASGD(copy.deepcopy(other).named_parameters(), **settings)
    assert bool(fresh.distance.isnan().all())


# --- wrong settings -----------------------------------------------------------------------------------

@pytest.mark.parametrize("settings, message", [
    (dict(per="modul"), "per must be one of 'model', 'module', 'tensor', not 'modul'."),
    (dict(units="neurons"), "units must be one of None, 'tensor', 'neuron', not 'neurons'."),
    (dict(unit=0.0), "unit must be None or a finite number > 0, not 0.0."),
    (dict(unit=math.inf), "unit must be None or a finite number > 0, not inf."),
    (dict(unit=True), "unit must be None or a finite number > 0, not True."),
    (dict(unit="x"), "unit must be None or a finite number > 0, not 'x'."),
    (dict(per="module"), "per='module' needs names; pass model.named_parameters()."),
])
def test_wrong_settings_give_the_right_sentence(settings, message):
    with pytest.raises(ValueError) as error:
        PSDASGD([nn.Parameter(torch.ones(3))], **settings)
    assert str(error.value) == message


def test_modules_share_one_beta():
    a, b = (nn.Parameter(torch.ones(3)) for _ in range(2))
    with pytest.raises(ValueError, match=r"per='module' shares one distance, so betas\[1\] must be 0.98 in every group, not 0.9"):
        PSDASGD([dict(params=[("m.a", a)]), dict(params=[("m.b", b)], betas=(0.9, 0.9))], per="module")
