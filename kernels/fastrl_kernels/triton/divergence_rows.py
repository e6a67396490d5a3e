"""Divergence of each row of a student's tile of logits from the teacher's, and its gradient in place of the student's.

A row of both tiles is one program, which goes over it three times: log-sum-exps, divergence, gradient. Neither
probabilities nor log-probabilities are ever written.
"""

# An annotation on a kernel argument would be its Triton type.
# mypy: allow-untyped-defs

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastrl_kernels import tuning
from fastrl_kernels.head import LogitTransform, accumulation_dtype
from fastrl_kernels.triton.launch import (
    RowConfig,
    check_tile,
    dtype_name,
    launch_device,
    row_key,
    seconds,
    vector,
)
from fastrl_kernels.triton.transform import load_product, logit_and_slope, transform_scales

# A thread has one 16-byte load of each tile: with more, two tiles, two sums and the logarithms of the mixture take 64
# registers and more. The first of a table is the choice by rule.
_SHORT, _SHORT_FP64 = (RowConfig(512, 4),), (RowConfig(256, 4),)
_LONG = (RowConfig(2048, 16), RowConfig(1024, 8))
_LONG_FP64 = (RowConfig(512, 8),)
MEASURED_ROWS = 512  # enough to fill any GPU


def divergence_candidates(vocabulary: int, dtype: torch.dtype) -> tuple[RowConfig, ...]:
    """What a measurement may choose from for rows of `vocabulary` logits in `dtype`; the rule's choice is the first."""
    short, long = (_SHORT_FP64, _LONG_FP64) if dtype == torch.float64 else (_SHORT, _LONG)
    return short if vocabulary <= short[0].block_size else long


@triton.jit
def running_sum(z, largest, lane_sum):
    """The largest logit so far, and sums of exp(z - largest) per lane, after one more block."""
    new = tl.maximum(largest, tl.max(z, 0))
    # While everything seen is -inf the shift is 0, or -inf - -inf would poison the row.
    shift = tl.where(new == float("-inf"), 0.0, new)
    alpha = tl.where(largest == float("-inf"), 0.0, tl.exp(largest - shift))
    return new, alpha * lane_sum + tl.exp(z - shift)


@triton.jit
def against_mixture(lp, lq, beta, rest):
    """ln(p / m) and ln(q / m), m = rest * p + beta * q; the larger of p and q is divided out, so nothing overflows."""
    d = lq - lp
    above = d > 0
    e = tl.exp(-tl.abs(d))
    t = tl.log(tl.where(above, rest * e + beta, beta * e + rest))
    return tl.where(above, -d - t, -t), tl.where(above, -t, d - t)


@triton.jit
def share_and_centre(lp, lq, beta, rest, KIND: tl.constexpr):
    """A column's share of the divergence, and of the sum by which the gradient is centred; 0 at probability 0."""
    p = tl.exp(lp)
    q = tl.exp(lq)
    if KIND == "forward_kl":
        share = tl.where(q == 0, 0.0, q * (lq - lp))
        return share, share
    elif KIND == "reverse_kl":
        share = tl.where(p == 0, 0.0, p * (lp - lq))
        return share, share
    else:
        lpm, lqm = against_mixture(lp, lq, beta, rest)
        centre = tl.where(p == 0, 0.0, p * lpm)
        return beta * tl.where(q == 0, 0.0, q * lqm) + rest * centre, centre


@triton.jit
def gradient_of(lp, lq, centre, beta, rest, KIND: tl.constexpr):
    """d divergence / d logit: p - q, or p (ln(p / q) - KL(p || q)), or (1 - beta) p (ln(p / m) - KL(p || m))."""
    p = tl.exp(lp)
    if KIND == "forward_kl":
        return p - tl.exp(lq)
    elif KIND == "reverse_kl":
        return tl.where(p == 0, 0.0, p * (lp - lq - centre))
    else:
        lpm, _ = against_mixture(lp, lq, beta, rest)
        return rest * tl.where(p == 0, 0.0, p * (lpm - centre))


@triton.jit
def divergence_rows_kernel(
    tile_ptr,  # (n, V) raw products of the student
    ref_tile_ptr,  # (n, V) raw products of the teacher
    bias_ptr,  # (V,) or None
    ref_bias_ptr,  # (V,) or None
    divergence_ptr,  # (n,) accumulation dtype
    weight_ptr,  # (n,) or None, accumulation dtype
    out_ptr,  # (n, V) or None; may be tile_ptr
    V,
    stride,
    ref_stride,
    out_stride,
    scale_in: tl.float64,
    scale_out: tl.float64,
    ref_scale_in: tl.float64,
    ref_scale_out: tl.float64,
    beta_: tl.float64,
    KIND: tl.constexpr,
    SOFTCAP: tl.constexpr,
    REF_SOFTCAP: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    row_ptr = tile_ptr + row * stride
    ref_row_ptr = ref_tile_ptr + row * ref_stride
    dtype: tl.constexpr = divergence_ptr.dtype.element_ty
    gain_in = tl.full((), scale_in, dtype)
    gain_out = tl.full((), scale_out, dtype)
    ref_gain_in = tl.full((), ref_scale_in, dtype)
    ref_gain_out = tl.full((), ref_scale_out, dtype)
    beta = tl.full((), beta_, dtype)
    rest = tl.full((), 1.0 - beta_, dtype)

    largest = tl.full((), float("-inf"), dtype)
    ref_largest = tl.full((), float("-inf"), dtype)
    lane_sum = tl.zeros((BLOCK_SIZE,), dtype)
    ref_lane_sum = tl.zeros((BLOCK_SIZE,), dtype)
    for start in tl.range(0, V, BLOCK_SIZE):
        cols = start + tl.arange(0, BLOCK_SIZE)
        mask = cols < V
        z, _ = logit_and_slope(load_product(row_ptr, bias_ptr, cols, mask, dtype), gain_in, gain_out, SOFTCAP)
        y, _ = logit_and_slope(
            load_product(ref_row_ptr, ref_bias_ptr, cols, mask, dtype), ref_gain_in, ref_gain_out, REF_SOFTCAP
        )
        largest, lane_sum = running_sum(tl.where(mask, z, float("-inf")), largest, lane_sum)
        ref_largest, ref_lane_sum = running_sum(tl.where(mask, y, float("-inf")), ref_largest, ref_lane_sum)
    log_sum = tl.log(tl.sum(lane_sum, 0))
    ref_log_sum = tl.log(tl.sum(ref_lane_sum, 0))

    lane_share = tl.zeros((BLOCK_SIZE,), dtype)
    lane_centre = tl.zeros((BLOCK_SIZE,), dtype)
    for start in tl.range(0, V, BLOCK_SIZE):
        cols = start + tl.arange(0, BLOCK_SIZE)
        mask = cols < V
        z, _ = logit_and_slope(load_product(row_ptr, bias_ptr, cols, mask, dtype), gain_in, gain_out, SOFTCAP)
        y, _ = logit_and_slope(
            load_product(ref_row_ptr, ref_bias_ptr, cols, mask, dtype), ref_gain_in, ref_gain_out, REF_SOFTCAP
        )
        share, centre = share_and_centre((z - largest) - log_sum, (y - ref_largest) - ref_log_sum, beta, rest, KIND)
        lane_share += tl.where(mask, share, 0.0)
        lane_centre += tl.where(mask, centre, 0.0)
    divergence = tl.sum(lane_share, 0)
    tl.store(divergence_ptr + row, divergence)

    if out_ptr is not None:
        mean = tl.sum(lane_centre, 0)
        weight = tl.load(weight_ptr + row)
        out_row_ptr = out_ptr + row * out_stride
        for start in tl.range(0, V, BLOCK_SIZE):
            cols = start + tl.arange(0, BLOCK_SIZE)
            mask = cols < V
            z, slope = logit_and_slope(load_product(row_ptr, bias_ptr, cols, mask, dtype), gain_in, gain_out, SOFTCAP)
            y, _ = logit_and_slope(
                load_product(ref_row_ptr, ref_bias_ptr, cols, mask, dtype), ref_gain_in, ref_gain_out, REF_SOFTCAP
            )
            grad = gradient_of((z - largest) - log_sum, (y - ref_largest) - ref_log_sum, mean, beta, rest, KIND)
            tl.store(out_row_ptr + cols, (grad * slope * weight).to(out_ptr.dtype.element_ty), mask=mask)


def divergence_rows(
    tile: Tensor,  # (n, V)
    ref_tile: Tensor,  # (n, V)
    kind: str,
    beta: float,
    transform: LogitTransform,
    ref_transform: LogitTransform,
    bias: Tensor | None,  # (V,)
    ref_bias: Tensor | None,  # (V,)
    token_weight: Tensor | None = None,  # (n,)
    out: Tensor | None = None,  # (n, V)
    config: RowConfig | None = None,
) -> Tensor:
    """Divergence of each row of logits from the teacher's; `out` receives its gradient in the raw products, weighted.

    Eager equivalent of kind "reverse_kl": `lp, lq = transform(tile + bias).log_softmax(-1), ...`, then
    `(lp.exp() * (lp - lq)).sum(-1)`; see `fastrl_kernels.linear_divergence` for the kinds.

    Args:
        tile, ref_tile: (n, V) raw products of one dtype (fp32, bf16, fp16, fp64), any row stride.
        kind, beta: as `reference.divergence` takes them.
        transform, ref_transform, bias, ref_bias: from raw products to logits, of each.
        token_weight: (n,), the upstream gradient of each row, given with out.
        out: (n, V) of any supported dtype; may be `tile` itself.
        config: a launch configuration; None takes the tuned one, or the table's.

    Returns:
        (n,) in fp32 (fp64 for fp64 tiles).

    Raises:
        TypeError, ValueError: a dtype, shape, device or layout other than the above.
        RuntimeError: CPU tensors outside Triton's interpreter.
    """
    check_tile("tile", tile)
    n, vocabulary = tile.shape
    device, dtype = tile.device, accumulation_dtype(tile.dtype)
    if (out is None) != (token_weight is None):
        raise ValueError("token_weight and out must be given together or not at all")
    for name, x in (("ref_tile", ref_tile), ("out", out)):
        if x is None:
            continue
        check_tile(name, x, written=name == "out")
        if x.shape != tile.shape or x.device != device:
            raise ValueError(f"{name} must be {tuple(tile.shape)} on {device}, got {tuple(x.shape)} on {x.device}")
    if ref_tile.dtype != tile.dtype:
        raise TypeError(f"ref_tile must be {tile.dtype} as tile is, got {ref_tile.dtype}")
    bias_ = vector("bias", bias, vocabulary, device, dtype)
    ref_bias_ = vector("ref_bias", ref_bias, vocabulary, device, dtype)
    weight = vector("token_weight", token_weight, n, device, dtype)
    divergence = torch.empty(n, dtype=dtype, device=device)
    if n == 0:
        return divergence
    with launch_device(divergence_rows_kernel, tile, "tile"):
        if config is None:
            rows = slice(0, min(n, MEASURED_ROWS))

            def measure(config: RowConfig) -> float:
                # Into a tile of its own: what is measured may be in place, and runs many times.
                weights, scratch = None, None
                if out is not None and token_weight is not None:
                    weights, scratch = token_weight[rows], torch.empty_like(out[rows])
                operands = (tile[rows], ref_tile[rows], kind, beta, transform, ref_transform, bias, ref_bias)
                arguments: Any = (*operands, weights, scratch, config)
                return seconds(lambda: divergence_rows(*arguments), device)

            candidates = divergence_candidates(vocabulary, tile.dtype)
            written = "none" if out is None else dtype_name(out.dtype)
            config = tuning.tuned(
                "divergence_rows",
                f"{row_key(tile)} {kind} to {written} softcap={transform.softcap is not None}",
                candidates,
                measure,
                candidates[0],
            )
        divergence_rows_kernel[(n,)](
            tile,
            ref_tile,
            bias_,
            ref_bias_,
            divergence,
            weight,
            out,
            vocabulary,
            tile.stride(0),
            ref_tile.stride(0),
            0 if out is None else out.stride(0),
            *transform_scales(transform),
            *transform_scales(ref_transform),
            beta,
            KIND=kind,
            SOFTCAP=transform.softcap is not None,
            REF_SOFTCAP=ref_transform.softcap is not None,
            BLOCK_SIZE=config.block_size,
            num_warps=config.num_warps,
            maxnreg=128,  # what 16 warps may have: left to itself, ptxas spills a few bytes to fit more programs
            # The logits must come out alike in all three passes, or the probabilities do not add up to one.
            enable_fp_fusion=False,
        )
    return divergence
