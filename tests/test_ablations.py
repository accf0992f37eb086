"""The parts that the ablations change: each variant computes what its name says, and nothing else is changed."""

import math

import pytest
import torch

from pslib import PSDASGD, scalings
from pslib.ablations import WEIGHTS, Frozen, ScaledDoG, Variant
from pslib.contenders import make
from pslib.training import train

B2 = 0.98
B3 = math.sqrt(B2)


def leaves(factor=1.0, dtype=torch.float64):
    """A matrix and a vector far from their targets, in units multiplied by `factor`."""
    generator = torch.Generator().manual_seed(0)
    return [torch.nn.Parameter(factor * torch.randn(*shape, generator=generator).to(dtype)) for shape in ((6, 5), (4,))]


def noisy_losses(xs, generator, factor=1.0):
    """A quadratic plus linear noise; its unit does not depend on that of x."""
    loss = 0.0
    for x in xs:
        y = x / factor
        loss = loss + (y - 3).square().sum() + (y * torch.randn(y.shape, generator=generator, dtype=torch.float32).to(y)).sum()
    return loss


def descend(optimizer_of, steps=30, factor=1.0, watch=None, dtype=torch.float64):
    """Optimize `leaves`; `watch(optimizer, xs)` is called after every step."""
    xs, generator = leaves(factor, dtype), torch.Generator().manual_seed(1)
    optimizer = optimizer_of(xs)
    for _ in range(steps):
        optimizer.zero_grad()
        loss = noisy_losses(xs, generator, factor)
        loss.backward()
        optimizer.step(loss=loss) if isinstance(optimizer, Variant) else optimizer.step()
        if watch is not None:
            watch(optimizer, xs)
    return optimizer, xs


def test_without_a_change_the_variant_is_the_optimizer_bit_for_bit():
    runs = [
        train("digits-vit", lambda p, name=name, kw=kw: make(name, p, **kw), steps=25, evaluations=2)
        for name, kw in (("psdasgd-variant", {}), ("psdasgd-tensor", {"fused": False}))
    ]
    assert torch.equal(runs[0].losses, runs[1].losses)
    assert runs[0].distance == runs[1].distance


CHANGES = [
    {"weights": "square"}, {"weights": "uniform"}, {"weights": "growing"}, {"beta3": 0.9}, {"beta3": 1.0}, {"cap": 2.0},
    {"storage": "bfloat16"}, {"refresh": 5}, {"frozen": 3}, {"scaling": "adagrad"},
]


@pytest.mark.parametrize("change", CHANGES, ids=str)
def test_a_change_changes_something_and_keeps_the_units_exact(change):
    plain, there = (descend(lambda xs, kw=kw: Variant(xs, **kw))[1] for kw in ({}, change))
    assert not all(torch.equal(x, y) for x, y in zip(plain, there, strict=True))
    _, moved = descend(lambda xs: Variant(xs, **change), factor=2.0**9)
    assert all(torch.equal(x * 2.0**9, y) for x, y in zip(there, moved, strict=True))


@pytest.mark.parametrize(("weights", "beta3"), [*((w, None) for w in WEIGHTS), ("distance", 0.0), ("distance", 0.7), ("distance", 1.0)])
def test_numerator_and_sum_are_what_the_weights_and_the_memory_say(weights, beta3):
    """Recomputed from the gradients of one tensor, step by step, without the estimator."""
    kept, new = (B3, 1 - B3) if beta3 is None else (beta3, 1 - beta3 if beta3 < 1 else 1.0)
    x = torch.nn.Parameter(torch.linspace(1, 2, 8, dtype=torch.float64))
    optimizer, start = Variant([x], weights=weights, beta3=beta3), x.detach().clone()
    v, n, s, delta = torch.zeros_like(start), 0.0, torch.zeros_like(start), 2.0**-8 * start.square().mean().sqrt()
    generator = torch.Generator().manual_seed(3)
    for k in range(1, 13):
        x.grad = (x.detach() - 3) + torch.randn(8, generator=generator, dtype=torch.float64)
        g, before = x.grad.clone(), x.detach().clone()
        optimizer.step(loss=1.0)
        v = B2 * v + (1 - B2) * g * g
        alpha_sq = (v / (1 - B2**k)).sqrt()
        # Under Adam's scaling G = a, so w = γδ/a² times the factor.
        w = delta / alpha_sq.sum() * {"distance": 1.0, "square": delta, "uniform": 1 / delta, "growing": math.sqrt(k)}[weights]
        n, s = kept * n + new * w * (g * (start - before)).sum(), kept * s + new * w * g
        bound = n / ((s * s / alpha_sq).sum() * alpha_sq.sum()).sqrt()
        delta = max(delta, bound)
        # Rounding of sums in another order, over a dozen steps.
        assert optimizer.distance.item() == pytest.approx(float(delta), rel=1e-10)
    assert delta > 2.0**-8 * start.square().mean().sqrt()


def test_a_frozen_scaling_is_adams_up_to_its_step_and_then_stays():
    seen = {"frozen": [], "adam": []}

    def watch(name):
        return lambda optimizer, xs: seen[name].append(optimizer.state[xs[0]]["alpha_sq"].clone())

    descend(lambda xs: Variant(xs, frozen=4), 8, watch=watch("frozen"))
    descend(lambda xs: Variant(xs), 8, watch=watch("adam"))
    assert all(torch.equal(a, b) for a, b in zip(seen["frozen"][:4], seen["adam"][:4], strict=True))
    assert all(torch.equal(a, seen["frozen"][3]) for a in seen["frozen"][4:])
    assert not torch.equal(seen["adam"][4], seen["adam"][3])


def test_a_refreshed_scaling_inside_a_frozen_one_keeps_its_own_rhythm():
    frozen = Frozen(scalings.Adam(refresh=2), after=3)
    state, seen = {"exp_avg_sq": torch.zeros(1)}, []
    for k in range(1, 6):
        state["step"], state["exp_avg_sq"] = k, state["exp_avg_sq"] + k
        seen.append(frozen.update(state, torch.ones(1), 0.0, 0.0).item())
    assert seen[0] == seen[1] != seen[2] and seen[2] == seen[3] == seen[4]


def test_the_cap_shortens_a_step_that_expects_more_than_the_loss_over_c():
    """On f = Σx²/2 without momentum the expected decrease is ⟨g, Δx⟩; d0 is far too large on purpose."""
    def one_step(cap):
        x = torch.nn.Parameter(torch.tensor([1.0, -2.0, 3.0], dtype=torch.float64))
        optimizer = Variant([x], betas=(0.0, B2), d0=100.0, cap=cap)
        loss = x.square().sum() / 2
        loss.backward()
        before = x.detach().clone()
        optimizer.step(loss=loss)
        return (x.grad * (before - x.detach())).sum().item(), loss.item()

    uncapped, loss = one_step(None)
    assert uncapped > 100 * loss
    for c in (0.5, 2.0):
        # Sums in another order.
        assert one_step(c)[0] == pytest.approx(loss / c, rel=1e-12)
    assert one_step(1e-6)[0] == uncapped


def test_storage_in_bfloat16_leaves_nothing_finer_in_the_state():
    optimizer, xs = descend(lambda xs: Variant(xs, storage="bfloat16"), dtype=torch.float32)
    for x in xs:
        for name in ("initial", "weighted_grad_sum"):
            kept = optimizer.state[x][name]
            assert torch.equal(kept, kept.bfloat16().float()) and kept.abs().sum() > 0


def test_dog_without_scaling_is_the_rule_of_its_authors():
    """η_k = max(r, max_i‖x_i − x₀‖)/√Σ‖g_i‖², with r = d0‖x₀‖, recomputed by hand."""
    x = torch.nn.Parameter(torch.tensor([1.0, 2.0, 2.0], dtype=torch.float64))
    optimizer, start = ScaledDoG([x], betas=(0.0, B2), scaling="none"), x.detach().clone()
    y, squares, furthest = start.clone(), 0.0, 2.0**-8 * start.norm().item()
    for _ in range(40):
        x.grad = x.detach() - 3
        optimizer.step()
        g = y - 3
        squares += (g * g).sum().item()
        furthest = max(furthest, (y - start).norm().item())
        y = y - furthest / math.sqrt(squares) * g
        assert torch.allclose(x.detach(), y, rtol=1e-12, atol=0)  # the same sums, divided and multiplied by the number of coordinates
    assert optimizer.distance.item() * math.sqrt(3) == pytest.approx(furthest, rel=1e-12)


def test_dog_does_not_see_a_number_that_multiplies_the_scaling_nor_the_units():
    def run(factor=1.0, scaling="adam"):
        return descend(lambda xs: ScaledDoG(xs, scaling=scaling), factor=factor)[1]

    plain = run()
    times = run(scaling=scalings.Multiplied("adam", lambda k: 4.0 ** (k % 5)))
    assert all(torch.equal(x, y) for x, y in zip(plain, times, strict=True))
    assert all(torch.equal(x * 2.0**9, y) for x, y in zip(plain, run(2.0**9), strict=True))


@pytest.mark.parametrize(("setting", "sentence"), [
    ({"weights": "cubic"}, "weights must be one of 'distance', 'square', 'uniform', 'growing', not 'cubic'"),
    ({"beta3": 1.5}, r"beta3 must be in \[0, 1\], not 1.5"),
])
def test_a_wrong_setting_is_refused(setting, sentence):
    with pytest.raises(ValueError, match=sentence):
        Variant(leaves(), **setting)


def test_the_optimizer_of_the_library_has_none_of_these_settings():
    with pytest.raises(TypeError):
        PSDASGD(leaves(), weights="square")
