"""From a raw product to a logit, inside a kernel: bias, scale, softcap, temperature, in the order of `LogitTransform`.

Two multipliers describe the whole chain, so that a kernel needs no division per element:
    no softcap:  z = (x + bias) * scale_in
    softcap:     z = tanh((x + bias) * scale_in) * scale_out
"""

# An annotation on a kernel argument would be its Triton type.
# mypy: allow-untyped-defs

from __future__ import annotations

import triton
import triton.language as tl

from fastrl_kernels.head import LogitTransform


def transform_scales(transform: LogitTransform) -> tuple[float, float]:
    """`(scale_in, scale_out)` of a transform. Kernels take them in fp64 and round once to the accumulation dtype."""
    if transform.softcap is None:
        return transform.logit_scale / transform.temperature, 1.0
    return transform.logit_scale / transform.softcap, transform.softcap / transform.temperature


@triton.jit
def tanh_and_slope(u):
    """tanh(u) and 1 - tanh(u)^2 from one exponential, which needs no libdevice (the interpreter has none)."""
    w = tl.exp(-2.0 * tl.abs(u))
    inverse = 1.0 / (1.0 + w)
    t = (1.0 - w) * inverse
    t = tl.where(u < 0, -t, t)
    slope = 4.0 * w * inverse * inverse  # not 1 - t * t, which cancels near the cap
    if u.dtype == tl.float32:
        # 1 - w cancels for a small u, where most softcapped logits lie: the odd series is exact to fp32 there.
        q = u * u
        series = u * (1.0 + q * (-1.0 / 3.0 + q * (2.0 / 15.0 + q * (-17.0 / 315.0 + q * (62.0 / 2835.0)))))
        t = tl.where(tl.abs(u) < 0.25, series, t)
    return t, slope


@triton.jit
def logit_and_slope(x, scale_in, scale_out, SOFTCAP: tl.constexpr):
    """z and dz/dx for a raw product x that already includes the bias; all in the accumulation dtype."""
    if SOFTCAP:
        t, slope = tanh_and_slope(x * scale_in)
        return t * scale_out, slope * (scale_in * scale_out)
    else:
        return x * scale_in, scale_in


@triton.jit
def load_product(row_ptr, bias_ptr, cols, mask, dtype: tl.constexpr):
    """Raw products of one row at `cols` plus bias, in `dtype`; 0 where masked.

    Padding becomes -inf only as a logit, in the caller: the softcap of -inf is finite.
    """
    x = tl.load(row_ptr + cols, mask=mask, other=0.0).to(dtype)
    if bias_ptr is not None:
        x += tl.load(bias_ptr + cols, mask=mask, other=0.0).to(dtype)
    return x
