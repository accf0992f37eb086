"""The theorems of the chapter "The other ill-conditioning", each again, and each able to fail."""

import math

import numpy as np
import pytest
import sympy as sp
import torch
from torch.func import grad, jacrev

from pslib import PSDASGD, ScaledSGD


def hessian(f):
    return jacrev(grad(f))


def turned(kappa, degrees):
    """Eigenvalues 1 and κ, the axes turned."""
    c, s = math.cos(math.radians(degrees)), math.sin(math.radians(degrees))
    Q = np.array([[c, -s], [s, c]])
    return Q @ np.diag([1.0, kappa]) @ Q.T


def positive_definite(rng, n, spread=1.0):
    factor = rng.normal(size=(n, n)) * rng.lognormal(sigma=spread, size=(n, 1))
    return factor.T @ factor + 1e-3 * np.eye(n)


def in_units(H, u):
    return H * np.outer(u, u)


def jacobi(H):
    return in_units(H, 1 / np.sqrt(np.diag(H)))


# --- gradient descent -------------------------------------------------------------------------------

EIGENVALUES = [(1, 2), (1, 3, 7, 25), (2, 2, 9), (1, 1000)]


@pytest.mark.parametrize("eigenvalues", EIGENVALUES)
def test_the_best_rate_contracts_by_rho_and_no_other_rate_does_better(eigenvalues):
    e = [sp.Integer(v) for v in eigenvalues]
    rho = sp.Rational(e[-1] - e[0], e[-1] + e[0])
    best = sp.Rational(2, e[0] + e[-1])
    norm = lambda rate: max(abs(1 - rate * v) for v in e)  # noqa: E731
    assert norm(best) == rho
    assert all(norm(best * sp.Rational(k, 50)) > rho for k in range(1, 101) if k != 50)


@pytest.mark.parametrize("eigenvalues", EIGENVALUES)
def test_extreme_errors_shrink_by_exactly_rho_at_every_step(eigenvalues):
    e = [sp.Integer(v) for v in eigenvalues]
    best, rho = sp.Rational(2, e[0] + e[-1]), sp.Rational(e[-1] - e[0], e[-1] + e[0])
    error = [sp.Integer(5), *[sp.Integer(0)] * (len(e) - 2), sp.Integer(-2)]
    f = lambda x: sum(v * c**2 for v, c in zip(e, x, strict=True)) / 2  # noqa: E731
    for _ in range(6):
        after = [(1 - best * v) * c for v, c in zip(e, error, strict=True)]
        assert f(after) == rho**2 * f(error)
        error = after


def gd(H, x, rate, steps):
    for _ in range(steps):
        x = x - rate * H @ x
    return x


def test_gradient_descent_is_stable_exactly_below_two_over_the_largest_eigenvalue():
    H, x0 = turned(50.0, 33), np.array([1.0, 2.0])
    assert np.linalg.norm(gd(H, x0, 1.99 / 50, 4000)) < 1e-6
    assert np.linalg.norm(gd(H, x0, 2.01 / 50, 4000)) > 1e6


@pytest.mark.parametrize("degrees", [10, 45, 80])
def test_a_rotation_turns_the_path_of_gradient_descent(degrees):
    Q = np.linalg.eigh(turned(20.0, degrees))[1]
    x0 = np.array([3.0, -1.0])
    for steps in (1, 7, 40):
        assert np.allclose(gd(turned(20.0, degrees), Q @ x0, 2 / 21, steps), Q @ gd(np.diag([1.0, 20.0]), x0, 2 / 21, steps), atol=1e-12)


# --- units ------------------------------------------------------------------------------------------

def loss(x):
    """Smooth, not convex, no symmetry."""
    return torch.sin(x[0] * x[1]) + (x[1] - x[2] ** 2) ** 2 + torch.exp(0.3 * x[0] * x[3]) + torch.tanh(x.sum())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_hessian_in_other_units_is_uhu_bit_for_bit(dtype):
    g = torch.Generator().manual_seed(0)
    x = torch.randn(4, generator=g, dtype=dtype)
    u = 2.0 ** torch.randint(-8, 9, (4,), generator=g).to(dtype)
    H = hessian(loss)(x)
    other = hessian(lambda t: loss(u * t))(x / u)
    assert torch.equal(other, u[:, None] * H * u)
    assert not torch.equal(other, H)


@pytest.mark.parametrize("seed", range(10))
def test_signs_and_correlations_do_not_depend_on_units(seed):
    rng = np.random.default_rng(seed)
    A = rng.normal(size=(5, 5))
    H, u = A + A.T, rng.lognormal(sigma=2, size=5)
    eigenvalues, other = np.linalg.eigvalsh(H), np.linalg.eigvalsh(in_units(H, u))
    assert (np.sign(eigenvalues) == np.sign(other)).all() and not np.allclose(eigenvalues, other)
    P = positive_definite(rng, 5)
    assert np.allclose(jacobi(P), jacobi(in_units(P, u)), rtol=1e-10)


@pytest.mark.parametrize("seed", range(20))
def test_units_change_the_condition_number_by_at_most_the_square_of_their_spread(seed):
    rng = np.random.default_rng(seed)
    n = int(rng.integers(2, 7))
    H, u = positive_definite(rng, n), rng.lognormal(size=n)
    ratio, most = np.linalg.cond(in_units(H, u)) / np.linalg.cond(H), (u.max() / u.min()) ** 2
    assert (1 - 1e-9) / most <= ratio <= most * (1 + 1e-9)


def test_that_bound_is_attained_on_both_sides():
    u = np.array([1.0, 3.0, 8.0])
    assert math.isclose(np.linalg.cond(in_units(np.eye(3), u)), 64)
    assert math.isclose(np.linalg.cond(in_units(np.diag(u**-2.0), u)) / np.linalg.cond(np.diag(u**-2.0)), 1 / 64)


# --- the best units ---------------------------------------------------------------------------------

def best_kappa(H):
    r = abs(H[0, 1]) / math.sqrt(H[0, 0] * H[1, 1])
    return (1 + r) / (1 - r)


def test_the_two_dimensional_formula_symbolically():
    a, b, c, s, k = sp.symbols("a b c s kappa", positive=True)
    r, t = sp.symbols("r theta", real=True)
    det = s**2 * (a * c - b**2)
    assert sp.simplify((a + c * s**2) ** 2 / det - 4 * a * c / (a * c - b**2) - (a - c * s**2) ** 2 / det) == 0
    p = (1 + r) / (1 - r)
    assert sp.simplify(p + 1 / p + 2 - 4 / (1 - r**2)) == 0
    R = sp.Matrix([[sp.cos(t), -sp.sin(t)], [sp.sin(t), sp.cos(t)]])
    H = R * sp.diag(1, k) * R.T
    q = (k - 1) ** 2 * sp.sin(2 * t) ** 2 / 4
    assert sp.simplify(sp.expand_trig(H[0, 1] ** 2 - q)) == 0
    assert sp.simplify(sp.expand_trig(H[0, 0] * H[1, 1] - k - q)) == 0


@pytest.mark.parametrize("kappa, degrees", [(10, 0), (10, 20), (100, 3), (100, 70), (1000, 10), (1000, 45)])
def test_the_two_dimensional_formula_against_a_search(kappa, degrees):
    H = turned(float(kappa), degrees)
    found = [np.linalg.cond(in_units(H, np.array([1.0, s]))) for s in np.exp(np.linspace(-6, 6, 1201))]
    assert min(found) >= best_kappa(H) * (1 - 1e-9)
    assert min(found) <= best_kappa(H) * 1.01
    assert math.isclose(np.linalg.cond(jacobi(H)), best_kappa(H), rel_tol=1e-7)


def test_units_remove_everything_on_the_axes_and_nothing_at_45_degrees():
    for kappa in (4.0, 100.0, 1e4):
        assert math.isclose(best_kappa(turned(kappa, 0)), 1)
        assert math.isclose(best_kappa(turned(kappa, 45)), kappa, rel_tol=1e-6)
        between = [best_kappa(turned(kappa, d)) for d in range(0, 46, 5)]
        assert all(q > p for p, q in zip(between, between[1:], strict=False))


def test_half_of_the_gain_is_lost_at_a_small_angle():
    for kappa in (1e4, 1e8):
        angle = 0.5 * kappa**-0.25
        assert math.isclose(math.log(best_kappa(turned(kappa, math.degrees(angle)))) / math.log(kappa), 0.5, abs_tol=0.01)


@pytest.mark.parametrize("n", [2, 3, 5, 8])
def test_jacobi_is_within_a_factor_n_of_any_diagonal_scaling(n):
    rng = np.random.default_rng(n)
    beaten = 0
    for _ in range(30):
        C = jacobi(positive_definite(rng, n, spread=1.5))
        for _ in range(30):
            ratio = np.linalg.cond(C) / np.linalg.cond(in_units(C, rng.lognormal(sigma=0.4, size=n)))
            assert ratio <= n * (1 + 1e-9)
            beaten += ratio > 1 + 1e-6
    assert (beaten == 0) == (n == 2)  # in two dimensions it is the best; in more it is not always


# --- adaptive methods on the axes -------------------------------------------------------------------

def path(make, grad, x0, steps=120):
    x = torch.nn.Parameter(x0.clone())
    opt = make([x])
    for _ in range(steps):
        x.grad = grad(x.detach())
        opt.step()
    return x.detach().clone()


def scaled(name, **settings):
    return lambda p: ScaledSGD(p, 2.0**-5, scaling=name, **{"betas": (0.9, 0.98), **settings})


START = [1.0, 0.7, -0.3]
STEEP = torch.tensor([1.0, 2.0**10, 2.0**-14])
SHAPES = {"quadratic": lambda x: x, "quartic": lambda x: x**3, "tanh": torch.tanh}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("name", ["adam", "rmsprop", "adagrad", "amsgrad"])
def test_on_the_axes_the_iterates_do_not_depend_on_the_eigenvalues(name, shape, dtype):
    x0, slope = torch.tensor(START, dtype=dtype), SHAPES[shape]
    one = path(scaled(name), slope, x0)
    other = path(scaled(name), lambda x: STEEP.to(dtype) * slope(x), x0)
    assert torch.equal(one, other) and not torch.equal(one, x0)


def test_torchs_own_adam_does_not_see_them_either():
    make = lambda p: torch.optim.Adam(p, lr=2.0**-5, eps=0)  # noqa: E731
    x0 = torch.tensor(START, dtype=torch.float64)
    assert torch.equal(path(make, lambda x: x, x0), path(make, lambda x: STEEP.double() * x, x0))


@pytest.mark.parametrize("make", [scaled("none"), scaled("adam", eps=1e-3), PSDASGD], ids=["none", "epsilon", "psdasgd"])
def test_without_the_hypothesis_they_matter(make):
    x0 = torch.tensor(START, dtype=torch.float64)
    steep = STEEP.double() / 2.0**10  # all at most 1, so that plain descent stays stable
    assert not torch.allclose(path(make, lambda x: x, x0), path(make, lambda x: steep * x, x0), rtol=1e-3)


def test_off_the_axes_adam_sees_the_condition_number():
    x0 = torch.tensor([1.0, 0.7], dtype=torch.float64)
    one, other = (path(scaled("adam"), lambda x, H=torch.from_numpy(turned(k, 10)): H @ x, x0, 40) for k in (1.0, 2.0**10))
    assert (one - other).abs().max() > 0.1


def test_perfect_units_help_gradient_descent_and_hurt_adam():
    H, x0 = np.diag([1.0, 1024.0]), torch.ones(2, dtype=torch.float64)
    u = torch.tensor([1.0, 1 / 32], dtype=torch.float64)
    assert np.array_equal(in_units(H, u.numpy()), np.eye(2))
    far, near = (path(scaled("adam"), lambda x, s=s: s * x, start, 60)
                 for s, start in ((torch.ones(2).double(), x0 / u), (torch.tensor([1.0, 1024.0]).double(), x0)))
    assert near.abs().max() < 0.5 and (u * far).abs().max() > 0.9
    assert torch.equal(path(lambda p: torch.optim.SGD(p, lr=1.0), lambda x: x, x0 / u, 1), torch.zeros(2).double())


# --- a network --------------------------------------------------------------------------------------

WIDTHS = (5, 4, 3)


def network(seed):
    """The loss of a small ReLU network as a function of one vector, a point, and the tensor of each coordinate."""
    g = torch.Generator().manual_seed(seed)
    i, h, o = WIDTHS
    sizes = [h * i, h, o * h, o]
    X, y = torch.randn(40, i, generator=g, dtype=torch.float64), torch.randint(0, o, (40,), generator=g)

    def f(x):
        w1, b1, w2, b2 = x.split(sizes)
        return torch.nn.functional.cross_entropy(torch.relu(X @ w1.view(h, i).T + b1) @ w2.view(o, h).T + b2, y)

    return f, torch.randn(sum(sizes), generator=g, dtype=torch.float64), torch.arange(4).repeat_interleave(torch.tensor(sizes))


def units(c, block):
    return torch.tensor([1 / c, 1 / c, c, 1.0], dtype=torch.float64)[block]


def sharpness(H):
    return torch.linalg.eigvalsh(H)[-1].item()


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("c", [2.0**-6, 4.0, 2.0**10])
def test_the_hessian_of_a_rescaled_network_is_uhu_bit_for_bit(seed, c):
    f, x, block = network(seed)
    u = units(c, block)
    assert torch.equal(f(x / u), f(x))
    assert torch.equal(hessian(f)(x / u), u[:, None] * hessian(f)(x) * u)


@pytest.mark.parametrize("seed", range(3))
def test_sharpness_is_unbounded_and_relative_sharpness_does_not_change(seed):
    f, x, block = network(seed)
    H = hessian(f)(x)
    rms = lambda z: torch.stack([z[block == b].square().mean().sqrt() for b in range(4)])[block]  # noqa: E731
    fixed, grown = rms(x)[:, None] * H * rms(x), []
    for c in (2.0**-9, 1.0, 2.0**5, 2.0**8, 2.0**9):
        u = units(c, block)
        other = u[:, None] * H * u
        assert sharpness(other) >= (u**2 * H.diagonal()).max().item() * (1 - 1e-9)
        s = rms(x / u)
        assert torch.equal(s[:, None] * other * s, fixed)
        grown.append(sharpness(other))
    assert math.isclose(grown[-1] / grown[-2], 4, rel_tol=0.01) and grown[-1] > 1000 * grown[1] and grown[0] > 1000 * grown[1]


def test_the_smallest_network():
    a, b, c = sp.symbols("a b c", positive=True)
    H = sp.hessian((a * b - 1) ** 2 / 2, (a, b)).subs({a: c, b: 1 / c})
    assert {sp.simplify(e - c**2 - c**-2) for e in H.eigenvals() if e != 0} == {0} and 0 in H.eigenvals()
    sigma = sp.diag(c, 1 / c)
    assert set(sp.simplify(sigma * H * sigma).eigenvals()) == {0, 2}
    assert sp.simplify(H * sp.Matrix([c, -1 / c])).is_zero_matrix
