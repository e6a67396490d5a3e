"""The C++ backend, on torch's number of threads: the kernels of `fastrl_kernels._C` on CPU tensors."""

from __future__ import annotations

import ctypes
import functools
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor

from . import _C  # type: ignore[attr-defined]
from .head import LogitTransform
from .native import NativeKernels, matrix, pointer, vector
from .objective import (
    LEVELS,
    SURROGATES,
    PolicySpec,
    PolicyTerms,
    SurrogateSpec,
    SurrogateTerms,
    TermSums,
    TokenBatch,
)

_ESTIMATORS = {"k1": 1, "k2": 2, "k3": 3}
_DIVERGENCES = {"forward_kl": 0, "reverse_kl": 1, "jsd": 2}


@functools.cache
def torch_openmp() -> int:
    """Address of GOMP_parallel in the OpenMP runtime that torch has loaded (GNU's, LLVM's and Intel's have one), or 0.

    Only one that lies in torch's own folder, or is the only one of the process: two runtimes would make two pools.
    """
    try:
        lines = Path("/proc/self/maps").read_text().splitlines()
    except OSError:  # not Linux
        return 0
    found = {line.split(maxsplit=5)[-1] for line in lines if re.search(r"/lib(gomp|omp|iomp5)[^/]*\.so[^/]*$", line)}
    runtimes = [path for path in found if Path(torch.__file__).parent in Path(path).parents] or list(found)
    if len(runtimes) != 1 or not torch.backends.openmp.is_available():
        return 0
    try:
        return ctypes.cast(ctypes.CDLL(runtimes[0]).GOMP_parallel, ctypes.c_void_p).value or 0
    except (OSError, AttributeError):
        return 0


if _openmp := torch_openmp():
    _C.use_openmp(_openmp)
    # A pool does not survive a fork, and waiting for its threads would never end.
    os.register_at_fork(after_in_child=lambda: _C.use_openmp(0))


@contextmanager
def _threads(device: torch.device) -> Iterator[int]:
    yield torch.get_num_threads()


_native = NativeKernels(_C, "cpu", _threads, mixed_outputs=False)
row_stats = _native.row_stats
row_grad = _native.row_grad
group_advantages = _native.group_advantages
gae = _native.gae


def policy_terms(
    spec: PolicySpec,
    tokens: TokenBatch,
    token_weight: Tensor,
    entropy_weight: Tensor | None,
    mask: Tensor | None = None,
    live: Tensor | None = None,
    *,
    terms: bool = True,
    gradients: bool = True,
    sums: bool = True,
) -> PolicyTerms:
    """Loss terms of (B, T) tokens, their gradients and the sums of each row; see `objective.PolicyTerms`."""
    shape, dtype, device = tokens.logps.shape, tokens.logps.dtype, tokens.logps.device
    if device.type != "cpu" or len(shape) != 2 or dtype not in (torch.float32, torch.float64):
        raise ValueError(f"logps: expected a CPU tensor (B, T) of fp32 or fp64, got {dtype} {tuple(shape)} on {device}")
    if spec.beta != 0 and tokens.ref_logps is None:
        raise ValueError(f"ref_logps: needed with beta = {spec.beta}")
    rows, cols = shape
    per_row = ("advantages", "gate")
    vectors = ("logps", "entropy", "advantages", "old_logps", "ref_logps", "gate")
    given = {k: matrix(k, getattr(tokens, k), shape, dtype, device, k in per_row) for k in vectors}
    weights = [matrix("token_weight", token_weight, shape, dtype, device)]
    weights += [matrix("entropy_weight", entropy_weight, shape, dtype, device)]
    names = ("mask of the tokens", "mask", "live")
    masks = [matrix(k, x, shape, torch.bool, device) for k, x in zip(names, (tokens.mask, mask, live), strict=True)]
    spread = {k: x is not None and x.shape[1] == 1 for k, x in given.items()}
    made = PolicyTerms(
        torch.empty(shape, dtype=dtype) if terms else None,
        torch.empty(shape, dtype=dtype) if gradients else None,
        torch.empty(shape, dtype=dtype) if gradients and entropy_weight is not None else None,
        torch.empty(rows, len(TermSums._fields), dtype=torch.float64) if sums else None,
    )
    _C.policy_terms(
        dtype == torch.float64, rows, cols, pointer(given["logps"]), pointer(given["entropy"]),
        pointer(given["advantages"]), spread["advantages"], pointer(given["old_logps"]), pointer(given["ref_logps"]),
        pointer(given["gate"]), spread["gate"], *(pointer(x) for x in (*masks, *weights)),
        spec.low, spec.high, spec.delta, spec.beta, _ESTIMATORS[spec.kl_estimator] if spec.beta != 0 else 0,
        spec.kl_times_ratio, spec.sequence, *(pointer(x) for x in made), torch.get_num_threads(),
    )  # fmt: skip
    return made


def surrogate_terms(
    spec: SurrogateSpec,
    tokens: TokenBatch,
    row_weight: Tensor,
    mask: Tensor,
    live: Tensor | None,
    *,
    gradients: bool,
) -> SurrogateTerms:
    """Loss, metrics and gradient in logps of (B, T) tokens; see `objective.SurrogateTerms`.

    row_weight: (B, 1), of each token's loss. live: (B, T) bool; None: what `spec.moved` says.
    """
    shape, dtype, device = tokens.logps.shape, tokens.logps.dtype, tokens.logps.device

    def vector(name: str, x: Tensor | None) -> Tensor | None:
        return matrix(name, x, shape, dtype, device)

    def spread(name: str, x: Tensor | None) -> tuple[Tensor | None, bool]:
        x = matrix(name, x, shape, dtype, device, per_row=True)
        return x, x is not None and x.shape[1] == 1

    def flags(name: str, x: Tensor | None) -> Tensor | None:
        return matrix(name, x, shape, torch.bool, device)

    logps, entropy, old = vector("logps", tokens.logps), vector("entropy", tokens.entropy), tokens.old_logps
    old = vector("old_logps", old)
    advantages, row_advantages = spread("advantages", tokens.advantages)
    gate, row_gate = spread("gate", tokens.gate)
    mismatch, row_mismatch = spread("importance_ratio", tokens.importance_ratio)
    weight = matrix("row_weight", row_weight, torch.Size((shape[0], 1)), dtype, device)
    scored = flags("mask of the tokens", tokens.mask)
    counted = scored if mask is tokens.mask else flags("mask", mask)
    live, selected = flags("live", live), flags("selected", tokens.selected)
    grad = torch.empty(shape, dtype=dtype) if gradients else None
    scored_logps = torch.empty(shape, dtype=dtype)
    totals = _C.surrogate_terms(
        dtype == torch.float64, *shape, pointer(logps), pointer(entropy), pointer(advantages), row_advantages,
        pointer(old), pointer(gate), row_gate, pointer(mismatch), row_mismatch, pointer(scored), pointer(counted),
        pointer(live), pointer(selected), pointer(weight), spec.moved, SURROGATES.index(spec.surrogate),
        LEVELS.index(spec.level), spec.low, spec.high, spec.cap, *spec.log_bounds, *spec.temperatures, spec.coef,
        *spec.gammas, spec.length_eps, spec.reads_padding, pointer(grad), pointer(scored_logps),
        torch.get_num_threads(),
    )  # fmt: skip
    return SurrogateTerms(totals, grad, scored_logps)


def covariances(
    tokens: TokenBatch, ratio_bounds: tuple[float, float], bounds: tuple[float, float] | None
) -> tuple[Tensor, int]:
    """`(A - mean A)(logps - mean logps)` of (B, T) tokens over those of the mask that are finite; -inf elsewhere.

    With bounds instead the tokens, bool, whose covariance is within them and whose ratio is not clipped to
    ratio_bounds; and their number (0 without bounds).
    """
    shape, dtype, device = tokens.logps.shape, tokens.logps.dtype, tokens.logps.device
    logps, old = (matrix(k, getattr(tokens, k), shape, dtype, device) for k in ("logps", "old_logps"))
    advantages = matrix("advantages", tokens.advantages, shape, dtype, device, per_row=True)
    scored = matrix("mask of the tokens", tokens.mask, shape, torch.bool, device)
    assert advantages is not None  # a TokenBatch has them
    made = torch.empty(shape, dtype=dtype if bounds is None else torch.bool)
    count = _C.covariances(
        dtype == torch.float64, *shape, pointer(logps), pointer(old), pointer(advantages),
        advantages.shape[1] == 1, pointer(scored), *ratio_bounds, *(bounds or (0.0, 0.0)),
        pointer(made if bounds is None else None), pointer(None if bounds is None else made), torch.get_num_threads(),
    )  # fmt: skip
    return made, int(count) if bounds is not None else 0


def row_counts(mask: Tensor, dtype: torch.dtype) -> tuple[Tensor, float]:
    """Tokens of a mask (B, T), bool, in each row: (B,) of fp32 or fp64, and their sum."""
    mask = mask.contiguous()
    counts = torch.empty(mask.shape[0], dtype=dtype)
    return counts, _C.count_rows(dtype == torch.float64, *mask.shape, mask.data_ptr(), counts.data_ptr())


def divergence_rows(
    tile: Tensor,
    ref_tile: Tensor,
    kind: str,
    beta: float,
    transform: LogitTransform,
    ref_transform: LogitTransform,
    bias: Tensor | None,
    ref_bias: Tensor | None,
    token_weight: Tensor | None = None,
    out: Tensor | None = None,
) -> Tensor:
    """Divergence (n,) of a tile (n, V) from another; `out` (the tile, say) receives its gradient. See `reference`."""
    (n, v), dtype, device = tile.shape, tile.dtype, tile.device
    for name, x in (("tile", tile), ("ref_tile", ref_tile), ("out", out)):
        if x is None:
            continue
        _native._check_tile(name, x, written=name == "out")
        if x.shape != tile.shape or x.dtype not in (torch.float32, torch.float64) or x.dtype != dtype:
            raise ValueError(f"{name}: expected fp32 or fp64 {(n, v)} as tile, got {x.dtype} {tuple(x.shape)}")
    if (out is None) != (token_weight is None):
        raise ValueError("token_weight and out go together")
    bias_, ref_bias_ = vector("bias", bias, v, dtype, device), vector("ref_bias", ref_bias, v, dtype, device)
    weight = vector("token_weight", token_weight, n, dtype, device)
    divergence = torch.empty(n, dtype=dtype)
    if n:
        _C.divergence_rows(
            dtype == torch.float64, n, v, tile.data_ptr(), tile.stride(0), ref_tile.data_ptr(), ref_tile.stride(0),
            transform.temperature, transform.logit_scale, transform.softcap or 0.0, pointer(bias_),
            ref_transform.temperature, ref_transform.logit_scale, ref_transform.softcap or 0.0, pointer(ref_bias_),
            _DIVERGENCES[kind], beta, divergence.data_ptr(), pointer(weight), pointer(out),
            0 if out is None else out.stride(0), torch.get_num_threads(),
        )  # fmt: skip
    return divergence
