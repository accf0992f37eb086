"""Self-supervision: views, the contrastive loss and its floor, the probe, and the records behind the chapter's findings."""

import itertools
import json
import math
from dataclasses import replace
from functools import cache

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional as F

from pslib import benchmark, contenders, experiments, tasks
from pslib.augmentations import Shift, Views
from pslib.datasets import Data
from pslib.networks import Projected
from pslib.training import step, train

CONFIGURED = settings(max_examples=60, deadline=None)
BATCH, DIMENSIONS, TEMPERATURE = 128, 64, 0.5  # of the recorded task
DIGITS = tasks.get("digits-simclr")
# Numbers drawn for one view that take the whole image, do not mirror it and keep its colours.
WHOLE = [255, 0, 0, 0, 0, 0, 0, 1]


def drawn(augmentation, n, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.stack([torch.randint(high, (n,), generator=generator) for high in augmentation.ranges], 1)


def images(n=5, side=16, seed=0):
    return torch.randn(n, 3, side, side, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def views(x, first, second=WHOLE, **settings):
    """The two views of each image for the same numbers."""
    return Views(**settings)(x, torch.tensor([[*first, *second]]).expand(len(x), -1)).chunk(2)


# --- shifting ---------------------------------------------------------------------------------------

def test_shift_moves_down_and_right_fills_with_zeros_and_mirrors():
    x = torch.arange(1.0, 7.0).view(1, 1, 2, 3)  # 1 2 3 over 4 5 6
    for numbers, expected in {
        (4, 4, 0): [[1, 2, 3], [4, 5, 6]], (4, 4, 1): [[3, 2, 1], [6, 5, 4]], (5, 4, 0): [[0, 0, 0], [1, 2, 3]],
        (3, 4, 0): [[4, 5, 6], [0, 0, 0]], (4, 5, 0): [[0, 1, 2], [0, 4, 5]], (4, 2, 0): [[3, 0, 0], [6, 0, 0]],
        (5, 5, 1): [[0, 0, 0], [2, 1, 0]], (8, 4, 0): [[0, 0, 0], [0, 0, 0]],
    }.items():
        assert Shift()(x, torch.tensor([numbers])).tolist() == [[expected]], numbers


def test_shift_treats_each_image_by_its_own_numbers_and_all_channels_alike():
    x, numbers = images(40), drawn(Shift(), 40)
    together = Shift()(x, numbers)
    assert together.shape == x.shape and together.dtype == x.dtype
    assert all(torch.equal(together[i], Shift()(x[i : i + 1], numbers[i : i + 1])[0]) for i in range(40))
    assert torch.equal(Shift()(x[:, :1], numbers), together[:, :1])


# --- views ------------------------------------------------------------------------------------------

def test_two_views_of_each_image_the_first_ones_first():
    x = images()
    both = Views()(x, drawn(Views(), 5))
    assert both.shape == (10, 3, 16, 16) and both.dtype == x.dtype
    # The first view of every image is made by the first eight numbers, the second one by the others.
    numbers = drawn(Views(), 5)
    assert torch.equal(both[5:], Views()(x, numbers.roll(8, 1))[:5]) and torch.equal(both[:5], Views()(x, numbers.roll(8, 1))[5:])
    assert (both[:5] - both[5:]).abs().amax((1, 2, 3)).min() > 0.1


def test_views_are_decided_by_what_is_drawn_each_image_by_its_own():
    x, numbers = images(30), drawn(Views(), 30)
    both = Views()(x, numbers)
    assert torch.equal(both, Views()(x, numbers)) and not torch.equal(both, Views()(x, drawn(Views(), 30, seed=1)))
    for i in (0, 17, 29):
        torch.testing.assert_close(Views()(x[i : i + 1], numbers[i : i + 1]), both[[i, 30 + i]], rtol=0, atol=0)


def test_every_number_matters():
    x, alone = images(1), [128, 30, 200, 40, 90, 220, 0, 3]
    for place, other in enumerate((64, 90, 20, 200, 20, 60, 1, 0)):
        changed = [*alone[:place], other, *alone[place + 1 :]]
        assert not torch.allclose(*(views(x, numbers)[0] for numbers in (alone, changed))), place


def test_the_whole_image_with_its_own_colours_is_the_image():
    x = images()
    # Weights of neighbouring points that should be 0 are 0 to the rounding of float64 coordinates up to 16.
    torch.testing.assert_close(views(x, WHOLE, colour=0.0)[0], x, rtol=0, atol=1e-13)


def test_a_mirrored_view_is_the_view_turned_round():
    x = images()
    plain, mirrored = WHOLE, [*WHOLE[:6], 1, 1]
    torch.testing.assert_close(views(x, mirrored, colour=0.0)[0], x.flip(3), rtol=0, atol=1e-13)
    # Also of a part: it is the view of the same part that is turned round.
    part = [60, 0, 255, 200, 10, 30]
    torch.testing.assert_close(views(x, [*part, 1, 1])[0], views(x, [*part, 0, 1])[0].flip(3), rtol=0, atol=1e-13)
    assert torch.equal(*(views(x, numbers, mirror=False)[0] for numbers in (plain, mirrored)))


def test_a_view_is_a_square_part_within_the_image_of_at_least_the_smallest_area():
    """A picture of its own coordinates tells where each point of the view was taken from."""
    n, side, area = 400, 32, 0.3
    centres = (2 * torch.arange(side, dtype=torch.float64) + 1) / side - 1
    down, right = torch.meshgrid(centres, centres, indexing="ij")
    x = torch.stack([right, down, torch.zeros_like(down)]).expand(n, -1, -1, -1)
    numbers = drawn(Views(), n)
    seen = Views(area, True, 0.0)(x, numbers.index_fill(1, torch.tensor([7, 15]), 1))[:n]
    inner = slice(4, -4)  # away from the border, beyond whose middle the picture stops rising
    across, along = (seen[:, i, inner, inner].diff(dim=2 - i) for i in (0, 1))
    size = along.mean((1, 2)) / (2 / side)  # of the part, as a share of the image's side
    torch.testing.assert_close(across.mean((1, 2)), torch.where(numbers[:, 6] == 1, -1, 1) * size * 2 / side, rtol=1e-9, atol=0)
    assert across.diff(dim=2).abs().max() < 1e-12 > along.diff(dim=1).abs().max()
    middle = seen[:, :2, side // 2 - 1 : side // 2 + 1, side // 2 - 1 : side // 2 + 1].mean((2, 3))
    assert ((middle.abs() + size[:, None]) < 1 + 1e-9).all()
    # The share of the area is as it was drawn, from the smallest to all of it, and the middle may lie wherever it can.
    share = numbers[:, :3].double() / 255
    torch.testing.assert_close(size**2, area + (1 - area) * share[:, 0], rtol=1e-9, atol=0)
    torch.testing.assert_close(middle, (1 - size)[:, None] * (2 * share[:, 1:] - 1), rtol=0, atol=1e-9)


def test_without_a_change_of_colour_no_value_leaves_the_range_of_the_image():
    x, numbers = images(50) + 10, drawn(Views(), 50)  # all of it far from 0, which a border could let in
    seen = Views(0.3, True, 0.0)(x, numbers.index_fill(1, torch.tensor([7, 15]), 1)).view(2, 50, 3, -1)
    # Interpolation is a weighted mean; rounding may pass its ends by a few units in the last place.
    assert (seen.amax(3) <= x.flatten(2).amax(2) + 1e-12).all() and (seen.amin(3) >= x.flatten(2).amin(2) - 1e-12).all()


def test_colours_change_as_drawn():
    x, colour = images(2), 0.6
    grey = x.mean(1, keepdim=True)
    for b, c, s in itertools.product((0, 100, 255), repeat=3):
        brightness, contrast, saturation = (colour * (2 * v / 255 - 1) for v in (b, c, s))
        seen, _ = views(x, [255, 0, 0, b, c, s, 0, 1], colour=colour)
        expected = (1 + contrast) * (grey + (1 + saturation) * (x - grey)) + brightness
        torch.testing.assert_close(seen, expected, rtol=0, atol=1e-12)


def test_one_view_in_five_is_grey():
    x = images()
    seen, other = views(x, [128, 5, 9, 40, 90, 220, 0, 0])
    assert torch.equal(seen[:, 0], seen[:, 1]) and torch.equal(seen[:, 0], seen[:, 2])
    assert not torch.equal(other[:, 0], other[:, 1])
    assert Views.ranges == 2 * (256, 256, 256, 256, 256, 256, 2, 5)


# --- the loss ---------------------------------------------------------------------------------------

def contrastive(n, temperature=TEMPERATURE):
    return replace(tasks.get("cifar10-simclr"), batch_size=n, temperature=temperature)


def loss_of(outputs, temperature=TEMPERATURE):
    return contrastive(len(outputs) // 2, temperature).loss(outputs, None)


def by_loops(outputs, temperature):
    """The definition, one similarity at a time."""
    rows = outputs.tolist()
    n = len(rows) // 2

    def similar(i, j):
        a, b = rows[i], rows[j]
        return sum(p * q for p, q in zip(a, b, strict=True)) / math.hypot(*a) / math.hypot(*b) / temperature

    def of(i):
        other = (i + n) % (2 * n)
        return -math.log(math.exp(similar(i, other)) / sum(math.exp(similar(i, j)) for j in range(2 * n) if j != i))

    return sum(map(of, range(2 * n))) / (2 * n)


def random_outputs(seed, n, dimensions):
    return torch.randn(2 * n, dimensions, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@CONFIGURED
@given(st.integers(0, 2**31), st.integers(2, 6), st.integers(1, 5), st.sampled_from((0.1, 0.5, 2.0)))
def test_the_loss_is_what_two_loops_say(seed, n, dimensions, temperature):
    outputs = random_outputs(seed, n, dimensions)
    # Sums of at most 12 exponentials of numbers up to 10, in float64.
    assert loss_of(outputs, temperature).item() == pytest.approx(by_loops(outputs, temperature), abs=1e-12)


def test_the_loss_of_four_views_by_hand():
    e = torch.eye(2, dtype=torch.float64)
    # Partners agree, the others are at right angles; then partners are at right angles, and one of the others agrees.
    together, apart = torch.cat([e, 3 * e]), torch.cat([e, e.flip(0)])
    assert loss_of(together, 0.5).item() == pytest.approx(math.log(1 + 2 * math.exp(-2)), abs=1e-14)
    assert loss_of(apart, 0.5).item() == pytest.approx(math.log(2 + math.exp(2)), abs=1e-14)


def test_outputs_in_half_precision_are_compared_in_single_precision():
    outputs = random_outputs(0, 64, 32).bfloat16()
    with torch.autocast("cpu", torch.bfloat16):
        under = loss_of(outputs)
    assert under.dtype == torch.float32 and torch.equal(under, loss_of(outputs.float()))


def test_the_gradient_of_the_loss():
    outputs = random_outputs(0, 4, 3).requires_grad_()
    assert torch.autograd.gradcheck(loss_of, [outputs])
    # The length of an output does not matter, so nothing pulls along it.
    (gradient,) = torch.autograd.grad(loss_of(outputs), outputs)
    assert (gradient * outputs).sum(1).abs().max() < 1e-15 < 1e-3 < gradient.norm()


@CONFIGURED
@given(st.integers(0, 2**31), st.integers(2, 8))
def test_the_order_of_images_and_of_views_does_not_matter(seed, n):
    outputs = random_outputs(seed, n, 3)
    order = torch.randperm(n, generator=torch.Generator().manual_seed(seed))
    first, second = outputs.chunk(2)
    for other in (torch.cat([first[order], second[order]]), torch.cat([second, first]), outputs * torch.rand(2 * n, 1) + 1e-3 * outputs):
        assert loss_of(other).item() == pytest.approx(loss_of(outputs).item(), abs=1e-12)
    # Partners are paired by position: any other pairing is another loss.
    assert abs(loss_of(torch.cat([first, second.roll(1, 0)])).item() - loss_of(outputs).item()) > 1e-9


@pytest.mark.parametrize("n", [2, 7, 128])
def test_guessing_is_when_all_views_look_alike(n):
    alike = torch.ones(2 * n, 5, dtype=torch.float64)
    assert loss_of(alike).item() == pytest.approx(math.log(2 * n - 1), abs=1e-12)
    assert contrastive(n).guess == pytest.approx(math.log(2 * n - 1), abs=1e-15)


# --- its floor --------------------------------------------------------------------------------------

def simplex(n):
    """The n corners of a regular simplex, unit vectors in n − 1 dimensions."""
    centred = torch.eye(n, dtype=torch.float64) - 1 / n
    basis = torch.linalg.svd(centred).Vh[: n - 1]
    return F.normalize(centred @ basis.T, dim=1)


def cross(dimensions):
    """The corners of a cross-polytope: plus and minus each direction."""
    return torch.cat([torch.eye(dimensions, dtype=torch.float64), -torch.eye(dimensions, dtype=torch.float64)])


@CONFIGURED
@given(st.integers(0, 2**31), st.integers(2, 9), st.integers(1, 9), st.sampled_from((0.1, 0.5, 3.0)), st.floats(0.0, 1.0))
def test_no_configuration_is_below_the_floor(seed, n, dimensions, temperature, agreement):
    outputs = F.normalize(random_outputs(seed, n, dimensions), dim=1)
    first, second = outputs.chunk(2)
    for configuration in (outputs, torch.cat([first, agreement * first + (1 - agreement) * second])):
        # Rounding of a logarithm of a sum of 17 numbers.
        assert loss_of(configuration, temperature).item() >= contrastive(n, temperature).floor - 1e-12


@pytest.mark.parametrize("temperature", [0.1, 0.5, 2.0])
@pytest.mark.parametrize("n", [2, 3, 8, 128])
def test_a_simplex_with_agreeing_views_is_at_the_floor_and_nothing_near_it_is(n, temperature):
    corners, task = simplex(n), contrastive(n, temperature)
    assert corners.shape == (n, n - 1)
    assert loss_of(corners.repeat(2, 1), temperature).item() == pytest.approx(task.floor, abs=1e-12)
    assert task.floor == pytest.approx(math.log(1 + (2 * n - 2) * math.exp(-n / (n - 1) / temperature)), abs=1e-12)
    if n > 2:
        generator = torch.Generator().manual_seed(0)
        for size in (0.01, 0.3):
            near = corners.repeat(2, 1) + size * torch.randn(2 * n, n - 1, generator=generator, dtype=torch.float64)
            # At the lowest temperature the floor itself is near 1e-6, hence a part of it; equality above is to rounding.
            assert loss_of(near, temperature).item() > task.floor * (1 + 1e-6)


def descended(n, dimensions, temperature=0.5, starts=3):
    """The lowest loss that L-BFGS finds."""
    found = []
    for seed in range(starts):
        outputs = random_outputs(seed, n, dimensions).requires_grad_()
        optimizer = torch.optim.LBFGS([outputs], max_iter=300, tolerance_grad=1e-10, tolerance_change=1e-14, line_search_fn="strong_wolfe")

        def closure(outputs=outputs, optimizer=optimizer):
            optimizer.zero_grad()
            loss = loss_of(outputs, temperature)
            loss.backward()
            return loss

        optimizer.step(closure)
        found.append(loss_of(outputs, temperature).item())
    return min(found)


def test_descent_ends_at_the_floor_if_there_is_room_and_above_it_if_not():
    n = 6
    floor = contrastive(n).floor
    for dimensions in (5, 7):
        assert descended(n, dimensions) == pytest.approx(floor, abs=1e-6)
    # In three dimensions six points cannot be a simplex; the octahedron is the best that descent finds.
    octahedron = loss_of(cross(3).repeat(2, 1)).item()
    assert descended(n, 3) == pytest.approx(octahedron, abs=1e-6) and octahedron > floor + 0.01


def test_the_recorded_task_has_too_few_dimensions_for_its_floor_and_misses_it_by_less_than_a_hundredth():
    task, small = tasks.get("cifar10-simclr"), torch.zeros(2, 3, 16, 16)
    model = task.build(Data.of(small, torch.zeros(2), small, torch.zeros(2), 10))
    assert (task.batch_size, task.temperature, model(small).shape[1]) == (BATCH, TEMPERATURE, DIMENSIONS) and BATCH - 1 > DIMENSIONS
    # 128 points in 64 dimensions: a cross-polytope has just as many corners.
    best_known = loss_of(cross(DIMENSIONS).repeat(2, 1)).item()
    assert best_known == pytest.approx(math.log(1 + 2 * (BATCH - 2 + math.exp(-2)) * math.exp(-2)), abs=1e-12)
    assert 0.005 < best_known - task.floor < 0.01


def floor_of_all(n, count):
    """The least mean loss of all batches of n of so many images."""
    return math.log1p((2 * n - 2) * math.exp(-count / (count - 1) / TEMPERATURE))


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 2**31), st.integers(2, 3), st.integers(1, 3), st.floats(0.0, 1.0))
def test_no_set_of_images_has_a_mean_loss_below_the_floor_of_all_batches(seed, n, more, agreement):
    """The mean over every batch of n images and, independently, one of two views twice over for each of them."""
    count = n + more
    generator = torch.Generator().manual_seed(seed)
    image, change = torch.randn(2, count, 2, 3, generator=generator, dtype=torch.float64)
    seen = F.normalize(image[:, :1] + (1 - agreement) * change, dim=2)
    losses = [
        loss_of(seen[list(chosen) * 2, list(ways)]).item()
        for chosen in itertools.combinations(range(count), n) for ways in itertools.product((0, 1), repeat=2 * n)
    ]
    assert np.mean(losses) >= floor_of_all(n, count) - 1e-12 and floor_of_all(n, count) > contrastive(n).floor + 1e-4


def test_a_simplex_of_all_images_is_at_the_floor_of_all_batches():
    n, count = 3, 6
    corners = simplex(count)
    losses = [loss_of(corners[list(chosen)].repeat(2, 1)).item() for chosen in itertools.combinations(range(count), n)]
    assert losses == pytest.approx([floor_of_all(n, count)] * 20, abs=1e-12)


# --- the network, the probe and training ------------------------------------------------------------

def test_without_the_photographs_one_sentence_says_what_is_missing(tmp_path, monkeypatch):
    monkeypatch.setenv("PSLIB_DATA", str(tmp_path))
    load = tasks.get("cifar10-simclr").load
    with pytest.raises(tasks.MissingData, match="cifar10-jpeg.tar.xz") as caught:
        load.func.__wrapped__(*load.args)
    assert "\n" not in str(caught.value) and str(caught.value).endswith(".")



def fresh(seed=0):
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return DIGITS.build(DIGITS.load())


def test_the_projection_is_there_for_training_only():
    model, x = fresh(), DIGITS.load().x_train[:6]
    assert isinstance(model, Projected) and model.train()(x).shape == (6, 32)
    model.eval()
    features = model(x)
    assert features.shape == (6, 32) and torch.equal(features, model.encoder(x))
    wider = tasks.get("cifar10-simclr").build(DIGITS.load()).eval()
    assert wider(x).shape == (6, 64) and torch.equal(wider(x), wider.encoder(x))
    # The projection's parameters are trained all the same.
    DIGITS.loss(model.train()(torch.cat([x, x + 0.1])), None).backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())


@pytest.mark.parametrize("name, settings_", [("adamw", {"lr": 1e-3}), ("psdasgd-tensor", {}), ("ps-sps", {"f_star": 3.3})])
def test_one_step_lowers_the_loss_on_the_same_views(name, settings_):
    data, model = DIGITS.load(), fresh()
    x = Views(0.6, False, 0.3)(data.x_train[:100], drawn(Views(), 100))
    optimizer = contenders.make(name, model.named_parameters(), **settings_)
    before = DIGITS.loss(model(x), None)
    before.backward()
    step(optimizer, before.detach())
    # Each contender's first step is a small one; what it gains is far above rounding in float32.
    assert DIGITS.loss(model(x), None).item() < before.item() - 1e-3


def test_training_is_the_same_under_a_seed_and_does_not_read_the_labels():
    data = DIGITS.load()
    short = replace(DIGITS, evaluations=1, load=lambda: replace(data, x_test=data.x_test[:20], y_test=data.y_test[:20]))
    unlabelled = replace(short, load=lambda: replace(data, y_train=data.y_train.roll(1), x_test=data.x_test[:20], y_test=data.y_test[:20]))

    def run(task, seed=0):
        return train(task, lambda p: contenders.make("psdasgd-tensor", p), seed=seed, steps=3)

    a, b, other, mixed = run(short), run(short), run(short, 1), run(unlabelled)
    assert torch.equal(a.losses, b.losses) and a.test_metric == b.test_metric and not torch.equal(a.losses, other.losses)
    assert torch.equal(a.losses, mixed.losses) and a.test_metric[-1] > 2 * mixed.test_metric[-1]


def features(seed=0):
    """Data whose inputs are features already: ten clouds."""
    generator = torch.Generator().manual_seed(seed)
    centres = torch.randn(10, 6, generator=generator)
    y = torch.arange(10).repeat(20)
    x = centres[y] + 0.3 * torch.randn(200, 6, generator=generator)
    return Data.of(x[:150], y[:150], x[150:], y[150:], 10)


def test_the_probe_is_fitted_on_training_features_only():
    data = features()
    said = DIGITS.predict(lambda x: x, data)
    assert said.shape == (50, 10)
    torch.testing.assert_close(said.double().exp().sum(1), torch.ones(50, dtype=torch.float64), rtol=0, atol=1e-5)
    assert DIGITS.measure(said, data.y_test)[1] > 0.9
    # Test labels are not looked at, and what is said of one image does not depend on which others are asked about.
    assert torch.equal(said, DIGITS.predict(lambda x: x, replace(data, y_test=data.y_test.roll(1))))
    few = DIGITS.predict(lambda x: x, replace(data, x_test=torch.cat([data.x_test[:5], 3 * data.x_test[5:9]])))
    torch.testing.assert_close(few[:5], said[:5], rtol=0, atol=1e-6)
    mixed = DIGITS.predict(lambda x: x, replace(data, y_train=data.y_train.roll(1)))
    assert DIGITS.measure(mixed, data.y_test)[1] < 0.2
    # Standardised with the training features' own mean and deviation: units do not matter.
    scaled = DIGITS.predict(lambda x: 1000 * x + 7, data)
    torch.testing.assert_close(scaled, said, rtol=0, atol=1e-3)


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("where", ["x_train", "x_test"])
def test_features_that_are_not_finite_give_chance(value, where):
    data = features()
    broken = getattr(data, where).clone()
    broken[3, 2] = value
    said = DIGITS.predict(lambda x: x, replace(data, **{where: broken}))
    assert DIGITS.measure(said, data.y_test)[0] == pytest.approx(math.log(10), abs=1e-6)


def test_the_measure_is_the_probes_cross_entropy_and_accuracy():
    said = torch.tensor([[0.7, 0.2, 0.1], [0.1, 0.3, 0.6]], dtype=torch.float64).log()
    loss, accuracy = DIGITS.measure(said, torch.tensor([0, 1]))
    assert loss == pytest.approx(-(math.log(0.7) + math.log(0.3)) / 2, abs=1e-12) and accuracy == 0.5


@pytest.mark.parametrize("ended, diverged, expected", [(9.0, False, math.log(255)), (None, True, math.log(255)), (4.25, False, 4.25)])
def test_the_benchmark_counts_nothing_as_worse_than_views_that_all_look_alike(ended, diverged, expected):
    spec = experiments.RunSpec("cifar10-simclr", "adamw", "adamw")
    made = experiments.Record(spec, "cpu", {}, ended, None if diverged else 0.05, diverged, 1.0, 0.1, [], [], [], {})
    assert benchmark.value(made, "train") == pytest.approx(expected, abs=1e-12)
    # The test measure is the probe's error, at most that of guessing one of ten classes.
    assert benchmark.value(made, "test") == pytest.approx(0.9, abs=1e-12)


def test_a_short_training_brings_the_same_class_nearer_without_labels():
    data = DIGITS.load()

    def alike(model):
        """The share of the six nearest training images of each test image that are of its class."""
        with torch.no_grad():
            known, asked = (F.normalize(model.eval()(x), dim=1) for x in (data.x_train, data.x_test))
        return (data.y_train[(asked @ known.T).topk(6).indices] == data.y_test[:, None]).double().mean().item()

    short = replace(DIGITS, evaluations=1)
    trained = train(short, lambda p: contenders.make("adamw", p, lr=1e-2, weight_decay=0.0), steps=25).model
    # Of 1,782 neighbours; another processor's rounding moves the share by less than a hundredth.
    assert alike(trained) > alike(fresh()) + 0.02


# --- the recorded runs, without the chapter's and the library's sums ----------------------------------

RUNS = experiments.FOLDER / "cpu" / "cifar10-simclr"
CHAPTER = experiments.FOLDER.parent / "self_supervision.ipynb"
FREE = {
    "psdasgd-tensor": "PS-DA-SGD, tensor", "psdasgd-model": "PS-DA-SGD, model", "psdasgd-travel": "PS-DA-SGD, travel 1.5",
    "prodigy": "Prodigy", "dadapt-adam": "D-Adapt Adam", "schedule-free": "Schedule-Free AdamW", "adamw-default": "AdamW, default",
    "ps-sps": "PS-SPS", "ps-sps-floor": "PS-SPS, f* = the least loss",
}
RATES = ("0.0003", "0.001", "0.003", "0.01", "0.03")


@cache
def raw(name):
    """The three seeds of a method, as they lie there."""
    return [json.loads((RUNS / f"{name}-seed{seed}.json").read_text()) for seed in range(3)]


def ended(name):
    """Training loss (of a run that diverged, guessing) and accuracy of the probe, one a seed."""
    pairs = [(math.log(2 * BATCH - 1), 0.0) if r["diverged"] else (r["final_loss"], r["final_metric"]) for r in raw(name)]
    return np.array(pairs).T


def adamw(row, sign):
    """The rate that is best by the mean of the seeds, and that mean."""
    means = {rate: ended(f"adamw-lr{rate}")[row].mean() for rate in RATES}
    best_rate = min(RATES, key=lambda rate: sign * means[rate])
    return best_rate, means[best_rate]


def printed(cell):
    """What a cell of the chapter has printed."""
    [found] = [c for c in json.loads(CHAPTER.read_text())["cells"] if c["id"] == cell]
    return "".join("".join(o["text"]) for o in found["outputs"] if o.get("name") == "stdout")


def test_the_records_are_of_one_kind():
    every = [r for name in [*FREE, *(f"adamw-lr{rate}" for rate in RATES)] for r in raw(name)]
    assert len(every) == 42 and {r["preset"] for r in every} == {"cpu"}
    assert len({r["environment"]["data_sha256"] for r in every}) == len({r["parameters"] for r in every}) == 1
    floor = math.log(1 + 254 * math.exp(-128 / 127 / 0.5))
    assert {r["spec"]["settings"]["f_star"] for r in raw("ps-sps-floor")} == {round(floor, 6)}
    assert all(not r["spec"]["settings"] for name in ("ps-sps", "psdasgd-tensor", "prodigy", "adamw-default") for r in raw(name))
    # The losses kept are means over all steps between two looks: a weighted mean of them bounds the end from neither side, but
    # no mean may be below the floor.
    assert min(v for r in every for v in r["curve"]["train_loss"] if v is not None) > floor


def test_no_recorded_run_comes_near_the_floor():
    floor = math.log(1 + 254 * math.exp(-128 / 127 / 0.5))
    ends = [ended(name)[0].min() for name in [*FREE, *(f"adamw-lr{rate}" for rate in RATES)]]
    assert min(ends) > floor + 0.3
    # And every method has left guessing: the smallest AdamW rate too.
    assert max(ended(name)[0].max() for name in ("psdasgd-tensor", "ps-sps", "adamw-lr0.003")) < math.log(2 * BATCH - 1) - 0.3


def test_the_chapters_table_is_what_the_files_say():
    by_loss, by_probe = adamw(0, 1), adamw(1, -1)
    lines = printed("table").splitlines()
    shown = {**FREE, f"adamw-lr{by_loss[0]}": f"AdamW, {by_loss[0]}", f"adamw-lr{by_probe[0]}": f"AdamW, {by_probe[0]}"}
    means = []
    for name, text in shown.items():
        [line] = [line for line in lines if line[:30].rstrip() == text]
        (loss, accuracy), ms = ended(name), 1000 * np.median([r["step_seconds"] for r in raw(name)])
        numbers = line[30:].replace("(", " ").replace(")", " ").replace("–", " ").split()
        expected = [f"{v:.3f}" for v in (loss.mean(), loss.min(), loss.max())]
        expected += [f"{100 * v:.1f}" for v in (accuracy.mean(), accuracy.min(), accuracy.max())]
        assert numbers == [*expected, f"{ms:.0f}"], text
        means.append((lines.index(line), loss.mean()))
    assert [m for _, m in sorted(means)] == sorted(m for _, m in means)


def test_told_the_floor_the_distance_levels_off_and_the_loss_hardly_changes():
    for zero, floor in zip(raw("ps-sps"), raw("ps-sps-floor"), strict=True):
        # Digit for digit the same run up to the second of five looks, as long as the bound on growth decides.
        assert zero["curve"]["train_loss"][:2] == floor["curve"]["train_loss"][:2] and zero["curve"]["step"][1] == 80
        assert zero["distance"][1] == floor["distance"][1] and zero["curve"]["train_loss"][-1] != floor["curve"]["train_loss"][-1]
        assert floor["distance"][-1][0] < zero["distance"][-1][0] / 2
        assert all(b[0] > 2 * a[0] for a, b in itertools.pairwise(zero["distance"]))
        assert all(f < z for f, z in zip(floor["curve"]["train_loss"][2:], zero["curve"]["train_loss"][2:], strict=True))
    assert abs(ended("ps-sps")[0].mean() - ended("ps-sps-floor")[0].mean()) < 0.03


def test_who_beats_tuned_adamw_in_loss():
    means = {name: ended(name)[0].mean() for name in FREE}
    best_rate, best = adamw(0, 1)
    assert best_rate not in (RATES[0], RATES[-1])  # the grid is wide enough
    assert max(means["ps-sps"], means["ps-sps-floor"]) < best
    assert best < means["psdasgd-travel"] < best + 0.02
    assert means["psdasgd-travel"] < means["adamw-default"] < means["psdasgd-tensor"]


def test_the_chapters_verdict_is_what_the_files_say():
    best_loss, best_probe = adamw(0, 1)[1], adamw(1, -1)[1]
    error = math.sqrt(best_probe * (1 - best_probe) / 1000)  # of one accuracy on 1,000 test images
    text = printed("verdict")
    for start, row, limit in (("at most 0.02 nats", 0, 0.02), ("at most one standard error", 1, error)):
        near = {
            label for name, label in FREE.items()
            if (ended(name)[0].mean() - best_loss, best_probe - ended(name)[1].mean())[row] < limit
        }
        [line] = [line for line in text.splitlines() if line.startswith(start)]
        assert set(line.split(": ", 1)[1].split("; ")) == (near or {"none"}), start
    beaten = sum(ended(f"adamw-lr{rate}")[0].mean() > ended("psdasgd-tensor")[0].mean() for rate in RATES)
    assert f"beats {beaten} of 5 AdamW rates by the loss" in text
