"""Cases for linear_row_stats in Triton's interpreter, against the eager definition on fp64 products."""

import importlib
import math

import pytest
import torch
from torch import Tensor

from fastrl_kernels import reference
from fastrl_kernels.head import LogitTransform, RowStats
from fastrl_kernels.shards import merge_stats, stack_stats
from fastrl_kernels.triton import candidates, linear_row_stats
from fastrl_kernels.triton.candidates import OPS, time_candidates
from fastrl_kernels.triton.launch import Chip, LinearConfig

PLAIN = LogitTransform()
EVERYTHING = LogitTransform(temperature=0.7, logit_scale=1.3, softcap=5.0)
# Small tiles, so that few rows and columns make many blocks, splits and pieces.
POINTERS = LinearConfig(16, 32, 16, 1, 4, 2, False)
TMA = LinearConfig(16, 64, 16, 8, 4, 2, True)
HALVES = LinearConfig(32, 32, 32, 2, 4, 2, False)
CONFIGS = {"pointers": POINTERS, "tma": TMA, "halves": HALVES}
D = 24  # one and a half of a tile's depth; rows of 96 bytes, as TMA wants


def random_head(
    n: int, vocabulary: int, depth: int = D, dtype: torch.dtype = torch.float32, seed: int = 0
) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed + vocabulary + n)
    x = torch.randn(n, depth, generator=generator).to(dtype)
    weight = torch.randn(vocabulary, depth, generator=generator).to(dtype)
    return x, weight, torch.randint(0, vocabulary, (n,), generator=generator)


def truth(x: Tensor, weight: Tensor, ids: Tensor, transform: LogitTransform, bias: Tensor | None) -> RowStats:
    bias = None if bias is None else bias.double()
    return reference.row_stats(x.double() @ weight.double().T, ids, transform, bias, True)


def check(
    x: Tensor,
    weight: Tensor,
    ids: Tensor,
    transform: LogitTransform = PLAIN,
    bias: Tensor | None = None,
    config: LinearConfig | None = None,
) -> RowStats:
    """As accurate as eager PyTorch in fp32, log-probabilities not above 0, the same bits twice, inputs untouched."""
    inputs = [t for t in (x, weight, ids, bias) if t is not None]
    copies = [t.clone() for t in inputs]
    stats = linear_row_stats(x, weight, ids, transform, bias, True, config)
    exact = truth(x, weight, ids, transform, bias)
    eager = reference.row_stats(x.float() @ weight.float().T, ids, transform, bias, True)
    for name, ours, plain, want in zip(RowStats._fields, stats, eager, exact, strict=True):
        assert ours.dtype == torch.float32 and ours.shape == want.shape
        assert torch.equal(ours.isfinite(), want.isfinite()), name
        ours, plain, want = (v.double().nan_to_num(0.0, 0.0, 0.0) for v in (ours, plain, want))
        error, allowed = (ours - want).abs().max(), (plain - want).abs().max()
        floor = 16 * 2**-23 * max(1.0, want.abs().max().item())
        assert error <= 4 * allowed + floor, f"{name}: error {error:.2e}, eager {allowed:.2e}, floor {floor:.2e}"
    assert not (stats.logps > 0).any()
    again = linear_row_stats(x, weight, ids, transform, bias, True, config)
    assert all(torch.equal(a.nan_to_num(7.0), b.nan_to_num(7.0)) for a, b in zip(stats, again, strict=True))
    assert all(torch.equal(a, b) for a, b in zip(inputs, copies, strict=True)), "an input was modified"
    return stats


# Columns: the fewest; around a warp's width; many blocks, the last ragged. Rows: one to three tiles.
@pytest.mark.parametrize(
    ("n", "vocabulary"), [(1, 1), (17, 1), (1, 2), (40, 127), (17, 128), (1, 129), (40, 129), (17, 300), (1, 507)]
)
@pytest.mark.parametrize("name", CONFIGS)
def test_shapes(name: str, n: int, vocabulary: int) -> None:
    check(*random_head(n, vocabulary), config=CONFIGS[name])


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("softcap", [1.0, 30.0])
def test_softcap_and_bias(name: str, softcap: float) -> None:
    # A padded column masked before the cap would come back as -softcap, a probable token.
    x, weight, ids = random_head(5, 129)
    bias = torch.randn(129, generator=torch.Generator().manual_seed(3)).bfloat16()
    transform = LogitTransform(temperature=0.7, logit_scale=1.3, softcap=softcap)
    check(x, weight, ids, transform, bias, CONFIGS[name])


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("transform", [LogitTransform(0.5), LogitTransform(1.5, -2.0)], ids=["temperature", "negative"])
def test_scales(name: str, transform: LogitTransform) -> None:
    # A negative scale turns a padded -inf into +inf, unless the padding is set on the logit.
    check(*random_head(5, 129), transform, config=CONFIGS[name])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("name", CONFIGS)
def test_half_precision(name: str, dtype: torch.dtype) -> None:
    check(*random_head(5, 129, dtype=dtype), config=CONFIGS[name])


@pytest.mark.parametrize("depth", [1, 3, 16, 40])
def test_depths(depth: int) -> None:
    for config in (POINTERS, None) if depth % 4 else (POINTERS, TMA, None):
        check(*random_head(5, 65, depth), config=config)


@pytest.mark.parametrize("name", CONFIGS)
def test_all_logits_negative(name: str) -> None:
    x, weight, ids = random_head(5, 129)
    stats = check(x, weight, ids, bias=torch.full((129,), -123.0), config=CONFIGS[name])
    assert (stats.row_max < 0).all()


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("offset", [1e2, 1e4, 1e6])
def test_common_offset(name: str, offset: float) -> None:
    # Exactly representable logits: with their offset they must give the same bits as without.
    x, weight, ids = random_head(5, 129)
    x, weight = (x * 4).round() / 4, (weight * 2).round() / 2
    plain = linear_row_stats(x, weight, ids, PLAIN, torch.zeros(129), True, CONFIGS[name])
    shifted = linear_row_stats(x, weight, ids, PLAIN, torch.full((129,), offset), True, CONFIGS[name])
    for a, b in zip(plain[1:], shifted[1:], strict=True):
        assert torch.equal(a, b)
    assert torch.equal(plain.row_max + offset, shifted.row_max)


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("block", [0, 1, 2], ids=["first", "middle", "last"])
@pytest.mark.parametrize("only", [False, True], ids=["one-block-masked", "every-other-block-masked"])
def test_minus_infinity_in_blocks(name: str, block: int, only: bool) -> None:
    # Blocks of 64 columns: a piece, a block, a split or all splits but one without any mass.
    x, weight, _ = random_head(5, 192)
    inside = torch.arange(192) // 64 == block
    kept = inside if only else ~inside
    ids = kept.nonzero().squeeze(-1)[torch.randint(0, int(kept.sum()), (5,))]
    bias = torch.where(kept, torch.randn(192), -torch.inf)
    stats = linear_row_stats(x, weight, ids, PLAIN, bias, True, CONFIGS[name])
    exact = truth(x, weight[kept], kept.cumsum(0)[ids] - 1, PLAIN, bias[kept])
    for ours, want in zip(stats, exact, strict=True):
        torch.testing.assert_close(ours.double(), want, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("poison", [math.nan, math.inf])
def test_a_bad_row_stays_alone(name: str, poison: float) -> None:
    x, weight, ids = random_head(40, 129)
    clean = linear_row_stats(x, weight, ids, EVERYTHING, None, True, CONFIGS[name])
    bad = x.clone()
    bad[21, 3] = poison
    stats = linear_row_stats(bad, weight, ids, PLAIN if poison == math.inf else EVERYTHING, None, True, CONFIGS[name])
    if poison == math.inf:
        clean = linear_row_stats(x, weight, ids, PLAIN, None, True, CONFIGS[name])
    good = torch.arange(40) != 21
    assert all(torch.equal(a[good], b[good]) for a, b in zip(stats, clean, strict=True))
    assert stats.logps[21].isnan() and stats.mean[21].isnan() and stats.log_sum[21].isnan()


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize(("value", "log_sum"), [(-math.inf, -math.inf), (math.nan, math.nan)])
def test_a_bad_vocabulary(name: str, value: float, log_sum: float) -> None:
    # All -inf is a shard without mass, which other shards can add to; a NaN weight is everybody's.
    x, weight, ids = random_head(5, 129)
    bias = torch.full((129,), value)
    if math.isnan(value):
        bias[5:] = 0.0
    stats = linear_row_stats(x, weight, ids, PLAIN, bias, True, CONFIGS[name])
    assert stats.logps.isnan().all() and stats.mean.isnan().all()
    torch.testing.assert_close(stats.log_sum, torch.full((5,), log_sum), equal_nan=True)


@pytest.mark.parametrize("name", CONFIGS)
def test_vocabulary_shards(name: str) -> None:
    x, weight, ids = random_head(5, 300)
    ids[:4] = torch.tensor([0, 99, 100, 299])  # the shards' edges
    pieces = []
    for start, end in ((0, 100), (100, 107), (107, 300)):
        local = torch.where((ids >= start) & (ids < end), ids - start, -1)
        piece = linear_row_stats(x, weight[start:end], local, EVERYTHING, None, True, CONFIGS[name])
        assert torch.equal(piece.logps == -torch.inf, local == -1)
        pieces.append(stack_stats(piece))
    merged = merge_stats(torch.stack(pieces, 1))
    for ours, want in zip(merged, truth(x, weight, ids, EVERYTHING, None), strict=True):
        torch.testing.assert_close(ours.double(), want, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", CONFIGS)
def test_ids_out_of_range_are_loud(name: str) -> None:
    x, weight, ids = random_head(5, 129)
    ids[1], ids[2], ids[3] = 129, -2, 2**32 + 5
    logps = linear_row_stats(x, weight, ids, PLAIN, None, False, CONFIGS[name]).logps
    assert logps.isnan().tolist() == [False, True, True, True, False]


@pytest.mark.parametrize(("name", "processors"), [("pointers", 132), ("tma", 3), ("tma", 132), ("halves", 1)])
def test_any_number_of_splits(name: str, processors: int, monkeypatch: pytest.MonkeyPatch) -> None:
    module = importlib.import_module("fastrl_kernels.triton.linear_stats")
    monkeypatch.setattr(module, "chip", lambda device: Chip(processors, 9, 232448))
    seen = []
    schedule = module.linear_schedule
    monkeypatch.setattr(module, "linear_schedule", lambda *a: seen.append(schedule(*a)) or seen[-1])
    check(*random_head(5, 1100), config=CONFIGS[name])
    assert processors > 1 or seen[0].splits < 8
    assert processors < 132 or seen[0].splits > 16, "more splits than one step of the merge"


def test_many_row_groups(monkeypatch: pytest.MonkeyPatch) -> None:
    # More blocks of rows than run at the same time, the last group not full, the last block ragged.
    module = importlib.import_module("fastrl_kernels.triton.linear_stats")
    monkeypatch.setattr(module, "chip", lambda device: Chip(3, 9, 232448))
    check(*random_head(16 * 7 + 3, 65), config=POINTERS)


@pytest.mark.parametrize("entropy", [False, True])
def test_no_rows(entropy: bool) -> None:
    x, weight, ids = random_head(3, 129)
    stats = linear_row_stats(x[:0], weight, ids[:0], PLAIN, None, entropy)
    assert stats.logps.shape == (0,) and (stats.mean is not None) == entropy


def test_no_entropy_no_entropy_output() -> None:
    x, weight, ids = random_head(20, 129)
    without, with_entropy = (linear_row_stats(x, weight, ids, PLAIN, None, e, POINTERS) for e in (False, True))
    assert without.mean is None
    assert all(torch.equal(a, b) for a, b in zip(without[:3], with_entropy[:3], strict=True))


def test_strides() -> None:
    x, weight, ids = random_head(20, 129)
    expected = linear_row_stats(x, weight, ids, EVERYTHING, None, True, POINTERS)
    wide = torch.full((40, 2 * D), math.nan)
    wide[::2, ::2] = x
    for x_, weight_ in ((wide[::2, ::2], weight), (x, weight.T.contiguous().T), (x.T.contiguous().T, weight)):
        stats = linear_row_stats(x_, weight_, ids, EVERYTHING, None, True, POINTERS)
        assert all(torch.equal(a, b) for a, b in zip(stats, expected, strict=True))
        check(x_, weight_, ids, EVERYTHING)
    row = x[:1].expand(20, -1)
    check(row, weight, ids)


def test_every_candidate_is_checked_and_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    for op in OPS:
        timings = time_candidates(op, 3, 16, 5000 if op == "row_stats" else 300, torch.float32, torch.device("cpu"))
        assert sum(t.default for t in timings) == 1 and all(0 < t.seconds < math.inf for t in timings)
        assert all(op in str(t) for t in timings)
    wrong = lambda *args: linear_row_stats(*args)._replace(logps=torch.zeros(3))  # noqa: E731
    monkeypatch.setattr(candidates, "linear_row_stats", wrong)
    with pytest.raises(RuntimeError, match="wrong"):
        time_candidates("linear_row_stats", 3, 16, 300, torch.float32, torch.device("cpu"))
    with pytest.raises(ValueError, match="op"):
        time_candidates("gemm", 1, 1, 1, torch.float32, torch.device("cpu"))


def test_bad_arguments_are_named() -> None:
    x, weight, ids = random_head(5, 129)
    for name, error, call in [
        ("x", TypeError, lambda: linear_row_stats(x.double(), weight.double(), ids, PLAIN, None, False)),
        ("weight", TypeError, lambda: linear_row_stats(x, weight.bfloat16(), ids, PLAIN, None, False)),
        ("x", ValueError, lambda: linear_row_stats(x[0], weight, ids, PLAIN, None, False)),
        ("weight", ValueError, lambda: linear_row_stats(x, weight[:, 1:], ids, PLAIN, None, False)),
        ("weight", ValueError, lambda: linear_row_stats(x, weight[:0], ids, PLAIN, None, False)),
        ("ids", ValueError, lambda: linear_row_stats(x, weight, ids[1:], PLAIN, None, False)),
        ("ids", TypeError, lambda: linear_row_stats(x, weight, ids.float(), PLAIN, None, False)),
        ("bias", ValueError, lambda: linear_row_stats(x, weight, ids, PLAIN, torch.zeros(5), False)),
    ]:
        with pytest.raises(error, match=name):
            call()
