"""The fused forward in every configuration, compiled ahead of time for sm_80, sm_90 and sm_100 (no GPU).

Asserted beside fit and 64-bit addresses: the tensor cores and the copies that each configuration is there for, and that
what stands in the machine code multiplies and copies as much as the formulas say.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from compiling import CHIPS, Compiled, Recorder, assert_fits, compile_recorded, copied_bytes, record_launches
from torch import Tensor

from fastrl_kernels.head import LogitTransform
from fastrl_kernels.triton import linear_row_stats
from fastrl_kernels.triton.candidates import linear_flops
from fastrl_kernels.triton.launch import LINEAR_DTYPES, LinearConfig, linear_config, linear_schedule, linear_table

PLAIN, HEAVY = LogitTransform(), LogitTransform(temperature=0.7, logit_scale=1.3, softcap=30.0)
BF16, FP32 = torch.bfloat16, torch.float32
CORE = {80: "mma.sync", 90: "wgmma.mma_async", 100: "tcgen05.mma"}


@contextmanager
def products_in(precision: str) -> Iterator[None]:
    before = torch.backends.cuda.matmul.fp32_precision
    torch.backends.cuda.matmul.fp32_precision = precision
    try:
        yield
    finally:
        torch.backends.cuda.matmul.fp32_precision = before


def record_linear(
    monkeypatch: pytest.MonkeyPatch,
    arch: int,
    config: LinearConfig | None,
    dtype: torch.dtype = BF16,
    transform: LogitTransform = PLAIN,
    bias: bool = False,
    entropy: bool = True,
    depth: int = 64,  # of operands that are small: what is compiled depends on what their sizes are multiples of
) -> tuple[Recorder, Recorder]:
    """The launches of the fused GEMM and of the merge."""
    x, weight, ids = torch.zeros(256, depth, dtype=dtype), torch.zeros(512, depth, dtype=dtype), torch.arange(256)
    bias_ = torch.zeros(512) if bias else None
    gemm, merge = record_launches(
        monkeypatch, "linear_stats", x, weight, ids, transform, bias_, entropy, config, arch=arch
    )
    return gemm, merge


def check(
    recorder: Recorder, config: LinearConfig, arch: int, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> Compiled:
    """Fits the chip, uses its tensor cores, and copies by TMA or 16 bytes at a time."""
    folder.mkdir(exist_ok=True)
    compiled = compile_recorded(recorder, arch, folder, monkeypatch)
    assert_fits(compiled, arch)
    exact = recorder.arguments["PRECISION"] == "ieee" and _dtype(recorder) == FP32
    low = config.block_rows < 64  # less than one instruction of the later tensor cores
    core = CORE[80] if low else CORE[arch]
    assert ("fma.rn.f32" if exact else core) in compiled.ptx
    if config.descriptors:
        assert "cp.async.bulk.tensor.2d" in compiled.ptx and "cp.async.cg" not in compiled.ptx
    else:
        assert "cp.async.cg" in compiled.ptx, "16 bytes a thread"
        for name in ("x", "weight"):
            assert re.search(rf"arith\.extsi %{name}_stride.* i32 to i64", compiled.ttir), "64-bit base addresses"
    return compiled


def _dtype(recorder: Recorder) -> torch.dtype:
    first = next(iter(recorder.arguments.values()))
    return first.dtype if isinstance(first, Tensor) else first.base.dtype


def step_counts(ptx: str, config: LinearConfig, arch: int, dtype: torch.dtype) -> tuple[int, int]:
    """FLOPs and bytes of operands of one step of a program, from the instructions that stand in its loop."""
    warps, depth = config.num_warps, 32 // dtype.itemsize  # of one instruction: 32 bytes of each row
    flops = 0
    for m, n in re.findall(r"wgmma\.mma_async\.sync\.aligned\.m(\d+)n(\d+)k", ptx):
        flops += 2 * int(m) * int(n) * depth * (warps // 4)
    for m, n in re.findall(r"mma\.sync\.aligned\.m(\d+)n(\d+)k", ptx):
        flops += 2 * int(m) * int(n) * depth * warps
    if arch == 100:  # the instruction's shape is in a register: 128 rows, all columns of the tile
        flops += 2 * 128 * config.block_cols * depth * ptx.count("tcgen05.mma.cta_group")
    expected = re.findall(r"mbarrier\.arrive\.expect_tx\.shared(?:::cta)?\.b64 _, \[%r\d+\], (\d+)", ptx)
    if config.descriptors:
        return flops, sum(map(int, expected))
    # As many steps ahead as there are stages but one stand before the loop.
    return flops, copied_bytes(ptx) * 32 * warps // config.num_stages


# The choices for a wide model and a narrow one on each chip, their heaviest form where registers are scarcest.
REPRESENTATIVE = [
    (80, "wide", False, PLAIN),
    (80, "pair", False, HEAVY),
    (90, "wide", True, HEAVY),
    (90, "pair", True, HEAVY),
    (90, "low", True, PLAIN),
    (90, "wide", False, PLAIN),
    (100, "wide", True, PLAIN),
    (100, "pair", True, HEAVY),
]


@pytest.mark.parametrize(("arch", "name", "descriptors", "transform"), REPRESENTATIVE)
def test_choices_compile(
    arch: int,
    name: str,
    descriptors: bool,
    transform: LogitTransform,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    config = linear_table(BF16, False, arch // 10, descriptors)[name]
    gemm, _ = record_linear(monkeypatch, arch, config, transform=transform, bias=transform is HEAVY)
    check(gemm, config, arch, tmp_path, monkeypatch)


@pytest.mark.parametrize("arch", CHIPS)
def test_merge_compiles(arch: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _, merge = record_linear(monkeypatch, arch, None)
    compiled = compile_recorded(merge, arch, tmp_path, monkeypatch)
    assert_fits(compiled, arch)
    assert re.search(r"arith\.muli .* : i64", compiled.ttir), "splits x n in 64 bits"


def test_exact_fp32_compiles(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = linear_table(FP32, False, 9, True)["wide"]
    gemm, _ = record_linear(monkeypatch, 90, config, FP32)
    assert gemm.arguments["PRECISION"] == "ieee"
    compiled = check(gemm, config, 90, tmp_path, monkeypatch)
    assert not re.search("wgmma|mma.sync", compiled.ptx), "tf32 without leave"
    # Multiplied and added in one instruction although the epilogue must not be.
    assert compiled.ptx.count("fma.rn.f32") * 2 * 32 * config.num_warps >= config.step_flops


def test_tf32_is_taken_where_torch_takes_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with products_in("tf32"):
        gemm, _ = record_linear(monkeypatch, 90, None, FP32)
    assert gemm.arguments["PRECISION"] == "tf32" and "x_desc" in gemm.arguments
    config = linear_table(FP32, True, 9, True)["wide"]
    check(gemm, config, 90, tmp_path, monkeypatch)


@pytest.mark.parametrize(("arch", "dtype"), [(80, BF16), (90, BF16), (90, FP32), (100, BF16)], ids=str)
def test_unaligned_depth_goes_through_pointers(
    arch: int, dtype: torch.dtype, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    gemm, _ = record_linear(monkeypatch, arch, None, dtype, HEAVY, bias=True, depth=65)
    assert "x_ptr" in gemm.arguments
    assert_fits(compile_recorded(gemm, arch, tmp_path, monkeypatch), arch)


def test_static_flops_and_bytes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    shape = n, depth, vocabulary = 8192, 4096, 128256  # whole tiles in every direction
    lines = []
    for arch, name, descriptors in [(80, "wide", False), (90, "wide", True), (90, "pair", True), (100, "wide", True)]:
        config = linear_table(BF16, False, arch // 10, descriptors)[name]
        gemm, _ = record_linear(monkeypatch, arch, config)
        ptx = check(gemm, config, arch, tmp_path / str(len(lines)), monkeypatch).ptx
        flops, moved = step_counts(ptx, config, arch, BF16)
        schedule = linear_schedule(n, vocabulary, config, CHIPS[arch].processors)
        steps = schedule.row_blocks * -(-vocabulary // config.block_cols) * -(-depth // config.block_depth)
        exponentials = len(re.findall(r"ex2\.approx", ptx)) * 32 * config.num_warps
        logits = config.block_rows * config.block_cols
        lines.append(
            f"linear_row_stats sm_{arch} {tuple(config)}: a step {flops} FLOPs (formula {config.step_flops}), {moved} "
            f"bytes ({config.step_bytes(BF16)}); {steps} steps: {flops * steps / 1e12:.3f} TFLOP "
            f"(2NDV = {linear_flops(*shape) / 1e12:.3f}), {exponentials / logits:.2f} exponentials a logit, "
            f"{16 * schedule.splits} bytes a row written (its logits: {4 * vocabulary})"
        )
        assert flops == config.step_flops, lines[-1]
        assert moved == config.step_bytes(BF16), lines[-1]
        assert flops * steps == linear_flops(*shape), lines[-1]
        # One a logit, and for each row and piece one, in every thread that shares the row, to move the sum.
        assert 1 <= exponentials / logits < 1.3, lines[-1]
    with capsys.disabled():
        print("", *lines, sep="\n")


def test_products_are_not_drained_between_blocks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # One loop over blocks and depth: the wait for all products stands only where a block's statistics are taken.
    config = linear_table(BF16, False, 9, True)["wide"]
    gemm, _ = record_linear(monkeypatch, 90, config)
    ptx = check(gemm, config, 90, tmp_path, monkeypatch).ptx
    waits = [int(pending) for pending in re.findall(r"wgmma\.wait_group\.sync\.aligned (\d+)", ptx)]
    assert waits[0] == 1, waits
    assert ptx.count("cp.async.bulk.tensor.2d") == 2, "copies ahead of the loop would be repeated for every block"


@pytest.mark.parametrize(
    ("n", "vocabulary"), [(1, 1), (5, 507), (128, 128256), (300, 49152), (8192, 128256), (16001, 151936)]
)
@pytest.mark.parametrize("processors", [4, 108, 132])
def test_schedule_covers_everything_once(n: int, vocabulary: int, processors: int) -> None:
    for config in linear_table(BF16, False, 9, True).values():
        schedule = linear_schedule(n, vocabulary, config, processors)
        blocks = -(-vocabulary // config.block_cols)
        assert schedule.row_blocks * config.block_rows >= n > (schedule.row_blocks - 1) * config.block_rows
        assert schedule.splits * schedule.span >= blocks > (schedule.splits - 1) * schedule.span, "an empty split"
        places = set()
        for program in range(schedule.row_blocks * schedule.splits):  # as program_place
            first = program // (schedule.group_rows * schedule.splits) * schedule.group_rows
            size = min(schedule.row_blocks - first, schedule.group_rows)
            place = program % (schedule.group_rows * schedule.splits)
            places.add((first + place % size, place // size))
        assert places == {(r, s) for r in range(schedule.row_blocks) for s in range(schedule.splits)}
        slots = processors * config.programs
        waves = -(-schedule.row_blocks * schedule.splits // slots)
        if schedule.row_blocks * blocks > 20 * slots:
            idle = 1 - schedule.row_blocks * blocks / (waves * schedule.span * slots)
            assert idle < 0.12, f"{idle:.0%} of the multiprocessors' time is idle: {schedule}, {config}"


@pytest.mark.parametrize("arch", CHIPS)
def test_choices_fit_the_chip(arch: int) -> None:
    for dtype in LINEAR_DTYPES:
        for tf32 in (False, True):
            for n, depth in ((1, 64), (8192, 576), (8192, 4096)):
                default, possible = linear_config(n, depth, dtype, tf32, True, True, CHIPS[arch])
                assert default in possible
                assert default.descriptors == (arch >= 90 and (dtype != FP32 or tf32))


def test_small_chips() -> None:
    # 99 KiB of an RTX 4090 or 5090: nothing of Hopper's fits, and 12.x has no such tensor cores.
    for capability in (8, 12):
        default, _ = linear_config(
            4096, 4096, BF16, False, True, True, CHIPS[80]._replace(capability=capability, shared_bytes=101376)
        )
        assert not default.descriptors and default.shared_bytes(BF16) < 101376
    with pytest.raises(RuntimeError, match="shared memory"):
        linear_config(1, 1, BF16, False, True, True, CHIPS[80]._replace(shared_bytes=1024))


def test_cpu_tensors_are_refused_outside_the_interpreter() -> None:
    with pytest.raises(RuntimeError, match="CUDA"):
        linear_row_stats(torch.zeros(2, 3), torch.zeros(5, 3), torch.zeros(2, dtype=torch.int64), PLAIN, None, False)


def every_choice() -> list[tuple[int, torch.dtype, str, int, bool]]:
    """(architecture, dtype, rounding of fp32, depth, descriptors) of every table, once."""
    cases = []
    for arch in CHIPS:
        for dtype, rounding in [(BF16, "ieee"), (FP32, "tf32"), (FP32, "ieee")]:
            cases += [(arch, dtype, rounding, 64, False), (arch, dtype, rounding, 65, False)]
            if linear_table(dtype, rounding == "tf32", arch // 10, True) != linear_table(
                dtype, rounding == "tf32", 8, True
            ):
                cases.append((arch, dtype, rounding, 64, True))
    return [*cases, (90, torch.float16, "ieee", 64, False), (90, torch.float16, "ieee", 64, True)]


@pytest.mark.full
@pytest.mark.parametrize(("arch", "dtype", "rounding", "depth", "descriptors"), every_choice(), ids=str)
def test_every_configuration(
    arch: int,
    dtype: torch.dtype,
    rounding: str,
    depth: int,
    descriptors: bool,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    table = linear_table(dtype, rounding == "tf32", arch // 10, descriptors, depth % 16 == 0)
    forms = [
        (PLAIN, False, True),
        (PLAIN, False, False),
        (PLAIN, True, True),
        (LogitTransform(0.7), False, True),
        (HEAVY, False, False),
        (HEAVY, True, True),
    ]
    failed = []
    for name, config in table.items():
        for index, (transform, bias, entropy) in enumerate(forms):
            folder = tmp_path / f"{name} {index}"
            folder.mkdir()
            with products_in(rounding):
                gemm, _ = record_linear(monkeypatch, arch, config, dtype, transform, bias, entropy, depth)
            try:
                if depth == 64:
                    check(gemm, config, arch, folder, monkeypatch)
                else:
                    assert_fits(compile_recorded(gemm, arch, folder, monkeypatch), arch)
            except AssertionError as error:
                failed.append(f"{name} {config}, {transform}, {bias=}, {entropy=}: {str(error).splitlines()[0]}")
    assert not failed, "\n".join(failed)
