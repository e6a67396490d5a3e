"""Shared by the pytest-benchmark files: `pytest bench`."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from fastrl_kernels import backends


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """`backend`: every one that works here, except the interpreter's, which says nothing about speed."""
    if "backend" in metafunc.fixturenames:
        names = [name for name, reason in backends.available().items() if reason is None]
        skip = ("triton",) if backends.triton_interpreted() else ()
        metafunc.parametrize("backend", [name for name in names if name not in skip])


@pytest.fixture
def device(backend: str) -> torch.device:
    """Where the backend runs; the reference runs where the others do."""
    return torch.device("cuda" if backend in ("triton", "cuda") or torch.cuda.is_available() else "cpu")


@pytest.fixture
def timed(benchmark: Callable[..., object]) -> Callable[[Callable[[], object]], None]:
    """Times a call with pytest-benchmark; where there is a GPU, until its work is done."""

    def run(call: Callable[[], object]) -> None:
        def whole() -> None:
            call()
            if torch.cuda.is_available():
                torch.cuda.synchronize()

        benchmark.pedantic(whole, rounds=10, warmup_rounds=2)  # type: ignore[attr-defined]

    return run
