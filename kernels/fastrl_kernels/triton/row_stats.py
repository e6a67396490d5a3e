"""Row statistics of a tile of logits: max, log-sum-exp, log-probability of one id, entropy.

One read of each logit, online over blocks of columns; the transformed or normalized logits are never written. Every row
is one program that adds in a fixed order, so results are bitwise reproducible.
"""

# An annotation on a kernel argument would be its Triton type.
# mypy: allow-untyped-defs

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastrl_kernels import tuning
from fastrl_kernels.head import LogitTransform, RowStats, accumulation_dtype
from fastrl_kernels.triton.launch import (
    RowConfig,
    check_tile,
    launch_device,
    row_candidates,
    row_config,
    row_key,
    seconds,
    vector,
)
from fastrl_kernels.triton.transform import load_product, logit_and_slope, transform_scales


@triton.jit
def row_stats_fwd_kernel(
    tile_ptr,  # (n, V) raw products
    ids_ptr,  # (n,) int64
    bias_ptr,  # (V,) or None
    row_max_ptr,  # (n,) accumulation dtype, as are the three below
    log_sum_ptr,  # (n,)
    logps_ptr,  # (n,)
    mean_ptr,  # (n,) or None
    V,
    stride,
    scale_in: tl.float64,
    scale_out: tl.float64,
    SOFTCAP: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    BLOCKS_IN_FLIGHT: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    row_ptr = tile_ptr + row * stride
    dtype: tl.constexpr = log_sum_ptr.dtype.element_ty
    gain_in = tl.full((), scale_in, dtype)
    gain_out = tl.full((), scale_out, dtype)

    # The maximum is a scalar of the row; the sums stay one per lane until the end: one reduction per block, not three.
    running_max = tl.full((), float("-inf"), dtype)
    lane_sum = tl.zeros((BLOCK_SIZE,), dtype)  # sum of exp(z - shift)
    lane_dot = tl.zeros((BLOCK_SIZE,), dtype)  # sum of exp(z - shift) * (z - shift)
    for start in tl.range(0, V, BLOCK_SIZE, num_stages=BLOCKS_IN_FLIGHT):
        cols = start + tl.arange(0, BLOCK_SIZE)
        mask = cols < V
        x = load_product(row_ptr, bias_ptr, cols, mask, dtype)
        z, _ = logit_and_slope(x, gain_in, gain_out, SOFTCAP)
        z = tl.where(mask, z, float("-inf"))

        new_max = tl.maximum(running_max, tl.max(z, 0))
        # While everything seen is -inf the shift is 0, or -inf - -inf would poison the row.
        shift = tl.where(new_max == float("-inf"), 0.0, new_max)
        nothing_yet = running_max == float("-inf")
        alpha = tl.where(nothing_yet, 0.0, tl.exp(running_max - shift))
        d = z - shift
        e = tl.exp(d)
        if mean_ptr is not None:
            moved = tl.where(nothing_yet, 0.0, running_max - shift)
            # A logit of -inf adds 0, not 0 * -inf.
            lane_dot = alpha * (lane_dot + lane_sum * moved) + e * tl.maximum(d, -1e30)
        lane_sum = alpha * lane_sum + e
        running_max = new_max

    # tl.max drops NaN, the sums do not: a NaN or +inf logit makes total NaN. All -inf: total is 0, its log -inf.
    total = tl.sum(lane_sum, 0)
    log_sum = tl.log(total)
    tl.store(row_max_ptr + row, running_max)
    tl.store(log_sum_ptr + row, log_sum)
    if mean_ptr is not None:
        tl.store(mean_ptr + row, tl.sum(lane_dot, 0) / total)

    token = tl.load(ids_ptr + row)
    inside = (token >= 0) & (token < V)
    x_token = load_product(row_ptr, bias_ptr, token, inside, dtype)
    z_token, _ = logit_and_slope(x_token, gain_in, gain_out, SOFTCAP)
    # -1: another vocabulary shard owns this token. Any other id outside [0, V) reads nothing and is loud.
    z_token = tl.where(inside, z_token, tl.where(token == -1, float("-inf"), float("nan")))
    tl.store(logps_ptr + row, (z_token - running_max) - log_sum)


def row_stats(
    tile: Tensor,  # (n, V)
    ids: Tensor,  # (n,)
    transform: LogitTransform,
    bias: Tensor | None,  # (V,)
    entropy: bool,
    config: RowConfig | None = None,
) -> RowStats:
    """Max, log-sum, log-probability of `ids` and entropy of each row of logits.

    Eager equivalent: `lp = transform(tile + bias).log_softmax(-1); lp.gather(-1, ids), -(lp.exp() * lp).sum(-1)`.

    Args:
        tile: (n, V) raw products in fp32, bf16, fp16 or fp64; last dimension contiguous, any row stride. Not modified.
        ids: (n,) int64; -1 marks a token of another vocabulary shard, whose logp is -inf.
        transform: how a raw product becomes a logit.
        bias: (V,) in a floating dtype, or None; added before the transform.
        entropy: whether to compute the mean logit, and so the entropy, too.
        config: a launch configuration; None takes the tuned one, or the table's.

    Returns:
        RowStats of (n,) tensors, in fp32 (fp64 for an fp64 tile). A row that holds NaN, +inf, or only -inf has a NaN
        logp and mean; no other row is touched by it.

    Raises:
        TypeError, ValueError: a dtype, shape, device or layout other than the above.
        RuntimeError: CPU tensors outside Triton's interpreter.
    """
    check_tile("tile", tile)
    n, vocabulary = tile.shape
    dtype = accumulation_dtype(tile.dtype)
    ids_ = vector("ids", ids, n, tile.device, torch.int64)
    bias_ = vector("bias", bias, vocabulary, tile.device, dtype)
    row_max, log_sum, logps = (torch.empty(n, dtype=dtype, device=tile.device) for _ in range(3))
    mean = torch.empty(n, dtype=dtype, device=tile.device) if entropy else None
    stats = RowStats(row_max, log_sum, logps, mean)
    if n == 0:
        return stats
    scale_in, scale_out = transform_scales(transform)
    with launch_device(row_stats_fwd_kernel, tile, "tile"):
        if config is None:
            config = tuning.tuned(
                "row_stats",
                f"{row_key(tile)} softcap={transform.softcap is not None} entropy={entropy}",
                row_candidates(vocabulary, tile.dtype),
                lambda config: seconds(lambda: row_stats(tile, ids, transform, bias, entropy, config), tile.device),
                row_config(vocabulary, tile.dtype),
            )
        row_stats_fwd_kernel[(n,)](
            tile,
            ids_,
            bias_,
            row_max,
            log_sum,
            logps,
            mean,
            vocabulary,
            tile.stride(0),
            scale_in,
            scale_out,
            SOFTCAP=transform.softcap is not None,
            BLOCK_SIZE=config.block_size,
            BLOCKS_IN_FLIGHT=config.num_stages,
            num_warps=config.num_warps,
            # A fused multiply-add would round the taken logit and the maximum differently: logps above 0.
            enable_fp_fusion=False,
        )
    return stats
