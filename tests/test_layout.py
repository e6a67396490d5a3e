"""What the layout promises: import names and directions, no torch in C++, a memory bound, a loud build option."""

from __future__ import annotations

import ast
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


def python(code: str, cwd: Path = ROOT, **environment: str) -> subprocess.CompletedProcess[str]:
    env = {**os.environ, **environment}
    return subprocess.run([sys.executable, "-c", code], cwd=cwd, env=env, capture_output=True, text=True, timeout=300)


def test_kernels_is_not_ours() -> None:
    """`kernels` is a Hugging Face package that transformers looks for; our folder must not stand in for it."""
    result = python("import kernels; print(getattr(kernels, '__file__', None))")
    assert str(ROOT) not in result.stdout
    if result.returncode == 0:  # a bare folder is a namespace package: no file, nothing to import from
        assert result.stdout.strip() == "None"
    assert not (ROOT / "kernels" / "__init__.py").exists()
    assert not (ROOT / "kernels.py").exists()


def test_kernels_import_needs_torch_and_numpy_only() -> None:
    code = """
import sys
class Refuse:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in {"transformers", "accelerate", "datasets", "peft", "safetensors", "trl", "matplotlib"}:
            raise ImportError(name)
sys.meta_path.insert(0, Refuse())
import torch, fastrl_kernels, fastrl
weight = torch.randn(10, 4, requires_grad=True)
out = fastrl.linear_policy_loss(torch.randn(2, 3, 4), weight, torch.zeros(2, 3, dtype=torch.int64),
    fastrl.PolicyObjective(), advantages=torch.ones(2), mask=torch.ones(2, 3))
out.loss.backward()
print("ok")
"""
    result = python(code)
    assert result.stdout.strip() == "ok", result.stderr


def test_without_the_extension_the_reference_serves_and_says_so() -> None:
    code = """
import sys, warnings
sys.modules["fastrl_kernels._C"] = None
import torch, fastrl
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    fastrl.linear_logprobs(torch.randn(2, 4), torch.randn(10, 4), torch.zeros(2, dtype=torch.int64))
print([str(w.message) for w in caught if "fastrl" in str(w.message)])
try:
    fastrl.linear_logprobs(torch.randn(2, 4), torch.randn(10, 4), torch.zeros(2, dtype=torch.int64), backend="cpu")
except RuntimeError as error:
    print(error)
"""
    result = python(code)
    assert "eager reference" in result.stdout and "the C++ extension is not built here" in result.stdout, result.stderr
    assert "backend 'cpu' does not work here" in result.stdout and "pip install" in result.stdout


def imported(path: Path) -> set[str]:
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names.update(alias.name.split(".")[0] for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.level == 0 and node.module:
            names.add(node.module.split(".")[0])
    return names


def test_imports_go_one_way() -> None:
    files = list((ROOT / "kernels" / "fastrl_kernels").rglob("*.py"))
    assert len(files) > 10
    for path in files:
        assert not imported(path) & {"fastrl", "transformers", "accelerate", "datasets"}, path


def test_no_torch_headers_in_the_extension() -> None:
    sources = [p for p in (ROOT / "csrc").rglob("*") if p.suffix in (".cpp", ".h", ".cu")]
    assert len(sources) >= 6
    for path in sources:
        assert not re.search(r"#include\s*[<\"](torch|ATen|c10)", path.read_text()), path


def test_no_junk_drawers_and_trainers_stay_thin() -> None:
    for path in [*(ROOT / "fastrl").rglob("*.py"), *(ROOT / "kernels").rglob("*.py")]:
        assert path.stem not in ("utils", "misc", "helpers"), path
        if path.parent.name == "trainers":
            assert len(path.read_text().splitlines()) <= 350, path


MEMORY = """
import os, threading, time
import torch, fastrl
torch.manual_seed(0)
b, t, d, v = 8, 128, 64, 49152
hidden, weight = torch.randn(b, t, d, requires_grad=True), torch.randn(v, d, requires_grad=True)
ids, old = torch.randint(v, (b, t)), torch.randn(b, t) - 10
page = os.sysconf("SC_PAGE_SIZE")
resident = lambda: int(open("/proc/self/statm").read().split()[1]) * page
def step(n):
    loss = fastrl.linear_policy_loss(hidden[:n], weight, ids[:n], fastrl.PolicyObjective(), advantages=torch.randn(n),
        mask=torch.ones(n, t), old_logps=old[:n]).loss
    (loss * 0.5).backward()
step(1)
hidden.grad = weight.grad = None
base, peak, done = resident(), [0], threading.Event()
def watch():
    while not done.is_set():
        peak[0] = max(peak[0], resident())
        time.sleep(0.001)
thread = threading.Thread(target=watch); thread.start()
step(b)
done.set(); thread.join()
print((peak[0] - base - 4 * (hidden.numel() + weight.numel())) / 2**20)
"""


def test_memory_beyond_inputs_and_gradients_is_a_chunk() -> None:
    """1,024 tokens of a 49,152-word vocabulary: eager holds 192 MiB of logits several times over, a tile is 48 MiB."""
    result = python(MEMORY)
    extra = float(result.stdout)
    assert extra < 80, f"{extra:.0f} MiB beyond inputs and gradients"


@pytest.mark.parametrize(
    "value, message", [("on", "no CUDA compiler was found"), ("maybe", "expected auto, on or off")]
)
def test_cuda_build_option_is_loud(value: str, message: str, tmp_path: Path) -> None:
    """FASTRL_CUDA=on without nvcc is an error that says so, and an unknown value is one too."""
    pybind = subprocess.run(
        [sys.executable, "-m", "pybind11", "--cmakedir"], capture_output=True, text=True, check=True
    )
    path = os.pathsep.join(p for p in os.environ["PATH"].split(os.pathsep) if not (Path(p) / "nvcc").exists())
    env = {**os.environ, "FASTRL_CUDA": value, "PATH": path, "CUDACXX": ""}
    tools = [f"-DCMAKE_CXX_COMPILER={tool}" for tool in [shutil.which("g++") or shutil.which("c++")] if tool]
    command = [
        shutil.which("cmake") or str(Path(sys.executable).parent / "cmake"),
        str(ROOT / "csrc"),
        f"-Dpybind11_DIR={pybind.stdout.strip()}",
        *tools,
    ]
    command += ["-DCUDAToolkit_ROOT=/nonexistent", "-DCMAKE_CUDA_COMPILER="]
    result = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True)
    assert result.returncode != 0 and message in " ".join(result.stderr.split()), result.stderr


@pytest.mark.skipif(shutil.which("nvcc") is None, reason="no nvcc on this machine")
def test_cuda_build_configures_where_nvcc_is(tmp_path: Path) -> None:
    """FASTRL_CUDA=on with nvcc and no GPU generates a build: every target knows its architectures."""
    pybind = subprocess.run(
        [sys.executable, "-m", "pybind11", "--cmakedir"], capture_output=True, text=True, check=True
    )
    command = [
        shutil.which("cmake") or str(Path(sys.executable).parent / "cmake"),
        str(ROOT / "csrc"),
        f"-Dpybind11_DIR={pybind.stdout.strip()}",
    ]
    env = {**os.environ, "FASTRL_CUDA": "on"}
    result = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True)
    assert result.returncode == 0 and "building with CUDA" in result.stdout, result.stderr
