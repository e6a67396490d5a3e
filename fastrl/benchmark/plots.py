"""The results as pictures: time and memory against N, time against the live share, with the floor as a line in each."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .suite import Results
from .tables import duration

if TYPE_CHECKING:
    from matplotlib.axes import Axes

# Ours stand out, peers keep one colour in all pictures (Okabe and Ito's palette, legible to the colour-blind).
_OURS = "#D55E00"
_OURS_OTHERWISE = {"dead rows scored": "#E69F00", "two pass": "#B07A00", "grad_tolerance": "#EBA47B"}
_PEERS = ("#0072B2", "#009E73", "#CC79A7", "#56B4E9", "#7A7A7A", "#332288", "#882255", "#999933", "#117733", "#AA4499")
_FLOOR = "#222222"

Rows = Sequence[dict[str, Any]]


def write(results: Results, folder: Path) -> list[Path]:
    """Every picture there are numbers for: one each, and all in benchmark.png. Returns the paths."""
    from matplotlib.figure import Figure  # without pyplot: no display, no global state

    color = _colors([*results.rows, *results.growth])
    panels: dict[str, Callable[[Axes], None]] = {}
    bars = [r for r in results.rows if r["op"] == "train" and "median_s" in r]
    if bars:
        bars = [r for r in bars if r["shape"] == bars[0]["shape"]]
        panels["peers"] = lambda axes: _bars(axes, bars, color)
    live = _live_rows(results.rows)
    if len({r["live_share"] for r in live}) > 1:
        panels["time_against_live_share"] = lambda axes: _live_share(axes, live, color)
    growth = [r for r in results.growth if r["op"] == "train" and "median_s" in r]
    if len({r["N"] for r in growth}) > 1:
        panels["time_against_n"] = lambda axes: _time(axes, growth, color)
        if any(r["peak_bytes"] is not None for r in growth):
            panels["memory_against_n"] = lambda axes: _memory(axes, growth, color)
    if not panels:
        return []
    paths = []
    for name, draw in panels.items():
        figure = Figure(figsize=(6.4, 4.4), dpi=150, layout="constrained")
        draw(figure.subplots())
        paths.append(folder / f"{name}.png")
        figure.savefig(paths[-1])
    rows, columns = (len(panels) + 1) // 2, min(2, len(panels))
    figure = Figure(figsize=(6.4 * columns, 4.4 * rows + 0.35), dpi=150, layout="constrained")
    grid = figure.subplots(rows, columns, squeeze=False)
    for axes in grid.flat[len(panels) :]:
        axes.set_visible(False)
    for axes, draw in zip(grid.flat, panels.values(), strict=False):
        draw(axes)
    versions = results.facts["versions"]
    figure.suptitle(f"{results.facts['device']}, torch {versions['torch']}", fontsize=11)
    paths.append(folder / "benchmark.png")
    figure.savefig(paths[-1])
    return paths


def _colors(rows: Rows) -> Callable[[str], str]:
    peers = {r["contender"] for r in rows if not r["ours"] and not r["floor"] and r["op"] in ("train", "live")}
    named = {name: _PEERS[i % len(_PEERS)] for i, name in enumerate(sorted(peers))}
    return lambda name: named.get(name) or next((c for what, c in _OURS_OTHERWISE.items() if what in name), _OURS)


def _live_rows(rows: Rows) -> list[dict[str, Any]]:
    """Training at the size that was run at several live shares, of those who ran there at a share below 1."""
    live = [r for r in rows if r["op"] == "live" and "median_s" in r]
    if not live:
        return []
    size, names = (live[0]["shape"], live[0]["N"]), {r["contender"] for r in live}
    some = [r for r in rows if r["op"] in ("live", "train") and "median_s" in r and r["contender"] in names]
    return [r for r in some if (r["shape"], r["N"]) == size]


def _bars(axes: Axes, rows: Rows, color: Callable[[str], str]) -> None:
    some = sorted((r for r in rows if not r["floor"]), key=lambda r: -r["to_floor"])
    bars = axes.barh([r["contender"] for r in some], [r["to_floor"] for r in some],
                     color=[color(r["contender"]) for r in some], height=0.7)  # fmt: skip
    axes.bar_label(bars, [f"{r['to_floor']:.2f}" for r in some], padding=3, fontsize=8,
                   bbox={"facecolor": "white", "edgecolor": "none", "pad": 0.8})  # fmt: skip
    axes.axvline(1.0, color=_FLOOR, linewidth=1.2, linestyle="--")
    axes.margins(x=0.12)
    first = rows[0]
    _dress(axes, f"forward + backward at the head: time over three bare GEMMs\n{_size(first)}", "", "")
    axes.annotate("floor", (1.0, 1.0), xycoords=("data", "axes fraction"), xytext=(3, -9), textcoords="offset points",
                  fontsize=8, color=_FLOOR)  # fmt: skip
    axes.grid(axis="y", visible=False)


def _live_share(axes: Axes, rows: Rows, color: Callable[[str], str]) -> None:
    # In floors of each share's own run, so that a drift of the machine between two runs is no slope.
    top = 4.5
    axes.plot([0, 1], [0, 1], color=_FLOOR, linestyle="--", linewidth=1.2, label="three bare GEMMs of the live rows")
    axes.axhline(1.0, color=_FLOOR, linestyle=":", linewidth=1.0, label="three bare GEMMs of all rows")
    shown = [r for r in rows if not r["floor"]]
    scaled = [{**r, **{k: r[k] * r["to_floor"] / r["median_s"] for k in ("min_s", "max_s", "median_s")}} for r in shown]
    high = {r["contender"] for r in scaled} - {r["contender"] for r in scaled if r["median_s"] <= top}
    _lines(axes, [r for r in scaled if r["contender"] not in high], "live_share", color)
    axes.set_ylim(0, 1.35 * top)  # room for the legend
    axes.set_xlim(0, 1.03)
    seconds = next((r["median_s"] for r in rows if r["floor"]), None)
    unit = "three bare GEMMs" if seconds is None else f"three bare GEMMs ({duration(seconds)})"
    _dress(axes, f"forward + backward: time against the live share\n{_size(rows[0])}", "live share", f"time / {unit}")
    axes.legend(fontsize=7, frameon=False, loc="upper left", ncols=2)
    if high:
        axes.annotate("off the scale: " + ", ".join(sorted(high)), (0.99, 0.01), xycoords="axes fraction", ha="right",
                      fontsize=6.5, color="#555555")  # fmt: skip


def _time(axes: Axes, rows: Rows, color: Callable[[str], str]) -> None:
    floor = sorted((r for r in rows if r["floor"]), key=lambda r: r["N"])
    axes.plot([r["N"] for r in floor], [r["median_s"] for r in floor], color=_FLOOR, linestyle="--", linewidth=1.2,
              label="three bare GEMMs (floor)", zorder=5)  # fmt: skip
    _lines(axes, [r for r in rows if not r["floor"]], "N", color)
    _dress(axes, f"forward + backward: time against N\n{_size(rows[0], n=False)}", "tokens N", "seconds")
    axes.set_xlim(left=0)
    axes.set_ylim(bottom=0)
    axes.legend(fontsize=8, frameon=False, loc="upper left")


def _memory(axes: Axes, rows: Rows, color: Callable[[str], str]) -> None:
    sizes = sorted({r["N"] for r in rows})
    first = rows[0]
    item = 2 if first["dtype"] in ("bfloat16", "float16") else 8 if first["dtype"] == "float64" else 4
    gradients = [(n + first["V"]) * first["D"] * item / 1e6 for n in sizes]
    axes.plot(sizes, gradients, color=_FLOOR, linestyle="--", linewidth=1.2, label="the gradients themselves (floor)",
              zorder=5)  # fmt: skip
    _lines(axes, [{**r, "peak_mb": r["peak_bytes"] / 1e6} for r in rows if not r["floor"]], "N", color, "peak_mb")
    _dress(axes, f"forward + backward: peak memory against N\n{_size(first, n=False)}", "tokens N", "MB")
    axes.set_yscale("log")
    axes.set_ylim(top=5 * axes.get_ylim()[1])  # room for the legend
    axes.set_xlim(left=0)
    axes.legend(fontsize=8, frameon=False, loc="upper left")


def _lines(axes: Axes, rows: Rows, x: str, color: Callable[[str], str], y: str = "median_s") -> None:
    for name in dict.fromkeys(r["contender"] for r in rows):
        some = sorted((r for r in rows if r["contender"] == name), key=lambda r: r[x])
        ours = some[0]["ours"]
        axes.plot([r[x] for r in some], [r[y] for r in some], marker="o", markersize=4.5 if ours else 3.5,
                  linewidth=2.4 if ours else 1.3, color=color(name), label=name, zorder=6 if ours else 3)  # fmt: skip
        if y == "median_s" and len(some[0]) and "min_s" in some[0]:
            axes.fill_between([r[x] for r in some], [r["min_s"] for r in some], [r["max_s"] for r in some],
                              color=color(name), alpha=0.12, linewidth=0)  # fmt: skip


def _size(row: dict[str, Any], n: bool = True) -> str:
    return f"{row['shape']}, {row['dtype']}: " + ", ".join(
        f"{k} {row[k]}" for k in (("N", "D", "V") if n else ("D", "V"))
    )


def _dress(axes: Axes, title: str, x: str, y: str) -> None:
    axes.set_title(title, fontsize=9, loc="left")
    axes.set_xlabel(x, fontsize=9)
    axes.set_ylabel(y, fontsize=9)
    axes.tick_params(labelsize=8)
    axes.grid(alpha=0.25, linewidth=0.6)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
