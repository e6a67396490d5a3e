"""Checkpoints that continue the same run: written whole or not at all, and read only if whole.

A checkpoint is made in a hidden directory and renamed into place, with a manifest that lists every file, its size and
its checksum, and says of which run it is. Whatever kills the process, older checkpoints stay as they are, and what was
being written is never taken for one. Nothing in a checkpoint is unpickled but with `weights_only=True`."""

import contextlib
import json
import math
import shutil
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from accelerate.utils import broadcast_object_list
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import Trainer
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, rotate_checkpoints

from fastrl.trainers.checkpoint_files import (
    CheckpointError,
    check_run,
    install,
    newest_complete,
    one_write_error,
    write_manifest,
)
from fastrl.trainers.metrics import MetricStore
from fastrl.trainers.progress import use_progress
from fastrl.trainers.run_record import RunRecord, use_patient_tensorboard

_STATE = "fastrl_state.json"
_TENSORS = "fastrl_state.safetensors"
_PARTIAL = ".partial-"  # being written


class ResumableTrainer(Trainer):
    """A `transformers.Trainer` with atomic checkpoints and exact resumption.

    A subclass that keeps state of its own between optimizer steps overrides `resume_state` and `load_resume_state`.
    `trainer.train(resume_from_checkpoint=True)` takes the newest complete checkpoint of this run in `output_dir`. A
    checkpoint of another run is refused: another trainer, model or number of processes, and, unless
    `ignore_data_skip=True` says that the place among the data does not matter, other data, seeds or batches.

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
        use_patient_tensorboard(self)

    def resume_state(self) -> tuple[dict[str, Any], dict[str, Tensor]]:
        """What must survive besides model, optimizer, scheduler and random state: JSON and tensors."""
        return {}, {}

    def load_resume_state(self, state: dict[str, Any], tensors: dict[str, Tensor]) -> None:
        """Takes back what `resume_state` gave."""

    def geometry(self) -> dict[str, Any]:
        """How rows become optimizer steps, by the names of the arguments that say it."""
        sizes = (self.args.per_device_train_batch_size, self.args.gradient_accumulation_steps, self.args.world_size)
        return {"rows in an optimizer step": math.prod(sizes)}

    def _identity(self) -> dict[str, dict[str, Any]]:
        """What a checkpoint and the trainer that continues from it have in common."""
        shapes = [(name, tuple(parameter.shape)) for name, parameter in self.model.named_parameters()]  # type: ignore[union-attr]
        weights = sum(math.prod(shape) for _, shape in shapes)
        names = zlib.crc32(repr(shapes).encode())
        return {
            "run": {
                "trainer": type(self).__name__,
                "model": f"{weights} weights in {len(shapes)} tensors ({names:08x})",
                "processes": self.args.world_size,
            },
            "data": {
                "rows of train_dataset": len(self.train_dataset),  # type: ignore[arg-type]
                "seed": self.args.seed,
                "data_seed": self.args.data_seed,
                **self.geometry(),
            },
        }

    # Resuming

    def train(self, resume_from_checkpoint: str | bool | None = None, *args: Any, **kwargs: Any) -> Any:
        """See `transformers.Trainer.train`.

        Raises:
            ValueError: there is no complete checkpoint of this run where one was asked for.
            CheckpointWriteError: see there.
        """
        self._written_in = self._identity()  # now: DDP and FSDP wrap the model later on
        checkpoint = self._start(resume_from_checkpoint) if resume_from_checkpoint else None
        with self.progress:
            return super().train(checkpoint, *args, **kwargs)

    def _start(self, asked: str | bool) -> str:
        """The checkpoint to continue from. One process reads it to check it; all raise what it finds."""
        found: list[str | CheckpointError | None] = [None]
        if self.is_world_process_zero():
            try:
                if asked is True:
                    found = [newest_complete(self.args.output_dir, self._check)]  # type: ignore[arg-type]
                else:
                    self._check(Path(str(asked)))
                    found = [str(asked)]
            except CheckpointError as error:
                found = [error]
        (checkpoint,) = broadcast_object_list(found)
        if isinstance(checkpoint, CheckpointError):
            raise checkpoint
        if checkpoint is None:
            raise ValueError(
                f"resume_from_checkpoint: no complete checkpoint in {self.args.output_dir} that this run can "
                "continue from; start it anew, or in another output_dir"
            )
        if not self.is_world_process_zero():
            self._check(Path(checkpoint), checksums=False)
        return str(checkpoint)

    def _check(self, checkpoint: Path, checksums: bool = True) -> None:
        own = self._identity()
        data = {} if self.args.ignore_data_skip else own["data"]
        check_run(checkpoint, own["run"], data, checksums=checksums)

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
                write_manifest(staging / name, self._written_in)
                install(staging / name, run_dir / name)
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
        step = self.state.global_step
        what, kept = f"The checkpoint of step {step} in {staging.parent}", "The checkpoints before it are as they were"
        way = "go on with resume_from_checkpoint=True, on the command line --resume"
        try:
            with one_write_error(what, kept, way):
                yield
        except BaseException:
            shutil.rmtree(staging, ignore_errors=True)  # of no use, and the disk may be full
            raise
        finally:
            self._staging, self.args.push_to_hub = None, push

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """See `transformers.Trainer.save_model`.

        Raises:
            CheckpointWriteError: see there.
        """
        what, kept = f"The model in {output_dir or self.args.output_dir}", "The checkpoints are as they were"
        way = "save it again, or to another folder"
        with contextlib.nullcontext() if self._staging else one_write_error(what, kept, way):
            super().save_model(output_dir, _internal_call)

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
