"""What a training run did: curves, page, answers before and after, and what the fused loss saved in one step."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fastrl.report.curves import plot_curves
    from fastrl.report.page import write_page
    from fastrl.report.training import PARTS, write_report

# Only what asks a model needs torch and transformers.
_LAZY = {
    "PARTS": "fastrl.report.training",
    "plot_curves": "fastrl.report.curves",
    "write_page": "fastrl.report.page",
    "write_report": "fastrl.report.training",
}

__all__ = ["PARTS", "plot_curves", "write_page", "write_report"]


def __getattr__(name: str) -> Any:
    if name in _LAZY:
        return getattr(importlib.import_module(_LAZY[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
