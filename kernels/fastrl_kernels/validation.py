"""Checks of what a user passed: each raises an error that names the argument, its shape and what was expected."""

from __future__ import annotations

import torch
from torch import Tensor

FLOATS = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


def check_floating(name: str, x: Tensor) -> None:
    if x.dtype not in FLOATS:
        raise TypeError(f"{name}: expected one of {', '.join(str(d) for d in FLOATS)}, got {x.dtype}")


def check_shape(name: str, x: Tensor, shape: tuple[int, ...], meaning: str) -> None:
    if tuple(x.shape) != tuple(shape):
        raise ValueError(f"{name}: expected shape {tuple(shape)} ({meaning}), got {tuple(x.shape)}")


def check_device(name: str, x: Tensor, device: torch.device) -> None:
    if x.device != device:
        raise ValueError(f"{name}: expected on {device}, where hidden (or logits) is, got {x.device}")


def check_ids(ids: Tensor, shape: tuple[int, ...], device: torch.device) -> None:
    """ids: integers aligned with the rows. Their range is checked where the rows are selected (`ops._select`)."""
    if ids.dtype.is_floating_point or ids.dtype.is_complex or ids.dtype == torch.bool:
        raise TypeError(f"ids: expected integers, got {ids.dtype}")
    check_shape("ids", ids, shape, "one token per row; ids[i] is scored by row i, nothing is shifted here")
    check_device("ids", ids, device)


def check_mask(mask: Tensor | None, shape: tuple[int, ...], device: torch.device) -> Tensor | None:
    """The mask as booleans (nonzero counts), or None."""
    if mask is None:
        return None
    check_shape("mask", mask, shape, "one entry per token")
    check_device("mask", mask, device)
    return mask.bool()


def check_weight(weight: Tensor, bias: Tensor | None, hidden: Tensor, prefix: str = "") -> None:
    """weight (V, D) and bias (V,) against hidden (..., D), and that the weight is really there.

    prefix: of the names in messages, such as "ref_" for a second head.
    """
    check_floating(f"{prefix}hidden", hidden)
    if hidden.ndim < 1:
        raise ValueError(f"{prefix}hidden: expected shape (..., D), got a scalar")
    sharded = "a DTensor" if type(weight).__name__ == "DTensor" else ""
    if hasattr(weight, "ds_id") and weight.numel() == 0:
        sharded = "a ZeRO-3 parameter"
    if sharded:
        raise ValueError(
            f"{prefix}weight: {sharded} is sharded outside its module's forward. Compute the loss inside the model's "
            "forward (fastrl.patch_model does), or gather it first (weight.full_tensor(), "
            "deepspeed.zero.GatheredParameters)."
        )
    check_floating(f"{prefix}weight", weight)
    if weight.ndim != 2 or weight.shape[1] != hidden.shape[-1] or weight.shape[0] == 0:
        hint = " (a size of 0 means that ZeRO-3 or FSDP holds it elsewhere)" if weight.numel() == 0 else ""
        raise ValueError(
            f"{prefix}weight: expected shape (V, {hidden.shape[-1]}) for {prefix}hidden {tuple(hidden.shape)}, "
            f"got {tuple(weight.shape)}{hint}"
        )
    check_device(f"{prefix}weight", weight, hidden.device)
    if bias is not None:
        check_floating(f"{prefix}bias", bias)
        check_shape(f"{prefix}bias", bias, (weight.shape[0],), "one entry per vocabulary row of weight")
        check_device(f"{prefix}bias", bias, hidden.device)


def check_run(memory_budget: int | None, grad_tolerance: float, capturable: bool) -> None:
    """Checks of the arguments that say how to run, not what to compute."""
    if memory_budget is not None and not (isinstance(memory_budget, int) and memory_budget > 0):
        raise ValueError(f"memory_budget: expected None or a number of bytes above 0, got {memory_budget!r}")
    if not 0 <= grad_tolerance < 1:
        raise ValueError(f"grad_tolerance: expected a number in [0, 1), got {grad_tolerance!r}")
    if capturable and grad_tolerance > 0:
        raise ValueError("grad_tolerance: dropping rows needs their number on the host, which capturable rules out")


def check_weight_grad(weight_grad: Tensor, weight: Tensor, dtype: torch.dtype) -> None:
    """Checks of a buffer that dW is added to."""
    check_shape("weight_grad", weight_grad, tuple(weight.shape), "as weight")
    check_device("weight_grad", weight_grad, weight.device)
    if weight_grad.dtype != dtype or not weight_grad.is_contiguous():
        raise TypeError(f"weight_grad: expected a contiguous {dtype} buffer to sum dW in, got {weight_grad.dtype}")
