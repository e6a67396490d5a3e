"""Group-relative advantages in one launch: each program compares the group ids of a few rewards with all of them.

No sort, no group index, no host synchronisation: group ids may be any integers in any order, groups of any size. The
statistics are recomputed by each program in the same fixed order, so members of a group share them to the bit.
"""

# An annotation on a kernel argument would be its Triton type.
# mypy: allow-untyped-defs

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastrl_kernels.head import accumulation_dtype
from fastrl_kernels.triton.launch import GROUP_CONFIG, launch_device, vector


@triton.jit
def group_advantages_fwd_kernel(
    rewards_ptr,  # (B,)
    group_ids_ptr,  # (B,) int64
    advantages_ptr,  # (B,)
    B,
    eps: tl.float64,
    LEAVE_ONE_OUT: tl.constexpr,
    SCALE: tl.constexpr,  # "group", "batch" or "none"
    BLOCK_ROWS: tl.constexpr,
    BLOCK_COLS: tl.constexpr,
):
    rows = tl.program_id(0).to(tl.int64) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    row_mask = rows < B
    reward = tl.load(rewards_ptr + rows, mask=row_mask, other=float("nan"))
    group = tl.load(group_ids_ptr + rows, mask=row_mask, other=0)
    dtype: tl.constexpr = rewards_ptr.dtype.element_ty

    count = tl.zeros((BLOCK_ROWS,), tl.int32)
    differing = tl.zeros((BLOCK_ROWS,), tl.int32)
    total = tl.zeros((BLOCK_ROWS,), dtype)
    batch_count = tl.zeros((BLOCK_COLS,), tl.int32)
    batch_total = tl.zeros((BLOCK_COLS,), dtype)
    for start in range(0, B, BLOCK_COLS):
        cols = start + tl.arange(0, BLOCK_COLS)
        other = tl.load(rewards_ptr + cols, mask=cols < B, other=float("nan"))
        other_group = tl.load(group_ids_ptr + cols, mask=cols < B, other=0)
        scorable = other == other  # not NaN, and so not padding either
        member = (group[:, None] == other_group[None, :]) & scorable[None, :]
        count += tl.sum(member.to(tl.int32), 1)
        differing += tl.sum((member & (reward[:, None] != other[None, :])).to(tl.int32), 1)
        total += tl.sum(tl.where(member, other[None, :], 0.0), 1)
        if SCALE == "batch":
            batch_count += scorable.to(tl.int32)
            batch_total += tl.where(scorable, other, 0.0)
    size = count.to(dtype)
    mean = total / size
    batch_size = tl.sum(batch_count, 0).to(dtype)
    batch_mean = tl.sum(batch_total, 0) / batch_size

    # Second pass, over the centred rewards. Their sum is the rounding error of the mean: taking it out keeps the digits
    # of small differences between large rewards.
    drift = tl.zeros((BLOCK_ROWS,), dtype)
    squares = tl.zeros((BLOCK_ROWS,), dtype)
    batch_drift = tl.zeros((BLOCK_COLS,), dtype)
    batch_squares = tl.zeros((BLOCK_COLS,), dtype)
    for start in range(0, B, BLOCK_COLS):
        cols = start + tl.arange(0, BLOCK_COLS)
        other = tl.load(rewards_ptr + cols, mask=cols < B, other=float("nan"))
        other_group = tl.load(group_ids_ptr + cols, mask=cols < B, other=0)
        scorable = other == other
        member = (group[:, None] == other_group[None, :]) & scorable[None, :]
        centred = tl.where(member, other[None, :] - mean[:, None], 0.0)
        drift += tl.sum(centred, 1)
        if SCALE == "group":
            squares += tl.sum(centred * centred, 1)
        if SCALE == "batch":
            batch_centred = tl.where(scorable, other - batch_mean, 0.0)
            batch_drift += batch_centred
            batch_squares += batch_centred * batch_centred

    mean_drift = drift / size
    advantage = (reward - mean) - tl.where(mean_drift == mean_drift, mean_drift, 0.0)
    if LEAVE_ONE_OUT:
        advantage = advantage * (size / (size - 1.0))  # r - mean of the others
    if SCALE == "group":
        variance = (squares - drift * mean_drift) / (size - 1.0)
        advantage = advantage / (tl.sqrt(tl.where(variance < 0, 0.0, variance)) + tl.full((), eps, dtype))
    if SCALE == "batch":
        drifted = tl.sum(batch_drift, 0)
        variance = (tl.sum(batch_squares, 0) - drifted * (drifted / batch_size)) / (batch_size - 1.0)
        advantage = advantage / (tl.sqrt(tl.where(variance < 0, 0.0, variance)) + tl.full((), eps, dtype))
    # A unanimous group teaches nothing: exactly 0, which a GPU's division does not always leave, or its rows would
    # count as live. NaN: no reward, or no statistic.
    advantage = tl.where((differing == 0) | (advantage != advantage), 0.0, advantage)
    tl.store(advantages_ptr + rows, advantage, mask=row_mask)


def group_advantages(
    rewards: Tensor,  # (B,)
    group_ids: Tensor,  # (B,)
    baseline: str,
    scale: str,
    eps: float,
) -> Tensor:
    """Advantages of rewards against their group: `(r - baseline) / (std + eps)`.

    Args:
        rewards: (B,) floating (computed in fp32, fp64 for fp64); NaN means no reward: it counts in no statistic and its
            advantage is 0.
        group_ids: (B,) int64, any values in any order; equal ids form a group.
        baseline: "mean" (of the group) or "leave_one_out" (mean of the group's other members).
        scale: "group" or "batch" (divide by that standard deviation, with Bessel's correction, plus eps) or "none".
        eps: added to the standard deviation.

    Returns:
        (B,) advantages in the dtype of rewards; exactly 0 in a group whose scorable rewards are all equal (or one).

    Raises:
        TypeError, ValueError: a dtype, shape, device, layout or option other than the above.
        RuntimeError: CPU tensors outside Triton's interpreter.
    """
    if not rewards.dtype.is_floating_point:
        raise TypeError(f"rewards must be of a floating dtype, got {rewards.dtype}")
    if rewards.dim() != 1:
        raise ValueError(f"rewards must have shape (B,), got {tuple(rewards.shape)}")
    count = rewards.shape[0]
    rewards_ = vector("rewards", rewards, count, rewards.device, accumulation_dtype(rewards.dtype))
    group_ids_ = vector("group_ids", group_ids, count, rewards.device, torch.int64)
    if baseline not in ("mean", "leave_one_out"):
        raise ValueError(f'baseline must be "mean" or "leave_one_out", got {baseline!r}')
    if scale not in ("group", "batch", "none"):
        raise ValueError(f'scale must be "group", "batch" or "none", got {scale!r}')
    advantages = torch.empty(count, dtype=accumulation_dtype(rewards.dtype), device=rewards.device)
    if count == 0:
        return advantages.to(rewards.dtype)
    config = GROUP_CONFIG
    with launch_device(group_advantages_fwd_kernel, rewards, "rewards"):
        group_advantages_fwd_kernel[(triton.cdiv(count, config.block_rows),)](
            rewards_,
            group_ids_,
            advantages,
            count,
            eps,
            LEAVE_ONE_OUT=baseline == "leave_one_out",
            SCALE=scale,
            BLOCK_ROWS=config.block_rows,
            BLOCK_COLS=config.block_cols,
            num_warps=config.num_warps,
            enable_fp_fusion=False,
        )
    return advantages.to(rewards.dtype)
