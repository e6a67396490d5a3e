"""Checkpoints that continue the same run: written whole or not at all, and read only if whole.

A checkpoint is made in a hidden directory and renamed into place, with a manifest that lists every file and its size.
Whatever kills the process, older checkpoints stay as they are, and what was being written is never taken for one."""

import contextlib
import json
import os
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import Trainer
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, rotate_checkpoints
from transformers.utils import logging

from fastrl.trainers.metrics import MetricStore
from fastrl.trainers.progress import use_progress
from fastrl.trainers.run_record import RunRecord

logger = logging.get_logger(__name__)

MANIFEST = "fastrl_manifest.json"
_STATE = "fastrl_state.json"
_TENSORS = "fastrl_state.safetensors"
_PARTIAL = ".partial-"  # being written
_REPLACED = ".replaced-"  # a checkpoint of the same step, moved aside until its successor is in place


class IncompleteCheckpointError(ValueError):
    """A directory that is not a whole checkpoint of fastrl."""


def check_complete(checkpoint: str | os.PathLike[str]) -> None:
    """Raises `IncompleteCheckpointError` unless every file of the checkpoint is there in its full size."""
    directory = Path(checkpoint)
    manifest = directory / MANIFEST
    if not manifest.is_file():
        raise IncompleteCheckpointError(f"{directory} is not a complete checkpoint: it has no {MANIFEST}")
    files = json.loads(manifest.read_text())["files"]
    for name, size in files.items():
        path = directory / name
        if not path.is_file() or path.stat().st_size != size:
            state = f"has {path.stat().st_size} bytes instead of {size}" if path.is_file() else "is missing"
            raise IncompleteCheckpointError(f"{directory} is not a complete checkpoint: {name} {state}")


def newest_complete(output_dir: str | os.PathLike[str]) -> str | None:
    """The complete checkpoint of the highest step, or None. Partial ones are passed over with a warning."""
    root = Path(output_dir)
    if not root.is_dir():
        return None
    for aside in root.glob(f"{_REPLACED}{PREFIX_CHECKPOINT_DIR}-*"):  # killed between the two renames of `_install`
        place = root / aside.name.removeprefix(_REPLACED)
        if not place.exists():
            os.rename(aside, place)
    found = []
    for path in root.iterdir():
        step = re.fullmatch(rf"{PREFIX_CHECKPOINT_DIR}-(\d+)", path.name)
        if step and path.is_dir():
            found.append((int(step[1]), path))
    for _, path in sorted(found, reverse=True):
        try:
            check_complete(path)
        except IncompleteCheckpointError as error:
            logger.warning(f"Passed over: {error}")
            continue
        return str(path)
    return None


class ResumableTrainer(Trainer):
    """A `transformers.Trainer` with atomic checkpoints and exact resumption.

    A subclass that keeps state of its own between optimizer steps overrides `resume_state` and `load_resume_state`.
    `trainer.train(resume_from_checkpoint=True)` takes the newest complete checkpoint of `output_dir`.

    What transformers would lose between two logs (the running loss) is saved too, so that the metrics logged after
    resuming are those of the uninterrupted run.

    Metrics that a subclass adds to `metrics` are shown in the progress view (`fastrl.trainers.progress`) step by step.
    """

    _staging: str | None = None
    _resumed_log_state: dict[str, Any] | None = None

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.metrics = MetricStore()
        self.progress = use_progress(self)
        self.record = RunRecord()
        self.add_callback(self.record)

    def resume_state(self) -> tuple[dict[str, Any], dict[str, Tensor]]:
        """What must survive besides model, optimizer, scheduler and random state: JSON and tensors."""
        return {}, {}

    def load_resume_state(self, state: dict[str, Any], tensors: dict[str, Tensor]) -> None:
        """Takes back what `resume_state` gave."""

    # Resuming

    def train(self, resume_from_checkpoint: str | bool | None = None, *args: Any, **kwargs: Any) -> Any:
        """See `transformers.Trainer.train`.

        Raises:
            ValueError: there is no complete checkpoint where one was asked for.
        """
        if resume_from_checkpoint is True:
            resume_from_checkpoint = newest_complete(self.args.output_dir)  # type: ignore[arg-type]
            if resume_from_checkpoint is None:
                raise ValueError(f"resume_from_checkpoint: no complete checkpoint in {self.args.output_dir}")
        elif resume_from_checkpoint:
            check_complete(resume_from_checkpoint)
        with self.progress:
            return super().train(resume_from_checkpoint or None, *args, **kwargs)

    def evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        """See `transformers.Trainer.evaluate`."""
        with self.progress:
            return super().evaluate(*args, **kwargs)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        super()._load_optimizer_and_scheduler(checkpoint)
        if checkpoint is None:
            return
        suffix = self._process_suffix()
        saved = json.loads(Path(checkpoint, suffix + _STATE).read_text())
        tensors_file = Path(checkpoint, suffix + _TENSORS)
        tensors = load_file(tensors_file, device=str(self.args.device)) if tensors_file.is_file() else {}
        self._resumed_log_state = saved["log"]
        self.load_resume_state(saved["trainer"], tensors)

    def _run_epoch(self, model: nn.Module, epoch: int, *args: Any, **kwargs: Any) -> None:
        if self._resumed_log_state is not None:  # Trainer resets these after it has loaded the checkpoint
            self._tr_loss += self._resumed_log_state["loss"]
            self._globalstep_last_logged = self._resumed_log_state["step"]
            self._resumed_log_state = None
        super()._run_epoch(model, epoch, *args, **kwargs)

    # Saving

    def _get_output_dir(self, trial: Any) -> str:
        return super()._get_output_dir(trial) if self._staging is None else self._staging

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        run_dir = Path(self._get_output_dir(trial))
        name = f"{PREFIX_CHECKPOINT_DIR}-{self.state.global_step}"
        staging = run_dir / f"{_PARTIAL}{name}"
        if self.args.should_save:
            for leftover in run_dir.glob(f"{_PARTIAL}*"):
                shutil.rmtree(leftover)
        self.accelerator.wait_for_everyone()
        with self._staged(staging):
            super()._save_checkpoint(model, trial)
            self._save_resume_state(staging / name)
            self.accelerator.wait_for_everyone()
            if self.args.should_save:
                self._repair_best_checkpoint(staging, run_dir)
                _write_manifest(staging / name)
                _install(staging / name, run_dir / name)
                staging.rmdir()
        self.accelerator.wait_for_everyone()
        if self.args.push_to_hub:
            self._push_from_checkpoint(str(run_dir / name))
        if self.args.should_save:
            rotate_checkpoints(
                output_dir=str(run_dir),
                save_total_limit=self.args.save_total_limit,
                best_model_checkpoint=self.state.best_model_checkpoint,
                use_mtime=True,
            )

    @contextlib.contextmanager
    def _staged(self, staging: Path) -> Iterator[None]:
        # Trainer writes, pushes and rotates in one method: it must see the staging directory only while it writes.
        push = self.args.push_to_hub
        self._staging, self.args.push_to_hub = str(staging), False
        try:
            yield
        finally:
            self._staging, self.args.push_to_hub = None, push

    def _save_resume_state(self, directory: Path) -> None:
        state, tensors = self.resume_state()
        log = {"loss": self._tr_loss.item(), "step": self._globalstep_last_logged}
        suffix = self._process_suffix()
        directory.mkdir(parents=True, exist_ok=True)
        Path(directory, suffix + _STATE).write_text(json.dumps({"trainer": state, "log": log}))
        if tensors:
            save_file(
                {name: t.detach().contiguous().cpu() for name, t in tensors.items()}, directory / (suffix + _TENSORS)
            )

    def _process_suffix(self) -> str:
        return "" if self.args.world_size == 1 else f"{self.args.process_index}_"

    def _repair_best_checkpoint(self, staging: Path, run_dir: Path) -> None:
        best = self.state.best_model_checkpoint
        if best is not None and Path(best).parent == staging:
            self.state.best_model_checkpoint = str(run_dir / Path(best).name)
            name = f"{PREFIX_CHECKPOINT_DIR}-{self.state.global_step}"
            self.state.save_to_json(str(staging / name / TRAINER_STATE_NAME))


def _write_manifest(directory: Path) -> None:
    files = {str(p.relative_to(directory)): p.stat().st_size for p in sorted(directory.rglob("*")) if p.is_file()}
    for name in files:
        _sync(directory / name)
    manifest = directory / MANIFEST
    manifest.write_text(json.dumps({"torch": torch.__version__, "files": files}, indent=1))
    _sync(manifest)
    _sync(directory)


def _install(source: Path, place: Path) -> None:
    aside = place.with_name(_REPLACED + place.name)
    if aside.exists():
        shutil.rmtree(aside)
    if place.exists():  # the run was started anew in the directory of an older one
        os.rename(place, aside)
    os.rename(source, place)
    _sync(place.parent)
    if aside.exists():
        shutil.rmtree(aside)


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
