"""Accuracy against the number of samples, as a figure."""

from __future__ import annotations

import io
from typing import TYPE_CHECKING

from fastrl.evaluation.evaluation import Estimate, Evaluation

if TYPE_CHECKING:
    from matplotlib.axes import Axes

# Okabe and Ito's colours, told apart by colour-blind readers too.
_COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00", "#000000")
_MARKERS = "os^Dv<>"


def plot_evaluation(evaluation: Evaluation, title: str = "") -> bytes:
    """A PNG: a curve per way of choosing over n on a logarithmic axis, bands of one standard error, the greedy accuracy
    as a dashed line."""
    from matplotlib.figure import Figure  # without pyplot: no display, no global state

    figure = Figure(figsize=(7.2, 4.6), dpi=150, layout="constrained")
    draw_evaluation(figure.subplots(), evaluation, title)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png")
    return buffer.getvalue()


def draw_evaluation(axes: Axes, evaluation: Evaluation, title: str = "") -> None:
    """What `plot_evaluation` shows, in a figure of the caller's."""
    for i, (name, curve) in enumerate(evaluation.curves.items()):
        color = _COLORS[i % len(_COLORS)]
        axes.plot(
            evaluation.sizes,
            [point.mean for point in curve],
            marker=_MARKERS[i % len(_MARKERS)],
            markersize=5,
            color=color,
            label=name,
        )
        low, high = zip(*(_band(point) for point in curve), strict=True)
        axes.fill_between(evaluation.sizes, low, high, color=color, alpha=0.12, linewidth=0)
    if evaluation.greedy is not None:
        axes.axhline(evaluation.greedy.mean, color="0.35", linestyle="--", linewidth=1.2, label="greedy")
    axes.set_xscale("log", base=2)
    axes.set_xticks(evaluation.sizes, [str(n) for n in evaluation.sizes])
    axes.minorticks_off()
    axes.set_xlabel("samples per prompt, n")
    axes.set_ylabel("accuracy")
    bottom, top = axes.get_ylim()  # not from 0: near 1 the curves would lie on each other
    axes.set_ylim(max(bottom, 0.0), min(max(top, 0.05), 1.02))
    axes.grid(alpha=0.25)
    axes.legend(loc="best", fontsize=9)
    axes.set_title(title or f"{evaluation.prompts} prompts, {evaluation.samples_per_prompt} samples each", fontsize=10)


def _band(point: Estimate) -> tuple[float, float]:
    error = point.standard_error or 0.0
    return max(point.mean - error, 0.0), min(point.mean + error, 1.0)
