"""What a run does where it can't go on as it should: a full disk, checkpoints that are damaged or of another run,
evaluation sets without rows. What was written stays, and the message says what to do."""

from __future__ import annotations

import io
import json
import os
import pickle
import re
import resource
import shutil
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from dpo_runs import PAIRS, dpo_trainer
from killable_runs import RUNS
from reward_runs import OUTCOMES, RANKED, STEPWISE
from rich.console import Console
from safetensors import SafetensorError
from sft_runs import sft_trainer
from tiny_runs import make_tokenizer, tiny_model
from transformers import TrainerCallback

from fastrl.trainers import checkpointing
from fastrl.trainers.checkpoint_files import (
    MANIFEST,
    CheckpointWriteError,
    ForeignCheckpointError,
    IncompleteCheckpointError,
    newest_complete,
)
from fastrl.trainers.run_record import METRICS_FILE, RUN_FILE

RECORD = {RUN_FILE, METRICS_FILE}


class FillsTheDisk(TrainerCallback):
    """From step 2 on no file can be larger than one of the first checkpoint was, less a byte."""

    def __init__(self, file: str) -> None:
        self.file = file

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Called by Trainer."""
        if state.global_step == 2:
            (largest,) = Path(args.output_dir).glob(f"checkpoint-1/{self.file}")
            resource.setrlimit(resource.RLIMIT_FSIZE, (largest.stat().st_size - 1, resource.RLIM_INFINITY))


@pytest.fixture
def limited() -> Iterator[None]:
    """Takes the limit away again."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.mark.parametrize("name", RUNS)
def test_a_checkpoint_that_does_not_fit_costs_no_other(limited: None, tmp_path: Path, name: str) -> None:
    largest = {"dpo_mixed_lora": "adapter_model.safetensors", "kto": "model.safetensors"}.get(name, "optimizer.pt")
    trainer = RUNS[name](tmp_path, {"callbacks": [FillsTheDisk(largest)]})
    screen, trainer.args.disable_tqdm = io.StringIO(), False
    trainer.progress.console = Console(file=screen, force_terminal=True)
    with pytest.raises(CheckpointWriteError, match=r"The checkpoint of step 2 in .* resume_from_checkpoint=True"):
        trainer.train()
    run = Path(trainer.args.output_dir)
    assert {path.name for path in run.iterdir()} == {"checkpoint-1", *RECORD}
    assert newest_complete(run) == str(run / "checkpoint-1")
    assert screen.getvalue().rstrip().endswith("\x1b[?25h")  # the cursor is back


def test_a_model_that_does_not_fit(limited: None, tmp_path: Path) -> None:
    trainer = sft_trainer(tmp_path, max_steps=1)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, resource.RLIM_INFINITY))
    with pytest.raises(CheckpointWriteError, match=r"The model in .*: make room .*, then save it again, or"):
        trainer.save_model(str(tmp_path / "model"))


@pytest.mark.parametrize(
    ("error", "cure"),
    [
        (OSError(28, "No space left on device"), "make room .*"),
        (OSError(122, "Disk quota exceeded"), "make room .*"),
        (PermissionError(13, "Permission denied", "optimizer.pt"), "mend that"),
        (SafetensorError("I/O error: Read-only file system (os error 30)"), "mend that"),
        (ConnectionError("the hub is away"), None),
    ],
    ids=lambda value: str(value)[:20],
)
def test_what_is_advised_depends_on_what_the_disk_says(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: Exception, cure: str | None
) -> None:
    trainer = sft_trainer(tmp_path, max_steps=2, save_steps=1)

    def fails(*args: Any) -> None:
        if trainer.state.global_step == 2:
            raise error

    monkeypatch.setattr(trainer, "_save_optimizer_and_scheduler", fails)
    reason = re.escape(str(error))
    message = rf"step 2 in .* could not be written: {reason}\. .* as they were: {cure}, then go on with resume_from"
    with pytest.raises(CheckpointWriteError if cure else type(error), match=message if cure else f"^{reason}$"):
        trainer.train()
    assert {path.name for path in tmp_path.iterdir()} == {"checkpoint-1", *RECORD}


def test_a_log_of_tensorboard_that_can_no_longer_be_written_ends_there(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TENSORBOARD_LOGGING_DIR", str(tmp_path / "logs"))

    def full(self: Any, name: str, value: float, step: int) -> None:
        if step == 2:
            raise OSError(28, "No space left on device")

    monkeypatch.setattr("torch.utils.tensorboard.SummaryWriter.add_scalar", full)
    trainer = sft_trainer(tmp_path, max_steps=4, report_to="tensorboard")
    trainer.train()
    assert trainer.state.global_step == 4
    assert caplog.text.count("log of TensorBoard is no longer kept: [Errno 28] No space left on device") == 1


# Checkpoints that a run does not continue from


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of an SFT run with three checkpoints."""
    folder = tmp_path_factory.mktemp("saved")
    sft_trainer(folder, max_steps=3, save_steps=1).train()
    return folder


def resume(folder: Path, checkpoint: str | None = None, **settings: Any) -> Any:
    trainer = sft_trainer(folder, **{"max_steps": 4, "save_steps": 9, **settings})
    trainer.train(resume_from_checkpoint=str(folder / checkpoint) if checkpoint else True)
    return trainer


@pytest.mark.parametrize(
    "file", ["model.safetensors", "optimizer.pt", "rng_state.pth", "trainer_state.json", "fastrl_state.json", MANIFEST]
)
def test_a_byte_that_has_changed_is_noticed(
    saved: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture, file: str
) -> None:
    run = shutil.copytree(saved, tmp_path / "run")
    damaged = run / "checkpoint-3" / file
    content = bytearray(damaged.read_bytes())
    content[len(content) // 2] ^= 0x80  # no longer UTF-8, where it is text
    damaged.write_bytes(content)
    reason = f"{MANIFEST} can't be read" if file == MANIFEST else f"{file} has changed since it was written"
    with pytest.raises(IncompleteCheckpointError, match=rf"checkpoint-3 is not a complete checkpoint: {reason}"):
        resume(run, "checkpoint-3")
    trainer = resume(run)
    assert f"Passed over: {run}/checkpoint-3 is not a complete checkpoint: {reason}" in caplog.text
    assert trainer.state.log_history[1]["step"] == 2 and trainer.state.global_step == 4


def test_one_process_reads_a_checkpoint_for_all(saved: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = shutil.copytree(saved, tmp_path / "run")
    told: list[Any] = [str(run / "checkpoint-3")]
    monkeypatch.setattr(checkpointing, "broadcast_object_list", lambda found: told if found == [None] else found)
    trainer = sft_trainer(run, max_steps=4)
    (run / "checkpoint-3" / "optimizer.pt").write_bytes(bytes((run / "checkpoint-3" / "optimizer.pt").stat().st_size))
    with pytest.raises(IncompleteCheckpointError, match=r"optimizer\.pt has changed since it was written"):
        trainer._start(told[0])
    monkeypatch.setattr(trainer, "is_world_process_zero", lambda: False)
    assert trainer._start(True) == told[0]
    (run / "checkpoint-3" / "optimizer.pt").write_bytes(b"")
    with pytest.raises(IncompleteCheckpointError, match=r"optimizer\.pt has 0 bytes instead of"):
        trainer._start(True)
    told[0] = ForeignCheckpointError("of another run")
    with pytest.raises(ForeignCheckpointError, match="of another run"):
        trainer._start(True)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"seed": 7}, r"seed: 42 there, 7 here"),
        ({"data_seed": 7}, r"data_seed: None there, 7 here"),
        ({"per_device_train_batch_size": 2}, r"rows in an optimizer step: 4 there, 2 here"),
        ({"trainer": {"train_dataset": [{"text": "a b"}] * 8}}, r"rows of train_dataset: 12 there, 8 here"),
    ],
)
def test_a_checkpoint_of_other_data_is_refused_unless_that_is_meant(
    saved: Path, tmp_path: Path, settings: dict[str, Any], message: str
) -> None:
    run = shutil.copytree(saved, tmp_path / "run")
    with pytest.raises(
        ForeignCheckpointError, match=rf"checkpoint-3 is of another run \({message}\): .*ignore_data_skip"
    ):
        resume(run, "checkpoint-3", **settings)
    with pytest.raises(ValueError, match=r"no complete checkpoint in .* that this run can continue from"):
        resume(run, **settings)
    assert resume(run, ignore_data_skip=True, **settings).state.global_step == 4


def test_the_same_step_of_other_micro_batches_is_no_other_run(saved: Path, tmp_path: Path) -> None:
    run = shutil.copytree(saved, tmp_path / "run")
    resume(run, per_device_train_batch_size=2, gradient_accumulation_steps=2, learning_rate=1e-3)


def test_a_checkpoint_of_another_model_or_trainer_is_passed_over(
    saved: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    run = shutil.copytree(saved, tmp_path / "run")
    other = {"max_steps": 3, "save_strategy": "steps", "save_steps": 3}
    dpo_trainer(tmp_path / "dpo", **other).train()
    shutil.copytree(tmp_path / "dpo" / "run" / "checkpoint-3", run / "checkpoint-8")
    wide = dpo_trainer(tmp_path / "wide", trainer={"model": tiny_model(intermediate_size=64)}, **other)
    wide.train()
    shutil.copytree(tmp_path / "wide" / "run" / "checkpoint-3", run / "checkpoint-9")
    trainer = resume(run)
    assert trainer.state.log_history[2]["step"] == 3 and trainer.state.global_step == 4
    assert "checkpoint-8 is of another run (trainer: DPOTrainer there, SFTTrainer here)" in caplog.text
    assert "checkpoint-9 is of another run (trainer: DPOTrainer there, SFTTrainer here; model: " in caplog.text


class Runs:
    """A pickle that creates a file when it is loaded."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.path),)


@pytest.mark.parametrize("file", ["optimizer.pt", "scheduler.pt", "rng_state.pth", "training_args.bin"])
def test_no_code_in_a_checkpoint_is_run(saved: Path, tmp_path: Path, file: str) -> None:
    run = shutil.copytree(saved, tmp_path / "run")
    planted = run / "checkpoint-3" / file
    torch.save({"state": Runs(tmp_path / "was_run")}, planted)
    manifest = json.loads((run / "checkpoint-3" / MANIFEST).read_text())
    content = planted.read_bytes()
    manifest["files"][file] = {"bytes": len(content), "crc32": zlib.crc32(content)}
    (run / "checkpoint-3" / MANIFEST).write_text(json.dumps(manifest))
    if file == "training_args.bin":  # is not read
        resume(run)
    else:
        with pytest.raises(pickle.UnpicklingError, match="Weights only load failed"):
            resume(run)
    assert not (tmp_path / "was_run").exists()


# Datasets without rows


@pytest.mark.parametrize("empty", [[], {}, {"first": PAIRS, "second": []}], ids=["list", "dict", "one of two"])
@pytest.mark.parametrize("name", ["sft_packed_by_workers", "kto", "prm", "ppo_mini_batches", "distillation_mixed"])
def test_an_evaluation_set_without_rows(tmp_path: Path, name: str, empty: Any) -> None:
    place = r"eval_dataset\['second'\]" if "second" in empty else "eval_dataset"
    with pytest.raises(ValueError, match=rf"{place}: the dataset is empty; give it rows, or leave it out"):
        RUNS[name](tmp_path, {"eval_dataset": empty})


@pytest.mark.parametrize("name", RUNS)
def test_an_evaluation_of_no_rows(tmp_path: Path, name: str) -> None:
    trainer = RUNS[name](tmp_path, {})
    with pytest.raises(ValueError, match="eval_dataset: the dataset is empty; give it rows"):
        trainer.evaluate([])


@pytest.mark.parametrize(
    ("name", "column", "value", "message"),
    [
        ("kto", "label", "False", "a label is 'False': expected True or False, or 1 or 0"),
        ("reward_outcomes", "label", 3, "a label is 3: expected True or False"),
        ("prm", "labels", ["True"], "a label is 'True': expected True or False"),
        ("kto", "prompt", [], "the prompt and its completions must be all strings or all conversations"),
        ("reward_k_wise", "completions", 3, r"TypeError: object of type 'int' has no len"),
    ],
)
def test_a_row_of_the_wrong_kind_is_named(tmp_path: Path, name: str, column: str, value: Any, message: str) -> None:
    rows = {"kto": OUTCOMES, "reward_outcomes": OUTCOMES, "prm": STEPWISE, "reward_k_wise": RANKED}[name]
    wrong = [rows[0], {**rows[1], column: value}]
    with pytest.raises(ValueError, match=f"train_dataset: row 1: {message}"):
        RUNS[name](tmp_path, {"train_dataset": wrong})


def test_a_row_that_a_template_refuses_is_named(tmp_path: Path) -> None:
    tokenizer = make_tokenizer()
    tokenizer.chat_template = (
        "{% for m in messages %}{% if m['role'] == 'system' %}{{ raise_exception('no system role') }}{% endif %}"
        "{{ m['content'] }}{% endfor %}"
    )
    rows = [{"messages": [{"role": role, "content": "a b"}]} for role in ("user", "system")]
    with pytest.raises(ValueError, match=r"train_dataset: row 1: TemplateError: no system role"):
        sft_trainer(tmp_path, trainer={"train_dataset": rows, "processing_class": tokenizer})
