"""Who wins: every contender against tuned AdamW over many tasks, and what it keeps."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import numpy as np
import torch

from . import contenders, speed, tasks
from .experiments import Record, by_setting
from .training import step

__all__ = ["MEASURES", "REFERENCE", "Row", "best", "failures", "log_regret", "state_bytes", "summary", "value"]

REFERENCE = ("adamw", "adamw-0.98")
MEASURES = ("train", "test")
LEAST_ERROR, LEAST_LOSS = 0.005, 0.005


def value(record: Record, measure: str) -> float:
    """What a run ends with; lower is better.

    Args:
        record: the run.
        measure: "train": the training loss, nats.  "test": the test error (a fraction; for segmentation one less the mean IoU) or,
            where the task's metric is the loss, the test loss, nats.

    Nothing is worse than guessing (a loss of ln(classes), an error of 1 − 1/classes), and a run that diverged counts as that.
    A loss below 0.005 nats counts as 0.005, the problem is solved: else the ratios of very small numbers on one solved task
    would decide a mean over tasks.  An error below half a percent counts as half a percent, because the smallest test set has
    297 examples.

    Raises:
        ValueError: for another measure.
    """
    task = tasks.get(record.spec.task)
    if measure not in MEASURES:
        raise ValueError(f"measure must be one of {', '.join(map(repr, MEASURES))}, not {measure!r}.")
    if measure == "test" and tasks.METRICS[task.metric].higher:
        reached = 0 if record.diverged else record.final_metric
        assert reached is not None
        return min(1 - 1 / task.classes, max(LEAST_ERROR, 1 - reached))
    ended = record.final_loss if measure == "train" else record.final_metric
    return max(LEAST_LOSS, min(task.guess, math.inf if ended is None else ended))


def best(records: Iterable[Record], measure: str) -> dict[str, list[Record]]:
    """For each contender its records, one a seed, at the learning rate with the lowest mean of `value`; without one, all it has.

    Args:
        records: of all contenders on one task.
        measure: as in `value`.
    """
    chosen: dict[str, list[Record]] = {}
    ranked = sorted(by_setting(records).values(), key=lambda group: np.mean([value(r, measure) for r in group]))
    for group in ranked:
        chosen.setdefault(group[0].spec.contender, group)
    return chosen


def log_regret(records: Iterable[Record], measure: str) -> dict[str, float]:
    """For each contender on one task: ln(its mean over seeds of `value` / that of the best AdamW of both grids).

    Args:
        records: of all contenders on the task.
        measure: as in `value`.

    0 is as good as AdamW tuned for this very measure on this task, 0.1 about ten percent worse.  The tuned methods have the
    advantage that their rate is chosen after the fact.
    """
    ends = {name: np.mean([value(r, measure) for r in group]) for name, group in best(records, measure).items()}
    reference = min(ends[name] for name in REFERENCE)
    return {name: float(np.log(end / reference)) for name, end in ends.items()}


@dataclass(frozen=True)
class Row:
    """One contender over all tasks.

    Attributes:
        contender: its name.
        mean, worst: of its log-regrets.
        worst_task: where it is worst.
        within: the share of tasks where it is at most 5 % worse than the best tuned AdamW.
    """

    contender: str
    mean: float
    worst: float
    worst_task: str
    within: float


def summary(regrets: Mapping[str, Mapping[str, float]]) -> list[Row]:
    """Rows over all tasks, best mean first, from the task's name → its `log_regret`."""
    rows = []
    for name in next(iter(regrets.values())):
        of = {task: regret[name] for task, regret in regrets.items()}
        worst = max(of, key=of.__getitem__)
        within = float(np.mean([r <= math.log(1.05) for r in of.values()]))
        rows.append(Row(name, float(np.mean(list(of.values()))), of[worst], worst, within))
    return sorted(rows, key=lambda row: row.mean)


def failures(records: Iterable[Record]) -> dict[str, int]:
    """For each contender on one task, at its best rate: how many seeds got less than half as far below guessing as the best contender."""
    records = list(records)
    chosen, guess = best(records, "train"), tasks.get(records[0].spec.task).guess
    furthest = max(np.mean([guess - value(r, "train") for r in group]) for group in chosen.values())
    return {name: sum(bool(guess - value(r, "train") < furthest / 2) for r in group) for name, group in chosen.items()}


def state_bytes(name: str) -> float:
    """Bytes of optimizer state per float32 parameter, after a few steps; measured on one tensor, so single numbers hardly count.

    Args:
        name: of a contender.
    """
    generator = torch.Generator().manual_seed(0)
    weight = torch.nn.Parameter(torch.randn(1000, 1000, generator=generator))
    weight.grad = torch.randn(1000, 1000, generator=generator)
    optimizer = contenders.make(name, [weight])
    if hasattr(optimizer, "train"):
        optimizer.train()
    for _ in range(3):
        step(optimizer, torch.ones(()))
    return speed.state_bytes(optimizer)
