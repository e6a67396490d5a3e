"""Cases for row_stats and row_grad in Triton's interpreter, against autograd over plain PyTorch formulas in fp64."""

import math

import pytest
import torch
import triton
from torch import Tensor

import fastrl_kernels.triton as kernels
from fastrl_kernels import reference
from fastrl_kernels.head import LogitTransform, RowStats, accumulation_dtype
from fastrl_kernels.triton.launch import row_config
from fastrl_kernels.triton.row_stats import row_stats_fwd_kernel

PLAIN = LogitTransform()
EVERYTHING = LogitTransform(temperature=0.7, logit_scale=1.3, softcap=5.0)
# 1 and 2: smallest; 127, 128, 129: around a warp's width; 507: unaligned; 5000: two blocks, the second ragged.
VOCABULARIES = [1, 2, 127, 128, 129, 507, 5000]
ROWS = 5


def test_kernels_are_interpreted() -> None:
    assert not isinstance(row_stats_fwd_kernel, triton.runtime.jit.JITFunction)


def random_tile(vocabulary: int, dtype: torch.dtype, seed: int = 0, rows: int = ROWS) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed + vocabulary)
    tile = (3 * torch.randn(rows, vocabulary, generator=generator, dtype=torch.float64)).to(dtype)
    return tile, torch.randint(0, vocabulary, (rows,), generator=generator)


def upstream(rows: int, dtype: torch.dtype, seed: int = 1) -> list[Tensor]:
    """Random gradients of logps, entropy and lse: never all ones, different for every row."""
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(rows, generator=generator, dtype=torch.float64).to(accumulation_dtype(dtype)) for _ in range(3)]


def truth(
    tile: Tensor, ids: Tensor, transform: LogitTransform, bias: Tensor | None, gradients: list[Tensor | None]
) -> tuple[dict[str, Tensor], Tensor]:
    """logps, entropy, lse and the gradient of the products, by autograd over `log_softmax`, all in fp64."""
    x = tile.double().requires_grad_()
    z = reference.transform_logits(x, transform, None if bias is None else bias.double())
    lp = z.log_softmax(-1)
    out = {
        "logps": lp.gather(-1, ids.unsqueeze(-1)).squeeze(-1),
        "entropy": -(lp.exp() * lp).sum(-1),
        "lse": z.logsumexp(-1),
    }
    total = sum((g.double() * y).sum() for g, y in zip(gradients, out.values(), strict=True) if g is not None)
    (grad,) = torch.autograd.grad(total, x)
    return {name: y.detach() for name, y in out.items()}, grad


def outputs(stats: RowStats) -> dict[str, Tensor]:
    assert stats.entropy is not None
    return {"logps": stats.logps, "entropy": stats.entropy, "lse": stats.row_max + stats.log_sum}


def assert_as_good_as_eager(ours: Tensor, eager: Tensor, exact: Tensor, name: str = "") -> None:
    """The tolerance that means something: a small multiple of eager PyTorch's error in the same dtype, plus a floor."""
    assert ours.shape == exact.shape
    assert torch.isfinite(ours).all(), f"{name}: {ours}"
    floor = 16 * torch.finfo(ours.dtype).eps * max(1.0, exact.abs().max().item())
    error, allowed = (ours.double() - exact).abs().max().item(), (eager.double() - exact).abs().max().item()
    assert error <= 4 * allowed + floor, f"{name}: error {error:.2e}, eager {allowed:.2e}, floor {floor:.2e}"


def check(tile: Tensor, ids: Tensor, transform: LogitTransform, bias: Tensor | None = None) -> RowStats:
    """Statistics and gradient of one tile: as good as eager, repeatable to the bit, inputs untouched."""
    gradients = upstream(tile.shape[0], tile.dtype)
    inputs = [tile, ids, *gradients] + ([] if bias is None else [bias])
    copies = [x.clone() for x in inputs]
    stats = kernels.row_stats(tile, ids, transform, bias, entropy=True)
    out = torch.empty_like(tile)
    kernels.row_grad(tile, out, ids, transform, bias, stats.row_max, stats.log_sum, stats.mean, *gradients)

    exact, exact_grad = truth(tile, ids, transform, bias, list(gradients))
    eager_stats = reference.row_stats(tile, ids, transform, bias, entropy=True)
    eager = outputs(eager_stats)
    for name, ours in outputs(stats).items():
        assert ours.dtype == accumulation_dtype(tile.dtype)
        assert_as_good_as_eager(ours, eager[name], exact[name], name)
    assert (stats.logps <= 0).all()
    eager_out = torch.empty_like(tile)
    reference.row_grad(tile, eager_out, ids, transform, bias, *_of(eager_stats), *gradients)
    assert_as_good_as_eager(out, eager_out, exact_grad, "grad")

    again = kernels.row_stats(tile, ids, transform, bias, entropy=True)
    out_again = torch.empty_like(tile)
    kernels.row_grad(tile, out_again, ids, transform, bias, again.row_max, again.log_sum, again.mean, *gradients)
    assert all(torch.equal(a, b) for a, b in zip(stats, again, strict=True)) and torch.equal(out, out_again)
    assert all(torch.equal(a, b) for a, b in zip(inputs, copies, strict=True)), "an input was modified"
    return stats


def _of(stats: RowStats) -> tuple[Tensor, Tensor, Tensor | None]:
    return stats.row_max, stats.log_sum, stats.mean


@pytest.mark.parametrize("vocabulary", VOCABULARIES)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("transform", [PLAIN, EVERYTHING], ids=["plain", "everything"])
def test_statistics_and_gradient(vocabulary: int, dtype: torch.dtype, transform: LogitTransform) -> None:
    check(*random_tile(vocabulary, dtype), transform)


@pytest.mark.parametrize("vocabulary", VOCABULARIES)
@pytest.mark.parametrize("softcap", [1.0, 30.0])
def test_softcap_with_bias(vocabulary: int, softcap: float) -> None:
    # Softcap and padding: a padded column masked before the cap would come back as -softcap, a probable token.
    tile, ids = random_tile(vocabulary, torch.float32)
    bias = torch.randn(vocabulary, generator=torch.Generator().manual_seed(3))
    check(tile, ids, LogitTransform(softcap=softcap), bias)


def test_softcap_of_small_logits() -> None:
    # With one column the maximum is the logit. tanh as 1 - w over 1 + w would lose three digits of the smallest here.
    tile = torch.logspace(-4, 1.8, 100).unsqueeze(-1)
    ids = torch.zeros(100, dtype=torch.int64)
    logits = kernels.row_stats(tile, ids, LogitTransform(softcap=30.0), None, entropy=False).row_max
    exact = 30 * torch.tanh(tile.squeeze(-1).double() / 30)
    assert ((logits.double() - exact) / exact).abs().max() < 1e-6


@pytest.mark.parametrize("logit_scale", [0.0625, -2.0], ids=["cohere", "negative"])
def test_logit_scale(logit_scale: float) -> None:
    # A negative scale turns a padded -inf into +inf, unless the padding is set on the logit.
    check(*random_tile(507, torch.float32), LogitTransform(temperature=1.5, logit_scale=logit_scale))


@pytest.mark.parametrize("vocabulary", VOCABULARIES)
@pytest.mark.parametrize("transform", [PLAIN, LogitTransform(softcap=30.0)], ids=["plain", "softcap"])
def test_all_logits_negative(vocabulary: int, transform: LogitTransform) -> None:
    # A padded column counted as 0 would dominate the sum: log-probabilities of up to +123 were shipped this way.
    tile, ids = random_tile(vocabulary, torch.float32)
    check(tile - 123.0, ids, transform)


@pytest.mark.parametrize("offset", [1e2, 1e4, 1e6, -1e6])
@pytest.mark.parametrize("transform", [PLAIN, LogitTransform(temperature=0.7)], ids=["plain", "temperature"])
def test_common_offset(offset: float, transform: LogitTransform) -> None:
    tile, ids = random_tile(5000, torch.float32)
    check(tile + offset, ids, transform)


def test_common_offset_is_free() -> None:
    # Against the same logits without their offset, exactly representable: lse - z would lose all digits at 2^20.
    tile, ids = random_tile(507, torch.float32)
    tile = (tile * 8).round() / 8
    plain, shifted = (kernels.row_stats(x, ids, PLAIN, None, entropy=True) for x in (tile, tile + 2.0**20))
    assert torch.equal(plain.logps, shifted.logps) and torch.equal(plain.log_sum, shifted.log_sum)
    assert torch.equal(plain.entropy, shifted.entropy)


def test_flat_rows() -> None:
    # log p + H is a difference of two numbers near log V here; as z - mean it keeps its digits.
    tile, ids = random_tile(5000, torch.float32)
    gradients = [None, *upstream(ROWS, torch.float32)[1:2], None]
    tile = 1e-3 * tile
    stats = kernels.row_stats(tile, ids, PLAIN, None, entropy=True)
    out = torch.empty_like(tile)
    kernels.row_grad(tile, out, ids, PLAIN, None, *_of(stats), *gradients)
    _, exact = truth(tile, ids, PLAIN, None, gradients)
    assert (out.double() - exact).norm() <= 1e-4 * exact.norm()


def test_confident_rows() -> None:
    tile, ids = random_tile(507, torch.float32)
    tile[torch.arange(ROWS), ids] += torch.tensor([5.0, 20.0, 40.0, 90.0, 200.0])
    stats = check(tile, ids, PLAIN)
    assert stats.logps[-1] == 0 and stats.entropy[-1] == 0


@pytest.mark.parametrize("block", [0, 1, 2], ids=["first", "middle", "last"])
@pytest.mark.parametrize("only", [False, True], ids=["one-block-masked", "every-other-block-masked"])
@pytest.mark.parametrize(
    "transform", [PLAIN, LogitTransform(temperature=0.7, logit_scale=1.3)], ids=["plain", "scaled"]
)
def test_minus_infinity_in_blocks(block: int, only: bool, transform: LogitTransform) -> None:
    vocabulary = 10_000
    size = row_config(vocabulary, torch.float32).block_size
    assert -(-vocabulary // size) == 3
    inside = torch.arange(vocabulary) // size == block
    kept = inside if only else ~inside
    tile, _ = random_tile(vocabulary, torch.float32)
    ids = kept.nonzero().squeeze(-1)[torch.randint(0, int(kept.sum()), (ROWS,))]
    bias = torch.where(kept, torch.randn(vocabulary), -torch.inf)
    gradients = upstream(ROWS, torch.float32)
    stats = kernels.row_stats(tile, ids, transform, bias, entropy=True)
    out = torch.empty_like(tile)
    kernels.row_grad(tile, out, ids, transform, bias, *_of(stats), *gradients)
    # The truth over the kept columns alone; the others have probability, and gradient, exactly 0.
    position = kept.cumsum(0)[ids] - 1
    exact, exact_grad = truth(tile[:, kept], position, transform, bias[kept], list(gradients))
    eager = reference.row_stats(tile[:, kept], position, transform, bias[kept], entropy=True)
    for name, ours in outputs(stats).items():
        assert_as_good_as_eager(ours, outputs(eager)[name], exact[name], name)
    assert_as_good_as_eager(out[:, kept], exact_grad.float(), exact_grad, "grad")
    assert (out[:, ~kept] == 0).all()


@pytest.mark.parametrize("poison", [math.nan, math.inf, -math.inf], ids=["nan", "inf", "all-minus-inf"])
@pytest.mark.parametrize("column", [0, 4096, 9999], ids=["first-block", "second-block", "last-column"])
def test_a_bad_row_stays_alone(poison: float, column: int) -> None:
    tile, ids = random_tile(10_000, torch.float32)
    clean = kernels.row_stats(tile, ids, PLAIN, None, entropy=True)
    gradients = upstream(ROWS, torch.float32)
    clean_out = torch.empty_like(tile)
    kernels.row_grad(tile, clean_out, ids, PLAIN, None, *_of(clean), *gradients)
    bad = tile.clone()
    bad[2, slice(None) if poison == -math.inf else column] = poison
    stats = kernels.row_stats(bad, ids, PLAIN, None, entropy=True)
    out = torch.empty_like(tile)
    kernels.row_grad(bad, out, ids, PLAIN, None, *_of(stats), *gradients)
    good = torch.arange(ROWS) != 2
    for ours, expected in zip((*stats, out), (*clean, clean_out), strict=True):
        assert torch.equal(ours[good], expected[good])
    assert stats.logps[2].isnan() and stats.mean[2].isnan() and out[2].isnan().all()
    # A shard of the vocabulary may be masked as a whole: its share of the sum is 0, which the other shards can add to.
    expected_log_sum = -math.inf if poison == -math.inf else math.nan
    torch.testing.assert_close(stats.log_sum[2].item(), expected_log_sum, equal_nan=True)
    assert poison != -math.inf or stats.row_max[2] == -math.inf


@pytest.mark.parametrize("given", [(0,), (1,), (2,), (0, 1), (0, 2), (1, 2)], ids=str)
def test_missing_upstream_gradients(given: tuple[int, ...]) -> None:
    tile, ids = random_tile(507, torch.float64)
    gradients = [g if i in given else None for i, g in enumerate(upstream(ROWS, torch.float64))]
    stats = kernels.row_stats(tile, ids, EVERYTHING, None, entropy=True)
    out = torch.empty_like(tile)
    mean = stats.mean if 1 in given else None
    kernels.row_grad(tile, out, ids, EVERYTHING, None, stats.row_max, stats.log_sum, mean, *gradients)
    _, exact = truth(tile, ids, EVERYTHING, None, gradients)
    torch.testing.assert_close(out, exact, rtol=1e-12, atol=1e-13)


def test_no_entropy_no_entropy_output() -> None:
    tile, ids = random_tile(507, torch.float32)
    without, with_entropy = (kernels.row_stats(tile, ids, PLAIN, None, entropy=e) for e in (False, True))
    assert without.mean is None and without.entropy is None
    assert all(torch.equal(a, b) for a, b in zip(without[:3], with_entropy[:3], strict=True))


@pytest.mark.parametrize("transform", [PLAIN, EVERYTHING], ids=["plain", "everything"])
def test_fp64_throughout(transform: LogitTransform) -> None:
    # Scalars that pass through fp32 on their way into the kernel (1 / 0.7) would show at 1e-8.
    tile, ids = random_tile(5000, torch.float64)
    gradients = upstream(ROWS, torch.float64)
    stats = kernels.row_stats(tile, ids, transform, None, entropy=True)
    out = torch.empty_like(tile)
    kernels.row_grad(tile, out, ids, transform, None, *_of(stats), *gradients)
    exact, exact_grad = truth(tile, ids, transform, None, list(gradients))
    for name, ours in outputs(stats).items():
        torch.testing.assert_close(ours, exact[name], rtol=1e-12, atol=1e-13)
    torch.testing.assert_close(out, exact_grad, rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_token_of_another_shard(dtype: torch.dtype) -> None:
    tile, ids = random_tile(507, dtype)
    away = ids.clone()
    away[[0, 3]] = -1
    here, shard = (kernels.row_stats(tile, i, EVERYTHING, None, entropy=True) for i in (ids, away))
    assert (shard.logps[[0, 3]] == -torch.inf).all()
    assert torch.equal(shard.logps[[1, 2, 4]], here.logps[[1, 2, 4]])
    assert torch.equal(shard.row_max, here.row_max) and torch.equal(shard.log_sum, here.log_sum)
    gradients = upstream(ROWS, dtype)
    out, expected = torch.empty_like(tile), torch.empty_like(tile)
    kernels.row_grad(tile, out, away, EVERYTHING, None, *_of(shard), *gradients)
    reference.row_grad(tile, expected, away, EVERYTHING, None, *_of(shard), *gradients)
    eps = torch.finfo(dtype).eps
    torch.testing.assert_close(out, expected, rtol=16 * eps, atol=16 * eps)


def test_ids_out_of_range_read_nothing_and_are_loud() -> None:
    tile, ids = random_tile(507, torch.float32)
    bad = ids.clone()
    bad[1], bad[2] = 507, -2
    stats = kernels.row_stats(tile, bad, PLAIN, None, entropy=False)
    assert stats.logps.isnan().tolist() == [False, True, True, False, False]


@pytest.mark.parametrize("rows", [0, 1])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_few_rows(rows: int, dtype: torch.dtype) -> None:
    tile, ids = random_tile(507, dtype, rows=rows)
    if rows:
        check(tile, ids, EVERYTHING)
        return
    stats = kernels.row_stats(tile, ids, EVERYTHING, None, entropy=True)
    assert all(x.shape == (0,) for x in stats)
    kernels.row_grad(tile, torch.empty_like(tile), ids, EVERYTHING, None, *_of(stats), *upstream(0, dtype))


@pytest.mark.parametrize("vocabulary", [1, 129, 5000])
def test_strided_tiles(vocabulary: int) -> None:
    tile, ids = random_tile(vocabulary, torch.float32)
    wide, wide_out = (torch.full((2 * ROWS, vocabulary + 13), math.nan) for _ in range(2))
    view, out = wide[::2, 5 : 5 + vocabulary], wide_out[::2, 3 : 3 + vocabulary]
    view.copy_(tile)
    gradients = upstream(ROWS, torch.float32)
    stats = check(view, ids, EVERYTHING)
    dense = kernels.row_stats(tile, ids, EVERYTHING, None, entropy=True)
    assert all(torch.equal(a, b) for a, b in zip(stats, dense, strict=True))
    expected = torch.empty_like(tile)
    kernels.row_grad(tile, expected, ids, EVERYTHING, None, *_of(stats), *gradients)
    kernels.row_grad(view, out, ids, EVERYTHING, None, *_of(stats), *gradients)
    assert torch.equal(out, expected)
    assert wide_out.isnan().sum() == wide_out.numel() - expected.numel(), "wrote outside the view"


def test_strided_and_expanded_vectors() -> None:
    tile, ids = random_tile(507, torch.float32)
    g = torch.randn(ROWS, 3)
    stats = kernels.row_stats(tile, ids, PLAIN, None, entropy=True)
    out, expected = torch.empty_like(tile), torch.empty_like(tile)
    one = torch.tensor(0.7).expand(ROWS)
    kernels.row_grad(tile, out, ids, PLAIN, None, *_of(stats), g[:, 0], g[:, 1], one)
    dense = [x.contiguous() for x in (g[:, 0], g[:, 1], one)]
    kernels.row_grad(tile, expected, ids, PLAIN, None, *_of(stats), *dense)
    assert torch.equal(out, expected)


@pytest.mark.parametrize("vocabulary", [129, 5000])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
def test_in_place(vocabulary: int, dtype: torch.dtype) -> None:
    tile, ids = random_tile(vocabulary, dtype)
    gradients = upstream(ROWS, dtype)
    stats = kernels.row_stats(tile, ids, EVERYTHING, None, entropy=True)
    expected = torch.empty_like(tile)
    kernels.row_grad(tile, expected, ids, EVERYTHING, None, *_of(stats), *gradients)
    kernels.row_grad(tile, tile, ids, EVERYTHING, None, *_of(stats), *gradients)
    assert torch.equal(tile, expected)


def test_rows_move_in_place() -> None:
    # What the chunk engine does: live rows 1, 3, 4, 6 of 7 are packed to the front, where a GEMM sees them alone.
    tile, ids = random_tile(5000, torch.float32, rows=7)
    gradients = upstream(7, torch.float32)
    stats = kernels.row_stats(tile, ids, EVERYTHING, None, entropy=True)
    everywhere = torch.empty_like(tile)
    kernels.row_grad(tile, everywhere, ids, EVERYTHING, None, *_of(stats), *gradients)
    source, target = torch.tensor([6, 1, 3, 4]), torch.tensor([0, 1, 3, 2])
    before = tile.clone()
    kernels.row_grad(tile, tile, ids, EVERYTHING, None, *_of(stats), *gradients, source, target)
    assert torch.equal(tile[target], everywhere[source])
    rest = [4, 5, 6]
    assert torch.equal(tile[rest], before[rest])


@pytest.mark.parametrize("out_dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
def test_rows_move_to_another_tensor(out_dtype: torch.dtype) -> None:
    tile, ids = random_tile(507, torch.float32)
    gradients = upstream(ROWS, torch.float32)
    stats = kernels.row_stats(tile, ids, PLAIN, None, entropy=True)
    everywhere = torch.empty_like(tile)
    kernels.row_grad(tile, everywhere, ids, PLAIN, None, *_of(stats), *gradients)
    out = torch.full((3, 507), math.nan, dtype=out_dtype)
    source, target = torch.tensor([4, 0]), torch.tensor([0, 2])
    kernels.row_grad(tile, out, ids, PLAIN, None, *_of(stats), *gradients, source, target)
    # The interpreter cuts fp32 off to bf16 where a GPU rounds (the compile tests look for cvt.rn): allow one bf16 step.
    step = 2**-7 if out_dtype == torch.bfloat16 else 0.0
    torch.testing.assert_close(out[target], everywhere[source].to(out_dtype), rtol=step, atol=0.0)
    assert out[1].isnan().all()
    none = torch.empty(0, dtype=torch.int64)
    kernels.row_grad(tile, out, ids, PLAIN, None, *_of(stats), *gradients, none, none)


def test_bad_arguments_are_named() -> None:
    tile, ids = random_tile(507, torch.float32)
    stats = kernels.row_stats(tile, ids, PLAIN, None, entropy=True)
    gradients = upstream(ROWS, torch.float32)
    for name, error, call in [
        ("tile", TypeError, lambda: kernels.row_stats(tile.long(), ids, PLAIN, None, False)),
        ("tile", ValueError, lambda: kernels.row_stats(tile[0], ids, PLAIN, None, False)),
        ("tile", ValueError, lambda: kernels.row_stats(tile[:, :0], ids, PLAIN, None, False)),
        ("tile", ValueError, lambda: kernels.row_stats(tile.T.contiguous().T, ids, PLAIN, None, False)),
        ("ids", ValueError, lambda: kernels.row_stats(tile, ids[1:], PLAIN, None, False)),
        ("ids", TypeError, lambda: kernels.row_stats(tile, ids.int(), PLAIN, None, False)),
        ("bias", ValueError, lambda: kernels.row_stats(tile, ids, PLAIN, torch.zeros(506), False)),
        ("out", ValueError, lambda: kernels.row_grad(tile, tile[1:], ids, PLAIN, None, *_of(stats), *gradients)),
        ("out", ValueError, lambda: kernels.row_grad(tile, tile[:, 1:], ids, PLAIN, None, *_of(stats), *gradients)),
        ("out", ValueError, lambda: kernels.row_grad(
            tile, tile[:1].expand(ROWS, -1), ids, PLAIN, None, *_of(stats), *gradients)),
        ("grad_logps", ValueError, lambda: kernels.row_grad(
            tile, tile, ids, PLAIN, None, *_of(stats), gradients[0][1:], *gradients[1:])),
        ("mean", ValueError, lambda: kernels.row_grad(
            tile, tile, ids, PLAIN, None, stats.row_max, stats.log_sum, None, *gradients)),
        ("target", ValueError, lambda: kernels.row_grad(tile, tile, ids, PLAIN, None, *_of(stats), *gradients, ids)),
    ]:  # fmt: skip
        with pytest.raises(error, match=name):
            call()
