"""Tasks: data + model + loss, by name, in up to three sizes.

The preset "cpu" is what two cores train in seconds, "smoke" five steps of that, "full" what a GPU is wanted for (only
some tasks have it).  A number from one preset says nothing about another.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import partial

from torch import Tensor, nn
from torch.nn import functional as F

from . import datasets
from .datasets import Data, MissingData
from .networks import VGG19, CharacterTransformer, Convolutional, Residual, ResNet, VisionTransformer, mlp

__all__ = ["PRESETS", "Data", "MissingData", "Task", "get", "names"]

PRESETS = ("smoke", "cpu", "full")


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
        classes: how many; for the documentation topics those of one Python version, others have a few more or fewer.
        rescaled: the modules whose outputs change their unit in the network's function-equivalent twin (`pslib.twins`).
        evaluations: how often the test set is looked at in a run.
        augment: whether training images are shifted by up to four points and mirrored, at random.
        accelerate: whether a GPU computes in bfloat16 where autocast does, channels last, and replays forward and backward as a
            CUDA graph.  Without a GPU it changes nothing.
        full: the attributes that are different in the preset "full"; empty if there is none.
    """

    name: str
    title: str
    load: Callable[[], Data]
    build: Callable[[Data], nn.Module]
    batch_size: int
    steps: int
    metric: str
    classes: int = 10
    rescaled: tuple[str, ...] = ()
    evaluations: int = 20
    augment: bool = False
    accelerate: bool = False
    full: dict = field(default_factory=dict)

    def loss(self, logits: Tensor, target: Tensor) -> Tensor:
        """Mean cross-entropy in nats."""
        return F.cross_entropy(logits.flatten(0, -2), target.flatten())


def _images(
    name: str, title: str, classes: int, load: Callable, build: Callable, full_build: Callable, batch_size: int, steps: int, size: int
) -> Task:
    """Photographs: 10,000 of them reduced to `size` on a CPU, all of them for 60 epochs on a GPU."""
    full = {
        "load": load, "build": full_build, "batch_size": 256, "steps": 60 * 50_000 // 256, "evaluations": 20, "augment": True,
        "accelerate": True,
    }
    return Task(name, title, partial(load, 10_000, 1_000, size), build, batch_size, steps, "accuracy", classes, evaluations=5, full=full)


def _photographs(name: str, title: str, classes: int, load: Callable) -> list[Task]:
    def vit(side: int, width: int, heads: int, depth: int):
        return lambda d: VisionTransformer(d.classes, (3, side), 4, width, heads, depth)

    made = []
    for norm, suffix, words in ((True, "-bn", "with batch norm"), (False, "", "without batch norm")):
        resnet, vgg = (lambda d, w, net=net, norm=norm: net(d.classes, norm, w) for net in (ResNet, VGG19))
        made += [
            _images(
                f"{name}-resnet32{suffix}", f"{title}, ResNet-32 {words}", classes, load, partial(resnet, w=8), partial(resnet, w=16),
                64, 120, 16,
            ),
            _images(f"{name}-vgg19{suffix}", f"{title}, VGG-19 {words}", classes, load, partial(vgg, w=8), partial(vgg, w=64), 32, 140, 32),
        ]
    return [*made, _images(f"{name}-vit", f"{title}, ViT, patch 4", classes, load, vit(16, 64, 4, 4), vit(32, 192, 3, 9), 64, 150, 16)]


def _gpt(unit: str, classes: int) -> Task:
    def build(d: Data, **sizes) -> nn.Module:
        return CharacterTransformer(d.classes, window=d.x_train.shape[-1], **sizes)

    full = {
        "load": partial(datasets.shakespeare, unit, 256, None), "build": partial(build, width=384, heads=6, depth=6), "batch_size": 64,
        "steps": 2000, "evaluations": 20, "accelerate": True,
    }
    return Task(
        f"shakespeare-{unit}", f"tinyshakespeare, {unit}, GPT", partial(datasets.shakespeare, unit), build, 16, 250, "loss", classes,
        evaluations=5, full=full,
    )


def _imagenet() -> Task:
    def vit(d: Data, side: int, patch: int, width: int, heads: int, depth: int) -> nn.Module:
        return VisionTransformer(d.classes, (3, side), patch, width, heads, depth)

    full = {
        "load": datasets.imagenet, "build": partial(vit, side=224, patch=16, width=384, heads=6, depth=12), "batch_size": 1024,
        "steps": 90 * 1_281_167 // 1024, "evaluations": 20, "augment": True, "accelerate": True,
    }
    return Task(
        "imagenet-vit", "ImageNet-1K, ViT, patch 16", partial(datasets.imagenet, 32),
        partial(vit, side=32, patch=8, width=64, heads=4, depth=2), 64, 100, "accuracy", 1000, evaluations=5, full=full,
    )


TASKS = {
    t.name: t
    for t in (
        Task("mnist1d-cnn", "MNIST-1D, convolutional network", datasets.mnist1d, lambda d: Convolutional(d.classes), 100, 1600,
             "accuracy", rescaled=("convs.0",)),
        Task("mnist1d-cnn3", "MNIST-1D, three narrow convolutions", datasets.mnist1d,
             lambda d: Convolutional(d.classes, 3, 25, 3), 100, 1600, "accuracy", rescaled=("convs.0",)),
        Task("mnist1d-resnet", "MNIST-1D, residual network with batch norm", datasets.mnist1d, lambda d: Residual(d.classes), 100, 600,
             "accuracy", rescaled=("blocks.0.1", "blocks.1.1")),
        Task("digits-mlp", "digits, perceptron", datasets.digits, lambda d: mlp(64, d.classes), 50, 900, "accuracy", rescaled=("0",)),
        Task("digits-vit", "digits, ViT, patch 2", datasets.digit_images,
             lambda d: VisionTransformer(d.classes, (1, 8), 2, 32, 4, 2), 50, 250, "accuracy"),
        Task("chars-transformer", "characters, transformer", datasets.topics, lambda d: CharacterTransformer(d.classes), 16, 300,
             "loss", 103, tuple(f"blocks.{i}.{name}" for i in range(2) for name in ("query", "value", "up"))),
        *_photographs("cifar10", "CIFAR-10 (JPEG)", 10, datasets.cifar10),
        *_photographs("cifar100", "CIFAR-100", 100, datasets.cifar100),
        _imagenet(), _gpt("characters", 65), _gpt("bytes", 256),
    )
}


def names() -> list[str]:
    """The names of all tasks."""
    return list(TASKS)


def get(name: str | Task, preset: str = "cpu") -> Task:
    """Return the task of that name (or the task itself) in the size of that preset.

    Raises:
        ValueError: if there is no such task or preset, or the task does not have it.
    """
    if isinstance(name, Task):
        return name
    if name not in TASKS:
        raise ValueError(f"there is no task {name!r}; choose one of {', '.join(TASKS)}.")
    if preset not in PRESETS:
        raise ValueError(f"there is no preset {preset!r}; choose one of {', '.join(PRESETS)}.")
    task = TASKS[name]
    if preset == "full" and not task.full:
        raise ValueError(f"{name} has no preset 'full': 'cpu' is all there is of it.")
    return replace(task, full={}, **task.full) if preset == "full" else replace(task, steps=5) if preset == "smoke" else task
