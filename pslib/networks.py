"""The networks that the tasks train.  Each is initialised from torch's global generator."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from . import datasets
from .datasets import Data, MissingData

__all__ = [
    "CharacterTransformer", "Convolutional", "Projected", "ResNet", "Residual", "SentenceClassifier", "TransformerBlock", "UNet", "VGG19",
    "VisionTransformer", "mlp", "pretrained_resnet", "sentence_classifier",
]

PRETRAINED = Path(__file__).resolve().parent.parent / "book" / "pretrained" / "cifar10-resnet32-bn.safetensors"


class Convolutional(nn.Module):
    """Strided 1-D convolutions and a linear layer, ReLU between, no normalisation.

    Args:
        classes: how many.
        depth: how many convolutions.
        channels: of each.
        kernel: the convolutions' length.
    """

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
    """A 1-D convolution, residual blocks of two more, each followed by batch norm, and a linear layer.

    Args:
        classes: how many.
        channels: of each convolution.
        depth: how many blocks.
    """

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
    """A ReLU network with two hidden layers.

    Args:
        inputs: how many.
        classes: how many.
        width: of the hidden layers.
    """
    return nn.Sequential(
        nn.Linear(inputs, width), nn.ReLU(), nn.Linear(width, width), nn.ReLU(), nn.Linear(width, classes)
    )


class TransformerBlock(nn.Module):
    """Pre-norm attention and a ReLU perceptron, each on a residual branch.

    Args:
        width: of the residual stream.
        heads: of the attention.
        causal: whether a position sees only those before it.
    """

    def __init__(self, width: int, heads: int, causal: bool = True):
        super().__init__()
        self.heads, self.causal = heads, causal
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.query, self.key = nn.Linear(width, width), nn.Linear(width, width)
        self.value, self.out = nn.Linear(width, width), nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x):
        h = self.norm1(x)
        q, k, v = (f(h).unflatten(-1, (self.heads, -1)).transpose(1, 2) for f in (self.query, self.key, self.value))
        attended = F.scaled_dot_product_attention(q, k, v, is_causal=self.causal)
        x = x + self.out(attended.transpose(1, 2).flatten(2))
        return x + self.down(F.relu(self.up(self.norm2(x))))


class CharacterTransformer(nn.Module):
    """A causal transformer over characters or bytes.

    Args:
        classes: how many characters there are.
        width: of the residual stream.
        heads: of the attention.
        depth: how many blocks.
        window: the longest text.
    """

    def __init__(self, classes: int, width: int = 64, heads: int = 4, depth: int = 2, window: int = 64):
        super().__init__()
        self.token, self.position = nn.Embedding(classes, width), nn.Embedding(window, width)
        self.blocks = nn.ModuleList(TransformerBlock(width, heads) for _ in range(depth))
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, classes)

    def forward(self, x):
        h = self.token(x) + self.position.weight[: x.shape[-1]]
        for block in self.blocks:
            h = block(h)
        return self.head(self.norm(h))


class ResNetBlock(nn.Module):
    """Two 3 × 3 convolutions beside a shortcut that has no parameters: every second point, new channels zero."""

    def __init__(self, inputs: int, outputs: int, stride: int, norm: bool):
        super().__init__()
        self.stride, self.more = stride, outputs - inputs
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=not norm)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, 1, 1, bias=not norm)
        self.norm1, self.norm2 = (nn.BatchNorm2d(outputs) if norm else nn.Identity() for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        h = self.norm2(self.conv2(F.relu(self.norm1(self.conv1(x)))))
        return F.relu(h + F.pad(x[:, :, :: self.stride, :: self.stride], (0, 0, 0, 0, 0, self.more)))


class ResNet(nn.Module):
    """The residual network for small images of He et al. (2016), 6·blocks + 2 layers deep: ResNet-32 for blocks = 5.

    Args:
        classes: how many.
        norm: whether there is batch norm; without it the convolutions have biases, and nothing else is put in its place.
        width: channels of the first stage.
        blocks: in each of the three stages.
    """

    def __init__(self, classes: int, norm: bool = True, width: int = 16, blocks: int = 5):
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, width, 3, 1, 1, bias=not norm), nn.BatchNorm2d(width) if norm else nn.Identity()
        layers, inputs = [], width
        for stage in range(3):
            for i in range(blocks):
                layers.append(ResNetBlock(inputs, width * 2**stage, 2 if stage and not i else 1, norm))
                inputs = width * 2**stage
        self.blocks, self.head = nn.Sequential(*layers), nn.Linear(inputs, classes)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.blocks(F.relu(self.norm(self.conv(x)))).mean((2, 3)))


class VGG19(nn.Module):
    """Sixteen 3 × 3 convolutions in five groups (configuration E of Simonyan and Zisserman), then one linear layer.

    Images must be 32 × 32.  The convolutions start as He et al. (2015) say, which a network this deep needs if it has no
    batch norm.

    Args:
        classes: how many.
        norm: whether there is batch norm; without it the convolutions have biases.
        width: channels of the first group; the original has 64.
    """

    def __init__(self, classes: int, norm: bool = True, width: int = 64):
        super().__init__()
        layers: list[nn.Module] = []
        inputs = 3
        for depth, factor in ((2, 1), (2, 2), (4, 4), (4, 8), (4, 8)):
            for _ in range(depth):
                conv = nn.Conv2d(inputs, width * factor, 3, 1, 1, bias=not norm)
                nn.init.kaiming_normal_(conv.weight, nonlinearity="relu")
                if conv.bias is not None:
                    nn.init.zeros_(conv.bias)
                layers += [conv, *([nn.BatchNorm2d(width * factor)] if norm else []), nn.ReLU()]
                inputs = width * factor
            layers.append(nn.MaxPool2d(2))
        self.features, self.head = nn.Sequential(*layers), nn.Linear(inputs, classes)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.features(x).flatten(1))


class VisionTransformer(nn.Module):
    """A transformer over the patches of an image, its outputs averaged (Dosovitskiy et al. 2021, without a class token).

    Args:
        classes: how many.
        image: [channels, side] of the input.
        patch: side of a patch.
        width, heads, depth: of the transformer.
    """

    def __init__(self, classes: int, image: tuple[int, int], patch: int, width: int, heads: int, depth: int):
        super().__init__()
        self.patches = nn.Conv2d(image[0], width, patch, patch)
        self.position = nn.Parameter(0.02 * torch.randn((image[1] // patch) ** 2, width))
        self.blocks = nn.ModuleList(TransformerBlock(width, heads, causal=False) for _ in range(depth))
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, classes)

    def forward(self, x: Tensor) -> Tensor:
        h = self.patches(x).flatten(2).transpose(1, 2) + self.position
        for block in self.blocks:
            h = block(h)
        return self.head(self.norm(h).mean(1))


class UNet(nn.Module):
    """Ronneberger et al. (2015), with batch norm and bilinear enlargement: a class for every point, classes last.

    Args:
        classes: how many.
        width: channels at full size; they double with every halving.
        depth: how often the image is halved.
    """

    def __init__(self, classes: int, width: int = 16, depth: int = 3):
        super().__init__()

        def twice(inputs: int, outputs: int) -> nn.Sequential:
            layers: list[nn.Module] = []
            for i in (inputs, outputs):
                layers += [nn.Conv2d(i, outputs, 3, 1, 1, bias=False), nn.BatchNorm2d(outputs), nn.ReLU()]
            return nn.Sequential(*layers)

        widths = [width * 2**i for i in range(depth + 1)]
        self.down = nn.ModuleList(twice(i, o) for i, o in zip([3, *widths], widths, strict=False))
        self.up = nn.ModuleList(twice(2 * i + i, i) for i in reversed(widths[:-1]))
        self.head = nn.Conv2d(width, classes, 1)

    def forward(self, x: Tensor) -> Tensor:
        across: list[Tensor] = []
        for stage in self.down:
            x = stage(F.max_pool2d(x, 2) if across else x)
            across.append(x)
        across.pop()
        for stage in self.up:
            beside = across.pop()
            enlarged = F.interpolate(x, size=beside.shape[-2:], mode="bilinear", align_corners=False)
            x = stage(torch.cat([beside, enlarged], 1))
        return self.head(x).permute(0, 2, 3, 1)


class Projected(nn.Module):
    """An encoder with a perceptron behind it that is there for training only (SimCLR's projection head).

    Args:
        encoder: from images to features.
        features: how many.
        dimensions: of the perceptron's output.
    """

    def __init__(self, encoder: nn.Module, features: int, dimensions: int):
        super().__init__()
        self.encoder = encoder
        self.projection = nn.Sequential(nn.Linear(features, features), nn.ReLU(), nn.Linear(features, dimensions))

    def forward(self, x: Tensor) -> Tensor:
        features = self.encoder(x)
        return self.projection(features) if self.training else features


def pretrained_resnet(classes: int) -> ResNet:
    """The ResNet-32 of width 8 that was trained on CIFAR-10 (see `book/pretrained`), with a new last layer.

    Args:
        classes: how many the last layer has.

    Raises:
        MissingData: if the file with what was learned is not there.
    """
    from safetensors.torch import load_file

    if not PRETRAINED.exists():
        raise MissingData(f"{PRETRAINED} is missing; get it from the book's repository, or make it with book/_tools/pretrain.py.")
    model = ResNet(classes, width=8)
    learned = {name: t.float() if t.is_floating_point() else t for name, t in load_file(PRETRAINED).items()}
    model.load_state_dict({**model.state_dict(), **{name: t for name, t in learned.items() if not name.startswith("head.")}})
    return model


class SentenceClassifier(nn.Module):
    """A pretrained sentence encoder, the mean over the tokens, and a linear layer.

    Args:
        encoder: from (token numbers, mask) to vectors.
        width: of the vectors.
        classes: how many.
    """

    def __init__(self, encoder: nn.Module, width: int, classes: int):
        super().__init__()
        self.encoder, self.head = encoder, nn.Linear(width, classes)

    def forward(self, x: Tensor) -> Tensor:
        """[n, classes] from token numbers [n, tokens], where 0 is nothing."""
        mask = (x != 0).long()
        vectors = self.encoder(input_ids=x, attention_mask=mask).last_hidden_state
        return self.head((vectors * mask[:, :, None]).sum(1) / mask.sum(1, keepdim=True))


def sentence_classifier(d: Data) -> SentenceClassifier:
    """all-MiniLM-L6-v2, six layers of width 384, for as many classes as the data has; without dropout, so that a seed says it all."""
    from transformers import BertModel
    from transformers.utils import logging

    shown, said = logging.is_progress_bar_enabled(), logging.get_verbosity()
    logging.disable_progress_bar()
    logging.set_verbosity_error()
    try:
        encoder = BertModel.from_pretrained(
            datasets.sentence_encoder(), add_pooling_layer=False, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0,
        )
    finally:
        logging.set_verbosity(said)
        if shown:
            logging.enable_progress_bar()
    return SentenceClassifier(encoder, encoder.config.hidden_size, d.classes)
