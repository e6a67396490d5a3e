"""What the compiled backends share: the checks before a pointer is taken, and the calls of the extension's kernels.

The extension knows nothing of torch: it takes pointers, sizes and strides. The kernels of a device differ in the last
argument only, the number of threads or the stream.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .head import LogitTransform, RowStats, accumulation_dtype

DTYPES = {torch.float32: 0, torch.float64: 1, torch.bfloat16: 2, torch.float16: 3}
_BASELINES = {"mean": 0, "leave_one_out": 1}
_SCALES = {"group": 0, "batch": 1, "none": 2}


def pointer(x: Tensor | None) -> int:
    return 0 if x is None else x.data_ptr()


def vector(name: str, x: Tensor | None, n: int, dtype: torch.dtype, device: torch.device) -> Tensor | None:
    """`x` as a contiguous vector (n,) of `dtype`; the caller keeps the result alive until the kernel is queued."""
    if x is None:
        return None
    if x.dtype.is_floating_point != dtype.is_floating_point:
        raise TypeError(f"{name}: expected {dtype}, got {x.dtype}")
    if x.shape != (n,) or x.device != device:
        raise ValueError(f"{name}: expected shape ({n},) on {device}, got {tuple(x.shape)} on {x.device}")
    return x.to(dtype).contiguous()


def matrix(
    name: str, x: Tensor | None, shape: torch.Size, dtype: torch.dtype, device: torch.device, per_row: bool = False
) -> Tensor | None:
    """`x` as a contiguous tensor (B, T) of `dtype`, or (B, 1) where `per_row` allows it."""
    if x is None:
        return None
    if x.device != device or (x.shape != shape and not (per_row and x.shape == (shape[0], 1))):
        raise ValueError(f"{name}: expected shape {tuple(shape)} on {device}, got {tuple(x.shape)} on {x.device}")
    return (x if x.dtype == dtype else x.to(dtype)).contiguous()  # `to` costs as much as the checks


@dataclass(frozen=True)
class NativeKernels:
    """The functions of a backend, on the kernels that the extension has for one type of device.

    Args:
        kernels: `fastrl_kernels._C`, or its submodule of the device.
        device_type: of the tensors that the kernels take.
        launching: context in which kernels run on a device; gives their last argument.
        mixed_outputs: whether row_grad may write bf16 or fp16 from an fp32 tile.
    """

    kernels: Any
    device_type: str
    launching: Callable[[torch.device], AbstractContextManager[int]]
    mixed_outputs: bool

    def _check_tile(self, name: str, x: Tensor, written: bool = False) -> None:
        if x.dtype not in DTYPES:
            raise TypeError(f"{name}: the row kernels take {', '.join(map(str, DTYPES))}, got {x.dtype}")
        if x.ndim != 2 or x.shape[1] == 0 or x.device.type != self.device_type:
            raise ValueError(f"{name}: expected a {self.device_type} tensor (n, V), got {tuple(x.shape)} on {x.device}")
        apart = x.stride(0) >= x.shape[1] if written else x.stride(0) >= 0
        if (x.shape[1] > 1 and x.stride(1) != 1) or (x.shape[0] > 1 and not apart):
            raise ValueError(f"{name}: expected contiguous rows, got shape {tuple(x.shape)}, strides {x.stride()}")

    def row_stats(
        self, tile: Tensor, ids: Tensor, transform: LogitTransform, bias: Tensor | None, entropy: bool
    ) -> RowStats:
        """Row pass 1 over a tile (n, V); see `reference.row_stats`."""
        self._check_tile("tile", tile)
        (n, v), device, dtype = tile.shape, tile.device, accumulation_dtype(tile.dtype)
        ids_ = vector("ids", ids, n, torch.int64, device)
        bias_ = vector("bias", bias, v, dtype, device)
        row_max, log_sum, logps = (torch.empty(n, dtype=dtype, device=device) for _ in range(3))
        mean = torch.empty(n, dtype=dtype, device=device) if entropy else None
        if n:
            with self.launching(device) as last:
                self.kernels.row_stats(
                    DTYPES[tile.dtype], tile.data_ptr(), n, v, tile.stride(0), pointer(ids_),
                    transform.temperature, transform.logit_scale, transform.softcap or 0.0, pointer(bias_),
                    row_max.data_ptr(), log_sum.data_ptr(), logps.data_ptr(), pointer(mean), last,
                )  # fmt: skip
        return RowStats(row_max, log_sum, logps, mean)

    def row_grad(
        self,
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
        self._check_tile("tile", tile)
        self._check_tile("out", out, written=True)
        (n, v), device, dtype = tile.shape, tile.device, accumulation_dtype(tile.dtype)
        moves = n if source is None else source.shape[0]
        dtypes = [tile.dtype]
        if self.mixed_outputs and tile.dtype == torch.float32:
            dtypes += [torch.bfloat16, torch.float16]
        if out.dtype not in dtypes or out.shape[1] != v or out.device != device or (source is None and len(out) != n):
            raise ValueError(
                f"out: expected ({n if source is None else 'rows'}, {v}) on {device}, "
                f"{' or '.join(map(str, dtypes))}, got {out.dtype} {tuple(out.shape)} on {out.device}"
            )
        if (source is None) != (target is None):
            raise ValueError("source and target go together")
        if grad_entropy is not None and mean is None:
            raise ValueError("grad_entropy needs the rows' mean")
        vectors = {
            "row_max": row_max, "log_sum": log_sum, "mean": mean if grad_entropy is not None else None,
            "grad_logps": grad_logps, "grad_entropy": grad_entropy, "grad_lse": grad_lse,
        }  # fmt: skip
        kept = [vector(name, x, n, dtype, device) for name, x in vectors.items()]
        kept += [vector(name, x, moves, torch.int64, device) for name, x in (("source", source), ("target", target))]
        ids_ = vector("ids", ids, n, torch.int64, device)
        bias_ = vector("bias", bias, v, dtype, device)
        if moves:
            with self.launching(device) as last:
                self.kernels.row_grad(
                    DTYPES[tile.dtype], tile.data_ptr(), v, tile.stride(0),
                    DTYPES[out.dtype], out.data_ptr(), out.stride(0), pointer(ids_),
                    transform.temperature, transform.logit_scale, transform.softcap or 0.0, pointer(bias_),
                    *map(pointer, kept), moves, last,
                )  # fmt: skip

    def group_advantages(self, rewards: Tensor, group_ids: Tensor, baseline: str, scale: str, eps: float) -> Tensor:
        """Group-relative advantages (B,); see `reference.group_advantages`."""
        n, device, dtype = rewards.shape[0], rewards.device, accumulation_dtype(rewards.dtype)
        r, ids = (
            vector(name, x, n, x_dtype, device)
            for name, x, x_dtype in (("rewards", rewards, dtype), ("group_ids", group_ids, torch.int64))
        )
        out = torch.empty(n, dtype=dtype, device=device)
        if n:
            with self.launching(device) as last:
                self.kernels.group_advantages(
                    dtype == torch.float64, pointer(r), pointer(ids), n, _BASELINES[baseline], _SCALES[scale], eps,
                    out.data_ptr(), last,
                )  # fmt: skip
        return out.to(rewards.dtype)

    def gae(
        self, rewards: Tensor, values: Tensor, mask: Tensor, gamma: float, lam: float, through_mask: bool
    ) -> tuple[Tensor, Tensor]:
        """Advantages and returns (B, T) of rewards, values and a mask (B, T); see `reference.gae`."""
        shape, device, dtype = rewards.shape, rewards.device, accumulation_dtype(rewards.dtype)
        r, v = matrix("rewards", rewards, shape, dtype, device), matrix("values", values, shape, dtype, device)
        m = matrix("mask", mask, shape, torch.bool, device)
        advantages, returns = (torch.empty(shape, dtype=dtype, device=device) for _ in range(2))
        if rewards.numel():
            with self.launching(device) as last:
                self.kernels.gae(
                    dtype == torch.float64, pointer(r), pointer(v), pointer(m), *shape, gamma, lam, through_mask,
                    advantages.data_ptr(), returns.data_ptr(), last,
                )  # fmt: skip
        return advantages.to(rewards.dtype), returns.to(rewards.dtype)
