"""Tasks: data + model + loss, by name, in up to three sizes.

The preset "cpu" is what two cores train in seconds, "smoke" five steps of that, "full" what a GPU is wanted for (only
some tasks have it).  A number from one preset says nothing about another.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from . import datasets, networks
from .augmentations import Augmentation, Shift, Views
from .datasets import Data, Environment, MissingData
from .networks import VGG19, CharacterTransformer, Convolutional, Residual, ResNet, VisionTransformer, mlp

__all__ = ["METRICS", "PRESETS", "Contrastive", "Control", "Data", "Metric", "MissingData", "Segmentation", "Task", "get", "names"]

PRESETS = ("smoke", "cpu", "full")


@dataclass(frozen=True)
class Metric:
    """What a task is judged by: whether a higher number is better, and the worst there is, which a diverged run gets."""

    higher: bool
    worst: float


METRICS = {
    "accuracy": Metric(True, 0.0), "mean IoU": Metric(True, 0.0), "loss": Metric(False, math.inf), "return": Metric(True, -math.inf),
}


@dataclass(frozen=True)
class Task:
    """A supervised problem with cross-entropy loss (floor 0).

    Attributes:
        name: what `get` and the experiments know it by.
        title: for people.
        load: returns the `Data`.
        build: returns a fresh model for the data, initialised from torch's global generator or with what was learned before.
        batch_size, steps: of one training run.
        metric: "accuracy" (a fraction), "mean IoU" (a fraction) or "loss" (nats); see `METRICS`.
        classes: how many; for the documentation topics those of one Python version, others have a few more or fewer.
        rescaled: the modules whose outputs change their unit in the network's function-equivalent twin (`pslib.twins`).
        evaluations: how often the test set is looked at in a run.
        augment: how training images are changed at random.
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
    augment: Augmentation | None = None
    accelerate: bool = False
    full: dict = field(default_factory=dict)

    @property
    def guess(self) -> float:
        """The loss of knowing nothing, nats."""
        return math.log(self.classes)

    def loss(self, outputs: Tensor, target: Tensor) -> Tensor:
        """Mean cross-entropy in nats; a target of −100 (void) does not count."""
        return F.cross_entropy(outputs.flatten(0, -2), target.flatten())

    def predict(self, forward: Callable[[Tensor], Tensor], data: Data) -> Tensor:
        """What the trained model, `forward`, says about the test set."""
        return forward(data.x_test)

    def measure(self, outputs: Tensor, target: Tensor) -> tuple[float, float]:
        """Loss and metric of such predictions."""
        loss = self.loss(outputs, target).item()
        return loss, (outputs.argmax(-1) == target).double().mean().item() if self.metric == "accuracy" else loss

    def describe(self, outputs: Tensor, target: Tensor) -> dict:
        """What else a record keeps of such predictions."""
        return {}

    def smoke(self) -> Task:
        """The task for a few steps."""
        return replace(self, steps=5)


def intersections_over_unions(predicted: Tensor, target: Tensor, classes: int) -> Tensor:
    """For each class the points that are both predicted and meant, over those that are either; void points are left out.

    Args:
        predicted, target: integers of the same shape; a target below 0 is void.
        classes: how many.

    Returns:
        [classes], float64; NaN for a class that is neither predicted nor meant.
    """
    counted = target >= 0
    pairs = torch.bincount(target[counted] * classes + predicted[counted], minlength=classes**2).reshape(classes, classes).double()
    both = pairs.diag()
    return both / (pairs.sum(0) + pairs.sum(1) - both)


@dataclass(frozen=True)
class Segmentation(Task):
    """A class for every point of an image; the metric is the mean of `intersections_over_unions` over the whole test set.

    Attributes:
        shown: the test images whose predictions a record keeps.
    """

    shown: tuple[int, ...] = ()

    def measure(self, outputs: Tensor, target: Tensor) -> tuple[float, float]:
        """Mean cross-entropy, nats, and the mean over the classes that occur."""
        each = intersections_over_unions(outputs.argmax(-1), target, self.classes)
        return self.loss(outputs, target).item(), each.nanmean().item()

    def describe(self, outputs: Tensor, target: Tensor) -> dict:
        """"iou": of each class, null where it does not occur; "predictions": class numbers as PNG pictures in base64."""
        predicted = outputs.argmax(-1)
        each = intersections_over_unions(predicted, target, self.classes).tolist()
        pictures = [datasets.as_png(predicted[i]) for i in self.shown]
        return {"iou": [None if math.isnan(v) else round(v, 4) for v in each], "predictions": pictures}


@dataclass(frozen=True)
class Contrastive(Task):
    """SimCLR (Chen et al. 2020): two views of an image shall be closer to each other than to the views of all others.

    The metric is the accuracy of a linear probe: a logistic regression on the features, which are not trained further.

    Attributes:
        temperature: of the loss.
    """

    temperature: float = 0.5

    @property
    def guess(self) -> float:
        """The loss if all views look alike, nats."""
        return math.log(2 * self.batch_size - 1)

    @property
    def floor(self) -> float:
        """The least that the loss of a batch can be, nats.

        It is reached where the two views of an image agree and the images are the corners of a regular simplex.
        """
        n = self.batch_size
        return math.log1p((2 * n - 2) * math.exp(-(1 + 1 / (n - 1)) / self.temperature))

    def loss(self, outputs: Tensor, target: Tensor) -> Tensor:
        """Normalised temperature-scaled cross-entropy, nats.

        Args:
            outputs: [2n, dimensions], the first views of n images and then the second ones.
            target: not used: there are no labels.
        """
        # Not in bfloat16, even where the network is: neighbouring similarities would become equal.
        with torch.autocast(outputs.device.type, enabled=False):
            directions = F.normalize(outputs.float() if outputs.dtype == torch.bfloat16 else outputs, dim=1)
            similar = (directions @ directions.T / self.temperature).fill_diagonal_(-math.inf)
        other = torch.arange(len(outputs), device=outputs.device).roll(len(outputs) // 2)
        return F.cross_entropy(similar, other)

    def predict(self, forward: Callable[[Tensor], Tensor], data: Data) -> Tensor:
        """Log-probabilities of the linear probe, [tests, classes]."""
        from sklearn.linear_model import LogisticRegression
        from sklearn.pipeline import make_pipeline
        from sklearn.preprocessing import StandardScaler

        known, asked = (forward(x).cpu() for x in (data.x_train, data.x_test))
        if not (known.isfinite().all() and asked.isfinite().all()):
            return torch.full((len(asked), self.classes), -math.log(self.classes), device=data.y_test.device)
        probe = make_pipeline(StandardScaler(), LogisticRegression(C=0.1, solver="newton-cholesky"))
        probe.fit(known.numpy(), data.y_train.cpu().numpy())
        return torch.from_numpy(probe.predict_log_proba(asked.numpy())).to(data.y_test.device)

    def measure(self, outputs: Tensor, target: Tensor) -> tuple[float, float]:
        """Cross-entropy of the probe, nats, and its accuracy."""
        return super().loss(outputs, target).item(), (outputs.argmax(-1) == target).double().mean().item()


@dataclass(frozen=True)
class Control:
    """A problem of reinforcement learning: an agent is trained by soft actor-critic (`pslib.reinforcement`).

    Attributes:
        name, title: as of a `Task`.
        environment: its id in gymnasium.
        steps: how many the environment makes, over all its copies.
        warmup: the steps at the start in which actions are drawn uniformly and nothing is learned.
        copies: how many copies of the environment run side by side; there is one update for each step of each.
        width: of the two hidden layers of actor and critics.
        batch_size: transitions an update.
        discount: of future rewards.
        average: how much of the critics goes into their slow copies at each update.
        evaluations, episodes: how often in a run the agent is tried without exploring, and over how many episodes.
        full: the attributes that are different in the preset "full".
    """

    name: str
    title: str
    environment: str
    steps: int
    warmup: int
    copies: int
    width: int
    batch_size: int
    discount: float = 0.99
    average: float = 0.005
    evaluations: int = 10
    episodes: int = 5
    full: dict = field(default_factory=dict)

    metric = "return"
    accelerate = False

    def load(self) -> Environment:
        """What stands in the place of data: which environment it is, of which version.

        Raises:
            MissingData: if gymnasium or MuJoCo is not installed.
        """
        return datasets.environment(self.environment)

    def smoke(self) -> Control:
        """The task for a few updates."""
        return replace(self, steps=self.warmup + 5, episodes=1)


def _images(
    name: str, title: str, classes: int, load: Callable, build: Callable, full_build: Callable, batch_size: int, steps: int, size: int
) -> Task:
    """Photographs: 10,000 of them reduced to `size` on a CPU, all of them for 60 epochs on a GPU."""
    full = {
        "load": load, "build": full_build, "batch_size": 256, "steps": 60 * 50_000 // 256, "evaluations": 20, "augment": Shift(),
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


def _transfer() -> list[Task]:
    """Networks that have learned something before, and the same one that has not."""
    digits = partial(datasets.digit_pictures, 200)

    def resnet(d: Data, learned: bool) -> nn.Module:
        return networks.pretrained_resnet(d.classes) if learned else ResNet(d.classes, width=8)

    sentences_full = {
        "load": partial(datasets.reviews, 64, None, None), "batch_size": 32, "steps": 3 * 9_662 // 32, "evaluations": 12,
        "accelerate": True,
    }
    return [
        Task("reviews-minilm", "movie reviews, MiniLM fine-tuned", datasets.reviews, networks.sentence_classifier, 8, 80, "accuracy", 2,
             evaluations=3, full=sentences_full),
        Task("topics-minilm", "paragraphs of a manual, MiniLM fine-tuned", datasets.paragraphs, networks.sentence_classifier, 12, 40,
             "accuracy", 8, evaluations=2),
        *(Task(f"digits-resnet32{suffix}", f"200 digits, ResNet-32 {words}", digits, partial(resnet, learned=learned), 50, 150, "accuracy",
               evaluations=10) for learned, suffix, words in ((True, "-tuned", "fine-tuned"), (False, "", "from scratch"))),
    ]


def _contrastive() -> list[Task]:
    def build(d: Data, width: int, blocks: int, dimensions: int) -> nn.Module:
        encoder = ResNet(d.classes, width=width, blocks=blocks)
        encoder.head = nn.Identity()  # type: ignore[assignment]
        return networks.Projected(encoder, 4 * width, dimensions)

    full = {
        "load": datasets.cifar10, "build": partial(build, width=32, blocks=3, dimensions=128), "batch_size": 512,
        "steps": 200 * 50_000 // 512, "evaluations": 20, "accelerate": True,
    }
    return [
        Contrastive("cifar10-simclr", "CIFAR-10 (JPEG), SimCLR", partial(datasets.cifar10, 10_000, 1_000, 16),
                    partial(build, width=16, blocks=1, dimensions=64), 128, 200, "accuracy", evaluations=5, augment=Views(), full=full),
        Contrastive("digits-simclr", "digits, SimCLR", datasets.digit_pictures, partial(build, width=8, blocks=1, dimensions=32), 100, 100,
                    "accuracy", evaluations=5, augment=Views(0.6, False, 0.3)),
    ]


def _segmentation() -> list[Task]:
    def build(d: Data, width: int) -> nn.Module:
        return networks.UNet(d.classes, width)

    def full(load: Callable, batch_size: int, steps: int) -> dict:
        return {
            "load": load, "build": partial(build, width=32), "batch_size": batch_size, "steps": steps, "evaluations": 20,
            "accelerate": True,
        }

    return [
        Segmentation("camvid-unet", "CamVid, U-Net", partial(datasets.camvid, (80, 60)), partial(build, width=8), 4, 250, "mean IoU", 11,
                     evaluations=3, shown=(10, 60, 110, 200), full=full(datasets.camvid, 16, 150 * 367 // 16)),
        Segmentation("streets-unet", "drawn streets, U-Net", datasets.streets, partial(build, width=8), 8, 60, "mean IoU", 5, evaluations=3,
                     shown=(0, 1, 2, 3)),
        Segmentation("ade20k-unet", "ADE20K, U-Net", partial(datasets.ade20k, (64, 64)), partial(build, width=8), 8, 200, "mean IoU", 150,
                     evaluations=5, full=full(partial(datasets.ade20k, (128, 128)), 64, 60 * 20_210 // 64)),
    ]


_ALL: tuple[Task | Control, ...] = (
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
    *_transfer(), *_contrastive(), *_segmentation(),
    Control("pendulum-sac", "Pendulum, soft actor-critic", "Pendulum-v1", 5_000, 500, 1, 64, 128, episodes=10),
    Control("hopper-sac", "Hopper, soft actor-critic", "Hopper-v5", 5_000, 1_000, 1, 128, 128,
            full={"steps": 300_000, "warmup": 10_000, "copies": 16, "width": 256, "batch_size": 256, "evaluations": 30}),
    Control("humanoid-sac", "Humanoid, soft actor-critic", "Humanoid-v5", 5_000, 1_000, 1, 128, 128,
            full={"steps": 1_000_000, "warmup": 10_000, "copies": 16, "width": 256, "batch_size": 256, "evaluations": 50}),
)
TASKS = {task.name: task for task in _ALL}


def names() -> list[str]:
    """The names of all tasks."""
    return list(TASKS)


def get(name: str | Task | Control, preset: str = "cpu") -> Any:
    """Return the task of that name (or the task itself) in the size of that preset.

    Raises:
        ValueError: if there is no such task or preset, or the task does not have it.
    """
    if isinstance(name, (Task, Control)):
        return name
    if name not in TASKS:
        raise ValueError(f"there is no task {name!r}; choose one of {', '.join(TASKS)}.")
    if preset not in PRESETS:
        raise ValueError(f"there is no preset {preset!r}; choose one of {', '.join(PRESETS)}.")
    task = TASKS[name]
    if preset == "full" and not task.full:
        raise ValueError(f"{name} has no preset 'full': 'cpu' is all there is of it.")
    return replace(task, full={}, **task.full) if preset == "full" else task.smoke() if preset == "smoke" else task


def supervised(name: str | Task) -> Task:
    """Return the supervised task of that name (or the task itself).

    Raises:
        ValueError: if there is no such task, or it is one of control.
    """
    task = get(name)
    if not isinstance(task, Task):
        raise ValueError(f"{task.name} is a task of control; train it with pslib.reinforcement.train.")
    return task
