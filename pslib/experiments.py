"""Recorded runs: declared as data, made by one command, read by the chapters::

    python -m pslib.experiments list
    python -m pslib.experiments run [NAME …] [--preset smoke|cpu|full] [--minutes 10] [--jobs 2] [--cluster slurm] [--folder FOLDER]
    python -m pslib.experiments status

A run is task × optimizer × settings × seed, at the size of a preset (`pslib.tasks`).  Each becomes one small JSON file,
written atomically, so that `run` goes on where it stopped, whatever stopped it; a run that the time was too short for goes
on from its checkpoint.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import platform
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field, replace
from functools import lru_cache, partial
from pathlib import Path

import numpy as np
import torch

from . import contenders, reinforcement, scalings, tasks, twins
from .tasks import PRESETS, MissingData
from .training import History, Paused, train

__all__ = ["EXPERIMENTS", "Record", "RunSpec", "best", "collect", "load", "record", "rerun"]

FOLDER = Path(__file__).resolve().parent.parent / "book" / "runs"
GRID = (3e-4, 1e-3, 3e-3, 1e-2, 3e-2, 1e-1, 3e-1)


@dataclass(frozen=True)
class RunSpec:
    """One training run, fully declared.

    Attributes:
        task: its name.
        contender: what it is called in tables and figures, and in the record's file name.
        optimizer: its name in `pslib.contenders`.
        settings: of the optimizer.
        init_scale: multiplies every initial parameter.
        seed: of the initialisation and the order of the batches.
        rescale: the factor c of a function-equivalent twin (`pslib.twins`, at the modules that the task names).
        steps: how many, if not as many as the task says.
        how: what else `pslib.training.train` is told (schedule, batch_size, accumulate, clip, label_noise), or
            `pslib.reinforcement.train` (schedule, temperature).
    """

    task: str
    contender: str
    optimizer: str
    settings: dict = field(default_factory=dict)
    init_scale: float = 1.0
    seed: int = 0
    rescale: float = 1.0
    steps: int | None = None
    how: dict = field(default_factory=dict)

    @property
    def slug(self) -> str:
        """A file name that says what the run is."""
        parts = [self.contender]
        if "lr" in self.settings:
            parts.append(f"lr{self.settings['lr']:g}")
        if self.steps is not None:
            parts.append(f"steps{self.steps}")
        parts += [f"{name}-{value}" for name, value in self.how.items()]
        if self.init_scale != 1:
            parts.append(f"init{self.init_scale:g}")
        if self.rescale != 1:
            parts.append(f"rescale{self.rescale:g}")
        return "-".join([*parts, f"seed{self.seed}"])

    def file(self, folder: Path, preset: str) -> Path:
        """Where its record is kept."""
        return folder / preset / self.task / f"{self.slug}.json"


# Contender, optimizer and settings.
Setting = tuple[str, str, dict]


def _contenders() -> list[Setting]:
    """(contender, optimizer, settings): what every task is trained with."""
    grid = [
        (name, "adamw", {"lr": lr, "betas": [0.9, beta2], "weight_decay": 0.0})
        for name, beta2 in (("adamw", 0.999), ("adamw-0.98", 0.98))
        for lr in GRID
    ]
    free: list[Setting] = [
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
OURS: list[Setting] = [("psdasgd-tensor", "psdasgd-tensor", {}), ("psdasgd-model", "psdasgd-model", {})]
PRODIGY = ("prodigy-0.98", "prodigy", {"betas": [0.9, 0.98]})
PS_SPS: Setting = ("ps-sps", "ps-sps", {})


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
    tuned: list[Setting] = [
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


BENCHMARK = (
    *COMPARED, "digits-vit", "shakespeare-characters", "shakespeare-bytes",
    *(f"{data}-{network}" for data in ("cifar10", "cifar100") for network in ("resnet32-bn", "resnet32", "vgg19-bn", "vgg19", "vit")),
    "imagenet-vit",
)
# Declared, with a loader that is tested, and not recorded in this edition: the data, or for Humanoid a GPU, were not at hand.
RUN_TASKS = tuple(task for task in BENCHMARK if not task.startswith(("cifar100", "imagenet")))
NOT_YET_RUN = (*(f"benchmark-{task}" for task in BENCHMARK if task not in RUN_TASKS), "breadth-ade20k-unet", "breadth-humanoid-sac")
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


def _memory(task: str, seeds: int) -> list[RunSpec]:
    """PS-DA-SGD with x₀ and s on all coordinates and on a slice of them."""
    sliced: Setting = ("psdasgd-slice", "psdasgd-tensor", {"slice_p": 11})
    whole = next(ours for ours in OURS if ours[0] == "psdasgd-tensor")
    return [RunSpec(task, name, optimizer, settings, seed=seed) for seed in range(seeds) for name, optimizer, settings in (whole, sliced)]


def _scales(task: str, seeds: int) -> list[RunSpec]:
    """Initial scales over six orders of magnitude; AdamW at the rates that do best at ×1."""
    chosen = [*OURS, PS_SPS, PRODIGY, *_adamw(BEST_ADAMW[task])]
    return _initial_scale(task, chosen, FACTORS, seeds)


# The tasks that the ablations are done on and, where they would be solved, for how many steps instead: losses must be able to differ.
ABLATED = {"digits-vit": None, "mnist1d-cnn3": 400, "mnist1d-resnet": 200, "shakespeare-characters": None}
ESTIMATORS: dict[str, tuple[str, dict]] = {
    "sps": ("ps-sps", {}), "d-adapt": ("psdasgd-tensor", {}), "dog": ("scaled-dog", {}),
    "prodigy": ("psdasgd-variant", {"weights": "square"}),
}


def _steps(task: str) -> int:
    return ABLATED[task] or tasks.get(task).steps


def _ablation(task: str, changes: Iterable[Setting], seeds: int = 3) -> list[RunSpec]:
    """PS-DA-SGD as it is, and what is compared with it."""
    unchanged: Setting = ("psdasgd-tensor", "psdasgd-tensor", {})
    return [
        RunSpec(task, name, optimizer, settings, seed=seed, steps=ABLATED[task]) for seed in range(seeds)
        for name, optimizer, settings in (unchanged, *changes)
    ]


def _refresh(task: str) -> list[RunSpec]:
    """α² computed every so many steps, once, or in the first tenth of the steps only."""
    every = [(f"refresh-{k}", "psdasgd-variant", {"refresh": k}) for k in (2, 5, 10, 50)]
    until = [(f"frozen-{name}", "psdasgd-variant", {"frozen": k}) for name, k in (("once", 1), ("warmup", _steps(task) // 10))]
    return _ablation(task, [*every, *until])


def _grid(task: str) -> list[RunSpec]:
    """Every scaling with every estimator."""
    return _ablation(task, [
        (f"grid-{scaling}-{name}", optimizer, {"scaling": scaling, **settings})
        for scaling in scalings.NAMES for name, (optimizer, settings) in ESTIMATORS.items()
    ])


def _estimate(task: str) -> list[RunSpec]:
    """The constants of the distance estimate."""
    return _ablation(task, [
        *((f"beta3-{value:g}", "psdasgd-variant", {"beta3": value}) for value in (0.0, 0.9, 0.999, 1.0)),
        *((f"weights-{name}", "psdasgd-variant", {"weights": name}) for name in ("square", "uniform", "growing")),
        *((f"d0-{exponent}", "psdasgd-tensor", {"d0": 2.0**exponent}) for exponent in (-16, -12, -4, -2)),
        *((f"beta2-{value:g}", "psdasgd-tensor", {"betas": [0.9, value]}) for value in (0.9, 0.95, 0.99, 0.999)),
    ])


# What training is changed by, one thing at a time; AdamW at its best rate and the two beside it.
CONDITIONS: dict[str, dict] = {
    "usual": {}, "constant": {"schedule": "constant"}, "warmup": {"schedule": "warmup"}, "quarter": {"batch_size": 1 / 4},
    "four": {"batch_size": 4}, "noise": {"label_noise": 0.3}, "clip-1": {"clip": 1.0}, "clip-0.1": {"clip": 0.1},
    "pieces": {"accumulate": 2}, "long": {},
}
CONDITION_RATES = {
    "digits-vit": (3e-3, 1e-2, 3e-2), "mnist1d-cnn3": (1e-2, 3e-2, 1e-1), "shakespeare-characters": (3e-3, 1e-2, 3e-2),
}


def condition(task: str, name: str) -> dict:
    """The steps and the `how` of a run of that task under that condition."""
    how = dict(CONDITIONS[name])
    if "batch_size" in how:
        how["batch_size"] = int(tasks.get(task).batch_size * how["batch_size"])
    return {"steps": 4 * _steps(task) if name == "long" else ABLATED[task], "how": how}


def _conditions(task: str, seeds: int) -> list[RunSpec]:
    """Four methods where training is not as usual; label noise only where there is one label an example."""
    methods: list[Setting] = [
        *((name, name, {}) for name in ("psdasgd-tensor", "ps-sps")), ("prodigy-0.98", "prodigy", {"betas": [0.9, 0.98]}),
        *(("adamw-0.98", "adamw", {"lr": lr, "betas": [0.9, 0.98], "weight_decay": 0.0}) for lr in CONDITION_RATES[task]),
    ]
    return [
        RunSpec(task, contender, optimizer, settings, seed=seed, **condition(task, name)) for name in CONDITIONS
        if name != "noise" or tasks.get(task).metric == "accuracy" for seed in range(seeds) for contender, optimizer, settings in methods
    ]


# What might be better than PS-DA-SGD as it is; chosen on every other task of the benchmark, reported on the rest.
CANDIDATES: dict[str, tuple[str, dict, dict]] = {
    "try-d0": ("psdasgd-tensor", {"d0": 2.0**-6}, {}),
    "try-warmup": ("psdasgd-tensor", {}, {"schedule": "warmup"}),
    "try-growth": ("psdasgd-tensor", {"growth_rate": 2 ** (1 / 20)}, {}),
    "try-cap": ("psdasgd-variant", {"cap": 0.2}, {}),
    "try-square": ("psdasgd-variant", {"weights": "square"}, {}),
    **{f"try-travel-{value:g}": ("psdasgd-variant", {"travel": value}, {}) for value in (1.0, 1.5, 2.0, 3.0, 4.0)},
    "try-bfloat16": ("psdasgd-variant", {"storage": "bfloat16"}, {}),
}


def _travel(task: str, seeds: int) -> list[RunSpec]:
    """The best candidate and the one beside it under all conditions; what they are compared with is in conditions-…"""
    return [
        replace(spec, contender=f"travel-{value:g}", settings={"travel": value}) for value in (1.5, 2.0)
        for spec in _conditions(task, seeds) if spec.contender == "psdasgd-tensor"
    ]


TRAVEL: Setting = ("psdasgd-travel", "psdasgd-tensor", {"travel": 1.5})
# The other kinds of problem: the rates that AdamW is tuned over, and what else is tried there.
BREADTH: dict[str, tuple[tuple[float, ...], list[Setting]]] = {
    "reviews-minilm": (
        (3e-5, 1e-4, 3e-4), [PS_SPS, TRAVEL, *((f"psdasgd-d0-{e}", "psdasgd-tensor", {"d0": 2.0**e}) for e in (-14, -11))],
    ),
    "digits-resnet32-tuned": (
        (1e-4, 3e-4, 1e-3, 3e-3, 1e-2, 3e-2),
        [PS_SPS, TRAVEL, *((f"psdasgd-d0-{e}", "psdasgd-tensor", {"d0": 2.0**e}) for e in (-14, -11))],
    ),
    "digits-resnet32": ((3e-4, 1e-3, 3e-3, 1e-2, 3e-2, 1e-1), [PS_SPS, TRAVEL]),
    "cifar10-simclr": (
        (3e-4, 1e-3, 3e-3, 1e-2, 3e-2),
        [PS_SPS, TRAVEL, ("ps-sps-floor", "ps-sps", {"f_star": round(tasks.get("cifar10-simclr").floor, 6)})],
    ),
    "camvid-unet": ((1e-3, 3e-3, 1e-2, 3e-2, 1e-1), [PS_SPS, TRAVEL]),
    "pendulum-sac": ((1e-4, 3e-4, 1e-3, 3e-3, 1e-2), [TRAVEL]),
    "hopper-sac": ((3e-4, 1e-3, 3e-3), []),
    "ade20k-unet": ((1e-3, 3e-3, 1e-2, 3e-2, 1e-1), [PS_SPS, TRAVEL]),
    "humanoid-sac": ((3e-4, 1e-3, 3e-3), []),
}
# In soft actor-critic the temperature's loss is linear and has no minimum: without a rate of its own it is nobody's to measure.
TEMPERATURE_RATE = 1e-3


def _breadth(task: str) -> list[RunSpec]:
    """AdamW over its rates and at its default, the peers and ours as they are; reinforcement learning is the noisiest."""
    rates, more = BREADTH[task]
    control = tasks.get(task).metric == "return"
    free = ("psdasgd-tensor", "psdasgd-model", "prodigy", "dadapt-adam", "schedule-free", "adamw-default")
    optimizers = {"adamw-default": "adamw"}
    methods: list[Setting] = [
        *((name, optimizers.get(name, name), {}) for name in free), *more, *_adamw(*rates),
    ]

    def how(name: str) -> dict:
        # Schedule-Free is made for a constant rate.
        return {"schedule": "constant" if name == "schedule-free" else "cosine", "temperature": TEMPERATURE_RATE} if control else {}

    return [
        RunSpec(task, name, optimizer, settings, seed=seed, how=how(name)) for seed in range(5 if control else 3)
        for name, optimizer, settings in methods
    ]


def _temperature(task: str) -> list[RunSpec]:
    """Soft actor-critic with the temperature left to the method that trains the rest."""
    methods = [*((name, name, {}) for name in ("psdasgd-tensor", "psdasgd-model", "prodigy", "dadapt-adam")), *_adamw(1e-3)]
    return [
        RunSpec(task, name, optimizer, settings, seed=seed, how={"schedule": "cosine"}) for seed in range(5)
        for name, optimizer, settings in methods
    ]


def _constant(task: str) -> list[RunSpec]:
    """Soft actor-critic at a constant rate, as it is usually trained."""
    peers: list[Setting] = [(name, name, {}) for name in ("prodigy", "dadapt-adam")]
    methods: list[Setting] = [*OURS, *peers, *_adamw(3e-4, 1e-3, 3e-3, 1e-2)]
    how = {"schedule": "constant", "temperature": TEMPERATURE_RATE}
    return [RunSpec(task, name, optimizer, settings, seed=seed, how=how) for seed in range(5) for name, optimizer, settings in methods]


def _candidates(task: str, seeds: int) -> list[RunSpec]:
    """The candidates; what they are compared with is in the benchmark."""
    return [
        RunSpec(task, name, optimizer, settings, seed=seed, how=how) for seed in range(seeds)
        for name, (optimizer, settings, how) in CANDIDATES.items()
    ]


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
BEST_ADAMW = {"digits-mlp": 3e-2, "mnist1d-cnn": 3e-2, "mnist1d-resnet": 1e-2, "digits-vit": 1e-2}

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
    **{f"scales-{task}": _scales(task, 3) for task in BEST_ADAMW},
    **{f"benchmark-{task}": _benchmark(task, 3) for task in BENCHMARK},
    **{f"knobs-{task}": _knobs(task, 3) for task in ("mnist1d-resnet", "digits-vit")},
    **{f"memory-{task}": _memory(task, 3) for task in RUN_TASKS},
    **{f"refresh-{task}": _refresh(task) for task in ABLATED},
    **{f"grid-{task}": _grid(task) for task in ABLATED},
    **{f"estimate-{task}": _estimate(task) for task in ABLATED},
    **{f"conditions-{task}": _conditions(task, 3) for task in CONDITION_RATES},
    **{f"travel-{task}": _travel(task, 3) for task in CONDITION_RATES},
    **{f"candidates-{task}": _candidates(task, 3) for task in RUN_TASKS},
    **{f"breadth-{task}": _breadth(task) for task in BREADTH},
    "temperature-pendulum-sac": _temperature("pendulum-sac"),
    "constant-pendulum-sac": _constant("pendulum-sac"),
}

@dataclass(frozen=True)
class Record:
    """A recorded run.

    Attributes:
        spec: what was run; `preset` at which size.
        curve: "step", "train_loss" (mean since the last point, nats), "test_loss", "test_metric", and for a twin
            "twin_distance": how far its predictions are from those of the network that it is the twin of (`twin_distance`).
        final_loss, final_metric: see `pslib.training.History`; null for a diverged run's infinite loss.
        diverged: whether a loss stopped being finite.
        seconds, step_seconds: wall time of the run and of one training step.
        distance, effective_lr: what the optimizer exposed along the curve, [points][blocks].
        block_names: the names of those blocks.
        environment: device, processor, threads, versions, commit, and the data's sha256.
        parameters: how many the network has.
        peak_bytes: the most that was allocated on the GPU (after an interruption, since then); null on a CPU.
        details: what else the task says of how the run ended (`pslib.training.History.details`).
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
    parameters: int | None = None
    peak_bytes: int | None = None
    details: dict = field(default_factory=dict)


def _commit() -> str:
    try:
        command = ["git", "rev-parse", "--short", "HEAD"]
        return subprocess.run(command, check=True, cwd=Path(__file__).parent, capture_output=True, text=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def _environment(task: tasks.Task, device: str) -> dict:
    return {
        "device": torch.cuda.get_device_name() if device == "cuda" else "cpu", "processor": _processor(),
        "threads": torch.get_num_threads(), "python": platform.python_version(), "torch": torch.__version__,
        "commit": _commit(), "data_sha256": task.load().sha256,
    }


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def _finite(value: float) -> float | None:
    return float(f"{value:.6g}") if np.isfinite(value) else None


def _run(spec: RunSpec, preset: str, keep_outputs: bool = False, **how) -> History:
    """Train as declared; what is not of preset "full" on a CPU, wherever it is, so that one experiment is of one kind of machine."""
    models: list = []
    task, device = tasks.get(spec.task, preset), "auto" if preset == "full" else "cpu"

    def prepare(model):
        if spec.rescale != 1:
            twins.rescale(model, list(tasks.get(spec.task).rescaled), spec.rescale)
        contenders.prepare(spec.optimizer, model)
        models.append(model)

    steps = None if preset == "smoke" else spec.steps
    if isinstance(task, tasks.Control):
        return reinforcement.train(
            task, lambda params: contenders.make(spec.optimizer, params, **spec.settings), seed=spec.seed, steps=steps, device=device,
            **spec.how,
        )
    return train(
        task, lambda params: contenders.make(spec.optimizer, params, model=models[0], **spec.settings), seed=spec.seed, steps=steps,
        init_scale=spec.init_scale, prepare=prepare, keep_outputs=keep_outputs, device=device, **spec.how, **how,
    )


@lru_cache(maxsize=1)
def _original_outputs(spec_json: str, preset: str) -> list[torch.Tensor]:
    return _run(RunSpec(**json.loads(spec_json)), preset, keep_outputs=True).outputs


def twin_distance(outputs: torch.Tensor, others: torch.Tensor) -> float:
    """The mean total variation distance between the predictions of two classifiers on the same inputs, from 0 to 1.

    Args:
        outputs, others: logits, [..., classes].  What is not finite predicts nothing: the distance is then 1.
    """
    difference = (outputs.softmax(-1) - others.softmax(-1)).abs().sum(-1) / 2
    return difference.nan_to_num(nan=1.0).double().mean().item()


def rerun(record: Record) -> History:
    """Train the recorded run again, here and now."""
    return _run(record.spec, record.preset)


def record(spec: RunSpec, preset: str, folder: Path, deadline: float = math.inf) -> Path:
    """Run and write the record; an existing file is replaced only once the new one is complete.

    Args:
        spec: what to run.
        preset: at which size.
        folder: where records are kept.
        deadline: when to stop, as `time.time()`.

    Raises:
        Paused: at the deadline (`time.time()`); the checkpoint beside the record lets the same call go on from there.
    """
    path = spec.file(folder, preset)
    on_gpu = preset == "full" and torch.cuda.is_available()
    if on_gpu:
        torch.cuda.reset_peak_memory_stats()
    checkpoint = path.with_suffix(".checkpoint")
    history = _run(spec, preset, keep_outputs=spec.rescale != 1, checkpoint=checkpoint, deadline=deadline)
    peak = torch.cuda.max_memory_allocated() if on_gpu else None
    edges = [0, *history.steps]
    # An agent's steps are not its updates: `test_loss` is its mean loss between the looks.
    means = history.test_loss if history.metric == "return" else [
        history.losses[i:j].mean().item() for i, j in zip(edges, edges[1:], strict=False)
    ]
    curve = {
        "step": history.steps, "train_loss": [_finite(v) for v in means],
        "test_loss": [_finite(v) for v in history.test_loss], "test_metric": [_finite(v) for v in history.test_metric],
    }
    if spec.rescale != 1:
        original = _original_outputs(json.dumps(asdict(replace(spec, rescale=1.0))), preset)
        curve["twin_distance"] = [_finite(twin_distance(x, y)) for x, y in zip(history.outputs, original, strict=False)]
    rows = {name: [[_finite(v) for v in row] for row in getattr(history, name)] for name in ("distance", "effective_lr")}
    assert history.model is not None
    parameters = list(history.model.parameters())
    made = Record(
        spec, preset, curve, _finite(history.final_loss), _finite(history.final_metric), history.diverged, round(history.seconds, 2),
        round(history.step_seconds, 6), **rows, block_names=history.block_names,
        environment=_environment(tasks.get(spec.task, preset), parameters[0].device.type), parameters=sum(p.numel() for p in parameters),
        peak_bytes=peak, details=history.details,
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile("w", dir=path.parent, prefix=".", suffix=".part", delete=False) as f:
        json.dump(asdict(made), f, separators=(",", ":"))
        f.write("\n")
    os.chmod(f.name, 0o644)
    os.replace(f.name, path)
    checkpoint.unlink(missing_ok=True)
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
        numbers_there = isinstance(made.step_seconds, float) and made.diverged in (True, False)
        if not (lengths_agree and numbers_there and made.preset in PRESETS and {"torch", "device", "data_sha256"} <= set(made.environment)):
            raise ValueError("inconsistent fields")
    except (OSError, TypeError, KeyError, AttributeError, ValueError) as error:
        raise ValueError(f"{path} is not a complete recorded run; delete it and record it again ({error}).") from None
    return made


def collect(experiment: str, *, folder: Path = FOLDER, preset: str = "cpu") -> list[Record]:
    """All records of an experiment, in declared order.

    Args:
        experiment: its name.
        folder: where records are kept.
        preset: of which size.

    Raises:
        ValueError: if the experiment does not exist, or a run is missing, is damaged or was made with another preset or settings.
    """
    records = []
    for spec in _declared(experiment):
        path = spec.file(folder, preset)
        if not path.exists():
            raise ValueError(f"{path} is missing; make it with: python -m pslib.experiments run {experiment} --preset {preset}")
        records.append(_checked(path, spec, preset))
    return records


def _checked(path: Path, spec: RunSpec, preset: str) -> Record:
    made = load(path)
    if made.preset != preset or made.spec != spec:
        raise ValueError(f"{path} was recorded with other settings; delete it and record it again.")
    task = tasks.get(spec.task, preset)
    steps = task.steps if spec.steps is None or preset == "smoke" else spec.steps
    # Copies of an environment step together.
    steps = task.copies * math.ceil(steps / task.copies) if isinstance(task, tasks.Control) else steps
    if not made.diverged and made.curve["step"][-1] != steps:
        raise ValueError(f"{path} was recorded with {made.curve['step'][-1]} steps, not {steps}; delete it and record it again.")
    return made


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
    """The final metric as a number; of a run that diverged the worst there is."""
    return tasks.METRICS[tasks.get(record.spec.task).metric].worst if record.final_metric is None else record.final_metric


def best(records: Iterable[Record]) -> dict[str, list[Record]]:
    """For each contender its records at the learning rate with the best mean metric over seeds (all of them, if it has none)."""
    records = list(records)
    sign = -1 if tasks.METRICS[tasks.get(records[0].spec.task).metric].higher else 1
    ranked = sorted(by_setting(records).items(), key=lambda item: sign * np.mean([metric(r) for r in item[1]]))
    chosen: dict[str, list[Record]] = {}
    for (name, *_), group in ranked:
        chosen.setdefault(name, group)
    return chosen


Family = list[RunSpec]


def _families(specs: Iterable[RunSpec], preset: str, folder: Path) -> list[Family]:
    """The runs that are missing; those that are each other's twins together, so that the original is trained once for all."""
    families: dict[Path, Family] = {}
    for spec in specs:
        path = spec.file(folder, preset)
        if path.exists():
            _checked(path, spec, preset)
        else:
            siblings = families.setdefault(replace(spec, rescale=1.0).file(folder, preset), [])
            if spec not in siblings:
                siblings.append(spec)
    return list(families.values())


def _record_family(family: Family, preset: str, folder: Path, deadline: float) -> int:
    """Record runs that are each other's twins; returns how many it recorded before the deadline."""
    torch.set_num_threads(1)
    done = 0
    for spec in family:
        if time.time() >= deadline:
            break
        try:
            record(spec, preset, folder, deadline)
            done += 1
        except Paused:
            break
        except Exception as error:  # one run that cannot be made must not cost the others
            print(f"{spec.task}/{spec.slug} failed ({type(error).__name__}: {error}).", file=sys.stderr)
    return done


def _record_share(families: list[Family], preset: str, folder: Path, minutes: float) -> int:
    """What one machine of a cluster does, from when it is its turn."""
    deadline = time.time() + 60 * minutes
    return sum(_record_family(family, preset, folder, deadline) for family in families)


def _on_this_machine(families: list[Family], preset: str, folder: Path, jobs: int, minutes: float) -> Iterable[int]:
    from joblib import Parallel, delayed

    deadline = time.time() + 60 * minutes

    def within_budget():
        for family in families:
            if time.time() < deadline:
                yield delayed(_record_family)(family, preset, folder, deadline)

    return Parallel(n_jobs=jobs, return_as="generator_unordered", pre_dispatch=jobs)(within_budget())


def _on_a_cluster(families: list[Family], preset: str, folder: Path, jobs: int, minutes: float, cluster: str) -> Iterable[int]:
    try:
        import submitit
    except ImportError:
        raise ValueError("--cluster needs the package submitit: pip install submitit.") from None
    minutes = min(minutes, 24 * 60)
    try:
        executor = submitit.AutoExecutor(folder=folder / "submitted", cluster=cluster)
        executor.update_parameters(timeout_min=math.ceil(minutes) + 5, gpus_per_node=int(preset == "full"))
        shares = [families[i::jobs] for i in range(min(jobs, len(families)))]
        submitted = [executor.submit(_record_share, share, preset, folder, minutes) for share in shares]
        yield from (job.result() for job in submitit.helpers.as_completed(submitted, poll_frequency=1))
    except (RuntimeError, ValueError, submitit.core.utils.UncompletedJobError) as error:
        raise ValueError(f"--cluster {cluster}: {error}") from None


def run(names: list[str], preset: str, folder: Path, jobs: int, minutes: float, cluster: str | None = None) -> int:
    """Record what is missing; returns how many runs are still missing afterwards."""
    from tqdm import tqdm

    wanted = [spec for name in names for spec in _declared(name)]
    for task in dict.fromkeys(spec.task for spec in wanted):
        tasks.get(task, preset).load()
    families = _families(wanted, preset, folder)
    spread = partial(_on_a_cluster, cluster=cluster) if cluster else _on_this_machine
    with tqdm(total=sum(map(len, families)), desc="recording", unit="run") as bar:
        for done in spread(families, preset, folder, jobs, minutes):
            bar.update(done)
    return len({path for path in (spec.file(folder, preset) for spec in wanted) if not path.exists()})


def _possible(preset: str) -> list[str]:
    """The experiments that have the preset and whose data are here; says on standard error what it leaves out."""
    possible = []
    for name, specs in EXPERIMENTS.items():
        if preset == "full" and not tasks.get(specs[0].task).full:
            continue
        try:
            tasks.get(specs[0].task, preset).load()
            possible.append(name)
        except MissingData as error:
            print(f"{name} is left out. {error}", file=sys.stderr)
    return possible


def _state_of(name: str, folder: Path) -> str:
    """One line: what is recorded of an experiment, at which presets, and what is missing."""
    specs = EXPERIMENTS[name]
    states = []
    for preset in ("cpu", "full") if tasks.get(specs[0].task).full else ("cpu",):
        present = sum(load(path) is not None for path in (s.file(folder, preset) for s in specs) if path.exists())
        states.append(f"{preset} " + (f"{present} recorded, {len(specs) - present} missing" if present else "not yet run"))
    return f"{name}: {len(specs)} runs of {specs[0].task}; " + "; ".join(states)


def main(argv: list[str] | None = None) -> int:
    """The command line; returns the exit status."""
    on_gpu = torch.cuda.is_available()
    parser = argparse.ArgumentParser(prog="python -m pslib.experiments", description="Recorded runs of the book.")
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("list", help="the declared experiments")
    status = commands.add_parser("status", help="what is recorded, at which preset, and what is missing")
    runner = commands.add_parser("run", help="record what is missing; stops cleanly when the time is up")
    runner.add_argument("names", nargs="*", help="experiments (default: all that have the preset and whose data are here)")
    runner.add_argument("--preset", choices=PRESETS, default="cpu")
    runner.add_argument("--jobs", type=int, default=4 if on_gpu else os.cpu_count(), help="how many processes, or machines of the cluster")
    runner.add_argument("--minutes", type=float, default=math.inf, help="stop after this time; the same command goes on from there")
    runner.add_argument("--cluster", help="spread over machines with submitit: slurm, or local for processes here")
    for command in (status, runner):
        command.add_argument("--folder", type=Path, default=FOLDER)
    args = parser.parse_args(argv)
    try:
        if args.command == "run":
            if args.preset == "smoke" and args.folder.resolve() == FOLDER:
                raise ValueError("the book keeps no records of --preset smoke; give it a --folder.")
            if args.jobs < 1:
                raise ValueError("--jobs must be at least 1.")
            if args.preset == "full" and not on_gpu and not args.cluster:
                print("There is no GPU here: the full preset will take days.", file=sys.stderr)
            names = args.names or _possible(args.preset)
            missing = run(names, args.preset, args.folder, args.jobs, args.minutes, args.cluster)
            print(f"{missing} runs still missing" + ("; run the same command again to go on." if missing else "."))
            return 1 if missing else 0
        for name, specs in EXPERIMENTS.items():
            print(_state_of(name, args.folder) if args.command == "status" else f"{name}: {len(specs)} runs of {specs[0].task}")
    except (ValueError, MissingData) as error:
        print(f"pslib.experiments: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    # Worker processes look the functions up by name: in this module, not in __main__.
    from pslib.experiments import main as imported_main

    sys.exit(imported_main())
