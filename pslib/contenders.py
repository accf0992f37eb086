"""Every optimizer of the book by name: torch's, the learning-rate-free packages', and ours.

`make(name, params, **settings)` takes named parameters or plain tensors; settings go to the optimizer as they are,
and what is not set stays at its authors' default.  Packages are imported when asked for.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
from torch import nn

from . import remedies
from .estimators import Blocks
from .optimizers import PSDASGD

__all__ = ["ABLATIONS", "ALL", "BLOCKS", "CONTENDERS", "REMEDIES", "AnyBlock", "Contender", "make", "prepare"]


class AnyBlock(PSDASGD):
    """PS-DA-SGD with every kind of block, for comparing them; `PSDASGD` offers those that earned their place."""

    offered = Blocks.KINDS


@dataclass(frozen=True)
class Contender:
    """Where an optimizer comes from.

    Attributes:
        label: its name in tables and figures.
        module, attribute: where its class is.
        package: what to install to have it.
        fixed: settings that make it this method.
        learning_rate_free: whether it is meant to be used at its defaults.
        needs_model: whether its constructor is given the network, as `model`.
        reparametrize: what it does to the network first, in place.
        group: makes parameter groups of the parameters.
    """

    label: str
    module: str
    attribute: str
    package: str
    fixed: dict
    learning_rate_free: bool = False
    needs_model: bool = False
    reparametrize: Callable[[nn.Module], None] | None = None
    group: Callable[[list], list] | None = None


def _torch(label: str, attribute: str, **fixed) -> Contender:
    return Contender(label, "torch.optim", attribute, "torch", fixed)


def _ours(label: str, attribute: str, free: bool = True, **fixed) -> Contender:
    return Contender(label, "pslib", attribute, "pslib", fixed, free)


def _peer(label: str, module: str, attribute: str, package: str, **fixed) -> Contender:
    return Contender(label, module, attribute, package, fixed, True)


CONTENDERS = {
    "sgd": _torch("SGD", "SGD", lr=0.1),
    "momentum": _torch("SGD, momentum", "SGD", lr=0.1, momentum=0.9),
    "adam": _torch("Adam", "Adam"),
    "adamw": _torch("AdamW", "AdamW"),
    "amsgrad": _torch("AMSGrad", "Adam", amsgrad=True),
    "nadam": _torch("NAdam", "NAdam"),
    "rmsprop": _torch("RMSprop", "RMSprop"),
    "adagrad": _torch("Adagrad", "Adagrad"),
    "adadelta": _torch("Adadelta", "Adadelta"),
    "rprop": _torch("Rprop", "Rprop"),
    "muon": _torch("Muon", "Muon", lr=0.02),
    "lion": Contender("Lion (sign)", "lion_pytorch", "Lion", "lion-pytorch", {}),
    "dadapt-adam": _peer("D-Adapt Adam", "dadaptation", "DAdaptAdam", "dadaptation"),
    "dadapt-sgd": _peer("D-Adapt SGD", "dadaptation", "DAdaptSGD", "dadaptation"),
    "prodigy": _peer("Prodigy", "prodigyopt", "Prodigy", "prodigyopt"),
    "dog": _peer("DoG", "dog", "DoG", "dog-optimizer"),
    "ldog": _peer("L-DoG", "dog", "LDoG", "dog-optimizer"),
    "momo-adam": _peer("MoMo-Adam", "momo", "MomoAdam", "momo-opt"),
    "schedule-free": _peer("Schedule-Free AdamW", "schedulefree", "AdamWScheduleFree", "schedulefree"),
    "sps": _ours("SPS", "PSSPS", scaling="none", betas=(0.0, 0.98)),
    "ps-sps": _ours("PS-SPS", "PSSPS"),
    "psdasgd-model": _ours("PS-DA-SGD, model", "PSDASGD", per="model"),
    "psdasgd-tensor": _ours("PS-DA-SGD, tensor", "PSDASGD", per="tensor"),
}

def _hidden_rows(params: list) -> list[dict]:
    """The last matrix in a group of its own: its rows may change their lengths, as the output layer's do in the paper."""
    tensors = [p[1] if isinstance(p, tuple) else p for p in params]
    last = max(i for i, p in enumerate(tensors) if p.dim() > 1)
    return [{"params": params[:last] + params[last + 1 :]}, {"params": [params[last]], "rows": False}]


# Methods that were made against the ill-conditioning of the parameterization.
REMEDIES = {
    "weight-norm": Contender("Adam, weight normalization", "torch.optim", "Adam", "torch", {}, reparametrize=remedies.weight_normalize),
    "nd-adam": Contender("ND-Adam", "pslib.remedies", "NDAdam", "pslib", {"rest": 0.1}, group=_hidden_rows),
    "path-sgd": Contender("Path-SGD", "pslib.remedies", "PathSGD", "pslib", {}, needs_model=True),
}


def _blocks(label: str, **fixed) -> Contender:
    return Contender(f"PS-DA-SGD, {label}", "pslib.contenders", "AnyBlock", "pslib", fixed, True)


# PS-DA-SGD with other blocks and units than those of the contenders.
BLOCKS = {
    "psdasgd-module": _blocks("module", per="module"),
    "psdasgd-neuron": _blocks("neuron", per="neuron"),
    "psdasgd-coordinate": _blocks("coordinate", per="coordinate"),
    "psdasgd-model-units": _blocks("model, units per tensor", per="model", units="tensor"),
    "psdasgd-module-units": _blocks("module, units per tensor", per="module", units="tensor"),
    "psdasgd-model-neuron-units": _blocks("model, units per neuron", per="model", units="neuron"),
    "psdasgd-tensor-neuron-units": _blocks("tensor, units per neuron", per="tensor", units="neuron"),
}

# What the ablations change parts of.
ABLATIONS = {
    "psdasgd-variant": Contender("PS-DA-SGD, changed", "pslib.ablations", "Variant", "pslib", {}, True),
    "scaled-dog": Contender("DoG, scaled", "pslib.ablations", "ScaledDoG", "pslib", {}, True),
}

ALL = {**CONTENDERS, **REMEDIES, **BLOCKS, **ABLATIONS}


def prepare(name: str, model: nn.Module) -> None:
    """Do to the network `model` what the contender `name` needs done before it is made; for most that is nothing."""
    reparametrize = _contender(name).reparametrize
    if reparametrize is not None:
        reparametrize(model)


def _contender(name: str) -> Contender:
    if name not in ALL:
        raise ValueError(f"there is no optimizer {name!r}; choose one of {', '.join(ALL)}.")
    return ALL[name]


def make(name: str, params: Iterable, *, model: nn.Module | None = None, **settings) -> torch.optim.Optimizer:
    """Make the optimizer `name` for `params` with the given settings; `model` is for those that need the network.

    Raises:
        ValueError: if there is no contender of that name, or it needs the model and was given none.
        ImportError: if its package is not installed.
    """
    contender = _contender(name)
    if contender.needs_model:
        if model is None:
            raise ValueError(f"{contender.label} needs the network: make({name!r}, model.named_parameters(), model=model, …).")
        settings = {"model": model, **settings}
    try:
        module = importlib.import_module(contender.module)
    except ImportError as error:
        raise ImportError(f"{contender.label} needs the package {contender.package}: pip install {contender.package}.") from error
    params = list(params)
    if contender.package != "pslib":
        params = [p[1] if isinstance(p, tuple) else p for p in params]
    if contender.group is not None:
        params = contender.group(params)
    settings = {k: tuple(v) if isinstance(v, list) else v for k, v in settings.items()}
    return getattr(module, contender.attribute)(params, **{**contender.fixed, **settings})
