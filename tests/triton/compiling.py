"""Compiling ahead of time what the launchers launch: a recorder stands in for the kernel, the launcher is called on CPU
tensors, and the recorded arguments give the signature, the specialisations and the options. No GPU is needed.
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
from triton.tools.tensor_descriptor import TensorDescriptor

from fastrl_kernels.triton.launch import Chip

CHIPS = {80: Chip(108, 8, 166912), 90: Chip(132, 9, 232448), 100: Chip(148, 10, 232448)}  # A100, H100, B200
TYPES = {
    torch.float32: "fp32",
    torch.float64: "fp64",
    torch.bfloat16: "bf16",
    torch.float16: "fp16",
    torch.int64: "i64",
    torch.uint8: "u8",
}
OPTIONS = ("num_warps", "num_stages", "maxnreg", "enable_fp_fusion")


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
            self.options = {k: kwargs.pop(k) for k in OPTIONS if k in kwargs}
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


def record_launches(monkeypatch: pytest.MonkeyPatch, op: str, *args: Any, arch: int = 90) -> list[Recorder]:
    """The launches of one call of an op, as they would be on a chip of that architecture, in the order of the file."""
    module = importlib.import_module(f"fastrl_kernels.triton.{op}")
    recorders = {name: Recorder(kernel) for name, kernel in vars(module).items() if name.endswith("_kernel")}
    with monkeypatch.context() as patch:
        for name, recorder in recorders.items():
            assert isinstance(recorder.kernel, triton.runtime.jit.JITFunction), (
                "run these tests without TRITON_INTERPRET"
            )
            patch.setattr(module, name, recorder)
        if hasattr(module, "chip"):
            patch.setattr(module, "chip", lambda device: CHIPS[arch])
        getattr(module, module.__name__.rsplit(".", 1)[1] if op != "linear_stats" else "linear_row_stats")(*args)
    launched = [recorder for recorder in recorders.values() if recorder.arguments]
    assert launched, "the launcher launched nothing"
    return launched


def record(monkeypatch: pytest.MonkeyPatch, op: str, *args: Any) -> Recorder:
    """The one launch of an op of one kernel."""
    (recorder,) = record_launches(monkeypatch, op, *args)
    return recorder


def compile_recorded(recorder: Recorder, arch: int, folder: Path, monkeypatch: pytest.MonkeyPatch) -> Compiled:
    """Compiles what was recorded, specialised as a launch would: None and 1 constant, multiples of 16 marked."""
    monkeypatch.setenv("TRITON_CACHE_DIR", str(folder / "cache"))
    signature, constants, attributes = {}, {}, {}
    for index, parameter in enumerate(recorder.kernel.params):
        value, special = recorder.arguments[parameter.name], not parameter.do_not_specialize
        if parameter.is_constexpr or value is None or (special and type(value) is int and value == 1):
            signature[parameter.name], constants[parameter.name] = "constexpr", value
        elif isinstance(value, Tensor):
            signature[parameter.name] = f"*{TYPES[value.dtype]}"
            attributes[(index,)] = [["tt.divisibility", 16]]  # CUDA allocations are aligned to 256 bytes and more
        elif isinstance(value, TensorDescriptor):
            signature[parameter.name] = f"tensordesc<{TYPES[value.base.dtype]}{list(value.block_shape)}>"
        elif isinstance(value, float):
            assert parameter.annotation_type == "fp64", f"{parameter.name} would be rounded to fp32"
            signature[parameter.name] = "fp64"
        else:
            signature[parameter.name] = "i32" if -(2**31) <= value < 2**31 else "i64"
            if special and value % 16 == 0:
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
    assert compiled.shared <= CHIPS[arch].shared_bytes


def assert_wide_addresses(compiled: Compiled, *pointers: str) -> None:
    """Row offsets are multiplied and added in 64 bits: rows x V passes 2^31 at 16k tokens of a 128k vocabulary."""
    assert re.search(r"arith\.muli .* : i64", compiled.ttir)
    for pointer in pointers:
        steps = re.findall(rf"tt\.addptr %{pointer}, .*", compiled.ttir)
        assert steps, pointer
        assert all(re.search(r": !tt\.ptr<\w+>, i64", step) for step in steps), steps


def vector_bytes(ptx: str, kind: str) -> int:
    """Bytes that one thread moves in the vector accesses of `kind` ("ld" or "st") that stand in the code."""
    return sum(int(n) * int(bits) // 8 for n, bits in re.findall(rf"{kind}\.global\.v(\d)\.b(\d+)", ptx))


def copied_bytes(ptx: str) -> int:
    """Bytes that one thread copies to shared memory in the cp.async that stand in the code."""
    return sum(int(n, 16) for n in re.findall(r"cp\.async\.c[ag]\.shared\.global \[[^\]]*\], \[[^\]]*\], (0x\w+)", ptx))
