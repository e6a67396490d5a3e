"""The page of the migration from TRL: true of the code, whether or not TRL is here."""

from __future__ import annotations

import importlib.util

from fastrl.trainers import GRPOConfig, SFTConfig, migration

PAGE = migration.PAGE.read_text()


def test_every_argument_is_listed() -> None:
    assert migration.missing(PAGE) == []
    without = PAGE.replace("| `packing` |", "| `pakcing` |")
    assert migration.missing(without) == ["SFTConfig.packing"]


def test_rows_say_what_the_code_says() -> None:
    assert PAGE.count("\n| `") > 200
    assert migration.outdated(PAGE) == []
    row = "| `packing` | `False` | same |"
    assert migration.outdated(PAGE.replace(row, "| `packing` | `True` | same |")) == ["SFTConfig.packing: same"]


def test_a_cell_tells_the_three_outcomes_apart() -> None:
    assert migration.here(SFTConfig, "packing", "`False`") == "same"
    assert migration.here(SFTConfig, "max_length", "`None`") == "default `1024`"
    assert migration.here(GRPOConfig, "use_liger_kernel", "`False`").startswith("refused unless `False`: ")
    assert migration.here(SFTConfig, "nothing", "`1`").startswith("refused")


def test_tables_are_up_to_date_where_trl_is() -> None:
    if importlib.util.find_spec("trl") is None:
        assert "trl" not in globals()
    else:
        assert migration.filled(PAGE) == PAGE, "run python -m fastrl.trainers.migration"
