"""Rescaled networks: all generators are found, the function stays, wrong ones are refused, and trainings are identical."""

import copy
from functools import lru_cache

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from pslib import PSDASGD, tasks, twins
from pslib.tasks import CharacterTransformer, Convolutional, mlp
from pslib.twins import rescale, symmetries, symmetry, twin

DTYPES = [torch.float32, torch.float64]
LARGE, SMALL = 2.0**10, 2.0**-10
WIDTH, STEPS = 16, 100


class TiedTransformer(CharacterTransformer):
    """The token embedding is the output layer, too."""

    def __init__(self, classes):
        super().__init__(classes, WIDTH, 2, 1)
        self.head.weight = self.token.weight


def perceptron(activation, norm=None):
    layers = [nn.Linear(64, WIDTH), *([norm(WIDTH)] if norm else []), activation, nn.Linear(WIDTH, WIDTH), activation]
    return nn.Sequential(*layers, nn.Linear(WIDTH, 10))


def convolutions(activation, norm=nn.Identity):
    return nn.Sequential(
        nn.Unflatten(1, (1, 40)), nn.Conv1d(1, 8, 5, stride=2), norm(8), activation, nn.Conv1d(8, 8, 5, stride=2), activation,
        nn.MaxPool1d(2), nn.Flatten(), nn.Dropout(0.1), nn.Linear(24, 10),
    )


NETWORKS = {
    "mlp": ("digits-mlp", lambda d: mlp(64, 10, WIDTH)),
    "mlp-leaky": ("digits-mlp", lambda d: perceptron(nn.LeakyReLU(0.1))),
    "mlp-layernorm": ("digits-mlp", lambda d: perceptron(nn.ReLU(), nn.LayerNorm)),
    "mlp-rmsnorm": ("digits-mlp", lambda d: perceptron(nn.ReLU(), nn.RMSNorm)),
    "mlp-batchnorm": ("digits-mlp", lambda d: perceptron(nn.ReLU(), nn.BatchNorm1d)),
    "cnn": ("mnist1d-cnn", lambda d: Convolutional(10, channels=8)),
    "cnn-leaky": ("mnist1d-cnn", lambda d: convolutions(nn.LeakyReLU(0.1))),
    "cnn-batchnorm": ("mnist1d-cnn", lambda d: convolutions(nn.ReLU(), nn.BatchNorm1d)),
    "transformer": ("chars-transformer", lambda d: CharacterTransformer(d.classes, WIDTH, 2, 1)),
    "transformer-tied": ("chars-transformer", lambda d: TiedTransformer(d.classes)),
}

TWO_RELUS = [
    "ReLU at '0': 0.weight × c, 0.bias × c, 2.weight ÷ c",
    "ReLU at '2': 2.weight × c, 2.bias × c, 4.weight ÷ c",
]
STREAM = (
    "before a normalisation at 'token': token.weight × c, position.weight × c, blocks.0.out.weight × c, blocks.0.out.bias × c, "
    "blocks.0.down.weight × c, blocks.0.down.bias × c, "
)
STREAM_EPS = "eps of blocks.0.norm1 × c², eps of blocks.0.norm2 × c², eps of norm × c²"
BLOCK = [
    "gain of a normalisation at 'blocks.0.norm1': blocks.0.norm1.weight × c, blocks.0.norm1.bias × c, "
    "blocks.0.query.weight ÷ c, blocks.0.key.weight ÷ c, blocks.0.value.weight ÷ c",
    "query and key at 'blocks.0.query': blocks.0.query.weight × c, blocks.0.query.bias × c, "
    "blocks.0.key.weight ÷ c, blocks.0.key.bias ÷ c",
    "value and output at 'blocks.0.value': blocks.0.value.weight × c, blocks.0.value.bias × c, blocks.0.out.weight ÷ c",
    "gain of a normalisation at 'blocks.0.norm2': blocks.0.norm2.weight × c, blocks.0.norm2.bias × c, blocks.0.up.weight ÷ c",
    "ReLU at 'blocks.0.up': blocks.0.up.weight × c, blocks.0.up.bias × c, blocks.0.down.weight ÷ c",
]
EXPECTED = {
    "mlp": TWO_RELUS,
    "mlp-leaky": ["leaky " + line for line in TWO_RELUS],
    "mlp-layernorm": [
        "before a normalisation at '0': 0.weight × c, 0.bias × c, eps of 1 × c²",
        "gain of a normalisation at '1': 1.weight × c, 1.bias × c, 3.weight ÷ c",
        "ReLU at '3': 3.weight × c, 3.bias × c, 5.weight ÷ c",
    ],
    "mlp-rmsnorm": [
        "before a normalisation at '0': 0.weight × c, 0.bias × c, eps of 1 × c²",
        "gain of a normalisation at '1': 1.weight × c, 3.weight ÷ c",
        "ReLU at '3': 3.weight × c, 3.bias × c, 5.weight ÷ c",
    ],
    "mlp-batchnorm": [
        "before a normalisation at '0': 0.weight × c, 0.bias × c, eps of 1 × c², 1.running_mean × c, 1.running_var × c²",
        "gain of a normalisation at '1': 1.weight × c, 1.bias × c, 3.weight ÷ c",
        "ReLU at '3': 3.weight × c, 3.bias × c, 5.weight ÷ c",
    ],
    "cnn": [
        "ReLU at 'convs.0': convs.0.weight × c, convs.0.bias × c, convs.1.weight ÷ c",
        "ReLU at 'convs.1': convs.1.weight × c, convs.1.bias × c, head.weight ÷ c",
    ],
    "cnn-leaky": [
        "leaky ReLU at '1': 1.weight × c, 1.bias × c, 4.weight ÷ c",
        "leaky ReLU at '4': 4.weight × c, 4.bias × c, 9.weight ÷ c",
    ],
    "cnn-batchnorm": [
        "before a normalisation at '1': 1.weight × c, 1.bias × c, eps of 2 × c², 2.running_mean × c, 2.running_var × c²",
        "gain of a normalisation at '2': 2.weight × c, 2.bias × c, 4.weight ÷ c",
        "ReLU at '4': 4.weight × c, 4.bias × c, 9.weight ÷ c",
    ],
    "transformer": [
        STREAM + STREAM_EPS, *BLOCK, "gain of a normalisation at 'norm': norm.weight × c, norm.bias × c, head.weight ÷ c",
    ],
    "transformer-tied": [STREAM + "norm.weight ÷ c, norm.bias ÷ c, " + STREAM_EPS, *BLOCK],
}
CASES = [(name, i) for name, lines in EXPECTED.items() for i in range(len(lines))]
LABELS = [f"{name}-{EXPECTED[name][i].split(':')[0].split(' at ')[1]}" for name, i in CASES]
NEURON_WISE = [(name, i) for name, i in CASES if "before a normalisation" not in EXPECTED[name][i]]

TRAINED = [(name, i) for name, i in CASES if name != "transformer-tied" or i == 0]


@lru_cache
def network(name, dtype):
    task, build = NETWORKS[name]
    torch.manual_seed(0)
    return build(tasks.get(task).load()).to(dtype)


@lru_cache
def generators(name):
    return symmetries(network(name, torch.float64))


@lru_cache
def batches(name, dtype):
    size = 4 if name.startswith("transformer") else 20
    data, generator = tasks.get(NETWORKS[name][0]).load(), torch.Generator().manual_seed(0)
    chosen = [torch.randint(len(data.x_train), (size,), generator=generator) for _ in range(STEPS)]
    return [(x.to(dtype) if x.is_floating_point() else x, data.y_train[i]) for i in chosen for x in (data.x_train[i],)]


def inputs(name, dtype):
    return batches(name, dtype)[0][0]


def size_of(model, found):
    """How many neurons the module has, read off its first parameter with a factor a row."""
    tensors = dict(model.named_parameters())
    return next(len(tensors[p]) for p, (rows, _) in found.neurons.items() if rows)


# --- the group ----------------------------------------------------------------------------------------

@pytest.mark.parametrize("name", NETWORKS)
def test_every_generator_is_found_and_nothing_else(name):
    assert [str(s) for s in symmetries(network(name, torch.float64))] == EXPECTED[name]


@pytest.mark.parametrize("depth", [1, 2, 3])
def test_the_dimension_of_the_group_grows_with_the_depth(depth):
    model = CharacterTransformer(20, WIDTH, 2, depth)
    found = symmetries(model)
    assert len(found) == 5 * depth + 2
    assert [s.kind for s in found] == [
        "before-norm", *depth * ["norm-gain", "query-key", "value-output", "norm-gain", "relu"], "norm-gain",
    ]
    assert len(symmetries(mlp(64, 10))) == 2 and len(symmetries(Convolutional(10, depth=3))) == 3


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name, i", CASES, ids=LABELS)
def test_powers_of_two_leave_every_bit_of_the_output(name, i, dtype):
    model = network(name, dtype)
    before = copy.deepcopy(model.state_dict())
    for c in (LARGE, SMALL):
        found = twin(model, generators(name)[i], c, inputs(name, dtype))
        assert found.exact and found.difference == 0
        assert all(torch.equal(p, found.restored()[n]) for n, p in model.named_parameters())
        assert set(found.factors) == set(found.symmetries[0].powers)
        assert all(not torch.equal(p, q) for (n, p), q in zip(model.named_parameters(), found.model.parameters(), strict=True)
                   if n in found.factors and p.abs().sum() > 0)
    assert all(torch.equal(before[n], t) for n, t in model.state_dict().items())


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name, i", TRAINED)
def test_other_factors_leave_the_output_up_to_rounding(name, i, dtype):
    model = network(name, dtype)
    found = twin(model, generators(name)[i], 3, inputs(name, dtype))
    assert not found.exact and 0 < found.difference < 64 * torch.finfo(dtype).eps
    for n, p in found.restored().items():
        torch.testing.assert_close(p, dict(model.named_parameters())[n])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name, i", NEURON_WISE)
def test_one_factor_a_neuron(name, i, dtype):
    model = network(name, dtype)
    found = generators(name)[i]
    generator = torch.Generator().manual_seed(1)
    factors = torch.exp2(torch.randint(-10, 11, (size_of(model, found),), generator=generator))
    copied = twin(model, found, factors, inputs(name, dtype))
    assert copied.exact
    assert all(torch.equal(p, copied.restored()[n]) for n, p in model.named_parameters())
    assert not twin(model, found, factors * 3, inputs(name, dtype)).exact


def test_a_flattened_channel_is_a_run_of_columns():
    model = network("cnn", torch.float64)
    factors = rescale(copy.deepcopy(model), "convs.1", torch.tensor([2.0, 4, 8, 16, 32, 64, 128, 256]))
    assert factors["convs.1.weight"].shape == (8, 1, 1) and factors["convs.1.bias"].shape == (8,)
    assert factors["head.weight"].shape == (1, 80)
    assert torch.equal(1 / factors["head.weight"][0, :20], torch.tensor([2.0] * 10 + [4.0] * 10, dtype=torch.float64))


def test_symmetries_compose():
    model, x = network("transformer", torch.float64), inputs("transformer", torch.float64)
    found = symmetries(model)
    every = twin(model, found, [2.0 ** (i - 3) for i in range(len(found))], x)
    assert every.exact and every.symmetries == tuple(found)
    names = ["blocks.0.norm1", "blocks.0.query"]
    both = twin(model, names, 4, x)
    assert both.exact and both.factors["blocks.0.query.weight"] == 1 and both.factors["blocks.0.key.weight"] == 1 / 16
    with pytest.raises(ValueError, match="1 numbers c for 2 symmetries"):
        rescale(copy.deepcopy(model), names, [4])


def test_a_module_further_on_names_the_same_symmetry():
    model = network("transformer", torch.float64)
    assert symmetry(model, "blocks.0.out") == symmetry(model, "token")
    key = symmetry(model, "blocks.0.key")
    assert key.at == "blocks.0.key" and key.powers == {n: -p for n, p in symmetry(model, "blocks.0.query").powers.items()}
    assert key.neurons["blocks.0.key.weight"] == (1, 0) and key.neurons["blocks.0.query.weight"] == (-1, 0)


class ByHand(nn.Module):
    """Attention and squared ReLU written with plain operations."""

    def __init__(self, width=8):
        super().__init__()
        self.token, self.position = nn.Embedding(11, width), nn.Embedding(16, width)
        self.query, self.key, self.value, self.head = (nn.Linear(width, width) for _ in range(4))
        self.up, self.down = nn.Parameter(torch.randn(width, width)), nn.Parameter(torch.randn(width, 11))
        self.register_buffer("mask", torch.ones(16, 16).tril() == 0)

    def forward(self, x):
        h = self.token(x) + self.position(torch.arange(x.shape[1]))
        scores = self.query(h) @ self.key(h).transpose(-1, -2) / h.shape[-1] ** 0.5
        scores = scores.masked_fill(self.mask[: x.shape[1], : x.shape[1]], float("-inf")).softmax(-1)
        return F.relu((h + self.head(scores @ self.value(h))) @ self.up).square() @ self.down


def test_plain_operations_are_understood():
    torch.manual_seed(0)
    model = ByHand().double()
    found = symmetries(model)
    assert [(s.kind, s.at) for s in found] == [
        ("linear", "token"), ("query-key", "query"), ("value-output", "value"), ("relu", "up"),
    ]
    assert found[3].powers == {"up": 1, "down": -2}
    assert found[0].powers == {
        "up": -1, "token.weight": 1, "position.weight": 1, "query.weight": -1, "key.weight": -1, "value.weight": -1,
        "head.weight": 1, "head.bias": 1,
    }
    assert all(twin(model, s, c, torch.randint(11, (4, 16))).exact for s in found for c in (LARGE, SMALL))


def test_embedding_and_linear_layer():
    model = nn.Sequential(nn.Embedding(7, 5), nn.Flatten(), nn.Linear(15, 3))
    assert [str(s) for s in symmetries(model)] == ["linear layers at '0': 0.weight × c, 2.weight ÷ c"]
    assert symmetries(nn.Linear(3, 2)) == []
    assert symmetries(nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2)))[0].kind == "linear"


# --- refusals -----------------------------------------------------------------------------------------

@pytest.mark.parametrize("activation", [nn.Tanh(), nn.GELU(), nn.Sigmoid(), nn.Softmax(-1), nn.ELU(), nn.SiLU()])
def test_what_is_not_homogeneous_fixes_units(activation):
    model = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4), activation, nn.Linear(4, 4))
    name = type(activation).__name__
    with pytest.raises(ValueError, match=rf"'2' cannot change its unit: it goes into {name} \('3'\), which .*one of '0'\."):
        symmetry(model, "2")
    with pytest.raises(ValueError, match=rf"'3' cannot change its unit: it comes out of {name} \('3'\), which"):
        twin(model, "3", 2, torch.randn(3, 4))
    assert [s.at for s in symmetries(model)] == ["0"]


class OneMatrix(nn.Module):
    """Query and key are one layer."""

    def __init__(self):
        super().__init__()
        self.both = nn.Linear(4, 4)

    def forward(self, x):
        return F.scaled_dot_product_attention(self.both(x), self.both(x), x)


class BetweenTwo(nn.Module):
    """The branch's unit is fixed twice: by the tanh that it is added to and by the sigmoid that it goes into."""

    def __init__(self):
        super().__init__()
        self.branch, self.head = nn.Linear(4, 4), nn.Linear(4, 2)

    def forward(self, x):
        x = x.tanh()
        return self.head(torch.sigmoid(x + self.branch(x)))


class Branching(nn.Module):
    def forward(self, x):
        return x if x.sum() > 0 else -x


@pytest.mark.parametrize("model, at, message", [
    (mlp(4, 2), "4", "'4' cannot change its unit: it reaches the network's output, whose unit is fixed; choose one of '0'"),
    (mlp(4, 2), "5", "there is no layer '5' in this network; choose one of '0', '2'."),
    (nn.Sequential(nn.Linear(3, 4), nn.Softmax(-1)), "0", "it goes into Softmax ('1'), which is not homogeneous; no output"),
    (nn.Sequential(nn.ReLU(), nn.Linear(3, 4)), "0", "it is tied to the network's input"),
    (nn.Sequential(nn.Linear(3, 4), nn.GRU(4, 2)), "0", "it goes into GRU ('1'), whose equations are not in the table"),
    (nn.Sequential(nn.Linear(3, 4), nn.LayerNorm(4, elementwise_affine=False), nn.Linear(4, 2)), "1", "has no gain"),
    (OneMatrix(), "both", "in ways that need opposite units"),
    (BetweenTwo(), "branch", "it goes into sigmoid, which is not homogeneous"),
    (Branching(), "0", "the network cannot be traced"),
], ids=lambda value: value if isinstance(value, str) and len(value) < 6 else "")
def test_refusals_say_why(model, at, message):
    with pytest.raises(ValueError) as error:
        symmetry(model, at)
    assert message in str(error.value)


@pytest.mark.parametrize("c", [0, -2.0, float("nan"), float("inf"), True, "2", torch.tensor([1.0, -1.0]), torch.ones(2, 2)])
def test_only_positive_finite_factors(c):
    with pytest.raises(ValueError, match="c must be a finite number > 0"):
        rescale(mlp(4, 2), "0", c)


@pytest.mark.parametrize("name, at, message", [
    ("mlp-layernorm", "0", r"LayerNorm \('1'\) averages over neurons"),
    ("mlp-batchnorm", "0", r"BatchNorm1d \('1'\) has one eps for all channels"),
    ("transformer", "token", r"LayerNorm \('blocks.0.norm1'\) averages over neurons"),
])
def test_no_factor_a_neuron_before_a_normalisation(name, at, message):
    with pytest.raises(ValueError, match=message):
        rescale(network(name, torch.float64), at, torch.ones(WIDTH))


def test_a_refused_rescaling_changes_nothing():
    model = mlp(4, 2, 8)
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(ValueError, match="c has 4 factors, but 0.weight has shape"):
        rescale(model, "0", torch.full((4,), 2.0))
    with pytest.raises(ValueError, match="c takes .* out of the range of torch.float32"):
        rescale(model, ["0", "2"], [2.0, 1e300])
    assert all(torch.equal(before[n], t) for n, t in model.state_dict().items())


def test_the_data_have_the_last_word(monkeypatch):
    model, x = network("mlp-layernorm", torch.float64), inputs("mlp-layernorm", torch.float64)
    found = symmetry(model, "0")
    with pytest.raises(ValueError, match="the function has changed: its outputs differ by"):
        twin(model, twins.replace(found, eps={}), 2, x)  # a forgotten eps
    model = network("mlp-batchnorm", torch.float64)
    with pytest.raises(ValueError, match="the function has changed"):
        twin(model, twins.replace(symmetry(model, "0"), buffers={}), 2, x)  # seen in evaluation mode alone
    monkeypatch.setitem(twins.RULES, "tanh", (twins.same, None))
    with pytest.raises(ValueError, match="the function has changed"):
        twin(nn.Sequential(nn.Linear(64, 4), nn.Tanh(), nn.Linear(4, 2)).double(), "0", 2, x)
    with pytest.raises(ValueError, match="the function has changed: its outputs differ by nan"):
        twin(network("mlp", torch.float32), ["0", "2"], 2.0**120, inputs("mlp", torch.float32) * 2.0**20)


# --- training -----------------------------------------------------------------------------------------

def train(model, name, dtype, optimizer):
    """The losses of a run with cosine schedule; the model is trained in place."""
    torch.manual_seed(0)  # dropout
    opt, losses = optimizer(model.named_parameters()), []
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(opt, STEPS)
    for x, y in batches(name, dtype):
        opt.zero_grad()
        loss = F.cross_entropy(model(x).flatten(0, -2), y.flatten())
        loss.backward()
        opt.step()
        schedule.step()
        losses.append(loss.detach())
    return torch.stack(losses)


@lru_cache
def original(name, dtype, optimizer):
    model = copy.deepcopy(network(name, dtype))
    return model, train(model, name, dtype, optimizer)


def adam(params):
    return torch.optim.Adam(params, lr=1e-3)


def identical(name, i, c, dtype, optimizer):
    """Whether the trainings of a network and its twin agree: every loss, every parameter, every output."""
    start, (model, losses) = network(name, dtype), original(name, dtype, optimizer)
    other = twin(start, generators(name)[i], c, inputs(name, dtype))
    same = torch.equal(train(other.model, name, dtype, optimizer), losses)
    restored = other.restored()
    moved = all(not torch.equal(p, q) for p, q in zip(start.parameters(), model.parameters(), strict=True))
    assert moved and losses[-10:].mean() < losses[:10].mean()
    same = same and all(torch.equal(p, restored[n]) for n, p in model.named_parameters())
    with torch.no_grad():
        x = inputs(name, dtype)
        return same and torch.equal(other.model.eval()(x), copy.deepcopy(model).eval()(x))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name, i", TRAINED)
def test_twins_train_alike(name, i, dtype):
    c = LARGE if (i + (dtype == torch.float32)) % 2 else SMALL  # the other one in the other dtype
    assert identical(name, i, c, dtype, PSDASGD)


@pytest.mark.parametrize("name, i", [("mlp", 0), ("cnn-batchnorm", 0), ("transformer", 3)])
def test_adams_twins_do_not(name, i):
    assert not identical(name, i, LARGE, torch.float64, adam)
