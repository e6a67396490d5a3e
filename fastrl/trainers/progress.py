"""The progress of a run: one live panel on a terminal; elsewhere, and with `disable_tqdm`, one short line per log.

The panel is drawn when something has happened (a micro-batch, a step, a log), never by a thread of its own.
"""

from __future__ import annotations

import contextlib
import functools
import logging
import math
import re
import sys
import time
from collections import deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import psutil
import torch
from rich.console import Console, Group
from rich.live import Live
from rich.panel import Panel
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text
from transformers import (
    PrinterCallback,
    ProgressCallback,
    Trainer,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
)

from fastrl.trainers.metrics import MetricStore

# What a reader of the progress wants to see, in this order, of what the run logs; evaluations under "eval_<name>".
WATCHED = (
    "loss",
    "reward",
    "rewards/accuracies",
    "rewards/margins",
    "accuracy",
    "margin",
    "mean_token_accuracy",
    "kl",
    "entropy",
    "value_loss",
    "logps/chosen",
    "live_fraction",
    "completions/mean_length",
    "grad_norm",
)
_SUMMARY = ("train_loss", "train_runtime")  # of the last log
_BLOCKS = "▁▂▃▄▅▆▇█"
_SECONDS_BETWEEN_DRAWINGS = 0.1


class ProgressView(TrainerCallback):
    """Shows step, time left and the watched metrics of a run; in evaluation too. Only the main process shows anything.

    As a context manager it leaves the terminal as it was, however the block ends.

    Args:
        store: gives the trainer's `MetricStore`, whose values are shown before they are logged, or None.
        console: None: the standard output.
    """

    def __init__(
        self, store: Callable[[], MetricStore | None] = lambda: None, *, console: Console | None = None
    ) -> None:
        self._store = store
        self.console = console or Console()
        self._live: Live | None = None
        self._rerouted: list[tuple[logging.StreamHandler[Any], Any]] = []
        self._users = 0
        self._title = ""
        self._trends: dict[str, deque[float]] = {}
        self._stepwise: set[str] = set()  # metrics whose value of every step is known, not only their logged means
        self._training = False
        self._step = self._total = self._first_step = 0
        self._started = self._drawn = self._speed = 0.0
        self._evaluated = 0
        self._to_evaluate: int | None = None

    def __enter__(self) -> ProgressView:
        self._users += 1
        return self

    def __exit__(self, *_: object) -> None:
        self._users -= 1
        if not self._users:
            self._close()

    # Called by Trainer ----------------------------------------------------------------------------------------------

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Begins the panel, with the history of a resumed run."""
        if not state.is_world_process_zero:
            return
        self._training, self._started = True, time.perf_counter()
        self._step = self._first_step = state.global_step
        self._total = state.max_steps
        self._trends, self._stepwise = {}, set()
        for entry in state.log_history:
            self._follow(entry)
        self._open(args)

    def on_substep_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """A micro-batch is done."""
        self._draw()

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """An optimizer step is done: its metrics are shown, whether or not it is logged."""
        if not state.is_world_process_zero:
            return
        self._step = state.global_step
        store = self._store()
        latest = store.latest("train") if store is not None else {}
        self._stepwise |= latest.keys()
        self._follow(latest)
        self._draw(at_once=True)

    def on_prediction_step(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        eval_dataloader: Any = None,
        **kwargs: Any,
    ) -> None:
        """A batch of an evaluation is done."""
        if not state.is_world_process_zero:
            return
        try:
            self._to_evaluate = len(eval_dataloader)
        except TypeError:  # a stream
            self._to_evaluate = None
        self._evaluated += 1
        self._open(args)
        self._draw(at_once=self._evaluated == 1)

    def on_evaluate(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """An evaluation is done."""
        self._end_evaluation()

    def on_predict(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, metrics: Any, **kwargs: Any
    ) -> None:
        """A prediction is done."""
        self._end_evaluation()

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: Mapping[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        """Shows what of a log is watched; all of it goes to the loggers and to `trainer.state.log_history`."""
        if not state.is_world_process_zero or not logs:
            return
        self._step = state.global_step
        self._follow({name: value for name, value in logs.items() if name not in self._stepwise})
        if self._live is not None:
            self._draw(at_once=True)
        elif not self._can_draw(args) and (shown := self._shown(logs)):
            place = f"step {self._step}/{self._total} ({self._clock()})" if self._total else f"step {self._step}"
            with contextlib.suppress(OSError, ValueError):  # a full disk or a closed stream must not end the run
                print(f"{place}: {shown}", flush=True)

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Leaves the last state of the panel on the screen."""
        self._training = False
        self._close()
        self._total = 0  # an evaluation that follows is no part of the training

    # What is shown --------------------------------------------------------------------------------------------------

    def __rich__(self) -> Panel:
        parts: list[Any] = []
        if self._total:
            place = Text(f" {self._step}/{self._total}")
            parts.append(_bar(self._step, self._total, place.append(f"  {self._clock()}", style="dim")))
        if self._evaluated:
            place = Text(f" evaluation {self._evaluated}/{self._to_evaluate or '?'}", style="cyan")
            parts.append(_bar(self._evaluated, self._to_evaluate, place))
        rows = Table.grid(padding=(0, 2))
        rows.add_column()
        rows.add_column(justify="right")
        rows.add_column(overflow="crop", no_wrap=True)
        for name in _by_rank(self._trends)[: max(3, self.console.height - 8)]:
            values = list(self._trends[name])
            rows.add_row(
                Text(name, style="cyan" if name.startswith("eval") else ""),
                Text(f"{values[-1]:.4g}", style="bold"),
                Text(sparkline(values, 40), style="green"),
            )
        if rows.row_count:
            parts.append(rows)
        parts.append(Text(self._resources(), style="dim"))
        return Panel(Group(*parts), title=Text(self._title), title_align="left", border_style="blue", padding=(0, 1))

    def _shown(self, logs: Mapping[str, Any]) -> str:
        names = _by_rank(logs)
        names += [name for name in ("tokens_per_second", *_SUMMARY) if name in logs]
        return ", ".join(f"{name} {logs[name]:.4g}" for name in names if _is_number(logs[name]))

    def _clock(self) -> str:
        elapsed, done = time.perf_counter() - self._started, self._step - self._first_step
        left = "?" if not done else _duration(elapsed / done * (self._total - self._step))
        return f"{_duration(elapsed)} elapsed" + (f", {left} left" if self._step < self._total else "")

    def _resources(self) -> str:
        parts = []
        store, done = self._store(), self._step - self._first_step
        if store is not None and store.counts_tokens:
            self._speed = store.tokens_per_second()
        if self._speed:
            parts.append(f"{self._speed:.0f} tokens/s")
        if self._total and done:
            parts.append(f"{(time.perf_counter() - self._started) / done:.3g} s/step")
        if torch.cuda.is_available():
            parts.append(f"{torch.cuda.max_memory_allocated() / 2**30:.1f} GiB on the GPU at most")
        parts.append(f"{psutil.Process().memory_info().rss / 2**30:.1f} GiB")
        return " · ".join(parts)

    def _follow(self, metrics: Mapping[str, Any]) -> None:
        for name, value in metrics.items():
            if _rank(name) is not None and _is_number(value):
                self._trends.setdefault(name, deque(maxlen=4096)).append(float(value))

    # Drawing --------------------------------------------------------------------------------------------------------

    def _can_draw(self, args: TrainingArguments) -> bool:
        return self.console.is_terminal and not self.console.is_dumb_terminal and not args.disable_tqdm

    def _open(self, args: TrainingArguments) -> None:
        if self._live is None and self._can_draw(args):
            method = type(args).__name__.removesuffix("Config")
            self._title = f"{method}  {args.output_dir}"
            self._live = Live(self, console=self.console, auto_refresh=False)
            stream = sys.stderr
            self._live.start(refresh=True)
            self._rerouted = _reroute_logging(stream, sys.stderr)

    def _draw(self, at_once: bool = False) -> None:
        now = time.perf_counter()
        if self._live is not None and (at_once or now - self._drawn > _SECONDS_BETWEEN_DRAWINGS):
            self._drawn = now
            self._live.refresh()

    def _end_evaluation(self) -> None:
        self._evaluated = 0
        self._draw(at_once=True)
        if not self._training:
            self._close()

    def _close(self) -> None:
        live, self._live = self._live, None
        if live is not None:
            live.stop()
            for handler, stream in self._rerouted:
                handler.setStream(stream)


def _reroute_logging(old: Any, new: Any) -> list[tuple[logging.StreamHandler[Any], Any]]:
    """Lets loggers that hold the stream `old` write to `new`, above the panel; returns what to set back."""
    loggers = [logging.root, *(item for item in logging.root.manager.loggerDict.values() if hasattr(item, "handlers"))]
    handlers = [handler for logger in loggers for handler in logger.handlers]
    found = [item for item in handlers if isinstance(item, logging.StreamHandler) and item.stream is old]
    for handler in found if new is not old else ():
        handler.setStream(new)
    return [(handler, old) for handler in found]


def use_progress(trainer: Trainer) -> ProgressView:
    """Puts the view in the place of transformers' bar or printer; a notebook keeps its own table."""
    view = ProgressView(lambda: getattr(trainer, "metrics", None))
    for default in (ProgressCallback, PrinterCallback):
        if any(type(callback) is default for callback in trainer.callback_handler.callbacks):
            trainer.remove_callback(default)
            trainer.add_callback(view)
    return view


def sparkline(values: Sequence[float], width: int) -> str:
    """The course of `values` (finite) in at most `width` characters, each the mean of its share, lowest to highest."""
    count = min(width, len(values))
    shares = [values[len(values) * i // count : len(values) * (i + 1) // count] for i in range(count)]
    means = [sum(share) / len(share) for share in shares]
    low, high = min(means, default=0.0), max(means, default=0.0)
    scale = (len(_BLOCKS) - 1) / (high - low) if high > low else 0.0
    return "".join(_BLOCKS[round((mean - low) * scale)] for mean in means)


def _by_rank(names: Iterable[str]) -> list[str]:
    """The watched ones, those of evaluations last."""
    watched = [name for name in names if _rank(name) is not None]
    return sorted(watched, key=lambda name: (name.startswith("eval"), _rank(name)))


@functools.cache
def _rank(name: str) -> int | None:
    """The place of a metric among the watched ones; that of "eval_<data set>_<name>" is the name's."""
    base = name
    if name.startswith("eval_"):
        base = next((watched for watched in WATCHED if re.fullmatch(rf"eval_(.+_)?{re.escape(watched)}", name)), name)
    return WATCHED.index(base) if base in WATCHED else None


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and math.isfinite(value)


def _bar(done: int, total: int | None, label: Text) -> Table:
    row = Table.grid(expand=True)
    row.add_column(ratio=1)
    row.add_column(no_wrap=True)
    bar = ProgressBar(total=total, completed=done, pulse=total is None, complete_style="blue", finished_style="green")
    row.add_row(bar, label)
    return row


def _duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02d}:{rest:02d}"
