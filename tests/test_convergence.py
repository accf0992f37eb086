"""The theorems and counter-examples of the chapter on convergence: exact where fractions can say it, else against the library."""

import itertools
import math
from fractions import Fraction
from random import Random

import numpy as np
import pytest
import sympy as sp
import torch
from torch import nn

from pslib import PSDASGD, PSSPS, ScaledSGD, scalings
from pslib.training import train

# Float64 runs of at most some hundred steps: their rounding stays far below this part of the quantities compared.
ROUNDING = 1e-9


class Prescribed(scalings.Scaling):
    """α² as a given function of the step's number, from 1 on."""

    def __init__(self, at):
        super().__init__()
        self.at = at

    def compute(self, state, beta2, eps):
        return self.at(state["step"])


def number(rng, low=-20, high=20):
    return Fraction(rng.randint(low, high), rng.randint(1, 5))


def dot(x, y):
    return sum((p * q for p, q in zip(x, y, strict=True)), Fraction(0))


# --- regret -----------------------------------------------------------------------------------------

def regret_and_bound(losses, h, beta, u, width):
    """|a·x − b| or a·x one after another on the box [−1, 1]ⁿ (or everywhere, for width None), exact.

    Returns the regret against u and the bound; without a box D∞ is what the run had.
    """
    n = len(u)
    x, m, regret, squares, far = [Fraction(1)] * n, [Fraction(0)] * n, Fraction(0), Fraction(0), Fraction(0)
    for (a, b, linear), h_k in zip(losses, h, strict=True):
        value, other = dot(a, x) - b, dot(a, u) - b
        g = a if linear or value > 0 else [-p for p in a]
        regret += (value if linear else abs(value)) - (other if linear else abs(other))
        squares += sum(p * p / q for p, q in zip(g, h_k, strict=True))
        far = max(far, *(abs(p - q) for p, q in zip(x, u, strict=True)))
        m = [beta * p + (1 - beta) * q for p, q in zip(m, g, strict=True)]
        x = [p - q / r for p, q, r in zip(x, m, h_k, strict=True)]
        if width is not None:
            x = [max(Fraction(-1), min(Fraction(1), p)) for p in x]
    size = far if width is None else width
    return regret, (size**2 * sum(h[-1]) / 2 + (1 + beta) / 2 * squares) / (1 - beta)


@pytest.mark.parametrize("beta", [Fraction(0), Fraction(1, 2), Fraction(9, 10)])
@pytest.mark.parametrize("width", [Fraction(2), None], ids=["box", "no projection"])
def test_the_regret_bound_holds_exactly(beta, width):
    rng, closest = Random(0), Fraction(0)
    for _ in range(120):
        n, steps = rng.randint(1, 3), rng.randint(1, 9)
        losses = [([number(rng) for _ in range(n)], number(rng), rng.random() < 0.5) for _ in range(steps)]
        h = [[Fraction(rng.randint(1, 9), 3) for _ in range(n)]]
        while len(h) < steps:
            h.append([p + rng.choice((0, abs(number(rng)))) for p in h[-1]])
        regret, bound = regret_and_bound(losses, h, beta, [number(rng, -1, 1) for _ in range(n)], width)
        assert regret <= bound
        closest = max(closest, regret / bound)
    assert closest > (1 - beta) / 3  # a bound that nothing comes near would test nothing


def test_the_regret_bound_is_tight_for_one_step():
    # f = a·x from x = 1 on [−1, 1] against −1 with h = a/2: regret 2a, bound 4·(a/2)/2 + a²/(2·a/2) = 2a.
    assert regret_and_bound([([Fraction(3)], Fraction(0), True)], [[Fraction(3, 2)]], Fraction(0), [Fraction(-1)], Fraction(2)) == (6, 6)


def test_the_regret_bound_needs_the_monotone_quotient():
    losses = [([Fraction(3 if k % 3 == 0 else -1)], Fraction(0), True) for k in range(60)]
    falling = [[10 * abs(a[0])] for a, _, _ in losses]
    regret, bound = regret_and_bound(losses, falling, Fraction(0), [Fraction(-1)], Fraction(2))
    assert regret > bound


def test_the_algebra_of_the_regret_bound():
    T = 5
    h, d, m, x = (sp.symbols(f"{name}1:{T + 2}", positive=name == "h", real=True) for name in "hdmx")
    beta, u, A, b = (*sp.symbols("beta u", real=True), *sp.symbols("A b", positive=True))
    assert sp.expand(h[0] * d[0] ** 2 - h[0] * (d[0] - m[0] / h[0]) ** 2 - 2 * m[0] * d[0] + m[0] ** 2 / h[0]) == 0
    telescoped = sum((h[k] - (h[k - 1] if k else 0)) * d[k] ** 2 for k in range(T)) - h[T - 1] * d[T] ** 2
    assert sp.expand(sum(h[k] * (d[k] ** 2 - d[k + 1] ** 2) for k in range(T)) - telescoped) == 0
    g = [(m[k] - beta * (m[k - 1] if k else 0)) / (1 - beta) for k in range(T)]
    rest = m[T - 1] * (x[T - 1] - u) + sum(m[k] * (x[k] - x[k + 1]) for k in range(T - 1))
    right = sum(m[k] * (x[k] - u) for k in range(T)) + beta / (1 - beta) * rest
    assert sp.simplify(sum(g[k] * (x[k] - u) for k in range(T)) - right) == 0
    H, Q, last = sp.symbols("H Q last", nonnegative=True)
    total = (H + Q) / 2 + beta / (1 - beta) * ((H + last) / 2 + Q - last)
    assert sp.simplify((H + (1 + beta) * Q) / (2 * (1 - beta)) - total - beta * last / (2 * (1 - beta))) == 0
    root, before = sp.sqrt(A + b), sp.sqrt(A)
    assert sp.simplify(2 * root - 2 * before - b / root - (root - before) ** 2 / root) == 0


def test_momentum_does_not_enlarge_the_sum_of_squares():
    """Q(m) ≤ Q(g) when h never falls, exactly; a falling h breaks it."""
    rng, broken = Random(1), 0
    for falls in (False, True):
        for _ in range(200):
            beta, h, m = rng.choice([Fraction(1, 2), Fraction(9, 10)]), Fraction(1), Fraction(0)
            of_m = of_g = Fraction(0)
            for _ in range(6):
                g = number(rng)
                m = beta * m + (1 - beta) * g
                of_m, of_g = of_m + m * m / h, of_g + g * g / h
                h = h / rng.randint(1, 9) if falls else h + abs(number(rng))
            if falls:
                broken += of_m > of_g
            else:
                assert of_m <= of_g
    assert broken > 0


@pytest.mark.parametrize("beta1", [0.0, 0.9])
@pytest.mark.parametrize("scaling", ["adagrad", "amsgrad"])
def test_the_regret_bound_holds_for_the_library(scaling, beta1):
    """Absolute-value regression on [−1, 1]⁴ with gradients over three decades; both the theorem and, at β₁ = 0, the corollary."""
    g = torch.Generator().manual_seed(3)
    rows = torch.randn(250, 4, generator=g, dtype=torch.float64) * torch.logspace(-1, 2, 4, dtype=torch.float64)
    u = 2 * torch.rand(4, generator=g, dtype=torch.float64) - 1
    rate = 2 / math.sqrt(2) * (0.02**0.25 if scaling == "amsgrad" else 1)
    x = nn.Parameter(torch.ones(4, dtype=torch.float64))
    opt, regret, squares, h = ScaledSGD([x], lr=rate, betas=(beta1, 0.98), scaling=scaling), 0.0, 0.0, torch.zeros(4, dtype=torch.float64)
    grads = []
    for k, (a, noise) in enumerate(zip(rows, torch.randn(250, generator=g, dtype=torch.float64), strict=True), 1):
        residual = a @ (x.detach() - u) - noise
        x.grad = a * residual.sign()
        grads.append(x.grad.clone())
        opt.param_groups[0]["lr"] = lr = rate / math.sqrt(k) if scaling == "amsgrad" else rate
        opt.step()
        x.data.clamp_(-1, 1)
        new = opt.state[x]["alpha_sq"] * (1 - beta1**k) / lr
        assert (new >= h * (1 - ROUNDING)).all()  # the assumption
        h, regret = new, regret + (residual.abs() - noise.abs()).item()
        squares += (x.grad**2 / h).sum().item()
        assert regret <= (2 * h.sum().item() + (1 + beta1) / 2 * squares) / (1 - beta1)
        if beta1 == 0:
            G = torch.stack(grads)
            sizes = G.square().sum(0).sqrt().sum() if scaling == "adagrad" else math.sqrt(k) * 0.02**-0.25 * G.abs().amax(0).sum()
            assert regret <= math.sqrt(2) * 2 * sizes
    assert regret > 0


def quotients(optimizer, grads):
    """g/(x − x₊): α²/η of every step of a one-number optimizer without momentum."""
    x = nn.Parameter(torch.zeros(1, dtype=torch.float64))
    opt, found = optimizer([x]), []
    for k, g in enumerate(grads, 1):
        for group in opt.param_groups:
            group["lr"] = 1.0
        before, x.grad = x.item(), torch.full_like(x, g)
        opt.step()
        found.append(g / (before - x.item()) * math.sqrt(k))
    return np.array(found)


@pytest.mark.parametrize("make", [
    lambda p: torch.optim.Adam(p, lr=1.0, betas=(0.0, 0.98), eps=0.0, amsgrad=True),
    lambda p: ScaledSGD(p, lr=1.0, betas=(0.0, 0.98), scaling="amsgrad"),
], ids=["torch", "pslib"])
def test_amsgrads_bias_correction_makes_the_scaling_fall(make):
    with_root = quotients(make, [1.0] + [0.01] * 200)  # α²√k, what η ∝ 1/√k makes of it
    alpha_sq = with_root / np.sqrt(np.arange(1, 202))
    assert (np.diff(alpha_sq) < 0).all() and alpha_sq[-1] < 0.15 * alpha_sq[0]
    assert (np.diff(with_root) > 0).all()
    # The limit of the fall is √(1 − β₂); 201 steps leave √(1 − 0.98²⁰¹), within 1 % of 1.
    assert alpha_sq[-1] / alpha_sq[0] == pytest.approx(math.sqrt(0.02), rel=0.01)


def test_what_the_rates_are_monotone_by():
    beta = Fraction(49, 50)
    means = [(1 - beta**k) / k for k in range(1, 60)]
    assert all(q < p for p, q in itertools.pairwise(means))


def classic(opt, x, steps, rate, C=3.0):
    total, averages, starts = 0.0, [], []
    for k in range(1, steps + 1):
        slope = C if k % 3 == 1 else -1.0
        starts += [x.item()] * (k % 3 == 1)
        total += slope * (x.item() + 1)
        averages.append(total / k)
        x.grad = torch.full_like(x, slope)
        opt.param_groups[0]["lr"] = rate / math.sqrt(k)
        opt.step()
        x.data.clamp_(-1, 1)
    return np.array(averages), np.array(starts)


@pytest.mark.parametrize("rate", [0.05, 0.5, 5.0])
@pytest.mark.parametrize("make", [
    lambda p: torch.optim.Adam(p, lr=1.0, betas=(0.0, 0.1), eps=0.0),
    lambda p: ScaledSGD(p, lr=1.0, betas=(0.0, 0.1), scaling="adam"),
], ids=["torch", "pslib"])
def test_adam_never_leaves_the_worst_point_of_the_classic_problem(make, rate):
    x = nn.Parameter(torch.ones(1, dtype=torch.float64))
    averages, starts = classic(make([x]), x, 450, rate)
    assert (starts == 1).all()  # clamped to exactly 1
    assert (averages[2::3] >= 2 / 3 - ROUNDING).all()


def test_amsgrad_learns_the_classic_problem_under_its_bound():
    x = nn.Parameter(torch.ones(1, dtype=torch.float64))
    rate = 2 * 0.9**0.25 / math.sqrt(2)
    averages, starts = classic(ScaledSGD([x], lr=1.0, betas=(0.0, 0.1), scaling="amsgrad"), x, 900, rate)
    bound = math.sqrt(2) * 2 * 3 * 0.9**-0.25 / np.sqrt(np.arange(1, 901))
    assert (averages <= bound).all() and averages[-1] < 0.2 and starts[-1] < -0.8


def test_the_constants_of_adams_failure():
    """v̂ of the proof, exactly: at least 8.2, at most 1.8 and 1.08; and the steps up outweigh the step down."""
    v, seen = Fraction(0), []
    for k in range(1, 301):
        v = v / 10 + Fraction(9, 10) * (9 if k % 3 == 1 else 1)
        seen.append(v / (1 - Fraction(1, 10**k)))
    assert seen[0] == 9 and min(seen[0::3]) >= Fraction(82, 10)
    assert max(seen[1::3]) <= Fraction(18, 10) and max(seen[2::3]) <= Fraction(108, 100)
    assert (seen[1], seen[2]) == (Fraction(19, 11), Fraction(119, 111))
    up = lambda p, q, k: 1 / sp.sqrt(p * (k + 1)) + 1 / sp.sqrt(q * (k + 2))  # noqa: E731
    R, k = sp.Rational, sp.symbols("k", positive=True)
    assert up(R(19, 11), R(119, 111), 1) > 1 and up(R(9, 5), R(27, 25), 4) > 3 / sp.sqrt(R(41, 5) * 4)
    assert all(sp.simplify(sp.diff(sp.sqrt(k / (k + j)), k)).subs(k, 7) > 0 for j in (1, 2))


# --- Polyak's step ----------------------------------------------------------------------------------

def exact_polyak(seed, c, moving="any", steps=5):
    """A run on |a·x| with random samples, exact: after every step (change + (2 − 1/c)ηgap ≤ 0, sum, P·E₁, D∞²Σα²)."""
    rng = Random(seed)
    n = rng.randint(1, 3)
    x, alpha_sq = [number(rng) + 1 for _ in range(n)], [abs(number(rng)) + 1 for _ in range(n)]
    size = lambda v, a: sum(p * q * q for p, q in zip(a, v, strict=True))  # noqa: E731
    start, P, total, far, found = size(x, alpha_sq), Fraction(1), Fraction(0), Fraction(0), []
    for _ in range(steps):
        a = [number(rng) for _ in range(n)]
        value, q = dot(a, x), sum(p * p / b for p, b in zip(a, alpha_sq, strict=True))
        if not q:
            continue
        far = max(far, *map(abs, x))
        eta = Fraction(rng.randint(1, 4), 4) * abs(value) / (c * q)
        after = [p - eta * r * (1 if value > 0 else -1) / b for p, r, b in zip(x, a, alpha_sq, strict=True)]
        gain = (2 - 1 / c) * eta * abs(value)
        total += gain
        far = max(far, *map(abs, after))
        found.append((size(after, alpha_sq) <= size(x, alpha_sq) - gain, total, P * start, far**2 * sum(alpha_sq)))
        low = {"any": 1, "rises": 6, "falls": 1, "fixed": 6}[moving]
        new = [b * Fraction(rng.randint(low, 6 if moving != "rises" else 12), 6) for b in alpha_sq] if moving != "fixed" else alpha_sq
        P, alpha_sq, x = P * max(Fraction(1), *(p / b for p, b in zip(new, alpha_sq, strict=True))), new, after
    return found


@pytest.mark.parametrize("c", [Fraction(1, 2), Fraction(3, 5), Fraction(1), Fraction(3)])
@pytest.mark.parametrize("moving", ["fixed", "falls", "rises", "any"])
def test_polyaks_steps_hold_exactly_under_a_moving_scaling(c, moving):
    for seed in range(60):
        for step_holds, total, product, domain in exact_polyak(seed, c, moving):
            assert step_holds and total <= product
            if moving in ("fixed", "rises"):
                assert total <= domain


def test_polyaks_guarantee_ends_at_one_half():
    """Below c = ½ the distance itself may grow."""
    rng = Random(0)
    grown = 0
    for _ in range(50):
        x, a = number(rng) + 30, number(rng, 1, 9)
        grown += abs(x - a * x / (Fraction(2, 5) * a * a) * a) > abs(x)
    assert grown == 50


def pssps(x, scaling, **settings):
    return PSSPS([x], scaling=scaling, **{"betas": (0.0, 0.98), "c": 1.0, "d0": math.inf, "growth_rate": math.inf, **settings})


def least_squares(seed, n=5, count=20):
    g = torch.Generator().manual_seed(seed)
    rows, base = torch.randn(count, n, generator=g, dtype=torch.float64), torch.rand(n, generator=g, dtype=torch.float64) + 0.25
    solution, start = torch.randn(2, n, generator=g, dtype=torch.float64)
    return g, rows, base, solution, start


def sps_run(rows, solution, start, at, steps, c=1.0, floor=0.0, shift=0.0, **settings):
    """½(a·(x − x*))² + shift, samples in turn: per step (E before, E after in the same scaling, η, gap, gradient norm²)."""
    x, found = nn.Parameter(start.clone()), []
    opt = pssps(x, Prescribed(at), c=c, f_star=floor, **settings)
    for k in range(1, steps + 1):
        a, a_sq, away = rows[k % len(rows)], at(k), x.detach() - solution
        loss, x.grad = (a @ away) ** 2 / 2, a * (a @ away)
        before = (a_sq * away**2).sum().item()
        opt.step(loss=loss + shift)
        after = (a_sq * (x.detach() - solution) ** 2).sum().item()
        found.append((before, after, opt.effective_lr.item(), loss.item(), (x.grad**2 / a_sq).sum().item()))
    return np.array(found).T


@pytest.mark.parametrize("c", [0.6, 1.0, 2.0])
@pytest.mark.parametrize("moving", ["fixed", "falls", "rises"])
def test_pssps_keeps_its_bounds(moving, c):
    g, rows, base, solution, start = least_squares(7)
    jumps = (torch.rand(200, 5, generator=g, dtype=torch.float64) < 0.02).double().cumsum(0).clamp(max=2)
    table = base * torch.exp2({"fixed": 0, "falls": -1, "rises": 1}[moving] * jumps)
    at = lambda k: table[k - 1]  # noqa: E731
    before, after, eta, gap, g_sq = sps_run(rows, solution, start, at, 200, c)
    assert (after <= before * (1 + ROUNDING) - (2 - 1 / c) * eta * gap).all()
    assert np.allclose(eta, gap / (c * g_sq), rtol=1e-9, atol=0)  # it is Polyak's step, to rounding
    P = np.prod([max(1.0, (table[k + 1] / table[k]).max().item()) for k in range(199)])
    assert (moving != "rises") == (P == 1)
    assert (2 - 1 / c) * (eta * gap).sum() <= P * before[0]
    L = max((rows**2 / table[k]).sum(1).max().item() for k in (0, 199))
    assert gap.sum() <= 2 * c**2 / (2 * c - 1) * L * P * before[0]
    assert gap.sum() > before[0] / 100  # the bound is not about nothing


def test_pssps_is_linear_where_every_sample_grows():
    """½(x − x*)ᵀH(x − x*): gap ≥ (μ/2)·distance² in the scaled space, with μ and L the extreme eigenvalues there."""
    g = torch.Generator().manual_seed(1)
    M, base = torch.randn(4, 4, generator=g, dtype=torch.float64), torch.rand(4, generator=g, dtype=torch.float64) + 0.2
    H = M @ M.T + torch.eye(4, dtype=torch.float64)
    eigenvalues = torch.linalg.eigvalsh(H / (base.sqrt()[:, None] * base.sqrt()))
    for c in (0.6, 1.0, 2.0):
        x = nn.Parameter(torch.randn(4, generator=g, dtype=torch.float64))
        opt, factor = pssps(x, Prescribed(lambda k: base), c=c), 1 - (2 * c - 1) / (4 * c**2) * (eigenvalues[0] / eigenvalues[-1]).item()
        for _ in range(30):
            before, loss, x.grad = (base * x.detach() ** 2).sum(), x.detach() @ H @ x.detach() / 2, H @ x.detach()
            opt.step(loss=loss)
            assert (base * x.detach() ** 2).sum() <= factor * before * (1 + ROUNDING)


@pytest.mark.parametrize("d0", [2.0**-4, 2.0**-8, 2.0**-14])
def test_the_smooth_bound_costs_a_logarithmic_wait(d0):
    _, rows, base, solution, start = least_squares(9)
    tau, c = 2 ** (1 / 8), 1.0
    before, after, eta, gap, g_sq = sps_run(rows, solution, start, lambda k: base, 300, c, d0=d0, growth_rate=tau)
    L = (rows**2 / base).sum(1).max().item()
    b = d0 * start.square().mean().sqrt().item() * math.sqrt(base.sum().item() / g_sq[0])
    assert eta[0] == pytest.approx(min(b, gap[0] / (c * g_sq[0])), rel=1e-9)
    least = np.minimum(1 / (2 * c * L), b * tau ** np.arange(300))
    assert (eta >= least * (1 - ROUNDING)).all() and (after <= before * (1 + ROUNDING)).all()
    wait = max(0, math.ceil(math.log(1 / (2 * c * L * b), tau)))
    assert (eta[wait:] >= 1 / (2 * c * L) * (1 - ROUNDING)).all() and (d0 > 2.0**-5 or eta[max(0, wait - 16)] < 1 / (2 * c * L))
    assert gap.sum() <= (wait / 2 + 2 * c**2 / (2 * c - 1)) * L * before[0]


def test_a_sample_at_its_floor_leaves_the_bound_alone():
    _, rows, base, solution, start = least_squares(9)
    rows[3] = 0.0  # a sample whose loss is zero everywhere
    _, _, eta, gap, _ = sps_run(rows, solution, start, lambda k: base, 60, d0=2.0**-8, growth_rate=2.0)
    positive = gap > 0
    assert (~positive).sum() == 3 and (eta[~positive] == 0).all()
    L, b = (rows**2 / base).sum(1).max().item(), eta[0]
    assert (eta[positive] >= np.minimum(1 / (2 * L), b * 2.0 ** np.arange(positive.sum())) * (1 - ROUNDING)).all()


def test_the_algebra_of_polyaks_step():
    eta, gap, q, c, L, mu, E, Delta = sp.symbols("eta gap q c L mu E Delta", positive=True)
    change, least = -2 * eta * gap + eta**2 * q, 1 / (2 * c * L)
    assert sp.expand(change + (2 - 1 / c) * eta * gap - eta * (eta * q - gap / c)) == 0
    assert sp.simplify((gap / (c * q)).subs(q, 2 * L * gap) - least) == 0
    assert sp.simplify(E / ((2 - 1 / c) * least) - 2 * c**2 / (2 * c - 1) * L * E) == 0
    assert sp.simplify((2 - 1 / c) * least * mu / 2 - (2 * c - 1) / (4 * c**2) * mu / L) == 0
    wrong = change.subs(eta, (gap + Delta) / (c * q))
    assert sp.simplify(wrong - (gap + Delta) * (Delta - (2 * c - 1) * gap) / (c**2 * q)) == 0


@pytest.mark.parametrize("c", [0.75, 1.0, 2.0])
def test_a_floor_too_low_is_harmless_down_to_a_level(c):
    _, rows, base, solution, start = least_squares(11)
    low, steps = 0.01, 200
    before, after, eta, gap, g_sq = sps_run(rows, solution, start, lambda k: base, steps, c, floor=-low)
    assert np.allclose(eta, gap / (c * g_sq) * (1 + low / gap), rtol=1e-9, atol=0)  # too long by 1 + Δ/gap
    above = gap >= low / (2 * c - 1)
    assert above.sum() > 5 and (after[above] <= before[above] * (1 + ROUNDING)).all()
    assert (after[~above] > before[~above]).any()  # below the level it does go wrong
    L = (rows**2 / base).sum(1).max().item()
    for K in (10, 50, steps):
        assert gap[:K].min() <= (low + 2 * c**2 * L * before[0] / K) / (2 * c - 1)


def test_a_floor_too_high_stops_at_its_level():
    _, rows, base, solution, start = least_squares(11)
    high = 0.05
    before, after, eta, gap, _ = sps_run(rows, solution, start, lambda k: base, 400, 1.0, floor=high)
    assert (after <= before * (1 + ROUNDING)).all()
    assert ((eta > 0) == (gap > high)).all()
    assert gap[-20:].max() <= high * (1 + 1e-2)  # the steps shrink with gap − Δ: it comes near the level and does not pass it
    assert gap[-20:].max() > high / 100


def polyak_path(at, steps):
    x = nn.Parameter(torch.tensor([2.0, 1.0], dtype=torch.float64))
    opt, path = pssps(x, Prescribed(at)), [x.detach().clone()]
    for _ in range(steps):
        opt.zero_grad()
        loss = torch.stack([2 * x[0] - x[1], 2 * x[1] - x[0]]).abs().max()
        loss.backward()
        opt.step(loss=loss.detach())
        path.append(x.detach().clone())
    return path


def exact_polyak_path(r, steps):
    """Polyak's steps with α² = (r, 1) and (1, r) in turn, as fractions."""
    x, path = (Fraction(2), Fraction(1)), []
    for k in range(steps):
        path.append(x)
        rows = ((2, -1), (-1, 2))
        a = max(rows, key=lambda row: abs(dot(row, x)))
        b = (r, Fraction(1)) if k % 2 == 0 else (Fraction(1), r)
        step = dot(a, x) / sum(p * p / q for p, q in zip(a, b, strict=True))
        x = tuple(v - step * p / q for v, p, q in zip(x, a, b, strict=True))
    return path


def test_an_alternating_scaling_makes_polyaks_step_cycle():
    for r in (Fraction(1), Fraction(3, 2), Fraction(2), Fraction(4), Fraction(20)):
        factor = (2 + 2 * r) / (4 + r)
        path = exact_polyak_path(r, 8)
        assert path == [tuple(factor**k * v for v in ((2, 1) if k % 2 == 0 else (1, 2))) for k in range(8)]
        assert (factor < 1, factor == 1) == (r < 2, r == 2)
    pair = torch.tensor([[2.0, 1.0], [1.0, 2.0]], dtype=torch.float64)
    cycle = polyak_path(lambda k: pair[(k + 1) % 2], 50)
    # Numbers of a few bits, so the library's run is the exact one.
    assert all(torch.equal(x, torch.tensor([[2.0, 1.0], [1.0, 2.0]][k % 2], dtype=torch.float64)) for k, x in enumerate(cycle))
    for held in pair:
        assert polyak_path(lambda k, held=held: held, 50)[-1].abs().max() < 1e-3


def test_a_smooth_loss_falls_however_the_scaling_moves():
    """Σ l_i cos is not convex; its second derivative is at most l_i in coordinate i.  Jumping α² ≥ ηl; the control has α² ≥ ηl/8."""
    g = torch.Generator().manual_seed(0)
    curvature = torch.tensor([0.1, 1.0, 10.0], dtype=torch.float64)
    mix = torch.linalg.qr(torch.randn(3, 3, generator=g, dtype=torch.float64)).Q
    bound = (mix.abs().T @ curvature) * mix.abs().sum(1).max()  # ½Σ l_i d_i² ≥ ½ dᵀ(mixᵀ diag(curvature) mix) d, by Gershgorin
    loss_of, rises = lambda x: -(curvature * torch.cos(mix @ x)).sum(), {}
    for slack in (1.0, 1 / 40):
        x, rises[slack] = nn.Parameter(torch.tensor([1.0, 2.0, 0.5], dtype=torch.float64)), 0
        jump = 0.5 * bound * slack * (1 + 3 * torch.rand(300, 3, generator=g, dtype=torch.float64).round())
        opt = ScaledSGD([x], lr=0.5, betas=(0.0, 0.98), scaling=Prescribed(lambda k, jump=jump: jump[k - 1]))
        for k in range(300):
            opt.zero_grad()
            loss = loss_of(x)
            loss.backward()
            opt.step()
            promised = 0.25 * (x.grad**2 / jump[k]).sum()
            rises[slack] += bool(loss_of(x.detach()) > loss.detach() - promised + 1e-12 * curvature.sum())
    assert rises[1.0] == 0 < rises[1 / 40]


# --- the estimate -----------------------------------------------------------------------------------

def estimates(start, gradient, steps, gamma=None, **settings):
    x = [nn.Parameter(torch.as_tensor(part, dtype=torch.float64).clone()) for part in start]
    opt, deltas, path = PSDASGD(x, **settings), [], []
    for k in range(steps):
        for group in opt.param_groups:
            group["lr"] = 1.0 if gamma is None else gamma(k)
        for p, g in zip(x, gradient([p.detach() for p in x], k), strict=True):
            p.grad = g
        opt.step()
        deltas.append(opt.distance.tolist())
        path.append(torch.cat([p.detach().clone() for p in x]).tolist())
    return np.array(deltas), np.array(path)


@pytest.mark.parametrize("units", [None, "tensor"])
@pytest.mark.parametrize("scaling", ["none", "adam", "amsgrad", "adagrad"])
@pytest.mark.parametrize("seed", range(3))
def test_the_estimate_never_falls_and_never_exceeds_the_distance(seed, scaling, units):
    g = torch.Generator().manual_seed(seed)
    M, x_star, x_0 = (torch.randn(*shape, generator=g, dtype=torch.float64) for shape in ((6, 6), (6,), (6,)))

    def kink(parts, k):
        r = M @ (torch.cat(parts) - x_star)
        return (M[r.abs().argmax()] * r[r.abs().argmax()].sign()).split(3)

    sigma = torch.cat([part.square().mean().sqrt().expand(3) for part in x_0.split(3)]) if units else 1.0
    truth = ((x_0 - x_star) / sigma).abs().max().item()
    deltas, _ = estimates(
        x_0.split(3), kink, 100, gamma=lambda k: 1 + math.cos(k / 9), per="model", units=units, scaling=scaling,
        betas=((0.9, 0.5, 0.0)[seed], (0.98, 0.9, 0.999)[seed]), weight_decay=0.01,
    )
    assert (np.diff(deltas[:, 0]) >= 0).all() and deltas[-1, 0] <= truth * (1 + ROUNDING)
    assert deltas[-1, 0] > 1e-2 * truth  # it did learn


FIBONACCI = [1, 1, 2, 3, 5, 8, 13, 21, 34, 55]


@pytest.mark.parametrize("shape", ["kink", "parabola"])
@pytest.mark.parametrize("distance", [1.0, 0.4, 13.7])
def test_one_coordinate_is_estimated_within_a_factor_of_two(distance, shape):
    slope = {"kink": torch.sign, "parabola": torch.clone}[shape]
    deltas, _ = estimates([[distance]], lambda x, k: [slope(x[0])], 60, per="model", betas=(0.0, 0.0), d0=2.0**-12)
    # Sums of powers of two; N/|s| rounds a quotient and a root, some ulp.
    assert np.allclose(deltas[:10, 0] * 2**12, FIBONACCI, rtol=1e-12, atol=0)
    assert distance / 2 <= deltas[-1, 0] <= distance * (1 + 1e-12)


@pytest.mark.parametrize("power", [6, 10, 20, 30])
def test_a_blocks_estimate_exceeds_its_distance_by_any_factor(power):
    e, h = 2.0**-power, 1 / 64
    assert sp.Matrix([[1, 1], [1, 1 + sp.Rational(1, 64)]]).det() > 0  # convex, so (1 + e, 0) is the minimiser
    valley = lambda p, k: [p[0] + p[1] - 1 - e, p[0] + p[1] - 1 - e + h * p[1]]  # noqa: E731
    settings = {"betas": (0.0, 0.0), "d0": 2.0**-8}
    blocks, _ = estimates([[1.0], [1.0]], valley, 40, per="tensor", **settings)
    assert np.allclose(blocks[:8, 0] * 256, FIBONACCI[:8], rtol=1e-12, atol=0)
    assert blocks[-1, 0] >= (1 - e) / 4 and blocks[-1, 0] / e >= (1 - e) / (4 * e)
    whole, _ = estimates([[1.0], [1.0]], valley, 40, per="model", **settings)
    assert whole[-1, 0] <= 1 + ROUNDING


def test_under_noise_the_bound_holds_for_expectations_and_not_for_the_quotient():
    """½(x − ξ)², ξ = ±1: all outcomes of five tosses, weights known beforehand, exact."""
    for away, rate in itertools.product([Fraction(1, n) for n in (8, 16, 32)], [Fraction(1, n) for n in (8, 4, 2)]):
        outcomes = []
        for tosses in itertools.product((-1, 1), repeat=5):
            x, N, s, largest, slack = away, Fraction(0), Fraction(0), Fraction(0), Fraction(0)
            for i, toss in enumerate(tosses):
                g, slack = x - toss, slack + (i + 1) * x * x
                N, s, x = N + (i + 1) * g * (away - x), s + (i + 1) * g, x - rate * g
                largest = max(largest, N / abs(s)) if s else largest
            outcomes.append((N, s, abs(s), slack, largest))
        N, s, size, slack, _ = (sum(values) / 32 for values in zip(*outcomes, strict=True))
        assert away * s - N == slack  # Σ λ⟨∇f(x), x − x*⟩ in expectation: the noise has dropped out
        assert N <= away * s <= away * size
        assert any(largest > away for *_, largest in outcomes)


def test_noise_can_stall_the_estimate_and_can_inflate_it():
    def noisy(n, size, seed, steps, start, **settings):
        coin = torch.Generator().manual_seed(seed)
        noise = lambda: size * (2.0 * torch.randint(2, (n,), generator=coin) - 1)  # noqa: E731
        return estimates([torch.full((n,), start)], lambda x, k: [x[0] + noise()], steps, per="model", **settings)[0][:, 0] / start

    for seed in range(3):
        assert noisy(1000, 1000.0, seed, 120, 1.0)[-1] < 2e-6  # it started at d₀ = 10⁻⁶
        assert noisy(1, 1.0, seed, 400, 1e-3, betas=(0.0, 0.9))[-1] > 3
    assert noisy(1000, 0.0, 0, 120, 1.0)[-1] > 1 / 3


@pytest.mark.parametrize("power", [14, 20, 26])
def test_a_ripple_of_any_height_traps_the_estimate(power):
    period = 2.0**-power
    near = 2.0**-10 + 0.75 * period
    wave = lambda x: x[0] + torch.where(x[0] / period % 1 < 0.5, 1.0, -1.0)  # noqa: E731
    settings = {"per": "model", "betas": (0.0, 0.0), "d0": period}
    deltas, path = estimates([[near]], lambda x, k: [wave(x)], 60, **settings)
    assert np.allclose(deltas[:8, 0] / period, FIBONACCI[:8], rtol=1e-12, atol=0)
    assert deltas[-1, 0] >= (1 - near) / 2 > 400 * near
    height = lambda x: x**2 / 2 + period * np.minimum(x / period % 1, 1 - x / period % 1)  # noqa: E731
    worst = height(path[-20:, 0]).reshape(-1, 2).max(1)
    assert (worst >= deltas[-1, 0] ** 2 / 8).all() and (worst > 1e4 * height(near)).all()
    smooth, _ = estimates([[near]], lambda x, k: [x[0].clone()], 60, **settings)
    assert smooth[-1, 0] <= near * (1 + ROUNDING)  # without the ripple the corollary holds


def test_between_two_wells_the_bound_has_no_limit():
    """(x² − 1)²/4 from its hilltop 0, minimisers at distance 1: N/|s| from one point on each side, exact."""
    slope = lambda x: x**3 - x  # noqa: E731
    for right, left, least in ((Fraction(1, 2), Fraction(-5, 8), 72), (Fraction(1, 2), Fraction(-13, 20), 1000)):
        N = slope(right) * -right + slope(left) * -left
        s = slope(right) + slope(left)
        assert N / abs(s) > least


def test_a_constant_schedule_does_not_converge():
    for gamma, beta2 in ((1.0, 0.98), (0.5, 0.9)):
        deltas, path = estimates(
            [[1.0]], lambda x, k: [x[0].sign()], 200, gamma=lambda k, gamma=gamma: gamma, per="model", betas=(0.0, beta2), d0=1 / 300,
        )
        assert (path != 0).all()
        steps, known = np.abs(np.diff(path[:, 0])), deltas[:-1, 0]
        assert np.allclose(steps, gamma * known, rtol=1e-9, atol=0)  # v̂ = 1 to rounding
        assert (np.abs(path[:-1, 0]) + np.abs(path[1:, 0]) >= gamma / 300 * (1 - ROUNDING)).all()
        assert np.abs(path[-1, 0]) < 0.9 * 1.0  # it did move


# --- a rate -----------------------------------------------------------------------------------------

def dual_averaging(seed, rise, d_0, steps):
    """max |M(x − x*)| under the theorem's method: arrays of gap of the average, bound, d, D, N, ‖s/α‖; G and the first d."""
    state = np.random.default_rng(seed)
    n = int(state.integers(1, 6))
    M, x_star, x_0 = state.normal(size=(3 * n, n)), state.normal(size=n), state.normal(size=n)
    x, alpha_sq, squares, s, average = x_0.copy(), np.ones(n), np.zeros(n), np.zeros(n), np.zeros(n)
    G, N, weights, first, out = np.linalg.norm(M, axis=1).max(), 0.0, 0.0, d_0 * np.linalg.norm(x_0 - x_star), []
    d = first
    for k in range(1, steps + 1):
        res = M @ (x - x_star)
        g = M[np.abs(res).argmax()] * np.sign(res[np.abs(res).argmax()])
        N, s, weights, average = N + d * g @ (x_0 - x), s + d * g, weights + d, average + d * x
        squares += g * g
        alpha_sq = np.maximum(1.0, np.sqrt(squares) / 3) if rise else alpha_sq
        S, D = math.sqrt((s * s / alpha_sq).sum()), math.sqrt((alpha_sq * (x_0 - x_star) ** 2).sum())
        d = max(d, N / S) if S > 0 else d
        x = x_0 - s / (G * math.sqrt(k + 1) * alpha_sq)
        gap, bound = np.abs(M @ (average / weights - x_star)).max(), (2 + math.sqrt(3)) * D * G * math.sqrt(k + 1) * d / weights
        out.append((gap, bound, d, D, N, S))
    return np.array(out).T, G, first


@pytest.mark.parametrize("rise", [False, True], ids=["fixed", "rising"])
def test_dual_averaging_keeps_its_bounds(rise):
    for seed in range(12):
        for d_0 in (1e-1, 1e-8):
            (gap, bound, d, D, N, S), G, first = dual_averaging(seed, rise, d_0, 300)
            k = np.arange(1, 301)
            assert (gap <= bound * (1 + ROUNDING)).all() and (d <= D * (1 + ROUNDING)).all()
            assert (S <= (1 + math.sqrt(3)) * d * G * np.sqrt(k + 1) * (1 + ROUNDING)).all()
            assert (-N <= d**2 * G * np.sqrt(k) * (1 + ROUNDING)).all()
            levels = 1 + math.floor(math.log2(D[-1] / first))
            assert 2 * levels <= 300 and gap.min() <= 15 * levels * D[-1] * G / math.sqrt(300)


@pytest.mark.parametrize("scaling", ["none", "amsgrad", "adam"])
@pytest.mark.parametrize("power", [0.5, 0.7])
def test_the_best_iterate_of_psdasgd_keeps_its_bound(scaling, power):
    g = torch.Generator().manual_seed(5)
    M, x_star, x_0 = (torch.randn(*shape, generator=g, dtype=torch.float64) for shape in ((8, 4), (4,), (4,)))
    x = nn.Parameter(x_0.clone())
    opt = PSDASGD([x], per="model", scaling=scaling, betas=(0.0, 0.9), d0=0.01, fused=False)
    P, squares, rates, least, old, E, v_1 = 1.0, 0.0, 0.0, math.inf, None, None, None
    for k in range(1, 251):
        residual, before = M @ (x.detach() - x_star), x.detach().clone()
        top = residual.abs().argmax()
        x.grad = M[top] * residual[top].sign()
        opt.param_groups[0]["lr"] = gamma = k**-power
        delta = 0.01 if old is None else opt.distance.item()
        opt.step()
        alpha_sq, eta, gap = opt.state[x]["alpha_sq"].clone(), opt.effective_lr.item(), residual.abs().max().item()
        assert torch.allclose(x.detach(), before - eta * x.grad / alpha_sq, rtol=1e-9, atol=1e-12)  # the step of the proof, to rounding
        a, G_sq = alpha_sq.sum().sqrt().item(), (opt.state[x]["exp_avg_sq"] / (1 - 0.9**k) / alpha_sq).sum().item()
        norm_sq = (x.grad**2 / alpha_sq).sum().item()
        assert eta == pytest.approx(gamma * delta * a / math.sqrt(G_sq), rel=1e-9) and norm_sq <= G_sq / 0.1 * (1 + ROUNDING)
        assert eta**2 * norm_sq <= (gamma * delta * a) ** 2 / 0.1 * (1 + ROUNDING)
        if old is None:
            E, first = (alpha_sq * (before - x_star) ** 2).sum().item(), gap
        else:
            P *= max(1.0, (alpha_sq / old).max().item())
        after = (alpha_sq * (x.detach() - x_star) ** 2).sum().item()
        assert after <= (alpha_sq * (before - x_star) ** 2).sum().item() - 2 * eta * gap + eta**2 * norm_sq + ROUNDING * E
        squares, rates, least, old = squares + eta**2 * norm_sq, rates + eta, min(least, gap), alpha_sq
        assert least <= P * (E + squares) / (2 * rates)
        if scaling == "amsgrad":  # what the proof says of it
            assert G_sq <= a * a * (1 + ROUNDING)
            v_1 = opt.state[x]["exp_avg_sq"].clone() if k == 1 else v_1
            assert (opt.state[x]["max_exp_avg_sq"] / v_1).sqrt().prod().item() * (1 + ROUNDING) >= P
    assert least < first / 5 and (scaling == "adam" or P < 1e3)


def test_the_algebra_of_the_rate():
    r, d, g, s, gamma, q = sp.symbols("r d g s gamma q", positive=True)
    assert sp.expand(d * g * r * s - r / 2 * ((s + d * g) ** 2 - s**2 - d**2 * g**2)) == 0
    rs, ss = sp.symbols("r0:5"), (0, *sp.symbols("s1:5"))
    tele = sum(rs[i] * (ss[i + 1] ** 2 - ss[i] ** 2) for i in range(4)) - rs[4] * ss[4] ** 2
    assert sp.expand(tele - sum((rs[i - 1] - rs[i]) * ss[i] ** 2 for i in range(1, 5))) == 0
    root = (d + sp.sqrt(d**2 + gamma * q)) / gamma
    assert sp.simplify(gamma * root**2 - 2 * d * root - q) == 0
    assert sp.simplify(root.subs(q, 2 * d**2 / gamma) - (1 + sp.sqrt(3)) * d / gamma) == 0
    assert 4 * (2 + sp.sqrt(3)) < 15


# --- in training ------------------------------------------------------------------------------------

def test_adams_scaling_keeps_moving_in_training():
    late = {}
    for scaling in ("adam", "amsgrad"):
        moved = []

        class Watched(PSDASGD):
            def step(self, closure=None):
                old = {p: self.state[p]["alpha_sq"].clone() for p in self.state}
                super().step(closure)
                if old:
                    change = sum((self.state[p]["alpha_sq"] - a).abs().sum() for p, a in old.items())
                    moved.append((change / sum(a.sum() for a in old.values())).item())  # noqa: B023 (used in this turn of the loop only)

        train("digits-mlp", lambda p: Watched(p, scaling=scaling, fused=False), steps=140, evaluations=1)  # noqa: B023
        late[scaling] = np.mean(moved[-40:])
    forget = 1 - math.sqrt(0.98)
    assert 0.8 * forget < late["adam"] < 2.5 * forget and late["amsgrad"] < late["adam"] / 5
