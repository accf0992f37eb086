"""Tasks: data + model + loss, by name.  Nothing is downloaded."""

from __future__ import annotations

import hashlib
import os
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

__all__ = ["Data", "Task", "get", "names"]


@dataclass(frozen=True)
class Data:
    """Training and test tensors; `sha256` is of their bytes, so that a recorded run says what it saw."""

    x_train: Tensor
    y_train: Tensor
    x_test: Tensor
    y_test: Tensor
    classes: int
    sha256: str

    @classmethod
    def of(cls, x_train, y_train, x_test, y_test, classes: int) -> Data:
        """Build from tensors and hash them."""
        digest = hashlib.sha256()
        for t in (x_train, y_train, x_test, y_test):
            digest.update(t.contiguous().numpy().tobytes())
        return cls(x_train, y_train, x_test, y_test, classes, digest.hexdigest())


@dataclass(frozen=True)
class Task:
    """A supervised problem with cross-entropy loss (floor 0).

    Attributes:
        name: what `get` and the experiments know it by.
        title: for people.
        load: returns the `Data`.
        build: returns a fresh model for the data, initialised from torch's global generator.
        batch_size, steps: of one training run.
        metric: "accuracy" (a fraction, higher is better) or "loss" (nats, lower is better).
        rescaled: the modules whose outputs change their unit in the network's function-equivalent twin (`pslib.twins`).
    """

    name: str
    title: str
    load: Callable[[], Data]
    build: Callable[[Data], nn.Module]
    batch_size: int
    steps: int
    metric: str
    rescaled: tuple[str, ...] = ()

    def loss(self, logits: Tensor, target: Tensor) -> Tensor:
        """Mean cross-entropy in nats."""
        return F.cross_entropy(logits.flatten(0, -2), target.flatten())


def cache_folder() -> Path:
    """Where generated data is kept between runs: $PSLIB_CACHE, else ~/.cache/pslib."""
    folder = Path(os.environ.get("PSLIB_CACHE", Path.home() / ".cache" / "pslib"))
    folder.mkdir(parents=True, exist_ok=True)
    return folder


@lru_cache
def _mnist1d() -> Data:
    path = cache_folder() / "mnist1d.npz"
    if not path.exists():
        from mnist1d.data import get_dataset_args, make_dataset

        state = np.random.get_state()
        made = make_dataset(get_dataset_args())
        np.random.set_state(state)
        with tempfile.NamedTemporaryFile(dir=path.parent, suffix=".npz", delete=False) as f:
            np.savez(f, **{k: made[k] for k in ("x", "y", "x_test", "y_test")})
        os.replace(f.name, path)
    with np.load(path) as d:
        x, y, x_test, y_test = (torch.from_numpy(d[k]) for k in ("x", "y", "x_test", "y_test"))
    return Data.of(x.float(), y.long(), x_test.float(), y_test.long(), 10)


@lru_cache
def _digits() -> Data:
    from sklearn.datasets import load_digits

    bunch = load_digits()
    x, y = torch.from_numpy(bunch.data).float() / 16, torch.from_numpy(bunch.target).long()
    order = torch.from_numpy(np.random.RandomState(0).permutation(len(x)))
    x, y = x[order], y[order]
    return Data.of(x[:1500], y[:1500], x[1500:], y[1500:], 10)


WINDOW = 64


@lru_cache
def _characters() -> Data:
    from pydoc_data.topics import topics

    text = "\n".join(topics[name] for name in sorted(topics))
    alphabet = sorted(set(text))
    index = {ch: i for i, ch in enumerate(alphabet)}
    tokens = torch.tensor([index[ch] for ch in text])
    cut = int(0.95 * len(tokens))
    train, test = tokens[:cut].unfold(0, WINDOW + 1, 1), tokens[cut:].unfold(0, WINDOW + 1, WINDOW + 1)[:128]
    digest = hashlib.sha256(text.encode()).hexdigest()
    return Data(train[:, :-1], train[:, 1:], test[:, :-1], test[:, 1:], len(alphabet), digest)


class Convolutional(nn.Module):
    """Strided 1-D convolutions and a linear layer, ReLU between, no normalisation."""

    def __init__(self, classes: int, depth: int = 2, channels: int = 32, kernel: int = 5):
        super().__init__()
        sizes = [1] + depth * [channels]
        self.convs = nn.ModuleList(
            nn.Conv1d(i, o, kernel, stride=2, padding=kernel // 2) for i, o in zip(sizes, sizes[1:], strict=False)
        )
        self.head = nn.Linear(channels * 40 // 2**depth, classes)

    def forward(self, x):
        x = x.unsqueeze(1)
        for conv in self.convs:
            x = F.relu(conv(x))
        return self.head(x.flatten(1))


class Residual(nn.Module):
    """A 1-D convolution, residual blocks of two more, each followed by batch norm, and a linear layer."""

    def __init__(self, classes: int, channels: int = 24, depth: int = 2):
        super().__init__()
        self.stem, self.norm = nn.Conv1d(1, channels, 5, stride=2, padding=2), nn.BatchNorm1d(channels)
        self.blocks = nn.ModuleList(
            nn.Sequential(
                nn.Conv1d(channels, channels, 3, padding=1), nn.BatchNorm1d(channels), nn.ReLU(),
                nn.Conv1d(channels, channels, 3, padding=1), nn.BatchNorm1d(channels),
            )
            for _ in range(depth)
        )
        self.head = nn.Linear(channels * 20, classes)

    def forward(self, x):
        x = F.relu(self.norm(self.stem(x.unsqueeze(1))))
        for block in self.blocks:
            x = F.relu(x + block(x))
        return self.head(x.flatten(1))


def mlp(inputs: int, classes: int, width: int = 64) -> nn.Sequential:
    """A ReLU network with two hidden layers."""
    return nn.Sequential(
        nn.Linear(inputs, width), nn.ReLU(), nn.Linear(width, width), nn.ReLU(), nn.Linear(width, classes)
    )


class TransformerBlock(nn.Module):
    """Pre-norm attention and a ReLU perceptron, each on a residual branch."""

    def __init__(self, width: int, heads: int):
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.query, self.key = nn.Linear(width, width), nn.Linear(width, width)
        self.value, self.out = nn.Linear(width, width), nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x):
        h = self.norm1(x)
        q, k, v = (f(h).unflatten(-1, (self.heads, -1)).transpose(1, 2) for f in (self.query, self.key, self.value))
        attended = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.out(attended.transpose(1, 2).flatten(2))
        return x + self.down(F.relu(self.up(self.norm2(x))))


class CharacterTransformer(nn.Module):
    """A small causal transformer over characters."""

    def __init__(self, classes: int, width: int = 64, heads: int = 4, depth: int = 2):
        super().__init__()
        self.token, self.position = nn.Embedding(classes, width), nn.Embedding(WINDOW, width)
        self.blocks = nn.ModuleList(TransformerBlock(width, heads) for _ in range(depth))
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, classes)

    def forward(self, x):
        h = self.token(x) + self.position.weight[: x.shape[-1]]
        for block in self.blocks:
            h = block(h)
        return self.head(self.norm(h))


TASKS = {
    t.name: t
    for t in (
        Task("mnist1d-cnn", "MNIST-1D, convolutional network", _mnist1d, lambda d: Convolutional(d.classes), 100, 1600, "accuracy", ("convs.0",)),
        Task("mnist1d-cnn3", "MNIST-1D, three narrow convolutions", _mnist1d, lambda d: Convolutional(d.classes, 3, 25, 3), 100, 1600, "accuracy", ("convs.0",)),
        Task("mnist1d-resnet", "MNIST-1D, residual network with batch norm", _mnist1d, lambda d: Residual(d.classes), 100, 600, "accuracy", ("blocks.0.1", "blocks.1.1")),
        Task("digits-mlp", "digits, perceptron", _digits, lambda d: mlp(64, d.classes), 50, 900, "accuracy", ("0",)),
        Task("chars-transformer", "characters, transformer", _characters, lambda d: CharacterTransformer(d.classes), 16, 300, "loss",
             tuple(f"blocks.{i}.{name}" for i in range(2) for name in ("query", "value", "up"))),
    )
}


def names() -> list[str]:
    """The names of all tasks."""
    return list(TASKS)


def get(name: str | Task) -> Task:
    """Return the task of that name (or the task itself).

    Raises:
        ValueError: if there is no such task.
    """
    if isinstance(name, Task):
        return name
    if name not in TASKS:
        raise ValueError(f"there is no task {name!r}; choose one of {', '.join(TASKS)}.")
    return TASKS[name]
