"""The unit σ in which each parameter is measured: the estimators then work on y = x/σ and the distance is a pure number.

σ = u·(r ⊗ q), with u one number a tensor and, for `"neuron"`, r and q one factor a row and a column.  All three are read
off the start x₀ and change with it: if a tensor, or one of its rows or columns, is expressed in units 2ᵏ times as large, σ
becomes exactly 2ᵏ times as small, and y stays the same, bit for bit.
"""

from __future__ import annotations

import torch
from torch import Tensor

from . import distributed
from .estimators import Entry, completed

__all__ = ["KINDS", "assign"]

KINDS = ("tensor", "neuron")


def assign(entries: list[Entry], kind: str) -> None:
    """Give every parameter that has none its unit, in `state["unit"]`, units [x].

    Args:
        entries: the parameters of this step; `grad` is with respect to x.
        kind: "tensor", σ = rms(x₀), one number; or "neuron", σ of rank one, shaped like the parameter.

    A tensor that starts at zero borrows its u at its first nonzero gradient (`pslib.estimators.completed`) and has no unit
    until then; it does not move before either.  A group's `unit` replaces u.

    Raises:
        ValueError: for "neuron" with sharded parameters.

    >>> entry = Entry(torch.tensor([1.0, 7.0]), torch.ones(2), {}, {"unit": None}, torch.ones(2))
    >>> assign([entry], "tensor")
    >>> entry.state["unit"]
    tensor(5.)
    """
    new = [e for e in entries if "unit" not in e.state]
    if not new:
        return
    if kind == "neuron" and any(e.owner is not None and distributed.local(e.owner) is not e.owner for e in entries):
        raise ValueError("units='neuron' needs whole rows and columns; use units='tensor' for sharded parameters.")
    shapes = [_shape(e, entries) if kind == "neuron" else torch.ones((), dtype=torch.float64, device=e.param.device) for e in entries]
    given = [e.group.get("unit") for e in entries]
    sizes = [
        _rms(e, _start(e) / shape) if unit is None else shape.new_tensor(unit)
        for e, shape, unit in zip(entries, shapes, given, strict=True)
    ]
    grads = [s.new_zeros(()) if e.grad is None else _rms(e, e.grad * s) for e, s in zip(entries, shapes, strict=True)]
    for e, shape, u in zip(entries, shapes, completed(torch.stack(sizes), torch.stack(grads)), strict=True):
        if "unit" not in e.state and u > 0:
            e.state["unit"] = (u * shape).to(e.param.dtype if e.grad is None else e.grad.dtype)


def _start(e: Entry) -> Tensor:
    return e.state.get("initial", e.param).detach().double()


def _rms(e: Entry, x: Tensor) -> Tensor:
    squares = x.double().square().sum()
    return (e.total(squares) / e.total(squares.new_tensor(float(x.numel())))).sqrt()


def _shape(e: Entry, entries: list[Entry]) -> Tensor:
    """r ⊗ q of a matrix or filter; r of a vector, taken from the matrix of its module if there is one."""
    x = _start(e)
    one = torch.ones((), dtype=torch.float64, device=x.device)
    if x.dim() > 1:
        return _factors(x, 0) * _factors(x, 1) if bool((x != 0).all()) else one
    if x.dim() == 0:
        return one
    siblings = [_start(other) for other in entries if other.module == e.module and other is not e]
    for source in [s for s in siblings if s.dim() > 1] + [x] + [s for s in siblings if s.dim() == 1]:
        if len(source) == len(x) and bool((source != 0).all()):
            return _factors(source, 0).reshape(-1)
    return one


def _factors(x: Tensor, dim: int) -> Tensor:
    """The geometric mean of |x| over each slice along `dim`, relative to the first slice; it broadcasts over x.

    Exponents are averaged as integers, mantissas as logarithms, so that a slice times a power of two has exactly that
    power of two times its factor.
    """
    mantissa, exponent = torch.frexp(x.abs().transpose(0, dim).flatten(1) if x.dim() > 1 else x.abs().unsqueeze(1))
    sums, count = exponent.long().sum(1), exponent.shape[1]
    whole = torch.div(sums - sums[0], count, rounding_mode="floor")
    logs = mantissa.log2().sum(1)
    rest = ((sums - sums[0]) - whole * count + (logs - logs[0])) / count
    shape = [1] * x.dim()
    shape[dim] = -1
    return torch.ldexp(rest.exp2(), whole).reshape(shape)
