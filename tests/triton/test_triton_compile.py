"""Every kernel in every configuration, compiled ahead of time into real cubins for sm_80, sm_90 and sm_100 (no GPU).

What is compiled is what the launchers launch: a recorder stands in for the kernel, the launcher is called on CPU
tensors, and the recorded arguments give the signature, the specialisations and the options.
"""

from __future__ import annotations

import importlib
import re
import subprocess
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from fastrl_kernels.head import LogitTransform, accumulation_dtype
from fastrl_kernels.triton import group_advantages, row_grad, row_stats
from fastrl_kernels.triton.launch import ROW_DTYPES, RowConfig, row_config, row_configs

SHARED_MEMORY = {80: 163840, 90: 232448, 100: 232448}  # bytes per block
POINTERS = {
    torch.float32: "*fp32",
    torch.float64: "*fp64",
    torch.bfloat16: "*bf16",
    torch.float16: "*fp16",
    torch.int64: "*i64",
}
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


@dataclass
class Recorder:
    """Stands in for a kernel: keeps the arguments of the launch instead of launching."""

    kernel: Any
    grid: tuple[int, ...] = ()
    arguments: dict[str, Any] = field(default_factory=dict)
    options: dict[str, Any] = field(default_factory=dict)

    def __getitem__(self, grid: tuple[int, ...]) -> Any:
        def launch(*args: Any, **kwargs: Any) -> None:
            self.grid = grid
            self.options = {k: kwargs.pop(k) for k in ("num_warps", "enable_fp_fusion")}
            self.arguments = dict(zip(self.kernel.arg_names, args, strict=False)) | kwargs
            assert list(self.arguments) == list(self.kernel.arg_names)

        return launch


@dataclass
class Compiled:
    """A kernel's intermediate forms, and what the assembler says it needs."""

    ttir: str
    ptx: str
    registers: int
    stack: int
    local: int
    shared: int


def record(monkeypatch: pytest.MonkeyPatch, op: str, *args: Any) -> Recorder:
    module = importlib.import_module(f"fastrl_kernels.triton.{op}")
    name = next(n for n in vars(module) if n.endswith("_kernel"))
    recorder = Recorder(vars(module)[name])
    assert isinstance(recorder.kernel, triton.runtime.jit.JITFunction), "run these tests without TRITON_INTERPRET"
    monkeypatch.setattr(module, name, recorder)
    {"row_stats": row_stats, "row_grad": row_grad, "group_advantages": group_advantages}[op](*args)
    monkeypatch.undo()
    assert recorder.arguments, "the launcher launched nothing"
    return recorder


def compile_recorded(recorder: Recorder, arch: int, folder: Path, monkeypatch: pytest.MonkeyPatch) -> Compiled:
    """Compiles what was recorded, specialised as a launch would: None and 1 constant, multiples of 16 marked."""
    monkeypatch.setenv("TRITON_CACHE_DIR", str(folder / "cache"))
    signature, constants, attributes = {}, {}, {}
    for index, parameter in enumerate(recorder.kernel.params):
        value = recorder.arguments[parameter.name]
        if parameter.is_constexpr or value is None or (type(value) is int and value == 1):
            signature[parameter.name], constants[parameter.name] = "constexpr", value
        elif isinstance(value, Tensor):
            signature[parameter.name] = POINTERS[value.dtype]
            attributes[(index,)] = [["tt.divisibility", 16]]  # CUDA allocations are aligned to 256 bytes and more
        elif isinstance(value, float):
            assert parameter.annotation_type == "fp64", f"{parameter.name} would be rounded to fp32"
            signature[parameter.name] = "fp64"
        else:
            signature[parameter.name] = "i32" if -(2**31) <= value < 2**31 else "i64"
            if value % 16 == 0:
                attributes[(index,)] = [["tt.divisibility", 16]]
    source = ASTSource(recorder.kernel, signature, constexprs=constants, attrs=attributes)
    kernel = triton.compile(source, target=GPUTarget("cuda", arch, 32), options=recorder.options)
    assert list((folder / "cache").rglob("*.cubin")), "nothing was compiled into the fresh cache"
    cubin = folder / "kernel.cubin"
    cubin.write_bytes(kernel.asm["cubin"])
    cuobjdump = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    usage = subprocess.run([cuobjdump, "-res-usage", cubin], capture_output=True, text=True, check=True).stdout
    found = dict(re.findall(r"(REG|STACK|LOCAL|SHARED):(\d+)", usage))
    return Compiled(
        kernel.asm["ttir"],
        kernel.asm["ptx"],
        int(found["REG"]),
        int(found["STACK"]),
        int(found["LOCAL"]),
        int(found["SHARED"]) + kernel.metadata.shared,
    )


def assert_fits(compiled: Compiled, arch: int) -> None:
    assert compiled.stack == 0 and compiled.local == 0, f"spills: {compiled.stack=} {compiled.local=}"
    assert not re.search(r"\.local\b", compiled.ptx)
    assert compiled.registers <= 255
    assert compiled.shared <= SHARED_MEMORY[arch]


def assert_wide_addresses(compiled: Compiled, *pointers: str) -> None:
    """Row offsets are multiplied and added in 64 bits: rows x V passes 2^31 at 16k tokens of a 128k vocabulary."""
    assert re.search(r"arith\.muli .* : i64", compiled.ttir)
    for pointer in pointers:
        steps = re.findall(rf"tt\.addptr %{pointer}, .*", compiled.ttir)
        assert steps, pointer
        assert all(re.search(r": !tt\.ptr<\w+>, i64", step) for step in steps), steps


def config_of(recorder: Recorder) -> RowConfig:
    return RowConfig(recorder.arguments["BLOCK_SIZE"], recorder.options["num_warps"])


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
) -> Recorder:
    tile, ids = torch.empty(2, vocabulary, dtype=dtype), torch.zeros(2, dtype=torch.int64)
    return record(monkeypatch, "row_stats", tile, ids, transform, torch.zeros(vocabulary) if bias else None, entropy)


def record_grad(
    monkeypatch: pytest.MonkeyPatch,
    vocabulary: int,
    dtypes: tuple[torch.dtype, torch.dtype],
    transform: LogitTransform,
    bias: bool,
    given: tuple[bool, bool, bool],  # gradients of logps, entropy, lse
    moves: bool,
) -> Recorder:
    tile, out = (torch.empty(2, vocabulary, dtype=dtype) for dtype in dtypes)
    row = torch.zeros(2, dtype=accumulation_dtype(dtypes[0]))
    rows = torch.arange(2)
    gradients = [row if g else None for g in given]
    return record(
        monkeypatch, "row_grad", tile, out, rows, transform, torch.zeros(vocabulary) if bias else None,
        row, row, row if given[1] else None, *gradients, *([rows, rows] if moves else [None, None]),
    )  # fmt: skip


def check_stats(recorder: Recorder, arch: int, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    compiled = compile_recorded(recorder, arch, folder, monkeypatch)
    assert_fits(compiled, arch)
    assert_wide_addresses(compiled, "tile_ptr")
    wide = sixteen_bytes(recorder.arguments["tile_ptr"].dtype, config_of(recorder))
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


@pytest.mark.parametrize("dtype", ROW_DTYPES, ids=str)
def test_every_configuration_is_compiled_here(dtype: torch.dtype) -> None:
    assert {row_config(v, dtype) for v in VOCABULARIES.values()} == set(row_configs(dtype))
    assert {row_config(v, dtype) for v in range(1, 10_000)} == set(row_configs(dtype))


@pytest.mark.parametrize("arch", SHARED_MEMORY)
@pytest.mark.parametrize("vocabulary", VOCABULARIES.values(), ids=VOCABULARIES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
def test_row_stats(
    arch: int, vocabulary: int, dtype: torch.dtype, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # The heaviest form on every chip; the lightest, which most models run, where it differs most in registers.
    check_stats(record_stats(monkeypatch, vocabulary, dtype, SOFTCAP, True, True), arch, tmp_path, monkeypatch)
    if arch == 90:
        check_stats(record_stats(monkeypatch, vocabulary, dtype, PLAIN, False, False), arch, tmp_path, monkeypatch)


@pytest.mark.parametrize("arch", SHARED_MEMORY)
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


@pytest.mark.parametrize("arch", SHARED_MEMORY)
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
@pytest.mark.parametrize("arch", SHARED_MEMORY)
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
