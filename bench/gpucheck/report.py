"""results.json, a Markdown page and a picture, from what the stages left behind."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any


def write(out: Path, stages: list[dict[str, Any]], seconds: float) -> list[str]:
    """Writes the report of all stages; returns the paths written and, for what could not be, the reason."""
    failed = failures(stages)
    content = {"ok": not failed, "seconds": round(seconds, 1), "stages": stages}
    (out / "results.json").write_text(json.dumps(content, indent=1))
    (out / "report.md").write_text(_markdown(stages, failed, seconds))
    lines = [str(out / "results.json"), str(out / "report.md")]
    rows = [row for stage in stages for row in stage.get("rows", []) if "times_floor" in row]
    if not rows:
        return [*lines, "no picture: nothing was timed"]
    try:
        _picture(out / "benchmark.png", rows)
    except ImportError as error:
        return [*lines, f"no picture: matplotlib can't be imported ({error})"]
    return [*lines, str(out / "benchmark.png")]


def failures(stages: list[dict[str, Any]]) -> list[str]:
    """Every failed check, and every stage that did not reach its end."""
    out = []
    for stage in stages:
        out += [f"{stage['stage']}: {check['name']}" for check in stage.get("checks", []) if not check["ok"]]
        if not stage.get("finished"):
            out.append(f"{stage['stage']}: did not finish: {stage.get('error', 'no reason known')}")
    return out


def _markdown(stages: list[dict[str, Any]], failed: list[str], seconds: float) -> str:
    verdict = "FAILED" if failed else "All checks passed"
    lines = ["# fastrl on this machine", "", f"{verdict}, {seconds:.0f} s.", ""]
    lines += [f"- FAILED {name}" for name in failed]
    for stage in stages:
        checks = stage.get("checks", [])
        lines += ["", f"## {stage['stage']}", ""]
        if checks:
            lines += [f"{sum(c['ok'] for c in checks)} of {len(checks)} checks passed.", ""]
        lines += [f"- {key}: {value}" for key, value in stage.get("facts", {}).items()]
        lines += [f"- {c['name']}: " + ", ".join(f"{k} {v:.1f}" for k, v in c.items() if k.endswith("_mib"))
                  for c in checks if "measured_mib" in c]  # fmt: skip
        lines += [f"- not run: {item['name']}: {item['reason']}" for item in stage.get("not_run", [])]
        rows = stage.get("rows", [])
        for workload in dict.fromkeys(row["workload"] for row in rows):
            some = [row for row in rows if row["workload"] == workload]
            lines += ["", f"### {workload}: N={some[0]['N']}, D={some[0]['D']}, V={some[0]['V']}", ""]
            lines += [
                "| | median ms | x floor | FLOPs | TFLOP/s | peak MiB beyond inputs and gradients | relative error |",
                "|---|---|---|---|---|---|---|",
                *(_row(row) for row in some),
            ]
    return "\n".join(lines) + "\n"


def _row(row: dict[str, Any]) -> str:
    errors = ", ".join(f"{k} {v:.1e}" for k, v in row.get("errors", {}).items())
    cost = f"{row['flops_formula']} = {row['flops']:.3g}"
    if "median_ms" not in row:
        return f"| {row['contender']} | {row.get('refused', '')} | | {cost} | | | {errors} |"
    peak = "" if row["peak_mib"] is None else f"{row['peak_mib']:.0f}"
    return (
        f"| {row['contender']} | {row['median_ms']:.3f} | {row['times_floor']:.2f} | {cost} | "
        f"{row['tflops_per_s']:.1f} | {peak} | {errors} |"
    )


def _picture(path: Path, rows: list[dict[str, Any]]) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    workloads = list(dict.fromkeys(row["workload"] for row in rows))
    counts = [sum(row["workload"] == workload for row in rows) for workload in workloads]
    height = 0.6 + sum(0.35 * count + 0.7 for count in counts)
    figure, axes = pyplot.subplots(
        len(workloads), 1, figsize=(9, height), squeeze=False, gridspec_kw={"height_ratios": counts}
    )
    for axis, workload in zip(axes[:, 0], workloads, strict=True):
        some = [row for row in rows if row["workload"] == workload][::-1]
        colors = ["#c44e52" if r["contender"].startswith("fastrl") else "#8c8c8c" for r in some]
        bars = axis.barh([r["contender"] for r in some], [r["times_floor"] for r in some], color=colors)
        axis.bar_label(bars, [f"{r['times_floor']:.2f}x  {r['median_ms']:.2f} ms" for r in some], padding=3, fontsize=8)
        axis.axvline(1.0, color="black", linewidth=0.8)
        axis.margins(x=0.25)
        axis.set_title(f"{workload}: time over the bare GEMMs", fontsize=9, loc="left")
        axis.tick_params(labelsize=8)
    figure.tight_layout()
    figure.savefig(path, dpi=130)
    pyplot.close(figure)
