"""The files that tell what a run is, what it logged and what it wrote, and how they are read; needs no transformers."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

RUN_FILE = "run.json"
METRICS_FILE = "metrics.jsonl"
STATE_FILE = "trainer_state.json"
COMPLETIONS_FOLDER = "completions"
REPORT_FOLDER = "report"
ANSWERS_FILE = "answers.json"  # in the report's folder


def read_history(folder: Path) -> list[dict[str, Any]]:
    """What a run logged: `metrics.jsonl`, or else the log_history of the trainer_state.json of the highest step.

    Works for a run of any `transformers.Trainer`; empty if the folder holds neither.
    """
    states = [read_json(path) for path in (folder / STATE_FILE, *folder.glob(f"checkpoint-*/{STATE_FILE}"))]
    newest = max(states, key=lambda state: int(state.get("global_step") or 0))
    return read_metrics(folder) or [entry for entry in newest.get("log_history") or [] if isinstance(entry, dict)]


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object; empty if there is none that can be read."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}


def read_metrics(folder: Path) -> list[dict[str, Any]]:
    """The lines of `metrics.jsonl`, without one that a kill cut off; empty if there is no such file."""
    entries = []
    try:
        lines = (folder / METRICS_FILE).read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return []
    for line in lines:
        try:
            entry = json.loads(line)
        except ValueError:
            continue
        if isinstance(entry, dict) and isinstance(entry.get("step"), int):
            entries.append(entry)
    return entries


def completion_files(folder: Path) -> dict[tuple[int, str], Path]:
    """The files of a run's completions by step and mode ("train" or an evaluation's prefix), in order."""
    found = {}
    for path in sorted((folder / COMPLETIONS_FOLDER).glob("completions_*.parquet")):
        name = re.fullmatch(r"completions_(\d+)(?:_(.+))?", path.stem)
        if name:
            found[int(name[1]), name[2] or "train"] = path
    return found


def read_completions(path: Path) -> list[dict[str, Any]]:
    """The rows of such a file."""
    import pyarrow.parquet as pq

    return pq.read_table(path).to_pylist()


def message_text(value: Any) -> str:
    """A text as it is; a conversation with the roles written out."""
    if isinstance(value, list) and value and all(isinstance(message, dict) for message in value):
        return "\n".join(f"{message.get('role', '?')}: {_content(message)}" for message in value)
    return value if isinstance(value, str) else str(value)


def _content(message: Mapping[str, Any]) -> str:
    content = message.get("content")
    if isinstance(content, list):  # typed blocks
        content = " ".join(block.get("text") or f"[{block.get('type')}]" for block in content)
    calls = message.get("tool_calls")
    return " ".join([str(content or ""), *([json.dumps(calls, default=str)] if calls else [])]).strip()
