"""What the numbers were measured on: device, versions, threads."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import subprocess
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch

import fastrl
from fastrl_kernels import backends

# Names of distributions, as their versions are looked up.
PACKAGES = (
    "torch", "triton", "numpy", "transformers", "trl", "liger-kernel", "cut-cross-entropy", "verl", "quack-kernels",
)  # fmt: skip


def facts(device: torch.device) -> dict[str, Any]:
    """Device, versions and backends, ready for JSON."""
    found = {name: version or "not installed" for name, version in versions(PACKAGES).items()}
    out: dict[str, Any] = {
        "device": device_name(device),
        "versions": found,
        "platform": platform.platform(),
        "processors": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "backends": {name: reason or "works" for name, reason in backends.available().items()},
    }
    if device.type != "cuda":
        return out
    found["cuda (torch)"] = torch.version.cuda or "none"
    properties = torch.cuda.get_device_properties(device)
    out["compute capability"] = f"{properties.major}.{properties.minor}"
    out["multiprocessors"] = properties.multi_processor_count
    out["memory GiB"] = round(properties.total_memory / 2**30, 1)
    query = ["nvidia-smi", "--query-gpu=driver_version,clocks.max.sm,power.limit", "--format=csv,noheader"]
    try:
        answer = subprocess.run(query, capture_output=True, text=True, check=True, timeout=20).stdout.strip()
    except (OSError, subprocess.SubprocessError) as error:
        answer = f"nvidia-smi gave nothing: {error}"
    out["driver, max clock, power limit"] = answer
    return out


def versions(packages: Iterable[str]) -> dict[str, str | None]:
    """Of fastrl, Python and these distributions; None: not installed."""
    found: dict[str, str | None] = {"fastrl": fastrl.__version__, "python": platform.python_version()}
    for name in packages:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = None
    return found


def device_name(device: torch.device) -> str:
    """The GPU's name, or the processor's with the number of threads in use."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    name = names[0] if names else platform.processor() or platform.machine()
    return f"{name}, {torch.get_num_threads()} threads"


def free_memory(device: torch.device) -> int:
    """Bytes that a new tensor could take."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
    except OSError:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_AVPHYS_PAGES")
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:"))
