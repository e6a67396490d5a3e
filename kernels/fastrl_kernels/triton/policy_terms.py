"""A clipped policy objective on given log-probabilities: terms, gradients and the sums behind its metrics, one launch.

A program has one row of tokens. Ties at a clip bound, infinities and NaN come out as autograd leaves them.
"""

# An annotation on a kernel argument would be its Triton type.
# mypy: allow-untyped-defs

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastrl_kernels.objective import PolicySpec, PolicyTerms, TermSums, TokenBatch
from fastrl_kernels.triton.launch import launch_device
from fastrl_kernels.triton.tokens import matrix, token_config


@triton.jit
def _load(ptr, row, T, cols, inside, keep, PER_ROW: tl.constexpr = False):
    """A vector at the tokens `keep`, 0 elsewhere; PER_ROW: one value for the whole row.

    All of the row is read, in 16-byte accesses, which a mask that comes from memory would forbid.
    """
    if PER_ROW:
        x = tl.load(ptr + row)
    else:
        x = tl.load(ptr + row * T + cols, mask=inside, other=0.0)
    return tl.where(keep, x, 0.0)


@triton.jit
def _scored(ptr, row, T, cols, inside):
    keep = inside
    if ptr is not None:
        keep = tl.load(ptr + row * T + cols, mask=inside, other=0) != 0
    return keep


@triton.jit
def _log_ratio(logps, old_ptr, row, T, cols, inside, keep):
    old_logps = logps  # so the ratio is 1, and NaN where logps is not finite
    if old_ptr is not None:
        old_logps = _load(old_ptr, row, T, cols, inside, keep)
    return logps - old_logps


@triton.jit
def _kl_and_slope(logps, ref_logps, factor, ESTIMATOR: tl.constexpr):
    """The KL estimate, and its derivative in logps times `factor`."""
    d = tl.where(ref_logps == logps, 0.0, ref_logps - logps)  # of two -inf too: neither policy can take this token
    if ESTIMATOR == "k1":
        kl, slope = -d, tl.where((d == 0.0) & (logps == float("-inf")), 0.0, factor)
    elif ESTIMATOR == "k2":
        kl, slope = 0.5 * d * d, tl.where(tl.abs(d) == float("inf"), 0.0, -d * factor)
    else:
        e = tl.exp(d)
        kl = tl.where(d == float("inf"), d, e - d - 1.0)
        slope = tl.where(d == float("inf"), 0.0, factor - factor * e)  # an infinite ratio leaves NaN, as in autograd
    return kl, slope


@triton.jit
def policy_terms_kernel(
    logps_ptr,  # (B, T)
    entropy_ptr,  # (B, T) or None
    advantages_ptr,  # (B, T) or (B,)
    old_logps_ptr,  # (B, T) or None: logps
    ref_logps_ptr,  # (B, T), None without a KL term
    gate_ptr,  # (B, T), (B,) or None
    scored_ptr,  # (B, T) uint8 or None: all; elsewhere nothing is used and the outputs are 0
    mask_ptr,  # (B, T) uint8 or None: scored
    live_ptr,  # (B, T) uint8 or None: scored
    weight_ptr,  # (B, T)
    entropy_weight_ptr,  # (B, T) or None
    terms_ptr,  # (B, T) or None, as are the two gradients
    grad_logps_ptr,
    grad_entropy_ptr,
    sums_ptr,  # (B, 9) fp64 or None
    T,
    low_: tl.float64,
    high_: tl.float64,
    delta_: tl.float64,
    beta_: tl.float64,
    ROW_ADVANTAGES: tl.constexpr,
    ROW_GATE: tl.constexpr,
    KL: tl.constexpr,  # estimator, or "" for none
    KL_TIMES_RATIO: tl.constexpr,
    SEQUENCE: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    dtype: tl.constexpr = logps_ptr.dtype.element_ty
    low, high, delta = tl.full((), low_, dtype), tl.full((), high_, dtype), tl.full((), delta_, dtype)
    beta = tl.full((), beta_, dtype)
    zeros = tl.zeros((BLOCK_SIZE,), dtype)
    # Where neither sums nor a sequence's ratio join a row's blocks, each block is a program of its own.
    first, step = tl.program_id(1) * BLOCK_SIZE, tl.num_programs(1) * BLOCK_SIZE

    if SEQUENCE:
        total = zeros
        kept = tl.zeros((BLOCK_SIZE,), tl.int32)
        for start in range(0, T, BLOCK_SIZE):
            cols = start + tl.arange(0, BLOCK_SIZE)
            inside = cols < T
            keep = _scored(scored_ptr, row, T, cols, inside)
            logps = _load(logps_ptr, row, T, cols, inside, keep)
            total += _log_ratio(logps, old_logps_ptr, row, T, cols, inside, keep)
            kept += keep.to(tl.int32)
        count = tl.maximum(tl.sum(kept, 0), 1).to(dtype)
        row_ratio = tl.exp(tl.sum(total, 0) / count)
        slopes = zeros

    policy, bonus, kl_sum, entropy_sum = zeros, zeros, zeros, zeros
    scored = tl.zeros((BLOCK_SIZE,), tl.int32)
    counted, live, clipped_low, clipped_high = scored, scored, scored, scored
    for start in range(first, T, step):
        cols = start + tl.arange(0, BLOCK_SIZE)
        inside = cols < T
        keep = _scored(scored_ptr, row, T, cols, inside)
        logps = _load(logps_ptr, row, T, cols, inside, keep)
        weight = _load(weight_ptr, row, T, cols, inside, keep)
        advantage = _load(advantages_ptr, row, T, cols, inside, keep, ROW_ADVANTAGES)
        if SEQUENCE:
            ratio = zeros + row_ratio
        else:
            ratio = tl.exp(_log_ratio(logps, old_logps_ptr, row, T, cols, inside, keep))
        # Comparisons, since tl.minimum and tl.maximum may drop a NaN.
        bounded = tl.where(ratio > delta, delta, ratio)
        clipped = tl.where(ratio < low, low, tl.where(ratio > high, high, ratio))
        one, two = bounded * advantage, clipped * advantage
        least = tl.where((one < two) | (one != one), one, two)
        # d least / d ratio: a tie of the minimum is shared, and a bound itself is not clipped.
        share_one = tl.where(one == two, 0.5, tl.where(one > two, 0.0, 1.0)).to(dtype)
        share_two = tl.where(one == two, 0.5, tl.where(one < two, 0.0, 1.0)).to(dtype)
        slope = tl.where(ratio <= delta, share_one * advantage, 0.0)
        slope += tl.where((ratio >= low) & (ratio <= high), share_two * advantage, 0.0)
        loss, grad_ratio, grad_own = -least, -slope, zeros
        if gate_ptr is not None:
            gate = _load(gate_ptr, row, T, cols, inside, keep, ROW_GATE)
            loss, grad_ratio = loss * gate, grad_ratio * gate
        if KL != "":
            ref_logps = _load(ref_logps_ptr, row, T, cols, inside, keep)
            factor = ratio if KL_TIMES_RATIO else zeros + 1.0
            kl, kl_slope = _kl_and_slope(logps, ref_logps, factor, KL)
            if KL_TIMES_RATIO:
                grad_ratio += beta * kl
                kl = kl * ratio
            loss += beta * kl
            grad_own = beta * kl_slope
            kl_sum += tl.where(keep, kl, 0.0)
        term = tl.where(keep, loss * weight, 0.0)
        policy += term
        if entropy_ptr is not None:
            entropy = _load(entropy_ptr, row, T, cols, inside, keep)
            entropy_sum += entropy
            if entropy_weight_ptr is not None:
                entropy_weight = _load(entropy_weight_ptr, row, T, cols, inside, keep)
                extra = tl.where(keep, entropy_weight * entropy, 0.0)
                bonus += extra
                term -= extra
                if grad_entropy_ptr is not None:
                    tl.store(grad_entropy_ptr + row * T + cols, -entropy_weight, mask=inside)
        if terms_ptr is not None:
            tl.store(terms_ptr + row * T + cols, term, mask=inside)
        if SEQUENCE:
            slopes += tl.where(keep, weight * grad_ratio, 0.0)
        elif grad_logps_ptr is not None:
            grad = tl.where(keep, weight * (grad_ratio * ratio + grad_own), 0.0)
            tl.store(grad_logps_ptr + row * T + cols, grad, mask=inside)
        if sums_ptr is not None:
            scored += keep.to(tl.int32)
            clipped_low += (keep & (bounded < low) & (advantage < 0)).to(tl.int32)
            clipped_high += (keep & (bounded > high) & (advantage > 0)).to(tl.int32)
            if mask_ptr is not None:
                counted += (tl.load(mask_ptr + row * T + cols, mask=inside, other=0) != 0).to(tl.int32)
            if live_ptr is not None:
                live += (tl.load(live_ptr + row * T + cols, mask=inside, other=0) != 0).to(tl.int32)

    if SEQUENCE and grad_logps_ptr is not None:
        share = tl.sum(slopes, 0) * row_ratio / count
        for start in range(0, T, BLOCK_SIZE):
            cols = start + tl.arange(0, BLOCK_SIZE)
            inside = cols < T
            keep = _scored(scored_ptr, row, T, cols, inside)
            grad = zeros + share
            if KL != "":
                logps = _load(logps_ptr, row, T, cols, inside, keep)
                ref_logps = _load(ref_logps_ptr, row, T, cols, inside, keep)
                weight = _load(weight_ptr, row, T, cols, inside, keep)
                factor = zeros + (row_ratio if KL_TIMES_RATIO else 1.0)
                _, kl_slope = _kl_and_slope(logps, ref_logps, factor, KL)
                grad += weight * (beta * kl_slope)
            tl.store(grad_logps_ptr + row * T + cols, tl.where(keep, grad, 0.0), mask=inside)

    if sums_ptr is not None:
        sums_ptr += row * 9
        low_count, high_count = tl.sum(clipped_low, 0), tl.sum(clipped_high, 0)
        if SEQUENCE and ROW_ADVANTAGES:  # one ratio and one advantage: the sequence is clipped, not its tokens
            row_bounded = tl.where(row_ratio > delta, delta, row_ratio)
            row_advantage = tl.load(advantages_ptr + row)
            low_count = ((row_bounded < low) & (row_advantage < 0)).to(tl.int32)
            high_count = ((row_bounded > high) & (row_advantage > 0)).to(tl.int32)
        scored_count = tl.sum(scored, 0)
        tl.store(sums_ptr, tl.sum(policy, 0).to(tl.float64))
        tl.store(sums_ptr + 1, tl.sum(bonus, 0).to(tl.float64))
        tl.store(sums_ptr + 2, tl.sum(kl_sum, 0).to(tl.float64))
        tl.store(sums_ptr + 3, tl.sum(entropy_sum, 0).to(tl.float64))
        tl.store(sums_ptr + 4, scored_count.to(tl.float64))
        tl.store(sums_ptr + 5, (tl.sum(counted, 0) if mask_ptr is not None else scored_count).to(tl.float64))
        tl.store(sums_ptr + 6, (tl.sum(live, 0) if live_ptr is not None else scored_count).to(tl.float64))
        tl.store(sums_ptr + 7, low_count.to(tl.float64))
        tl.store(sums_ptr + 8, high_count.to(tl.float64))


def policy_terms(
    spec: PolicySpec,
    tokens: TokenBatch,  # (B, T)
    token_weight: Tensor,  # (B, T)
    entropy_weight: Tensor | None,  # (B, T)
    mask: Tensor | None = None,  # (B, T) bool
    live: Tensor | None = None,  # (B, T) bool
    *,
    terms: bool = True,
    gradients: bool = True,
    sums: bool = True,
) -> PolicyTerms:
    """Loss terms of (B, T) tokens, their gradients and the sums of each row; see `objective.PolicyTerms`.

    Args:
        spec: the objective's numbers.
        tokens: fp32 or fp64 vectors; advantages and gate may be (B, 1). Where its mask is False nothing is used.
        token_weight, entropy_weight: of each token's loss, and of its entropy in the bonus.
        mask, live: counted only; None: the tokens' mask.
        terms, gradients, sums: what to compute.

    Raises:
        TypeError, ValueError: a dtype, shape or device other than the above, or no ref_logps with a KL term.
        RuntimeError: CPU tensors outside Triton's interpreter.
    """
    logps = tokens.logps
    dtype = logps.dtype
    if dtype not in (torch.float32, torch.float64):
        raise TypeError(f"logps must be fp32 or fp64, got {dtype}")
    if logps.dim() != 2:
        raise ValueError(f"logps must have shape (B, T), got {tuple(logps.shape)}")
    if spec.beta != 0 and tokens.ref_logps is None:
        raise ValueError(f"ref_logps: needed with beta = {spec.beta}")
    advantages = matrix("advantages", tokens.advantages, logps, dtype, per_row=True)
    gate = matrix("gate", tokens.gate, logps, dtype, per_row=True)
    vectors = {"logps": logps, "entropy": tokens.entropy, "old_logps": tokens.old_logps, "ref_logps": tokens.ref_logps}
    vectors |= {"token_weight": token_weight, "entropy_weight": entropy_weight}
    given = {name: matrix(name, x, logps, dtype) for name, x in vectors.items()}
    masks = {"mask of the tokens": tokens.mask, "mask": mask, "live": live}

    def empty(wanted: bool) -> Tensor | None:
        return torch.empty(logps.shape, dtype=dtype, device=logps.device) if wanted else None

    made = PolicyTerms(
        empty(terms),
        empty(gradients),
        empty(gradients and entropy_weight is not None),
        logps.new_zeros(logps.shape[0], len(TermSums._fields), dtype=torch.float64) if sums else None,
    )
    rows, length = logps.shape
    if logps.numel() == 0:
        return made
    config = token_config(length, dtype)
    programs = 1 if sums or spec.sequence else triton.cdiv(length, config.block_size)
    with launch_device(policy_terms_kernel, logps, "logps"):
        policy_terms_kernel[(rows, programs)](
            given["logps"],
            given["entropy"],
            advantages,
            given["old_logps"],
            given["ref_logps"] if spec.beta != 0 else None,
            gate,
            *(matrix(name, x, logps, torch.bool) for name, x in masks.items()),
            given["token_weight"],
            given["entropy_weight"],
            *made,
            length,
            spec.low,
            spec.high,
            spec.delta,
            spec.beta,
            ROW_ADVANTAGES=advantages.shape[1] == 1,  # type: ignore[union-attr]
            ROW_GATE=gate is not None and gate.shape[1] == 1,
            KL=spec.kl_estimator if spec.beta != 0 else "",
            KL_TIMES_RATIO=spec.kl_times_ratio,
            SEQUENCE=spec.sequence,
            BLOCK_SIZE=config.block_size,
            num_warps=config.num_warps,
            enable_fp_fusion=False,
        )
    return made
