"""The row passes, tile by tile: the C++ ones for every instruction set that this processor runs, and the CUDA ones on a
stand-in for the CUDA runtime, which runs them on the CPU."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from cuda_on_cpu.build import cuda_on_cpu
from tolerance import assert_as_accurate, error
from torch import Tensor

from fastrl_kernels import LogitTransform, cpu, reference

from fastrl_kernels import _C  # type: ignore[attr-defined]  # isort: skip

DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
# 1: no other column; 127..129 and 2047..2049: around a vector and a block; 507: odd; 5000: several blocks
SIZES = (1, 2, 127, 128, 129, 507, 2047, 2048, 2049, 5000)


@pytest.fixture(params=[*_C.instruction_sets(), "cuda on cpu"])
def kernels(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    monkeypatch.setenv("CUDA_ON_CPU_CAPABILITY", "9")
    if request.param == "cuda on cpu":
        yield cuda_on_cpu()
        return
    before = _C.instruction_set()
    _C.use_instruction_set(request.param)
    yield cpu
    _C.use_instruction_set(before)


def truth_stats(tile: Tensor, ids: Tensor, transform: LogitTransform, bias: Tensor | None) -> list[Tensor]:
    """logp, entropy and lse in fp64 through log_softmax, which shares nothing with the row passes."""
    bias = None if bias is None else bias.double()
    logps, entropy, lse = reference.logprobs_from_logits(
        reference.transform_logits(tile.double(), transform, bias), ids, LogitTransform(), None, True
    )
    assert entropy is not None
    return [logps, entropy, lse]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("v", SIZES)
def test_stats_match_fp64(v: int, dtype: torch.dtype, kernels: Any) -> None:
    for transform in (
        LogitTransform(),
        LogitTransform(0.7, 1.3),
        LogitTransform(1.5, -0.5, 5.0),
        LogitTransform(softcap=30.0),
    ):
        for bias in (None, torch.randn(v)):
            tile = (torch.randn(5, v) * 4 - 20).to(dtype)  # all negative: a counted padding column would win
            ids = torch.randint(v, (5,))
            stats = kernels.row_stats(tile, ids, transform, bias, True)
            truth = truth_stats(tile, ids, transform, bias)
            low = torch.float64 if dtype == torch.float64 else torch.float32
            plain_bias = None if bias is None else bias.to(low)
            z = reference.transform_logits(tile.to(low), transform, plain_bias)
            logp = z.log_softmax(-1)
            plain = [logp.gather(-1, ids[:, None])[:, 0], -(logp.exp() * logp).sum(-1), z.logsumexp(-1)]
            ours = [stats.logps, stats.entropy, stats.row_max + stats.log_sum]
            for name, o, p, t in zip(("logps", "entropy", "lse"), ours, plain, truth, strict=True):
                assert o is not None
                assert_as_accurate(o, p, t, f"{name} V={v} {transform}")
            assert (stats.logps <= 0).all()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("v", SIZES)
def test_grad_matches_fp64(v: int, dtype: torch.dtype, kernels: Any) -> None:
    for transform in (LogitTransform(), LogitTransform(0.7, 1.3, 5.0)):
        for bias in (None, torch.randn(v)):
            tile, ids = (torch.randn(6, v) * 3).to(dtype), torch.randint(v, (6,))
            upstream = [torch.randn(6) for _ in range(3)]

            def plain_grad(at: torch.dtype) -> Tensor:
                x = tile.detach().to(at).requires_grad_()
                outputs = (
                    truth_stats(x, ids, transform, bias)
                    if at == torch.float64
                    else list(
                        reference.logprobs_from_logits(
                            reference.transform_logits(x, transform, bias), ids, LogitTransform(), None, True
                        )
                    )
                )
                total = sum((o * g.to(at)).sum() for o, g in zip(outputs, upstream, strict=True) if o is not None)
                return torch.autograd.grad(total, x)[0]  # type: ignore[arg-type]

            stats = kernels.row_stats(tile, ids, transform, bias, True)
            before, out = tile.clone(), torch.full_like(tile, torch.nan)
            kernels.row_grad(
                tile,
                out,
                ids,
                transform,
                bias,
                stats.row_max,
                stats.log_sum,
                stats.mean,
                *(upstream[i] for i in (0, 1, 2)),
            )
            plain = plain_grad(torch.float32 if dtype.itemsize == 2 else dtype).to(dtype)
            assert_as_accurate(out, plain, plain_grad(torch.float64), f"gradient V={v} {transform}")
            assert torch.equal(tile, before)
            kernels.row_grad(tile, tile, ids, transform, bias, stats.row_max, stats.log_sum, stats.mean, *upstream)
            assert torch.equal(tile, out), "in place differs from out of place"


@pytest.mark.parametrize("softcap", (1.0, 5.0, 30.0))
def test_padding_never_counts_with_softcap(softcap: float, kernels: Any) -> None:
    # A column of padding that is soft-capped after being set to -inf would count as exp(-softcap).
    for v in (1, 3, 129, 507):
        tile = torch.full((2, v), -50.0 * softcap)
        stats = kernels.row_stats(tile, torch.zeros(2, dtype=torch.int64), LogitTransform(softcap=softcap), None, True)
        torch.testing.assert_close(
            stats.logps, torch.full((2,), -1.0) * torch.tensor(float(v)).log(), rtol=1e-6, atol=1e-6
        )


@pytest.mark.parametrize("dtype", (torch.float32, torch.float64), ids=str)
@pytest.mark.parametrize("where", ("first", "last", "all but one"))
def test_infinite_blocks(where: str, dtype: torch.dtype, kernels: Any) -> None:
    v = 3 * 2048 + 5
    bias = torch.zeros(v, dtype=dtype)
    if where == "first":
        bias[:2048] = -torch.inf
    elif where == "last":
        bias[-5:] = -torch.inf
    else:
        bias[:] = -torch.inf
        bias[2100] = 0
    tile = torch.randn(3, v, dtype=dtype)
    ids = torch.full((3,), 2100)
    stats = kernels.row_stats(tile, ids, LogitTransform(), bias, True)
    logps, entropy, lse = truth_stats(tile, ids, LogitTransform(), bias)
    assert stats.entropy is not None
    assert error(stats.logps, logps) < 1e-6 and error(stats.entropy, entropy) < 1e-6
    assert error(stats.row_max + stats.log_sum, lse) < 1e-6
    grad = [torch.randn(3, dtype=dtype) for _ in range(3)]
    kernels.row_grad(tile, tile, ids, LogitTransform(), bias, stats.row_max, stats.log_sum, stats.mean, *grad)
    assert tile.isfinite().all() and (tile[:, bias == -torch.inf] == 0).all()


@pytest.mark.parametrize("bad", (torch.nan, torch.inf))
@pytest.mark.parametrize("column", (0, 100, 2060))
def test_a_bad_row_stays_alone(bad: float, column: int, kernels: Any) -> None:
    clean = torch.randn(4, 2061)
    ids = torch.tensor([3, 7, 2060, 1])
    tile = clean.clone()
    tile[2, column] = bad
    good, stats = (kernels.row_stats(x, ids, LogitTransform(), None, True) for x in (clean, tile))
    rows = [0, 1, 3]
    for name, a, b in zip(good._fields, good, stats, strict=True):
        assert torch.equal(a[rows], b[rows]), name
    assert stats.logps[2].isnan() and stats.entropy[2].isnan()  # type: ignore[index]


def test_all_infinite_row_is_nan_as_in_log_softmax(kernels: Any) -> None:
    stats = kernels.row_stats(
        torch.full((1, 10), -torch.inf), torch.zeros(1, dtype=torch.int64), LogitTransform(), None, True
    )
    assert stats.logps.isnan().all() and torch.full((1, 10), -torch.inf).log_softmax(-1).isnan().all()


@pytest.mark.parametrize("offset", (1e2, 1e4, 1e6))
def test_common_offset_does_not_cancel(offset: float, kernels: Any) -> None:
    base = torch.randint(-40, 40, (4, 600)).float() / 8  # representable beside the offset
    ids = torch.randint(600, (4,))
    shifted = base + offset
    assert torch.equal(shifted - offset, base)
    a, b = (kernels.row_stats(x, ids, LogitTransform(), None, True) for x in (base, shifted))
    torch.testing.assert_close(a.logps, b.logps, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(a.entropy, b.entropy, rtol=1e-6, atol=1e-6)
    grads = []
    for tile, s in ((base, a), (shifted, b)):
        out = torch.empty_like(tile)
        kernels.row_grad(tile, out, ids, LogitTransform(), None, s.row_max, s.log_sum, None, torch.ones(4), None, None)
        grads.append(out)
    torch.testing.assert_close(*grads, rtol=1e-5, atol=1e-7)


def test_token_of_another_shard(kernels: Any) -> None:
    tile, ids = torch.randn(2, 50), torch.tensor([-1, 3])
    stats = kernels.row_stats(tile, ids, LogitTransform(), None, False)
    assert stats.logps[0] == -torch.inf and stats.logps[1].isfinite() and stats.entropy is None
    out = torch.empty_like(tile)
    kernels.row_grad(
        tile, out, ids, LogitTransform(), None, stats.row_max, stats.log_sum, None, torch.ones(2), None, None
    )
    torch.testing.assert_close(out[0], -tile[0].softmax(-1))


def test_moves_and_strides(kernels: Any) -> None:
    wide = torch.randn(6, 80)
    tile = wide[:, 7:57]  # row stride 80, 50 columns
    ids, g = torch.randint(50, (6,)), torch.randn(6)
    stats = kernels.row_stats(tile, ids, LogitTransform(), None, True)
    whole = torch.empty(6, 50)
    kernels.row_grad(tile, whole, ids, LogitTransform(), None, stats.row_max, stats.log_sum, stats.mean, g, g, g)
    rest = wide.clone()
    source, target = torch.tensor([0, 5, 4]), torch.tensor([0, 1, 2])
    kernels.row_grad(
        tile, tile, ids, LogitTransform(), None, stats.row_max, stats.log_sum, stats.mean, g, g, g, source, target
    )
    assert torch.equal(tile[:3], whole[source])
    rest[:3, 7:57] = tile[:3]
    assert torch.equal(wide, rest), "wrote outside its rows"


def test_same_bits_for_any_number_of_threads(kernels: Any) -> None:
    tile, ids, g = torch.randn(7, 3000), torch.randint(3000, (7,)), torch.randn(7)
    threads = torch.get_num_threads()
    results = []
    try:
        for count, openmp in ((1, cpu.torch_openmp()), (2, cpu.torch_openmp()), (5, cpu.torch_openmp()), (3, 0)):
            torch.set_num_threads(count)
            _C.use_openmp(openmp)  # 0: threads of our own
            stats = kernels.row_stats(tile, ids, LogitTransform(), None, True)
            out = torch.empty_like(tile)
            kernels.row_grad(tile, out, ids, LogitTransform(), None, stats.row_max, stats.log_sum, stats.mean, g, g, g)
            results.append([*stats, out])
    finally:
        torch.set_num_threads(threads)
        _C.use_openmp(cpu.torch_openmp())
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere the row passes have threads of their own")
def test_runs_on_torchs_threads_and_after_a_fork() -> None:
    assert not torch.backends.openmp.is_available() or cpu.torch_openmp() != 0
    program = """
import os, torch
from fastrl_kernels import LogitTransform, cpu
torch.set_num_threads(2)
tile, ids = torch.randn(512, 3000), torch.zeros(512, dtype=torch.int64)
def row_pass(): return cpu.row_stats(tile, ids, LogitTransform(), None, False).logps
def count(): return len(os.listdir("/proc/self/task"))
torch.mm(tile.t(), tile)  # wakes torch's pool
before, expected = count(), row_pass()
assert count() == before, (count(), before)
child = os.fork()  # whose pool is gone
if child == 0:
    os._exit(0 if torch.equal(row_pass(), expected) else 1)
assert os.waitpid(child, 0)[1] == 0
"""
    subprocess.run([sys.executable, "-c", program], check=True, timeout=120)


def test_wrong_arguments_are_named(kernels: Any) -> None:
    tile, ids = torch.randn(3, 10), torch.zeros(3, dtype=torch.int64)
    with pytest.raises(TypeError, match=r"tile.*int64"):
        kernels.row_stats(tile.long(), ids, LogitTransform(), None, False)
    with pytest.raises(ValueError, match="tile"):
        kernels.row_stats(tile.t(), ids, LogitTransform(), None, False)
    with pytest.raises(ValueError, match="ids"):
        kernels.row_stats(tile, ids[:2], LogitTransform(), None, False)
    with pytest.raises(TypeError, match="ids"):
        kernels.row_stats(tile, ids.float(), LogitTransform(), None, False)
    with pytest.raises(ValueError, match="out"):
        kernels.row_grad(tile, tile.double(), ids, LogitTransform(), None, ids, ids, None, None, None, None)
    with pytest.raises(ValueError, match="instruction set"):
        _C.use_instruction_set("mmx")


def test_reference_row_functions_agree() -> None:
    """The tile-level definitions equal the op-level ones, which use log_softmax and autograd."""
    tile, ids, bias = (
        torch.randn(5, 40, dtype=torch.float64),
        torch.randint(40, (5,)),
        torch.randn(40, dtype=torch.float64),
    )
    transform, g = LogitTransform(0.8, 1.2, 4.0), [torch.randn(5, dtype=torch.float64) for _ in range(3)]
    x = tile.clone().requires_grad_()
    truth = truth_stats(x, ids, transform, bias)
    stats = reference.row_stats(tile, ids, transform, bias, True)
    for ours, t in zip((stats.logps, stats.entropy, stats.row_max + stats.log_sum), truth, strict=True):
        torch.testing.assert_close(ours, t)
    out = torch.empty_like(tile)
    reference.row_grad(tile, out, ids, transform, bias, stats.row_max, stats.log_sum, stats.mean, *g)
    (want,) = torch.autograd.grad(sum((t * u).sum() for t, u in zip(truth, g, strict=True)), x)  # type: ignore[arg-type]
    torch.testing.assert_close(out, want)
