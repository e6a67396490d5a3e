"""The tolerance that means something: our error against fp64 beside plain PyTorch's error in the same dtype."""

from __future__ import annotations

import torch
from torch import Tensor

FLOOR = {torch.float64: 1e-13, torch.float32: 5e-7, torch.bfloat16: 1e-3, torch.float16: 2e-4}


def error(x: Tensor, truth: Tensor) -> float:
    """|x - truth| / |truth|, Euclidean norms; inf and NaN in the same places are equal, elsewhere an infinite error."""
    x, truth = x.detach().double(), truth.detach().double()
    assert x.shape == truth.shape
    same = (x == truth) | (x.isnan() & truth.isnan())
    scale = truth[truth.isfinite()].norm().item()
    gap = torch.where(same, 0.0, (x - truth).abs()).norm().item()
    return float("inf") if gap != gap else gap / max(scale, 1e-30)


def assert_as_accurate(ours: Tensor, plain: Tensor, truth: Tensor, what: str, factor: float = 4.0) -> None:
    """error(ours) <= factor * error(plain) + floor; the floor is that of the dtype the result came from."""
    dtype = plain.dtype if plain.dtype in FLOOR else torch.float32
    allowed = factor * error(plain, truth) + FLOOR[dtype]
    got = error(ours, truth)
    assert got <= allowed, f"{what}: error {got:.2e} against fp64, allowed {allowed:.2e}"
