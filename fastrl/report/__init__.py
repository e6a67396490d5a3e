"""What a training run changed: curves, answers before and after, and what the fused loss saved in one step."""

from fastrl.report.curves import plot_curves
from fastrl.report.training import PARTS, write_report

__all__ = ["PARTS", "plot_curves", "write_report"]
