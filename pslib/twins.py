"""Dimensional analysis of a network: all the rescalings, tensor by tensor, that leave its function unchanged.

Every activation and every parameter of the traced network gets a unit c^u with an unknown integer exponent u.  An
operation is then a linear equation between exponents: a linear layer says u_out = u_weight + u_in and u_bias = u_out, a
ReLU u_out = u_in, a tanh u_in = u_out = 0; the network's inputs and outputs have u = 0.  The solutions of these equations,
found exactly over the rationals, are the group of rescalings; `RULES` below is the list of equations.  A normalisation
forgets the unit of its input, all but for its eps, which has that unit squared and is rescaled with it.

`twin` makes a second network with the same function and checks that on data: the data has the last word.

Source: for ReLU layers the rescaling is that of Neyshabur, Salakhutdinov & Srebro (2015, arXiv 1506.02617); units as
exponents in the null space of a matrix of equations are Buckingham's (1914, Phys. Rev. 4, 345).
"""

from __future__ import annotations

import copy
import math
import re
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, replace
from fractions import Fraction
from operator import attrgetter
from typing import Any

import torch
from sympy import QQ
from sympy.polys.matrices import DomainMatrix
from torch import Tensor, fx, nn

__all__ = ["Symmetry", "Twin", "rescale", "symmetries", "symmetry", "twin"]

TITLES = {
    "before-norm": "before a normalisation", "norm-gain": "gain of a normalisation", "value-output": "value and output",
    "query-key": "query and key", "leaky-relu": "leaky ReLU", "relu": "ReLU", "power": "power", "max-pool": "max pooling",
    "product": "product", "linear": "linear layers",
}

# The output of a node, or a parameter by its name.
Variable = fx.Node | str


def _factor_text(power: int) -> str:
    digits = "".join("⁰¹²³⁴⁵⁶⁷⁸⁹"[int(d)] for d in str(abs(power))) if abs(power) != 1 else ""
    return f"{'×' if power > 0 else '÷'} c{digits}"


@dataclass(frozen=True)
class Symmetry:
    """One rescaling that leaves the network's function unchanged, for every c > 0.

    Attributes:
        kind: what it goes through, a key of `TITLES`: "relu", "query-key", "norm-gain", "before-norm", …
        at: the module whose output changes its unit (the first one, where there are several).
        powers: by parameter name, the exponent of c that it is multiplied by; those with 0 are left out.
        eps: by name of a normalisation, the exponent of c that its eps is multiplied by.
        buffers: by name of a running statistic, the exponent of c that it is multiplied by.
        neurons: for one factor c_i a neuron, by parameter name the exponents (rows, columns): the entry [i, j] is
            multiplied by c_i^rows·c_j^columns.  None where there is no such form.
        reason: why not, where `neurons` is None.
    """

    kind: str
    at: str
    powers: dict[str, int]
    eps: dict[str, int]
    buffers: dict[str, int]
    neurons: dict[str, tuple[int, int]] | None
    reason: str = ""

    def __str__(self) -> str:
        terms = [*self.powers.items(), *((f"eps of {name}", power) for name, power in self.eps.items()), *self.buffers.items()]
        return f"{TITLES[self.kind]} at '{self.at}': " + ", ".join(f"{name} {_factor_text(power)}" for name, power in terms)

    def inverse(self, at: str) -> Symmetry:
        """The same rescaling with 1/c for c, seen from the module `at`."""
        powers, eps, buffers = ({k: -v for k, v in d.items()} for d in (self.powers, self.eps, self.buffers))
        neurons = None if self.neurons is None else {k: (-r, -c) for k, (r, c) in self.neurons.items()}
        return replace(self, at=at, powers=powers, eps=eps, buffers=buffers, neurons=neurons)


# --- the equations ------------------------------------------------------------------------------------

class _Tracer(fx.Tracer):
    """Also follows buffers, so that a mask can be sliced by a traced shape."""

    proxy_buffer_attributes = True


class _Equations:
    """The equations of a network.  A variable is the exponent of an `fx.Node`'s output, or of a parameter (its name).

    Attributes:
        relations: equations Σ coefficient·variable = 0, as {variable: coefficient}.
        pins: (variable, node, reason): the variable is 0 because of what happens at that node.
        marks: what a node's output goes through or comes from, the candidates for `Symmetry.kind`.
        roles: how a parameter would carry factors along (rows, columns), each {variable: coefficient}.
        norms: (name, module, input variable) of every normalisation.
    """

    def __init__(self, model: nn.Module):
        try:
            self.nodes = list(_Tracer().trace(model).nodes)
        except Exception as error:
            raise ValueError(f"the network cannot be traced ({error}); write it without branches on values.") from error
        self.model, self.names = model, {id(p): name for name, p in model.named_parameters()}
        self.relations: list[dict[Variable, Any]] = []
        self.pins: list[tuple[Variable, fx.Node, str]] = []
        self.norms: list[tuple[Any, Any, Variable]] = []
        self.numbers: set[fx.Node] = set()
        self.marks: dict[Variable | None, set[str]] = defaultdict(set)
        self.roles: dict[Variable | None, list[tuple]] = defaultdict(list)
        for node in self.nodes:
            self.add(node)
        used = {v for row in self.relations for v in row} | {v for v, *_ in self.pins}
        # Elimination leaves the last columns free.  With the earliest node last, each solution starts at one activation
        # and goes no further than it must.
        self.columns = [v for v in [*self.names.values(), *reversed(self.nodes)] if v in used]

    def add(self, node: fx.Node) -> None:
        """Write down the equations of one node."""
        if node.op == "placeholder":
            self.pin(node, node, "it is tied to the network's input, whose unit is fixed")
        elif node.op == "output":
            for x in self.operands(node):
                self.pin(x, node, "it reaches the network's output, whose unit is fixed")
        elif node.op == "get_attr":
            if self.variable(node) is node:
                self.pin(node, node, f"it is tied to the buffer '{node.target}', whose unit is fixed")
        elif node.op != "call_module" and (self.name(node) in SHAPES or not self.operands(node)):
            self.numbers.add(node)
        else:
            rule, mark = RULES.get(self.name(node), (obstacle, None))
            if mark:
                self.marks[node].add(mark)
            rule(self, node)

    def module(self, node: fx.Node) -> nn.Module | None:
        """The module that a node calls, if it calls one."""
        return self.model.get_submodule(str(node.target)) if node.op == "call_module" else None

    def name(self, node: fx.Node) -> str:
        """What the node does, as in `TABLE`: nn.Conv1d and F.conv1d are "conv", nn.ReLU and F.relu "relu", x.shape ".shape"."""
        name = self.title(node)
        return f".{node.args[1]}" if name == "getattr" else re.sub(r"_|\dd$", "", name.lower())

    def title(self, node: fx.Node) -> str:
        """The name of the node's function, method or module."""
        if node.op == "call_module":
            return type(self.module(node)).__name__
        return node.target if isinstance(node.target, str) else getattr(node.target, "__name__", str(node.target))

    def where(self, node: fx.Node) -> str:
        """The node, for an error message."""
        return f"{self.title(node)} ('{node.target}')" if node.op == "call_module" else self.title(node)

    def variable(self, value: object) -> Variable | None:
        """The variable of an argument or a parameter; None for what has no unit: numbers and shapes."""
        if isinstance(value, nn.Parameter):
            return self.names[id(value)]
        if not isinstance(value, fx.Node) or value in self.numbers:
            return None
        return self.names.get(id(attrgetter(str(value.target))(self.model)), value) if value.op == "get_attr" else value

    def operands(self, node: fx.Node) -> list[fx.Node | str]:
        """The variables of all arguments, in order, repeated where the argument is."""
        found: list[fx.Node] = []
        fx.node.map_arg((node.args, node.kwargs), found.append)
        return [v for v in map(self.variable, found) if v is not None]

    def argument(self, node: fx.Node, position: int, name: str) -> Any:
        """A function's argument, or the module's attribute of that name; None if it is not given."""
        if position and node.op == "call_module":
            return getattr(self.module(node), name, None)
        return node.args[position] if len(node.args) > position else node.kwargs.get(name)

    def arguments(self, node: fx.Node, *names: str) -> list[fx.Node | str | None]:
        """The variables of the arguments of these names, which stand in this order."""
        return [self.variable(self.argument(node, i, name)) for i, name in enumerate(names)]

    def relate(self, *terms: tuple[int | Fraction, fx.Node | str | None]) -> None:
        """Σ coefficient·variable = 0."""
        row: dict[Variable, Fraction] = defaultdict(Fraction)
        for coefficient, variable in terms:
            if variable is not None:
                row[variable] += coefficient
        self.relations.append(row)

    def pin(self, variable: fx.Node | str | None, node: fx.Node, reason: str) -> None:
        """variable = 0."""
        if variable is not None:
            self.pins.append((variable, node, reason))

    def solutions(self, pins: list[int] | None = None) -> list[dict]:
        """A basis of the exponents, as {variable: integer ≠ 0}; the earliest activation last and positive.

        `pins`: positions of the pins that hold (all of them by default).
        """
        equations = self.relations + [{self.pins[i][0]: 1} for i in (range(len(self.pins)) if pins is None else pins)]
        index = {v: i for i, v in enumerate(self.columns)}
        rows = [{index[v]: QQ(*Fraction(k).as_integer_ratio()) for v, k in row.items() if k} for row in equations]
        entries = {i: row for i, row in enumerate(rows) if row}
        basis = []
        for vector in DomainMatrix(entries, (len(rows), len(index)), QQ).nullspace().to_list() if index else []:
            found = {v: Fraction(int(k.numerator), int(k.denominator)) for v, k in zip(self.columns, vector, strict=True) if k}
            last = found[list(found)[-1]]
            whole = math.lcm(*(k.denominator for k in found.values()))
            common = Fraction(whole, math.gcd(*(int(k * whole) for k in found.values()))) * (1 if last > 0 else -1)
            basis.append({v: int(k * common) for v, k in found.items()})
        return basis[::-1]


def same(e: _Equations, node: fx.Node) -> None:
    """out = in; a slope that the module learns has no unit."""
    x, *_ = e.operands(node)
    e.relate((1, node), (-1, x))
    if module := e.module(node):
        for p in module.parameters():
            e.pin(e.variable(p), node, f"it belongs to {e.where(node)}, which has no unit")


def equal(e: _Equations, node: fx.Node) -> None:
    """All operands and the result have one unit."""
    for x in e.operands(node):
        e.relate((1, node), (-1, x))
    if e.name(node) in ("add", "iadd", "sub", "isub") and any(e.variable(a) is None and a != 0 for a in node.args):
        e.pin(node, node, f"it meets a number in {e.where(node)}, and numbers have no unit")


def linear(e: _Equations, node: fx.Node) -> None:
    """out = weight + in = bias."""
    x, weight, bias = e.arguments(node, "input", "weight", "bias")
    e.relate((1, node), (-1, weight), (-1, x))
    role = ((1, node), (-1, x))
    e.roles[weight].append(role[::-1] if e.name(node) == "convtranspose" else role)
    if bias is not None:
        e.relate((1, node), (-1, bias))
        e.roles[bias].append(((1, node), None))


def embedding(e: _Equations, node: fx.Node) -> None:
    """out = weight; its input is a number of a row, without unit."""
    if e.argument(node, 3, "max_norm") is not None:
        return obstacle(e, node)
    _, weight = e.arguments(node, "input", "weight")
    e.relate((1, node), (-1, weight))
    e.roles[weight].append((None, (1, node)))


def norm(e: _Equations, node: fx.Node) -> None:
    """out = gain = bias, or 0 without them; in is free, because eps (and the running statistics) follow it."""
    if node.op != "call_module" and e.name(node) not in ("layernorm", "rmsnorm"):
        return obstacle(e, node)
    x, _, *affine = e.arguments(node, "input", "normalized_shape", "weight", "bias")
    for p in affine:
        if p is not None:
            e.relate((1, node), (-1, p))
            e.roles[p].append(((1, node), None))
    if affine[0] is None:
        e.pin(node, node, f"it comes out of {e.where(node)}, which has no gain")
    if x is None:
        return
    e.marks[x].add("before-norm")
    if node.op != "call_module":
        return e.pin(x, node, f"it goes into {e.where(node)}, whose eps is a constant of the code")
    for name, _, earlier in e.norms:
        if name == node.target:
            e.relate((1, x), (-1, earlier))
    e.norms.append((node.target, e.module(node), x))


def attention(e: _Equations, node: fx.Node) -> None:
    """query + key = 0, out = value; a mask is added to their product and has no unit."""
    query, key, value, mask = e.arguments(node, "query", "key", "value", "attn_mask")
    e.relate((1, query), (1, key))
    e.relate((1, node), (-1, value))
    e.pin(mask, node, f"it goes into {e.where(node)} as a mask")
    for x in (query, key):
        e.marks[x].add("query-key")


def product(e: _Equations, node: fx.Node) -> None:
    """out = sum of the operands' exponents."""
    factors = e.operands(node)
    e.relate((1, node), *((-1, x) for x in factors))
    activations = [x for x in factors if isinstance(x, fx.Node)]
    if len(activations) > 1:
        entrywise = e.name(node) in ("mul", "imul")
        e.marks[node].add("product" if entrywise else "value-output")
        for x in activations:
            e.marks[x].add("product" if entrywise else "query-key")


def quotient(e: _Equations, node: fx.Node) -> None:
    """out = numerator − denominator."""
    above, below = e.arguments(node, "input", "other")
    e.relate((1, node), (-1, above), (1, below))


def power(e: _Equations, node: fx.Node) -> None:
    """out = exponent × in."""
    exponent = {"square": 2, "sqrt": 0.5, "rsqrt": -0.5, "reciprocal": -1}.get(e.name(node)) or e.argument(node, 1, "exponent")
    if not isinstance(exponent, (int, float)) or e.variable(node.args[0]) is None:
        return obstacle(e, node)
    e.relate((1, node), (-Fraction(exponent), e.variable(node.args[0])))


def obstacle(e: _Equations, node: fx.Node) -> None:
    """in = out = 0: for what is not homogeneous, and for every operation that is not in the table."""
    known = e.name(node) in INHOMOGENEOUS
    why = f"{e.where(node)}, {'which is not homogeneous' if known else 'whose equations are not in the table'}"
    for x in e.operands(node):
        e.pin(x, node, f"it goes into {why}")
    e.pin(node, node, f"it comes out of {why}")
    if module := e.module(node):
        for p in module.parameters():
            e.pin(e.variable(p), node, f"it belongs to {why}")


TABLE = [  # rule, mark of the result, the operations (see `_Equations.name`)
    (same, "relu", "relu"),
    (same, "leaky-relu", "leakyrelu prelu"),
    (same, "max-pool", "maxpool adaptivemaxpool amax amin abs"),
    (same, None, "identity dropout avgpool adaptiveavgpool mean sum cumsum neg flatten unflatten view reshape permute "
        "transpose swapaxes movedim t .T .mT contiguous squeeze unsqueeze expand expandas repeat repeatinterleave chunk "
        "split unbind getitem select narrow roll flip clone detach tril triu"),
    (equal, None, "add iadd sub isub cat concat stack"),
    (equal, "max-pool", "max min maximum minimum"),
    (linear, None, "linear conv convtranspose"),
    (embedding, None, "embedding"),
    (norm, "norm-gain", "layernorm rmsnorm groupnorm batchnorm instancenorm"),
    (attention, "value-output", "scaleddotproductattention"),
    (product, None, "mul imul matmul bmm mm einsum"),
    (quotient, None, "div truediv itruediv"),
    (power, "power", "pow square sqrt rsqrt reciprocal"),
]
RULES = {name: (rule, mark) for rule, mark, names in TABLE for name in names.split()}
SHAPES = {".shape", ".dtype", ".device", ".ndim", "size", "dim", "numel"}
INHOMOGENEOUS = {
    "tanh", "sigmoid", "gelu", "silu", "elu", "selu", "celu", "mish", "softplus", "softmax", "logsoftmax", "logsigmoid", "hardtanh",
    "relu6", "hardswish", "exp", "log",
}


# --- the solutions ------------------------------------------------------------------------------------

def _neurons(e: _Equations, solution: dict) -> tuple[dict[str, tuple[int, int]] | None, str]:
    """The exponents along (rows, columns) of every parameter for one factor a neuron; or None and why not."""
    for name, module, x in e.norms:
        if x in solution:
            title = type(module).__name__
            shared = "has one eps for all channels" if title.startswith(("Batch", "Instance")) else "averages over neurons"
            return None, f"{title} ('{name}') {shared}, so that they must share one unit"
    neurons: dict[str, tuple[int, int]] = {}
    for name in e.names.values():
        forms: set[Any] = {tuple(side[0] * solution.get(side[1], 0) if side else 0 for side in role) for role in e.roles[name]}
        if len(forms) > 1 or (not forms and name in solution):
            return None, f"{name} is used {'in two ways' if forms else 'outside a layer'}, so that its neurons are not known"
        if forms and any(form := forms.pop()):
            neurons[name] = form
    return neurons, ""


def _describe(e: _Equations, solution: dict) -> Symmetry:
    marks = {mark for v in solution for mark in e.marks.get(v, ())}
    powers = {name: solution[name] for name in e.names.values() if name in solution}
    called = (n.target for n in e.nodes if n.op == "call_module" and n in solution)
    eps: dict[str, int] = {}
    buffers: dict[str, int] = {}
    for name, module, x in e.norms:
        if x in solution:
            eps |= {name: 2 * solution[x]} if module.eps != 0 else {}
            for buffer, power in (("running_mean", 1), ("running_var", 2)):
                if getattr(module, buffer, None) is not None:
                    buffers[f"{name}.{buffer}"] = power * solution[x]
    neurons, reason = _neurons(e, solution)
    kind = next((kind for kind in TITLES if kind in marks), "linear")
    at = next(called, None) or next(name for name, power in powers.items() if power > 0)
    return Symmetry(kind, at, powers, eps, buffers, neurons, reason)


def _solve(model: nn.Module) -> tuple[_Equations, list[tuple[Symmetry, dict]]]:
    e = _Equations(model)
    return e, [(_describe(e, solution), solution) for solution in e.solutions() if any(isinstance(v, str) for v in solution)]


def symmetries(model: nn.Module) -> list[Symmetry]:
    """Generators of the group of rescalings, each as local as can be; their number is the group's dimension.

    Args:
        model: a network that `torch.fx` can trace.  Its loss may then be any function of its outputs.

    Raises:
        ValueError: if the network cannot be traced.

    An operation that is not in the table of rules is taken to fix the units of what goes in and comes out.

    >>> print(*symmetries(nn.Sequential(nn.Linear(2, 3), nn.ReLU(), nn.Linear(3, 1))))
    ReLU at '0': 0.weight × c, 0.bias × c, 2.weight ÷ c
    """
    return [s for s, _ in _solve(model)[1]]


def symmetry(model: nn.Module, at: str) -> Symmetry:
    """The rescaling of `model` that multiplies the output of the module `at` by c (or by a power of c).

    Raises:
        ValueError: if there is none (with the reason), more than one, or no such module; if the network cannot be traced.
    """
    e, solved = _solve(model)
    for found, _ in solved:
        if found.at == at:
            return found
    choice = "choose one of " + ", ".join(f"'{s.at}'" for s, _ in solved) if solved else "no output in this network can"
    node = next((n for n in e.nodes if n.op == "call_module" and n.target == at), None)
    if node is None:
        raise ValueError(f"there is no layer '{at}' in this network; {choice}.")
    moving = [(s, solution[node]) for s, solution in solved if node in solution]
    if len(moving) > 1:
        several = ", ".join(f"'{s.at}'" for s, _ in moving)
        raise ValueError(f"the output of '{at}' can change its unit in several ways; choose one of {several}.")
    if moving:
        return moving[0][0] if moving[0][1] > 0 else moving[0][0].inverse(at)
    raise ValueError(f"the output of '{at}' cannot change its unit: {_reason(e, node)}; {choice}.")


def _reason(e: _Equations, node: fx.Node) -> str:
    """The first pin that fixes the node's exponent, going forward from the node, then back."""
    place = {n: i for i, n in enumerate(e.nodes)}
    here = place[node]
    order = sorted(range(len(e.pins)), key=lambda i: (place[e.pins[i][1]] < here, abs(place[e.pins[i][1]] - here)))
    for count in range(len(order) + 1):
        if not any(node in solution for solution in e.solutions(order[:count])):
            return e.pins[order[count - 1]][2] if count else "one layer's output is used in ways that need opposite units"
    raise AssertionError(f"{node} is free")


# --- the rescaling ------------------------------------------------------------------------------------

def _checked(c: object) -> Tensor:
    """c as a float64 tensor with no or one dimension."""
    ok = isinstance(c, (int, float, Tensor)) and not isinstance(c, bool) and not (isinstance(c, Tensor) and c.ndim > 1)
    values = torch.as_tensor(c, dtype=torch.float64, device="cpu").detach() if ok else torch.tensor(math.nan)
    if not bool((values.isfinite() & (values > 0)).all()):
        raise ValueError(f"c must be a finite number > 0 or a 1-D tensor of such numbers, not {c!r}.")
    return values


def _power(c: Tensor, exponent: int) -> Tensor:
    """c^exponent by multiplications, which are exact where c is a power of two (a library's pow need not be)."""
    product = torch.ones_like(c)
    for _ in range(abs(exponent)):
        product = product * c
    return product if exponent > 0 else 1 / product


def _factor(c: Tensor, name: str, tensor: Tensor, rows: int, columns: int) -> Tensor:
    """c_i^rows·c_j^columns, to be broadcast with the tensor; a consumer's columns come in runs of one neuron (flatten)."""
    factor = torch.ones([1] * tensor.ndim, dtype=c.dtype)
    for dim, exponent in ((0, rows), (1, columns)):
        if exponent:
            runs, rest = divmod(tensor.shape[dim] if dim < tensor.ndim else 0, len(c))
            if rest or not runs or (dim == 0 and runs > 1):
                raise ValueError(f"c has {len(c)} factors, but {name} has shape {tuple(tensor.shape)}; give one factor a neuron.")
            shape = [-1 if d == dim else 1 for d in range(tensor.ndim)]
            factor = factor * _power(c, exponent).repeat_interleave(runs).reshape(shape)
    return factor


At = str | Symmetry | Sequence[str | Symmetry]
Factor = float | Tensor


def _chosen(model: nn.Module, at: At) -> tuple[Symmetry, ...]:
    several: Any = at if isinstance(at, (list, tuple)) else [at]
    return tuple(s if isinstance(s, Symmetry) else symmetry(model, s) for s in several)


@torch.no_grad()
def rescale(model: nn.Module, at: At, c: Factor | Sequence[Factor]) -> dict[str, Tensor]:
    """Rescale the network in place without changing its function (see `twin`, which checks that it did not).

    Args:
        model: a network that `torch.fx` can trace.
        at: a module's name, a `Symmetry` of this network, or a list of them, to be composed.
        c: a number > 0, without units; or a 1-D tensor with one factor for every neuron (channel) of that module; or a
            list with one such c for each of the list `at`.

    Returns:
        The factors that the parameters were multiplied by, under their names, so that original = rescaled / factor.  Each
        is a 0-d tensor, or one that broadcasts, in the parameter's dtype.

    Raises:
        ValueError: if there is no such symmetry, c is not positive and finite or has the wrong length, there is no
            neuron-wise form, or a factor leaves the range of the dtype.  The network is then unchanged.
    """
    chosen = _chosen(model, at)
    numbers = list(c) if isinstance(c, (list, tuple)) else [c] * len(chosen)
    if len(numbers) != len(chosen):
        raise ValueError(f"there are {len(numbers)} numbers c for {len(chosen)} symmetries; give one, or one each.")
    tensors: dict[str, Tensor] = dict(model.named_parameters())
    parameters, dtype = set(tensors), next(iter(tensors.values())).dtype
    tensors |= dict(model.named_buffers())
    factors: dict[str, Any] = {}
    eps: dict[str, float] = {}
    for s, number in zip(chosen, map(_checked, numbers), strict=True):
        if number.ndim and s.neurons is None:
            raise ValueError(f"the neurons at '{s.at}' cannot each have a unit: {s.reason}; give one number c.")
        if number.ndim and s.neurons is not None:
            new = {name: _factor(number, name, tensors[name], *form) for name, form in s.neurons.items()}
        else:
            new = {name: _power(number, power) for name, power in (s.powers | s.buffers).items()}
            for name, power in s.eps.items():
                eps[name] = eps.get(name, 1.0) * _power(number, power).item()
        for name, factor in new.items():
            factors[name] = factors.get(name, 1.0) * factor
    factors = {name: factor.to(tensors[name]) for name, factor in factors.items()}
    for name, factor in factors.items():
        if not bool((factor.isfinite() & (factor > 0)).all()):
            raise ValueError(f"c takes {name} out of the range of {factor.dtype}; choose a c nearer to 1.")
    for name, factor in factors.items():
        tensors[name].mul_(factor)
    for name, times in eps.items():
        module: Any = model.get_submodule(name)
        module.eps = (torch.finfo(dtype).eps if module.eps is None else module.eps) * times
    return {name: factor for name, factor in factors.items() if name in parameters}


# --- the twin -----------------------------------------------------------------------------------------

@dataclass(frozen=True)
class Twin:
    """A rescaled copy of a network.

    Attributes:
        model: the copy.
        factors: by name of a changed parameter, what it was multiplied by (see `rescale`).
        symmetries: the rescalings, in order.
        exact: whether the outputs agree bit for bit.
        difference: the largest relative difference of the outputs, max|f − f̃|/max|f|.
    """

    model: nn.Module
    factors: dict[str, Tensor]
    symmetries: tuple[Symmetry, ...]
    exact: bool
    difference: float

    def restored(self) -> dict[str, Tensor]:
        """The copy's current parameters in the original's units."""
        return {name: p.detach() / self.factors.get(name, 1) for name, p in self.model.named_parameters()}


@torch.no_grad()
def _outputs(model: nn.Module, inputs: tuple) -> list[Tensor]:
    """The outputs in evaluation, training and again evaluation mode (the running statistics have moved); on a copy."""
    model = copy.deepcopy(model)
    outputs = []
    with torch.random.fork_rng():
        for training in (False, True, False):
            torch.manual_seed(0)
            outputs.append(model.train(training)(*inputs))
    return outputs


@torch.no_grad()
def _disturbed(model: nn.Module) -> nn.Module:
    """A copy with every parameter off by up to one machine epsilon, relatively."""
    model, generator = copy.deepcopy(model), torch.Generator().manual_seed(0)
    for p in model.parameters():
        noise = 2 * torch.rand(p.shape, generator=generator, dtype=torch.float64) - 1
        p.mul_((1 + torch.finfo(p.dtype).eps * noise).to(p))
    return model


def _difference(x: list[Tensor], y: list[Tensor]) -> float:
    """The largest max|x − y|/max|x|, in float64; 0 for equal tensors, nan or inf where one is not finite."""
    pairs = [(a.double(), b.double()) for a, b in zip(x, y, strict=True) if not torch.equal(a, b)]
    return torch.stack([(a - b).abs().max() / a.abs().max() for a, b in pairs]).max().item() if pairs else 0.0


def twin(model: nn.Module, at: At, c: Factor | Sequence[Factor], inputs: Tensor | tuple) -> Twin:
    """A rescaled copy of the network, checked on data in evaluation and in training mode.

    Args:
        model: a network with one tensor as output; it is not changed.
        at, c: see `rescale`.
        inputs: what the network is called with, a tensor or a tuple of arguments.

    Raises:
        ValueError: as `rescale`; and if the copy's outputs differ by more than rounding.

    >>> model = nn.Sequential(nn.Linear(2, 3), nn.ReLU(), nn.Linear(3, 1))
    >>> other = twin(model, "0", 4.0, torch.ones(5, 2))
    >>> other.exact, other.factors["2.weight"]
    (True, tensor(0.2500))
    """
    inputs = inputs if isinstance(inputs, tuple) else (inputs,)
    chosen = _chosen(model, at)
    other = copy.deepcopy(model)
    factors = rescale(other, chosen, c)
    x, y = _outputs(model, inputs), _outputs(other, inputs)
    difference = _difference(x, y)
    # How much rounding matters is measured: what one machine epsilon in every parameter does to this network's outputs,
    # times 64 for the roundings in between, as in `invariance.certify`; at most 1 %, for more would show nothing.
    epsilon = torch.finfo(x[0].dtype).eps
    bound = min(64 * max(epsilon, _difference(x, _outputs(_disturbed(model), inputs))), 0.01)
    if not difference <= bound:
        raise ValueError(
            f"the function has changed: its outputs differ by {difference:.0e}, where rounding explains {bound:.0e}; "
            f"choose another symmetry than {', '.join(s.at for s in chosen)} or a c nearer to 1."
        )
    return Twin(other, factors, chosen, all(map(torch.equal, x, y)), difference)
