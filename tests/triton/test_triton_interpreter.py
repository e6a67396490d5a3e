"""Runs the `*_cases.py` beside it in Triton's interpreter: a process of its own, since the choice is made at import."""

import os
import subprocess
import sys
import xml.etree.ElementTree as ElementTree
from pathlib import Path

import pytest

HERE = Path(__file__).parent
ROOT = HERE.parent.parent
# File and the fewest cases it must run: a file that vanished, or one whose cases were all deselected, is a failure.
CASES = {
    "row_cases.py": 100,
    "advantages_cases.py": 40,
    "ops_cases.py": 10,
    "token_cases.py": 70,
    "divergence_cases.py": 70,
    "linear_cases.py": 100,
}


def test_every_case_file_is_listed() -> None:
    assert sorted(CASES) == sorted(path.name for path in HERE.glob("*_cases.py"))


@pytest.mark.parametrize("name", CASES)
def test_in_the_interpreter(name: str, tmp_path: Path) -> None:
    report = tmp_path / "report.xml"
    command = [sys.executable, "-m", "pytest", str(HERE / name), "-q", "-p", "no:cacheprovider", "--tb=short"]
    command += [f"--confcutdir={HERE}", f"--rootdir={ROOT}", f"--junitxml={report}", "-W", "ignore::RuntimeWarning"]
    paths = [str(ROOT), str(ROOT / "kernels"), os.environ.get("PYTHONPATH", "")]
    environment = {**os.environ, "TRITON_INTERPRET": "1", "PYTHONPATH": os.pathsep.join(filter(None, paths))}
    run = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=1200)
    assert run.returncode == 0, f"{' '.join(command)}\n{run.stdout}\n{run.stderr}"
    suite = next(ElementTree.parse(report).getroot().iter("testsuite"))
    assert suite.get("skipped") == "0", run.stdout
    assert int(suite.get("tests", 0)) >= CASES[name], run.stdout
