"""One command for a machine with a GPU: are the kernels right there, do they hold their memory, and how fast are they?

    PYTHONPATH=.:kernels python bench/gpu_check.py --out bench/results/NAME

Under ten minutes. Each stage runs in a process of its own (an illegal access ends one stage, not the rest), prints what
it does with the time since the start, and leaves a JSON file; at the end results.json, report.md and pictures hold
everything. The exit code is 0 only if every check passed. `--device cpu --tiny` walks the same path on small shapes.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
import traceback
from pathlib import Path
from typing import Any

# Stage and the seconds it may take, together under ten minutes; what one leaves over goes to those after it.
STAGES = {
    "environment": 20,
    "correctness": 90,
    "peers": 90,
    "compiled": 100,
    "memory": 40,
    "schedules": 60,
    "kernels": 35,
    "growth": 35,
    "configurations": 35,
    "sanitizer": 60,
}


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder for the results")
    parser.add_argument("--device", default="cuda", help="cuda (default), cuda:1, cpu")
    parser.add_argument("--backend", help="backend under test; default: triton on a GPU, fastrl's choice on a CPU")
    parser.add_argument("--tiny", action="store_true", help="small shapes only: to test this script, not a machine")
    parser.add_argument("--only", nargs="+", choices=STAGES, default=list(STAGES), help="run these stages")
    parser.add_argument("--stage", choices=[*STAGES, "one-call"], help=argparse.SUPPRESS)
    parser.add_argument("--started", type=float, default=time.time(), help=argparse.SUPPRESS)
    parser.add_argument("--seconds", type=float, default=120.0, help=argparse.SUPPRESS)
    return parser.parse_args()


def run_stage(options: argparse.Namespace) -> int:
    """One stage, in this process."""
    import torch
    from gpucheck import configurations, correctness, environment, memory, sanitizer, speed
    from gpucheck.record import Record, Settings

    from fastrl_kernels import backends

    functions = {
        "environment": environment.run,
        "correctness": correctness.run,
        "memory": memory.run,
        "sanitizer": sanitizer.run,
        "peers": speed.plain_peers,
        "compiled": speed.compiled_peers,
        "schedules": speed.schedules,
        "kernels": speed.kernels,
        "growth": speed.growth,
        "configurations": configurations.run,
        "one-call": correctness.kernels_once,
    }
    deadline = time.time() + options.seconds
    device = torch.device(options.device)
    backend = options.backend or ("triton" if device.type == "cuda" else backends.choose(None, device))
    settings = Settings(device, backend, options.tiny, options.out, options.started, deadline)
    record = Record(options.stage, settings)
    record.save()
    functions[options.stage](record)
    record.save(finished=True)
    return 0 if all(check["ok"] for check in record.checks) else 1


def start_stage(options: argparse.Namespace, stage: str) -> dict[str, Any]:
    """One stage in a process of its own; what it left behind, also when it crashed or ran out of time."""
    until_here = sum(STAGES[name] for name in options.only[: options.only.index(stage) + 1])
    limit = max(15, int(until_here - (time.time() - options.started)))
    command = [sys.executable, __file__, "--stage", stage, "--device", options.device, "--out", str(options.out)]
    # The stage plans for a little less than what it is given, to end by itself.
    command += ["--started", str(options.started), "--seconds", str(limit - 8)] + ["--tiny"] * options.tiny
    command += ["--backend", options.backend] if options.backend else []
    path = options.out / f"stage_{stage}.json"
    path.unlink(missing_ok=True)
    error = ""
    try:
        done = subprocess.run(command, timeout=limit, stderr=subprocess.PIPE, text=True)
        if done.returncode:
            error = f"exit code {done.returncode}\n{done.stderr[-4000:]}"
    except subprocess.TimeoutExpired:
        error = f"stopped after {limit} s"
    result: dict[str, Any] = json.loads(path.read_text()) if path.exists() else {"stage": stage, "finished": False}
    if not result["finished"]:
        result["error"] = error or "it left no results"
        print(f"[{time.time() - options.started:6.1f} s] {stage}: DID NOT FINISH: {result['error']}", flush=True)
    return result


def main() -> int:
    options = arguments()
    options.out.mkdir(parents=True, exist_ok=True)
    if options.stage:
        try:
            return run_stage(options)
        except Exception:
            traceback.print_exc()
            return 3
    from gpucheck import report

    stages = []
    for stage in options.only:
        print(f"[{time.time() - options.started:6.1f} s] {stage}: at most {STAGES[stage]} s", flush=True)
        stages.append(start_stage(options, stage))
        report.write(options.out, stages, time.time() - options.started)  # a stopped run keeps what it has
    failed = report.failures(stages)
    for line in report.write(options.out, stages, time.time() - options.started):
        print(f"wrote {line}" if os.path.exists(line) else line)
    checks = sum(len(stage.get("checks", [])) for stage in stages)
    print(f"{checks} checks, {len(failed)} failed, {time.time() - options.started:.0f} s")
    for name in failed:
        print(f"FAILED {name}")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
