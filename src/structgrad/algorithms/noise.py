"""Standard noise, in the dtype and on the device of the scores."""

from __future__ import annotations

import torch
from torch import Tensor


def exponentials_like(tensor: Tensor) -> Tensor:
    """Standard exponential noise, without gradient."""
    return torch.empty_like(tensor, requires_grad=False).exponential_()


def logistic_like(tensor: Tensor) -> Tensor:
    """Standard logistic noise, without gradient: the logarithm of a ratio of exponentials."""
    return exponentials_like(tensor).log() - exponentials_like(tensor).log()
