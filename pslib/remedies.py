"""Known remedies against an ill-conditioned parameterization, written from their equations::

    NDAdam            each weight vector moves on its own sphere (Zhang, Ma, Li & Wu, arXiv 1709.04546)
    PathSGD           each weight's step is divided by the size of the paths through it (Neyshabur et al., arXiv 1506.02617)
    weight_normalize  direction and length of each weight vector become parameters (Salimans & Kingma, arXiv 1602.07868)

Plain reference implementations, one readable loop over the parameters.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.utils import parametrizations

from .estimators import over_scaling
from .optimizers import require

__all__ = ["NDAdam", "PathSGD", "path_scales", "weight_normalize"]

LINEAR = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)
PASSES_NONNEGATIVE = (
    nn.ReLU, nn.LeakyReLU, nn.Identity, nn.Flatten, nn.Unflatten,
    nn.AvgPool1d, nn.AvgPool2d, nn.AvgPool3d, nn.AdaptiveAvgPool1d, nn.AdaptiveAvgPool2d, nn.AdaptiveAvgPool3d,
)


def _require_number(name: str, value, below: float = math.inf) -> None:
    value = float(value) if isinstance(value, Tensor) else value
    number = isinstance(value, (int, float)) and not isinstance(value, bool)
    wanted = "a finite number ≥ 0" if below == math.inf else f"in [0, {below:g})"
    require(number and 0 <= value < below, f"{name} must be {wanted}, not {value!r}.")


class NDAdam(torch.optim.Optimizer):
    """Normalized direction-preserving Adam: every weight vector turns on a sphere, and keeps its length.

    One step for a weight vector w = ρŵ (a row: all input weights of one unit) with gradient g, ρ = ‖w‖ at the first step::

        u ← ρg,   u ← u − ⟨u, ŵ⟩ŵ                      the gradient with respect to ŵ, on the tangent space
        m ← β₁m + (1 − β₁)u,   v ← β₂v + (1 − β₂)‖u‖²   a vector and a single number
        ŵ ← ŵ − lr·m̂/(√v̂ + ε),   w ← ρŵ/‖ŵ‖

    The authors give every row the length 1, which batch normalization allows.  Here a row keeps the length ρ that it
    starts with (our choice: the function at the start stays what it was); for ρ = 1 the step is the paper's.  So a
    network without gains cannot change the lengths of its rows at all; `rows=False` in a parameter group frees it.

    Tensors of fewer than two dimensions (biases, gains) and the groups with `rows=False` follow Adam, with the learning
    rate `rest`·lr, in their own units.  An embedding's rows are the vectors of its tokens.

    Args:
        params: tensors, groups, or named parameters.
        lr: how far a row turns in a step, about, in radians: no units (the authors' 0.05).
        betas: decay rates (β₁ of the momentum, β₂ of the second moment).
        eps: added to √v̂; in [f] for rows (so it leaves their length out), in [f]/[x] for the rest.
        rest: the rest's learning rate as a fraction of lr (the authors' is 0.001, a fiftieth).
        rows: whether tensors of two or more dimensions are taken by rows (their first dimension).

    Raises:
        ValueError: for a setting out of range, or (at the first step) for a row that starts at zero.
        RuntimeError: for sparse gradients.
    """

    def __init__(
        self, params, lr: float = 0.05, *, betas=(0.9, 0.999), eps: float = 1e-8, rest: float = 0.02, rows: bool = True
    ):
        super().__init__(params, dict(lr=lr, betas=betas, eps=eps, rest=rest, rows=rows))

    def add_param_group(self, param_group: dict) -> None:
        """Add a group, its settings checked.

        Raises:
            ValueError: if a setting is out of range.
        """
        group = {**self.defaults, **param_group}
        betas = group["betas"]
        require(isinstance(betas, (tuple, list)) and len(betas) == 2, f"betas must be a pair of numbers, not {betas!r}.")
        for i, beta in enumerate(betas):
            _require_number(f"betas[{i}]", beta, below=1)
        for name in ("lr", "eps", "rest"):
            _require_number(name, group[name])
        super().add_param_group(param_group)

    @torch.no_grad()
    def step(self, closure=None):
        """Take one step; `closure` re-evaluates the loss and returns it."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is not None:
                    if p.grad.is_sparse:
                        raise RuntimeError("NDAdam does not support sparse gradients; make the embedding with sparse=False.")
                    if group["rows"] and p.ndim >= 2:
                        self._turn(p, self.state[p], group)
                    else:
                        self._adam(p, self.state[p], group)
        return loss

    def _turn(self, p: Tensor, state: dict, group: dict) -> None:
        """One step of all rows of a tensor, each on its sphere."""
        w = p.flatten(1)
        if not state:
            radius = w.norm(dim=1, keepdim=True)
            require(
                bool((radius > 0).all()),
                f"NDAdam: a row of a {tuple(p.shape)} tensor starts at zero and has no direction; put the tensor in a group "
                "with rows=False.",
            )
            state["radius"] = radius
        rho = state["radius"]
        direction = w / rho
        assert p.grad is not None
        u = rho * p.grad.flatten(1)
        u = u - (u * direction).sum(1, keepdim=True) * direction
        direction = direction - group["lr"] * self._normalized(u, u.square().sum(1, keepdim=True), state, group)
        p.copy_((rho * direction / direction.norm(dim=1, keepdim=True)).view_as(p))

    def _adam(self, p: Tensor, state: dict, group: dict) -> None:
        assert p.grad is not None
        p.sub_(group["rest"] * group["lr"] * self._normalized(p.grad, p.grad.square(), state, group))

    def _normalized(self, gradient: Tensor, square: Tensor, state: dict, group: dict) -> Tensor:
        """m̂/(√v̂ + ε), both averages moved on by a gradient and its square."""
        if "step" not in state:
            state.update(step=0, exp_avg=torch.zeros_like(gradient), exp_avg_sq=torch.zeros_like(square))
        state["step"] += 1
        b1, b2 = group["betas"]
        m = state["exp_avg"].mul_(b1).add_(gradient, alpha=1 - b1)
        v = state["exp_avg_sq"].mul_(b2).add_(square, alpha=1 - b2)
        root = (v / (1 - b2 ** state["step"])).sqrt() + group["eps"]
        return over_scaling(m / (1 - b1 ** state["step"]), root)


def _require_feedforward(model: nn.Module) -> None:
    for name, module in model.named_modules():
        container = list(module.children()) and not [*module.parameters(recurse=False), *module.buffers(recurse=False)]
        require(
            container or isinstance(module, LINEAR + PASSES_NONNEGATIVE),
            f"path scales are defined for feedforward ReLU networks; {type(module).__name__} ({name or 'the model'}) is not "
            "one of the layers Linear, Conv, ReLU, LeakyReLU, AvgPool, Flatten: choose another optimizer for this model.",
        )
    names = [n for n, _ in model.named_parameters(remove_duplicate=False)]
    require(
        len(names) == len(list(model.parameters())),
        "path scales need each weight in one place; this model shares a parameter between layers: untie it.",
    )


@torch.no_grad()
def _require_homogeneous(model: nn.Module, input_shape: tuple[int, ...]) -> None:
    """Whatever the forward method does between the layers: inputs and biases × 2¹⁰ must give outputs × 2¹⁰, to the last bit."""
    params = {name: p.detach() for name, p in model.named_parameters()}
    scaled = {name: p * 2.0**10 if name.split(".")[-1] == "bias" else p for name, p in params.items()}
    first = next(iter(params.values()))
    x = torch.randn(2, *input_shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64).to(first)
    once, more = functional_call(model, params, (x,)), functional_call(model, scaled, (x * 2.0**10,))
    require(
        torch.equal(once * 2.0**10, more),
        "path scales are defined for networks that are positively homogeneous (ReLU between linear layers); this model's "
        "output does not scale with its inputs and biases: choose another optimizer for it.",
    )


def _path_scales(model: nn.Module, input_shape: tuple[int, ...]) -> dict[str, Tensor]:
    squared = {name: p.detach().square().requires_grad_() for name, p in model.named_parameters()}
    first = next(iter(squared.values()))
    with torch.enable_grad():
        total = functional_call(model, squared, (torch.ones(1, *input_shape, dtype=first.dtype, device=first.device),)).sum()
        return dict(zip(squared, torch.autograd.grad(total, list(squared.values())), strict=True))


def path_scales(model: nn.Module, input_shape: tuple[int, ...]) -> dict[str, Tensor]:
    """κ of every weight: the sum, over all paths from an input to an output through it, of the product of the others squared.

    It is the derivative with respect to w² of the network run on squared weights with ones for inputs, outputs summed:
    non-negative numbers pass a ReLU unchanged.  A bias is a weight on a constant input 1.  A weight that a convolution
    uses in several places gets the sum over them (Neyshabur et al., arXiv 1605.07154).  Average pooling counts as it is.

    Args:
        model: a feedforward network of linear and convolutional layers with ReLU or leaky ReLU, each layer used once.
        input_shape: the shape of one input, without the batch.

    Returns:
        The parameters' names, each with a tensor of its shape; κ_e·w_e² has the units of the output squared.

    Raises:
        ValueError: for a network with other layers or functions in it.
    """
    _require_feedforward(model)
    _require_homogeneous(model, input_shape)
    return _path_scales(model, input_shape)


class PathSGD(torch.optim.Optimizer):
    """Path-normalized gradient descent: w ← w − lr·m with m ← momentum·m + g/κ, and κ from `path_scales` at every step.

    Multiplying a unit's input weights by c > 0 and dividing its output weights by c divides κ by c² and g by c where w is
    multiplied by c: the step follows the weight, so training does not depend on how the function is parameterized.  The
    paper has no momentum; taken of g/κ it keeps this property.  A weight with κ = 0 (no path to an output) stays.

    Args:
        params: tensors, groups, or named parameters, all of them the model's.
        lr: the learning rate, in [output]²/[f], the same for every layer.
        model: the network; the shape of its inputs is taken from the next batch that it sees.
        momentum: of the heavy ball, 0 for the paper's method.

    Raises:
        ValueError: for a setting out of range, a parameter that is not the model's, or a network that is not a feedforward
            ReLU network (functions between the layers are checked at the first step).
        RuntimeError: for a step before the model has seen an input.
    """

    def __init__(self, params, lr: float, *, model: nn.Module, momentum: float = 0.0):
        _require_number("lr", lr)
        _require_number("momentum", momentum, below=1)
        _require_feedforward(model)
        super().__init__(params, dict(lr=lr, momentum=momentum))
        self.model, self.input_shape, self.checked = model, None, False
        self.names = {p: name for name, p in model.named_parameters()}
        require(
            all(p in self.names for group in self.param_groups for p in group["params"]),
            "PathSGD was given a parameter that is not the model's; pass model.named_parameters() of the same model.",
        )

        def look(module, inputs):
            self.input_shape = tuple(inputs[0].shape[1:])
            handle.remove()

        handle = model.register_forward_pre_hook(look)

    @torch.no_grad()
    def step(self, closure=None):
        """Take one step; `closure` re-evaluates the loss and returns it."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        if self.input_shape is None:
            raise RuntimeError("PathSGD has not seen an input yet; run the model on a batch before the first step.")
        if not self.checked:
            _require_homogeneous(self.model, self.input_shape)
            self.checked = True
        kappa = _path_scales(self.model, self.input_shape)
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is not None:
                    step = over_scaling(p.grad, kappa[self.names[p]])
                    if group["momentum"]:
                        ball = self.state[p].setdefault("momentum", torch.zeros_like(step))
                        step = ball.mul_(group["momentum"]).add_(step)
                    p.sub_(group["lr"] * step)
        return loss


def weight_normalize(model: nn.Module) -> None:
    """Split every linear and convolutional weight, in place, into lengths and directions: w = g·v/‖v‖ for each row.

    The parameter `weight` becomes `parametrizations.weight.original0` (g, one number a row) and `….original1` (v, which starts
    as w); the function stays the same, to rounding.  Embeddings, biases and normalization layers are left as they are.  Change
    weights (`rescale`, `init_scale`) before, and make the optimizer after.

    Raises:
        ValueError: for a row that is zero, which has no direction, or a model that is weight-normalized already.
    """
    layers = [(name, module) for name, module in model.named_modules() if isinstance(module, LINEAR)]
    for name, module in layers:
        require(
            not hasattr(module, "parametrizations"),
            f"weight_normalize: the layer {name or 'itself'} has a parametrization already; normalize a model once.",
        )
        require(
            bool((module.weight.flatten(1).norm(dim=1) > 0).all()),
            f"weight_normalize: a row of {name or 'the layer'}.weight is zero and has no direction; initialise it first.",
        )
    for _, module in layers:
        parametrizations.weight_norm(module)
