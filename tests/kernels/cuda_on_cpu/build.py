"""Builds the extension with csrc/cuda compiled as C++, on the stand-in for the CUDA runtime beside this file."""

from __future__ import annotations

import functools
import importlib.util
import os
import shutil
import subprocess
import sysconfig
import tempfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pybind11
import torch

from fastrl_kernels.native import NativeKernels

HERE = Path(__file__).parent
CSRC = HERE.parents[2] / "csrc"
FLAGS = ["-std=c++17", "-O1", "-fPIC", "-fvisibility=hidden", "-ffp-contract=off", "-fno-math-errno", "-fopenmp-simd"]
DEFINES = ["-DFASTRL_ISA=generic", '-DFASTRL_COMPILER="g++"', "-DFASTRL_WITH_CUDA", "-D__CUDA_ARCH__=900"]


@contextmanager
def _no_stream(device: torch.device) -> Iterator[int]:
    yield 0


@functools.cache
def cuda_on_cpu() -> NativeKernels:
    """The CUDA kernels as a backend of CPU tensors."""
    compiler = shutil.which("g++") or shutil.which("c++")
    assert compiler, "a C++ compiler built the extension, but there is none now"
    folder = Path(tempfile.mkdtemp(prefix="cuda_on_cpu"))
    includes = [HERE, pybind11.get_include(), sysconfig.get_path("include")]
    sources = [CSRC / "bindings.cpp", *CSRC.glob("cpu/*.cpp"), *CSRC.glob("cuda/*.cu"), HERE / "shared_memory.cpp"]
    objects = [folder / f"{source.parent.name}_{source.stem}.o" for source in sources]

    def compile_one(source: Path, target: Path) -> None:
        options = [*FLAGS, *DEFINES, *(f"-I{path}" for path in includes)]
        command = [compiler, *options, "-x", "c++", "-c", source, "-o", target]
        result = subprocess.run(command, capture_output=True, text=True)
        if result.returncode:
            raise RuntimeError(result.stderr)

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        list(pool.map(compile_one, sources, objects))
    module = folder / "_C.so"
    subprocess.run([compiler, "-shared", "-pthread", *objects, "-o", module], check=True)
    spec = importlib.util.spec_from_file_location("_C", module)
    assert spec is not None and spec.loader is not None
    extension: Any = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(extension)
    shutil.rmtree(folder)  # the library is mapped now
    return NativeKernels(extension.cuda, "cpu", _no_stream, mixed_outputs=True)
