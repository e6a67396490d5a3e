"""Where a run starts: afresh, or at the newest complete checkpoint of an output folder; nothing is lost silently."""

from __future__ import annotations

import dataclasses
import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from fastrl.cli.errors import UserError

_CHECKPOINT = re.compile(r"(\.replaced-)?checkpoint-\d+")
_MODEL_FILES = ("config.json", "adapter_config.json")
# What of a checkpoint only a trainer reads.
_TRAINER_FILES = re.compile(r"(optimizer|scheduler|scaler|rng_state|(\d+_)?fastrl_|training_args).*")


@dataclasses.dataclass(frozen=True)
class Start:
    """How a run begins: `checkpoint` is None for a fresh one; `message` says it in a line."""

    checkpoint: Path | None
    message: str


def choose_start(
    output_dir: str | Path,
    check: Callable[[Path], Any],
    *,
    resume: bool,
    fresh: bool,
    checkpoint: str | None = None,
) -> Start:
    """Decide where a run in `output_dir` begins.

    Without `resume` and `fresh`, a folder that already holds a run is refused. `resume` takes the newest checkpoint
    that `check` does not refuse by a `CheckpointError`; `fresh` renames the folder to `<output_dir>.1` (or .2, ...)
    first. `checkpoint` names the one to continue from: one in this folder, or any where this folder holds no run.

    Raises:
        UserError: the folder holds a run and neither was asked for, both were, or the path is a file; no checkpoint of
            the folder can be continued from, or not the one that was named.
    """
    from fastrl.trainers.checkpoint_files import CheckpointError, newest_complete  # they import torch

    folder = Path(output_dir)
    if resume and fresh:
        raise UserError("--resume and --fresh exclude each other")
    if checkpoint is not None:
        if resume or fresh:
            raise UserError(f"--resume_from_checkpoint excludes --{'resume' if resume else 'fresh'}")
        if not Path(checkpoint).is_dir():
            raise UserError(f"resume_from_checkpoint: there is no folder {checkpoint}")
    if folder.exists() and not folder.is_dir():
        raise UserError(f"output_dir {folder} is a file")
    occupied = holds_run(folder)
    if checkpoint is not None and (not occupied or Path(checkpoint).resolve().parent == folder.resolve()):
        try:
            check(Path(checkpoint))
        except CheckpointError as error:
            raise UserError(f"resume_from_checkpoint: {error}") from error
        return Start(Path(checkpoint), f"resuming from {checkpoint}")
    if not occupied:
        note = f" (nothing to resume in {folder})" if resume else ""
        return Start(None, f"starting a new run in {folder}{note}")
    if fresh:
        return Start(None, f"starting a new run in {folder}; the earlier one is now {set_aside(folder)}")
    if not resume:
        raise UserError(
            f"output_dir {folder} already holds a run: continue it with --resume, start over with --fresh "
            "(keeps the earlier run under another name), or choose another --output_dir"
        )
    newest = newest_complete(folder, check)  # warns of each that it passes over
    if newest is None and (saved_step(folder) is not None or newest_complete(folder) is not None):
        raise UserError(
            f"output_dir {folder} holds a run but no complete checkpoint that this one can resume: start over with "
            "--fresh (keeps it under another name), or choose another --output_dir"
        )
    if newest is None:
        return Start(None, f"no complete checkpoint in {folder}: starting the run again from its first step")
    return Start(Path(newest), f"resuming from {newest}")


def set_aside(path: Path) -> Path:
    """Rename a file or folder to `<path>.1` (or .2, ...), and return that."""
    number = 1
    while (aside := path.with_name(f"{path.name}.{number}")).exists():
        number += 1
    return path.rename(aside)


def holds_run(folder: Path) -> bool:
    """Whether a folder holds a checkpoint, complete or not, or the result of a run."""
    if not folder.is_dir():
        return False
    return any(_CHECKPOINT.fullmatch(path.name) for path in folder.iterdir()) or saved_step(folder) is not None


def saved_step(folder: Path) -> int | None:
    """The optimizer step of the result, a model or an adapter, that a run saved here; None if there is none.

    The state is written last, so a result that is only half there does not count.
    """
    if not any((folder / name).exists() for name in _MODEL_FILES) or not (folder / "trainer_state.json").exists():
        return None
    return int(read_trainer_state(folder)["global_step"])


def read_trainer_state(folder: Path) -> dict[str, Any]:
    """The content of a folder's trainer_state.json: step, number of steps, and the history of the metrics.

    Raises:
        UserError: there is none, or it is not valid JSON.
    """
    path = folder / "trainer_state.json"
    try:
        state = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{path} can't be read: {error}") from error
    if not isinstance(state, dict) or "global_step" not in state:
        raise UserError(f"{path} is not the state of a run")
    return state


def complete_from_checkpoint(folder: Path, checkpoint: Path) -> None:
    """Put the last checkpoint's model into a run's folder, if the run was killed before it saved its result there."""
    if saved_step(folder) == read_trainer_state(checkpoint)["global_step"]:
        return
    folder.mkdir(parents=True, exist_ok=True)
    for path in sorted(checkpoint.iterdir(), key=lambda path: path.name == "trainer_state.json"):
        if path.is_file() and not _TRAINER_FILES.fullmatch(path.name):
            shutil.copyfile(path, folder / path.name)
