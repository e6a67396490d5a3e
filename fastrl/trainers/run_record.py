"""What a run is and what it logged, kept beside its checkpoints: `run.json` and `metrics.jsonl` in `output_dir`.

trainer_state.json has the history too, but only in checkpoints, so a killed run would lose what came after the last.
"""

from __future__ import annotations

import dataclasses
import json
import math
import os
import re
import shlex
import sys
import time
from collections.abc import Callable
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.integrations import TensorBoardCallback
from transformers.utils import logging

from fastrl.benchmark.machine import device_name, versions
from fastrl.run_files import METRICS_FILE, RUN_FILE, read_json, read_metrics

_PACKAGES = ("torch", "transformers", "accelerate", "datasets", "peft", "numpy", "triton", "vllm")

logger = logging.get_logger(__name__)


class RunRecord(TrainerCallback):
    """Writes `run.json` when training begins and a line of `metrics.jsonl` per log; only the main process does.

    A line is the log with "step" and "seconds" (of training, over all resumptions); NaN and infinity become null. A
    resumed run drops the lines that came after its checkpoint. What can't be written costs the record, not the run.

    Attributes:
        settings: what a script was told besides the trainer's arguments (data set, rewards); kept in `run.json`.
    """

    def __init__(self) -> None:
        self.settings: dict[str, Any] = {}
        self._early: list[dict[str, Any]] = []  # logged before training began
        self._path: Path | None = None
        self._started = self._seconds_before = 0.0

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, model: Any = None, **kwargs: Any
    ) -> None:
        """Begins the record, or takes it up at the step of a resumed run."""
        if not state.is_world_process_zero:
            return
        folder = Path(str(args.output_dir))
        self._path, self._started = folder / METRICS_FILE, time.perf_counter()
        lines, starts = self._early, []
        if state.global_step > 0:
            lines = [line for line in read_metrics(folder) or state.log_history if line["step"] <= state.global_step]
            starts = read_json(folder / RUN_FILE).get("starts", [])
        self._early = []
        self._seconds_before = max((line.get("seconds") or 0.0 for line in lines), default=0.0)
        try:
            folder.mkdir(parents=True, exist_ok=True)
            _replace(folder / RUN_FILE, json.dumps(self._facts(args, state, model, starts), indent=1, default=str))
            _replace(self._path, "".join(_line(entry) for entry in lines))
        except OSError as error:
            self._give_up(error)

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        """Adds a line."""
        if not state.is_world_process_zero or not logs:
            return
        if not self._started:
            self._early.append({**logs, "step": state.global_step})
        elif self._path is not None:
            seconds = round(self._seconds_before + time.perf_counter() - self._started, 3)
            try:
                with self._path.open("a", encoding="utf-8") as file:
                    file.write(_line({**logs, "step": state.global_step, "seconds": seconds}))
            except OSError as error:
                self._give_up(error)

    def _facts(
        self, args: TrainingArguments, state: TrainerState, model: Any, starts: list[dict[str, Any]]
    ) -> dict[str, Any]:
        start = {
            "time": datetime.now(timezone.utc).isoformat(timespec="seconds"),
            "step": state.global_step,
            "command": _command(sys.argv),
            "folder": os.getcwd(),
        }
        return {
            "method": type(args).__name__.removesuffix("Config"),
            "model": getattr(getattr(model, "config", None), "_name_or_path", None) or type(model).__name__,
            "parameters": sum(p.numel() for p in model.parameters()) if model is not None else None,
            "trainable": sum(p.numel() for p in model.parameters() if p.requires_grad) if model is not None else None,
            "max_steps": state.max_steps,
            "device": device_name(args.device),
            "processes": args.world_size,
            "versions": versions(_PACKAGES),
            "settings": self.settings,
            "changed": _changed(args),
            "arguments": args.to_dict(),  # with tokens masked
            "starts": [*starts, start],
        }

    def _give_up(self, error: OSError) -> None:
        logger.warning(f"{self._path} is no longer kept: {error}")
        self._path = None


class PatientTensorBoard(TensorBoardCallback):
    """TensorBoard's callback, in which what can't be written costs the rest of its log, not the run."""

    def on_train_begin(self, *args: Any, **kwargs: Any) -> None:
        """Begins the log."""
        self._attempt(super().on_train_begin, *args, **kwargs)

    def on_log(self, *args: Any, **kwargs: Any) -> None:
        """Adds to it."""
        self._attempt(super().on_log, *args, **kwargs)

    def on_train_end(self, *args: Any, **kwargs: Any) -> None:
        """Closes it."""
        self._attempt(super().on_train_end, *args, **kwargs)

    def _attempt(self, event: Callable[..., None], *args: Any, **kwargs: Any) -> None:
        try:
            event(*args, **kwargs)
        except OSError as error:
            logger.warning(f"The log of TensorBoard is no longer kept: {error}. Training goes on.")
            self.tb_writer = self._SummaryWriter = None


def use_patient_tensorboard(trainer: Trainer) -> None:
    """Puts `PatientTensorBoard` in the place of transformers' own."""
    for callback in list(trainer.callback_handler.callbacks):
        if type(callback) is TensorBoardCallback:
            trainer.remove_callback(callback)
            trainer.add_callback(PatientTensorBoard(callback.tb_writer))


def _line(entry: dict[str, Any]) -> str:
    finite = {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in entry.items()}
    return json.dumps(finite, default=str) + "\n"


def _changed(args: TrainingArguments) -> list[str]:
    """The arguments that differ from their defaults, but for what an unset one becomes when nothing is asked of it."""
    names = []
    for field in dataclasses.fields(args):
        factory = field.default_factory
        default = field.default if factory is dataclasses.MISSING else factory()
        value = getattr(args, field.name)
        unset = default in (None, "", "none") and value in (None, False, [], "")
        if field.name != "accelerator_config" and value != default and not unset:
            names.append(field.name)
    return names


def _command(argv: list[str]) -> str:
    words = ["fastrl" if Path(argv[0]).name == "fastrl" else argv[0], *argv[1:]]
    return re.sub(r"(--\S*token[ =])\S+", r"\1...", shlex.join(words))


def _replace(path: Path, text: str) -> None:
    partial = path.with_name(f".{path.name}.partial")
    partial.write_text(text, encoding="utf-8")
    os.replace(partial, path)
