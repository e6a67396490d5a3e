"""Every Triton configuration that may be chosen for real shapes: is it right, and is the table's the best?"""

from __future__ import annotations

import time

import torch

from fastrl_kernels import backends

from .record import Record

# op, N, D, V, dtype: a wide model and a narrow one; the tile of a chunk.
SHAPES = [
    ("linear_row_stats", 8192, 4096, 128256, torch.bfloat16),
    ("linear_row_stats", 8192, 576, 49152, torch.bfloat16),
    ("linear_row_stats", 64, 4096, 128256, torch.bfloat16),
    ("row_stats", 2048, 0, 128256, torch.float32),
    ("row_grad", 2048, 0, 128256, torch.float32),
    ("divergence_rows", 2048, 0, 128256, torch.float32),
]
TINY = [
    ("linear_row_stats", 5, 16, 200, torch.float32),
    ("row_stats", 3, 0, 600, torch.float32),
    ("divergence_rows", 3, 0, 600, torch.float32),
]


def run(record: Record) -> None:
    settings = record.settings
    reason = backends.available()["triton"]
    if reason is not None:
        record.skip("Triton configurations", reason)
        return
    from fastrl_kernels.triton.candidates import time_candidates

    for op, n, depth, vocabulary, dtype in TINY if settings.tiny else SHAPES:
        name = f"{op} N={n}{f' D={depth}' if depth else ''} V={vocabulary} {dtype}"
        if time.time() > settings.deadline:
            record.skip(name, "no time left")
            continue
        with record.case(name):
            timings = sorted(
                time_candidates(op, n, depth, vocabulary, dtype, settings.device), key=lambda timing: timing.seconds
            )
            record.check(f"{name}: every configuration against fp64", True)
            for timing in timings:
                record.say(str(timing))
            default = next(timing for timing in timings if timing.default)
            record.target(f"{name}: the table's configuration is the fastest, within 5%",
                          default.seconds <= 1.05 * timings[0].seconds,
                          seconds=default.seconds, best=timings[0].seconds)  # fmt: skip
            record.facts[name] = "; ".join(map(str, timings))
            record.save()
