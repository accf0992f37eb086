"""Data sets, networks and the sizes of the tasks; every loader on a small folder of the layout it is written for."""

import io
import lzma
import math
import pickle
import tarfile
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image

from pslib import datasets, networks, tasks
from pslib.augmentations import Shift
from pslib.contenders import make
from pslib.training import train

PHOTOGRAPHS = [f"{data}-{net}" for data in ("cifar10", "cifar100") for net in ("resnet32-bn", "resnet32", "vgg19-bn", "vgg19", "vit")]
CONTROL = ["hopper-sac", "humanoid-sac"]
WITH_FULL = [
    *PHOTOGRAPHS, "imagenet-vit", "shakespeare-characters", "shakespeare-bytes", "reviews-minilm", "cifar10-simclr", "camvid-unet",
    "ade20k-unet", *CONTROL,
]


@pytest.fixture(autouse=True)
def own_folders(tmp_path, monkeypatch):
    """Data and cache in a folder of the test's own; nothing remembered from before or left for after."""
    monkeypatch.setenv("PSLIB_DATA", str(tmp_path / "data"))
    monkeypatch.setenv("PSLIB_CACHE", str(tmp_path / "cache"))
    (tmp_path / "data").mkdir()
    loaders = (datasets.cifar10, datasets.cifar100, datasets.imagenet, datasets.shakespeare)
    for loader in loaders:
        loader.cache_clear()
    yield
    for loader in loaders:
        loader.cache_clear()


def jpeg(colour, size=(32, 32)):
    out = io.BytesIO()
    Image.new("RGB", size, colour).save(out, "JPEG", quality=95)
    return out.getvalue()


COLOURS = {"cat": (250, 10, 10), "airplane": (10, 250, 10), "truck": (10, 10, 250)}


def photographs(of=6):
    """path → JPEG, of one colour a class."""
    return {
        f"{split}/{label}/{i:04d}.jpg": jpeg(colour)
        for split, n in (("train", of), ("test", 2)) for label, colour in COLOURS.items() for i in range(n)
    }


def write_tar(path, files):
    with lzma.open(path, "wb") as packed, tarfile.open(fileobj=packed, mode="w") as archive:
        for name, raw in files.items():
            info = tarfile.TarInfo(f"cifar10/{name}")
            info.size = len(raw)
            archive.addfile(info, io.BytesIO(raw))


def write_folder(root, files):
    for name, raw in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(raw)


# Loaders.


def test_cifar10_from_the_archive_and_from_the_folder_are_the_same(tmp_path):
    write_tar(tmp_path / "data" / "cifar10-jpeg.tar.xz", photographs())
    packed = datasets.cifar10()
    (tmp_path / "data" / "cifar10-jpeg.tar.xz").unlink()
    datasets.cifar10.cache_clear()
    write_folder(tmp_path / "data" / "cifar10-jpeg", photographs())
    unpacked = datasets.cifar10()
    assert packed.sha256 == unpacked.sha256
    assert packed.x_train.shape == (18, 3, 32, 32) and packed.x_test.shape == (6, 3, 32, 32)


def test_cifar10_classes_are_in_alphabetical_order_and_pixels_belong_to_labels(tmp_path):
    write_tar(tmp_path / "data" / "cifar10-jpeg.tar.xz", photographs())
    d = datasets.cifar10()
    # airplane, cat, truck = 0, 1, 2 are green, red and blue.
    assert torch.equal(d.x_train.mean((2, 3)).argmax(1), torch.tensor([1, 0, 2])[d.y_train])
    assert sorted(d.y_train.tolist()) == 6 * [0] + 6 * [1] + 6 * [2]
    assert not torch.equal(d.y_train, d.y_train.sort().values)


def test_photographs_are_normalised_by_the_training_images_and_reduced_by_averaging(tmp_path):
    write_tar(tmp_path / "data" / "cifar10-jpeg.tar.xz", photographs())
    whole, small = datasets.cifar10(), datasets.cifar10(9, 3, 16)
    assert small.x_train.shape == (9, 3, 16, 16) and small.x_test.shape == (3, 3, 16, 16)
    for d in (whole, small):
        # float32 sums over 10⁴ numbers of order 1
        assert torch.allclose(d.x_train.mean((0, 2, 3)), torch.zeros(3), atol=1e-5)
        assert torch.allclose(d.x_train.std((0, 2, 3)), torch.ones(3), atol=1e-5)
    # The first nine of the same shuffling, not another draw.
    assert torch.equal(small.y_train, whole.y_train[:9])


def test_a_small_point_is_the_mean_of_those_it_stands_for():
    pixels = np.random.RandomState(0).randint(0, 256, (2, 5, 3, 32, 32), dtype=np.uint8)
    arrays = {f"{k}_{split}": v for split, x in zip(("train", "test"), pixels, strict=True) for k, v in (("x", x), ("y", np.arange(5)))}
    d = datasets._subset(arrays, 5, None, None, 8)
    means = torch.from_numpy(pixels[0]).double().reshape(5, 3, 8, 4, 8, 4).mean((3, 5))[d.y_train]
    expected = (means - means.mean((0, 2, 3), keepdim=True)) / means.std((0, 2, 3), keepdim=True)
    # float32 against float64
    assert torch.allclose(d.x_train.double(), expected, atol=1e-5)


def test_an_archive_is_decoded_once(tmp_path, monkeypatch):
    write_tar(tmp_path / "data" / "cifar10-jpeg.tar.xz", photographs())
    first = datasets.cifar10()
    assert [p.name[:13] for p in (tmp_path / "cache").iterdir()] == ["cifar10-jpeg-"]
    datasets.cifar10.cache_clear()
    monkeypatch.setattr(datasets, "_read_tar", lambda path: pytest.fail("decoded again"))
    assert datasets.cifar10().sha256 == first.sha256


def test_another_archive_is_not_taken_for_the_cached_one(tmp_path):
    write_tar(tmp_path / "data" / "cifar10-jpeg.tar.xz", photographs())
    first = datasets.cifar10()
    datasets.cifar10.cache_clear()
    write_tar(tmp_path / "data" / "cifar10-jpeg.tar.xz", photographs(of=7))
    assert len(first.x_train) == 18 and len(datasets.cifar10().x_train) == 21


def test_cifar100_from_torchvisions_layout(tmp_path):
    folder = tmp_path / "data" / "cifar-100-python"
    folder.mkdir()
    pixels = np.random.RandomState(0).randint(0, 256, (12, 3, 32, 32), dtype=np.uint8)
    for split, rows in (("train", slice(0, 8)), ("test", slice(8, 12))):
        batch = {b"data": pixels[rows].reshape(-1, 3072), b"fine_labels": list(range(100))[rows], b"coarse_labels": [0] * len(pixels[rows])}
        (folder / split).write_bytes(pickle.dumps(batch))
    d = datasets.cifar100()
    assert d.classes == 100 and d.x_train.shape == (8, 3, 32, 32) and sorted(d.y_test.tolist()) == [8, 9, 10, 11]
    # Label i was given to picture i: undo the normalisation of one channel and compare.
    raw = torch.from_numpy(pixels).float() / 255
    mean, std = raw[:8].mean((0, 2, 3), keepdim=True), raw[:8].std((0, 2, 3), keepdim=True)
    assert torch.allclose(d.x_train * std + mean, raw[d.y_train], atol=1e-5)


def imagenet_folder(root):
    for split, n in (("train", 4), ("val", 2)):
        for label, colour in (("n01440764", (255, 0, 0)), ("n01443537", (0, 0, 255))):
            for i in range(n):
                write_folder(root / "imagenet" / split / label, {f"{label}_{i}.JPEG": jpeg(colour, (60 + 10 * i, 40))})


def test_imagenet_from_torchvisions_layout_is_decoded_when_it_is_indexed(tmp_path):
    imagenet_folder(tmp_path / "data")
    d = datasets.imagenet(32)
    assert d.classes == 2 and len(d.x_train) == 8 and len(d.x_test) == 4
    assert d.y_train.tolist() == [0, 0, 0, 0, 1, 1, 1, 1]
    batch = d.x_train[torch.tensor([7, 0])]
    assert batch.shape == (2, 3, 32, 32)
    # blue, then red, in units of ImageNet's standard deviations; JPEG is exact to a few of 255 steps
    expected = (torch.tensor([[0.0, 0, 1], [1, 0, 0]]) - datasets.ImageFiles.MEAN.flatten()) / datasets.ImageFiles.STD.flatten()
    assert torch.allclose(batch.mean((2, 3)), expected, atol=0.1)
    assert torch.equal(d.x_train[6:8][1], d.x_train[torch.tensor([7])][0])


def test_a_vit_trains_on_the_imagenet_layout(tmp_path):
    imagenet_folder(tmp_path / "data")
    task = replace(tasks.get("imagenet-vit"), batch_size=4, augment=Shift())
    history = train(task, lambda p: make("psdasgd-tensor", p), steps=30, evaluations=2)
    assert history.final_loss < history.losses[0] / 2
    assert history.final_metric == 1.0


TEXT = "to be, or not to be: that is the question.\n" * 40


def test_shakespeare_by_characters_and_by_bytes(tmp_path):
    (tmp_path / "data" / "tinyshakespeare.txt").write_text(TEXT)
    characters, raw = datasets.shakespeare("characters", 16, 5), datasets.shakespeare("bytes", 16, 5)
    alphabet = sorted(set(TEXT))
    assert characters.classes == len(alphabet) and raw.classes == 256
    assert "".join(alphabet[i] for i in characters.x_train[3]) == TEXT[3:19] == bytes(raw.x_train[3].tolist()).decode()
    cut = int(0.9 * len(TEXT))
    for d in (characters, raw):
        # The target is the next token, and nothing of the last tenth is trained on.
        assert torch.equal(d.x_train[1:], d.y_train[:-1]) and torch.equal(d.y_test[:, :-1], d.x_test[:, 1:])
        assert len(d.x_train) == cut - 16 and d.x_test.shape == (5, 16)
    assert "".join(alphabet[i] for i in characters.x_test[0]) == TEXT[cut : cut + 16]


@pytest.mark.parametrize("name", ["cifar10-vit", "cifar100-vit", "imagenet-vit", "shakespeare-bytes"])
def test_missing_data_give_one_sentence_that_says_how_to_get_them(name, tmp_path):
    with pytest.raises(tasks.MissingData, match=f"is not in {tmp_path / 'data'}: ") as caught:
        tasks.get(name).load()
    assert "\n" not in str(caught.value) and len(str(caught.value)) > 80


def test_an_archive_with_nothing_in_it_gives_one_sentence(tmp_path):
    write_tar(tmp_path / "data" / "cifar10-jpeg.tar.xz", {"readme.txt": b"nothing"})
    with pytest.raises(tasks.MissingData, match="cifar10-jpeg.tar.xz has no images under train/<class>/ and test/<class>/"):
        datasets.cifar10()


def test_a_truncated_archive_gives_one_sentence(tmp_path):
    path = tmp_path / "data" / "cifar10-jpeg.tar.xz"
    write_tar(path, photographs())
    path.write_bytes(path.read_bytes()[:-400])
    with pytest.raises(tasks.MissingData, match="cifar10-jpeg.tar.xz is damaged .*; get it again"):
        datasets.cifar10()
    assert not list((tmp_path / "cache").glob("*"))


def test_damaged_files_of_every_set_give_one_sentence_that_names_them(tmp_path):
    data = tmp_path / "data"
    (data / "cifar-100-python").mkdir()
    write_folder(data / "cifar-100-python", {"train": b"no pickle", "test": b""})
    (data / "tinyshakespeare.txt").write_bytes(b"\xff\xfe")
    (data / "imagenet").mkdir()
    write_folder(data / "cifar10-jpeg", {"train/cat/0.jpg": jpeg((0, 0, 0))[:100], "test/cat/0.jpg": jpeg((0, 0, 0))})
    for load, name in (
        (datasets.cifar100, "cifar-100-python/train"), (datasets.shakespeare, "tinyshakespeare.txt"), (datasets.imagenet, "imagenet"),
        (datasets.cifar10, "train/cat/0.jpg"),
    ):
        with pytest.raises(tasks.MissingData, match=f"{data}/.*{name} is damaged or something else .*; get it again.") as caught:
            load()
        assert "\n" not in str(caught.value)


def test_a_damaged_file_in_the_cache_gives_one_sentence(tmp_path):
    (tmp_path / "cache").mkdir(exist_ok=True)
    (tmp_path / "cache" / "mnist1d.npz").write_bytes(b"not a zip")
    with pytest.raises(tasks.MissingData, match="mnist1d.npz is damaged"):
        datasets.mnist1d.__wrapped__()


def test_without_pslib_data_the_cache_folder_is_looked_in(tmp_path, monkeypatch):
    monkeypatch.delenv("PSLIB_DATA")
    assert datasets.data_folder() == tmp_path / "cache" / "data"


# Networks.


def layers(model):
    return [m for m in model.modules() if isinstance(m, (torch.nn.Conv2d, torch.nn.Linear))]


def count(model):
    return sum(p.numel() for p in model.parameters())


def normed(model):
    return any(isinstance(m, torch.nn.BatchNorm2d) for m in model.modules())


@pytest.mark.parametrize("norm", [True, False])
def test_resnet32_is_the_published_network(norm):
    model = networks.ResNet(10, norm)
    assert len(layers(model)) == 32
    # 0.46 million in Table 6 of He et al. (2016)
    assert round(count(model) / 1e6, 2) == 0.46
    assert normed(model) == norm
    assert all((m.bias is None) == norm for m in layers(model)[:-1])
    assert model.conv(torch.zeros(1, 3, 32, 32)).shape[1:] == (16, 32, 32)
    assert model.blocks(torch.zeros(1, 16, 32, 32)).shape[1:] == (64, 8, 8)


def test_a_resnet_block_without_its_convolutions_is_its_shortcut():
    block = networks.ResNetBlock(4, 8, 2, norm=False)
    for p in block.parameters():
        torch.nn.init.zeros_(p)
    x = torch.rand(2, 4, 6, 6)
    out = block(x)
    assert torch.equal(out[:, :4], x[:, :, ::2, ::2]) and not out[:, 4:].any()


@pytest.mark.parametrize("norm", [True, False])
def test_vgg19_is_configuration_e_with_one_linear_layer(norm):
    model = networks.VGG19(10, norm)
    widths = [m.out_channels for m in layers(model)[:-1]]
    assert widths == 2 * [64] + 2 * [128] + 4 * [256] + 8 * [512]
    assert normed(model) == norm
    # 20.02 million in the sixteen 3 × 3 convolutions, by hand: 9·Σ in·out, and the rest is small
    assert sum(m.weight.numel() for m in layers(model)[:-1]) == 9 * sum(a * b for a, b in zip([3, *widths], widths, strict=False))
    x = torch.randn(2, 3, 32, 32)
    assert model(x).shape == (2, 10)
    if not norm:
        # He's start keeps the signal through sixteen layers; PyTorch's own loses six powers of ten.
        assert 0.1 < model.features(x).square().mean().sqrt() < 10


def test_a_vision_transformer_without_positions_does_not_know_where_a_patch_is():
    torch.manual_seed(0)
    model = networks.VisionTransformer(10, (1, 8), 2, 16, 2, 1).double()
    x = torch.randn(3, 1, 8, 8, dtype=torch.float64)
    moved = x.roll(2, dims=3)  # by one whole patch
    with torch.no_grad():
        assert not torch.allclose(model(x), model(moved))
        model.position.zero_()
        assert torch.allclose(model(x), model(moved))
        # Neither causal: the first patch sees the last.
        seen = model.blocks[0](model.patches(x).flatten(2).transpose(1, 2))
        x[..., -1, -1] += 1
        assert not torch.allclose(seen[:, 0], model.blocks[0](model.patches(x).flatten(2).transpose(1, 2))[:, 0])


# Sizes.


def test_presets_differ_in_size_and_only_some_tasks_have_the_full_one():
    assert [name for name in tasks.names() if tasks.get(name).full] == [n for n in tasks.names() if n in WITH_FULL]
    for name in WITH_FULL:
        smoke, cpu, full = (tasks.get(name, preset) for preset in tasks.PRESETS)
        assert smoke.steps < cpu.steps < full.steps and cpu.batch_size < full.batch_size and not full.full
        assert (cpu.metric, cpu.title) == (full.metric, full.title)
        if name in CONTROL:
            assert smoke.steps == smoke.warmup + 5 and cpu.environment == full.environment and cpu.copies == 1 < full.copies
        else:
            assert smoke.steps == 5 and cpu.classes == full.classes and full.accelerate and not cpu.accelerate
    with pytest.raises(ValueError, match="digits-mlp has no preset 'full': 'cpu' is all there is of it."):
        tasks.get("digits-mlp", "full")
    with pytest.raises(ValueError, match="there is no preset 'big'; choose one of smoke, cpu, full."):
        tasks.get("digits-mlp", "big")


def test_the_full_preset_is_sixty_epochs_of_all_photographs():
    full = tasks.get("cifar10-resnet32-bn", "full")
    assert 59 * 50_000 < full.steps * full.batch_size <= 60 * 50_000
    assert full.load is datasets.cifar10 and full.augment == Shift()


@pytest.mark.parametrize("name", [n for n in PHOTOGRAPHS if n.startswith("cifar10-")])
@pytest.mark.parametrize("preset", ["cpu", "full"])
def test_networks_of_the_photographs_take_them_and_start_near_guessing(name, preset):
    task = tasks.get(name, preset)
    side = 32 if preset == "full" or "vgg" in name else 16
    d = datasets.Data(torch.randn(16, 3, side, side), torch.arange(16) % 10, *2 * [torch.empty(0)], 10, "")
    torch.manual_seed(0)
    model = task.build(d)
    # Batch norm makes the outputs of order 1 in whatever direction: up to about a nat and a half above ln 10.
    assert math.log(10) - 0.5 < task.loss(model(d.x_train), d.y_train).item() < math.log(10) + 1.5
    assert normed(model) == name.endswith("-bn")


@pytest.mark.parametrize("name", ["digits-mlp", "digits-vit", "mnist1d-cnn", "chars-transformer"])
def test_the_number_of_classes_is_the_datas(name):
    task = tasks.get(name)
    # Python's documentation topics gain and lose a sign now and then.
    assert abs(task.load().classes - task.classes) <= (10 if name == "chars-transformer" else 0)
