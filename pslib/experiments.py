"""Recorded runs: declared as data, made by one command, read by the chapters::

    python -m pslib.experiments list
    python -m pslib.experiments run [NAME …] [--jobs 2] [--minutes 30] [--preset smoke|cpu] [--folder FOLDER]
    python -m pslib.experiments status

A run is task × optimizer × settings × seed.  Each becomes one small JSON file, written atomically, so that `run`
goes on where it stopped, whatever stopped it.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field, replace
from functools import lru_cache
from pathlib import Path

import numpy as np
import torch

from . import contenders, tasks, twins
from .training import History, train

__all__ = ["EXPERIMENTS", "Record", "RunSpec", "best", "collect", "load", "rerun"]

FOLDER = Path(__file__).resolve().parent.parent / "book" / "runs"
GRID = (3e-4, 1e-3, 3e-3, 1e-2, 3e-2, 1e-1, 3e-1)


@dataclass(frozen=True)
class RunSpec:
    """One training run, fully declared.

    `init_scale` multiplies every initial parameter; `rescale` is the factor c of a function-equivalent twin
    (`pslib.twins`, at the modules that the task names); `steps` is how many, if not as many as the task says.
    """

    task: str
    contender: str
    optimizer: str
    settings: dict = field(default_factory=dict)
    init_scale: float = 1.0
    seed: int = 0
    rescale: float = 1.0
    steps: int | None = None

    @property
    def slug(self) -> str:
        """A file name that says what the run is."""
        parts = [self.contender]
        if "lr" in self.settings:
            parts.append(f"lr{self.settings['lr']:g}")
        if self.steps is not None:
            parts.append(f"steps{self.steps}")
        if self.init_scale != 1:
            parts.append(f"init{self.init_scale:g}")
        if self.rescale != 1:
            parts.append(f"rescale{self.rescale:g}")
        return "-".join([*parts, f"seed{self.seed}"])

    def file(self, folder: Path) -> Path:
        """Where its record is kept."""
        return folder / self.task / f"{self.slug}.json"


def _contenders() -> list[tuple[str, str, dict]]:
    """(contender, optimizer, settings): what every task is trained with."""
    grid = [
        (name, "adamw", {"lr": lr, "betas": [0.9, beta2], "weight_decay": 0.0})
        for name, beta2 in (("adamw", 0.999), ("adamw-0.98", 0.98))
        for lr in GRID
    ]
    free = [
        (name, name, {})
        for name in (
            "psdasgd-tensor", "psdasgd-model", "ps-sps", "sps", "prodigy", "dadapt-adam", "dadapt-sgd", "dog", "momo-adam", "schedule-free",
        )
    ]
    return [
        *grid, *free, ("adamw-default", "adamw", {}), ("prodigy-0.98", "prodigy", {"betas": [0.9, 0.98]}),
        ("dadapt-adam-0.98", "dadapt-adam", {"betas": [0.9, 0.98]}),
    ]


def _comparison(task: str, seeds: int) -> list[RunSpec]:
    return [
        RunSpec(task, name, optimizer, settings, seed=seed) for seed in range(seeds) for name, optimizer, settings in _contenders()
    ]


ADAM = {"betas": [0.9, 0.999], "weight_decay": 0.0}
OURS = [("psdasgd-tensor", "psdasgd-tensor", {}), ("psdasgd-model", "psdasgd-model", {})]
PRODIGY = ("prodigy-0.98", "prodigy", {"betas": [0.9, 0.98]})
PS_SPS = ("ps-sps", "ps-sps", {})


def _adamw(*rates: float) -> list[tuple[str, str, dict]]:
    return [("adamw", "adamw", {"lr": lr, **ADAM}) for lr in rates]


def _initial_scale(task: str, chosen: list[tuple[str, str, dict]], scales: Iterable[float], seeds: int) -> list[RunSpec]:
    return [
        RunSpec(task, name, optimizer, settings, init_scale=scale, seed=seed)
        for seed in range(seeds) for scale in scales for name, optimizer, settings in chosen
    ]


def _units(seeds: int) -> list[RunSpec]:
    """One function in five descriptions; AdamW at the rates that do best in the usual one."""
    return [
        RunSpec("mnist1d-cnn", name, optimizer, settings, seed=seed, rescale=2.0**exponent)
        for seed in range(seeds) for exponent in (-10, -5, 0, 5, 10) for name, optimizer, settings in [*OURS, PRODIGY, *_adamw(1e-2, 3e-2)]
    ]


EIGHT = [*OURS, PS_SPS, PRODIGY, *_adamw(1e-3, 3e-3, 1e-2, 3e-2)]
COMPARED = ("digits-mlp", "mnist1d-cnn", "mnist1d-cnn3", "mnist1d-resnet", "chars-transformer")
WIDE_GRID = (1e-4, *GRID, 1.0)
MOMENTUM_GRID = (1e-3, 3e-3, 1e-2, 3e-2, 1e-1, 3e-1, 1.0, 3.0, 10.0)


def _benchmark(task: str, seeds: int) -> list[RunSpec]:
    """Every contender: those with a learning rate over nine or more of them, the others at their authors' defaults."""
    tuned = [
        *((name, "adamw", {"lr": lr, "betas": [0.9, beta2], "weight_decay": 0.0})
          for name, beta2 in (("adamw", 0.999), ("adamw-0.98", 0.98)) for lr in WIDE_GRID),
        *(("momentum", "momentum", {"lr": lr}) for lr in MOMENTUM_GRID),
    ]
    free = [c for c in _contenders() if "lr" not in c[2]]
    return [
        RunSpec(task, name, optimizer, settings, seed=seed) for seed in range(seeds)
        for name, optimizer, settings in [*free, ("ldog", "ldog", {}), ("psdasgd-model-units", "psdasgd-model-units", {}), *tuned]
    ]


# The one number that is left in each method that needs no learning rate, and the values tried beside its default.
KNOBS = {
    "psdasgd-tensor": ("d0", (2.0**-14, 2.0**-11, 2.0**-5, 2.0**-2), {}),
    "ps-sps": ("c", (0.05, 0.1, 0.5, 1.0), {}),
    "ps-sps-floor": ("f_star", (0.01, 0.1, 0.5, 1.0), {}),
    "prodigy-0.98": ("d0", (1e-8, 1e-7, 1e-4, 1e-2), {"betas": [0.9, 0.98]}),
    "dadapt-adam-0.98": ("d0", (1e-8, 1e-7, 1e-4, 1e-2), {"betas": [0.9, 0.98]}),
    "dog": ("reps_rel", (1e-8, 1e-7, 1e-4, 1e-2), {}),
    "momo-adam": ("lr", (1e-4, 1e-3, 1e-1, 1.0), {}),
    "schedule-free": ("lr", (2.5e-5, 2.5e-4, 2.5e-2, 2.5e-1), {}),
}


def _knobs(task: str, seeds: int) -> list[RunSpec]:
    """Each method at other values of its one number; the defaults are in the benchmark."""
    optimizers = {name: optimizer for name, optimizer, _ in _contenders()} | {"ps-sps-floor": "ps-sps"}
    return [
        RunSpec(task, f"{name}-{knob}{value:g}", optimizers[name], {knob: value, **settings}, seed=seed)
        for seed in range(seeds) for name, (knob, values, settings) in KNOBS.items() for value in values
    ]


TWIN_STEPS = {"digits-mlp": 900, "mnist1d-cnn": 600, "chars-transformer": 150}
FACTORS = tuple(2.0**exponent for exponent in (0, -10, -7, -4, -2, 2, 4, 7, 10))


@dataclass(frozen=True)
class _Rates:
    """The learning rates that one method is tuned over at c = 1, and the one chosen for each task (see twin-rates-…)."""

    grid: tuple[float, ...]
    settings: dict
    chosen: dict[str, float]


def _twin_rates(task: str) -> list[RunSpec]:
    """What the methods with a learning rate are tuned with, at c = 1."""
    return [
        RunSpec(task, name, name, {"lr": lr, **rates.settings}, seed=seed, steps=TWIN_STEPS[task])
        for seed in range(2) for name, rates in TWIN_RATES.items() if task in rates.chosen for lr in rates.grid
    ]


def _twins(task: str, seeds: int) -> list[RunSpec]:
    """Function-equivalent twins, every method at the rate that is best at c = 1 or at its defaults."""
    chosen = [
        (name, name, {"lr": rates.chosen[task], **rates.settings}) for name, rates in TWIN_RATES.items() if task in rates.chosen
    ]
    chosen += [("prodigy", "prodigy", {}), ("dog", "dog", {}), PS_SPS, *OURS]
    return [
        RunSpec(task, name, optimizer, settings, seed=seed, rescale=c, steps=TWIN_STEPS[task])
        for seed in range(seeds) for name, optimizer, settings in chosen for c in FACTORS
    ]


def _blocks(task: str, seeds: int) -> list[RunSpec]:
    """PS-DA-SGD with every kind of block and unit."""
    return [
        RunSpec(task, name, name, {}, seed=seed) for seed in range(seeds) for name in (*(n for n, _, _ in OURS), *contenders.BLOCKS)
    ]


def _scales(task: str, seeds: int) -> list[RunSpec]:
    """Initial scales over six orders of magnitude; AdamW at the rates that do best at ×1."""
    chosen = [*OURS, PS_SPS, PRODIGY, *_adamw(BEST_ADAMW[task])]
    return _initial_scale(task, chosen, FACTORS, seeds)


_ADAM_GRID = (1e-3, 3e-3, 1e-2, 3e-2, 1e-1)
_SGD_GRID = (1e-2, 3e-2, 1e-1, 3e-1, 1.0)
TWIN_RATES = {
    "sgd": _Rates(_SGD_GRID, {}, {"digits-mlp": 0.3, "mnist1d-cnn": 1.0, "chars-transformer": 1.0}),
    "momentum": _Rates(_SGD_GRID, {}, {"digits-mlp": 0.1, "mnist1d-cnn": 0.3, "chars-transformer": 0.3}),
    "adam": _Rates(_ADAM_GRID, {}, {"digits-mlp": 0.03, "mnist1d-cnn": 0.03, "chars-transformer": 0.01}),
    "adamw": _Rates(_ADAM_GRID, {"weight_decay": 0.01}, {"digits-mlp": 0.03, "mnist1d-cnn": 0.03, "chars-transformer": 0.01}),
    "weight-norm": _Rates(_ADAM_GRID, {}, {"digits-mlp": 0.03, "mnist1d-cnn": 0.03, "chars-transformer": 0.03}),
    "nd-adam": _Rates(_SGD_GRID, {}, {"digits-mlp": 0.3, "mnist1d-cnn": 0.3, "chars-transformer": 0.3}),
    "path-sgd": _Rates(_SGD_GRID, {}, {"digits-mlp": 0.1, "mnist1d-cnn": 0.3}),
}
BEST_ADAMW = {"digits-mlp": 3e-2, "mnist1d-cnn": 3e-2, "mnist1d-resnet": 1e-2}

EXPERIMENTS: dict[str, list[RunSpec]] = {
    "mnist1d-cnn": _comparison("mnist1d-cnn", 5),
    "digits-mlp": _comparison("digits-mlp", 5),
    "chars-transformer": _comparison("chars-transformer", 3),
    "initial-scale": _initial_scale("mnist1d-cnn", EIGHT, (1 / 8, 8.0), 5),
    "units": _units(3),
    "initial-scale-deeper": _initial_scale("mnist1d-cnn3", EIGHT, (8.0,), 2),
    "mnist1d-resnet": _comparison("mnist1d-resnet", 3),
    "mnist1d-cnn3": _comparison("mnist1d-cnn3", 3),
    **{f"twin-rates-{task}": _twin_rates(task) for task in TWIN_STEPS},
    **{f"twins-{task}": _twins(task, 3) for task in TWIN_STEPS},
    **{f"blocks-{task}": _blocks(task, 3) for task in COMPARED},
    **{f"scales-{task}": _scales(task, 3) for task in ("digits-mlp", "mnist1d-cnn", "mnist1d-resnet")},
    **{f"benchmark-{task}": _benchmark(task, 3) for task in COMPARED},
    **{f"knobs-{task}": _knobs(task, 3) for task in ("mnist1d-resnet", "chars-transformer")},
}

PRESETS = {"cpu": None, "smoke": 5}


@dataclass(frozen=True)
class Record:
    """A recorded run.

    Attributes:
        spec: what was run; `preset` at which length ("cpu" is the task's own).
        curve: "step", "train_loss" (mean since the last point, nats), "test_loss", "test_metric", and for a twin
            "twin_distance": how far its predictions are from those of the network that it is the twin of (`twin_distance`).
        final_loss, final_metric: see `pslib.training.History`; null for a diverged run's infinite loss.
        diverged: whether a loss stopped being finite.
        seconds, step_seconds: wall time of the run and of one training step.
        distance, effective_lr: what the optimizer exposed along the curve, [points][blocks].
        environment: device, processor, threads, versions, commit, and the data's sha256.
    """

    spec: RunSpec
    preset: str
    curve: dict
    final_loss: float | None
    final_metric: float | None
    diverged: bool
    seconds: float
    step_seconds: float
    distance: list
    effective_lr: list
    block_names: list
    environment: dict


def _commit() -> str:
    try:
        where = {"cwd": Path(__file__).parent, "capture_output": True, "text": True}
        return subprocess.run(["git", "rev-parse", "--short", "HEAD"], check=True, **where).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def _environment(task: str, device: str) -> dict:
    return {
        "device": torch.cuda.get_device_name() if device == "cuda" else "cpu", "processor": _processor(),
        "threads": torch.get_num_threads(), "python": platform.python_version(), "torch": torch.__version__,
        "commit": _commit(), "data_sha256": tasks.get(task).load().sha256,
    }


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def _finite(value: float) -> float | None:
    return float(f"{value:.6g}") if np.isfinite(value) else None


def _run(spec: RunSpec, steps: int | None, keep_outputs: bool = False) -> History:
    models = []

    def prepare(model):
        if spec.rescale != 1:
            twins.rescale(model, list(tasks.get(spec.task).rescaled), spec.rescale)
        contenders.prepare(spec.optimizer, model)
        models.append(model)

    return train(
        spec.task, lambda params: contenders.make(spec.optimizer, params, model=models[0], **spec.settings), seed=spec.seed,
        steps=spec.steps if steps is None else steps, init_scale=spec.init_scale, prepare=prepare, keep_outputs=keep_outputs,
    )


@lru_cache(maxsize=1)
def _original_outputs(spec_json: str, steps: int | None) -> list[torch.Tensor]:
    return _run(RunSpec(**json.loads(spec_json)), steps, keep_outputs=True).outputs


def twin_distance(outputs: torch.Tensor, others: torch.Tensor) -> float:
    """The mean total variation distance between the predictions of two classifiers on the same inputs, from 0 to 1.

    Args:
        outputs, others: logits, [..., classes].  What is not finite predicts nothing: the distance is then 1.
    """
    difference = (outputs.softmax(-1) - others.softmax(-1)).abs().sum(-1) / 2
    return difference.nan_to_num(nan=1.0).double().mean().item()


def rerun(record: Record) -> History:
    """Train the recorded run again, here and now."""
    return _run(record.spec, PRESETS[record.preset])


def record(spec: RunSpec, preset: str, folder: Path) -> Path:
    """Run and write the record; an existing file is replaced only once the new one is complete."""
    history = _run(spec, PRESETS[preset], keep_outputs=spec.rescale != 1)
    edges = [0, *history.steps]
    curve = {
        "step": history.steps,
        "train_loss": [_finite(history.losses[i:j].mean().item()) for i, j in zip(edges, edges[1:], strict=False)],
        "test_loss": [_finite(v) for v in history.test_loss], "test_metric": [_finite(v) for v in history.test_metric],
    }
    if spec.rescale != 1:
        original = _original_outputs(json.dumps(asdict(replace(spec, rescale=1.0))), PRESETS[preset])
        curve["twin_distance"] = [_finite(twin_distance(x, y)) for x, y in zip(history.outputs, original, strict=False)]
    rows = {name: [[_finite(v) for v in row] for row in getattr(history, name)] for name in ("distance", "effective_lr")}
    device = next(history.model.parameters()).device.type
    made = Record(
        spec, preset, curve, _finite(history.final_loss), _finite(history.final_metric), history.diverged, round(history.seconds, 2),
        round(history.step_seconds, 6), **rows, block_names=history.block_names, environment=_environment(spec.task, device),
    )
    path = spec.file(folder)
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile("w", dir=path.parent, prefix=".", suffix=".part", delete=False) as f:
        json.dump(asdict(made), f, separators=(",", ":"))
        f.write("\n")
    os.replace(f.name, path)
    return path


def load(path: Path) -> Record:
    """Read one record.

    Raises:
        ValueError: naming the file, if it is not a complete record.
    """
    try:
        fields = json.loads(Path(path).read_text())
        fields["spec"] = RunSpec(**fields["spec"])
        made = Record(**fields)
        points = len(made.curve["step"])
        lengths_agree = all(len(made.curve[k]) == points for k in ("train_loss", "test_loss", "test_metric"))
        if not lengths_agree or made.preset not in PRESETS or "torch" not in made.environment:
            raise ValueError("inconsistent fields")
    except (json.JSONDecodeError, TypeError, KeyError, AttributeError, ValueError) as error:
        raise ValueError(f"{path} is not a complete recorded run; delete it and record it again ({error}).") from None
    return made


def collect(experiment: str, *, folder: Path = FOLDER, preset: str = "cpu") -> list[Record]:
    """All records of an experiment, in declared order.

    Raises:
        ValueError: if the experiment does not exist, or a run is missing, is damaged or was made with another preset or settings.
    """
    records = []
    for spec in _declared(experiment):
        path = spec.file(folder)
        if not path.exists():
            raise ValueError(f"{path} is missing; make it with: python -m pslib.experiments run {experiment}")
        made = load(path)
        if made.preset != preset or made.spec != spec:
            raise ValueError(f"{path} was recorded with other settings; delete it and run: python -m pslib.experiments run {experiment}")
        records.append(made)
    return records


def _declared(name: str) -> list[RunSpec]:
    if name not in EXPERIMENTS:
        raise ValueError(f"there is no experiment {name!r}; choose one of {', '.join(EXPERIMENTS)}.")
    return EXPERIMENTS[name]


def by_setting(records: Iterable[Record]) -> dict[tuple, list[Record]]:
    """Group the seeds: (contender, learning rate or None, initial scale, rescale) → its records."""
    grouped: dict[tuple, list[Record]] = {}
    for r in records:
        s = r.spec
        grouped.setdefault((s.contender, s.settings.get("lr"), s.init_scale, s.rescale), []).append(r)
    return grouped


def metric(record: Record) -> float:
    """The final metric as a number; inf where it is a loss and the run diverged."""
    return float("inf") if record.final_metric is None else record.final_metric


def best(records: Iterable[Record]) -> dict[str, list[Record]]:
    """For each contender its records at the learning rate with the best mean metric over seeds (all of them, if it has none)."""
    records = list(records)
    sign = -1 if tasks.get(records[0].spec.task).metric == "accuracy" else 1
    ranked = sorted(by_setting(records).items(), key=lambda item: sign * np.mean([metric(r) for r in item[1]]))
    chosen: dict[str, list[Record]] = {}
    for (name, *_), group in ranked:
        chosen.setdefault(name, group)
    return chosen


def _record_family(family: list[RunSpec], preset: str, folder: Path, deadline: float) -> int:
    """Record runs that are each other's twins, so that the original is trained once for all; returns how many it recorded."""
    torch.set_num_threads(1)
    done = 0
    for spec in family:
        if time.time() < deadline:
            record(spec, preset, folder)
            done += 1
    return done


def run(names: list[str], preset: str, folder: Path, jobs: int, minutes: float) -> int:
    """Record what is missing; returns how many runs are still missing afterwards."""
    from joblib import Parallel, delayed
    from tqdm import tqdm

    wanted = [spec for name in names for spec in _declared(name)]
    missing = [spec for spec in wanted if not spec.file(folder).exists()]
    families: dict[Path, list[RunSpec]] = {}
    for spec in missing:
        families.setdefault(replace(spec, rescale=1.0).file(folder), []).append(spec)
    deadline = time.time() + 60 * minutes

    def within_budget():
        for family in families.values():
            if time.time() < deadline:
                yield delayed(_record_family)(family, preset, folder, deadline)

    with tqdm(total=len(missing), desc="recording", unit="run") as bar:
        for done in Parallel(n_jobs=jobs, return_as="generator_unordered", pre_dispatch=jobs)(within_budget()):
            bar.update(done)
    return sum(not spec.file(folder).exists() for spec in wanted)


def main(argv: list[str] | None = None) -> int:
    """The command line; returns the exit status."""
    parser = argparse.ArgumentParser(prog="python -m pslib.experiments", description="Recorded runs of the book.")
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("list", help="the declared experiments")
    status = commands.add_parser("status", help="what is recorded and what is missing")
    runner = commands.add_parser("run", help="record what is missing; stops cleanly when the time is up")
    runner.add_argument("names", nargs="*", help="experiments (default: all)")
    runner.add_argument("--preset", choices=PRESETS, default="cpu")
    runner.add_argument("--jobs", type=int, default=os.cpu_count())
    runner.add_argument("--minutes", type=float, default=float("inf"), help="start no run after this time")
    for command in (status, runner):
        command.add_argument("--folder", type=Path, default=FOLDER)
    args = parser.parse_args(argv)
    try:
        if args.command == "run":
            if args.preset != "cpu" and args.folder == FOLDER:
                raise ValueError("the book's own records are made with --preset cpu; give --folder for another preset.")
            missing = run(args.names or list(EXPERIMENTS), args.preset, args.folder, args.jobs, args.minutes)
            print(f"{missing} runs still missing" + ("; run the same command again to go on." if missing else "."))
            return 1 if missing else 0
        for name, specs in EXPERIMENTS.items():
            line = f"{name}: {len(specs)} runs of {specs[0].task}"
            if args.command == "status":
                present = [load(s.file(args.folder)) for s in specs if s.file(args.folder).exists()]
                presets = ", ".join(sorted({r.preset for r in present})) or "none"
                line += f", {len(present)} recorded (preset {presets}), {len(specs) - len(present)} missing"
            print(line)
    except ValueError as error:
        print(f"pslib.experiments: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    # Worker processes look the functions up by name: in this module, not in __main__.
    from pslib.experiments import main as imported_main

    sys.exit(imported_main())
