"""Values inside a mask, without reading the others."""

from __future__ import annotations

import torch
from torch import Tensor

_INTEGERS = {2: torch.int16, 4: torch.int32, 8: torch.int64}


def inside(x: Tensor, mask: Tensor) -> Tensor:
    """`torch.where(mask, x, 0)` for a bool mask and an x that broadcasts to its shape, with no gradient.

    The bits of both, and one new tensor: `where` does not vectorise its load of bools on a CPU and takes twice as long.
    """
    bits = _INTEGERS[x.element_size()]
    return mask.view(torch.uint8).to(bits).neg_().bitwise_and_(x.detach().view(bits)).view(x.dtype)
