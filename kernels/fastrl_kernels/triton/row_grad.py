"""Gradient of the row statistics with respect to the raw products, a tile of logits to a tile of gradients.

May write over its own input, one block at a time, and may move rows while it does; it never builds the probabilities.
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
    row_config,
    row_grad_candidates,
    row_key,
    seconds,
    vector,
)
from fastrl_kernels.triton.transform import load_product, logit_and_slope, transform_scales

MEASURED_ROWS = 512  # enough to fill any GPU


@triton.jit
def row_grad_bwd_kernel(
    tile_ptr,  # (n, V) raw products
    out_ptr,  # (r, V) gradients; may be tile_ptr
    ids_ptr,  # (n,) int64
    bias_ptr,  # (V,) or None
    row_max_ptr,  # (n,) accumulation dtype, as are the five below
    log_sum_ptr,  # (n,)
    mean_ptr,  # (n,) or None
    grad_logps_ptr,  # (n,) or None
    grad_entropy_ptr,  # (n,) or None
    grad_lse_ptr,  # (n,) or None
    source_ptr,  # (k,) int64 or None
    target_ptr,  # (k,) int64 or None
    V,
    tile_stride,
    out_stride,
    scale_in: tl.float64,
    scale_out: tl.float64,
    SOFTCAP: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
):
    source = tl.program_id(0).to(tl.int64)
    target = source
    if source_ptr is not None:
        target = tl.load(target_ptr + source)
        source = tl.load(source_ptr + source)
    dtype: tl.constexpr = row_max_ptr.dtype.element_ty
    gain_in = tl.full((), scale_in, dtype)
    gain_out = tl.full((), scale_out, dtype)

    cols = tl.program_id(1) * BLOCK_SIZE + tl.arange(0, BLOCK_SIZE)
    mask = cols < V
    x = load_product(tile_ptr + source * tile_stride, bias_ptr, cols, mask, dtype)
    z, slope = logit_and_slope(x, gain_in, gain_out, SOFTCAP)

    shifted = z - tl.load(row_max_ptr + source)
    # p is exactly 0 far above this floor in every dtype; without it p * log p is 0 * -inf. That tl.maximum drops a NaN
    # does not matter: the row's log_sum is NaN then.
    shifted = tl.maximum(shifted, -1e4)
    p = tl.exp(shifted - tl.load(log_sum_ptr + source))
    factor = tl.zeros((), dtype)
    if grad_lse_ptr is not None:
        factor += tl.load(grad_lse_ptr + source)
    if grad_logps_ptr is not None:
        grad_logp = tl.load(grad_logps_ptr + source)
        factor -= grad_logp
    if grad_entropy_ptr is not None:
        grad = p * (factor - tl.load(grad_entropy_ptr + source) * (shifted - tl.load(mean_ptr + source)))
    else:
        grad = p * factor
    if grad_logps_ptr is not None:
        token = tl.load(ids_ptr + source).to(tl.int32)  # -1 stays -1 and matches no column
        grad = tl.where(cols == token, grad + grad_logp, grad)
    grad = grad * slope
    tl.store(out_ptr + target * out_stride + cols, grad.to(out_ptr.dtype.element_ty), mask=mask)


def row_grad(
    tile: Tensor,  # (n, V)
    out: Tensor,  # (r, V)
    ids: Tensor,  # (n,)
    transform: LogitTransform,
    bias: Tensor | None,  # (V,)
    row_max: Tensor,  # (n,)
    log_sum: Tensor,  # (n,)
    mean: Tensor | None,  # (n,)
    grad_logps: Tensor | None,  # (n,)
    grad_entropy: Tensor | None,  # (n,)
    grad_lse: Tensor | None,  # (n,)
    source: Tensor | None = None,  # (k,)
    target: Tensor | None = None,  # (k,)
    config: RowConfig | None = None,
) -> None:
    """Writes `out[target[i]] = d(loss)/d(tile[source[i]])` for k rows, given the gradients of the row statistics.

    With p the softmax of a row's logits and g_* its upstream gradients:
    `g_logp * (onehot(id) - p) - g_H * p * (log p + H) + g_lse * p`, times d(logit)/d(product); p log p is 0 at p = 0.

    Args:
        tile: (n, V) raw products, as `row_stats` took them.
        out: (r, V) of any supported dtype; may be `tile` itself (then every target is its own source, or a row that
            nothing reads). Without source and target, r = n.
        ids: (n,) int64; -1: no one-hot term.
        transform, bias: as given to `row_stats`.
        row_max, log_sum, mean: (n,) from `row_stats`; mean is needed exactly when grad_entropy is given.
        grad_logps, grad_entropy, grad_lse: (n,) upstream gradients in the accumulation dtype, or None for zero.
        source, target: (k,) int64 row numbers, within range (not checked: that would wait for the GPU), or both None.
        config: a launch configuration; None takes the tuned one, or the table's.

    Raises:
        TypeError, ValueError: a dtype, shape, device or layout other than the above.
        RuntimeError: CPU tensors outside Triton's interpreter.
    """
    check_tile("tile", tile)
    check_tile("out", out, written=True)
    n, vocabulary = tile.shape
    device, dtype = tile.device, accumulation_dtype(tile.dtype)
    if out.shape[1] != vocabulary or out.device != device:
        raise ValueError(f"out must be (rows, {vocabulary}) on {device}, got {tuple(out.shape)} on {out.device}")
    if grad_entropy is not None and mean is None:
        raise ValueError("grad_entropy needs mean, the rows' mean logits from row_stats; got None")
    if (source is None) != (target is None):
        raise ValueError("source and target must be given together or not at all")
    if source is None and out.shape[0] != n:
        raise ValueError(f"out must have tile's {n} rows when no source and target are given, got {out.shape[0]}")
    k = n if source is None else source.shape[0]
    if k == 0:
        return
    vectors = [
        vector("ids", ids, n, device, torch.int64),
        vector("bias", bias, vocabulary, device, dtype),
        vector("row_max", row_max, n, device, dtype),
        vector("log_sum", log_sum, n, device, dtype),
        vector("mean", mean if grad_entropy is not None else None, n, device, dtype),
        vector("grad_logps", grad_logps, n, device, dtype),
        vector("grad_entropy", grad_entropy, n, device, dtype),
        vector("grad_lse", grad_lse, n, device, dtype),
        vector("source", source, k, device, torch.int64),
        vector("target", target, k, device, torch.int64),
    ]
    scale_in, scale_out = transform_scales(transform)
    with launch_device(row_grad_bwd_kernel, tile, "tile"):
        if config is None:
            rows = slice(0, min(n, MEASURED_ROWS))
            per_row = [None if x is None else x[rows] for x in vectors[2:8]]

            def measure(config: RowConfig) -> float:
                # On copies: what is measured may be in place, and runs many times.
                tile_ = torch.empty_strided(tile[rows].shape, tile.stride(), dtype=tile.dtype, device=device)
                tile_.copy_(tile[rows])
                in_place = out.data_ptr() == tile.data_ptr()
                out_ = (
                    tile_
                    if in_place
                    else torch.empty_strided(tile_.shape, out.stride(), dtype=out.dtype, device=device)
                )
                arguments: Any = (tile_, out_, ids[rows], transform, bias, *per_row, None, None, config)
                return seconds(lambda: row_grad(*arguments), device)

            config = tuning.tuned(
                "row_grad",
                f"{row_key(tile)} to {dtype_name(out.dtype)} softcap={transform.softcap is not None} "
                f"entropy={grad_entropy is not None}",
                row_grad_candidates(vocabulary, tile.dtype),
                measure,
                row_config(vocabulary, tile.dtype),
            )
        row_grad_bwd_kernel[(k, triton.cdiv(vocabulary, config.block_size))](
            tile,
            out,
            *vectors,
            vocabulary,
            tile.stride(0),
            out.stride(0),
            scale_in,
            scale_out,
            SOFTCAP=transform.softcap is not None,
            BLOCK_SIZE=config.block_size,
            num_warps=config.num_warps,
            # The logits must come out as in row_stats, to the bit, or the probabilities do not add up to one.
            enable_fp_fusion=False,
        )
