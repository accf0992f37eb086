"""Sequence models: what a loss means, tokens that never or hardly ever occur, and the records behind the chapter's findings."""

import math
from collections import Counter
from functools import cache

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional as F

from pslib import PSDASGD, ScaledSGD, benchmark, contenders, experiments, tasks
from pslib.datasets import MissingData
from pslib.networks import CharacterTransformer
from pslib.training import train

CONFIGURED = settings(max_examples=100, deadline=None)
TASKS = ("shakespeare-characters", "shakespeare-bytes", "chars-transformer")
each_task = pytest.mark.parametrize("task", TASKS)


# --- what a loss means ------------------------------------------------------------------------------

def entropy(p):
    return -(p[p > 0] * np.log(p[p > 0])).sum()


@CONFIGURED
@given(st.integers(0, 2**32), st.integers(2, 9))
def test_cross_entropy_is_at_least_entropy(seed, n):
    rng = np.random.default_rng(seed)
    p, q = rng.dirichlet(0.3 * np.ones(n)), rng.dirichlet(np.ones(n)) + 1e-9
    q /= q.sum()
    cross = -(p * np.log(q)).sum()
    assert cross >= entropy(p) - 1e-12
    # equality for q = p only: a mixture on the way to p is strictly better
    mixed = (p + q) / 2
    assert -(p * np.log(mixed)).sum() < cross or np.allclose(p, q)


@CONFIGURED
@given(st.integers(0, 2**32))
def test_a_longer_context_never_raises_the_floor(seed):
    joint = np.random.default_rng(seed).dirichlet(0.3 * np.ones(27)).reshape(3, 3, 3)  # x', x, y
    floors = [entropy(joint.sum(axis).ravel()) - entropy(joint.sum((*axis, 2)).ravel()) for axis in ((0, 1), (0,), ())]
    assert floors[0] >= floors[1] - 1e-9 and floors[1] >= floors[2] - 1e-9


def table_loss(text, test, n, classes, prior=5.0):
    """Loss on the windows of `test` of smoothed n-gram counts, with dictionaries."""
    counts = [Counter(zip(*(text[i:] for i in range(length)), strict=False)) for length in range(n + 1)]
    counts[0] = {(): len(text)}
    total = 0.0
    for window in test:
        for at in range(1, len(window)):
            q = 1 / classes
            for length in range(1, min(n, at + 1) + 1):
                seen = tuple(window[at + 1 - length : at + 1])
                q = (counts[length].get(seen, 0) + prior * q) / (counts[length - 1].get(seen[:-1], 0) + prior)
            total -= math.log(q)
    return total / sum(len(w) - 1 for w in test)


def test_the_best_network_is_between_the_tables_of_pairs_and_of_triples():
    data = tasks.get("chars-transformer").load()
    text = torch.cat([data.x_train[:, 0], data.x_train[-1, 1:], data.y_train[-1, -1:]]).tolist()
    test = torch.cat([data.x_test, data.y_test[:, -1:]], 1).tolist()
    one, two, three = (table_loss(text, test, n, data.classes) for n in (1, 2, 3))
    assert (abs(one - 3.1) < 0.2) and (abs(two - 2.3) < 0.15) and (abs(three - 1.7) < 0.15)
    found = {name: values.mean() for name, values in ends("chars-transformer").items()}
    assert three < min(found.values()) < two < found["adamw-default"] < one


# --- tokens that never occur ------------------------------------------------------------------------

CLASSES, SEEN, WINDOW = 24, 15, 8
FREE = [n for n, c in contenders.CONTENDERS.items() if c.learning_rate_free]
MOVING = [*FREE, "sgd", "momentum", "adam", "amsgrad", "nadam", "rmsprop", "adagrad", "adadelta"]


def batches(steps, classes=SEEN):
    generator = torch.Generator().manual_seed(1)
    return torch.randint(classes, (steps, 4, WINDOW + 1), generator=generator)


def trained(name, steps=6, **settings_):
    """A small transformer with tokens that never occur, before and after a few steps."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = CharacterTransformer(CLASSES, width=16, heads=2, depth=1, window=WINDOW)
    before = {key: value.detach().clone() for key, value in model.named_parameters()}
    optimizer = contenders.make(name, model.named_parameters(), model=model, **settings_)
    if hasattr(optimizer, "train"):
        optimizer.train()
    from pslib.training import step

    for batch in batches(steps):
        optimizer.zero_grad()
        loss = F.cross_entropy(model(batch[:, :-1]).flatten(0, -2), batch[:, 1:].flatten())
        loss.backward()
        assert (model.token.weight.grad[SEEN:] == 0).all() and (model.head.bias.grad[SEEN:] > 0).all()
        step(optimizer, loss.detach())
    return model, before


@pytest.mark.parametrize("name", MOVING)
def test_rows_of_tokens_that_never_occur_do_not_move(name):
    model, before = trained(name)
    assert torch.equal(model.token.weight[SEEN:], before["token.weight"][SEEN:])
    assert not torch.equal(model.token.weight[:SEEN], before["token.weight"][:SEEN])


def test_weight_decay_moves_them_by_exactly_its_factor():
    model, before = trained("adamw", lr=0.1)
    factor = (1 - 0.1 * 0.01) ** 6
    assert torch.allclose(model.token.weight[SEEN:], factor * before["token.weight"][SEEN:], rtol=1e-6)
    assert not torch.equal(model.token.weight[SEEN:], before["token.weight"][SEEN:])


def test_dead_rows_add_to_no_sum():
    """With dead rows of the same size the live rows and δ do what they do without."""
    generator = torch.Generator().manual_seed(0)
    live, target = torch.randn(2, 6, 4, generator=generator, dtype=torch.float64)
    found = []
    for dead in (0, 6):
        x = nn.Parameter(torch.cat([live, live[:dead]]))
        optimizer = PSDASGD([x])
        for _ in range(30):
            optimizer.zero_grad()
            ((x[:6] - target) ** 2).sum().backward()
            optimizer.step()
        found.append((x.detach()[:6], optimizer.distance))
    assert torch.allclose(found[0][0], found[1][0], rtol=1e-9) and torch.allclose(found[0][1], found[1][1], rtol=1e-9)
    assert not torch.allclose(found[0][0], live)


@CONFIGURED
@given(st.integers(0, 2**32))
def test_the_loss_is_that_among_the_tokens_that_occur_plus_the_price_of_the_others(seed):
    logits = 3 * torch.randn(CLASSES, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    loss, among = -logits.log_softmax(0)[:SEEN], -logits[:SEEN].log_softmax(0)
    price = -torch.log(logits.softmax(0)[:SEEN].sum())
    assert torch.allclose(loss, among + price) and price > 0


def test_silenced_outputs_make_the_wide_network_the_narrow_one():
    """With dead biases at −20, AdamW trains the wide network as it trains the narrow one; without, it does not."""
    def run(classes, bias):
        with torch.random.fork_rng():
            torch.manual_seed(0)
            model = CharacterTransformer(SEEN, width=16, heads=2, depth=1, window=WINDOW)
            token, head = nn.Embedding(classes, 16), nn.Linear(16, classes)
        with torch.no_grad():
            for new, old in ((token.weight, model.token.weight), (head.weight, model.head.weight), (head.bias, model.head.bias)):
                new[:SEEN] = old
            head.bias[SEEN:] += bias
        model.token, model.head = token, head
        optimizer = torch.optim.AdamW(model.parameters(), lr=0.01, weight_decay=0.0)
        losses = []
        for batch in batches(15):
            optimizer.zero_grad()
            loss = F.cross_entropy(model(batch[:, :-1]).flatten(0, -2), batch[:, 1:].flatten())
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
        return np.array(losses)

    narrow, silenced, wide = run(SEEN, 0.0), run(CLASSES, -20.0), run(CLASSES, 0.0)
    assert np.abs(narrow - silenced).max() < 1e-3 < 0.1 < wide[0] - narrow[0]


def test_tinyshakespeare_is_ascii():
    try:
        characters, raw = (tasks.get(name).load() for name in TASKS[:2])
    except MissingData:
        pytest.skip("tinyshakespeare is not here")
    assert characters.classes == 65 and len(raw.x_train[:, 0].unique()) <= 65 and raw.classes == 256
    assert characters.x_train.shape == raw.x_train.shape and characters.sha256 == raw.sha256


# --- tokens that hardly ever occur ------------------------------------------------------------------

def one_event(beta1, beta2, size, steps):
    x = nn.Parameter(torch.zeros(1, dtype=torch.float64))
    adam = ScaledSGD([x], lr=1.0, betas=(beta1, beta2), eps=0.0)
    for k in range(steps):
        x.grad = torch.full_like(x, size if k == 1 else 0.0)
        adam.step()
        if k == 0:
            adam.state[x]["step"] = 10**6
    return -x.item()


@pytest.mark.parametrize("beta1, beta2", [(0.9, 0.98), (0.9, 0.999), (0.5, 0.9), (0.0, 0.5)])
@pytest.mark.parametrize("size", [1e-4, -30.0])
def test_one_event_moves_a_coordinate_by_a_fixed_way(beta1, beta2, size):
    stated = (1 - beta1) / math.sqrt(1 - beta2) / (1 - beta1 / math.sqrt(beta2))
    assert math.isclose(one_event(beta1, beta2, size, 400), math.copysign(stated, size), rel_tol=1e-6)


def test_without_enough_memory_the_way_has_no_end():
    short, long = (one_event(0.9, 0.8, 1.0, steps) for steps in (50, 200))
    assert long > 2 * short


# --- the records ------------------------------------------------------------------------------------

@cache
def records(task):
    return tuple(experiments.collect(f"benchmark-{task}"))


@cache
def ends(task):
    return {name: np.array([benchmark.value(r, "test") for r in group]) for name, group in benchmark.best(records(task), "test").items()}


def tuned(task):
    return min((ends(task)[name] for name in benchmark.REFERENCE), key=np.mean)


def test_both_shakespeares_are_the_same_bytes_at_the_small_preset():
    seen = {(r.environment["data_sha256"], r.preset) for task in TASKS[:2] for r in records(task)}
    assert len(seen) == 1 and seen.pop()[1] == "cpu"



@each_task
def test_ps_sps_is_below_tuned_adamw_with_every_seed(task):
    assert ends(task)["ps-sps"].max() < tuned(task).min()


def test_the_default_loses_to_tuned_adamw_on_two_tasks_and_overlaps_on_one():
    above = [ends(task)["psdasgd-tensor"].min() > tuned(task).max() for task in TASKS]
    assert above == [True, False, True]
    assert all(ends(task)["psdasgd-tensor"].mean() > tuned(task).mean() for task in TASKS)
    assert all(ends(task)["psdasgd-model-units"].mean() < ends(task)["psdasgd-tensor"].mean() for task in TASKS)


@each_task
def test_others_against_tuned_adamw(task):
    behind = {name: values.mean() - tuned(task).mean() for name, values in ends(task).items()}
    assert {name for name, value in behind.items() if value < -0.005} <= {"ps-sps", "psdasgd-model-units"}
    assert abs(behind["momo-adam"]) < 0.005 and behind["adamw-default"] > 0.25 and behind["momentum"] > 0.1
    assert abs(ends(task)["adamw"].mean() - ends(task)["adamw-0.98"].mean()) < 0.02
    assert ends(task)["dadapt-adam"].mean() - ends(task)["dadapt-adam-0.98"].mean() > 0.5


@each_task
def test_momentum_sgd_diverges_just_above_its_best_rate(task):
    groups = {lr: group for (name, lr, *_), group in experiments.by_setting(records(task)).items() if name == "momentum"}
    best = benchmark.best(records(task), "test")["momentum"][0].spec.settings["lr"]
    above = sorted(lr for lr in groups if lr > best)
    assert len(groups) == 9 and above and all(r.diverged for r in groups[above[0]])


def test_bytes_cost_adamw_and_not_ps_da_sgd():
    gap = {name: ends(TASKS[1])[name] - ends(TASKS[0])[name] for name in ends(TASKS[1])}
    assert (gap["adamw"] > 0).all() and (gap["adamw-0.98"] > 0).all() and abs(gap["psdasgd-tensor"].mean()) < 0.02
    assert (gap["psdasgd-tensor"] > 0).any() and (gap["psdasgd-tensor"] < 0).any()
    assert gap["prodigy"].mean() > 0.2 > 0.05 > gap["prodigy-0.98"].mean()


@each_task
def test_embeddings_are_given_larger_distances_than_attention_and_perceptrons(task):
    for r in benchmark.best(records(task), "test")["psdasgd-tensor"]:
        of = dict(zip(r.block_names, r.distance[-1], strict=True))
        mean = {kind: np.exp(np.mean([math.log(of[n]) for n in of if n.endswith(kind)])) for kind in (
            ("token.weight", "position.weight"), ("query.weight", "key.weight", "value.weight", "out.weight"),
            ("up.weight", "down.weight"))}
        embeddings, attention, perceptrons = mean.values()
        assert embeddings > 10 * attention and attention > perceptrons


def test_ps_sps_warms_up_by_itself():
    best = benchmark.best(records(TASKS[2]), "test")
    rate = best["adamw"][0].spec.settings["lr"]
    for r in best["ps-sps"]:
        eta = np.array(r.effective_lr)[:, 0]
        assert eta[0] < rate / 3 and eta.max() > 3 * rate and eta[-1] < eta.max() / 100


def test_plain_adam_with_the_rates_of_ps_sps_keeps_most_of_its_gain():
    """The recorded rates of one seed, interpolated between the looks, played to torch's Adam."""
    best = benchmark.best(records(TASKS[2]), "test")
    run, steps = best["ps-sps"][1], tasks.get(TASKS[2]).steps
    logs = np.interp(np.arange(1, steps + 1), run.curve["step"], np.log(np.maximum(np.array(run.effective_lr)[:, 0], 1e-5)))

    class Played(torch.optim.Adam):
        rates = iter(np.exp(logs).tolist())

        def step(self, closure=None):
            self.param_groups[0]["lr"] = next(self.rates)
            return super().step(closure)

    make = lambda params: Played([p for _, p in params], betas=(0.9, 0.98))  # noqa: E731
    ended = train(TASKS[2], make, seed=run.spec.seed, schedule="constant", evaluations=1).final_metric
    ours, adamw = benchmark.value(run, "test"), ends(TASKS[2])["adamw"]
    assert ended < adamw.min() and adamw.mean() - ended > (adamw.mean() - ours) / 2
