"""The tables of objectives x options in the README: up to date, and true of the code."""

from __future__ import annotations

import ast
from pathlib import Path

import fastrl
from fastrl import objectives
from fastrl.objectives import table
from fastrl.objectives.policy_objective import PolicyObjective
from fastrl.objectives.surrogates import LOSSES

FOLDER = Path(objectives.__file__).parent
README = (FOLDER / "README.md").read_text()


def test_tables_are_up_to_date() -> None:
    assert table.filled(README) == README, "run python -m fastrl.objectives.table"
    rows = [line for line in table.tables()["policy"].splitlines() if line.startswith("| `")]
    assert len(rows) == 2 * len(LOSSES)


def test_a_refused_option_is_an_empty_cell() -> None:
    assert table.takes(PolicyObjective, {"loss_type": "grpo"}, {"delta": 4.0})
    assert not table.takes(PolicyObjective, {"loss_type": "cispo"}, {"delta": 4.0})


def test_every_loss_is_exported_and_listed() -> None:
    for path in FOLDER.glob("*.py"):
        for node in ast.parse(path.read_text()).body:
            if isinstance(node, ast.FunctionDef) and node.name.endswith("_loss") and not node.name.startswith("_"):
                assert node.name in objectives.__all__ and hasattr(fastrl, node.name), node.name
                assert f"`{node.name}" in README, node.name
