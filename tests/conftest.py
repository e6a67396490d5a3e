"""What every test relies on: memory that is not accidentally zero, and a summary that names what could not run."""

from __future__ import annotations

import os
from collections.abc import Iterator

# The compiler's disk cache does not know an operator's argument order: a stale entry would run after a change.
os.environ.setdefault("TORCHINDUCTOR_FORCE_DISABLE_CACHES", "1")

import pytest
import torch


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if config.getoption("-m"):
        return
    full = [item for item in items if item.get_closest_marker("full")]
    for item in full:
        item.add_marker(pytest.mark.skip(reason="exhaustive sweep: `make test-full`"))
    if not torch.cuda.is_available():
        for item in items:
            if item.get_closest_marker("gpu"):
                item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    skipped = terminalreporter.stats.get("skipped", [])
    terminalreporter.section("not run here")
    reasons: dict[str, int] = {}
    for report in skipped:
        reason = report.longrepr[2] if isinstance(report.longrepr, tuple) else str(report.longrepr)
        reasons[reason] = reasons.get(reason, 0) + 1
    for reason, count in sorted(reasons.items()):
        terminalreporter.write_line(f"{count} x {reason}")
    if not reasons:
        terminalreporter.write_line("nothing: every test ran")


@pytest.fixture(autouse=True)
def poison_empty(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """`torch.empty` and its kin return NaN, so that an output that is not fully written can't pass by luck."""

    def poisoned(make):  # type: ignore[no-untyped-def]
        def call(*args, **kwargs):  # type: ignore[no-untyped-def]
            out = make(*args, **kwargs)
            if type(out) is torch.Tensor and out.is_floating_point() and out.device.type != "meta":
                with torch.no_grad():
                    out.fill_(torch.nan)
            return out

        return call

    monkeypatch.setattr(torch, "empty", poisoned(torch.empty))
    monkeypatch.setattr(torch, "empty_like", poisoned(torch.empty_like))
    monkeypatch.setattr(torch.Tensor, "new_empty", poisoned(torch.Tensor.new_empty))
    yield


@pytest.fixture(autouse=True)
def fixed_seed() -> None:
    torch.manual_seed(0)
