"""What the policy wrote, beside its rewards: on the terminal, as a parquet file per log, as tables of W&B and trackio.

The options, columns and file names are those of TRL's `log_completions`.
"""

from __future__ import annotations

import importlib
import json
import math
import os
import random
import re
from collections import defaultdict, deque
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from accelerate.utils import gather_object
from rich.console import Console
from rich.table import Table
from rich.text import Text
from transformers.utils import logging

from fastrl.run_files import COMPLETIONS_FOLDER, message_text

logger = logging.get_logger(__name__)


class CompletionLog:
    """Keeps the latest completions until they are logged. Every process calls `add`, with its own share.

    A log writes `completions/completions_<step>.parquet` in `output_dir` (an evaluation's: `..._<step>_<mode>.parquet`)
    with the columns step, prompt, completion, one per reward function, one per extra column, advantage. Logging a step
    again overwrites its file; the first log of training removes the files of later steps, which a killed or an earlier
    run has left. A reward or an advantage that is NaN is null. What can't be written costs the file, not the run.

    Args:
        output_dir: of the run.
        size: completions kept per mode, the latest ones: those of one rollout (TRL: `generation_batch_size`).
        num_to_print: how many to show, drawn at random; None: all (TRL: `num_completions_to_print`).
        unique_prompts: give loggers one completion per prompt (TRL: `log_unique_prompts`).
        report_to: the run's loggers; "wandb" and "trackio" get a table, under "completions" or "<mode>_completions".
        main_process: whether this process writes and prints.
        console: where the table goes; None: the standard output.
    """

    def __init__(
        self,
        output_dir: str | os.PathLike[str],
        *,
        size: int,
        num_to_print: int | None = None,
        unique_prompts: bool = False,
        report_to: Sequence[str] = (),
        main_process: bool = True,
        console: Console | None = None,
    ) -> None:
        self.folder = Path(output_dir) / COMPLETIONS_FOLDER
        self.num_to_print = num_to_print
        self.unique_prompts = unique_prompts
        self.report_to = report_to
        self.main_process = main_process
        self.console = console or Console()
        self._rows: dict[str, deque[dict[str, Any]]] = defaultdict(lambda: deque(maxlen=size))
        self._fresh: set[str] = set()  # modes with rows that have not been logged
        self._cleaned = self._failed = False

    def add(
        self,
        mode: str,
        prompts: Sequence[Any],
        completions: Sequence[Any],
        rewards: Mapping[str, Sequence[float | None]] | None = None,
        advantages: Sequence[float] | None = None,
        extra: Mapping[str, Sequence[Any]] | None = None,
    ) -> None:
        """Takes B completions, texts or conversations, with B values in each column; gathered over the processes.

        Args:
            mode: "train" or an evaluation's prefix.
            prompts, completions: (B,)
            rewards: by name of the reward function; None or NaN: it gave none.
            advantages: (B,); None where the method has none.
            extra: more columns.
        """
        columns: dict[str, Sequence[Any]] = {"prompt": prompts, "completion": completions, **(rewards or {})}
        columns.update(extra or {})
        if advantages is not None:
            columns["advantage"] = advantages
        rows = [dict(zip(columns, values, strict=True)) for values in zip(*columns.values(), strict=True)]
        self._rows[mode].extend(gather_object(rows))
        self._fresh.add(mode)

    def flush(self, step: int, mode: str = "train") -> Path | None:
        """Shows and writes what `add` has got since the last flush of this mode; the file, or None if there is none."""
        if mode not in self._fresh or not self.main_process:
            return None
        self._fresh.discard(mode)
        names = dict.fromkeys(name for row in self._rows[mode] for name in row)
        rows = [{"step": step, **{name: _null(row.get(name)) for name in names}} for row in self._rows[mode]]
        if not rows:
            return None
        self._print(rows, step, mode)
        suffix = "" if mode == "train" else "_" + re.sub(r"\W+", "-", mode)
        path = self.folder / f"completions_{step:05d}{suffix}.parquet"
        try:
            self._remove_later(step, mode)
            _write(path, rows)
        except OSError as error:
            if not self._failed:
                logger.warning(
                    f"Completions could not be written, at step {step} for the first time: {error}. Training goes on; "
                    "make room in output_dir for those of later steps."
                )
            self._failed = True
            return None
        self._report(rows, "completions" if mode == "train" else f"{mode}_completions")
        return path

    def _remove_later(self, step: int, mode: str) -> None:
        if mode != "train" or self._cleaned:
            return
        self._cleaned = True
        for path in self.folder.glob("completions_*.parquet"):
            found = re.match(r"completions_(\d+)", path.name)
            if found and int(found[1]) > step:
                path.unlink()

    def _print(self, rows: list[dict[str, Any]], step: int, mode: str) -> None:
        if self.num_to_print is not None and self.num_to_print < len(rows):
            rows = random.Random(step).sample(rows, max(self.num_to_print, 0))
        if not rows:
            return
        title = f"Step {step}" if mode == "train" else f"Step {step}, {mode}"
        table = Table(title=title, title_style="bold", expand=True, show_lines=True)
        for name in rows[0]:
            if name in ("prompt", "completion"):
                table.add_column(name, style="yellow" if name == "prompt" else "green", overflow="fold", ratio=1)
            elif name != "step":
                table.add_column(name, style="magenta" if name == "advantage" else "cyan", justify="right")
        for row in rows:
            table.add_row(*(_cell(value) for name, value in row.items() if name != "step"))
        self.console.print(table)

    def _report(self, rows: list[dict[str, Any]], name: str) -> None:
        if self.unique_prompts:
            rows = list({str(row["prompt"]): row for row in reversed(rows)}.values())[::-1]
        backends = [backend for backend in ("wandb", "trackio") if backend in self.report_to]
        if not backends:
            return
        import pandas as pd

        for backend in backends:
            try:
                module: Any = importlib.import_module(backend)
            except ImportError:  # Trainer has refused such a run, unless its loggers were given as callbacks
                continue
            if backend == "wandb" and module.run is None:
                continue
            module.log({name: module.Table(dataframe=pd.DataFrame(rows))})


def _cell(value: Any) -> Text:
    if value is None:
        return Text("-", style="dim")
    return Text(f"{value:.2f}" if isinstance(value, float) else message_text(value))


def _null(value: Any) -> Any:
    return None if isinstance(value, float) and math.isnan(value) else value


def _write(path: Path, rows: list[dict[str, Any]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    columns = {}
    for name in rows[0]:
        values = [row[name] for row in rows]
        try:
            columns[name] = pa.array(values)
        except (pa.ArrowInvalid, pa.ArrowTypeError):  # tool calls with arguments of their own kind each
            columns[name] = pa.array([json.dumps(value, default=str) for value in values])
    partial = path.with_name(f".{path.name}.partial")
    try:
        pq.write_table(pa.table(columns), partial)
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)
