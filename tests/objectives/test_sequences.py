"""Sequences of padded and packed batches, against a loop over the sequences."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from fastrl.objectives.sequences import Sequences, sequences_of

LENGTHS = {
    "uneven": [3, 1, 5, 2],
    "one sequence": [4],
    "one token": [1],
    "empty first, middle, last": [0, 2, 0, 0, 3, 0],
    "only empty ones": [0, 0],
    "none": [],
}
PAD = 7


def offsets(lengths: list[int], dtype: torch.dtype = torch.int64) -> Tensor:
    return torch.tensor([0, *lengths]).cumsum(0).to(dtype)


def rows_of(x: Tensor, lengths: list[int]) -> list[Tensor]:
    return list(x.split(lengths)) if lengths else []


def padded(x: Tensor, lengths: list[int], fill: float | bool) -> Tensor:
    out = torch.full((len(lengths), PAD), fill, dtype=x.dtype)
    for row, values in zip(out, rows_of(x, lengths), strict=True):
        row[: len(values)] = values
    return out


LOOPS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "sum": lambda x, m: x.sum(),
    "mean": lambda x, m: x[m].sum() / max(1, int(m.sum())),
    "last": lambda x, m: x[m][-1] if m.any() else x.new_zeros(()),
    "max": lambda x, m: x[m].max() if m.any() else x.new_zeros(()),
    "min": lambda x, m: x[m].min() if m.any() else x.new_zeros(()),
}


def reduced(sequences: Sequences, name: str, x: Tensor, mask: Tensor) -> Tensor:
    return sequences.sum(x) if name == "sum" else getattr(sequences, name)(x, mask)


@pytest.mark.parametrize("offset_dtype", (torch.int32, torch.int64), ids=str)
@pytest.mark.parametrize("dtype", (torch.float32, torch.float64), ids=str)
@pytest.mark.parametrize("name", LENGTHS)
def test_reductions(name: str, dtype: torch.dtype, offset_dtype: torch.dtype) -> None:
    lengths = LENGTHS[name]
    x, mask = torch.randn(sum(lengths), dtype=dtype), torch.rand(sum(lengths)) > 0.4
    packed = Sequences.packed(offsets(lengths, offset_dtype), sum(lengths))
    wide = Sequences.padded(len(lengths))
    assert packed.count == wide.count == len(lengths)
    for what, loop in LOOPS.items():
        pairs = zip(rows_of(x, lengths), rows_of(mask, lengths), strict=True)
        want = torch.stack([loop(*pair) for pair in pairs]) if lengths else torch.zeros(0, dtype=dtype)
        outside = 0.0 if what == "sum" else torch.nan  # only sum has no mask
        got = reduced(packed, what, x if what == "sum" else torch.where(mask, x, torch.nan), mask)
        torch.testing.assert_close(got, want, msg=what)
        got = reduced(wide, what, padded(x, lengths, outside), padded(mask, lengths, False))
        torch.testing.assert_close(got, want, msg=what)
    counts = torch.tensor([int(m.sum()) for m in rows_of(mask, lengths)], dtype=dtype)
    assert torch.equal(packed.counts(mask, dtype), counts)
    ends = packed.last_token(mask)
    assert torch.equal(packed.counts(ends, dtype), counts.clamp(max=1)) and not (ends & ~mask).any()
    values = torch.randn(len(lengths), dtype=dtype)
    assert torch.equal(packed.spread(values), values.repeat_interleave(torch.tensor(lengths, dtype=torch.int64)))
    assert torch.equal(wide.spread(values), values[:, None])


@pytest.mark.parametrize("layout", ("packed", "padded"))
def test_differentiable_twice(layout: str) -> None:
    lengths = LENGTHS["empty first, middle, last"]
    sequences = Sequences.packed(offsets(lengths), 5) if layout == "packed" else Sequences.padded(6)
    x = torch.randn(5, dtype=torch.float64)
    mask = torch.tensor([True, False, True, True, True])
    if layout == "padded":
        x, mask = padded(x, lengths, 0.0), padded(mask, lengths, False)
    x.requires_grad_()
    values = torch.randn(6, dtype=torch.float64, requires_grad=True)
    functions: list[tuple[Callable[..., Tensor], Tensor]] = [
        (lambda x: sequences.sum(x.square() * x), x),
        (lambda x: sequences.mean(x.square(), mask), x),
        (lambda x: sequences.last(x.square(), mask), x),
        (lambda v: sequences.spread(v.square() * v), values),
        (lambda x: x * sequences.spread(sequences.sum(x).square()), x),
    ]
    for function, argument in functions:
        assert torch.autograd.gradcheck(function, (argument,))
        assert torch.autograd.gradgradcheck(function, (argument,))


def test_a_sequence_keeps_to_itself() -> None:
    x = torch.tensor([torch.nan, 1.0, 1e30, -1e30, 0.1, torch.inf, 1.0, 2.0], requires_grad=True)
    sequences = Sequences.packed(offsets([2, 2, 1, 1, 2]), 8)
    total = sequences.sum(x)
    torch.testing.assert_close(total[1:], torch.tensor([0.0, 0.1, torch.inf, 3.0]), rtol=0, atol=0)
    assert total[0].isnan()
    total[4].backward()
    assert x.grad is not None and x.grad.tolist() == [0, 0, 0, 0, 0, 0, 1, 1]
    most = sequences.max(x, torch.ones(8, dtype=torch.bool))
    assert most[0].isnan() and torch.equal(most[1:], x.detach()[[2, 4, 5, 7]])
    assert not most.requires_grad


def test_masked_values_carry_no_gradient() -> None:
    """NaN outside the mask reaches neither value nor gradient."""
    mask = torch.tensor([True, False, True, False])
    for cu_seqlens, shape in ((torch.tensor([0, 3, 4]), (4,)), (None, (2, 2))):
        x = torch.tensor([1.0, torch.nan, 3.0, torch.nan]).view(shape).requires_grad_()
        sequences = sequences_of(x, cu_seqlens)
        (sequences.mean(x, mask.view(shape)) + sequences.last(x, mask.view(shape))).sum().backward()
        assert x.grad is not None and x.grad.isfinite().all() and not x.grad[~mask.view(shape)].any()


def test_same_bits_and_untouched_inputs() -> None:
    lengths = torch.randint(0, 200, (50,)).tolist()
    cu_seqlens, n = offsets(lengths), sum(lengths)
    wide = torch.randn(2 * n)
    x = wide[::2]  # not contiguous
    before, offsets_before = wide.clone(), cu_seqlens.clone()
    first, second = (Sequences.packed(cu_seqlens, n).sum(x) for _ in range(2))
    assert torch.equal(first, second) and torch.equal(wide, before) and torch.equal(cu_seqlens, offsets_before)
    torch.testing.assert_close(first, torch.stack([row.sum() for row in rows_of(x, lengths)]), rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize(
    ("cu_seqlens", "error", "message"),
    (
        (torch.tensor([0.0, 4.0]), TypeError, "cu_seqlens: expected int32 or int64, got torch.float32"),
        (torch.tensor([[0, 4]]), ValueError, r"cu_seqlens: expected shape \(B \+ 1,\), got \(1, 2\)"),
        (torch.zeros(0, dtype=torch.int64), ValueError, "cu_seqlens: expected shape"),
        (torch.tensor([1, 4]), ValueError, "cu_seqlens: expected offsets from 0 to 4"),
        (torch.tensor([0, 3]), ValueError, "cu_seqlens: expected offsets from 0 to 4"),
        (torch.tensor([0, 5]), ValueError, "cu_seqlens: expected offsets from 0 to 4"),
        (torch.tensor([0, 3, 2, 4]), ValueError, r"never decrease, got \[0, 3, 2, 4\]"),
        (torch.tensor([0, 4], device="meta"), ValueError, "cu_seqlens: expected on cpu"),
    ),
)
def test_wrong_offsets(cu_seqlens: Tensor, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        sequences_of(torch.zeros(4), cu_seqlens)


def test_wrong_shapes() -> None:
    with pytest.raises(ValueError, match=r"old_logps: expected shape \(B, T\), or \(N,\) with cu_seqlens, got \(4,\)"):
        sequences_of(torch.zeros(4), None, "old_logps")
    with pytest.raises(ValueError, match=r"logps: expected packed tokens of shape \(N,\) .* got \(2, 2\)"):
        sequences_of(torch.zeros(2, 2), torch.tensor([0, 4]))
    with pytest.raises(ValueError, match=r"x: expected shape \(4,\), one value per token, got \(5,\)"):
        Sequences.packed(torch.tensor([0, 4]), 4).sum(torch.zeros(5))
    with pytest.raises(ValueError, match=r"x: expected shape \(3, T\), one value per token, got \(2, 4\)"):
        Sequences.padded(3).sum(torch.zeros(2, 4))


def test_width_zero() -> None:
    x, mask = torch.zeros(2, 0, requires_grad=True), torch.zeros(2, 0, dtype=torch.bool)
    sequences = sequences_of(x)
    for name in ("mean", "last", "max", "min"):
        assert reduced(sequences, name, x, mask).tolist() == [0, 0]
    sequences.sum(x).sum().backward()
    assert x.grad is not None and x.grad.shape == (2, 0)
