"""Values inside a mask, without a trace of the others."""

from __future__ import annotations

import math

import torch
from torch import Tensor

_INTEGERS = {2: torch.int16, 4: torch.int32, 8: torch.int64}


def inside(x: Tensor, mask: Tensor) -> Tensor:
    """`torch.where(mask, x, 0)` for a bool mask and an x that broadcasts to its shape; differentiable.

    Where no gradient is asked for: x's bits times the mask. `where` does not vectorise its load of bools on a CPU and
    takes twice as long.
    """
    if x.requires_grad and torch.is_grad_enabled():
        return torch.where(mask, x, 0.0)
    return (x.detach().view(_INTEGERS[x.element_size()]) * mask).view(x.dtype)


def as_numbers(mask: Tensor, dtype: torch.dtype) -> Tensor:
    """`mask.to(dtype)` for a bool mask: on a CPU it is vectorised from bytes, and from bools it is not."""
    return mask.view(torch.uint8).to(dtype)


def weighted_sum(x: Tensor, weights: Tensor, mask: Tensor) -> Tensor:
    """`(weights * inside(x, mask)).sum()` for weights that are 0 outside the mask."""
    total = (weights * x).sum()
    return total if known_finite(total) else (weights * torch.where(mask, x, 0.0)).sum()


def known_finite(x: Tensor) -> bool:
    """Whether x is on the host, where a look at it costs next to nothing, and holds no NaN or infinity."""
    number = x.detach()
    traced = torch.compiler.is_compiling() or torch._C._are_functorch_transforms_active() or type(number) is not Tensor
    if number.device.type != "cpu" or traced:
        return False
    return math.isfinite(number.sum().item())
