"""Tasks and the training loop."""

import math

import pytest
import torch

from pslib import PSDASGD, PSSPS, tasks
from pslib.contenders import make
from pslib.training import train, train_seeds


def adam(params):
    return make("adam", params, lr=1e-2)


@pytest.mark.parametrize("name", tasks.names())
def test_a_task_has_matching_shapes_and_a_first_loss_near_chance(name):
    task = tasks.get(name)
    data = task.load()
    torch.manual_seed(0)
    model = task.build(data)
    logits = model(data.x_test)
    assert len(data.x_train) == len(data.y_train) and len(data.x_test) == len(data.y_test)
    assert logits.shape == (*data.y_test.shape, data.classes)
    assert 0 <= data.y_train.min() and data.y_train.max() < data.classes
    # A fresh network spreads its bets: cross-entropy near ln(classes).
    assert task.loss(logits, data.y_test).item() == pytest.approx(math.log(data.classes), rel=0.15)


def test_data_are_generated_the_same_way_every_time(tmp_path, monkeypatch):
    first = tasks._mnist1d().sha256
    monkeypatch.setenv("PSLIB_CACHE", str(tmp_path))
    state = torch.get_rng_state()
    assert tasks._mnist1d.__wrapped__().sha256 == first
    assert torch.equal(torch.get_rng_state(), state)
    assert [p.name for p in tmp_path.iterdir()] == ["mnist1d.npz"]


def test_the_transformer_is_causal():
    task = tasks.get("chars-transformer")
    data = task.load()
    torch.manual_seed(0)
    model = task.build(data).double()
    x = data.x_test[:2].clone()
    before = model(x)
    x[:, 40] = (x[:, 40] + 1) % data.classes
    after = model(x)
    assert torch.equal(before[:, :40], after[:, :40])
    assert not torch.allclose(before[:, 40:], after[:, 40:])


def test_an_unknown_task_is_named_with_the_choices():
    with pytest.raises(ValueError, match="there is no task 'mnist'; choose one of mnist1d-cnn"):
        tasks.get("mnist")


def test_an_unknown_schedule_is_refused():
    with pytest.raises(ValueError, match="schedule must be 'cosine' or 'constant', not 'linear'"):
        train("digits-mlp", adam, steps=1, schedule="linear")


def test_same_seed_same_run_other_seed_other_run():
    a, b, c = (train("digits-mlp", adam, seed=s, steps=30) for s in (0, 0, 1))
    assert torch.equal(a.losses, b.losses)
    assert all(torch.equal(p, q) for p, q in zip(a.model.parameters(), b.model.parameters(), strict=True))
    assert not torch.equal(a.losses, c.losses)


def test_training_leaves_the_global_generator_alone():
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    train("digits-mlp", adam, steps=2)
    assert torch.equal(torch.rand(3), expected)


@pytest.mark.parametrize("name", ["psdasgd-tensor", "psdasgd-model", "ps-sps", "schedule-free", "adam"])
def test_training_learns_the_digits(name):
    history = train("digits-mlp", lambda p: make(name, p), seed=0, steps=400)
    assert not history.diverged
    assert history.final_metric > 0.85
    assert history.final_loss < history.losses[:10].mean() / 4


def test_history_has_one_row_a_look_and_one_number_a_step():
    history = train("digits-mlp", lambda p: PSDASGD(p), steps=40, evaluations=8)
    assert history.losses.shape == (40,)
    assert history.steps == [5, 10, 15, 20, 25, 30, 35, 40]
    for curve in (history.test_loss, history.test_metric, history.distance, history.effective_lr):
        assert len(curve) == 8
    assert history.block_names == [n for n, _ in history.model.named_parameters()]
    assert len(history.distance[0]) == len(history.block_names)


def test_cosine_ends_at_zero_and_constant_does_not_move():
    for schedule, last in (("cosine", 0.0), ("constant", 1e-2)):
        history = train("digits-mlp", adam, steps=10, schedule=schedule)
        assert history.optimizer.param_groups[0]["lr"] == pytest.approx(last, abs=1e-12)


def test_prepare_and_init_scale_change_the_start_and_nothing_else():
    plain = train("digits-mlp", lambda p: make("sgd", p, lr=0.0), steps=1)
    scaled = train("digits-mlp", lambda p: make("sgd", p, lr=0.0), steps=1, init_scale=4.0)
    for p, q in zip(plain.model.parameters(), scaled.model.parameters(), strict=True):
        assert torch.equal(4 * p, q)

    def zero_head(model):
        torch.nn.init.zeros_(model[-1].weight)
        torch.nn.init.zeros_(model[-1].bias)

    prepared = train("digits-mlp", lambda p: make("sgd", p, lr=0.0), steps=1, prepare=zero_head)
    assert prepared.losses[0].item() == pytest.approx(math.log(10), rel=1e-6)


def test_a_diverging_run_ends_early_and_says_so():
    history = train("digits-mlp", lambda p: make("sgd", p, lr=1e30), steps=200)
    assert history.diverged
    assert len(history.losses) < 200
    assert history.final_loss == math.inf and history.final_metric == 0.0


def test_ps_sps_is_given_the_loss():
    history = train("digits-mlp", lambda p: PSSPS(p), steps=30)
    assert history.losses[-1] < history.losses[0]


def test_train_seeds_gives_one_history_a_seed():
    assert [h.seed for h in train_seeds("digits-mlp", adam, seeds=2, steps=1)] == [0, 1]


def test_progress_goes_to_standard_error_only(capsys):
    train("digits-mlp", adam, steps=3, progress=True)
    out, err = capsys.readouterr()
    assert out == "" and "digits-mlp, seed 0" in err and "3/3" in err


def test_no_steps_give_a_sentence():
    with pytest.raises(ValueError, match="steps must be at least 1, not 0"):
        train("digits-mlp", PSDASGD, steps=0)
