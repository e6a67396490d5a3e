"""The C++ backend: validates what a row kernel needs, then hands pointers to `fastrl_kernels._C`."""

from __future__ import annotations

import torch
from torch import Tensor

from . import _C  # type: ignore[attr-defined]
from .head import LogitTransform, RowStats, accumulation_dtype
from .objective import PolicySpec, PolicyTerms, TermSums, TokenBatch

_DTYPES = {torch.float32: 0, torch.float64: 1, torch.bfloat16: 2}
_BASELINES = {"mean": 0, "leave_one_out": 1}
_ESTIMATORS = {"k1": 1, "k2": 2, "k3": 3}
_SCALES = {"group": 0, "batch": 1, "none": 2}


def _vector(name: str, x: Tensor | None, n: int, dtype: torch.dtype) -> Tensor | None:
    """`x` as a contiguous CPU vector (n,) of `dtype`; the caller keeps the result alive while the kernel runs."""
    if x is None:
        return None
    if x.shape != (n,) or x.device.type != "cpu":
        raise ValueError(f"{name}: expected a CPU tensor of shape ({n},), got {tuple(x.shape)} on {x.device}")
    return x.to(dtype).contiguous()


def _tile(name: str, x: Tensor) -> Tensor:
    if x.dtype not in _DTYPES:
        raise TypeError(f"{name}: the cpu row kernels take {', '.join(str(d) for d in _DTYPES)}, got {x.dtype}")
    if x.ndim != 2 or x.device.type != "cpu" or (x.shape[1] > 1 and x.stride(1) != 1) or x.stride(0) < 0:
        raise ValueError(
            f"{name}: expected a CPU tensor (n, V) with contiguous rows, got {tuple(x.shape)} on {x.device}"
        )
    return x


def _pointer(x: Tensor | None) -> int:
    return 0 if x is None else x.data_ptr()


def row_stats(tile: Tensor, ids: Tensor, transform: LogitTransform, bias: Tensor | None, entropy: bool) -> RowStats:
    """Row pass 1 over a tile (n, V); see `reference.row_stats`."""
    _tile("tile", tile)
    n, v = tile.shape
    dtype = accumulation_dtype(tile.dtype)
    ids = _vector("ids", ids, n, torch.int64)  # type: ignore[assignment]
    bias = _vector("bias", bias, v, dtype)
    row_max, log_sum, logps = (torch.empty(n, dtype=dtype) for _ in range(3))
    mean = torch.empty(n, dtype=dtype) if entropy else None
    if n:
        _C.row_stats(
            _DTYPES[tile.dtype], tile.data_ptr(), n, v, tile.stride(0), ids.data_ptr(),
            transform.temperature, transform.logit_scale, transform.softcap or 0.0, _pointer(bias),
            row_max.data_ptr(), log_sum.data_ptr(), logps.data_ptr(), _pointer(mean), torch.get_num_threads(),
        )  # fmt: skip
    return RowStats(row_max, log_sum, logps, mean)


def row_grad(
    tile: Tensor,
    out: Tensor,
    ids: Tensor,
    transform: LogitTransform,
    bias: Tensor | None,
    row_max: Tensor,
    log_sum: Tensor,
    mean: Tensor | None,
    grad_logps: Tensor | None,
    grad_entropy: Tensor | None,
    grad_lse: Tensor | None,
    source: Tensor | None = None,
    target: Tensor | None = None,
) -> None:
    """Row pass 2 over a tile (n, V), in place where `out` is the tile; see `reference.row_grad`."""
    _tile("tile", tile)
    _tile("out", out)
    n, v = tile.shape
    moves = n if source is None else source.shape[0]
    if out.dtype != tile.dtype or out.shape[1] != v or (source is None and out.shape[0] != n):
        raise ValueError(f"out: expected {tile.dtype} (k, {v}), got {out.dtype} {tuple(out.shape)}")
    if (source is None) != (target is None):
        raise ValueError("source and target go together")
    if grad_entropy is not None and mean is None:
        raise ValueError("grad_entropy needs the rows' mean")
    dtype = accumulation_dtype(tile.dtype)
    if not moves:
        return
    vectors = {
        "row_max": row_max, "log_sum": log_sum, "mean": mean if grad_entropy is not None else None,
        "grad_logps": grad_logps, "grad_entropy": grad_entropy, "grad_lse": grad_lse,
    }  # fmt: skip
    kept = {name: _vector(name, x, n, dtype) for name, x in vectors.items()}
    ids = _vector("ids", ids, n, torch.int64)  # type: ignore[assignment]
    bias = _vector("bias", bias, v, dtype)
    source, target = _vector("source", source, moves, torch.int64), _vector("target", target, moves, torch.int64)
    _C.row_grad(
        _DTYPES[tile.dtype], tile.data_ptr(), v, tile.stride(0), out.data_ptr(), out.stride(0), ids.data_ptr(),
        transform.temperature, transform.logit_scale, transform.softcap or 0.0, _pointer(bias),
        *(_pointer(x) for x in kept.values()), _pointer(source), _pointer(target), moves, torch.get_num_threads(),
    )  # fmt: skip


def _matrix(name: str, x: Tensor | None, shape: torch.Size, dtype: torch.dtype, per_row: bool = False) -> Tensor | None:
    """`x` as a contiguous CPU tensor (B, T) of `dtype`, or (B, 1) where `per_row` allows it."""
    if x is None:
        return None
    if x.device.type != "cpu" or (x.shape != shape and not (per_row and x.shape == (shape[0], 1))):
        raise ValueError(f"{name}: expected a CPU tensor of shape {tuple(shape)}, got {tuple(x.shape)} on {x.device}")
    return x.to(dtype).contiguous()


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
    shape, dtype = tokens.logps.shape, tokens.logps.dtype
    if len(shape) != 2 or dtype not in (torch.float32, torch.float64):
        raise ValueError(f"logps: expected fp32 or fp64 of shape (B, T), got {dtype} {tuple(shape)}")
    if spec.beta != 0 and tokens.ref_logps is None:
        raise ValueError(f"ref_logps: needed with beta = {spec.beta}")
    rows, cols = shape
    per_row = ("advantages", "gate")
    given = {k: _matrix(k, x, shape, dtype, k in per_row) for k, x in vars(tokens).items() if k != "mask"}
    weights = [_matrix("token_weight", token_weight, shape, dtype)]
    weights += [_matrix("entropy_weight", entropy_weight, shape, dtype)]
    names = ("mask of the tokens", "mask", "live")
    masks = [_matrix(k, x, shape, torch.bool) for k, x in zip(names, (tokens.mask, mask, live), strict=True)]
    spread = {k: x is not None and x.shape[1] == 1 for k, x in given.items()}
    made = PolicyTerms(
        torch.empty(shape, dtype=dtype) if terms else None,
        torch.empty(shape, dtype=dtype) if gradients else None,
        torch.empty(shape, dtype=dtype) if gradients and entropy_weight is not None else None,
        torch.empty(rows, len(TermSums._fields), dtype=torch.float64) if sums else None,
    )
    _C.policy_terms(
        dtype == torch.float64, rows, cols, _pointer(given["logps"]), _pointer(given["entropy"]),
        _pointer(given["advantages"]), spread["advantages"], _pointer(given["old_logps"]), _pointer(given["ref_logps"]),
        _pointer(given["gate"]), spread["gate"], *(_pointer(x) for x in (*masks, *weights)),
        spec.low, spec.high, spec.delta, spec.beta, _ESTIMATORS[spec.kl_estimator] if spec.beta != 0 else 0,
        spec.kl_times_ratio, spec.sequence, *(_pointer(x) for x in made), torch.get_num_threads(),
    )  # fmt: skip
    return made


def group_advantages(rewards: Tensor, group_ids: Tensor, baseline: str, scale: str, eps: float) -> Tensor:
    """Group-relative advantages (B,); see `ops.group_advantages`."""
    n = rewards.shape[0]
    dtype = accumulation_dtype(rewards.dtype)
    r, ids = _vector("rewards", rewards, n, dtype), _vector("group_ids", group_ids, n, torch.int64)
    out = torch.empty(n, dtype=dtype)
    if n:
        _C.group_advantages(
            _DTYPES[dtype], _pointer(r), _pointer(ids), n, _BASELINES[baseline], _SCALES[scale], eps, out.data_ptr()
        )
    return out.to(rewards.dtype)
