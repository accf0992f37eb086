"""`travel`: a distance that the way gone so far can raise; what it is neutral to, what it keeps, and what it costs."""

import itertools
import math
from fractions import Fraction

import pytest
import sympy
import torch
from torch import nn

from pslib import PSDASGD, scalings
from pslib.training import train

B2 = 0.98
FUSED = pytest.mark.parametrize("fused", [False, True], ids=["reference", "fused"])


def test_a_random_walk_of_steps_delta_goes_delta_times_the_root_of_the_sum_of_squares_far():
    """All 2⁶ sequences of signs: the mean square of Σ±γ_iδ is δ²Σγ_i², exactly."""
    gammas, delta = [Fraction(1, k) for k in range(1, 7)], Fraction(3, 7)
    walks = [sum(s * g * delta for s, g in zip(signs, gammas, strict=True)) for signs in itertools.product((1, -1), repeat=6)]
    assert sum(w * w for w in walks) / len(walks) == delta**2 * sum(g * g for g in gammas)


def test_under_pure_noise_the_distance_grows_like_a_power_of_the_number_of_steps():
    """R² ← R² + δ² with δ² = κ²R²/k gives R²_k = R²_1·∏(1 + κ²/i), which grows like k^κ²; so δ grows like k^((κ² − 1)/2)."""
    k = sympy.symbols("k", positive=True)
    for kappa in (1, 2):
        gone = sympy.gamma(k + kappa**2) / (sympy.gamma(k) * sympy.factorial(kappa**2))
        assert sympy.simplify(sympy.expand_func(gone.subs(k, k + 1) / gone) - (1 + sympy.Integer(kappa) ** 2 / k)) == 0
        delta_sq = kappa**2 * gone / k
        power = sympy.limit(sympy.log(sympy.expand_func(delta_sq)) / sympy.log(k), k, sympy.oo)
        assert power == kappa**2 - 1


def grown(noise, travel, fused, steps=60):
    """δ/d0 after steps with gradients that are pure noise or always the same."""
    x = nn.Parameter(torch.ones(4096))
    opt, generator = PSDASGD([x], d0=2.0**-10, travel=travel, fused=fused), torch.Generator().manual_seed(0)
    for _ in range(steps):
        x.grad = torch.randn(4096, generator=generator) if noise else torch.ones(4096)
        opt.step()
    return opt.distance.item() * 2.0**10


@FUSED
def test_one_is_neutral_to_pure_noise_and_sees_a_steady_direction(fused):
    # 4,096 coordinates: the length of their random walk is known to within a few percent, but the first second moments are noisy.
    assert grown(noise=True, travel=0.0, fused=fused) == 1
    assert grown(noise=True, travel=1.0, fused=fused) < 1.3
    assert grown(noise=False, travel=1.0, fused=fused) > 10
    assert grown(noise=True, travel=2.0, fused=fused) > 3


@FUSED
def test_the_distance_is_the_way_gone_over_the_root_of_the_sum_of_squares_of_the_schedule(fused):
    x = nn.Parameter(torch.ones(16, dtype=torch.float64))
    # Equal gradients without momentum go γδ at each step; the factor is so large that the bound does not matter.
    opt = PSDASGD([x], d0=0.125, travel=8.0, betas=(0.0, B2), fused=fused)
    for lr in (1.0, 0.5, 0.5):
        opt.param_groups[0]["lr"] = lr
        x.grad = torch.ones_like(x)
        opt.step()
        if lr == 1.0:
            assert opt.distance.item() == 0.125  # nothing was gone before the first step
    # 0.125 was gone in the first step, so that the second made δ = 8 · 0.125/√1² and went 0.125 · 0.5 far with the old one.
    assert opt.distance.item() == pytest.approx(max(1.0, 8 * (0.125 + 0.0625) / math.sqrt(1.25)), rel=1e-12)


def run(fused=None, dtype=torch.float32, **settings):
    return train("digits-vit", lambda params: PSDASGD(params, fused=fused, **settings), steps=30, evaluations=3, dtype=dtype)


@pytest.mark.parametrize("settings", [{}, {"per": "model", "d0": 2.0**-8}, {"per": "module"}, {"units": "tensor"}, {"slice_p": 2}], ids=str)
def test_fast_path_and_reference_agree_and_it_changes_the_training(settings):
    reference, fast = (run(fused, torch.float64, travel=2.0, **settings) for fused in (False, True))
    # Sums in another order, over thirty steps in double precision; the gradient of a key's bias is nothing but rounding.
    sound = [i for i, name in enumerate(fast.block_names) if not name.endswith("key.bias")]
    assert torch.allclose(reference.losses, fast.losses, rtol=1e-9, atol=0)
    assert all([a[i] for i in sound] == pytest.approx([b[i] for i in sound], rel=1e-9)
               for a, b in zip(reference.distance, fast.distance, strict=True))
    off = run(None, torch.float64, **settings)
    assert all(a >= b for a, b in zip(fast.distance[0], off.distance[0], strict=True)) and fast.distance[-1] != off.distance[-1]


def noisy_descent(factors=(1.0, 1.0), loss_factor=1.0, fused=False, steps=40, **settings):
    """Two tensors, each in its own unit, under a noisy convex loss."""
    generator = torch.Generator().manual_seed(0)
    xs = [nn.Parameter(c * torch.randn(shape, generator=generator)) for c, shape in zip(factors, ((6, 5), (4,)), strict=True)]
    opt, noise = PSDASGD(xs, travel=2.0, fused=fused, **settings), torch.Generator().manual_seed(1)
    for _ in range(steps):
        opt.zero_grad()
        loss = 0.0
        for x, c in zip(xs, factors, strict=True):
            y = x / c
            loss = loss + (y - 3).square().sum() + 4 * (y * torch.randn(y.shape, generator=noise)).sum()
        (loss_factor * loss).backward()
        opt.step()
    return [x.detach() / c for x, c in zip(xs, factors, strict=True)]


@FUSED
def test_units_of_each_tensor_and_the_scale_of_the_loss_do_not_matter_bit_for_bit(fused):
    plain = noisy_descent(fused=fused)
    for other in (noisy_descent((2.0**9, 2.0**-7), fused=fused), noisy_descent(loss_factor=2.0**10, fused=fused)):
        assert all(torch.equal(x, y) for x, y in zip(plain, other, strict=True))


def test_a_number_that_multiplies_the_scaling_does_not_matter_bit_for_bit():
    moved = noisy_descent(scaling=scalings.Multiplied("adam", lambda k: 4.0 ** (k % 7 - 3)))
    assert all(torch.equal(x, y) for x, y in zip(noisy_descent(), moved, strict=True))


@FUSED
def test_steps_without_a_gradient_do_not_count(fused):
    def distances(idle):
        x, y = nn.Parameter(torch.ones(64)), nn.Parameter(torch.ones(64))
        opt = PSDASGD([x, y], travel=4.0, fused=fused)
        for k in range(12):
            x.grad, y.grad = torch.ones(64), None if idle and k % 2 else torch.ones(64)
            opt.step()
        return opt.distance.tolist(), opt.state[y]["schedule_sq"].item()

    (_, idle), squares = distances(idle=True)
    assert squares == 6 and idle < distances(idle=False)[0][1]


@FUSED
def test_a_state_goes_on_bit_for_bit_and_one_of_before_knows_how_many_steps_it_took(fused):
    def fresh(travel):
        x = nn.Parameter(torch.linspace(1, 2, 64))
        return x, PSDASGD([x], travel=travel, fused=fused)

    def go(x, opt, steps):
        for k in steps:
            x.grad = torch.sin(torch.arange(64) * (k + 1.0)) + 0.3
            opt.step()
        return x.detach().clone()

    x, opt = fresh(2.0)
    go(x, opt, range(10))
    y, other = fresh(2.0)
    y.data.copy_(x.data)
    other.load_state_dict(opt.state_dict())
    assert torch.equal(go(x, opt, range(10, 20)), go(y, other, range(10, 20)))
    x, opt = fresh(0.0)
    go(x, opt, range(10))
    old = opt.state_dict()
    assert "schedule_sq" not in old["state"][0]
    y, other = fresh(2.0)
    other.load_state_dict(old)
    assert other.state[y]["schedule_sq"].item() == 10


def test_the_price_is_that_the_distance_is_no_lower_bound_any_more():
    """f(x) = |x − 2|, seen from 1: the distance to the solution is 1, and a large factor claims more; without it, never."""
    def learned(travel):
        x = nn.Parameter(torch.ones(1, dtype=torch.float64))
        opt = PSDASGD([x], travel=travel, betas=(0.0, B2))
        for _ in range(200):
            opt.zero_grad()
            (x - 2).abs().sum().backward()
            opt.step()
        return opt.distance.item()

    assert learned(0.0) <= 1 < learned(4.0)
