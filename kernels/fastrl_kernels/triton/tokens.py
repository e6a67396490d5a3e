"""What the kernels over (B, T) vectors share: their launch configurations and the check of an argument."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from fastrl_kernels.triton.launch import ROW_DTYPES


class TokenConfig(NamedTuple):
    """How one row of T tokens is cut: tokens per block and warps per program."""

    block_size: int
    num_warps: int


# A thread has one 16-byte load of each vector: the policy terms hold some twenty of them at once. With eight warps
# ptxas spills for sm_80.
_SHORT, _LONG = TokenConfig(128, 1), TokenConfig(512, 4)
_SHORT_FP64, _LONG_FP64 = TokenConfig(128, 2), TokenConfig(256, 4)


def token_config(tokens: int, dtype: torch.dtype) -> TokenConfig:
    """The launch configuration for rows of `tokens` values held in `dtype` (fp32 or fp64)."""
    short, long = token_configs(dtype)
    return short if tokens <= short.block_size else long


def token_configs(dtype: torch.dtype) -> tuple[TokenConfig, TokenConfig]:
    """Every configuration that `token_config` may return for `dtype`."""
    return (_SHORT_FP64, _LONG_FP64) if dtype == torch.float64 else (_SHORT, _LONG)


def matrix(name: str, x: Tensor | None, like: Tensor, dtype: torch.dtype, per_row: bool = False) -> Tensor | None:
    """`x` as a contiguous (B, T) tensor of `dtype` beside `like`, or (B, 1) where `per_row` allows it; bools as bytes.

    Raises:
        TypeError: `x` is of another kind than `dtype`.
        ValueError: another shape or device.
    """
    if x is None:
        return None
    if x.dtype != dtype and not (x.dtype in ROW_DTYPES and dtype in ROW_DTYPES):
        raise TypeError(f"{name} must be {dtype}, got {x.dtype}")
    if x.shape != like.shape and not (per_row and x.shape == (like.shape[0], 1)):
        raise ValueError(f"{name} must have shape {tuple(like.shape)}, got {tuple(x.shape)}")
    if x.device != like.device:
        raise ValueError(f"{name} must be on {like.device}, got {x.device}")
    x = x.to(dtype).contiguous()
    return x.view(torch.uint8) if dtype == torch.bool else x
