"""Every kernel in every configuration, compiled ahead of time into real cubins for sm_80, sm_90 and sm_100 (no GPU).

The fused forward has a file of its own.
"""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
from compiling import (
    CHIPS,
    Recorder,
    assert_fits,
    assert_wide_addresses,
    compile_recorded,
    record,
    vector_bytes,
)

from fastrl_kernels.head import LogitTransform, accumulation_dtype
from fastrl_kernels.triton import group_advantages, row_grad, row_stats
from fastrl_kernels.triton.candidates import row_bytes
from fastrl_kernels.triton.launch import (
    ROW_DTYPES,
    RowConfig,
    row_candidates,
    row_config,
    row_configs,
    row_grad_candidates,
)

PLAIN, SOFTCAP = LogitTransform(), LogitTransform(temperature=0.7, logit_scale=1.3, softcap=30.0)
# One vocabulary per configuration, divisible by 16 like those of real models (Llama 3: 128256): loads vectorize.
VOCABULARIES = {"short": 512, "medium": 2048, "long": 128256}
PAIRS = [
    (torch.float32, torch.float32),
    (
        torch.float32,
        torch.bfloat16,
    ),  # bf16 weights on a GPU: logits in fp32, their gradient in bf16 for the tensor cores
    (torch.bfloat16, torch.bfloat16),  # logits of a model in bf16
    (torch.float64, torch.float64),
]


def config_of(recorder: Recorder) -> RowConfig:
    stages = recorder.arguments.get("BLOCKS_IN_FLIGHT", 1)
    return RowConfig(recorder.arguments["BLOCK_SIZE"], recorder.options["num_warps"], stages)


def sixteen_bytes(dtype: torch.dtype, config: RowConfig) -> str | None:
    """The PTX of a 16-byte access, or None where a thread holds less than that."""
    if config.block_size // (32 * config.num_warps) * dtype.itemsize < 16:
        return None
    return "v2.b64" if dtype == torch.float64 else "v4.b32"


def record_stats(
    monkeypatch: pytest.MonkeyPatch,
    vocabulary: int,
    dtype: torch.dtype,
    transform: LogitTransform,
    bias: bool,
    entropy: bool,
    config: RowConfig | None = None,
) -> Recorder:
    tile, ids = torch.empty(2, vocabulary, dtype=dtype), torch.zeros(2, dtype=torch.int64)
    bias_ = torch.zeros(vocabulary) if bias else None
    return record(monkeypatch, "row_stats", tile, ids, transform, bias_, entropy, config)


def record_grad(
    monkeypatch: pytest.MonkeyPatch,
    vocabulary: int,
    dtypes: tuple[torch.dtype, torch.dtype],
    transform: LogitTransform,
    bias: bool,
    given: tuple[bool, bool, bool],  # gradients of logps, entropy, lse
    moves: bool,
    config: RowConfig | None = None,
) -> Recorder:
    tile, out = (torch.empty(2, vocabulary, dtype=dtype) for dtype in dtypes)
    row = torch.zeros(2, dtype=accumulation_dtype(dtypes[0]))
    rows = torch.arange(2)
    gradients = [row if g else None for g in given]
    return record(
        monkeypatch, "row_grad", tile, out, rows, transform, torch.zeros(vocabulary) if bias else None,
        row, row, row if given[1] else None, *gradients, *([rows, rows] if moves else [None, None]), config,
    )  # fmt: skip


def check_stats(recorder: Recorder, arch: int, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    compiled = compile_recorded(recorder, arch, folder, monkeypatch)
    assert_fits(compiled, arch)
    assert_wide_addresses(compiled, "tile_ptr")
    config = config_of(recorder)
    wide = sixteen_bytes(recorder.arguments["tile_ptr"].dtype, config)
    if config.num_stages > 1:
        assert re.search(r"cp\.async\.cg\.shared\.global [^;]*, 0x10,", compiled.ptx), "copies of 16 bytes"
    else:
        assert wide is None or f"ld.global.{wide}" in compiled.ptx


def check_grad(recorder: Recorder, arch: int, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    compiled = compile_recorded(recorder, arch, folder, monkeypatch)
    assert_fits(compiled, arch)
    assert_wide_addresses(compiled, "tile_ptr", "out_ptr")
    loads, stores = (
        sixteen_bytes(recorder.arguments[name].dtype, config_of(recorder)) for name in ("tile_ptr", "out_ptr")
    )
    assert loads is None or f"ld.global.{loads}" in compiled.ptx
    assert stores is None or f"st.global.{stores}" in compiled.ptx
    if recorder.arguments["out_ptr"].dtype == torch.bfloat16:
        assert "cvt.rn.bf16" in compiled.ptx, "bf16 gradients must be rounded, not cut off"


def table_choices(dtype: torch.dtype) -> set[RowConfig]:
    return {row_config(v, dtype) for v in VOCABULARIES.values()}


@pytest.mark.parametrize("dtype", ROW_DTYPES, ids=str)
def test_every_configuration_is_compiled_here(dtype: torch.dtype) -> None:
    assert {row_config(v, dtype) for v in range(1, 10_000)} == table_choices(dtype)
    assert table_choices(dtype) <= set(row_configs(dtype))
    for vocabulary in VOCABULARIES.values():
        for possible in (row_candidates, row_grad_candidates):
            assert set(possible(vocabulary, dtype)) <= set(row_configs(dtype))
            assert row_config(vocabulary, dtype) in possible(vocabulary, dtype)


@pytest.mark.parametrize("arch", CHIPS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
def test_configurations_that_a_measurement_may_choose(
    arch: int, dtype: torch.dtype, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    long = VOCABULARIES["long"]
    for index, config in enumerate(set(row_configs(dtype)) - table_choices(dtype)):
        folder = tmp_path / str(index)
        folder.mkdir()
        recorder = record_stats(monkeypatch, long, dtype, SOFTCAP, True, True, config)
        assert config_of(recorder) == config
        check_stats(recorder, arch, folder, monkeypatch)
    for index, config in enumerate(set(row_grad_candidates(long, dtype)) - table_choices(dtype)):
        folder = tmp_path / f"grad{index}"
        folder.mkdir()
        all_given = (True, True, True)
        recorder = record_grad(monkeypatch, long, (dtype, dtype), SOFTCAP, True, all_given, True, config)
        check_grad(recorder, arch, folder, monkeypatch)


# Per logit, by reading the source: multiplications, subtractions, exponentials. (Additions and comparisons also make up
# the reductions over lanes, whose number depends on the layout.)
ROW_FLOPS = {
    "row_stats": (3, 1, 1),  # * scale, - shift, * log2(e), exp, sum * alpha
    "row_stats entropy": (6, 1, 1),  # and sum * moved, dot * alpha, exp * d
    "row_grad": (4, 2, 1),  # * scale, - max, - log_sum, * log2(e), exp, * factor, * slope
    "row_grad entropy": (5, 4, 1),  # and - mean, * grad_entropy, factor -
}


def test_static_bytes_and_flops_of_the_row_passes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    lines = []
    fp32, bf16 = torch.float32, torch.bfloat16
    for op, dtype, entropy in [(o, d, e) for o in ("row_stats", "row_grad") for d in (fp32, bf16) for e in (0, 1)]:
        folder = tmp_path / str(len(lines))
        folder.mkdir()
        if op == "row_stats":
            recorder = record_stats(monkeypatch, VOCABULARIES["long"], dtype, PLAIN, False, bool(entropy))
        else:
            given = (True, bool(entropy), False)
            recorder = record_grad(monkeypatch, VOCABULARIES["long"], (dtype, dtype), PLAIN, False, given, False)
        ptx = compile_recorded(recorder, 90, folder, monkeypatch).ptx
        block, warps, _ = config_of(recorder)
        per_thread = block // (32 * warps)
        name = f"{op}{' entropy' * entropy}"
        moved = (vector_bytes(ptx, "ld") + vector_bytes(ptx, "st")) * 32 * warps
        counts = tuple(
            len(re.findall(rf"^\s*{op_}(?:\.\w+)*\.f32\b", ptx, re.MULTILINE)) // per_thread
            for op_ in ("mul", "sub", "ex2")
        )
        lines.append(
            f"{name:18} {dtype!s:15} block {block}: {moved / block:g} bytes a logit (formula "
            f"{row_bytes(op, 1, 1, dtype)}), {counts} multiplications, subtractions, exponentials ({ROW_FLOPS[name]})"
        )
        assert moved == row_bytes(op, 1, block, dtype), lines[-1]
        assert counts == ROW_FLOPS[name], lines[-1]
    with capsys.disabled():
        print("", *lines, sep="\n")


@pytest.mark.parametrize("arch", CHIPS)
@pytest.mark.parametrize("vocabulary", VOCABULARIES.values(), ids=VOCABULARIES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
def test_row_stats(
    arch: int, vocabulary: int, dtype: torch.dtype, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # The heaviest form on every chip; the lightest, which most models run, where it differs most in registers.
    check_stats(record_stats(monkeypatch, vocabulary, dtype, SOFTCAP, True, True), arch, tmp_path, monkeypatch)
    if arch == 90:
        check_stats(record_stats(monkeypatch, vocabulary, dtype, PLAIN, False, False), arch, tmp_path, monkeypatch)


@pytest.mark.parametrize("arch", CHIPS)
@pytest.mark.parametrize("vocabulary", VOCABULARIES.values(), ids=VOCABULARIES)
@pytest.mark.parametrize("dtypes", PAIRS, ids=lambda pair: f"{pair[0]}-{pair[1]}")
def test_row_grad(
    arch: int,
    vocabulary: int,
    dtypes: tuple[torch.dtype, torch.dtype],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    everything = record_grad(monkeypatch, vocabulary, dtypes, SOFTCAP, True, (True, True, True), True)
    check_grad(everything, arch, tmp_path, monkeypatch)
    if arch == 90:
        plain = record_grad(monkeypatch, vocabulary, dtypes, PLAIN, False, (True, False, False), False)
        check_grad(plain, arch, tmp_path, monkeypatch)


@pytest.mark.parametrize("arch", CHIPS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("scale", ["group", "batch"])
def test_group_advantages(
    arch: int, dtype: torch.dtype, scale: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rewards, ids = torch.zeros(40, dtype=dtype), torch.zeros(40, dtype=torch.int64)
    recorder = record(monkeypatch, "group_advantages", rewards, ids, "leave_one_out", scale, 1e-4)
    compiled = compile_recorded(recorder, arch, tmp_path, monkeypatch)
    assert_fits(compiled, arch)


def test_an_unaligned_vocabulary_compiles(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # GPT-2's 50257: rows start at any address, so nothing may be assumed about their alignment.
    for index, recorder in enumerate(
        [
            record_stats(monkeypatch, 50257, torch.float32, PLAIN, False, True),
            record_grad(monkeypatch, 50257, (torch.float32, torch.bfloat16), PLAIN, False, (True, True, False), True),
        ]
    ):
        folder = tmp_path / str(index)
        folder.mkdir()
        compiled = compile_recorded(recorder, 90, folder, monkeypatch)
        assert_fits(compiled, 90)
        assert not re.search(r"ld\.global\.v[24]\.b32", compiled.ptx)


def test_rows_are_on_grid_axis_0(monkeypatch: pytest.MonkeyPatch) -> None:
    # Axis 1 ends at 65,535: a batch of 65,537 tokens failed to launch elsewhere.
    n = 65_537
    tile, ids = torch.empty(n, 2), torch.zeros(n, dtype=torch.int64)
    row = torch.zeros(n)
    assert record(monkeypatch, "row_stats", tile, ids, PLAIN, None, False).grid == (n,)
    grad = record(monkeypatch, "row_grad", tile, tile, ids, PLAIN, None, row, row, None, row, None, None, None, None)
    assert grad.grid == (n, 1)
    group = record(monkeypatch, "group_advantages", row, ids, "mean", "group", 1e-4)
    assert len(group.grid) == 1 and group.grid[0] * group.arguments["BLOCK_ROWS"] >= n
    vocabulary = 300_000
    wide = torch.empty(1, vocabulary)
    one = torch.zeros(1)
    columns = record(
        monkeypatch, "row_grad", wide, wide, ids[:1], PLAIN, None, one, one, None, one, None, None, None, None
    )
    assert columns.grid[1] * columns.arguments["BLOCK_SIZE"] >= vocabulary and columns.grid[1] < 65_536


def test_logits_are_computed_alike_in_both_kernels(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # Fused into a multiply-add with the maximum, the two kernels would disagree on the logit, and logps pass 0.
    for recorder in (
        record_stats(monkeypatch, 128256, torch.float32, LogitTransform(temperature=0.7), False, True),
        record_grad(
            monkeypatch, 128256, (torch.float32, torch.float32), LogitTransform(temperature=0.7), False,
            (True, True, True), False,
        ),
    ):  # fmt: skip
        assert recorder.options["enable_fp_fusion"] is False
        folder = tmp_path / recorder.kernel.__name__
        folder.mkdir()
        compiled = compile_recorded(recorder, 90, folder, monkeypatch)
        block = recorder.arguments["BLOCK_SIZE"] // (32 * recorder.options["num_warps"])
        # tl.log of the one total takes a few; the 16 logits of a thread would take 16 each.
        assert compiled.ptx.count("fma.rn.f32") < block


def test_cpu_tensors_are_refused_outside_the_interpreter() -> None:
    tile, ids = torch.zeros(2, 9), torch.zeros(2, dtype=torch.int64)
    with pytest.raises(RuntimeError, match="CUDA"):
        row_stats(tile, ids, PLAIN, None, False)
    with pytest.raises(RuntimeError, match="CUDA"):
        row_grad(tile, tile, ids, PLAIN, None, tile[:, 0], tile[:, 0], None, tile[:, 0], None, None)
    with pytest.raises(RuntimeError, match="CUDA"):
        group_advantages(tile[:, 0], ids, "mean", "group", 1e-4)


@pytest.mark.full
@pytest.mark.parametrize("arch", CHIPS)
@pytest.mark.parametrize("vocabulary", [*VOCABULARIES.values(), 50257], ids=[*VOCABULARIES, "unaligned"])
@pytest.mark.parametrize("transform", [PLAIN, SOFTCAP], ids=["plain", "softcap"])
@pytest.mark.parametrize("bias", [False, True], ids=["", "bias"])
def test_every_form(
    arch: int,
    vocabulary: int,
    transform: LogitTransform,
    bias: bool,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    recorders = [
        record_stats(monkeypatch, vocabulary, dtype, transform, bias, entropy)
        for dtype in ROW_DTYPES
        for entropy in (False, True)
    ]
    pairs = [*PAIRS, (torch.float32, torch.float16), (torch.float16, torch.float16)]
    forms = [(a, b, c) for a in (False, True) for b in (False, True) for c in (False, True) if a or b or c]
    recorders += [
        record_grad(monkeypatch, vocabulary, pair, transform, bias, given, moves)
        for pair in pairs
        for given in forms
        for moves in {False, all(given)}
    ]
    for index, recorder in enumerate(recorders):
        folder = tmp_path / str(index)
        folder.mkdir()
        assert_fits(compile_recorded(recorder, arch, folder, monkeypatch), arch)
