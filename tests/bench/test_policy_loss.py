"""bench/policy_loss.py runs, checks before it times, and writes what it says it writes."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

SCRIPT = Path(__file__).parents[2] / "bench" / "policy_loss.py"


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, str(SCRIPT), *arguments], capture_output=True, text=True, timeout=300)


def test_tiny_run(tmp_path: Path) -> None:
    result = run("--tokens", "512", "--hidden", "32", "--vocabulary", "1000", "--rounds", "1", "--out", str(tmp_path))
    assert result.returncode == 0, result.stderr + result.stdout
    rows = {r["name"]: r for r in json.loads((tmp_path / "results.json").read_text())["rows"]}
    assert {"floor: three GEMMs", "eager PyTorch", "fastrl", "fastrl, scoring", "fastrl, frozen head"} <= rows.keys()
    for name, row in rows.items():
        assert row["median_s"] > 0 and name in result.stdout and name in (tmp_path / "results.md").read_text()
        if row["error_to_fp64"] is not None:
            assert row["error_to_fp64"] < 1e-5


def test_wrong_arguments_are_refused() -> None:
    result = run("--tokens", "100")
    assert result.returncode == 2 and "multiple of 64" in result.stderr
