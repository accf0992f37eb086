"""One training loop for every task and every optimizer."""

from __future__ import annotations

import inspect
import math
import os
import pickle
import sys
import tempfile
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from .tasks import METRICS, Task, supervised

__all__ = ["History", "Paused", "train", "train_seeds"]


@dataclass
class History:
    """What a training run leaves behind.

    Attributes:
        task, seed, metric: the task's name, the seed, and what the task's metric is (`pslib.tasks.METRICS`).
        losses: the training loss of every step, [steps], nats.
        steps: the steps after which the test set was looked at.
        test_loss, test_metric: at those steps; the metric is the task's.
        distance, effective_lr: at those steps, where the optimizer exposes them with one number a named block.
        block_names: the names of those blocks.
        outputs: with `keep_outputs`, the model's outputs on the test set at those steps.
        details: what else the task says of how it ended (`pslib.tasks.Task.describe`).
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
    details: dict = field(default_factory=dict)
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
        """The task's metric at the end; for a diverged run the worst there is (`pslib.tasks.METRICS`)."""
        return METRICS[self.metric].worst if self.diverged else self.test_metric[-1]


class Paused(Exception):
    """The deadline came before the run was over; what is done so far is in the checkpoint."""


def _forward(model: nn.Module, x: Tensor, autocast: bool = False) -> Tensor:
    """The model's outputs in evaluation mode."""
    model.eval()
    with torch.no_grad(), _autocast(autocast):
        outputs = torch.cat([model(x[i : i + 1024]) for i in range(0, len(x), 1024)])
    model.train()
    return outputs.float() if autocast else outputs


def _autocast(on: bool):
    # Without the cache of cast weights: a CUDA graph must not keep last step's.
    return torch.autocast("cuda", torch.bfloat16, enabled=on, cache_enabled=False)


def _mode(optimizer, name: str) -> None:
    """Schedule-Free optimizers must be told when they are evaluated."""
    if callable(getattr(optimizer, name, None)):
        getattr(optimizer, name)()


def step(optimizer: Any, loss: Tensor) -> None:
    """One step of any optimizer; those that ask for the loss get it."""
    if "loss" in inspect.signature(type(optimizer).step).parameters:
        optimizer.step(loss=loss)
    else:
        optimizer.step()


def _row(values: Tensor) -> list[float]:
    return values.detach().cpu().tolist()


def _place(t, device: str, dtype: torch.dtype):
    """The data on the device.  Overlapping windows stay views of one row of tokens, which is all that is moved."""
    if not isinstance(t, Tensor):
        return t.to(device, dtype)
    if t.ndim > 1 and t.stride(0) < t.shape[1]:
        row = t.as_strided((t.untyped_storage().nbytes() // t.element_size(),), (1,), 0).to(device)
        return row.as_strided(t.size(), t.stride(), t.storage_offset())
    return t.to(device, dtype if t.is_floating_point() else None)


class _Batches:
    """Batches in a new order every epoch; drawn on the CPU, so that every device sees the same, an epoch at a time."""

    def __init__(self, task: Task, examples: int, seed: int, device: str):
        self.task, self.examples, self.device = task, examples, device
        self.generator, self.left = torch.Generator().manual_seed(seed), torch.empty(0, 1, dtype=torch.long)

    def next(self) -> Tensor:
        """[batch, 1] or, with augmentation, more columns: the examples and how each is changed, on the device."""
        if len(self.left) < self.task.batch_size:
            columns = [torch.randperm(self.examples, generator=self.generator)]
            if self.task.augment:
                columns += [torch.randint(high, (self.examples,), generator=self.generator) for high in self.task.augment.ranges]
            self.left = torch.stack(columns, 1).to(self.device)
        now, self.left = self.left[: self.task.batch_size], self.left[self.task.batch_size :]
        return now

    def state(self) -> tuple:
        """What a checkpoint keeps."""
        return self.generator.get_state(), self.left.cpu()

    def restore(self, state: tuple) -> None:
        """Go on from there."""
        self.generator.set_state(state[0])
        self.left = state[1].to(self.device)


class _Gradients:
    """Forward and backward for one batch, whole or in equal pieces; on a GPU, if the task says so, as a CUDA graph that is replayed."""

    def __init__(self, task: Task, model: nn.Module, x, y: Tensor, fast: bool, pieces: int):
        self.task, self.model, self.x, self.y, self.fast, self.pieces = task, model, x, y, fast, pieces
        self.graph: torch.cuda.CUDAGraph | None = None

    def _forward_backward(self, batch: Tensor) -> Tensor:
        if self.pieces == 1:
            return self._of(batch)
        return torch.stack([self._of(piece) for piece in batch.chunk(self.pieces)]).mean()

    def _of(self, batch: Tensor) -> Tensor:
        x = self.x[batch[:, 0]]
        if self.task.augment:
            x = self.task.augment(x, batch[:, 1:])
        if self.fast and x.ndim == 4:
            x = x.contiguous(memory_format=torch.channels_last)
        with _autocast(self.fast):
            loss = self.task.loss(self.model(x), self.y[batch[:, 0]])
        (loss if self.pieces == 1 else loss / self.pieces).backward()
        return loss.detach()

    def __call__(self, batch: Tensor, optimizer: torch.optim.Optimizer) -> Tensor:
        """The loss; the gradients are in the parameters.  Data that is decoded on the way cannot be in a graph."""
        if not self.fast or not isinstance(self.x, Tensor):
            optimizer.zero_grad()
            return self._forward_backward(batch)
        if self.graph is None:
            self._capture(batch)
        assert self.graph is not None
        self.batch.copy_(batch)
        self.graph.replay()
        return self.loss.clone()

    def _capture(self, batch: Tensor) -> None:
        self.batch = batch.clone()
        # The rehearsals that capturing needs must leave no trace in the running statistics of batch norm.
        kept = [b.clone() for b in self.model.buffers()]
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(3):
                self._forward_backward(self.batch)
                self.model.zero_grad(set_to_none=True)
        torch.cuda.current_stream().wait_stream(side)
        self.graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self.graph):
            self.loss = self._forward_backward(self.batch)
        with torch.no_grad():
            for b, before in zip(self.model.buffers(), kept, strict=True):
                b.copy_(before)


class _Pickler(pickle.Pickler):
    """Writes the names of the model's parameters and modules instead of them."""

    def __init__(self, file, named: dict[str, object]):
        super().__init__(file)
        self.names = {id(value): name for name, value in named.items()}

    def persistent_id(self, value):
        return self.names.get(id(value))


class _Unpickler(pickle.Unpickler):
    """Puts in their place the parameters and modules of the model that this process has built."""

    def __init__(self, file, named: dict[str, object]):
        super().__init__(file)
        self.named = named

    def persistent_load(self, name):
        return self.named[name]


class _Checkpoint:
    """A run in one file: everything that moves, written whole or not at all, with the optimizer as it is.

    Not every optimizer keeps its whole state in `state_dict`, so its attributes are pickled.  `identity` says what the run
    is: a file of another one is not gone on from.
    """

    def __init__(self, path: Path, model: nn.Module, optimizer: torch.optim.Optimizer, identity: str):
        self.path, self.model, self.optimizer, self.identity = path, model, optimizer, identity
        self.named = {**dict(model.named_parameters()), **{f"module {n}": m for n, m in model.named_modules()}}

    def save(self, **run) -> None:
        """Replace the file once the new one is complete."""
        # Hooks, and the step that a scheduler has wrapped, belong to the process.
        attributes = {k: v for k, v in vars(self.optimizer).items() if not callable(v) and not k.startswith("_optimizer_")}
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=self.path.parent, prefix=".", suffix=".part", delete=False) as f:
            _Pickler(f, self.named).dump({"identity": self.identity, "model": self.model.state_dict(), "optimizer": attributes, "run": run})
        os.replace(f.name, self.path)

    def load(self) -> dict | None:
        """Put model and optimizer where they were and return the rest; None if there is no file, or, with a sentence, it is no use."""
        try:
            with open(self.path, "rb") as f:
                kept = _Unpickler(f, self.named).load()
            attributes, run = dict(kept["optimizer"]), kept["run"]
            if kept["identity"] != self.identity:
                raise ValueError("it is of another run, device or version")
            shapes = [{name: value.shape for name, value in state.items()} for state in (kept["model"], self.model.state_dict())]
            if shapes[0] != shapes[1]:
                raise ValueError("it is of another network")
            self.model.load_state_dict(kept["model"])
        except FileNotFoundError:
            return None
        except Exception as error:  # bytes that are no checkpoint make pickle raise nearly anything
            print(f"{self.path} cannot be gone on from ({type(error).__name__}: {error}); the run starts again.", file=sys.stderr)
            return None
        vars(self.optimizer).update(attributes)
        return run


def _warmup(optimizer: torch.optim.Optimizer, steps: int) -> torch.optim.lr_scheduler.LambdaLR:
    rise = max(1, steps // 10)
    return torch.optim.lr_scheduler.LambdaLR(optimizer, lambda k: min(1.0, (k + 1) / rise) * (1 + math.cos(math.pi * k / steps)) / 2)


SCHEDULES: dict[str, Callable[[torch.optim.Optimizer, int], Any]] = {
    "cosine": torch.optim.lr_scheduler.CosineAnnealingLR, "warmup": _warmup, "constant": lambda optimizer, steps: None,
}


def noisy(labels: Tensor, classes: int, probability: float, seed: int) -> Tensor:
    """Labels, some of them drawn again at random.

    Args:
        labels: [examples], integers.
        classes: how many there are to draw from.
        probability: with which each label is drawn again, all classes being equally likely.
        seed: of the drawing.

    Raises:
        ValueError: for a probability outside [0, 1], or more than one label an example.
    """
    if not 0 <= probability <= 1 or labels.ndim != 1:
        raise ValueError(f"label_noise must be a probability, not {probability}, and the task must have one label an example.")
    generator = torch.Generator().manual_seed(seed)
    drawn = torch.randint(classes, labels.shape, generator=generator)
    return torch.where(torch.rand(labels.shape, generator=generator) < probability, drawn, labels)


def train(
    task: str | Task,
    optimizer: Callable[[Iterable], torch.optim.Optimizer],
    *,
    seed: int = 0,
    steps: int | None = None,
    schedule: str = "cosine",
    batch_size: int | None = None,
    accumulate: int = 1,
    clip: float = math.inf,
    label_noise: float = 0.0,
    prepare: Callable[[nn.Module], object] | None = None,
    init_scale: float = 1.0,
    dtype: torch.dtype = torch.float32,
    device: str = "auto",
    evaluations: int | None = None,
    keep_outputs: bool = False,
    progress: bool = False,
    checkpoint: Path | None = None,
    deadline: float = math.inf,
) -> History:
    """Train a fresh model and return its history.

    Args:
        task: a task or its name.
        optimizer: makes the optimizer from the model's named parameters.
        seed: of the initialisation and the order of the batches.
        steps: how many (default: the task's).
        schedule: a multiplier on the optimizer's `lr`: "cosine" (to zero), "warmup" (the same, times a line from 0 to 1 over the
            first tenth of the steps) or "constant".
        batch_size: examples a step (default: the task's).
        accumulate: in how many pieces, one after the other, a batch's gradient is computed.
        clip: the largest norm that a gradient keeps; a longer one is shortened to it.
        label_noise: the probability with which each training label is replaced by one drawn at random from all classes.
        prepare: changes the fresh model in place, before the optimizer sees it.
        init_scale: multiplies every initial parameter.
        dtype, device: of model and data; "auto" takes a GPU if there is one.
        evaluations: how often the test set is looked at (default: the task's).
        keep_outputs: keep the model's outputs on the test set.
        progress: show a progress bar on standard error.
        checkpoint: a file that the run is kept in, every half minute and at the deadline; if it is there, the run goes on from it.
            The caller deletes it, once what came of the run is safe.
        deadline: a time (`time.time()`) after which no further step is made.

    Raises:
        ValueError: for an unknown task or schedule, or a setting out of range.
        Paused: at the deadline, if there is a checkpoint to go on from.
    """
    task = supervised(task)
    task = task if batch_size is None else replace(task, batch_size=batch_size)
    steps = task.steps if steps is None else steps
    evaluations = task.evaluations if evaluations is None else evaluations
    if steps < 1:
        raise ValueError(f"steps must be at least 1, not {steps}.")
    if schedule not in SCHEDULES:
        raise ValueError(f"schedule must be one of {', '.join(map(repr, SCHEDULES))}, not {schedule!r}.")
    if accumulate < 1 or task.batch_size % accumulate:
        raise ValueError(f"accumulate must divide the batch of {task.batch_size} examples into equal pieces, not into {accumulate}.")
    if not clip > 0:
        raise ValueError(f"clip must be > 0, not {clip}.")
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    data = task.load()
    if label_noise:
        data = replace(data, y_train=noisy(data.y_train, data.classes, label_noise, seed))
    parts = ("x_train", "y_train", "x_test", "y_test")
    placed = replace(data, **{part: _place(getattr(data, part), device, dtype) for part in parts})
    x_train, y_train, y_test = placed.x_train, placed.y_train, placed.y_test
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = task.build(data)
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(init_scale)
    model.to(device, dtype)
    fast = task.accelerate and y_train.is_cuda
    if fast and x_train.ndim == 4:
        model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]  # torch's types leave it out
    if prepare is not None:
        prepare(model)
    opt = optimizer(model.named_parameters())
    scheduler = SCHEDULES[schedule](opt, steps)
    history = History(task.name, seed, task.metric, block_names=list(getattr(opt, "block_names", [])))
    looks = {round(steps * (i + 1) / evaluations) for i in range(evaluations)}
    batches, gradients = _Batches(task, len(x_train), seed, device), _Gradients(task, model, x_train, y_train, fast, accumulate)
    losses, done, start = [], 0, time.perf_counter()
    identity = (
        task.name, task.batch_size, accumulate, clip, label_noise, steps, seed, schedule, init_scale, dtype, device, torch.__version__,
        type(opt).__qualname__,
    )
    settings = [{k: v for k, v in group.items() if k != "params"} for group in opt.param_groups]
    kept = None if checkpoint is None else _Checkpoint(checkpoint, model, opt, repr((identity, settings)))
    before = kept.load() if kept else None
    if before is not None:
        done, losses, history = before["done"], [before["losses"].to(device)], before["history"]
        batches.restore(before["batches"])
        start -= history.seconds
        if scheduler is not None:
            scheduler.load_state_dict(before["scheduler"])
    bar = None
    if progress:
        from tqdm import tqdm

        bar = tqdm(total=steps, initial=done, desc=f"{task.name}, seed {seed}", file=sys.stderr)
    if before is None:
        _mode(opt, "train")
    tick = saved = time.perf_counter()
    for k in range(done + 1, steps + 1):
        loss = gradients(batches.next(), opt)
        losses.append(loss.reshape(1))
        if clip < math.inf:
            nn.utils.clip_grad_norm_(model.parameters(), clip)
        try:
            step(opt, loss)
        except (AssertionError, ArithmeticError):
            # What DoG says to a loss that is not a number.
            if math.isfinite(loss.item()):
                raise
            history.diverged = True
            break
        if scheduler is not None:
            scheduler.step()
        if k in looks:
            finite = math.isfinite(losses[-1].item())
            # Reading the loss has waited for the device.
            history.step_seconds += time.perf_counter() - tick
            if not finite:
                history.diverged = True
                break
            _mode(opt, "eval")
            outputs = task.predict(partial(_forward, model, autocast=fast), placed)
            test_loss, metric = task.measure(outputs, y_test)
            history.details = task.describe(outputs, y_test)
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
            tick = time.perf_counter()
        if bar is not None:
            bar.update()
        up = time.time() > deadline and k < steps
        if kept and (up or time.perf_counter() - saved > 30):
            losses = [torch.cat(losses)]
            if y_train.is_cuda:
                torch.cuda.synchronize()
            history.step_seconds += time.perf_counter() - tick
            history.seconds = time.perf_counter() - start
            kept.save(
                done=k, losses=losses[0].cpu(), history=history, batches=batches.state(),
                scheduler=scheduler and scheduler.state_dict(),
            )
            if up:
                raise Paused(f"{task.name}, seed {seed}: {k} of {steps} steps done.")
            tick = saved = time.perf_counter()
    if bar is not None:
        bar.close()
    _mode(opt, "eval")
    history.model, history.optimizer = model, opt
    history.losses = torch.cat(losses).cpu()
    history.diverged |= not bool(torch.isfinite(history.losses).all())
    history.seconds, history.step_seconds = time.perf_counter() - start, history.step_seconds / len(history.losses)
    return history


def train_seeds(task: str | Task, optimizer, seeds: int = 3, **settings) -> list[History]:
    """`train` for seeds 0, 1, …, seeds − 1.

    Args:
        task: a task or its name.
        optimizer: makes the optimizer from the model's named parameters.
        seeds: how many.
        settings: for `train`.
    """
    return [train(task, optimizer, seed=seed, **settings) for seed in range(seeds)]
