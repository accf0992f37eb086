"""The known remedies: what each leaves invariant, to the last bit, and what it does not.

Factors are powers of two, so that a true invariance is `torch.equal` on the mapped-back parameters over a whole run.
"""

import copy
import math

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from pslib import tasks
from pslib.invariance import LossScale, TensorUnits, _Factors, certify, network_problem
from pslib.remedies import NDAdam, PathSGD, path_scales, weight_normalize
from pslib.training import train

DTYPES = [torch.float32, torch.float64]
STEPS = 50


def mlp(bias=True):
    return nn.Sequential(nn.Linear(64, 24, bias), nn.ReLU(), nn.Linear(24, 16, bias), nn.ReLU(), nn.Linear(16, 10, bias))


NETWORKS = {
    "mlp": ("digits-mlp", mlp),
    "mlp without biases": ("digits-mlp", lambda: mlp(bias=False)),
    "convolutional": ("mnist1d-cnn", lambda: tasks.Convolutional(10)),
}


def fresh(network, dtype=torch.float64):
    torch.manual_seed(0)
    return NETWORKS[network][1]().to(dtype)


def symmetry(model, how):
    """Factors of every parameter that leave a ReLU network's function alone: one for each layer or each unit."""
    generator = torch.Generator().manual_seed(3)
    layers = [(name, m) for name, m in model.named_modules() if isinstance(m, (nn.Linear, nn.Conv1d))]
    factors, before = {}, torch.ones(1)
    for name, layer in layers:
        out = len(layer.weight)
        exponents = torch.randint(-6, 7, (1 if how == "layers" else out,), generator=generator).expand(out)
        after = torch.ones(out) if layer is layers[-1][1] else torch.exp2(exponents.float())
        inputs = before.repeat_interleave(layer.weight.shape[1] // len(before))
        shape = [1] * (layer.weight.ndim - 2)
        factors[f"{name}.weight"] = after.view(-1, 1, *shape) / inputs.view(1, -1, *shape)
        factors[f"{name}.bias"] = after
        before = after
    return factors


def run(network, make, how=None, dtype=torch.float64):
    """Losses of a training run from the rescaled start, and the parameters at its end, scaled back."""
    model, data = fresh(network, dtype), tasks.get(NETWORKS[network][0]).load()
    factors = symmetry(model, how) if how else {}
    with torch.no_grad():
        for name, p in model.named_parameters():
            p.mul_(factors.get(name, torch.ones(())))
    opt, losses = make(model), []
    for k in range(STEPS):
        batch = slice(50 * k % 1000, 50 * k % 1000 + 50)
        opt.zero_grad()
        loss = F.cross_entropy(model(data.x_train[batch].to(dtype)), data.y_train[batch])
        loss.backward()
        opt.step()
        losses.append(loss.detach())
    end = {name: p.detach() / factors.get(name, torch.ones(())) for name, p in model.named_parameters()}
    return torch.stack(losses), end


def same(one, other):
    return torch.equal(one[0], other[0]) and all(torch.equal(one[1][name], other[1][name]) for name in one[1])


# --- ND-Adam ------------------------------------------------------------------------------------------

def nd_adam(**settings):
    return lambda params: NDAdam(params, **{"lr": 2.0**-4, "eps": 0.0, **settings})


class RowUnits(_Factors):
    """Every row of every matrix in its own unit; biases stay."""

    name = "units per row"

    def shape(self, p):
        return (p.shape[0], *[1] * (p.ndim - 1))

    def draw(self, p, generator):
        return super().draw(p, generator) if p.ndim > 1 else torch.ones_like(p)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("eps", [0.0, 1e-8])
def test_nd_adam_does_not_see_the_length_of_a_row(eps, dtype):
    assert certify(nd_adam(eps=eps), RowUnits(), network_problem(dtype)).verdict == "bit-exact"


def test_which_adam_does():
    assert certify(lambda p: torch.optim.Adam(p, 2.0**-9, eps=0.0), RowUnits(), network_problem()).verdict == "broken"


def test_nd_adam_on_a_scaled_loss():
    assert certify(nd_adam(), LossScale(), network_problem()).verdict == "bit-exact"


def test_a_bias_brings_the_units_back():
    assert certify(nd_adam(), TensorUnits(), network_problem(bias=False)).verdict == "bit-exact"
    assert certify(nd_adam(), TensorUnits(), network_problem()).verdict == "broken"


@pytest.mark.parametrize("network, how, exact", [
    ("mlp without biases", "layers", True),  # rows of one layer share their factor
    ("mlp without biases", "units", False),  # the next layer's columns do not
    ("mlp", "layers", False),  # the biases follow Adam
    ("convolutional", "layers", False),
])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_nd_adam_under_the_symmetries_of_a_relu_network(network, how, exact, dtype):
    def make(model):
        return nd_adam()(model.parameters())

    plain, rescaled = run(network, make, dtype=dtype), run(network, make, how, dtype)
    assert plain[0][-10:].mean() < 0.95 * plain[0][0]
    assert same(plain, rescaled) == exact
    assert torch.equal(plain[0][0], rescaled[0][0])
    if not exact:
        assert (plain[0] - rescaled[0]).abs().max() > 1e-2


def test_rows_keep_their_length_and_turn_by_the_learning_rate():
    torch.manual_seed(0)
    model, data = tasks.Convolutional(10).double(), tasks.get("mnist1d-cnn").load()
    rows = [p for p in model.parameters() if p.ndim > 1]
    length = [p.detach().flatten(1).norm(dim=1) for p in rows]
    opt, lr, turns = NDAdam(model.parameters(), lr=0.05), 0.05, []
    for _ in range(STEPS):
        before = [p.detach().clone() for p in rows]
        opt.zero_grad()
        F.cross_entropy(model(data.x_train[:100].double()), data.y_train[:100]).backward()
        opt.step()
        for p, b, rho in zip(rows, before, length, strict=True):
            assert torch.allclose(p.detach().flatten(1).norm(dim=1), rho, rtol=1e-14, atol=0)
            turns.append((((p.detach() - b).flatten(1).norm(dim=1)) / rho).max().item())
    first, most = max(turns[: len(rows)]), max(turns)
    assert 0.999 * lr < first <= lr  # at the first step m̂/√v̂ is a unit vector, and a chord is shorter than a tangent
    assert most < 1.5 * lr


def test_nd_adam_by_hand():
    w = nn.Parameter(torch.tensor([[3.0, 4.0]], dtype=torch.float64))  # length 5, direction (0.6, 0.8)
    opt = NDAdam([w], lr=0.1, betas=(0.9, 0.99), eps=0.0)
    w.grad = torch.tensor([[1.0, 0.0]], dtype=torch.float64)
    opt.step()
    # u = 5·((1, 0) − 0.6·(0.6, 0.8)) = (3.2, −2.4), of length 4: a step of 0.1 along (0.8, −0.6)
    angle = math.atan(0.1)
    turned = [0.6 * math.cos(angle) - 0.8 * math.sin(angle), 0.8 * math.cos(angle) + 0.6 * math.sin(angle)]
    assert torch.allclose(w.detach(), 5 * torch.tensor([turned], dtype=torch.float64), rtol=1e-15, atol=0)
    w.grad = torch.tensor([[0.0, 2.0]], dtype=torch.float64)
    a, b = turned
    opt.step()
    u = [10 * (0 - b * a), 10 * (1 - b * b)]
    m = [(0.9 * 0.1 * m1 + 0.1 * u2) / (1 - 0.9**2) for m1, u2 in zip((3.2, -2.4), u, strict=True)]
    v = (0.99 * 0.01 * 16 + 0.01 * (u[0] ** 2 + u[1] ** 2)) / (1 - 0.99**2)
    x = [a - 0.1 * m[0] / math.sqrt(v), b - 0.1 * m[1] / math.sqrt(v)]
    expected = torch.tensor([[5 * t / math.hypot(*x) for t in x]], dtype=torch.float64)
    assert torch.allclose(w.detach(), expected, rtol=1e-14, atol=0)


def test_without_momentum_the_step_is_tangent_to_the_sphere(monkeypatch):
    taken, normalized = [], NDAdam._normalized
    monkeypatch.setattr(NDAdam, "_normalized", lambda self, *a: taken.append(normalized(self, *a)) or taken[-1])
    w = nn.Parameter(torch.randn(6, 5, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64))
    opt = NDAdam([w], lr=0.3, betas=(0.0, 0.9), eps=0.0)
    for k in range(5):
        direction = F.normalize(w.detach().flatten(1))
        w.grad = torch.randn(w.shape, generator=torch.Generator().manual_seed(1 + k), dtype=torch.float64)
        opt.step()
        assert (taken[-1] * direction).sum(1).abs().max() < 1e-15
        assert ((taken[-1] * w.grad.flatten(1)).sum(1) > 0).all()  # downhill


def test_the_rest_follows_adam():
    generator = torch.Generator().manual_seed(0)
    start = [torch.randn(shape, generator=generator, dtype=torch.float64) for shape in [(), (7,), (4, 3)]]
    ours, theirs = ([nn.Parameter(x.clone()) for x in start] for _ in range(2))
    opt = NDAdam([{"params": ours[:2]}, {"params": ours[2:], "rows": False}], lr=0.5, betas=(0.8, 0.98), eps=1e-3, rest=0.1)
    adam = torch.optim.Adam(theirs, lr=0.05, betas=(0.8, 0.98), eps=1e-3)
    for _ in range(30):
        for x, y in zip(ours, theirs, strict=True):
            x.grad = torch.randn(x.shape, generator=generator, dtype=torch.float64)
            y.grad = x.grad.clone()
        opt.step()
        adam.step()
    for x, y, s in zip(ours, theirs, start, strict=True):
        assert torch.allclose(x, y, rtol=1e-12) and not torch.allclose(x, s)


@pytest.mark.parametrize("gradient", [(0.0, 0.0), (3.0, 4.0)])
def test_a_row_without_a_tangent_gradient_stays(gradient):
    w = nn.Parameter(torch.tensor([[0.75, 1.0], [1.0, 0.0]], dtype=torch.float64))
    opt = NDAdam([w], eps=0.0)
    w.grad = torch.tensor([[0.0, 0.0], [gradient[0], 0.0]], dtype=torch.float64)
    opt.step()
    assert torch.equal(w.detach(), torch.tensor([[0.75, 1.0], [1.0, 0.0]], dtype=torch.float64))


@pytest.mark.parametrize("settings, message", [
    (dict(lr=-1.0), "lr must be"), (dict(lr=math.nan), "lr must be"), (dict(eps=math.inf), "eps must be"),
    (dict(rest=-1), "rest must be"), (dict(betas=(0.9, 1.0)), r"betas\[1\] must be in \[0, 1\)"), (dict(betas=0.9), "pair"),
])
def test_nd_adam_refuses_bad_settings(settings, message):
    with pytest.raises(ValueError, match=message):
        NDAdam([nn.Parameter(torch.ones(2, 2))], **settings)


def test_nd_adam_refuses_a_row_of_zeros_and_sparse_gradients():
    w = nn.Parameter(torch.tensor([[1.0, 0.0], [0.0, 0.0]]))
    w.grad = torch.ones(2, 2)
    with pytest.raises(ValueError, match="rows=False"):
        NDAdam([w]).step()
    NDAdam([w], rows=False).step()
    embedding = nn.Embedding(3, 2, sparse=True)
    embedding(torch.tensor([1])).sum().backward()
    with pytest.raises(RuntimeError, match="sparse=False"):
        NDAdam(embedding.parameters()).step()


def test_nd_adam_continues_from_its_state():
    ends = []
    for restart in (False, True):
        torch.manual_seed(0)
        model = nn.Linear(5, 3).double()
        opt = NDAdam(model.named_parameters(), lr=0.1)
        for k in range(6):
            if restart and k == 3:
                state = copy.deepcopy(opt.state_dict())
                opt = NDAdam(model.named_parameters(), lr=0.7)
                opt.load_state_dict(state)
            opt.zero_grad()
            model(torch.randn(8, 5, dtype=torch.float64)).square().sum().backward()
            opt.step()
        ends.append([p.detach().clone() for p in model.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*ends, strict=True))


# --- Path-SGD -----------------------------------------------------------------------------------------

@pytest.mark.parametrize("momentum, dtype", [(0.0, torch.float64), (0.0, torch.float32), (0.9, torch.float32)], ids=str)
@pytest.mark.parametrize("network", NETWORKS)
def test_path_sgd_is_invariant_to_the_symmetries_of_a_relu_network(network, momentum, dtype):
    def make(model):
        return PathSGD(model.parameters(), 2.0**-5 * (1 - momentum), model=model, momentum=momentum)

    plain = run(network, make, dtype=dtype)
    assert torch.isfinite(plain[0]).all() and plain[0][-10:].mean() < 0.97 * plain[0][0]
    for how in ("layers", "units"):
        assert same(plain, run(network, make, how, dtype))


def test_gradient_descent_is_not():
    def make(model):
        return torch.optim.SGD(model.parameters(), 2.0**-4)

    plain, rescaled = run("mlp", make), run("mlp", make, "units")
    assert torch.equal(plain[0][0], rescaled[0][0]) and not same(plain, rescaled)
    assert not (plain[0] - rescaled[0]).abs().max() < 1e-2


def paths(model, shape):
    """All paths from an input or a constant to an output, each a list of (name, index), by walking back from the outputs."""
    modules = [(name, m) for name, m in model.named_children() if isinstance(m, (nn.Linear, nn.Conv1d))]

    def to(depth, unit):
        if depth < 0:
            return [[]]
        name, layer = modules[depth]
        if isinstance(layer, nn.Linear):
            below = modules[depth - 1][1] if depth else None
            if isinstance(below, nn.Conv1d):  # flattened: channel by channel
                length = layer.in_features // below.out_channels
                inputs = [((unit, j), divmod(j, length)) for j in range(layer.in_features)]
            else:
                inputs = [((unit, j), j) for j in range(layer.in_features)]
            channel = unit
        else:
            channel, place = unit
            inputs = []
            for i in range(layer.in_channels):
                for k in range(layer.kernel_size[0]):
                    at = place * layer.stride[0] + k - layer.padding[0]
                    if 0 <= at < shape[-1]:
                        inputs.append(((channel, i, k), (i, at)))
        found = [[*p, (f"{name}.weight", index)] for index, unit in inputs for p in to(depth - 1, unit)]
        return found + ([[(f"{name}.bias", (channel,))]] if layer.bias is not None else [])

    return [p for unit in range(modules[-1][1].out_features) for p in to(len(modules) - 1, unit)]


@pytest.mark.parametrize("model, shape, count", [
    (nn.Sequential(nn.Linear(3, 2), nn.ReLU(), nn.Linear(2, 3), nn.LeakyReLU(), nn.Linear(3, 2)), (3,), 56),
    (nn.Sequential(nn.Linear(3, 4, bias=False), nn.ReLU(), nn.Linear(4, 1)), (3,), 13),
    (nn.Sequential(nn.Conv1d(2, 3, 3, stride=2, padding=1), nn.ReLU(), nn.Flatten(), nn.Linear(9, 2)), (2, 6), 116),
], ids=["perceptron", "without biases", "convolution"])
def test_path_scales_are_the_sums_over_all_paths(model, shape, count):
    model = copy.deepcopy(model).double()
    weights = {name: p.detach() for name, p in model.named_parameters()}
    expected = {name: torch.zeros_like(p) for name, p in weights.items()}
    found = paths(model, shape)
    assert len(found) == count
    for path in found:
        for edge in path:
            others = [weights[name][index].item() ** 2 for name, index in path if (name, index) != edge]
            expected[edge[0]][edge[1]] += math.prod(others)
    kappa = path_scales(model, shape)
    assert set(kappa) == set(expected)
    for name in expected:
        assert torch.allclose(kappa[name], expected[name], rtol=1e-12, atol=0)


def test_path_sgd_by_hand():
    model = nn.Sequential(nn.Linear(1, 1, bias=False), nn.ReLU(), nn.Linear(1, 1, bias=False)).double()
    with torch.no_grad():
        model[0].weight.fill_(2.0)
        model[2].weight.fill_(-0.5)
    opt = PathSGD(model.parameters(), 0.25, model=model, momentum=0.5)
    loss = (model(torch.tensor([[3.0]], dtype=torch.float64)) + 4).sum()  # the output is −3, its derivatives −1.5 and 6
    loss.backward()
    opt.step()
    # κ = (0.25, 4): the steps are 0.25·(−1.5/0.25) and 0.25·6/4
    assert (model[0].weight.item(), model[2].weight.item()) == (3.5, -0.875)
    opt.zero_grad()
    model(torch.tensor([[2.0]], dtype=torch.float64)).sum().backward()  # derivatives −1.75 and 7, κ = (0.765625, 12.25)
    opt.step()
    assert model[0].weight.item() == pytest.approx(3.5 - 0.25 * (0.5 * -6 - 1.75 / 0.765625), rel=1e-15)
    assert model[2].weight.item() == pytest.approx(-0.875 - 0.25 * (0.5 * 1.5 + 7 / 12.25), rel=1e-15)


def test_a_weight_without_a_path_to_an_output_stays():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(2, 3), nn.ReLU(), nn.Linear(3, 1)).double()
    with torch.no_grad():
        model[2].weight[0, 1] = 0
    before = model[0].weight.detach().clone()
    kappa = path_scales(model, (2,))["0.weight"]
    assert (kappa[1] == 0).all() and (kappa[[0, 2]] > 0).all()
    opt = PathSGD(model.parameters(), 0.1, model=model)
    model(torch.randn(20, 2, dtype=torch.float64)).square().sum().backward()
    opt.step()
    assert torch.equal(model[0].weight[1], before[1]) and all(torch.isfinite(p).all() for p in model.parameters())
    assert not torch.equal(model[0].weight, before)


class Between(nn.Module):
    """Two linear layers with a function between them that is not a module."""

    def __init__(self, function):
        super().__init__()
        self.first, self.second, self.function = nn.Linear(4, 4), nn.Linear(4, 2), function

    def forward(self, x):
        return self.second(self.function(self.first(x)))


class Gain(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer, self.gain = nn.Linear(4, 2), nn.Parameter(torch.ones(2))

    def forward(self, x):
        return self.gain * self.layer(x)


def tied():
    model = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4))
    model[2].weight = model[0].weight
    return model


@pytest.mark.parametrize("model, shape, message", [
    (nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 1)), (4,), r"Tanh \(1\)"),
    (nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4, affine=False)), (4,), "BatchNorm1d"),
    (tasks.CharacterTransformer(5), (8,), "Embedding"),
    (Gain(), (4,), r"Gain \(the model\)"),
    (tied(), (4,), "untie"),
    (Between(torch.tanh), (4,), "homogeneous"),
    (Between(lambda h: F.layer_norm(h, (4,))), (4,), "homogeneous"),
    (Between(lambda h: h.softmax(-1)), (4,), "homogeneous"),
    (Between(lambda h: h * h.relu()), (4,), "homogeneous"),
    (Between(F.gelu), (4,), "homogeneous"),
], ids=["tanh", "batch norm", "transformer", "gain", "tied", "F.tanh", "F.layer_norm", "softmax", "gate", "F.gelu"])
def test_other_networks_are_refused(model, shape, message):
    before = [p.detach().clone() for p in model.parameters()]
    with pytest.raises(ValueError, match=message):
        path_scales(model, shape)
    with pytest.raises(ValueError, match=message):
        opt = PathSGD(model.parameters(), 0.1, model=model)
        model(torch.ones(3, *shape)).sum().backward()
        opt.step()
    assert all(torch.equal(p, b) for p, b in zip(model.parameters(), before, strict=True))


def test_functions_that_scale_are_accepted():
    for function in (F.relu, lambda h: F.leaky_relu(h, 0.1), lambda h: h + F.relu(h), torch.abs):
        assert set(path_scales(Between(function), (4,))) == {"first.weight", "first.bias", "second.weight", "second.bias"}


def test_path_sgd_refuses_misuse():
    model, other = nn.Linear(2, 1), nn.Linear(2, 1)
    with pytest.raises(ValueError, match="not the model's"):
        PathSGD(other.parameters(), 0.1, model=model)
    with pytest.raises(ValueError, match="lr must be"):
        PathSGD(model.parameters(), -0.1, model=model)
    with pytest.raises(ValueError, match="momentum must be"):
        PathSGD(model.parameters(), 0.1, model=model, momentum=1.0)
    with pytest.raises(RuntimeError, match="before the first step"):
        PathSGD(model.parameters(), 0.1, model=model).step()


# --- weight normalization -----------------------------------------------------------------------------

@pytest.mark.parametrize("task", ["digits-mlp", "mnist1d-cnn", "chars-transformer"])
def test_weight_normalization_keeps_the_function(task):
    task = tasks.get(task)
    data = task.load()
    torch.manual_seed(0)
    model = task.build(data)
    plain, x = copy.deepcopy(model), data.x_test[:20]
    assert weight_normalize(model) is None
    assert torch.allclose(model(x), plain(x), rtol=1e-4, atol=1e-5)
    old, new = dict(plain.named_parameters()), dict(model.named_parameters())
    layers = [name for name, m in plain.named_modules() if isinstance(m, (nn.Linear, nn.Conv1d))]
    for name in layers:
        w = old.pop(f"{name}.weight")
        lengths, directions = (new.pop(f"{name}.parametrizations.weight.original{i}") for i in (0, 1))
        assert torch.equal(directions, w)
        assert torch.allclose(lengths.flatten(), w.flatten(1).norm(dim=1))
    assert set(old) == set(new) and all(torch.equal(old[n], new[n]) for n in old)
    twin = copy.deepcopy(model)
    assert torch.equal(twin(x), model(x)) and list(dict(twin.named_parameters())) == list(dict(model.named_parameters()))
    with torch.no_grad():
        next(twin.parameters()).mul_(2)
    assert not torch.equal(twin(x), model(x))


def test_weight_normalization_splits_the_gradient():
    torch.manual_seed(0)
    layer = nn.Linear(4, 3).double()
    x, w = torch.randn(5, 4, dtype=torch.float64), layer.weight.detach().clone()
    layer(x).square().sum().backward()
    g = layer.weight.grad.clone()
    weight_normalize(layer)
    layer(x).square().sum().backward()
    lengths, directions = layer.parametrizations.weight.original0, layer.parametrizations.weight.original1
    along = (g * w).sum(1, keepdim=True) / w.norm(dim=1, keepdim=True)
    assert torch.allclose(lengths.grad, along, rtol=1e-12)
    assert torch.allclose(directions.grad, g - along * w / w.norm(dim=1, keepdim=True), rtol=1e-9, atol=1e-12)


def test_weight_normalization_is_refused_where_it_cannot_be():
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    with torch.no_grad():
        model[1].weight[1] = 0
    with pytest.raises(ValueError, match=r"1\.weight is zero"):
        weight_normalize(model)
    assert list(dict(model.named_parameters())) == ["0.weight", "0.bias", "1.weight", "1.bias"]
    weight_normalize(model[0])
    with pytest.raises(ValueError, match="already"):
        weight_normalize(model[0])


# --- all of them train --------------------------------------------------------------------------------

@pytest.mark.parametrize("task, accuracy", [("digits-mlp", 0.8), ("mnist1d-cnn", 0.3)])
@pytest.mark.parametrize("remedy", ["nd-adam", "path-sgd", "weight normalization"])
def test_they_train(remedy, task, accuracy):
    models = []
    make = {
        "nd-adam": lambda p: NDAdam(p, lr=0.05),
        "path-sgd": lambda p: PathSGD(p, 0.03, model=models[0]),
        "weight normalization": lambda p: torch.optim.Adam([q for _, q in p], 1e-2),
    }[remedy]
    prepare = weight_normalize if remedy == "weight normalization" else models.append
    history = train(task, make, steps=150, evaluations=1, prepare=prepare)
    assert history.final_metric > accuracy and not history.diverged
