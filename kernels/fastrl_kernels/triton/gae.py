"""Generalized advantage estimation in one launch: each program scans a row from its end, a block of tokens at a time.

A step is an affine map of the advantage that comes after it, so a block of steps is an associative scan of such maps.
"""

# An annotation on a kernel argument would be its Triton type.
# mypy: allow-untyped-defs

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastrl_kernels.triton.launch import launch_device
from fastrl_kernels.triton.tokens import matrix, token_config


@triton.jit
def _after(a, b, next_a, next_b):
    """x -> next_a (a x + b) + next_b."""
    return a * next_a, next_a * b + next_b


@triton.jit
def _latest(there, value, next_there, next_value):
    """The later of two values of which each may be missing."""
    return there | next_there, tl.where(next_there != 0, next_value, value)


@triton.jit
def gae_fwd_kernel(
    rewards_ptr,  # (B, T)
    values_ptr,  # (B, T)
    mask_ptr,  # (B, T) uint8
    advantages_ptr,  # (B, T)
    returns_ptr,  # (B, T)
    T,
    gamma_: tl.float64,
    decay_: tl.float64,  # gamma * lambda
    THROUGH_MASK: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64) * T
    dtype: tl.constexpr = rewards_ptr.dtype.element_ty
    gamma, decay = tl.full((), gamma_, dtype), tl.full((), decay_, dtype)
    order = tl.arange(0, BLOCK_SIZE)
    last = order == BLOCK_SIZE - 1
    advantage = tl.zeros((), dtype)  # what the tokens to the right of the block carry into it
    value = tl.zeros((), dtype)
    for start in range(0, T, BLOCK_SIZE):
        cols = T - 1 - start - order  # backwards, so that the scan runs forwards
        inside = cols >= 0
        keep = tl.load(mask_ptr + row + cols, mask=inside, other=0) != 0
        reward = tl.load(rewards_ptr + row + cols, mask=keep, other=0.0)
        own_value = tl.load(values_ptr + row + cols, mask=keep, other=0.0)
        has_next = inside & (cols + 1 < T)
        keep_next = tl.load(mask_ptr + row + cols + 1, mask=has_next, other=0) != 0
        next_value = tl.load(values_ptr + row + cols + 1, mask=keep_next, other=0.0)
        if THROUGH_MASK:
            step = inside
        else:
            step = keep
            there, next_value = tl.associative_scan((keep_next.to(tl.int32), next_value), 0, _latest)
            next_value = tl.where(there != 0, next_value, value)
            value = tl.sum(tl.where(last, next_value, 0.0), 0)
        delta = tl.where(step, reward + gamma * next_value - own_value, 0.0)
        factor = tl.where(step, decay, 1.0).to(dtype)
        factor, delta = tl.associative_scan((factor, delta), 0, _after)
        scanned = factor * advantage + delta
        advantage = tl.sum(tl.where(last, scanned, 0.0), 0)
        tl.store(advantages_ptr + row + cols, tl.where(keep, scanned, 0.0), mask=inside)
        tl.store(returns_ptr + row + cols, tl.where(keep, scanned + own_value, 0.0), mask=inside)


def gae(
    rewards: Tensor,  # (B, T)
    values: Tensor,  # (B, T)
    mask: Tensor,  # (B, T) bool
    gamma: float,
    lam: float,
    through_mask: bool,
) -> tuple[Tensor, Tensor]:
    """Advantages and returns (B, T), 0 outside the mask, where nothing is read; see `functional.gae`.

    Args:
        rewards: (B, T) fp32 or fp64; values: the same.
        mask: (B, T) bool.
        gamma: discount; lam: the lambda of the estimator.
        through_mask: tokens outside the mask are steps of reward 0 and value 0, instead of being skipped.

    Raises:
        TypeError, ValueError: a dtype, shape or device other than the above.
        RuntimeError: CPU tensors outside Triton's interpreter.
    """
    if rewards.dtype not in (torch.float32, torch.float64):
        raise TypeError(f"rewards must be fp32 or fp64, got {rewards.dtype}")
    if rewards.dim() != 2:
        raise ValueError(f"rewards must have shape (B, T), got {tuple(rewards.shape)}")
    rewards_ = matrix("rewards", rewards, rewards, rewards.dtype)
    values_ = matrix("values", values, rewards, rewards.dtype)
    mask_ = matrix("mask", mask, rewards, torch.bool)
    advantages, returns = (torch.empty(rewards.shape, dtype=rewards.dtype, device=rewards.device) for _ in range(2))
    if advantages.numel() == 0:
        return advantages, returns
    rows, tokens = rewards.shape
    config = token_config(tokens, rewards.dtype)
    with launch_device(gae_fwd_kernel, rewards, "rewards"):
        gae_fwd_kernel[(rows,)](
            rewards_,
            values_,
            mask_,
            advantages,
            returns,
            tokens,
            gamma,
            gamma * lam,
            THROUGH_MASK=through_mask,
            BLOCK_SIZE=config.block_size,
            num_warps=config.num_warps,
            enable_fp_fusion=False,
        )
    return advantages, returns
