"""One function, many networks: the propositions, the laws of twins on real networks, what the records say, and the slider."""

import math
import re
from collections import defaultdict
from functools import lru_cache

import numpy as np
import pytest
import sympy as sp
import torch
from bs4 import BeautifulSoup
from matplotlib import pyplot as plt
from torch import nn

from pslib import contenders, experiments, plotting, tasks, twins
from pslib.training import train

TASKS = ("digits-mlp", "mnist1d-cnn", "chars-transformer")
CLASSIFIERS = TASKS[:2]
ENDS = (2.0**-10, 2.0**10)


# --- the propositions, symbolically -----------------------------------------------------------------

c, d, a, b, z = sp.symbols("c d a b z", positive=True)


def leaky(t):
    return sp.Piecewise((a * t, t >= 0), (b * t, True))


def homogeneous(phi):
    return all(sp.simplify(phi(c * s) - c * phi(s)) == 0 for s in (z, -z, sp.Integer(0)))


def test_two_slopes_are_homogeneous_and_nothing_with_a_curve_is():
    assert homogeneous(leaky) and homogeneous(lambda t: sp.Max(0, t)) and homogeneous(abs)
    for phi in (sp.tanh, lambda t: t * (1 + sp.erf(t / sp.sqrt(2))) / 2, lambda t: t + 1):
        assert not homogeneous(phi)


def test_homogeneity_for_all_factors_leaves_two_numbers():
    """phi(t) = |t| phi(sign t): the values at 1 and -1 decide, and phi(0) = c phi(0) must be 0."""
    at_one, at_minus_one, zero = sp.symbols("p q r", real=True)
    assert sp.solve(sp.Eq(zero, 2 * zero), zero) == [0]
    for t, value in ((z, at_one), (-z, at_minus_one)):
        assert sp.simplify(abs(t) * value - leaky(t).subs({a: at_one, b: -at_minus_one})) == 0


def test_one_factor_a_neuron():
    for signs in ((1, 1), (1, -1), (-1, -1)):
        pre = sp.Matrix([s * t for s, t in zip(signs, sp.symbols("y1:3", positive=True), strict=True)])
        out, D = sp.Matrix([sp.symbols("v1:3", real=True)]), sp.diag(c, d)
        assert sp.simplify(out * D.inv() * (D * pre).applyfunc(leaky) - out * pre.applyfunc(leaky)).is_zero_matrix
        assert not sp.simplify(out * (D * pre).applyfunc(leaky) - out * pre.applyfunc(leaky)).is_zero_matrix


def method_steps(x0, gradients, eta=sp.Symbol("eta", positive=True)):
    """Several steps of one coordinate by the closed forms, by method; PS-DA-SGD is Adam at a multiple of |x0|."""
    b1, b2 = sp.Rational(9, 10), sp.Rational(49, 50)
    m = v = 0
    for k, g in enumerate(gradients, 1):  # noqa: B007  # the last k is used below
        m, v = b1 * m + (1 - b1) * g, b2 * v + (1 - b2) * g**2
    ratio = m / (1 - b1**k) / sp.sqrt(v / (1 - b2**k))
    return {"sgd": eta * gradients[-1], "momentum": eta * m, "adam": eta * ratio, "psdasgd": sp.sqrt(x0**2) / 64 * ratio}


def test_powers_of_the_twins_relative_step():
    x0, gradients, u = sp.Symbol("x0", positive=True), sp.symbols("g1:4", real=True, nonzero=True), sp.Symbol("u", integer=True)
    before, after = method_steps(x0, gradients), method_steps(c**u * x0, [g / c**u for g in gradients])
    for name, power in {"sgd": -2, "momentum": -2, "adam": -1, "psdasgd": 0}.items():
        relative = sp.simplify((after[name] / (c**u * x0)) / (before[name] / x0))
        assert sp.simplify(relative - c ** (power * u)) == 0, name


# --- the same on real networks ----------------------------------------------------------------------

def fit(name, factor=1.0, steps=40, task="digits-mlp", at="0", rates=None, dtype=torch.float32, **settings):
    """Train a network or its twin; `rates`: the power of c^u that each tensor's learning rate is multiplied by."""
    models = []

    def prepare(model):
        twins.rescale(model, at, factor)
        contenders.prepare(name, model)
        models.append(model)

    def make(params):
        params = list(params)
        if rates is None:
            return contenders.make(name, params, model=models[0], **settings)
        powers, c = twins.symmetry(tasks.get(task).build(tasks.get(task).load()), at).powers, ENDS[1]
        optimizer = contenders.make(name, params, model=models[0], **settings)
        group = optimizer.param_groups[0]
        kept = {k: v for k, v in group.items() if k not in ("params", "lr")}
        groups = [{**kept, "params": [p], "lr": group["lr"] * c ** (rates * powers.get(n, 0))} for n, p in params]
        return type(optimizer)(groups)

    return train(task, make, steps=steps, evaluations=1, prepare=prepare, keep_outputs=True, dtype=dtype)


def alike(p, q):
    return torch.equal(p.losses, q.losses) and torch.equal(p.outputs[-1], q.outputs[-1])


RULES = {"sgd": (-2, dict(lr=0.03)), "momentum": (-2, dict(lr=0.01)), "adam": (-1, dict(lr=0.01, eps=1e-150))}


@pytest.mark.parametrize("task, at", [("digits-mlp", "0"), ("digits-mlp", "2"), ("mnist1d-cnn", "convs.0")])
@pytest.mark.parametrize("name", RULES)
def test_a_twin_is_the_original_with_other_rates(name, task, at):
    power, settings = RULES[name]
    common = dict(task=task, at=at, dtype=torch.float64, **settings)
    twin, original = fit(name, ENDS[1], **common), fit(name, **common)
    assert alike(twin, fit(name, rates=power, **common))
    assert not alike(twin, original) and not alike(twin, fit(name, rates=power + 1, **common))


@pytest.mark.parametrize("factor", ENDS)
@pytest.mark.parametrize("task, at", [("digits-mlp", "0"), ("mnist1d-cnn", "convs.0")])
def test_psdasgd_per_tensor_trains_twins_alike(task, at, factor):
    assert alike(fit("psdasgd-tensor", factor, task=task, at=at), fit("psdasgd-tensor", task=task, at=at))
    assert not alike(fit("psdasgd-model", factor, task=task, at=at), fit("psdasgd-model", task=task, at=at))


@pytest.mark.parametrize("name, powers", [("sgd", (-20, -20, 20)), ("adam", (-10, -10, 10)), ("psdasgd-tensor", (0, 0, 0))])
def test_one_steps_relative_change(name, powers):
    """‖Δ‖/‖x‖ of the twin over that of the original, as a power of two; float64 rounds the small steps a little."""
    steps = {}
    for factor in (1.0, ENDS[1]):
        with torch.random.fork_rng():
            torch.manual_seed(0)
            model = tasks.get("digits-mlp").build(tasks.get("digits-mlp").load()).double()
        twins.rescale(model, "0", factor)
        params = dict(list(model.named_parameters())[:3])
        before = {n: p.detach().clone() for n, p in params.items()}
        settings = {} if name.startswith("ps") else {"lr": 2.0**-6, **({"eps": 1e-150} if name == "adam" else {})}
        optimizer = contenders.make(name, list(params.items()), **settings)
        data = tasks.get("digits-mlp").load()
        tasks.get("digits-mlp").loss(model(data.x_train[:50].double()), data.y_train[:50]).backward()
        optimizer.step()
        steps[factor] = [((p.detach() - before[n]).norm() / before[n].norm()).item() for n, p in params.items()]
    found = [math.log2(moved / base) for base, moved in zip(steps[1.0], steps[ENDS[1]], strict=True)]
    assert np.allclose(found, powers, rtol=0, atol=1e-6)


def test_adams_eps_and_rate_can_be_carried_along():
    powers, c = twins.symmetry(tasks.get("digits-mlp").build(tasks.get("digits-mlp").load()), "0").powers, ENDS[1]

    def twin(follow):
        def make(params):
            return torch.optim.Adam([
                {"params": [p], "lr": 0.01 * c ** powers.get(n, 0), "eps": 1e-8 * c ** (-follow * powers.get(n, 0))} for n, p in params
            ])
        return train("digits-mlp", make, steps=60, evaluations=1, keep_outputs=True, prepare=lambda m: twins.rescale(m, "0", c))

    base = fit("adam", steps=60, lr=0.01)
    assert alike(base, twin(True)) and not alike(base, twin(False))


def test_a_sign_is_no_problem_for_adam():
    def run(flip):
        def prepare(model):
            signs = 1.0 - 2 * (torch.arange(64) % 3 == 0)
            with torch.no_grad():
                model[0].weight.mul_(signs[:, None])
                model[0].bias.mul_(signs)
                model[2].weight.mul_(signs)

        task = tasks.get("digits-mlp")
        network = type(task)(**{**task.__dict__, "build": lambda d: nn.Sequential(nn.Linear(64, 64), nn.Tanh(), nn.Linear(64, d.classes))})
        return train(
            network, lambda p: torch.optim.Adam([q for _, q in p]), steps=40, evaluations=1, keep_outputs=True,
            prepare=prepare if flip else None,
        )

    assert alike(run(True), run(False))


# --- the records ------------------------------------------------------------------------------------

@lru_cache
def runs(task):
    return {(key[0], key[3]): group for key, group in experiments.by_setting(experiments.collect(f"twins-{task}")).items()}


def final(task, method, factor):
    return np.array([experiments.metric(r) for r in runs(task)[method, factor]])


def lost(task, method, factor):
    """Points of accuracy."""
    return 100 * (final(task, method, 1.0).mean() - final(task, method, factor).mean())


def methods_and_factors(task):
    return {method for method, _ in runs(task)}, sorted({factor for _, factor in runs(task)})


@pytest.mark.parametrize("task", TASKS)
def test_the_recorded_experiment_is_what_the_chapter_says(task):
    methods, factors = methods_and_factors(task)
    left_out = {"path-sgd"} if task == TASKS[2] else set()
    assert methods == {*experiments.TWIN_RATES, "prodigy", "dog", "ps-sps", "psdasgd-model", "psdasgd-tensor"} - left_out
    assert [math.log2(factor) for factor in factors] == [-10, -7, -4, -2, 0, 2, 4, 7, 10]
    assert all(sorted(r.spec.seed for r in group) == [0, 1, 2] for group in runs(task).values())
    assert all(("twin_distance" in r.curve) == (factor != 1) for (_, factor), group in runs(task).items() for r in group)


@pytest.mark.parametrize("task", TASKS)
def test_only_two_methods_train_all_twins_alike(task):
    methods, factors = methods_and_factors(task)
    for method in methods:
        for factor in factors:
            if factor == 1:
                continue
            furthest = [max(r.curve["twin_distance"], default=1.0) for r in runs(task)[method, factor]]
            if method in ("psdasgd-tensor", "path-sgd"):
                assert furthest == [0.0] * 3
                assert [r.curve["test_loss"] for r in runs(task)[method, factor]] == [r.curve["test_loss"] for r in runs(task)[method, 1.0]]
                assert np.array_equal(final(task, method, factor), final(task, method, 1.0))
            else:
                assert min(furthest) > 0


@pytest.mark.parametrize("task", CLASSIFIERS)
def test_adam_loses_more_than_twenty_points(task):
    assert lost(task, "adam", ENDS[1]) > 20 and lost(task, "adamw", ENDS[1]) > 20
    assert lost(task, "psdasgd-tensor", ENDS[1]) == lost(task, "psdasgd-tensor", ENDS[0]) == 0
    assert min(lost(task, m, factor) for m in ("sgd", "momentum") for factor in ENDS) > 50
    assert lost(task, "adam", ENDS[0]) < lost(task, "adam", ENDS[1])


def test_what_the_remedies_do():
    for task in CLASSIFIERS:
        assert lost(task, "nd-adam", ENDS[1]) < 3 and lost(task, "nd-adam", ENDS[0]) > 50
        assert final(task, "path-sgd", 1.0).mean() < final(task, "psdasgd-tensor", 1.0).mean()
    assert lost("digits-mlp", "weight-norm", ENDS[1]) < 3 and lost("mnist1d-cnn", "weight-norm", ENDS[1]) > 10


def test_the_transformer():
    nats = {
        (m, factor): final("chars-transformer", m, factor).mean()
        for m in ("nd-adam", "adam", "psdasgd-tensor") for factor in (1.0, *ENDS)
    }
    ours = nats["psdasgd-tensor", 1.0]
    assert max(nats["nd-adam", 1.0], nats["nd-adam", ENDS[1]]) < ours < nats["nd-adam", ENDS[0]] - 0.5
    assert nats["adam", ENDS[1]] > nats["adam", 1.0] + 0.5


def test_what_one_distance_for_the_model_does():
    one = ("prodigy", "dog", "ps-sps", "psdasgd-model")
    assert max(lost("digits-mlp", m, ENDS[1]) for m in one) < 3 and min(lost("mnist1d-cnn", m, ENDS[1]) for m in one) > 5


def test_invariance_is_not_quality():
    at_one = {m: final("mnist1d-cnn", m, 1.0).mean() for m in ("momentum", "adam", "psdasgd-tensor")}
    assert at_one["momentum"] > max(at_one["adam"], at_one["psdasgd-tensor"])
    assert final("mnist1d-cnn", "adam", 0.25).mean() > at_one["adam"]


def best_rates(task, method, records):
    """The rates with the best mean final metric."""
    by_rate = defaultdict(list)
    for r in records:
        if r.spec.contender == method:
            by_rate[r.spec.settings["lr"]].append(experiments.metric(r))
    sign = -1 if tasks.get(task).metric == "accuracy" else 1
    means = {rate: sign * np.mean(values) for rate, values in by_rate.items()}
    assert set(means) == set(experiments.TWIN_RATES[method].grid) and {len(v) for v in by_rate.values()} == {2}
    return {rate for rate, mean in means.items() if mean == min(means.values())}


@pytest.mark.parametrize("task", TASKS)
def test_every_method_has_the_best_of_its_rates(task):
    records = experiments.collect(f"twin-rates-{task}")
    chosen = {m: rates.chosen[task] for m, rates in experiments.TWIN_RATES.items() if task in rates.chosen}
    wrong = {m: best for m, rate in chosen.items() if rate not in (best := best_rates(task, m, records))}
    assert not wrong, f"better rates than the chosen ones: {wrong}"


# --- the slider -------------------------------------------------------------------------------------

@pytest.fixture
def page():
    figures = {}
    for position in ("c = 2^-1", "c = 2^0", "c = 2^1"):
        figures[position], ax = plt.subplots(figsize=(1, 1))
        _ = ax.plot([1, len(figures)])
    return plotting.slider(figures, {p: f"a line <{p}>" for p in figures}, name="factor", start="c = 2^1")


def test_the_slider_shows_the_start_without_a_script(page):
    found = BeautifulSoup(page, "html.parser")
    (control,), images = found("input"), found("img")
    assert control["type"] == "range" and (control["min"], control["max"], control["step"], control["value"]) == ("0", "2", "1", "2")
    assert [image.has_attr("hidden") for image in images] == [True, True, False]
    assert found("output") and "c = 2^1" in re.search(r"<output>(.*?)</output>", page)[1]


def test_the_slider_can_be_read_and_moved_without_a_mouse(page):
    found = BeautifulSoup(page, "html.parser")
    assert [image["alt"] for image in found("img")] == [f"a line <c = 2^{e}>" for e in (-1, 0, 1)]
    assert found("input")[0]["aria-valuetext"] == "c = 2^1" and not found("input")[0].has_attr("tabindex")
    assert re.search(r"<label>\s*factor.*<input", page, re.S)          # a native control inside its label takes the arrow keys
    script = page[page.index("<script>") :]
    assert 'addEventListener("input"' in script and "aria-valuetext" in script and f'"{found("div")[0]["id"]}"' in script


def test_the_slider_needs_nothing_from_outside(page):
    found = BeautifulSoup(page, "html.parser")
    assert all(image["src"].startswith("data:image/png;base64,") for image in found("img"))
    assert not re.search(r"https?:|//\w|\bsrc=(?!\"data:)|@import|url\(", re.sub(r"base64,[^\"]+", "", page))
    assert not plt.get_fignums()
