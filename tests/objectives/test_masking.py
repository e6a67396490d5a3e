"""Values inside a mask: the fast paths against `torch.where`, whatever is outside."""

from __future__ import annotations

import pytest
import torch

from fastrl.objectives.masking import as_numbers, inside, known_finite, weighted_sum


@pytest.mark.parametrize("outside", (0.0, 3.0, torch.nan, torch.inf))
@pytest.mark.parametrize("dtype", (torch.float64, torch.float32, torch.bfloat16), ids=str)
def test_outside_leaves_no_trace(dtype: torch.dtype, outside: float) -> None:
    mask = torch.tensor([[True, False, True], [False, False, True]])
    x = torch.where(mask, torch.randn(2, 3), outside).to(dtype)
    weights = torch.rand(2, 3).to(dtype) * mask
    want = torch.where(mask, x, 0.0)
    assert torch.equal(inside(x, mask), want) and torch.equal(as_numbers(mask, dtype), mask.to(dtype))
    assert known_finite(x) == (outside in (0.0, 3.0))
    x.requires_grad_()
    total = weighted_sum(x, weights, mask)
    assert torch.equal(total.detach(), (weights * want).sum())
    assert torch.equal(torch.autograd.grad(total, x)[0], weights)
    assert torch.equal(torch.autograd.grad(inside(x, mask).sum(), x)[0], mask.to(dtype))
