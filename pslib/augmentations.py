"""Random changes of images.  What is drawn is drawn on the CPU, as integers, so that every device sees the same."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn import functional as F

__all__ = ["Augmentation", "Shift", "Views"]


class Augmentation:
    """A change of a batch of images that is decided by a few integers for each image.

    Attributes:
        ranges: how many values each of the integers can take; all are equally likely.
    """

    ranges: ClassVar[tuple[int, ...]]

    def __call__(self, x: Tensor, drawn: Tensor) -> Tensor:
        """Change the images.

        Args:
            x: [n, channels, height, width].
            drawn: [n, len(ranges)], integers from 0.
        """
        raise NotImplementedError


@dataclass(frozen=True)
class Shift(Augmentation):
    """Shift each image by up to four points in each direction, filling with zeros, and mirror it or not."""

    MOST: ClassVar[int] = 4
    ranges: ClassVar[tuple[int, ...]] = (2 * MOST + 1, 2 * MOST + 1, 2)

    def __call__(self, x: Tensor, drawn: Tensor) -> Tensor:
        """The shifted images; `drawn` says how far down and right, less four, and whether to mirror."""
        n, channels, height, width = x.shape
        padded = F.pad(x, (self.MOST,) * 4)
        rows = 2 * self.MOST - drawn[:, 0, None] + torch.arange(height, device=x.device)
        columns = torch.arange(width, device=x.device).expand(n, -1)
        columns = 2 * self.MOST - drawn[:, 1, None] + torch.where(drawn[:, 2, None] == 1, width - 1 - columns, columns)
        images, colours = torch.arange(n, device=x.device), torch.arange(channels, device=x.device)
        return padded[images[:, None, None, None], colours[None, :, None, None], rows[:, None, :, None], columns[:, None, None, :]]


@dataclass(frozen=True)
class Views(Augmentation):
    """Two views of each image, as SimCLR wants them (Chen et al. 2020, section 3): cut out, resized, mirrored, recoloured.

    A view is a square part of the image, enlarged to the whole; its brightness, contrast and saturation are changed, and
    one in five loses its colours.  The images are taken to be normalised to mean 0 and deviation 1.

    Args:
        area: the smallest part of the image that is cut out, as a share of its area.
        mirror: whether half of the views are mirrored.
        colour: the largest change of brightness, in standard deviations, and of contrast and saturation, as a share.
    """

    area: float = 0.3
    mirror: bool = True
    colour: float = 0.6

    STEPS: ClassVar[int] = 256
    ranges: ClassVar[tuple[int, ...]] = 2 * (6 * (STEPS,) + (2, 5))

    def __call__(self, x: Tensor, drawn: Tensor) -> Tensor:
        """[2n, channels, height, width]: the first views of all images, then the second ones."""
        return torch.cat([self._view(x, half) for half in drawn.chunk(2, 1)])

    def _view(self, x: Tensor, drawn: Tensor) -> Tensor:
        share = drawn[:, :6].to(x.dtype) / (self.STEPS - 1)
        side = (self.area + (1 - self.area) * share[:, 0]).sqrt()
        # The image reaches from −1 to 1 in both directions.
        middle = (1 - side)[:, None] * (2 * share[:, 1:3] - 1)
        across = torch.where((drawn[:, 6] == 1) & self.mirror, -side, side)
        nothing = torch.zeros_like(side)
        where = torch.stack([torch.stack([across, nothing, middle[:, 0]], 1), torch.stack([nothing, side, middle[:, 1]], 1)], 1)
        x = F.grid_sample(x, F.affine_grid(where, list(x.shape), align_corners=False), padding_mode="border", align_corners=False)
        brightness, contrast, saturation = (self.colour * (2 * share[:, 3:6] - 1)).view(-1, 3, 1, 1, 1).unbind(1)
        grey = x.mean(1, keepdim=True)
        faded = torch.where((drawn[:, 7] == 0).view(-1, 1, 1, 1), torch.zeros_like(saturation), 1 + saturation)
        return (1 + contrast) * (grey + faded * (x - grey)) + brightness
