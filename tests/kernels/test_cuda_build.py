"""The extension with FASTRL_CUDA=on, built by nvcc on a machine that needs no GPU, and what is in its cubins."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import pytest

CSRC = Path(__file__).parents[2] / "csrc"
ARCHITECTURES = ("sm_80", "sm_90a", "sm_100")
# dtypes x softcap; (dtype, output dtype) pairs x softcap x entropy; float and double
KERNELS = {"row_stats": 4 * 2, "row_grad": 6 * 2 * 2, "group_advantages": 2, "gae": 2}

pytestmark = pytest.mark.skipif(shutil.which("nvcc") is None, reason="no nvcc on this machine")


@dataclass
class Kernel:
    """A kernel in the machine code of one architecture."""

    name: str
    architecture: str
    usage: dict[str, int]  # REG, STACK, LOCAL of `cuobjdump -res-usage`
    instructions: str


def cuobjdump(*options: str | Path) -> str:
    triton = pytest.importorskip("triton", reason="cuobjdump comes with triton")
    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    return subprocess.run([tool, *options], capture_output=True, text=True, check=True).stdout


def by_kernel(text: str) -> dict[tuple[str, str], str]:
    """What `cuobjdump` prints, cut at its architectures and functions."""
    parts = {}
    for section in re.split(r"\barch = ", text)[1:]:
        architecture = section.split(maxsplit=1)[0]
        for function in re.split(r"\bFunction\s*:?\s+", section)[1:]:
            parts[architecture, function.split(maxsplit=1)[0].rstrip(":")] = function
    return parts


@pytest.fixture(scope="module")
def extension(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("cuda")
    cmake = shutil.which("cmake") or str(Path(sys.executable).parent / "cmake")
    pybind = subprocess.run(
        [sys.executable, "-m", "pybind11", "--cmakedir"], capture_output=True, text=True, check=True
    )
    configure = [cmake, "-S", CSRC, "-B", folder, f"-Dpybind11_DIR={pybind.stdout.strip()}"]
    configure.append(f"-DPython_EXECUTABLE={sys.executable}")
    for command in (configure, [cmake, "--build", folder, "--parallel", str(os.cpu_count())]):
        result = subprocess.run(command, env={**os.environ, "FASTRL_CUDA": "on"}, capture_output=True, text=True)
        assert result.returncode == 0, result.stdout + result.stderr
    (module,) = folder.glob("_C*.so")
    return module


@pytest.fixture(scope="module")
def kernels(extension: Path) -> list[Kernel]:
    usage, code = by_kernel(cuobjdump("-res-usage", extension)), by_kernel(cuobjdump("-sass", extension))
    assert usage.keys() == code.keys()
    found = []
    for (architecture, symbol), text in usage.items():
        names = [name for name in KERNELS if f"{name}_kernel" in symbol]
        assert len(names) == 1, symbol
        numbers = {key: int(value) for key, value in re.findall(r"(REG|STACK|LOCAL):(\d+)", text)}
        found.append(Kernel(names[0], architecture, numbers, code[architecture, symbol]))
    return found


def test_every_kernel_is_there_for_every_architecture(extension: Path, kernels: list[Kernel]) -> None:
    for architecture in ARCHITECTURES:
        assert Counter(kernel.name for kernel in kernels if kernel.architecture == architecture) == KERNELS
    assert re.search(r"sm_100\.ptx", cuobjdump("-lptx", extension)), "later chips need the PTX"


def test_no_spills_and_no_stack(kernels: list[Kernel]) -> None:
    for kernel in kernels:
        assert kernel.usage["STACK"] == kernel.usage["LOCAL"] == 0 and kernel.usage["REG"] <= 128, kernel.usage
        assert not re.search(r"\b(LDL|STL)\b", kernel.instructions)


def test_wide_accesses(kernels: list[Kernel]) -> None:
    for kernel in kernels:
        loads, stores = (len(re.findall(rf"\b{name}\.E\.128\b", kernel.instructions)) for name in ("LDG", "STG"))
        if kernel.name in ("row_stats", "row_grad"):
            assert loads >= 4, "four 16-byte loads in flight"
        assert loads > 0 and (stores > 0 or kernel.name not in ("gae",))
    same_dtype = [k for k in kernels if k.name == "row_grad" and re.search(r"\bSTG\.E\.128\b", k.instructions)]
    assert len(same_dtype) == 4 * 2 * 2 * len(ARCHITECTURES), (
        "gradients in the tile's dtype are stored 16 bytes at a time"
    )


def test_clusters_from_sm_90(kernels: list[Kernel]) -> None:
    for kernel in kernels:
        clustered = kernel.name in ("row_stats", "gae") and kernel.architecture != "sm_80"
        assert ("UCGABAR" in kernel.instructions) == clustered, (kernel.name, kernel.architecture)


def test_nothing_may_be_contracted(extension: Path) -> None:
    """An operation without a rounding mode in PTX may become half of a fused multiply-add, and then the two row passes
    would disagree on a logit and log-probabilities come out above 0."""
    operations = set(re.findall(r"\b(?:mul|add|sub)(?:\.[a-z]+)*\.f(?:32|64)\b", cuobjdump("-ptx", extension)))
    assert operations and all(".rn." in operation for operation in operations), operations


def test_the_extension_loads_without_a_driver(extension: Path) -> None:
    code = "import _C; print(_C.cuda_version >= 13000, sorted(n for n in dir(_C.cuda) if n[0] != '_'))"
    code += "; _C.cuda.device_count()"
    env = {**os.environ, "PYTHONPATH": str(extension.parent)}
    result = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True)
    names = "['device_count', 'gae', 'group_advantages', 'row_grad', 'row_stats']"
    assert result.stdout.strip() == f"True {names}" and result.returncode == 0, result.stderr
