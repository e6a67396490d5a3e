"""What the machine is: versions, device, driver, which backends and which peers there are."""

from __future__ import annotations

import importlib
import importlib.metadata
import os
import platform
import subprocess

import torch

import fastrl
from fastrl_kernels import backends

from .record import Record

PACKAGES = ("torch", "triton", "numpy", "trl", "liger-kernel", "cut-cross-entropy", "transformers", "matplotlib")


def run(record: Record) -> None:
    settings, facts = record.settings, record.facts
    facts["versions"] = {"fastrl": fastrl.__version__, "python": platform.python_version()}
    for name in PACKAGES:
        try:
            facts["versions"][name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            facts["versions"][name] = "not installed"
    facts["versions"]["cuda (torch)"] = torch.version.cuda or "none"
    facts["platform"] = platform.platform()
    facts["cpus"] = os.cpu_count()
    facts["backends"] = {name: reason or "works" for name, reason in backends.available().items()}
    facts["backend under test"] = settings.backend
    if settings.on_gpu:
        properties = torch.cuda.get_device_properties(settings.device)
        facts["device"] = properties.name
        facts["compute capability"] = f"{properties.major}.{properties.minor}"
        facts["multiprocessors"] = properties.multi_processor_count
        facts["memory GiB"] = round(properties.total_memory / 2**30, 1)
        query = ["nvidia-smi", "--query-gpu=driver_version,clocks.max.sm,power.limit", "--format=csv,noheader"]
        try:
            facts["driver, max clock, power limit"] = subprocess.run(
                query, capture_output=True, text=True, check=True, timeout=20
            ).stdout.strip()
        except (OSError, subprocess.SubprocessError) as error:
            record.skip("nvidia-smi", str(error))
    else:
        facts["device"] = "cpu"
    for key, value in facts.items():
        record.say(f"{key}: {value}")
    record.check("backend works", facts["backends"].get(settings.backend) == "works", backend=settings.backend)
