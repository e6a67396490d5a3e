"""Curves as matplotlib figures: the overview of a run, its metrics by subject, and several runs side by side."""

from __future__ import annotations

import contextlib
import io
import itertools
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fastrl.report.panels import Panel, Series, metric_names, metric_series, panel_of, panels_of, split_prefix

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from fastrl.evaluation.evaluation import Evaluation

# Okabe and Ito's colours, told apart by colour-blind readers too, without the yellow, which white paper swallows.
COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00", "#7F7F7F", "#8B5CF6")
AXES = {"step": "optimizer step", "num_tokens": "tokens", "seconds": "training time (minutes)"}
_DASHES = ("-", "--", ":", "-.")  # training, then each evaluation
_MOST_POINTS = 1000  # per line
_INK = "#123456"  # stands for the colour of the page's text in an SVG


def plot_curves(history: Sequence[Mapping[str, Any]], path: str | Path, *, title: str = "") -> Path:
    """Draw the overview of a run, what its method is judged by, into the file `path`; its suffix chooses the format.

    Args:
        history: a trainer's log_history: mappings with "step" and TRL's metric names.
        path: file to write.
        title: line above the panels.

    Raises:
        ValueError: the history has no metrics.
    """
    panels = panels_of(metric_names(history))
    chosen = [item for item in panels if item[0].overview][:6] or panels[:6]
    if not chosen:
        raise ValueError("the history holds no metrics")
    return save(panels_figure(history, chosen, title), path)


def panels_figure(
    history: Sequence[Mapping[str, Any]], panels: Sequence[tuple[Panel, Sequence[str]]], title: str = ""
) -> Figure:
    """One axes per panel, two in a row, each with a line per metric over the optimizer steps."""
    with _style():
        figure, grid = _grid(len(panels), title)
        for axes, (panel, names) in zip(grid, panels, strict=True):
            draw_panel(axes, panel, [metric_series(history, name) for name in names])
    return figure


def comparison_figure(
    runs: Mapping[str, Sequence[Mapping[str, Any]]],
    metrics: Sequence[str],
    *,
    x: str = "step",
    smooth: int | None = None,
) -> Figure:
    """One axes per metric with a line per run, named in the legend; runs without the metric are left out of its axes.

    Args:
        runs: histories by the name of the run.
        metrics: names as logged.
        x: "step", "num_tokens" or "seconds".
        smooth: logs of the running mean; None: chosen by the number of logs.
    """
    with _style():
        figure, grid = _grid(len(metrics), "")
        for axes, metric in zip(grid, metrics, strict=True):
            for color, (name, history) in zip(_cycle(len(runs)), runs.items(), strict=True):
                series = metric_series(history, metric, x)
                if series.y:
                    _draw_line(axes, series, color, panel_of(metric).smooth, smooth, faint=True, label=_visible(name))
            _dress(axes, metric, x)
            if panel_of(metric).share:
                _share_limits(axes)
            axes.legend(frameon=False, fontsize=8, loc="best")
    return figure


def panel_svg(history: Sequence[Mapping[str, Any]], panel: Panel, names: Sequence[str]) -> str:
    """A panel as an <svg> element for a page: its ink is the text colour of the page, it names no other file."""
    lines = [metric_series(history, name) for name in names]
    return _svg(lambda axes: draw_panel(axes, panel, lines), salt="/".join(names))


def evaluation_svg(evaluation: Evaluation, title: str) -> str:
    """Accuracy against the number of samples, as such an element."""
    from fastrl.evaluation.plot import draw_evaluation

    return _svg(lambda axes: draw_evaluation(axes, evaluation, title), salt=title)


def _svg(draw: Callable[[Axes], None], salt: str) -> str:
    from matplotlib.figure import Figure

    ink = dict.fromkeys(("text.color", "xtick.color", "ytick.color", "grid.color"), _INK)
    ink |= {"axes.labelcolor": _INK, "axes.edgecolor": _INK}
    with _style({"svg.fonttype": "none", "svg.hashsalt": salt, **ink}):
        figure = Figure(figsize=(4.8, 2.7), layout="constrained")
        draw(figure.subplots())
        out = io.StringIO()
        nothing = dict.fromkeys(("Date", "Creator", "Format", "Type"))
        figure.savefig(out, format="svg", transparent=True, metadata=nothing)
    svg = out.getvalue()
    svg = svg[svg.index("<svg") :].replace(_INK, "currentColor").replace("xlink:href", "href")
    svg = re.sub(r"<style.*?</style>", "", svg, flags=re.DOTALL)
    svg = re.sub(r' (xmlns(:xlink)?|width|height|version)="[^"]*"', "", svg[: svg.index(">")]) + svg[svg.index(">") :]
    svg = re.sub(r' id="(?![pm][0-9a-f]{10}")[^"]*"', "", svg)  # those that nothing refers to; they would repeat
    return re.sub(r"font-family: [^;]*;", "", svg)


def draw_panel(axes: Axes, panel: Panel, lines: Sequence[Series]) -> None:
    """The lines of a panel: a colour per metric, solid for training, a dash pattern per evaluation."""
    bases = list(dict.fromkeys(split_prefix(line.metric)[1] for line in lines))
    prefixes = sorted({split_prefix(line.metric)[0] for line in lines})
    colors = dict(zip(bases, _cycle(len(bases)), strict=True))
    for line in lines:
        prefix, base = split_prefix(line.metric)
        _draw_line(axes, line, colors[base], panel.smooth, None, dash=prefixes.index(prefix), faint=len(bases) < 3)
    _dress(axes, panel.title, "step")
    if panel.share:
        _share_limits(axes)
    if len(bases) > 1:
        for base, label in zip(bases, _short_names(bases), strict=True):
            axes.plot([], [], color=colors[base], linewidth=2, label=_visible(label))
    if len(prefixes) > 1 or prefixes[0]:
        for dash, prefix in enumerate(prefixes):
            style: Any = {"linestyle": _DASHES[dash % len(_DASHES)], "color": "#7F7F7F"}
            axes.plot([], [], label=prefix or "training", **style)
    if axes.get_legend_handles_labels()[0]:
        axes.legend(frameon=False, fontsize=7, loc="best")


def _short_names(names: Sequence[str]) -> list[str]:
    """Without the words that all of them begin or end with."""
    words = [name.split("/") for name in names]
    while len({parts[0] for parts in words}) == 1 and all(len(parts) > 1 for parts in words):
        words = [parts[1:] for parts in words]
    while len({parts[-1] for parts in words}) == 1 and all(len(parts) > 1 for parts in words):
        words = [parts[:-1] for parts in words]
    return ["/".join(parts) for parts in words]


def running_mean(values: Sequence[float], window: int) -> list[float]:
    """Mean of each value and the up to `window - 1` values before it."""
    parts = [values[max(0, end - window) : end] for end in range(1, len(values) + 1)]
    return [sum(part) / len(part) for part in parts]


def save(figure: Figure, path: str | Path) -> Path:
    """Writes the figure; the suffix chooses the format."""
    figure.savefig(path)
    return Path(path)


@contextlib.contextmanager
def _style(more: Mapping[str, Any] | None = None) -> Iterator[None]:
    import matplotlib

    settings: Any = {"text.parse_math": False, **(more or {})}
    with matplotlib.rc_context(settings):  # a metric's name may hold a $
        yield


def _grid(panels: int, title: str) -> tuple[Figure, list[Axes]]:
    from matplotlib.figure import Figure  # without pyplot: no display, no global state

    columns = min(panels, 2)
    rows = -(-panels // columns)
    figure = Figure(figsize=(5.6 * columns, 3.1 * rows + (0.4 if title else 0)), dpi=150, layout="constrained")
    grid = list(figure.subplots(rows, columns, squeeze=False).flat)
    for axes in grid[panels:]:
        axes.remove()
    if title:
        figure.suptitle(title, fontsize=11)
    return figure, grid[:panels]


def _draw_line(
    axes: Axes,
    line: Series,
    color: str,
    noisy: bool,
    window: int | None,
    *,
    faint: bool,
    dash: int = 0,
    label: str | None = None,
) -> None:
    x, y = line.x, line.y
    if window is None:
        window = max(1, min(50, round(len(y) / 8))) if noisy and not line.from_evaluation else 1
    points: Any = {"marker": "o", "markersize": 2.5} if len(y) <= 60 else {}
    style: Any = {"color": color, "linestyle": _DASHES[dash % len(_DASHES)]}
    if window == 1:
        axes.plot(*_thinned(x, y), linewidth=1.6, label=label, **points, **style)
        return
    if faint:
        axes.plot(*_thinned(x, y), alpha=0.3, linewidth=0.9, **points, **style)
    axes.plot(*_thinned(x, running_mean(y, window)), linewidth=2, label=label, **style)


def _visible(label: str) -> str:
    return f" {label}" if label.startswith("_") else label  # matplotlib leaves such a label out of a legend


def _thinned(x: Sequence[float], y: Sequence[float]) -> tuple[Sequence[float], Sequence[float]]:
    """At most `_MOST_POINTS` points: the means of stretches of equal length."""
    count = min(_MOST_POINTS, len(x))
    cuts = [len(x) * i // count for i in range(count + 1)]
    parts = list(itertools.pairwise(cuts))
    return [sum(x[a:b]) / (b - a) for a, b in parts], [sum(y[a:b]) / (b - a) for a, b in parts]


def _dress(axes: Axes, title: str, x: str) -> None:
    axes.set_title(title, fontsize=10, loc="left")
    axes.set_xlabel(AXES[x], fontsize=8)
    axes.tick_params(labelsize=8)
    axes.grid(alpha=0.2, linewidth=0.6)
    axes.spines[["top", "right"]].set_visible(False)
    if x == "step":
        axes.locator_params(axis="x", integer=True)
    if x == "seconds":
        axes.xaxis.set_major_formatter(lambda seconds, _: f"{seconds / 60:g}")


def _share_limits(axes: Axes) -> None:
    low, high = axes.get_ylim()
    axes.set_ylim(max(low, -0.02), min(high, 1.02))


def _cycle(count: int) -> list[str]:
    return [COLORS[i % len(COLORS)] for i in range(count)]
