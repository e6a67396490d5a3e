"""Training curves as a PNG: reward, live fraction, entropy and completion length over the optimizer steps."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

_PANELS = (
    ("reward", "mean reward", "#0072B2"),
    ("live_fraction", "live fraction: tokens that carry a gradient", "#009E73"),
    ("entropy", "entropy (nats per token)", "#D55E00"),
    ("completions/mean_length", "mean completion length (tokens)", "#CC79A7"),
)


def plot_curves(history: Sequence[Mapping[str, Any]], path: str | Path, *, title: str = "", window: int = 5) -> Path:
    """Draw a run's curves and write them to `path`.

    Args:
        history: a trainer's log_history: mappings with "step" and TRL's metric names.
        path: file to write; its suffix chooses the format.
        title: line above the panels.
        window: steps of the reward's running mean, which looks back only.

    Raises:
        ValueError: the history has none of the metrics.
    """
    from matplotlib.figure import Figure  # without pyplot: no display, no global state

    series = {metric: metric_series(history, metric) for metric, _, _ in _PANELS}
    panels = [panel for panel in _PANELS if series[panel[0]][0]]
    if not panels:
        raise ValueError(f"the history holds none of {', '.join(metric for metric, _, _ in _PANELS)}")
    rows = (len(panels) + 1) // 2
    columns = min(len(panels), 2)
    figure = Figure(figsize=(5.6 * columns, 3.1 * rows + 0.4), dpi=150, layout="constrained")
    grid = figure.subplots(rows, columns, squeeze=False)
    for axes in grid.flat:
        axes.set_visible(False)
    for axes, (metric, label, color) in zip(grid.flat, panels, strict=False):
        steps, values = series[metric]
        axes.set_visible(True)
        if metric == "reward":
            axes.plot(steps, values, "o-", color=color, alpha=0.35, linewidth=1, markersize=3, label="each step")
            mean = running_mean(values, window)
            axes.plot(steps, mean, color=color, linewidth=2.2, label=f"mean of the last {window}")
            axes.legend(frameon=False, fontsize=8, loc="best")
        else:
            axes.plot(steps, values, "o-", color=color, linewidth=1.6, markersize=3)
        axes.set_title(label, fontsize=10, loc="left")
        axes.set_xlabel("optimizer step", fontsize=9)
        axes.tick_params(labelsize=8)
        axes.grid(alpha=0.25, linewidth=0.6)
        axes.spines[["top", "right"]].set_visible(False)
        axes.xaxis.get_major_locator().set_params(integer=True)
        if metric in ("live_fraction", "reward") and min(values) >= 0:
            axes.set_ylim(bottom=0)
            if max(values) <= 1 and metric == "live_fraction":
                axes.set_ylim(0, 1.02)
    if title:
        figure.suptitle(title, fontsize=11)
    figure.savefig(path)
    return Path(path)


def metric_series(history: Sequence[Mapping[str, Any]], metric: str) -> tuple[list[int], list[float]]:
    """Steps and values of one metric, in the order of the steps; a step that was logged twice counts once, the last."""
    found = {int(entry["step"]): float(entry[metric]) for entry in history if metric in entry and "step" in entry}
    return list(map(int, sorted(found))), [found[step] for step in sorted(found)]


def running_mean(values: Sequence[float], window: int) -> list[float]:
    """Mean of each value and the up to `window - 1` values before it."""
    return [
        sum(values[max(0, end - window) : end]) / len(values[max(0, end - window) : end])
        for end in range(1, len(values) + 1)
    ]
