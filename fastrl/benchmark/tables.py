"""The results as Markdown."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from .comparisons import OP
from .suite import Results

_SIZES = ("N", "D", "V", "B", "T", "G")


def markdown(results: Results, command: str) -> str:
    """The whole page: command, machine, one table for each workload, growth, and what did not run."""
    facts = results.facts
    lines = [f"`{command}`", "", f"{facts['device']}; {results.seconds:.0f} s.", ""]
    lines += [", ".join(f"{k} {v}" for k, v in facts["versions"].items()), ""]
    lines += ["N: tokens, n: tokens that carry a gradient, D: hidden size, V: vocabulary, T: tokens of a completion."]
    lines += [
        "Time: median (fastest - slowest) of the rounds of one interleaved run. Error: the largest of the results'"
    ]
    lines += ["distances to fp64, relative, in the 2-norm. Memory: peak growth of one call, and what of it is not the"]
    lines += ["gradients themselves."]
    for failure in results.failures:
        lines += ["", f"**FAILED**: {failure}"]
    for table in tables([row for row in results.rows if row["op"] not in (OP, "step")]):
        lines += ["", *table]
    lines += steps([row for row in results.rows if row["op"] == "step"])
    lines += objectives([row for row in results.rows if row["op"] == OP])
    if results.growth:
        lines += ["", "## Growth with N", ""]
        lines += [_line(line) for line in results.lines]
        for table in tables(results.growth):
            lines += ["", *table]
    if results.absent:
        lines += ["", "## Not on this machine", ""]
        lines += [f"- {name}: {reason}" for name, reason in results.absent.items()]
    if results.not_run:
        lines += ["", "## Not run", "", *(f"- {item['name']}: {item['reason']}" for item in results.not_run)]
    return "\n".join(lines) + "\n"


def steps(rows: Sequence[dict[str, Any]]) -> list[str]:
    """Optimizer steps: a table for each method and data, fastest first."""
    lines = ["", "## Optimizer steps", ""] if rows else []
    if rows:
        lines += [
            "Gradient: relative distance of all gradients from those of the eager loss, and from TRL's first right"
        ]
        lines += ["ones, 2-norm. / TRL: the time over that of TRL's fastest. Memory: peak of the process."]
    for title in dict.fromkeys(row["workload"] for row in rows):
        some = [row for row in rows if row["workload"] == title]
        first = some[0]
        sizes = f"B {first['B']}, {first['prompt_tokens']} prompt and {first['completion_tokens']} completion tokens"
        cost = f"{first['formula']} = {first['cost'] / 1e12:.3g} TFLOP"
        lines += ["", f"### {title}", "", f"{first['shape']}, {first['dtype']}, {sizes}; {cost}", ""]
        lines += ["| | median | fastest - slowest | rounds | / TRL | / eager | peak MB | gradient | from TRL's |"]
        lines += ["|---|---:|---:|---:|---:|---:|---:|---:|---:|"]
        lines += map(_step, sorted(some, key=lambda row: ("median_s" not in row, row.get("median_s", 0.0))))
    return lines


def _step(row: dict[str, Any]) -> str:
    name = f"**{row['contender']}**" if row["ours"] else row["contender"]
    if "median_s" not in row:
        return f"| {name} | {row.get('refused', 'not measured')} | | | | | | | |"
    to_trl, memory, errors = row["to_trl"], row["peak_bytes"], row["errors"]
    from_trl = f"{errors['TRL']:.1e}" if "TRL" in errors else ""
    return (
        f"| {name} | {duration(row['median_s'])} | {duration(row['min_s'])} - {duration(row['max_s'])} "
        f"| {row['rounds']} | {'' if to_trl is None else f'{to_trl:.2f}'} | {row['to_eager']:.2f} "
        f"| {'' if memory is None else f'{memory / 1e6:.0f}'} | {errors['gradients']:.1e} | {from_trl} |"
    )


def tables(rows: Sequence[dict[str, Any]], level: str = "###") -> Iterable[list[str]]:
    """One table for each workload, in the order in which they ran."""
    workloads: dict[tuple[Any, ...], list[dict[str, Any]]] = {}
    for row in rows:
        sizes = tuple((k, row[k]) for k in _SIZES if k in row)
        workloads.setdefault((row["workload"], row["shape"], row["dtype"], sizes), []).append(row)
    for (title, shape, dtype, sizes), some in workloads.items():
        yield [f"{level} {title}", "", f"{shape}, {dtype}, {', '.join(f'{k} {v}' for k, v in sizes)}", "", *table(some)]


def table(rows: Sequence[dict[str, Any]]) -> list[str]:
    """Rows of one workload as a table, fastest first after the floor."""
    floor = next((row for row in rows if row["floor"]), None)
    ordered = sorted(rows, key=lambda r: (not r["floor"], "median_s" not in r, r.get("median_s", 0.0)))
    unit = "GB" if rows and rows[0]["unit"] == "byte" else "TFLOP"
    scale = 1e9 if unit == "GB" else 1e12
    lines = [
        f"| | median | fastest - slowest | / floor | {unit} | {unit}/s | peak MB | beyond gradients MB | error |",
        "|---|---:|---:|---:|---:|---:|---:|---:|---:|",
    ]
    for row in ordered:
        name = f"**{row['contender']}**" if row["ours"] else row["contender"]
        cost = f"{row['formula']} = {row['cost'] / scale:.3g}"
        if "median_s" not in row:
            lines.append(f"| {name} | {row.get('refused', 'not measured')} | | | {cost} | | | | |")
            continue
        ratio = row["median_s"] / floor["median_s"] if floor is not None and "median_s" in floor else None
        error = f"{max(row['errors'].values()):.1e}" if row.get("errors") else ""
        memory = ["" if row[k] is None else f"{row[k] / 1e6:.0f}" for k in ("peak_bytes", "extra_bytes")]
        if row["floor"]:
            memory = ["", ""]  # its buffers are made before
        lines.append(
            f"| {name} | {duration(row['median_s'])} | {duration(row['min_s'])} - {duration(row['max_s'])} "
            f"| {'' if ratio is None else f'{ratio:.2f}'} | {cost} | {row['cost'] / row['median_s'] / scale:.3g} "
            f"| {memory[0]} | {memory[1]} | {error} |"
        )
    return lines


def objectives(rows: Sequence[dict[str, Any]]) -> list[str]:
    """Ours beside each peer: a table for each group of objectives."""
    lines = ["", "## Objectives", ""] if rows else []
    of_group: dict[str, list[dict[str, Any]]] = {}
    for row in rows:
        of_group.setdefault(row["shape"], []).append(row)
    for group, some in of_group.items():
        sizes = ", ".join(f"{k} {v}" for k, v in some[0].items() if k in _SIZES)
        lines += [f"### {group}", "", f"{some[0]['dtype']}, {sizes}", ""]
        lines += ["| | fastrl | peer | median | fastrl / peer | errors |", "|---|---:|---|---:|---:|---:|"]
        for title in dict.fromkeys(row["workload"] for row in some):
            ours, *others = (row for row in some if row["workload"] == title and not row["floor"])
            lines += [_objective(title, ours, peer) for peer in others]
        lines.append("")
    return lines


def _objective(title: str, ours: dict[str, Any], peer: dict[str, Any]) -> str:
    times = [duration(row["median_s"]) if "median_s" in row else row.get("refused", "") for row in (ours, peer)]
    ratio = f"{ours['median_s'] / peer['median_s']:.2f}" if "median_s" in ours and "median_s" in peer else ""
    errors = ", ".join(f"{max(row['errors'].values()):.1e}" for row in (ours, peer) if row.get("errors"))
    return f"| {title} | {times[0]} | {peer['contender']} | {times[1]} | {ratio} | {errors} |"


def duration(seconds: float) -> str:
    """Three digits, in s, ms or µs."""
    unit, factor = ("s", 1.0) if seconds >= 1 else ("ms", 1e3) if seconds >= 1e-3 else ("µs", 1e6)
    value = seconds * factor
    return f"{value:.0f} {unit}" if value >= 100 else f"{value:.1f} {unit}" if value >= 10 else f"{value:.2f} {unit}"


def _line(line: dict[str, Any]) -> str:
    per_token = f"{line['per_token'] * 1e6:.1f} µs" if line["what"] == "time" else f"{line['per_token']:.0f} bytes"
    base = duration(max(line["base"], 0.0)) if line["what"] == "time" else f"{line['base'] / 1e6:.0f} MB"
    verdict = "a straight line" if line["straight"] else "NOT a straight line"
    return (
        f"- {line['contender']}, {line['op']}: {line['what']} is {verdict}, {base} + N x {per_token}, "
        f"N = {line['from']} to {line['to']}; the farthest of {line['points']} points is "
        f"{line['largest_distance']:.0%} off it"
    )
