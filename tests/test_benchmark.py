"""The benchmark: its measure and its counts by hand, what a step costs, the figure with check boxes, and what the records say."""

import math
import re
from collections import Counter
from functools import cache

import numpy as np
import pytest
from bs4 import BeautifulSoup
from matplotlib import pyplot as plt

from pslib import benchmark, experiments, plotting, tasks
from pslib.experiments import Record, RunSpec

close = pytest.approx


def run(contender, seed=0, *, loss=1.0, metric=0.5, lr=None, task="digits-mlp", diverged=False, init_scale=1.0):
    """A record with the given end and nothing else of interest."""
    spec = RunSpec(task, contender, contender, {} if lr is None else {"lr": lr}, init_scale, seed)
    curve = {"step": [1], "train_loss": [loss], "test_loss": [loss], "test_metric": [metric]}
    return Record(spec, "cpu", curve, loss, metric, diverged, 1.0, 0.1, [], [], [], {"torch": "2", "device": "cpu", "data_sha256": ""})


def seeds(contender, losses, **how):
    return [run(contender, seed, loss=loss, **how) for seed, loss in enumerate(losses)]


# --- value ------------------------------------------------------------------------------------------

@pytest.mark.parametrize("record, measure, expected", [
    (run("x", loss=0.25, metric=0.75), "train", 0.25),
    (run("x", loss=0.25, metric=0.75), "test", 0.25),
    (run("x", loss=9.0), "train", math.log(10)),
    (run("x", metric=0.999), "test", 0.005),
    (run("x", loss=0.0), "train", 0.005),
    (run("x", loss=0.0051), "train", 0.0051),
    (run("x", metric=0.05), "test", 0.9),
    (run("x", loss=None, metric=0.0, diverged=True), "train", math.log(10)),
    (run("x", loss=None, metric=0.0, diverged=True), "test", 0.9),
    (run("x", metric=3.0, task="shakespeare-characters"), "test", 3.0),
    (run("x", metric=5.0, task="shakespeare-characters"), "test", math.log(65)),
    (run("x", metric=5.0, task="shakespeare-bytes"), "test", 5.0),
    (run("x", metric=0.001, task="shakespeare-bytes"), "test", 0.005),
    (run("x", loss=None, metric=None, task="shakespeare-bytes", diverged=True), "test", math.log(256)),
])
def test_value_by_hand(record, measure, expected):
    assert benchmark.value(record, measure) == close(expected)


def test_an_unknown_measure_is_one_sentence():
    with pytest.raises(ValueError, match=r"measure must be one of 'train', 'test', not 'accuracy'\."):
        benchmark.value(run("x"), "accuracy")


# --- best and log_regret ----------------------------------------------------------------------------

# Over two seeds: AdamW ends at 0.4 and 0.3, with β₂ = 0.98 at 0.2 and diverged; the test set prefers the other rates.
SMALL = [
    *seeds("adamw", [0.4, 0.4], lr=0.1, metric=0.9), *seeds("adamw", [0.1, 0.5], lr=0.01, metric=0.8),
    *seeds("adamw-0.98", [0.2, 0.2], lr=0.1, metric=0.6), *seeds("adamw-0.98", [None, 0.01], lr=1.0, metric=0.95, diverged=True),
    *seeds("ours", [0.3, 0.1], metric=0.8), *seeds("guess", [5.0, None], metric=0.1),
]


def test_the_best_rate_has_the_lowest_mean_over_seeds_of_the_measure():
    by_train, by_test = benchmark.best(SMALL, "train"), benchmark.best(SMALL, "test")
    rates = [{name: group[0].spec.settings.get("lr") for name, group in by.items()} for by in (by_train, by_test)]
    assert rates[0] == {"adamw": 0.01, "adamw-0.98": 0.1, "ours": None, "guess": None}
    assert rates[1] == {"adamw": 0.1, "adamw-0.98": 0.1, "ours": None, "guess": None}
    assert all([r.spec.seed for r in group] == [0, 1] for found in (by_train, by_test) for group in found.values())


def test_the_best_takes_no_other_initial_scale_into_the_mean():
    records = [*seeds("x", [0.2, 0.2]), *seeds("x", [0.1, 0.5], init_scale=8.0)]
    assert [r.spec.init_scale for r in benchmark.best(records, "train")["x"]] == [1.0, 1.0]


def test_log_regret_by_hand():
    assert benchmark.log_regret(SMALL, "train") == close({
        "adamw": math.log(0.3 / 0.2), "adamw-0.98": 0.0, "ours": 0.0, "guess": math.log(math.log(10) / 0.2),
    })
    assert benchmark.log_regret(SMALL, "test") == close({
        "adamw": 0.0, "adamw-0.98": math.log(0.4 / 0.1), "ours": math.log(2), "guess": math.log(9),
    })


def test_log_regret_has_no_unit():
    """As long as nobody is solved or guessing."""
    def regrets(unit):
        return benchmark.log_regret([run(n, loss=unit * loss) for n, loss in (("adamw", 1), ("adamw-0.98", 2), ("x", 0.5))], "train")

    assert regrets(1e-4)["x"] == 0
    assert regrets(0.02) == close(regrets(1.0)) and regrets(1.0)["x"] == close(-math.log(2))


def test_log_regret_needs_both_grids_of_adamw():
    with pytest.raises(KeyError):
        benchmark.log_regret(seeds("adamw", [1.0], lr=0.1), "train")


# --- summary ----------------------------------------------------------------------------------------

def test_summary_by_hand():
    a_twentieth = math.log(1.05)
    rows = benchmark.summary({
        "one": {"even": 0.0, "mixed": -0.5, "late": a_twentieth}, "two": {"even": 0.0, "mixed": 0.3, "late": a_twentieth + 1e-9},
    })
    assert [(r.contender, r.worst_task, r.within) for r in rows] == [("mixed", "two", 0.5), ("even", "one", 1.0), ("late", "two", 0.5)]
    assert [(r.mean, r.worst) for r in rows] == [close((-0.1, 0.3)), (0.0, 0.0), close((a_twentieth, a_twentieth))]


def test_the_order_of_the_means_does_not_depend_on_the_reference():
    """Another reference adds one number to everyone's regret on a task."""
    rng = np.random.default_rng(0)
    regrets = {task: dict(zip("abcd", rng.normal(size=4), strict=True)) for task in ("one", "two", "three")}
    moved = {task: {name: r + shift for name, r in of.items()} for (task, of), shift in zip(regrets.items(), (-1.0, 0.2, 5.0), strict=True)}
    before, after = benchmark.summary(regrets), benchmark.summary(moved)
    assert [r.contender for r in before] == [r.contender for r in after]
    assert [b.mean - a.mean for a, b in zip(before, after, strict=True)] == close([4.2 / 3] * 4)


# --- failures ---------------------------------------------------------------------------------------

def test_failures_by_hand():
    guess = math.log(10)
    half = (guess + 0.1) / 2                                          # the best contender gets to 0.1
    records = [
        *seeds("best", [0.1, 0.1]), *seeds("just", [half - 1e-9, half + 1e-9]), *seeds("none", [guess, None]),
        *seeds("tuned", [9.0, 9.0], lr=1.0), *seeds("tuned", [0.1, half + 0.1], lr=0.1),
    ]
    found = benchmark.failures(records)
    assert found == {"best": 0, "just": 1, "none": 2, "tuned": 1}
    assert all(type(n) is int for n in found.values())


def test_failures_are_counted_against_the_mean_of_the_best_contender():
    """Half-way to its mean, 1, not to its luckiest seed, 0.1."""
    records = [*seeds("best", [0.1, 1.9]), *seeds("between", [(math.log(10) + 1) / 2 - 0.01] * 2)]
    assert benchmark.failures(records) == {"best": 1, "between": 0}


# --- cost -------------------------------------------------------------------------------------------

@pytest.mark.parametrize("name, tensors", [
    ("sgd", 0), ("momentum", 1), ("dog", 1), ("adamw", 2), ("schedule-free", 2), ("momo-adam", 2), ("ps-sps", 2),
    ("prodigy", 4), ("psdasgd-tensor", 4), ("psdasgd-model-units", 4),
])
def test_state_bytes_are_four_for_each_tensor_kept(name, tensors):
    assert benchmark.state_bytes(name) == close(4 * tensors, abs=0.01)


# --- the figure with check boxes --------------------------------------------------------------------

NAMES = ("adamw", "prodigy-0.98", "psdasgd-tensor")


def soup(text):
    return BeautifulSoup(text, "html.parser")


def picture(alt="three <curves>", hidden=(), names=NAMES):
    figure, ax = plt.subplots(figsize=(3, 2))
    for i, name in enumerate(names):
        plotting.band(ax, [1, 2, 3], [[i, 1, 2], [i, 2, 3]], gid=name, marker="o", **plotting.style_of(name))
    return plotting.toggles(figure, {name: f"{name}: <2.5> at the end" for name in names}, alt, hidden=hidden)


def test_every_series_has_a_check_box_a_name_and_its_line():
    page, text = soup(picture()), picture()
    assert [box["value"] for box in page("input")] == list(NAMES)
    assert all(box["type"] == "checkbox" and box.has_attr("checked") and not box.has_attr("data-off") for box in page("input"))
    assert [label["title"] for label in page("label")] == [f"{name}: <2.5> at the end" for name in NAMES]
    assert Counter(g["data-series"] for g in page("g", attrs={"data-series": True})) == dict.fromkeys(NAMES, 2)     # the line and its band
    for name in NAMES:
        assert plotting.style_of(name)["label"] in text and plotting.style_of(name)["color"] in text


def test_only_the_hidden_series_are_switched_off_and_only_where_scripts_run():
    """Without scripts nobody could switch them on again: the picture shows them, the box says so, and the script does the rest."""
    page, text = soup(picture(hidden=["adamw"])), picture(hidden=["adamw"])
    assert [box.has_attr("data-off") for box in page("input")] == [True, False, False]
    assert all(box.has_attr("checked") for box in page("input"))
    assert not any(g.has_attr("style") for g in page("g", attrs={"data-series": True}))
    assert re.search(r'"off" in input\.dataset\) \{ input\.checked = false; show\(\); \}', text[text.index("<script>") :])


def test_the_picture_says_what_is_seen_and_is_closed():
    page = soup(picture())
    (svg,) = page("svg")
    assert svg["role"] == "img" and svg["aria-label"] == "three <curves>"
    assert page("output") and [d.get("aria-label") for d in page("div")] == [None, "Which lines to show"]
    assert not plt.get_fignums()


def test_two_pictures_on_a_page_share_no_identifier_and_refer_to_their_own():
    """The same lines drawn twice, as two tasks with the same curves would be."""
    one, two = picture("the first"), picture("the second")
    identifiers = [re.findall(r'\bid="([^"]+)"', text) for text in (one, two)]
    assert all(len(ids) == len(set(ids)) > 10 for ids in identifiers) and not set(identifiers[0]) & set(identifiers[1])
    for text, own in zip((one, two), identifiers, strict=True):
        referred = re.findall(r'(?:href="|url\()#([^")]+)', text) + re.findall(r'getElementById\("([^"]+)"\)', text)
        assert referred and set(referred) <= set(own)


def test_the_picture_is_the_same_every_time():
    assert picture() == picture()


def test_nothing_comes_from_outside_and_no_style_leaves_the_picture():
    text = re.sub(r'xmlns(:\w+)?="[^"]*"', "", picture())
    assert not re.search(r"https?:|\bsrc=|@import|<link|<image|//\w", text)
    for style in re.findall(r"<style[^>]*>(.*?)</style>", text, re.S):
        assert re.fullmatch(r"#toggles-\w+ svg \*\{[^{}]*\}", style)


def test_the_script_widens_the_lines_and_not_the_shapes_that_others_use():
    """A path inside <defs> has an identifier: copied, there would be two."""
    script = picture()[picture().index("<script>") :]
    assert "line.children" in script and 'querySelectorAll("path")' not in script


# --- what the records say ---------------------------------------------------------------------------

SUITE = [t for t in experiments.BENCHMARK if f"benchmark-{t}" not in experiments.NOT_YET_RUN]
HELD_OUT = [t for t in SUITE if t not in experiments.COMPARED]
OURS, RIVAL = "psdasgd-tensor", "psdasgd-model-units"
WITH_A_RATE = {"adamw", "adamw-0.98", "adamw-default", "momentum"}


@cache
def records(task):
    return experiments.collect(f"benchmark-{task}")


@cache
def regrets(measure):
    return {task: benchmark.log_regret(records(task), measure) for task in SUITE}


def mean(measure, contender, names=SUITE):
    return np.mean([regrets(measure)[t][contender] for t in names])


def test_the_suite_is_what_the_page_says():
    assert len(SUITE) == 13 and len(HELD_OUT) == 8
    contenders = [{r.spec.contender for r in records(task)} for task in SUITE]
    assert all(names == contenders[0] for names in contenders) and len(contenders[0]) == 18
    reference = [r for task in SUITE for r in records(task) if r.spec.contender in ("adamw", "adamw-0.98")]
    assert reference and not any(r.spec.settings.get("weight_decay") for r in reference)


@pytest.mark.parametrize("measure", benchmark.MEASURES)
def test_adamws_best_rate_is_inside_its_grid(measure):
    for task in SUITE:
        for name in benchmark.REFERENCE:
            rate = benchmark.best(records(task), measure)[name][0].spec.settings["lr"]
            assert experiments.WIDE_GRID[0] < rate < experiments.WIDE_GRID[-1]


@pytest.mark.parametrize("measure", benchmark.MEASURES)
def test_the_default_meets_the_condition(measure):
    """Mean log-regret at most 0, and first among the methods without a learning rate."""
    rows = benchmark.summary(regrets(measure))
    free = [row for row in rows if row.contender not in WITH_A_RATE]
    assert free[0].contender == OURS and free[0].mean <= 0


@pytest.mark.parametrize("measure", benchmark.MEASURES)
def test_one_task_decides_the_sign(measure):
    others = [t for t in SUITE if t != "digits-vit"]
    assert 0 < mean(measure, OURS, others) < math.log(1.05)


@pytest.mark.parametrize("measure", benchmark.MEASURES)
def test_on_the_held_out_tasks_the_default_is_ahead_of_its_rival_because_of_one_task(measure):
    others = [t for t in HELD_OUT if t != "digits-vit"]
    assert mean(measure, OURS, HELD_OUT) < mean(measure, RIVAL, HELD_OUT)
    assert abs(mean(measure, OURS, others) - mean(measure, RIVAL, others)) < 0.02


@pytest.mark.parametrize("measure", benchmark.MEASURES)
def test_ps_sps_is_the_steady_one(measure):
    """Second without a learning rate, no failed run, and ahead of the best AdamW on every text."""
    free = [row.contender for row in benchmark.summary(regrets(measure)) if row.contender not in WITH_A_RATE]
    assert free[1] == "ps-sps" and not any(benchmark.failures(records(task))["ps-sps"] for task in SUITE)
    texts = [task for task in SUITE if tasks.get(task).metric == "loss"]
    assert len(texts) == 3 and all(regrets(measure)[task]["ps-sps"] < 0 for task in texts)


def test_too_large_a_start_costs_more_than_too_small_a_one():
    """The distance never falls: d0 of PS-DA-SGD on the digits' ViT."""
    ended = {r.spec.settings["d0"]: [] for r in experiments.collect("knobs-digits-vit") if r.spec.optimizer == OURS}
    for r in experiments.collect("knobs-digits-vit"):
        if r.spec.optimizer == OURS:
            ended[r.spec.settings["d0"]].append(benchmark.value(r, "train"))
    default = np.mean([benchmark.value(r, "train") for r in records("digits-vit") if r.spec.contender == OURS])
    factor = {round(math.log2(d0)): np.mean(losses) / default for d0, losses in ended.items()}
    assert max(factor[-14], factor[-11]) < 3 < factor[-5] < factor[-2] and factor[-2] > 10


def test_where_the_default_fails():
    failed = {task: benchmark.failures(records(task)) for task in SUITE}
    assert {task: n[OURS] for task, n in failed.items() if n[OURS]} == {"cifar10-resnet32-bn": 1, "cifar10-vgg19-bn": 3}
    assert failed["cifar10-vgg19-bn"]["ps-sps"] == failed["cifar10-vgg19-bn"]["adamw-default"] == 0
    ended = [r.distance[-1][0] for r in records("cifar10-vgg19-bn") if r.spec.contender == RIVAL]
    assert ended == [2.0**-8] * 3                                     # the first guess
