"""PS-DA-SGD: the lower bound, the rows of the invariance table, the early block, and the optimizer's behaviour as a torch optimizer."""

import copy
import io
import math
import pickle
import warnings
from dataclasses import replace

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import nn

from pslib import PSDASGD, ScaledSGD, optimizers, scalings, tasks, twins
from pslib.estimators import DAdaptation, dot, over_scaling
from pslib.training import train

CONFIGURED = settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.too_slow])
PER = pytest.mark.parametrize("per", ["model", "tensor"])
DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["float32", "float64"])


# --- the theorem ------------------------------------------------------------------------------------

def quadratic(g, n, x_star):
    m = torch.randn(n, n, generator=g, dtype=torch.float64)
    return lambda x: 0.5 * (m @ (x - x_star)).square().sum()


def hinges(g, n, x_star):
    """Hinge losses that x* satisfies with room to spare, so that x* is a minimiser."""
    z = torch.randn(4 * n, n, generator=g, dtype=torch.float64)
    margins = z @ x_star
    z, target = z * torch.sign(margins)[:, None], margins.abs() * torch.rand(4 * n, generator=g, dtype=torch.float64)
    return lambda x: (target - z @ x).clamp(min=0).sum()


def max_affine(g, n, x_star):
    z = torch.randn(3 * n, n, generator=g, dtype=torch.float64)
    return lambda x: (z @ (x - x_star)).abs().max()


def logistic(g, n, x_star):
    """A logistic loss whose linear term makes its gradient vanish at x*."""
    z = torch.randn(4 * n, n, generator=g, dtype=torch.float64)
    tilt = z.T @ torch.sigmoid(z @ x_star)
    return lambda x: nn.functional.softplus(z @ x).sum() - tilt @ x


def gradient(f, x):
    x = x.clone().requires_grad_()
    return torch.autograd.grad(f(x), x)[0]


def terms(make, n, count, seed, spread):
    """A random convex problem, iterates anywhere, weights ≥ 0: (N, s, x₀ − x*, α)."""
    g = torch.Generator().manual_seed(seed)
    normal = lambda *shape: torch.randn(*shape, generator=g, dtype=torch.float64)  # noqa: E731
    x_star, x0 = normal(n), normal(n)
    f = make(g, n, x_star)
    points = x0 + normal(count, n) * torch.exp(2 * normal(count, 1))
    weights = torch.exp(3 * normal(count)) * (torch.rand(count, generator=g, dtype=torch.float64) > 0.3)
    grads = torch.stack([gradient(f, x) for x in points])
    numerator = (weights[:, None] * grads * (x0 - points)).sum()
    return numerator, (weights[:, None] * grads).sum(0), x0 - x_star, torch.exp(spread * normal(n))


problems = st.tuples(
    st.sampled_from([quadratic, hinges, max_affine, logistic]), st.integers(1, 6), st.integers(1, 6), st.integers(0, 2**32), st.floats(0, 8)
)


@CONFIGURED
@given(problems)
def test_the_lower_bound_holds_for_any_positive_scaling_weights_and_iterates(problem):
    numerator, s, away, alpha = terms(*problem)
    scale = (s.abs() * away.abs()).sum() + numerator.abs()
    assert numerator <= (alpha * away).norm() * (s / alpha).norm() + 1e-9 * scale
    assert numerator <= away.abs().max() * (s / alpha).norm() * alpha.norm() + 1e-9 * scale


def test_the_bound_is_no_triviality():
    """It is positive often, it comes near the distance in one dimension, and negative weights break it."""
    tight, positive, broken = [], 0, 0
    for seed in range(300):
        numerator, s, away, alpha = terms(max_affine, 2, 3, seed, 1.0)
        positive += bool(numerator > 0)
        broken += bool(-numerator > away.abs().max() * (s / alpha).norm() * alpha.norm())
        n1, s1, a1, _ = terms(max_affine, 1, 1, seed, 0.0)
        tight.append((n1 / (s1.abs() * a1.abs())).item() if s1.abs() > 0 else 0.0)
    assert positive > 20 and broken > 100 and max(tight) > 0.9 and max(tight) <= 1 + 1e-12


def test_the_bound_fails_without_convexity():
    failures = 0
    for seed in range(200):
        g = torch.Generator().manual_seed(seed)
        x0, x = torch.randn(2, 3, generator=g, dtype=torch.float64) * 5
        grad = gradient(lambda y: torch.sin(3 * y).sum() + 0.05 * y.square().sum(), x)
        nearest = 0.6  # the global minimiser of each coordinate is within 0.6 of zero
        failures += bool(grad @ (x0 - x) > (x0.abs() + nearest).max() * grad.norm() * math.sqrt(3))
    assert failures > 0


def convex(seed, n=6):
    g = torch.Generator().manual_seed(seed)
    x0, x_star = torch.randn(2, n, generator=g, dtype=torch.float64)
    make = [quadratic, max_affine, logistic, hinges][seed % 4]
    return x0, x_star, make(g, n, x_star)


@pytest.mark.parametrize("scaling", ["none", "rmsprop", "adam", "amsgrad", "adagrad"])
@pytest.mark.parametrize("seed", range(4))
def test_the_model_estimate_never_exceeds_the_distance_on_convex_problems(seed, scaling):
    x0, x_star, f = convex(seed)
    x = [nn.Parameter(x0[:2].clone()), nn.Parameter(x0[2:].clone())]
    opt = PSDASGD(x, per="model", scaling=scaling, weight_decay=0.01)
    for _ in range(150):
        opt.zero_grad()
        f(torch.cat(list(x))).backward()
        opt.step()
        assert opt.distance.item() <= (x0 - x_star).abs().max() * (1 + 1e-9)
    assert opt.distance.item() > 1e-4  # it did learn


def test_a_tensor_estimate_can_exceed_its_own_distance():
    """The bound is for the whole vector: with blocks of one number it fails, and the book says so."""
    distances = {}
    for per in ("model", "tensor"):
        x = [nn.Parameter(torch.ones(1, dtype=torch.float64)) for _ in range(2)]
        opt = PSDASGD(x, per=per)
        for _ in range(300):
            opt.zero_grad()
            ((x[0] - 1 - 2.0**-10 + x[1]).square().sum() + 0.01 * x[1].square().sum()).backward()
            opt.step()
        distances[per] = opt.distance
    # The minimiser is (1 + 2⁻¹⁰, 0).
    assert distances["tensor"][0] > 10 * 2.0**-10
    assert distances["model"].item() <= 1


# --- the rows of the table, bit for bit -------------------------------------------------------------

def run(per="tensor", dtype=torch.float32, steps=200, prepare=None, factor=1.0, task="mnist1d-cnn", **settings):
    """A PS-DA-SGD run; `factor` multiplies every gradient, as a loss scale does."""

    class Scaled(PSDASGD):
        def step(self, closure=None):
            for group in self.param_groups:
                for p in group["params"]:
                    p.grad.mul_(factor)
            return super().step(closure)

    return train(task, lambda params: Scaled(params, per=per, **settings), steps=steps, dtype=dtype, prepare=prepare, evaluations=4)


def weights(history):
    return [p.detach() for p in history.model.parameters()]


def same(xs, ys):
    return len(xs) == len(ys) and all(torch.equal(x, y) for x, y in zip(xs, ys, strict=True))


@pytest.fixture(scope="module")
def plain():
    made = {}

    def get(per, dtype):
        if (per, dtype) not in made:
            made[per, dtype] = run(per, dtype)
            assert made[per, dtype].losses[-20:].mean() < 0.9 * made[per, dtype].losses[:20].mean()
        return made[per, dtype]

    return get


@DTYPES
@PER
def test_row_1_the_loss_in_other_units(per, dtype, plain):
    scaled = run(per, dtype, factor=2.0**-9)
    assert same(weights(scaled), weights(plain(per, dtype))) and torch.equal(scaled.losses, plain(per, dtype).losses)


def times(factors):
    """`prepare` that multiplies the named parameters."""

    @torch.no_grad()
    def prepare(model):
        for name, p in model.named_parameters():
            p.mul_(factors(name))

    return prepare


class Remapped(nn.Module):
    """The model in other units: its parameters are x/u, and it computes with u·(x/u)."""

    def __init__(self, model, u):
        super().__init__()
        self.model, self.u = model, u
        with torch.no_grad():
            for p in model.parameters():
                p.div_(u)

    def forward(self, x):
        return torch.func.functional_call(self.model, {n: self.u * p for n, p in self.model.named_parameters()}, (x,))


def in_units(u):
    task = tasks.get("mnist1d-cnn")
    return replace(task, build=lambda data: Remapped(task.build(data), u))


@DTYPES
def test_row_3_all_parameters_in_another_unit(dtype, plain):
    u = 2.0**6
    tensor = run("tensor", dtype, task=in_units(u))
    assert same([p * u for p in weights(tensor)], weights(plain("tensor", dtype)))
    model = run("model", dtype, task=in_units(u), d0=2.0**-20 / u)
    assert same([p * u for p in weights(model)], weights(run("model", dtype, d0=2.0**-20)))
    unmoved = run("model", dtype, task=in_units(u), d0=2.0**-20)
    assert not same([p * u for p in weights(unmoved)], weights(run("model", dtype, d0=2.0**-20)))


# A ReLU layer times c, its successor's weights divided by c; the biases' factors accumulate, the head's bias stays.
LAYERS = {"0.weight": 2.0**10, "0.bias": 2.0**10, "2.weight": 2.0**-13, "2.bias": 2.0**-3, "4.weight": 2.0**3}


def perceptron():
    """Three layers, two of them followed by ReLU."""
    return tasks.get("digits-mlp")


@DTYPES
def test_row_4_relu_layers_rescaled_give_the_same_training(dtype, plain):
    base = run("tensor", dtype, task=perceptron())
    moved = run("tensor", dtype, task=perceptron(), prepare=times(lambda n: LAYERS.get(n, 1.0)))
    assert torch.equal(moved.losses, base.losses)
    for (name, p), q in zip(base.model.named_parameters(), weights(moved), strict=True):
        assert torch.equal(p * LAYERS.get(name, 1.0), q)
    assert torch.equal(
        torch.tensor(moved.distance, dtype=torch.float64),
        torch.tensor(base.distance, dtype=torch.float64)
        * torch.tensor([LAYERS.get(n, 1.0) for n in base.block_names], dtype=torch.float64),
    )


def rescale_first(model):
    twins.rescale(model, "convs.0", 2.0**10)


@DTYPES
def test_row_4_convolutions(dtype, plain):
    moved = run("tensor", dtype, prepare=rescale_first)
    assert torch.equal(moved.losses, plain("tensor", dtype).losses)


def test_row_4_is_broken_for_one_distance_and_for_adam():
    assert not torch.equal(run("model", steps=20, prepare=rescale_first).losses, run("model", steps=20).losses)
    adam = [
        train("mnist1d-cnn", lambda p: ScaledSGD(p, 1e-2), steps=20, prepare=q, evaluations=1).losses for q in (None, rescale_first)
    ]
    assert not torch.equal(*adam)


def powers(k):
    return 4.0 ** ((7 * k) % 11 - 5)


@DTYPES
@PER
def test_row_5_the_scaling_times_any_positive_sequence(per, dtype):
    moved, plain = run(per, dtype, scaling=scalings.Multiplied("adam", powers)), run(per, dtype, fused=False)
    assert same(weights(moved), weights(plain)) and torch.equal(moved.losses, plain.losses)


@PER
def test_rmsprop_and_adam_scalings_differ_by_a_common_factor_and_so_not_at_all(per):
    adam, rmsprop = (run(per, torch.float64, steps=20, scaling=s) for s in ("adam", "rmsprop"))
    assert all(torch.allclose(p, q, rtol=1e-8, atol=1e-12) for p, q in zip(weights(adam), weights(rmsprop), strict=True))
    none = run(per, torch.float64, steps=20, scaling="none")
    assert not all(torch.allclose(p, q, rtol=1e-3) for p, q in zip(weights(adam), weights(none), strict=True))


# --- the naive transfer, and plain sums -------------------------------------------------------------

class Variant(DAdaptation):
    """The estimator without one of its ingredients, for one block."""

    def __init__(self, *, ruler=True, own_time=False, forget=True):
        super().__init__(1e-6, math.inf, relative=False)
        self.ruler, self.own_time, self.forget = ruler, own_time, forget

    def rate(self, blocks, loss):
        if self.ruler:
            return super().rate(blocks, loss)
        delta = self.first_distance(blocks)
        size = blocks.sum(lambda e: over_scaling(e.second_moment, e.alpha_sq).sum(dtype=torch.float64)).sqrt()
        blocks.write("distance", self.learn(blocks, delta, delta / size, torch.ones_like(size)))
        return delta, 1 / size

    def learn(self, blocks, delta, weight, a_sq):
        keep = math.sqrt(blocks.entries[0].group["betas"][1]) if self.forget else 1.0
        new = 1 - keep if self.forget else 1.0
        progress = blocks.sum(lambda e: dot(e.grad, e.state["initial"] - e.param))
        numerator = keep * blocks.read("distance_numerator", 0.0) + new * weight * progress
        blocks.write("distance_numerator", numerator)

        def square(e):
            s = e.state["weighted_grad_sum"]
            s.mul_(keep).add_(over_scaling(e.grad, e.alpha_sq.sqrt()) if self.own_time else e.grad, alpha=new * weight.item())
            return dot(s, s if self.own_time else over_scaling(s, e.alpha_sq))

        norm = (blocks.sum(square) * a_sq).sqrt()
        return torch.maximum(delta, torch.where(norm > 0, numerator / norm, 0.0))


def variant(params, **switches):
    opt = PSDASGD(params, per="model")
    opt.estimator = Variant(**switches)
    return opt


def test_the_variant_with_every_ingredient_is_the_library():
    ours, theirs = (
        train("digits-mlp", f, steps=30, dtype=torch.float64, evaluations=1).losses
        for f in (lambda p: PSDASGD(p, per="model"), variant)
    )
    assert torch.allclose(ours, theirs, rtol=1e-9)


def steep_then_flat(seed):
    """A steep block that is soon done, and a gentle one: (parameters, loss, largest distance, distances)."""
    g = torch.Generator().manual_seed(seed)
    steep, gentle = torch.rand(2, 10, generator=g, dtype=torch.float64) + 0.5
    x = [nn.Parameter(torch.zeros(10, dtype=torch.float64)) for _ in range(2)]
    return x, lambda: 1e4 * (steep - x[0]).clamp(min=0).sum() + (gentle - x[1]).abs().sum(), torch.stack([steep, gentle])


@pytest.mark.parametrize("seed", range(3))
def test_the_naive_transfer_exceeds_the_distance_and_ours_does_not(seed):
    largest = {}
    kinds = {"ours": {}, "own time": dict(own_time=True, forget=False), "direct": dict(ruler=False, own_time=True, forget=False)}
    for name, switches in kinds.items():
        x, loss, away = steep_then_flat(seed)
        opt, ratios = variant(x, **switches), []
        for _ in range(500):
            opt.zero_grad()
            loss().backward()
            opt.step()
            scaled = torch.stack([opt.state[p]["alpha_sq"] for p in x]) * away.square()
            ratios.append((opt.distance.item() / (away.max() if opt.estimator.ruler else scaled.sum().sqrt())).item())
        largest[name] = max(ratios)
    assert largest["ours"] < 1 < 1.3 < largest["own time"] and largest["direct"] > 3


def early_block(seed, forget, early=True, steps=1200):
    """Row 8: block A is done early; block B is far away along a narrow valley.  Returns δ over the true distance, at the end."""
    g = torch.Generator().manual_seed(seed)
    near = torch.rand(4, generator=g, dtype=torch.float64) + 0.5
    far = 30 * (torch.rand(2, generator=g, dtype=torch.float64) + 0.5)
    a, b = nn.Parameter(torch.ones(4, dtype=torch.float64)), nn.Parameter(torch.ones(4, dtype=torch.float64))
    opt = PSDASGD([a, b], per="model")
    if not forget:
        opt.estimator = Variant(forget=False)
    for _ in range(steps):
        opt.zero_grad()
        across, along = b[:2] - b[2:] - 0.3, (b[:2] + b[2:]) / 2 - 1
        loss = 20 * across.abs().sum() + (along + far).abs().sum()
        if early:
            loss = loss + (a - 1 + near).clamp(min=0).sum()
        else:
            a.grad = torch.zeros_like(a)
        loss.backward()
        opt.step()
    return opt.distance.item() / (far.max().item() + 0.15)  # half of the walls' offset 0.3 comes on top


@pytest.mark.parametrize("seed", range(3))
def test_row_8_a_block_that_converges_early_does_not_stop_the_rest(seed):
    ours, plain_sums, alone = early_block(seed, True), early_block(seed, False), early_block(seed, False, early=False)
    assert ours > 8 * plain_sums  # the margin of the claim
    assert alone > 4 * plain_sums  # it is the early block that stops plain sums
    assert ours <= 1 + 1e-9  # the theorem


# --- relations --------------------------------------------------------------------------------------

def small(dtype=torch.float64, seed=0):
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(5, 8), nn.Tanh(), nn.Linear(8, 1)).to(dtype)
    x, y = torch.randn(2, 32, 5, dtype=dtype), torch.randn(32, 1, dtype=dtype)

    def backward(k=0):
        model.zero_grad()
        loss = (model(x[k % 2]) - y).square().mean()
        loss.backward()
        return loss.item()

    return model, backward


def test_it_is_adam_whose_learning_rate_is_the_distance():
    (left, left_backward), (right, right_backward) = small(), small()
    ours = PSDASGD(left.parameters(), per="model", betas=(0.0, 0.98))
    adam = ScaledSGD(right.parameters(), 1e-6, betas=(0.0, 0.98))
    for k in range(60):
        before = ours.distance.item() if k else 1e-6
        adam.param_groups[0]["lr"] = before
        left_backward(k), right_backward(k)
        ours.step(), adam.step()
        assert math.isclose(ours.effective_lr.item(), before, rel_tol=1e-12)
    assert all(torch.allclose(p, q, rtol=1e-10, atol=1e-13) for p, q in zip(left.parameters(), right.parameters(), strict=True))
    assert ours.distance.item() > 1e-3


@PER
def test_alpha_one_is_d_adaptation_with_a_running_norm(per):
    """Row 6, against the formulas of the docstring written out for α ≡ 1."""
    g = torch.Generator().manual_seed(0)
    x0, x_star, h = torch.rand(3, 6, generator=g, dtype=torch.float64) + 0.5
    p = nn.Parameter(x0.clone())
    opt = PSDASGD([p], per=per, scaling="none", betas=(0.9, 0.98), d0=2.0**-6)
    x, m, v, s, numerator = x0.clone(), torch.zeros(6).double(), torch.zeros(6).double(), torch.zeros(6).double(), 0.0
    delta, b3 = 2.0**-6 * (x0.square().mean().sqrt() if per == "tensor" else 1.0), math.sqrt(0.98)
    for k in range(1, 50):
        p.grad = h * (p.detach() - x_star)
        opt.step()
        grad = h * (x - x_star)
        v = 0.98 * v + 0.02 * grad**2
        size, a = (v.sum() / (1 - 0.98**k)).sqrt(), math.sqrt(6)
        w = delta / (a * size)
        numerator, s = b3 * numerator + (1 - b3) * w * (grad @ (x0 - x)), b3 * s + (1 - b3) * w * grad
        m = 0.9 * m + 0.1 * delta * grad
        x = x - a / size * m / (1 - 0.9**k)
        delta = torch.maximum(torch.as_tensor(delta), numerator / (a * s.norm()))
        assert torch.allclose(p, x, rtol=1e-9) and math.isclose(opt.distance.item(), float(delta), rel_tol=1e-9)


def test_the_state_of_another_optimizer_is_refused_and_changes_nothing():
    x = nn.Parameter(torch.ones(3))
    x.grad = torch.ones(3)
    adamw = torch.optim.AdamW([x], lr=1e-3)
    adamw.step()
    opt = PSDASGD([x])
    with pytest.raises(ValueError, match="the state is another optimizer's"):
        opt.load_state_dict(adamw.state_dict())
    assert opt.param_groups[0]["lr"] == 1.0
    opt.step()
    assert x.isfinite().all()


# --- settings ---------------------------------------------------------------------------------------

@pytest.mark.parametrize(("settings_", "sentence"), [
    (dict(scaling="adams"), "unknown scaling 'adams'"), (dict(scaling=3), "unknown scaling 3"),
    (dict(d0=-1.0), "d0 must be a finite number > 0, not -1.0"), (dict(d0=0.0), "d0 must"), (dict(d0=math.inf), "d0 must"),
    (dict(per="layer"), "per must be one of 'model', 'module', 'tensor', not 'layer'"),
    (dict(betas=(1.0, 0.9)), r"betas\[0\] must be in \[0, 1\), not 1.0"), (dict(betas=(0.9, -0.1)), r"betas\[1\] must be"),
    (dict(betas=(0.9,)), "betas must be a pair"), (dict(growth_rate=1.0), "growth_rate must be > 1, not 1.0"),
    (dict(growth_rate=math.nan), "growth_rate must"), (dict(lr=-1.0), "lr must be a finite number ≥ 0"),
    (dict(travel=-1.0), "travel must be a finite number ≥ 0, not -1.0"),
    (dict(eps=math.nan), "eps must"), (dict(weight_decay=-0.1), "weight_decay must"),
])
def test_a_wrong_setting_gives_a_sentence(settings_, sentence):
    with pytest.raises(ValueError, match=sentence):
        PSDASGD([nn.Parameter(torch.ones(2))], **settings_)


def test_groups_that_share_a_distance_share_beta_2():
    groups = [{"params": [nn.Parameter(torch.ones(2))]}, {"params": [nn.Parameter(torch.ones(2))], "betas": (0.9, 0.9)}]
    with pytest.raises(ValueError, match="shares one distance"):
        PSDASGD(groups, per="model")
    assert len(PSDASGD(groups, per="tensor").param_groups) == 2


def test_sparse_gradients_are_refused_with_a_sentence():
    table = nn.Embedding(4, 3, sparse=True)
    opt = PSDASGD(table.parameters())
    table(torch.tensor([1])).sum().backward()
    with pytest.raises(RuntimeError, match="sparse=False"):
        opt.step()


# --- robustness -------------------------------------------------------------------------------------

def snapshot(opt):
    return copy.deepcopy([opt.state[p] for group in opt.param_groups for p in group["params"]])


def same_state(xs, ys):
    def equal(a, b):
        return torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b

    return all(x.keys() == y.keys() and all(equal(x[k], y[k]) for k in x) for x, y in zip(xs, ys, strict=True))


@PER
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_step_with_a_gradient_that_is_not_finite_is_skipped_whole(per, value):
    model, backward = small()
    opt = PSDASGD(model.parameters(), per=per, fused=False)
    for k in range(5):
        backward(k)
        opt.step()
    before, state = [p.detach().clone() for p in model.parameters()], snapshot(opt)
    backward()
    model[2].bias.grad[0] = value
    with pytest.warns(UserWarning, match="not finite; this step was skipped"):
        opt.step()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        opt.step()
    assert opt.skipped_steps == 2
    assert same([p.detach() for p in model.parameters()], before) and same_state(snapshot(opt), state)
    backward()
    opt.step()
    assert not same([p.detach() for p in model.parameters()], before)


def copies(kind, model, opt, **settings_):
    """The optimizer and its model, taken up again elsewhere."""
    if kind == "deepcopy":
        memo = {}
        return copy.deepcopy(model, memo), copy.deepcopy(opt, memo)
    if kind == "pickle":
        return pickle.loads(pickle.dumps((model, opt)))
    other = small(next(model.parameters()).dtype)[0]
    other.load_state_dict(model.state_dict())
    fresh, saved = PSDASGD(other.parameters(), **settings_), opt.state_dict()
    if kind == "file":
        file = io.BytesIO()
        torch.save(saved, file)
        file.seek(0)
        saved = torch.load(file, weights_only=True)
    fresh.load_state_dict(saved)
    return other, fresh


@PER
@DTYPES
@pytest.mark.parametrize("kind", ["state_dict", "file", "deepcopy", "pickle"])
def test_a_run_taken_up_again_goes_on_bit_for_bit(kind, per, dtype):
    model, _ = small(dtype)
    opt = PSDASGD(model.parameters(), per=per)
    data = torch.randn(3, 16, 5, dtype=dtype, generator=torch.Generator().manual_seed(3))

    def step(net, optimizer, k):
        optimizer.zero_grad()
        net(data[k % 3]).sub(data[k % 3].sum(1, keepdim=True)).square().mean().backward()
        optimizer.step()

    for k in range(25):
        step(model, opt, k)
    other, again = copies(kind, model, opt, per=per)
    for k in range(25, 50):
        step(model, opt, k)
        step(other, again, k)
    assert same([p.detach() for p in model.parameters()], [p.detach() for p in other.parameters()])
    assert same_state(snapshot(opt), snapshot(again))
    assert torch.equal(opt.distance, again.distance) and again.per == per


@PER
def test_the_distance_never_shrinks_and_grows_at_most_by_the_growth_rate(per):
    jumps = {}
    for rate in (math.inf, 1.1):
        model, backward = small()
        opt, path = PSDASGD(model.parameters(), per=per, growth_rate=rate), []
        for k in range(80):
            backward(k)
            opt.step()
            path.append(opt.distance)
        ratios = torch.stack(path)[1:] / torch.stack(path)[:-1]
        assert (ratios >= 1).all()
        jumps[rate] = ratios.max().item()
    assert jumps[1.1] <= 1.1 * (1 + 1e-12) and jumps[math.inf] > 1.2


@PER
def test_parameters_without_a_gradient_wait_and_join_late(per):
    x, late, never = (nn.Parameter(torch.ones(3)) for _ in range(3))
    opt = PSDASGD([x, late, never], per=per)
    opt.step()
    assert not opt.state[x]  # no gradient anywhere: nothing happens
    for k in range(40):
        x.grad = torch.ones(3)
        late.grad = torch.ones(3) if k >= 20 and k % 2 == 0 else None
        before = late.detach().clone()
        opt.step()
        assert torch.equal(before, late) == (late.grad is None)
    assert torch.equal(never, torch.ones(3)) and opt.state[late]["step"] == 10 and not opt.state[never]
    assert torch.isfinite(x).all() and torch.isfinite(late).all() and (late < 1).all()
    if per == "tensor":
        assert opt.distance[:2].isfinite().all() and opt.distance[2].isnan()


def zero_started(loss_scale=1.0, units=(1.0, 1.0, 1.0), dtype=torch.float32, steps=60, names=("weight", "zero", "other")):
    """A perceptron whose hidden bias starts at zero, each tensor in its own unit; the parameters mapped back, and δ."""
    g = torch.Generator().manual_seed(0)
    weight, other = torch.randn(8, 4, generator=g, dtype=dtype), torch.randn(1, 8, generator=g, dtype=dtype)
    x = torch.randn(32, 4, generator=g, dtype=dtype)
    p = [nn.Parameter(t / u) for t, u in zip((weight, torch.zeros(8, dtype=dtype), other), units, strict=True)]
    opt = PSDASGD(p)
    for _ in range(steps):
        opt.zero_grad()
        w, b, o = (u * t for u, t in zip(units, p, strict=True))
        (loss_scale * ((torch.tanh(x @ w.T + b) @ o.T) - x.sum(1, keepdim=True)).square().mean()).backward()
        opt.step()
    return [(u * t).detach() for u, t in zip(units, p, strict=True)], opt.distance * torch.tensor(units, dtype=torch.float64)


@DTYPES
def test_a_tensor_that_starts_at_zero_wakes_up_and_keeps_units_and_loss_scale_exact(dtype):
    params, distance = zero_started(dtype=dtype)
    assert params[1].abs().max() > 0 and (distance > 0).all()
    for other in (zero_started(2.0**-8, dtype=dtype), zero_started(1.0, (2.0**4, 2.0**-6, 2.0**3), dtype=dtype)):
        assert same(params, other[0]) and torch.equal(distance, other[1])


def test_a_start_at_zero_everywhere_moves():
    x = nn.Parameter(torch.zeros(4, dtype=torch.float64))
    opt = PSDASGD([x])
    for _ in range(200):
        opt.zero_grad()
        (x - torch.tensor([1.0, -2.0, 3.0, 0.5])).abs().sum().backward()
        opt.step()
    assert opt.distance.item() > 0.1 and opt.distance.item() <= 3
    assert (x - torch.tensor([1.0, -2.0, 3.0, 0.5])).abs().max() < 1


def test_a_zero_tensor_without_a_gradient_sleeps_and_wakes():
    x, sleeper = nn.Parameter(torch.ones(3)), nn.Parameter(torch.zeros(3))
    opt = PSDASGD([x, sleeper])
    for k in range(30):
        x.grad, sleeper.grad = torch.ones(3), torch.full((3,), float(k >= 10))
        opt.step()
        assert (sleeper.detach().abs().max() > 0) == (k >= 10)
    assert torch.isfinite(sleeper).all() and torch.isfinite(opt.distance).all()


@PER
@pytest.mark.parametrize("scaling", ["adam", "amsgrad", "adagrad", "rmsprop", "none"])
def test_dead_coordinates_stay_and_add_nothing(per, scaling):
    """Next to coordinates whose gradient is always zero, the others move as they would alone."""
    alone, crowd, dead = nn.Parameter(torch.ones(4).double()), nn.Parameter(torch.ones(8).double()), nn.Parameter(torch.ones(3).double())
    left, right = PSDASGD([alone], per=per, scaling=scaling), PSDASGD([crowd, dead], per=per, scaling=scaling)
    h = torch.tensor([1.0, 0.1, 2.0, 0.5], dtype=torch.float64)
    for _ in range(100):
        alone.grad = h * alone.detach()
        crowd.grad = torch.cat([h * crowd.detach()[:4], torch.zeros(4)])
        dead.grad = torch.zeros(3, dtype=torch.float64)
        left.step(), right.step()
    assert torch.equal(crowd[4:], torch.ones(4)) and torch.equal(dead, torch.ones(3)) and torch.isfinite(crowd).all()
    assert (crowd[:4] < 0.99).all()
    if scaling != "none":  # there α ≡ 1 counts every coordinate
        assert torch.allclose(crowd[:4], alone, rtol=1e-9, atol=1e-15)


@PER
def test_a_group_added_in_mid_run_joins(per):
    x, y = nn.Parameter(torch.ones(3)), nn.Parameter(torch.ones(3))
    opt = PSDASGD([x], per=per)
    for k in range(60):
        if k == 30:
            known = opt.distance.clone()
            opt.add_param_group({"params": [y], "weight_decay": 0.0})
        opt.zero_grad()
        ((x - 3).square().sum() + (y + 2).square().sum() * (k >= 30)).backward()
        opt.step()
    assert (y < 1).all() and torch.isfinite(opt.distance).all() and (opt.distance.flatten()[0] >= known[0])
    assert opt.distance.shape == ((1,) if per == "model" else (2,))
    if per == "model":
        assert torch.equal(opt.state[x]["distance"], opt.state[y]["distance"])


@PER
def test_a_scheduler_drives_lr_and_may_start_at_zero(per):
    model, backward = small()
    opt = PSDASGD(model.parameters(), per=per)
    warmup = torch.optim.lr_scheduler.LambdaLR(opt, lambda k: min(1.0, k / 10))
    start = [p.detach().clone() for p in model.parameters()]
    first = backward()
    opt.step()
    assert same([p.detach() for p in model.parameters()], start) and (opt.effective_lr == 0).all()
    warmup.step()
    for k in range(150):
        last = backward(k)
        opt.step(), warmup.step()
    assert math.isfinite(last) and last < 0.9 * first


def test_weight_decay_is_a_fraction_and_keeps_units_exact():
    def decayed(u, decay=2.0**-4):
        p, q = nn.Parameter(torch.tensor([3.0, -1.0]) / u), nn.Parameter(torch.tensor([2.0, 5.0]))
        opt = PSDASGD([{"params": [p], "weight_decay": decay}, {"params": [q]}])
        for _ in range(40):
            opt.zero_grad()
            ((u * p - 1).square().sum() + q.square().sum()).backward()
            opt.step()
        return u * p.detach(), q.detach()

    base = decayed(1.0)
    assert same(base, decayed(2.0**7)) and torch.equal(base[1], decayed(1.0, 0.0)[1])
    assert not torch.equal(base[0], decayed(1.0, 0.0)[0])
    lone = nn.Parameter(torch.ones(2))
    lone.grad = torch.tensor([0.0, 0.0])
    opt = PSDASGD([lone], lr=0.5, weight_decay=0.25)
    opt.step()
    assert torch.equal(lone, torch.full((2,), 1 - 0.125))


def test_weight_decay_differs_from_group_to_group():
    p, q = nn.Parameter(torch.ones(2)), nn.Parameter(torch.ones(2))
    opt = PSDASGD([{"params": [p], "weight_decay": 0.5}, {"params": [q], "weight_decay": 0.25}], per="model")
    p.grad, q.grad = torch.zeros(2), torch.zeros(2)
    opt.step()
    assert torch.equal(p, torch.full((2,), 0.5)) and torch.equal(q, torch.full((2,), 0.75))


@PER
@pytest.mark.parametrize("half", [torch.bfloat16, torch.float16])
def test_half_precision_parameters_keep_float32_statistics(per, half):
    p = nn.Parameter(torch.randn(16, generator=torch.Generator().manual_seed(0)).to(half))
    opt = PSDASGD([p], per=per, d0=1e-3)
    for _ in range(100):
        opt.zero_grad()
        (p.float() - 2).abs().sum().backward()
        opt.step()
    assert p.dtype == half and (p.float() - 2).abs().mean() < 1
    assert {opt.state[p][n].dtype for n in ("exp_avg", "exp_avg_sq", "weighted_grad_sum")} == {torch.float32}
    saved = opt.state_dict()
    fresh = PSDASGD([p], per=per, d0=1e-3)
    fresh.load_state_dict(saved)
    assert same_state(snapshot(opt), snapshot(fresh))


def test_what_the_optimizer_shows():
    model, backward = small()
    tensor, named = PSDASGD(model.parameters()), PSDASGD(model.named_parameters())
    one = PSDASGD(model.parameters(), per="model")
    assert tensor.block_names == ["0", "1", "2", "3"] and one.block_names == ["model"]
    assert named.block_names == [n for n, _ in model.named_parameters()]
    assert tensor.distance.shape == (4,) and tensor.distance.isnan().all() and one.effective_lr.isnan().all()
    backward()
    before = [p.detach().clone() for p in model.parameters()]
    tensor.step()
    assert tensor.distance.dtype == torch.float64 and one.distance.shape == (1,)
    rms = torch.stack([p.double().square().mean().sqrt() for p in before])
    assert torch.allclose(tensor.effective_lr, rms * 2.0**-8)  # at the first step δ = d0·rms(x₀)
    for p, q, eta in zip(before, model.parameters(), tensor.effective_lr, strict=True):
        assert torch.allclose((p - q).abs(), eta.expand_as(p))  # |m̂|/α² = 1 at the first step


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("steps, sign, said", [(100, -1, 1), (99, -1, 0), (100, 1, 0)], ids=["circling", "early", "going on"])
def test_a_distance_that_never_grew_is_worth_a_word_once(steps, sign, said, fused):
    """Gradients that change their sign say nothing about the way; those that keep it do."""
    x = nn.Parameter(torch.ones(20))
    opt = PSDASGD([x], fused=fused)
    for k in range(steps):
        x.grad = torch.full_like(x, sign**k)
        opt.step()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(2):
            opt.state_dict()
    assert [f"after {steps} steps no distance has grown" in str(w.message) for w in caught] == [True] * said


def test_maximize_climbs():
    down, up = nn.Parameter(torch.ones(2)), nn.Parameter(torch.ones(2))
    a, b = PSDASGD([down]), PSDASGD([up], maximize=True)
    for _ in range(30):
        down.grad, up.grad = 2 * down.detach(), -2 * up.detach()
        a.step(), b.step()
    assert torch.equal(down, up)


def test_alpha_is_held_between_refreshes():
    model, backward = small()
    opt = PSDASGD(model.parameters(), scaling=scalings.Adam(refresh=5))
    held = []
    for k in range(15):
        backward(k)
        opt.step()
        held.append(opt.state[model[0].weight]["alpha_sq"].clone())
    changes = [k for k in range(1, 15) if not torch.equal(held[k], held[k - 1])]
    assert changes == [5, 10]


def test_scaling_and_estimator_compose():
    opt = optimizers.ParameterScaled(
        [nn.Parameter(torch.ones(2))], dict(lr=1.0, betas=(0.9, 0.98), eps=0.0, weight_decay=0.0), scaling="adagrad",
        estimator=DAdaptation(1e-3, 2.0, relative=False), per="model",
    )
    assert repr(opt.scaling).startswith("Adagrad") and opt.estimator.growth_rate == 2.0


def test_a_constant_norm_trains_worse_than_a_running_one():
    """D-Adapt SGD divides by the first gradient's norm; the unscaled estimator on the digits, with either."""
    class Constant(DAdaptation):
        def rate(self, blocks, loss):
            delta = self.first_distance(blocks)
            a = blocks.sum(lambda e: e.alpha_sq.sum(dtype=torch.float64)).sqrt()
            self.G = getattr(self, "G", blocks.sum(lambda e: dot(e.grad, over_scaling(e.grad, e.alpha_sq))).sqrt())
            blocks.write("distance", self.learn(blocks, delta, delta / (a * self.G), a * a))
            return delta, a / self.G

    ends = {}
    for constant in (False, True):
        def make(params, constant=constant):
            opt = PSDASGD(params, per="model", scaling="none", betas=(0.0, 0.98))
            opt.estimator = Constant(1e-6, math.inf, relative=False) if constant else opt.estimator
            return opt

        ends[constant] = train("digits-mlp", make, steps=400, evaluations=1).losses[-20:].mean().item()
    assert ends[True] > 5 * ends[False] and ends[False] < 0.3
