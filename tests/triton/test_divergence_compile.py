"""divergence_rows compiled for real chips in every configuration it may be launched in: no spills, wide loads."""

from __future__ import annotations

import itertools
from pathlib import Path

import pytest
import torch
from compiling import CHIPS, Recorder, assert_fits, assert_wide_addresses, compile_recorded, record

from fastrl_kernels.head import LogitTransform, accumulation_dtype
from fastrl_kernels.triton import divergence_rows
from fastrl_kernels.triton.divergence_rows import divergence_candidates
from fastrl_kernels.triton.launch import ROW_DTYPES, RowConfig

PLAIN, SOFTCAP = LogitTransform(), LogitTransform(temperature=0.7, logit_scale=1.3, softcap=30.0)
# One vocabulary per table, divisible by 16 like those of real models (Llama 3: 128256): loads vectorize.
VOCABULARIES = {"short": 256, "long": 128256}
KINDS = ("forward_kl", "reverse_kl", "jsd")


def record_rows(
    monkeypatch: pytest.MonkeyPatch,
    vocabulary: int,
    dtype: torch.dtype,
    kind: str,
    config: RowConfig | None = None,
    *,
    out_dtype: torch.dtype | None = None,
    full: bool = True,
    gradient: bool = True,
) -> Recorder:
    """The launch for two rows; full: with biases and softcaps on both sides."""
    tile, ref_tile = (torch.empty(2, vocabulary, dtype=dtype) for _ in range(2))
    transform, bias = (SOFTCAP, torch.zeros(vocabulary)) if full else (PLAIN, None)
    out = torch.empty(2, vocabulary, dtype=out_dtype or dtype) if gradient else None
    weight = torch.zeros(2, dtype=accumulation_dtype(dtype)) if gradient else None
    return record(
        monkeypatch, "divergence_rows", tile, ref_tile, kind, 0.3, transform, transform, bias, bias, weight, out, config
    )


def check(recorder: Recorder, arch: int, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder.mkdir()
    compiled = compile_recorded(recorder, arch, folder, monkeypatch)
    assert_fits(compiled, arch)
    assert_wide_addresses(compiled, "tile_ptr", "ref_tile_ptr")
    arguments, threads = recorder.arguments, 32 * recorder.options["num_warps"]
    dtype = arguments["tile_ptr"].dtype
    if arguments["V"] % 16 == 0 and arguments["BLOCK_SIZE"] // threads * dtype.itemsize >= 16:
        assert f"ld.global.{'v2.b64' if dtype == torch.float64 else 'v4.b32'}" in compiled.ptx
    assert recorder.options["enable_fp_fusion"] is False


@pytest.mark.parametrize("arch", CHIPS)
@pytest.mark.parametrize("vocabulary", VOCABULARIES.values(), ids=VOCABULARIES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_every_configuration(
    arch: int, vocabulary: int, dtype: torch.dtype, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for index, config in enumerate(divergence_candidates(vocabulary, dtype)):
        recorder = record_rows(monkeypatch, vocabulary, dtype, "jsd", config)
        check(recorder, arch, tmp_path / str(index), monkeypatch)


@pytest.mark.parametrize("kind", KINDS)
def test_what_most_models_run(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # A bf16 head: logits in fp32, their gradient in bf16 for the tensor cores; and the value alone.
    for gradient in (True, False):
        recorder = record_rows(
            monkeypatch, VOCABULARIES["long"], torch.float32, kind, out_dtype=torch.bfloat16, full=False,
            gradient=gradient,
        )  # fmt: skip
        check(recorder, 90, tmp_path / str(gradient), monkeypatch)


def test_an_unaligned_vocabulary(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    check(record_rows(monkeypatch, 50257, torch.float32, "jsd"), 90, tmp_path / "unaligned", monkeypatch)


def test_rows_are_on_grid_axis_0(monkeypatch: pytest.MonkeyPatch) -> None:
    tile = torch.empty(65_537, 2)
    recorder = record(monkeypatch, "divergence_rows", tile, tile, "jsd", 0.5, PLAIN, PLAIN, None, None)
    assert recorder.grid == (65_537,)


@pytest.mark.parametrize("dtype", ROW_DTYPES, ids=str)
def test_every_choice_is_in_the_table(dtype: torch.dtype) -> None:
    choices = {config for v in range(1, 5000) for config in divergence_candidates(v, dtype)}
    assert choices == {config for v in VOCABULARIES.values() for config in divergence_candidates(v, dtype)}


def test_cpu_tensors_are_refused_outside_the_interpreter() -> None:
    with pytest.raises(RuntimeError, match="CUDA"):
        divergence_rows(torch.zeros(2, 9), torch.zeros(2, 9), "jsd", 0.5, PLAIN, PLAIN, None, None)


@pytest.mark.full
@pytest.mark.parametrize("arch", CHIPS)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", ROW_DTYPES, ids=str)
def test_every_form(arch: int, kind: str, dtype: torch.dtype, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    forms = itertools.product((256, 128256, 50257), (True, False), (True, False))
    for index, (vocabulary, full, gradient) in enumerate(forms):
        recorder = record_rows(monkeypatch, vocabulary, dtype, kind, full=full, gradient=gradient)
        check(recorder, arch, tmp_path / str(index), monkeypatch)
