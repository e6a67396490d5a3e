"""Completions on the terminal, in parquet files and in the tables of loggers."""

from __future__ import annotations

import io
import math
import types
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from fastrl.run_files import completion_files, message_text, read_completions
from fastrl.trainers.completion_log import CompletionLog


def make(folder: Path, **options: Any) -> tuple[CompletionLog, io.StringIO]:
    screen = io.StringIO()
    return CompletionLog(folder, **{"size": 4, "console": Console(file=screen, width=120), **options}), screen


def add(log: CompletionLog, mode: str = "train", start: int = 0, count: int = 4) -> None:
    texts = [f"text {i}" for i in range(start, start + count)]
    rewards = {"exact": [1.0, math.nan, 0.0, None][:count], "form": [0.5] * count}
    log.add(mode, [f"prompt {i % 2}" for i in range(count)], texts, rewards, [1.0, -1.0, math.nan, 0.0][:count])


def test_parquet_has_trls_columns(tmp_path: Path) -> None:
    log, _ = make(tmp_path)
    add(log)
    path = log.flush(7)
    assert path == tmp_path / "completions" / "completions_00007.parquet"
    rows = read_completions(path)
    assert list(rows[0]) == ["step", "prompt", "completion", "exact", "form", "advantage"]
    assert [row["exact"] for row in rows] == [1.0, None, 0.0, None] and {row["step"] for row in rows} == {7}
    assert [row["advantage"] for row in rows] == [1.0, -1.0, None, 0.0]
    assert [row["completion"] for row in rows] == ["text 0", "text 1", "text 2", "text 3"]


def test_only_the_latest_rollout_is_kept_and_nothing_is_written_twice(tmp_path: Path) -> None:
    log, _ = make(tmp_path)
    add(log)
    add(log, start=4)
    assert [row["completion"] for row in read_completions(log.flush(1))] == [f"text {i}" for i in range(4, 8)]
    assert log.flush(2) is None
    add(log, start=8, count=2)
    assert [row["completion"] for row in read_completions(log.flush(3))] == ["text 6", "text 7", "text 8", "text 9"]


def test_evaluations_have_files_of_their_own(tmp_path: Path) -> None:
    log, _ = make(tmp_path)
    add(log)
    add(log, "eval_one/two", start=100)
    log.flush(5)
    log.flush(5, "eval_one/two")
    assert list(completion_files(tmp_path)) == [(5, "train"), (5, "eval_one-two")]


def test_a_resumed_run_overwrites_what_came_after_its_checkpoint(tmp_path: Path) -> None:
    log, _ = make(tmp_path)
    for step in (1, 2, 3, 4):
        add(log, start=step * 10)
        log.flush(step)
    resumed, _ = make(tmp_path)
    add(resumed, start=500)
    resumed.flush(3)
    files = completion_files(tmp_path)
    assert list(files) == [(1, "train"), (2, "train"), (3, "train")]
    assert read_completions(files[3, "train"])[0]["completion"] == "text 500"
    assert not [path for path in (tmp_path / "completions").iterdir() if path.name.startswith(".")]


def test_conversations_and_tool_calls_of_different_kinds(tmp_path: Path) -> None:
    log, screen = make(tmp_path)
    question = [{"role": "user", "content": "2 + 2?"}]
    calls = [{"function": {"name": "f", "arguments": arguments}} for arguments in ({"x": 1}, {"x": "one"})]
    answers = [[{"role": "assistant", "content": "", "tool_calls": [call]}] for call in calls]
    log.add("train", [question] * 2, answers, extra={"source": ["a", None]})
    rows = read_completions(log.flush(1))
    assert rows[0]["prompt"] == question and '"one"' in rows[1]["completion"] and rows[1]["source"] is None
    assert "user: 2 + 2?" in screen.getvalue()
    assert (
        message_text([{"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "image"}]}])
        == "user: a [image]"
    )


def test_table_on_the_terminal(tmp_path: Path) -> None:
    log, screen = make(tmp_path, num_to_print=2)
    add(log)
    log.flush(7)
    shown = screen.getvalue()
    assert "Step 7" in shown and "exact" in shown and "advantage" in shown
    assert sum(f"text {i}" in shown for i in range(4)) == 2
    markup, screen = make(tmp_path)
    markup.add("train", ["[bold]p[/bold]"], ["[/red]"])
    markup.flush(8)
    assert "[bold]p[/bold]" in screen.getvalue() and "[/red]" in screen.getvalue()  # shown, not obeyed


def test_loggers_get_tables(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    logged: list[tuple[str, dict[str, Any]]] = []
    for name, run in (("wandb", object()), ("trackio", None)):
        module = types.ModuleType(name)
        module.run = run  # type: ignore[attr-defined]
        module.Table = lambda dataframe: dataframe  # type: ignore[attr-defined]
        module.log = lambda content, name=name: logged.append((name, content))  # type: ignore[attr-defined]
        monkeypatch.setitem(__import__("sys").modules, name, module)
    log, _ = make(tmp_path, report_to=["wandb", "trackio", "tensorboard"], unique_prompts=True)
    add(log)
    path = log.flush(1)
    assert [name for name, _ in logged] == ["wandb", "trackio"]
    table = logged[0][1]["completions"]
    assert list(table["completion"]) == ["text 0", "text 1"]  # one per prompt
    assert len(read_completions(path)) == 4
    monkeypatch.setitem(__import__("sys").modules, "wandb", None)  # not installed
    add(log, "eval")
    log.flush(2, "eval")
    assert [(name, list(content)) for name, content in logged[2:]] == [("trackio", ["eval_completions"])]


def test_what_can_not_be_written_does_not_end_the_run(tmp_path: Path) -> None:
    (tmp_path / "completions").write_text("a file is in the way")
    log, _ = make(tmp_path)
    add(log)
    assert log.flush(1) is None


def test_other_processes_write_and_print_nothing(tmp_path: Path) -> None:
    log, screen = make(tmp_path, main_process=False)
    add(log)
    assert log.flush(1) is None and not (tmp_path / "completions").exists() and screen.getvalue() == ""


def test_a_full_disk_costs_the_file_and_is_said_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    log, _ = make(tmp_path)

    def full(table: Any, path: Path) -> None:
        path.write_bytes(b"half")
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr("pyarrow.parquet.write_table", full)
        for step in (1, 2):
            add(log)
            assert log.flush(step) is None
    assert caplog.text.count("could not be written, at step 1 for the first time: [Errno 28] No space") == 1
    assert "at step 2" not in caplog.text
    assert not list((tmp_path / "completions").iterdir())
    add(log)
    assert log.flush(3) is not None
