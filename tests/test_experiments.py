"""Recorded runs: complete or not there, resumed, validated, reproducible."""

import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import asdict

import pytest
import torch

from pslib import experiments
from pslib.experiments import EXPERIMENTS, RunSpec, best, by_setting, collect, load, main, metric, record, rerun, twin_distance

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
    assert "tiny: 4 runs of digits-mlp, 4 recorded (preset smoke), 0 missing" in capsys.readouterr().out


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
    folder, deadline = tmp_path / "digits-mlp", time.monotonic() + 60
    while len(list(folder.glob("*.json"))) < 3:
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.005)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert [load(p).preset for p in folder.glob("*.json")].count("smoke") >= 3


def test_collect_says_what_is_missing_and_how_to_make_it(tiny, tmp_path):
    with pytest.raises(ValueError, match="seed0.json is missing; make it with: python -m pslib.experiments run tiny"):
        collect("tiny", folder=tmp_path)


def test_collect_refuses_a_run_made_with_another_preset_or_other_settings(tiny, tmp_path):
    for spec in TINY:
        record(spec, "smoke", tmp_path)
    with pytest.raises(ValueError, match="was recorded with other settings"):
        collect("tiny", folder=tmp_path, preset="cpu")
    path = TINY[0].file(tmp_path)
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
    assert lines[1] == "pslib.experiments: the book's own records are made with --preset cpu; give --folder for another preset."


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
    assert len(list((tmp_path / "digits-mlp").glob("*.json"))) == 2


def test_a_run_with_its_own_number_of_steps_has_its_own_file():
    long, short = RunSpec("digits-mlp", "adam", "adam"), RunSpec("digits-mlp", "adam", "adam", steps=7)
    assert long.slug != short.slug
    assert len(experiments._run(short, None).losses) == 7


def test_declared_runs_have_files_of_their_own_and_fit_in_json():
    for specs in EXPERIMENTS.values():
        assert len({s.file(experiments.FOLDER) for s in specs}) == len(specs)
        assert all(RunSpec(**json.loads(json.dumps(asdict(s)))) == s for s in specs)


@pytest.mark.parametrize("name", EXPERIMENTS)
def test_the_book_has_every_declared_run(name):
    records = collect(name)
    assert len({r.environment["data_sha256"] for r in records}) == 1


def test_the_grid_is_wide_enough():
    rates = {s.settings["lr"] for s in EXPERIMENTS["mnist1d-cnn"] if s.contender == "adamw"}
    assert len(rates) >= 7
    for task in experiments.COMPARED:
        records = best(collect(task))
        for name in ("adamw", "adamw-0.98"):
            # The best rate is inside the grid: "best of the grid" means something.
            assert min(rates) < records[name][0].spec.settings["lr"] < max(rates)
