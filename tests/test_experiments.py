"""Recorded runs: complete or not there, resumed, validated, reproducible."""

import json
import os
import pickle
import signal
import subprocess
import sys
import time
from dataclasses import asdict, replace

import pytest
import torch

from pslib import contenders, experiments, tasks, training
from pslib.experiments import (
    EXPERIMENTS,
    FOLDER,
    NOT_YET_RUN,
    RunSpec,
    best,
    by_setting,
    collect,
    load,
    main,
    metric,
    record,
    rerun,
    twin_distance,
)
from pslib.training import Paused, train

TINY = [RunSpec("digits-mlp", "adamw", "adamw", {"lr": lr}, seed=s) for s in (0, 1) for lr in (1e-2, 1e-4)]


@pytest.fixture
def tiny(monkeypatch):
    monkeypatch.setitem(EXPERIMENTS, "tiny", TINY)


@pytest.fixture
def one(tmp_path):
    return record(TINY[0], "smoke", tmp_path)


def test_a_record_says_everything_about_the_run(one):
    made = load(one)
    assert made.spec == TINY[0] and made.preset == "smoke" and not made.diverged
    assert made.curve["step"] == [1, 2, 3, 4, 5]
    assert made.step_seconds > 0 and made.seconds >= 5 * made.step_seconds / 2
    assert set(made.environment) == {"device", "processor", "threads", "python", "torch", "commit", "data_sha256"}
    assert len(made.environment["data_sha256"]) == 64


def test_what_an_optimizer_exposes_is_recorded(tmp_path):
    made = load(record(RunSpec("digits-mlp", "psdasgd-tensor", "psdasgd-tensor"), "smoke", tmp_path))
    assert len(made.distance) == len(made.curve["step"]) and len(made.distance[0]) == len(made.block_names) == 6
    assert all(v > 0 for v in made.distance[0])


def test_rerun_repeats_the_recorded_run(one):
    again = rerun(load(one))
    assert again.final_metric == pytest.approx(load(one).final_metric, rel=1e-5)
    assert again.losses[-1].item() == pytest.approx(load(one).curve["train_loss"][-1], rel=1e-5)


def test_a_diverged_run_is_recorded_as_such(tmp_path):
    made = load(record(RunSpec("digits-mlp", "sgd", "sgd", {"lr": 1e30}), "smoke", tmp_path))
    assert made.diverged and made.final_loss is None and metric(made) == 0.0


@pytest.mark.parametrize(
    "damage", [lambda t: t[: len(t) // 2], lambda t: "", lambda t: "{}", lambda t: '{"spec": {"task": "x"}}', lambda t: "[1, 2]"]
)
def test_a_damaged_file_gives_one_sentence_that_names_it(one, damage):
    one.write_text(damage(one.read_text()))
    with pytest.raises(ValueError, match=f"{one.name} is not a complete recorded run; delete it and record it again") as caught:
        load(one)
    assert "\n" not in str(caught.value)


def test_a_record_whose_curves_do_not_fit_is_refused(one):
    fields = json.loads(one.read_text())
    fields["curve"]["test_loss"].pop()
    one.write_text(json.dumps(fields))
    with pytest.raises(ValueError, match="inconsistent fields"):
        load(one)


def test_run_goes_on_where_it_stopped(tiny, tmp_path, capsys):
    command = ["run", "tiny", "--preset", "smoke", "--folder", str(tmp_path), "--jobs", "1"]
    kept = record(TINY[0], "smoke", tmp_path)
    stamp = kept.stat().st_mtime_ns
    assert main(command) == 0
    assert kept.stat().st_mtime_ns == stamp
    assert len(collect("tiny", folder=tmp_path, preset="smoke")) == 4
    assert main(["status", "--folder", str(tmp_path)]) == 0
    assert "tiny: 4 runs of digits-mlp; cpu not yet run" in capsys.readouterr().out


def test_run_stops_when_the_time_is_up_and_says_how_to_go_on(tiny, tmp_path, capsys):
    assert main(["run", "tiny", "--preset", "smoke", "--folder", str(tmp_path), "--jobs", "1", "--minutes", "0"]) == 1
    assert "4 runs still missing; run the same command again to go on." in capsys.readouterr().out


def test_a_killed_run_leaves_whole_files_only(tmp_path):
    """Kill −9 in the middle: every record there is complete, and the next run finishes the rest."""
    code = (
        "from pathlib import Path; from pslib.experiments import *; from pslib.experiments import record\n"
        f"for s in range(1000): record(RunSpec('digits-mlp', 'adam', 'adam', seed=s), 'smoke', Path({str(tmp_path)!r}))"
    )
    process = subprocess.Popen([sys.executable, "-c", code], env={**os.environ, "OMP_NUM_THREADS": "1"})
    folder, deadline = tmp_path / "smoke" / "digits-mlp", time.monotonic() + 60
    while len(list(folder.glob("*.json"))) < 3:
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.005)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert [load(p).preset for p in folder.glob("*.json")].count("smoke") >= 3


def test_collect_says_what_is_missing_and_how_to_make_it(tiny, tmp_path):
    with pytest.raises(ValueError, match="seed0.json is missing; make it with: python -m pslib.experiments run tiny --preset cpu"):
        collect("tiny", folder=tmp_path)


def test_collect_refuses_a_run_made_with_another_preset_or_other_settings(tiny, tmp_path):
    for spec in TINY:
        path = record(spec, "smoke", tmp_path)
        misplaced = spec.file(tmp_path, "cpu")
        misplaced.parent.mkdir(parents=True, exist_ok=True)
        misplaced.write_text(path.read_text())
    with pytest.raises(ValueError, match="was recorded with other settings"):
        collect("tiny", folder=tmp_path, preset="cpu")
    path = TINY[0].file(tmp_path, "smoke")
    fields = json.loads(path.read_text())
    fields["spec"]["settings"]["weight_decay"] = 0.5
    path.write_text(json.dumps(fields))
    with pytest.raises(ValueError, match="was recorded with other settings"):
        collect("tiny", folder=tmp_path, preset="smoke")


def test_unknown_experiment_and_misplaced_preset_give_one_sentence(capsys):
    assert main(["run", "nothing"]) == 2
    assert main(["run", "--preset", "smoke"]) == 2
    lines = capsys.readouterr().err.splitlines()
    assert lines[0].startswith("pslib.experiments: there is no experiment 'nothing'; choose one of mnist1d-cnn")
    assert lines[1] == "pslib.experiments: the book keeps no records of --preset smoke; give it a --folder."


def test_best_takes_the_rate_with_the_best_mean(tiny, tmp_path):
    records = [load(record(spec, "smoke", tmp_path)) for spec in TINY]
    grouped = by_setting(records)
    means = {key: sum(metric(r) for r in group) / 2 for key, group in grouped.items()}
    chosen = best(records)["adamw"]
    assert len(chosen) == 2
    assert sum(metric(r) for r in chosen) / 2 == max(means.values())


def test_a_twin_is_compared_with_the_network_that_it_is_the_twin_of(tmp_path):
    def twin(name, **settings):
        return load(record(RunSpec("digits-mlp", name, name, settings, rescale=2.0**10), "smoke", tmp_path)).curve["twin_distance"]

    assert twin("psdasgd-tensor") == [0.0] * 5
    adam = twin("adam", lr=0.01)
    assert len(adam) == 5 and all(0 < d <= 1 for d in adam)
    original = load(record(RunSpec("digits-mlp", "adam", "adam", {"lr": 0.01}), "smoke", tmp_path))
    assert "twin_distance" not in original.curve


def test_twin_distance_is_the_mean_total_variation():
    certain = torch.tensor([[100.0, 0.0], [0.0, 100.0]])
    assert twin_distance(certain, certain) == 0.0
    assert twin_distance(certain, certain.flip(1)) == 1.0
    assert twin_distance(certain, torch.zeros(2, 2)) == pytest.approx(0.5)
    assert twin_distance(certain, torch.full((2, 2), torch.nan)) == 1.0


def test_the_original_of_a_family_is_trained_once(tmp_path, monkeypatch):
    specs = [RunSpec("digits-mlp", "adam", "adam", {"lr": 0.01}, rescale=c, seed=7) for c in (0.5, 2.0, 4.0)]
    monkeypatch.setitem(EXPERIMENTS, "family", specs)
    ran = []
    inner = experiments._run
    monkeypatch.setattr(experiments, "_run", lambda spec, *a, **k: ran.append(spec.rescale) or inner(spec, *a, **k))
    assert main(["run", "family", "--preset", "smoke", "--folder", str(tmp_path), "--jobs", "1"]) == 0
    assert sorted(ran) == [0.5, 1.0, 2.0, 4.0]


def test_workers_in_other_processes_record_too(tmp_path):
    """The command as it is typed, its functions sent to two processes."""
    code = (
        "import sys, runpy; from pslib import experiments as e\n"
        "e.EXPERIMENTS.clear(); e.EXPERIMENTS['tiny'] = [e.RunSpec('digits-mlp', 'adam', 'adam', seed=s) for s in (0, 1)]\n"
        f"sys.argv[1:] = ['run', '--preset', 'smoke', '--jobs', '2', '--folder', {str(tmp_path)!r}]\n"
        "runpy.run_module('pslib.experiments', run_name='__main__', alter_sys=True)"
    )
    done = subprocess.run([sys.executable, "-c", code], env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert len(list((tmp_path / "smoke" / "digits-mlp").glob("*.json"))) == 2


def test_a_run_with_its_own_number_of_steps_has_its_own_file():
    long, short = RunSpec("digits-mlp", "adam", "adam"), RunSpec("digits-mlp", "adam", "adam", steps=7)
    assert long.slug != short.slug
    assert len(experiments._run(short, "cpu").losses) == 7


def test_a_run_is_trained_as_its_declaration_says(tmp_path):
    settings = ("digits-mlp", "sgd", "sgd", {"lr": 0.5})
    plain, clipped = RunSpec(*settings, steps=7), RunSpec(*settings, steps=7, how={"clip": 0.01})
    made = [load(record(spec, "cpu", tmp_path)) for spec in (plain, clipped)]
    assert plain.slug != clipped.slug and made[1].spec == clipped
    expected = train("digits-mlp", lambda p: contenders.make("sgd", p, lr=0.5), steps=7, clip=0.01).final_loss
    # A record keeps six digits.
    assert made[1].final_loss == pytest.approx(expected, rel=1e-5) and abs(made[0].final_loss - expected) > 0.02


def test_every_condition_has_every_method_and_changes_what_it_says():
    for task, rates in experiments.CONDITION_RATES.items():
        runs = EXPERIMENTS[f"conditions-{task}"]
        for name in experiments.CONDITIONS:
            there = [s for s in runs if {"steps": s.steps, "how": s.how} == experiments.condition(task, name)]
            wanted = 0 if name == "noise" and tasks.get(task).metric == "loss" else 3 * (3 + len(rates))
            assert len(there) == wanted, (task, name)
    assert experiments.condition("digits-vit", "quarter") == {"steps": None, "how": {"batch_size": 12}}
    assert experiments.condition("mnist1d-cnn3", "long") == {"steps": 1600, "how": {}}


def test_declared_runs_have_files_of_their_own_and_fit_in_json():
    for specs in EXPERIMENTS.values():
        assert len({s.file(FOLDER, "cpu") for s in specs}) == len(specs)
        assert all(RunSpec(**json.loads(json.dumps(asdict(s)))) == s for s in specs)


@pytest.mark.parametrize("name", EXPERIMENTS)
def test_the_book_has_every_declared_run(name):
    if name in NOT_YET_RUN:
        assert not any(s.file(FOLDER, preset).exists() for s in EXPERIMENTS[name] for preset in tasks.PRESETS)
        return
    records = collect(name)
    assert len({r.environment["data_sha256"] for r in records}) == 1


def test_the_book_keeps_no_record_that_is_not_declared():
    declared = {s.file(FOLDER, preset) for specs in EXPERIMENTS.values() for s in specs for preset in ("cpu", "full")}
    assert set(FOLDER.rglob("*.json")) == {path for path in declared if path.exists()}


def test_only_what_lacks_data_or_a_gpu_is_not_yet_run():
    assert {EXPERIMENTS[name][0].task.split("-")[0] for name in NOT_YET_RUN} == {"cifar100", "imagenet", "ade20k", "humanoid"}


def test_the_grid_is_wide_enough():
    rates = {s.settings["lr"] for s in EXPERIMENTS["mnist1d-cnn"] if s.contender == "adamw"}
    assert len(rates) >= 7
    for task in experiments.COMPARED:
        records = best(collect(task))
        for name in ("adamw", "adamw-0.98"):
            # The best rate is inside the grid: "best of the grid" means something.
            assert min(rates) < records[name][0].spec.settings["lr"] < max(rates)


@pytest.mark.parametrize("task", [name for name in experiments.BENCHMARK if f"benchmark-{name}" not in NOT_YET_RUN])
def test_every_task_of_the_benchmark_has_every_contender(task):
    specs = EXPERIMENTS[f"benchmark-{task}"]
    rates = {}
    for s in specs:
        rates.setdefault(s.contender, set()).add(s.settings.get("lr"))
    assert {name: len(r) for name, r in rates.items() if len(r) > 1} == {"adamw": 9, "adamw-0.98": 9, "momentum": 9}
    free = set(rates) - {"adamw", "adamw-0.98", "momentum"}
    assert free == {
        "adamw-default", "psdasgd-tensor", "psdasgd-model", "psdasgd-model-units", "ps-sps", "sps", "dadapt-sgd", "dadapt-adam",
        "dadapt-adam-0.98", "prodigy", "prodigy-0.98", "dog", "ldog", "momo-adam", "schedule-free",
    }
    # Authors' defaults: nothing set, but β₂ where the name says so.
    assert all(s.settings == ({"betas": [0.9, 0.98]} if s.contender.endswith("0.98") else {}) for s in specs if s.contender in free)
    assert {s.seed for s in specs} == {0, 1, 2} and len(specs) == 3 * (15 + 27)


# What may happen to a run that takes long.

LONG = RunSpec("digits-vit", "psdasgd-tensor", "psdasgd-tensor", steps=40)


def pieces(spec, folder, preset="cpu"):
    """Record a run that is stopped after every step; how often it was."""
    stopped = 0
    while True:
        try:
            record(spec, preset, folder, deadline=0)
            return stopped
        except Paused:
            stopped += 1


@pytest.mark.parametrize("name", [
    *(c[0] for c in experiments._contenders() if "lr" not in c[2]), "ldog", "psdasgd-model-units", "momentum", "adamw",
])
def test_a_run_in_pieces_is_the_run_in_one_piece(name, tmp_path):
    """Every attribute of every package's optimizer survives, not only what is in its state_dict."""
    otherwise = (name, {"lr": 0.1} if name == "momentum" else {})
    optimizer, settings = next(((o, s) for n, o, s in experiments._contenders() if n == name), otherwise)
    spec = RunSpec("digits-mlp", name, optimizer, settings, steps=12)
    whole = load(record(spec, "cpu", tmp_path / "whole"))
    assert pieces(spec, tmp_path) == 11
    cut = load(spec.file(tmp_path, "cpu"))
    assert (cut.curve, cut.distance) == (whole.curve, whole.distance)
    assert (cut.effective_lr, cut.final_loss) == (whole.effective_lr, whole.final_loss)
    assert not list(tmp_path.rglob("*.checkpoint")) and not list(tmp_path.rglob("*.part"))


def test_the_time_budget_stops_inside_a_run_and_the_next_call_goes_on(monkeypatch, tmp_path, capsys):
    monkeypatch.setitem(EXPERIMENTS, "long", [LONG])
    command = ["run", "long", "--folder", str(tmp_path), "--jobs", "1"]
    clock = iter(range(10_000))
    monkeypatch.setattr(experiments.time, "time", lambda: next(clock))
    assert main([*command, "--minutes", "0.1"]) == 1
    assert "1 runs still missing; run the same command again to go on." in capsys.readouterr().out
    (kept,) = tmp_path.rglob("*.checkpoint")
    assert kept.with_suffix(".json") == LONG.file(tmp_path, "cpu")
    monkeypatch.undo()
    monkeypatch.setitem(EXPERIMENTS, "long", [LONG])
    steps = []
    inner = contenders.make

    def counting(*args, **kwargs):
        optimizer = inner(*args, **kwargs)
        optimizer.register_step_post_hook(lambda *_: steps.append(1))
        return optimizer

    monkeypatch.setattr(contenders, "make", counting)
    assert main(command) == 0
    assert 0 < len(steps) < 40
    assert load(LONG.file(tmp_path, "cpu")).curve == load(record(LONG, "cpu", tmp_path / "whole")).curve


NETWORK = pickle.dumps({"identity": "?", "optimizer": {}, "run": {}, "model": {}})


@pytest.mark.parametrize("damage", [
    lambda b: b[:1000], lambda b: b"", lambda b: b"cats\ndogs\n", lambda b: pickle.dumps([1, 2]), lambda b: NETWORK,
])
def test_a_damaged_checkpoint_costs_time_and_nothing_else(damage, tmp_path, capsys):
    spec = RunSpec("digits-mlp", "adam", "adam", steps=6)
    with pytest.raises(Paused, match="digits-mlp, seed 0: 1 of 6 steps done"):
        record(spec, "cpu", tmp_path, deadline=0)
    (kept,) = tmp_path.rglob("*.checkpoint")
    kept.write_bytes(damage(kept.read_bytes()))
    made = load(record(spec, "cpu", tmp_path))
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"{kept} cannot be gone on from (") and line.endswith("; the run starts again.")
    assert made.curve == load(record(spec, "cpu", tmp_path / "whole")).curve


def test_a_checkpoint_of_other_settings_is_not_gone_on_from(tmp_path, capsys):
    old, new = (RunSpec("digits-mlp", "adamw", "adamw", {"lr": 0.01, "weight_decay": w}, steps=6) for w in (0.0, 0.5))
    with pytest.raises(Paused):
        record(old, "cpu", tmp_path, deadline=0)
    made = load(record(new, "cpu", tmp_path))
    assert "it is of another run, device or version" in capsys.readouterr().err
    assert made.curve == load(record(new, "cpu", tmp_path / "whole")).curve


def test_a_checkpoint_of_another_network_leaves_nothing_behind(tmp_path, monkeypatch, capsys):
    spec = RunSpec("digits-mlp", "adam", "adam", steps=6)
    with pytest.raises(Paused):
        record(spec, "cpu", tmp_path, deadline=0)
    task = tasks.get("digits-mlp")
    monkeypatch.setitem(tasks.TASKS, "digits-mlp", replace(task, build=lambda d: tasks.mlp(64, d.classes, 32)))
    made = load(record(spec, "cpu", tmp_path))
    assert "it is of another network" in capsys.readouterr().err
    assert made.curve == load(record(spec, "cpu", tmp_path / "whole")).curve


def test_an_optimizer_that_refuses_a_loss_that_is_no_number_has_diverged(tmp_path, monkeypatch):
    def refuses(*args, **kwargs):
        raise AssertionError("G > 0")

    monkeypatch.setattr(training, "step", refuses)
    spec = RunSpec("digits-mlp", "dog", "dog")
    with pytest.raises(AssertionError):
        record(spec, "smoke", tmp_path)
    nan = type("Nan", (tasks.Task,), {"loss": lambda self, logits, target: logits.sum() * float("nan")})
    monkeypatch.setitem(tasks.TASKS, "digits-mlp", nan(**vars(tasks.TASKS["digits-mlp"])))
    assert load(record(spec, "smoke", tmp_path)).diverged


def test_one_run_that_fails_does_not_cost_the_others(monkeypatch, tmp_path, capfd):
    mixed = [RunSpec("digits-mlp", "adam", "adam", {"lr": -1.0}), RunSpec("digits-mlp", "adamw", "adamw")]
    monkeypatch.setitem(EXPERIMENTS, "mixed", mixed)
    assert main(["run", "mixed", "--preset", "smoke", "--folder", str(tmp_path), "--jobs", "1"]) == 1
    out, err = capfd.readouterr()
    assert "digits-mlp/adam-lr-1-seed0 failed (ValueError: Invalid learning rate: -1.0)." in err and "1 runs still missing" in out
    assert len(list(tmp_path.rglob("*.json"))) == 1


def test_run_does_not_take_a_damaged_record_for_a_finished_run(tiny, tmp_path, capsys):
    path = record(TINY[0], "smoke", tmp_path)
    path.write_text("garbage")
    assert main(["run", "tiny", "--preset", "smoke", "--folder", str(tmp_path)]) == 2
    assert f"{path} is not a complete recorded run; delete it" in capsys.readouterr().err


@pytest.mark.parametrize("write", ["json.dump", "experiments.os.replace", "training.os.replace", "training._Pickler.dump"])
def test_kill_9_in_the_middle_of_a_write_loses_nothing(write, tmp_path):
    """The process kills itself half way through writing a record or a checkpoint; what was there before is there, and whole."""
    spec = RunSpec("digits-mlp", "adam", "adam", steps=4)
    kept = record(replace(spec, seed=1), "cpu", tmp_path)
    with pytest.raises(Paused):
        record(spec, "cpu", tmp_path, deadline=0)
    before = kept.read_bytes()
    code = f"""
import json, os, pickle, signal
from pathlib import Path
from pslib import experiments, training
def die(*args, **kwargs):
    for a in args:
        if hasattr(a, "write"):
            a.write('{{"spec": '); a.flush()
    os.kill(os.getpid(), signal.SIGKILL)
{write} = die
deadline = 0 if {write!r}.startswith("training") else float("inf")
experiments.record(experiments.RunSpec("digits-mlp", "adam", "adam", steps=4), "cpu", Path({str(tmp_path)!r}), deadline=deadline)
"""
    done = subprocess.run([sys.executable, "-c", code], env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True)
    assert done.returncode == -signal.SIGKILL, done.stderr
    assert kept.read_bytes() == before
    assert not spec.file(tmp_path, "cpu").exists()
    assert pieces(spec, tmp_path) == 2
    assert load(spec.file(tmp_path, "cpu")).curve == load(record(spec, "cpu", tmp_path / "whole")).curve


def test_two_workers_of_a_cluster_record_the_same_declared_runs(tiny, tmp_path):
    pytest.importorskip("submitit")
    assert main(["run", "tiny", "--preset", "smoke", "--folder", str(tmp_path), "--jobs", "2", "--cluster", "local"]) == 0
    results = [pickle.loads(path.read_bytes()) for path in (tmp_path / "submitted").glob("*_result.pkl")]
    # Each made its half, none the other's.
    assert sorted(results) == [("success", 2), ("success", 2)]
    here = tmp_path / "here"
    assert main(["run", "tiny", "--preset", "smoke", "--folder", str(here), "--jobs", "1"]) == 0
    for there, alone in zip(collect("tiny", folder=tmp_path, preset="smoke"), collect("tiny", folder=here, preset="smoke"), strict=True):
        assert there.curve == alone.curve


def test_a_cluster_that_is_not_there_gives_one_sentence(tiny, tmp_path, capsys):
    pytest.importorskip("submitit")
    assert main(["run", "tiny", "--preset", "smoke", "--folder", str(tmp_path), "--cluster", "nowhere"]) == 2
    assert capsys.readouterr().err.splitlines()[-1].startswith("pslib.experiments: --cluster nowhere: ")


def test_a_cluster_without_its_package_gives_one_sentence(tiny, tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "submitit", None)
    assert main(["run", "tiny", "--preset", "smoke", "--folder", str(tmp_path), "--cluster", "local"]) == 2
    assert capsys.readouterr().err.splitlines()[-1] == "pslib.experiments: --cluster needs the package submitit: pip install submitit."


# What is there and what is not.


def test_status_says_at_which_preset_everything_is_recorded(capsys):
    assert main(["status"]) == 0
    lines = dict(line.split(": ", 1) for line in capsys.readouterr().out.splitlines())
    assert set(lines) == set(EXPERIMENTS)
    assert lines["benchmark-digits-mlp"] == "126 runs of digits-mlp; cpu 126 recorded, 0 missing"
    assert lines["benchmark-cifar10-vit"].startswith("126 runs of cifar10-vit; cpu 126 recorded, 0 missing; full ")
    assert all(lines[name].endswith("cpu not yet run; full not yet run") for name in NOT_YET_RUN)


def test_missing_data_give_one_sentence_and_the_rest_is_recorded(monkeypatch, tmp_path, capsys):
    monkeypatch.setenv("PSLIB_DATA", str(tmp_path / "nowhere"))
    tasks.datasets.cifar100.cache_clear()
    for name in list(EXPERIMENTS):
        monkeypatch.delitem(EXPERIMENTS, name)
    monkeypatch.setitem(EXPERIMENTS, "tiny", TINY)
    monkeypatch.setitem(EXPERIMENTS, "photographs", [RunSpec("cifar100-vit", "adam", "adam")])
    command = ["--preset", "smoke", "--folder", str(tmp_path), "--jobs", "1"]
    assert main(["run", "photographs", *command]) == 2
    sentence = f"CIFAR-100 is not in {tmp_path / 'nowhere'}: get it with torchvision.datasets.CIFAR100("
    line = capsys.readouterr().err.splitlines()[-1]
    assert line.startswith("pslib.experiments: " + sentence)
    assert main(["run", *command]) == 0
    assert f"photographs is left out. {sentence}" in capsys.readouterr().err
    assert len(collect("tiny", folder=tmp_path, preset="smoke")) == 4


def test_no_workers_give_one_sentence(tiny, tmp_path, capsys):
    assert main(["run", "tiny", "--folder", str(tmp_path), "--jobs", "0"]) == 2
    assert capsys.readouterr().err == "pslib.experiments: --jobs must be at least 1.\n"


def test_a_preset_that_a_task_does_not_have_gives_one_sentence(tiny, tmp_path, capsys):
    assert main(["run", "tiny", "--preset", "full", "--folder", str(tmp_path)]) == 2
    assert capsys.readouterr().err.splitlines()[-1] == "pslib.experiments: digits-mlp has no preset 'full': 'cpu' is all there is of it."


@pytest.mark.parametrize("content", [b"\x89PNG\r\n\x1a\n\x00\xff", b'{"title": "somebody else\'s"}', b"[]", b'"text"'])
def test_a_foreign_file_among_the_records_gives_one_sentence(content, tiny, tmp_path, capsys):
    path = TINY[0].file(tmp_path, "cpu")
    path.parent.mkdir(parents=True)
    path.write_bytes(content)
    assert main(["status", "--folder", str(tmp_path)]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"pslib.experiments: {path} is not a complete recorded run; delete it and record it again")


def test_a_deleted_record_comes_back_within_the_band_of_its_seeds(monkeypatch, tmp_path):
    """Another processor rounds differently, and training amplifies it: the same number is promised on the same hardware only."""
    specs = [s for s in EXPERIMENTS["benchmark-digits-mlp"] if s.contender == "psdasgd-tensor"]
    recorded = [load(s.file(FOLDER, "cpu")) for s in specs]
    for s in specs[1:]:
        copy = s.file(tmp_path, "cpu")
        copy.parent.mkdir(parents=True, exist_ok=True)
        copy.write_bytes(s.file(FOLDER, "cpu").read_bytes())
    monkeypatch.setitem(EXPERIMENTS, "again", specs)
    assert main(["run", "again", "--folder", str(tmp_path), "--jobs", "1"]) == 0
    again = load(specs[0].file(tmp_path, "cpu"))
    low, high = (f(r.final_metric for r in recorded) for f in (min, max))
    if all(again.environment[key] == recorded[0].environment[key] for key in ("processor", "torch")):
        assert low <= again.final_metric <= high
    # Elsewhere within three of the 297 test images.
    assert low - 3 / 297 <= again.final_metric <= high + 3 / 297


# Other kinds of problem.


def test_breadth_has_ours_the_peers_and_adamw_tuned_and_as_it_is():
    for task, (rates, _) in experiments.BREADTH.items():
        specs = EXPERIMENTS[f"breadth-{task}"]
        control = isinstance(tasks.get(task), tasks.Control)
        names = {s.contender for s in specs}
        assert {"psdasgd-tensor", "psdasgd-model", "prodigy", "dadapt-adam", "schedule-free", "adamw-default", "adamw"} <= names
        # Polyak's step needs to know how low the loss can be: an agent's losses have no such number.
        assert ("ps-sps" in names) != control
        by = {name: [s for s in specs if s.contender == name] for name in names}
        assert all(sorted({s.seed for s in group}) == list(range(5 if control else 3)) for group in by.values())
        assert sorted({s.settings["lr"] for s in by["adamw"]}) == sorted(rates) and len(rates) >= 3
        assert all(s.settings == {} for name in ("psdasgd-tensor", "psdasgd-model", "prodigy", "dadapt-adam") for s in by[name])
        # The temperature is the same for all, so that they differ in what the task is about.
        assert {s.how.get("temperature") for s in specs} == {experiments.TEMPERATURE_RATE if control else None}


def test_the_contrastive_floor_is_the_one_that_is_declared():
    floors = {s.settings["f_star"] for s in EXPERIMENTS["breadth-cifar10-simclr"] if s.contender == "ps-sps-floor"}
    assert len(floors) == 1 and floors.pop() == pytest.approx(tasks.get("cifar10-simclr").floor, abs=1e-6)


def test_a_record_keeps_what_else_a_task_says(tmp_path):
    made = load(record(RunSpec("streets-unet", "psdasgd-tensor", "psdasgd-tensor"), "smoke", tmp_path))
    assert len(made.details["iou"]) == 5 and len(made.details["predictions"]) == 4
    assert made.final_metric == pytest.approx(sum(v or 0 for v in made.details["iou"]) / 5, abs=1e-4)


def test_an_agent_is_recorded_by_its_returns(tmp_path):
    spec = RunSpec("pendulum-sac", "adamw", "adamw", {"lr": 1e-3}, how={"schedule": "cosine", "temperature": 1e-3})
    made = load(record(spec, "smoke", tmp_path))
    steps = tasks.get("pendulum-sac", "smoke").steps
    # A step costs between 0 and −16.3 and an episode has two hundred.
    assert made.curve["step"][-1] == steps and -200 * 16.3 < made.final_metric < 0
    # Looks before the first update have no loss to tell.
    assert made.curve["train_loss"] == made.curve["test_loss"] and made.curve["train_loss"][-1] > 0 and None in made.curve["train_loss"]
    assert made.parameters == sum(p.numel() for p in experiments.rerun(made).model.parameters())
    assert made.details["states"] and made.details["temperature"]
    assert made.environment["data_sha256"] == tasks.get("pendulum-sac").load().sha256


def test_of_returns_and_overlaps_the_higher_are_better(one):
    def made(task, lr, value):
        return replace(load(one), spec=RunSpec(task, "adamw", "adamw", {"lr": lr}), final_metric=value, diverged=value is None)

    for task, worst in (("pendulum-sac", -float("inf")), ("camvid-unet", 0.0), ("chars-transformer", float("inf"))):
        low, high, lost = made(task, 0.1, 0.2), made(task, 0.3, 0.7), made(task, 1.0, None)
        assert metric(lost) == worst
        assert best([low, high, lost])["adamw"] == [low if worst > 0 else high]
