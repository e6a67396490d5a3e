"""A run that is cut off and resumed is the run that was not: weights bit for bit, and every metric that is not a time.
What was being written when a process died is never taken for a checkpoint."""

import json
import math
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig
from safetensors.torch import load_file
from tiny_runs import ScriptedEngine, count_letters, history, tiny_model

from fastrl.trainers import GRPOTrainer
from fastrl.trainers.checkpoint_files import MANIFEST, IncompleteCheckpointError, check_complete, newest_complete
from fastrl.trainers.run_record import METRICS_FILE, RUN_FILE

Make = Callable[..., GRPOTrainer]


def weights(trainer: GRPOTrainer) -> dict[str, torch.Tensor]:
    return {name: p.detach().clone() for name, p in trainer.model.named_parameters()}


def checkpoints_in(run: Path) -> list[str]:
    """Everything in the folder but the record of the run."""
    return sorted(p.name for p in run.iterdir() if p.name not in (RUN_FILE, METRICS_FILE))


class Killed(BaseException):  # no error of a reward function, which would cost rewards only
    pass


def die_at(step: int) -> Callable[..., list[float]]:
    def count_letters_until(completions: list[Any], trainer_state: Any, **kwargs: Any) -> list[float]:
        if trainer_state.global_step >= step:
            raise Killed
        return count_letters(completions)

    count_letters_until.__name__ = "count_letters"
    return count_letters_until


SITUATIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "second_epoch": {"max_steps": 7, "save_steps": 5},  # four steps to an epoch
    "at_the_end_of_an_epoch": {"save_steps": 4, "max_steps": 6},
    "inside_a_rollout": {
        "num_iterations": 2,
        "per_device_train_batch_size": 4,
        "steps_per_generation": 4,  # eight optimizer steps to a rollout
        "max_steps": 10,
        "save_steps": 6,
    },
    "inside_a_rollout_scored_by_its_first_step": {"num_iterations": 3, "max_steps": 7, "save_steps": 4},
    "dynamic_sampling": {"dynamic_sampling": True, "max_steps": 6, "save_steps": 3},
    "moving_reference": {"beta": 0.1, "sync_ref_model": True, "ref_model_sync_steps": 2, "save_steps": 3},
    "between_two_logs": {"logging_steps": 2},
    "accumulation_and_reference": {"gradient_accumulation_steps": 2, "beta": 0.1, "loss_type": "grpo"},
    "adaptive_entropy": {
        "use_adaptive_entropy": True,
        "entropy_coef": 0.01,
        "entropy_target": 3.6,
        "entropy_coef_delta": 0.01,
    },
    "evaluation": {"eval_strategy": "steps", "eval_steps": 1, "per_device_eval_batch_size": 8},
    "dropout": {"model_settings": {"attention_dropout": 0.3}},
    "lora": {"peft": True},
}


@pytest.mark.parametrize("situation", SITUATIONS)
def test_resumed_run_equals_the_uninterrupted_one(
    make_trainer: Make, tmp_path: Path, prompts: Dataset, situation: str
) -> None:
    settings = {"max_steps": 6, "save_strategy": "steps", "save_steps": 3, **SITUATIONS[situation]}
    model_settings = settings.pop("model_settings", {})
    peft = settings.pop("peft", False)

    def make(directory: str, reward: Any) -> GRPOTrainer:
        arguments: dict[str, Any] = {"eval_dataset": prompts.select(range(2))} if "eval_strategy" in settings else {}
        if peft:
            arguments["peft_config"] = LoraConfig(r=4, target_modules=["q_proj", "lm_head"], lora_dropout=0.1)
        model = tiny_model(**model_settings)
        where = str(tmp_path / directory)
        return make_trainer(model, reward, output_dir=where, trainer_arguments=arguments, **settings)

    straight = make("straight", count_letters)
    straight.train()
    cut = make("cut", die_at(settings["save_steps"] + 1))
    with pytest.raises(Killed):
        cut.train()
    assert newest_complete(tmp_path / "cut") == str(tmp_path / "cut" / f"checkpoint-{settings['save_steps']}")
    resumed = make("cut", count_letters)
    if situation == "inside_a_rollout":
        saved = load_file(tmp_path / "cut" / "checkpoint-6" / "fastrl_state.safetensors")
        assert {"0.completion_ids", "3.old_logps"} <= saved.keys()
    resumed.train(resume_from_checkpoint=True)

    assert resumed.state.global_step == settings["max_steps"]
    for name, weight in weights(straight).items():
        assert torch.equal(weight, weights(resumed)[name]), name
    assert history(resumed) == history(straight)
    assert any(not math.isclose(log.get("loss", 0.0), 0.0, abs_tol=1e-9) for log in history(straight))
    if situation == "dynamic_sampling":
        assert resumed._drawn == straight._drawn > 0
    if situation == "adaptive_entropy":
        assert resumed.entropy == straight.entropy and len({log["entropy_coef"] for log in history(straight)}) > 2


def test_a_different_seed_is_a_different_run(make_trainer: Make, tmp_path: Path) -> None:
    """The comparison above can fail."""
    runs = []
    for seed in (1, 2):
        trainer = make_trainer(seed=seed, output_dir=str(tmp_path / str(seed)))
        trainer.train()
        runs.append(weights(trainer))
    assert any(not torch.equal(w, runs[1][name]) for name, w in runs[0].items())


def test_pending_rollouts_need_the_same_batches(make_trainer: Make, tmp_path: Path) -> None:
    settings = {"max_steps": 3, "save_strategy": "steps", "save_steps": 1, "num_iterations": 2}
    make_trainer(**settings).train()
    other = make_trainer(**{**settings, "num_iterations": 3, "ignore_data_skip": True})
    with pytest.raises(ValueError, match=r"holds rollouts in use.*'num_iterations': 2.*cannot be resumed"):
        other.train(resume_from_checkpoint=True)


# Checkpoints are whole or nothing


def checkpointed(make_trainer: Make, **settings: Any) -> Path:
    trainer = make_trainer(
        **{"max_steps": 2, "save_strategy": "steps", "save_steps": 1, **settings},
        trainer_arguments={"rollout_engine": ScriptedEngine()},
    )
    trainer.train()
    return Path(trainer.args.output_dir)


@pytest.mark.parametrize("damage", ["missing file", "cut file", "no manifest", "empty directory"])
def test_partial_checkpoints_are_passed_over(make_trainer: Make, damage: str) -> None:
    run = checkpointed(make_trainer)
    newest = run / "checkpoint-2"
    if damage == "missing file":
        (newest / "optimizer.pt").unlink()
    elif damage == "cut file":
        with open(newest / "model.safetensors", "r+b") as file:
            file.truncate(1000)
    elif damage == "no manifest":
        (newest / MANIFEST).unlink()
    else:
        (run / "checkpoint-9").mkdir()
        newest = run / "checkpoint-9"
    with pytest.raises(IncompleteCheckpointError, match=str(newest)):
        check_complete(newest)
    expected = run / ("checkpoint-2" if damage == "empty directory" else "checkpoint-1")
    assert newest_complete(run) == str(expected)
    trainer = make_trainer(max_steps=3, save_strategy="no")
    with pytest.raises(IncompleteCheckpointError, match=str(newest)):
        trainer.train(resume_from_checkpoint=str(newest))
    trainer.train(resume_from_checkpoint=True)
    assert trainer.state.global_step == 3


def test_resuming_without_a_checkpoint_is_an_error(make_trainer: Make) -> None:
    with pytest.raises(ValueError, match="resume_from_checkpoint: no complete checkpoint in"):
        make_trainer().train(resume_from_checkpoint=True)


@pytest.mark.parametrize("moment", ["model", "optimizer", "state", "before the rename"])
def test_dying_while_writing_leaves_the_older_checkpoint(
    make_trainer: Make, monkeypatch: pytest.MonkeyPatch, moment: str
) -> None:
    trainer = make_trainer(
        max_steps=2, save_strategy="steps", save_steps=1, trainer_arguments={"rollout_engine": ScriptedEngine()}
    )

    def dies(original: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            if trainer.state.global_step == 2:
                raise Killed
            return original(*args, **kwargs)

        return call

    place, name = {
        "model": (trainer.model, "save_pretrained"),
        "optimizer": (trainer, "_save_optimizer_and_scheduler"),
        "state": (trainer, "resume_state"),
        "before the rename": (sys.modules["fastrl.trainers.checkpointing"], "install"),
    }[moment]
    monkeypatch.setattr(place, name, dies(getattr(place, name)))
    with pytest.raises(Killed):
        trainer.train()
    run = Path(trainer.args.output_dir)
    assert newest_complete(run) == str(run / "checkpoint-1")
    assert not (run / "checkpoint-2").exists()
    monkeypatch.undo()
    again = make_trainer(max_steps=2, save_strategy="steps", save_steps=1)
    again.train(resume_from_checkpoint=True)
    assert checkpoints_in(run) == ["checkpoint-1", "checkpoint-2"]  # no leftovers


def test_a_checkpoint_of_the_same_step_is_replaced_safely(make_trainer: Make) -> None:
    run = checkpointed(make_trainer)
    before = (run / "checkpoint-2" / MANIFEST).stat().st_mtime_ns
    checkpointed(make_trainer)  # started anew in the same directory
    assert (run / "checkpoint-2" / MANIFEST).stat().st_mtime_ns > before
    assert checkpoints_in(run) == ["checkpoint-1", "checkpoint-2"]
    os.rename(run / "checkpoint-2", run / ".replaced-checkpoint-2")  # killed between the two renames
    assert newest_complete(run) == str(run / "checkpoint-2")


def test_rotation_and_the_best_checkpoint(make_trainer: Make, prompts: Dataset) -> None:
    trainer = make_trainer(
        max_steps=4,
        save_strategy="steps",
        save_steps=1,
        save_total_limit=2,
        eval_strategy="steps",
        eval_steps=1,
        load_best_model_at_end=True,
        metric_for_best_model="eval_reward",
        greater_is_better=True,
        trainer_arguments={"eval_dataset": prompts.select(range(2))},
    )
    trainer.train()
    run = Path(trainer.args.output_dir)
    best = Path(str(trainer.state.best_model_checkpoint))
    assert best.parent == run and best.is_dir()
    kept = checkpoints_in(run)
    assert len(kept) == 2 and "checkpoint-4" in kept
    for path in run.glob("checkpoint-*"):
        check_complete(path)
        saved = json.loads((path / "trainer_state.json").read_text())["best_model_checkpoint"]
        assert Path(saved).parent == run


def test_an_error_leaves_the_checkpoint_good(make_trainer: Make) -> None:
    trainer = make_trainer(reward_funcs=die_at(2), max_steps=3, save_strategy="steps", save_steps=1)
    with pytest.raises(Killed):
        trainer.train()
    check_complete(Path(trainer.args.output_dir) / "checkpoint-2")
    fresh = make_trainer(max_steps=3)
    fresh.train(resume_from_checkpoint=True)
    assert fresh.state.global_step == 3
