"""pslib: optimizers that need no learning rate, and the machinery of the book *Learning rates have units*.

>>> import pslib
>>> import torch
>>> model = torch.nn.Linear(2, 1)
>>> optimizer = pslib.PSDASGD(model.named_parameters())
>>> optimizer.block_names
['weight', 'bias']
"""

from . import estimators, scalings
from .optimizers import PSDASGD, PSSPS, ScaledSGD

__all__ = ["PSDASGD", "PSSPS", "ScaledSGD", "estimators", "scalings"]
__version__ = "0.4.0"
