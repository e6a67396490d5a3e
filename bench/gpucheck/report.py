"""results.json, a Markdown page and pictures, from what the stages left behind."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from fastrl.benchmark.suite import Results
from fastrl.benchmark.tables import tables


def write(out: Path, stages: list[dict[str, Any]], seconds: float) -> list[str]:
    """Writes the report of all stages; returns the paths written and, for what could not be, the reason."""
    failed = failures(stages)
    content = {"ok": not failed, "seconds": round(seconds, 1), "stages": stages}
    (out / "results.json").write_text(json.dumps(content, indent=1))
    (out / "report.md").write_text(_markdown(stages, failed, seconds))
    lines = [str(out / "results.json"), str(out / "report.md")]
    try:
        import matplotlib  # noqa: F401
    except ImportError as error:
        return [*lines, f"no picture: matplotlib can't be imported ({error})"]
    from fastrl.benchmark import plots

    facts = next((stage["facts"] for stage in stages if "versions" in stage.get("facts", {})), None)
    if facts is None:
        return [*lines, "no picture: the environment stage left no facts"]
    results = Results(facts, seconds=seconds)
    for stage in stages:
        # Rows of one stage are one interleaved run; of two that time the same, the picture shows the first.
        results.rows += [row for row in stage.get("rows", []) if stage["stage"] in ("peers", "compiled")]
        results.growth += stage.get("growth", [])
    return [*lines, *(str(path) for path in plots.write(results, out))]


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
    targets = [target for stage in stages for target in stage.get("targets", [])]
    if targets:
        lines += ["", "## What is asked for", ""]
        lines += [f"- {'reached' if t['reached'] else 'MISSED'}: {t['name']}: {_numbers(t)}" for t in targets]
    for stage in stages:
        checks = stage.get("checks", [])
        lines += ["", f"## {stage['stage']}", ""]
        if checks:
            lines += [f"{sum(c['ok'] for c in checks)} of {len(checks)} checks passed.", ""]
        lines += [f"- {key}: {value}" for key, value in stage.get("facts", {}).items()]
        lines += [f"- {c['name']}: {_numbers(c)}" for c in checks if "measured_mib" in c]
        lines += [f"- not run: {item['name']}: {item['reason']}" for item in stage.get("not_run", [])]
        for table in tables([*stage.get("rows", []), *stage.get("growth", [])]):
            lines += ["", *table]
    return "\n".join(lines) + "\n"


def _numbers(item: dict[str, Any]) -> str:
    shown = {k: v for k, v in item.items() if k not in ("name", "ok", "reached")}
    return ", ".join(f"{k} {v:.3g}" if isinstance(v, float) else f"{k} {v}" for k, v in shown.items())
