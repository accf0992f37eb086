"""One training loop for every task and every optimizer."""

from __future__ import annotations

import inspect
import math
import sys
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from .tasks import Task, get

__all__ = ["History", "train", "train_seeds"]


@dataclass
class History:
    """What a training run leaves behind.

    Attributes:
        task, seed, metric: the task's name, the seed, and what the task's metric is ("accuracy" or "loss").
        losses: the training loss of every step, [steps], nats.
        steps: the steps after which the test set was looked at.
        test_loss, test_metric: at those steps; the metric is the task's.
        distance, effective_lr: at those steps, where the optimizer exposes them with one number a named block.
        block_names: the names of those blocks.
        outputs: with `keep_outputs`, the model's outputs on the test set at those steps.
        diverged: whether a loss stopped being finite (the run then ends early).
        seconds, step_seconds: wall time of the run and of a training step.
        model, optimizer: as they are at the end.
    """

    task: str
    seed: int
    metric: str
    losses: Tensor = field(default_factory=lambda: torch.empty(0))
    steps: list[int] = field(default_factory=list)
    test_loss: list[float] = field(default_factory=list)
    test_metric: list[float] = field(default_factory=list)
    distance: list[list[float]] = field(default_factory=list)
    effective_lr: list[list[float]] = field(default_factory=list)
    block_names: list[str] = field(default_factory=list)
    outputs: list[Tensor] = field(default_factory=list)
    diverged: bool = False
    seconds: float = 0.0
    step_seconds: float = 0.0
    model: nn.Module | None = None
    optimizer: torch.optim.Optimizer | None = None

    @property
    def final_loss(self) -> float:
        """Mean training loss of the last twentieth of the steps, nats; inf for a diverged run."""
        return math.inf if self.diverged else self.losses[-max(1, len(self.losses) // 20) :].mean().item()

    @property
    def final_metric(self) -> float:
        """The task's metric on the test set at the end; 0 (accuracy) or inf (loss) for a diverged run."""
        if self.diverged:
            return 0.0 if self.metric == "accuracy" else math.inf
        return self.test_metric[-1]


def evaluate(task: Task, model: nn.Module, x: Tensor, y: Tensor) -> tuple[float, float, Tensor]:
    """Loss and metric of the model on (x, y), and its outputs, in evaluation mode."""
    model.eval()
    with torch.no_grad():
        logits = model(x)
    model.train()
    loss = task.loss(logits, y).item()
    return loss, (logits.argmax(-1) == y).double().mean().item() if task.metric == "accuracy" else loss, logits


def _mode(optimizer, name: str) -> None:
    """Schedule-Free optimizers must be told when they are evaluated."""
    if callable(getattr(optimizer, name, None)):
        getattr(optimizer, name)()


def _row(values: Tensor) -> list[float]:
    return values.detach().cpu().tolist()


def train(
    task: str | Task,
    optimizer: Callable[[Iterable], torch.optim.Optimizer],
    *,
    seed: int = 0,
    steps: int | None = None,
    schedule: str = "cosine",
    prepare: Callable[[nn.Module], object] | None = None,
    init_scale: float = 1.0,
    dtype: torch.dtype = torch.float32,
    device: str = "auto",
    evaluations: int = 20,
    keep_outputs: bool = False,
    progress: bool = False,
) -> History:
    """Train a fresh model and return its history.

    Args:
        task: a task or its name.
        optimizer: makes the optimizer from the model's named parameters.
        seed: of the initialisation and the order of the batches.
        steps: how many (default: the task's).
        schedule: "cosine" (to zero) or "constant", a multiplier on the optimizer's `lr`.
        prepare: changes the fresh model in place, before the optimizer sees it.
        init_scale: multiplies every initial parameter.
        dtype, device: of model and data; "auto" takes a GPU if there is one.
        evaluations: how often the test set is looked at.
        keep_outputs: keep the model's outputs on the test set.
        progress: show a progress bar on standard error.

    Raises:
        ValueError: for an unknown task or schedule, or no steps.
    """
    task = get(task)
    steps = task.steps if steps is None else steps
    if steps < 1:
        raise ValueError(f"steps must be at least 1, not {steps}.")
    if schedule not in ("cosine", "constant"):
        raise ValueError(f"schedule must be 'cosine' or 'constant', not {schedule!r}.")
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    data = task.load()
    x_train, y_train, x_test, y_test = (
        t.to(device, dtype if t.is_floating_point() else None) for t in (data.x_train, data.y_train, data.x_test, data.y_test)
    )
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = task.build(data)
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(init_scale)
    model.to(device, dtype)
    if prepare is not None:
        prepare(model)
    opt = optimizer(model.named_parameters())
    takes_loss = "loss" in inspect.signature(opt.step).parameters
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(opt, steps) if schedule == "cosine" else None
    order = torch.Generator().manual_seed(seed)
    history = History(task.name, seed, task.metric, model=model, optimizer=opt, block_names=list(getattr(opt, "block_names", [])))
    looks = {round(steps * (i + 1) / evaluations) for i in range(evaluations)}
    losses, batches, train_seconds, start = [], torch.empty(0, dtype=torch.long), 0.0, time.perf_counter()
    bar = None
    if progress:
        from tqdm import tqdm

        bar = tqdm(total=steps, desc=f"{task.name}, seed {seed}", file=sys.stderr)
    _mode(opt, "train")
    for k in range(1, steps + 1):
        tick = time.perf_counter()
        if len(batches) < task.batch_size:
            batches = torch.randperm(len(x_train), generator=order)
        now, batches = batches[: task.batch_size].to(device), batches[task.batch_size :]
        opt.zero_grad()
        loss = task.loss(model(x_train[now]), y_train[now])
        loss.backward()
        opt.step(loss=loss.detach()) if takes_loss else opt.step()
        if scheduler is not None:
            scheduler.step()
        losses.append(loss.detach())
        train_seconds += time.perf_counter() - tick
        if k in looks:
            if not math.isfinite(losses[-1].item()):
                history.diverged = True
                break
            _mode(opt, "eval")
            test_loss, metric, outputs = evaluate(task, model, x_test, y_test)
            if keep_outputs:
                history.outputs.append(outputs.cpu())
            _mode(opt, "train")
            history.steps.append(k)
            history.test_loss.append(test_loss)
            history.test_metric.append(metric)
            for name in ("distance", "effective_lr"):
                row = _row(getattr(opt, name)) if hasattr(opt, name) else []
                if len(row) == len(history.block_names) > 0:
                    getattr(history, name).append(row)
        if bar is not None:
            bar.update()
    if bar is not None:
        bar.close()
    _mode(opt, "eval")
    history.losses = torch.stack(losses).cpu()
    history.diverged |= not bool(torch.isfinite(history.losses).all())
    history.seconds, history.step_seconds = time.perf_counter() - start, train_seconds / len(losses)
    return history


def train_seeds(task: str | Task, optimizer, seeds: int = 3, **settings) -> list[History]:
    """`train` for seeds 0, 1, …, seeds − 1."""
    return [train(task, optimizer, seed=seed, **settings) for seed in range(seeds)]
