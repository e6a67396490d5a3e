"""`fastrl plot`: the pictures and the page of one run, or several runs side by side."""

from __future__ import annotations

import argparse
import re
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from fastrl.cli.errors import UserError
from fastrl.suggestions import did_you_mean

if TYPE_CHECKING:
    from fastrl.report.runs import Run

_AXES = {"step": "step", "tokens": "num_tokens", "time": "seconds"}
_MOST_PANELS = 8


def add_parser(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Register the command."""
    parser = subparsers.add_parser(
        "plot",
        help="the curves of a run, or of several in comparison",
        description="One run: its page, report.html, and its curves as PNGs, also for a run that was killed. Several: "
        "one PNG with a panel per metric and a line per run. A run is the output_dir of a training, of other trainers "
        "on transformers too.",
    )
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="folder of a run, or of a checkpoint")
    parser.add_argument("--metrics", nargs="+", metavar="NAME", help="what to compare; --metrics list shows the names")
    parser.add_argument("--x", choices=_AXES, help="horizontal axis of a comparison (default: step)")
    parser.add_argument("--smooth", type=int, metavar="N", help="running mean over N logs in a comparison; 1: none")
    parser.add_argument("--out", type=Path, metavar="FILE.png", help="of a comparison (default: comparison.png)")
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """Write the files and say where. Returns 0.

    Raises:
        UserError: a folder that is not a run, a metric that the runs don't have, a file that can't be written.
    """
    from fastrl.report.runs import NotARunError, read_run

    try:
        runs = [read_run(folder) for folder in arguments.runs]
    except NotARunError as error:
        raise UserError(str(error)) from error
    if arguments.metrics == ["list"]:
        print("\n".join(dict.fromkeys(name for one in runs for name in one.metrics)))
        return 0
    options = ("metrics", "x", "smooth", "out")
    given = [option for option in options if getattr(arguments, option) is not None]
    try:
        if len(runs) == 1 and not given:
            from fastrl.report.page import write_page

            written = write_page(runs[0].folder)
        else:
            written = [_compare(runs, arguments)]
    except OSError as error:
        raise UserError(f"can't write: {error}") from error
    except ModuleNotFoundError as error:
        raise UserError(f"this needs the package {error.name}; get it with: pip install 'fastrl[train]'") from error
    for path in written:
        print(path)
    return 0


def _compare(runs: Sequence[Run], arguments: argparse.Namespace) -> Path:
    from fastrl.report.curves import comparison_figure, save

    if arguments.smooth is not None and arguments.smooth < 1:
        raise UserError(f"--smooth: expected a number of logs, 1 or more, got {arguments.smooth}")
    out = arguments.out or Path("comparison.png")
    if out.suffix.lower() not in (".png", ".svg", ".pdf"):
        raise UserError(f"--out: expected a file that ends in .png, .svg or .pdf, got {out}")
    x = _AXES[arguments.x or "step"]
    for one in runs:
        if x != "step" and one.total(x) is None:
            raise UserError(f"--x {arguments.x}: {one.folder} did not log {x}")
    metrics = _checked(runs, arguments.metrics) if arguments.metrics else _common(runs)
    histories = dict(zip(_labels(runs), (one.history for one in runs), strict=True))
    return save(comparison_figure(histories, metrics, x=x, smooth=arguments.smooth), out)


def _checked(runs: Sequence[Run], names: Sequence[str]) -> list[str]:
    known = dict.fromkeys(name for one in runs for name in one.metrics)
    for name in names:
        if name not in known:
            raise UserError(f"--metrics: no run has logged {name!r}{did_you_mean(name, known)}")
    return list(dict.fromkeys(names))


def _common(runs: Sequence[Run]) -> list[str]:
    """Metrics that all runs have: of each panel of an overview those that are no extremes, two at most."""
    from fastrl.report.panels import panels_of

    common = [name for name in runs[0].metrics if all(name in one.metrics for one in runs)]
    if not common:
        raise UserError("the runs have no metric in common; --metrics list shows what they have")
    chosen = []
    for panel, names in panels_of(common):
        if panel.overview:
            chosen += [name for name in names if not re.search(r"(^|[/_])(min|max)[/_]", name)][:2]
    return (chosen or common)[:_MOST_PANELS]


def _labels(runs: Sequence[Run]) -> list[str]:
    """The names of the folders, with as much of the path as tells them apart."""
    paths = [one.folder.resolve().parts for one in runs]
    if len(set(paths)) < len(paths):
        raise UserError("a run is given twice")
    depth = 1
    while len({path[-depth:] for path in paths}) < len(paths):
        depth += 1
    return ["/".join(path[-depth:]) for path in paths]
