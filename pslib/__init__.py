"""pslib: optimizers that need no learning rate, and the machinery of the book *Learning rates have units*."""

from . import estimators, scalings
from .optimizers import PSDASGD, PSSPS, ScaledSGD

__all__ = ["PSDASGD", "PSSPS", "ScaledSGD", "estimators", "scalings"]
__version__ = "0.2.0"
