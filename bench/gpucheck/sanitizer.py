"""compute-sanitizer over one small call of every kernel, where the tool is installed."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

from .record import Record

# Out-of-bounds and misaligned accesses; hazards between threads over shared memory.
TOOLS = ("memcheck", "racecheck")


def run(record: Record) -> None:
    if not record.settings.on_gpu:
        record.skip("compute-sanitizer", "needs a CUDA device")
        return
    folders = [os.environ.get("CUDA_HOME", "/usr/local/cuda") + "/bin", os.environ.get("PATH", "")]
    program = shutil.which("compute-sanitizer", path=os.pathsep.join(folders))
    if program is None:
        record.skip("compute-sanitizer", "not installed (it comes with the CUDA toolkit)")
        return
    for tool in TOOLS:
        left = record.settings.deadline - time.time()
        if left < 20:
            record.skip(f"compute-sanitizer {tool}", "no time left for it")
            continue
        script = Path(__file__).parent.parent / "gpu_check.py"
        command = [program, "--tool", tool, "--error-exitcode", "9", sys.executable, str(script)]
        command += ["--stage", "one-call", "--device", str(record.settings.device), "--out", str(record.settings.out)]
        command += ["--backend", record.settings.backend]
        # Without the caching allocator each tensor is an allocation of its own, so that a step outside it is seen.
        environment = {**os.environ, "PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
        try:
            done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=left)
        except subprocess.TimeoutExpired:
            record.skip(f"compute-sanitizer {tool}", f"took longer than the {left:.0f} s left")
            continue
        text = done.stdout + done.stderr
        (record.settings.out / f"sanitizer_{tool}.txt").write_text(text)
        ran = text.count(" ran,")
        ok = done.returncode == 0 and "0 errors" in text + " 0 errors" * (tool != "memcheck") and ran > 0
        record.check(f"compute-sanitizer {tool}", ok, exit_code=done.returncode, kernel_calls=ran)
        record.say(f"{tool}: exit code {done.returncode}, {ran} kernel calls, output in sanitizer_{tool}.txt")
