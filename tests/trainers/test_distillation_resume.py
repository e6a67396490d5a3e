"""A distillation that is cut off and resumed is the one that was not: weights bit for bit, same metrics."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from distillation_runs import make_distillation
from peft import LoraConfig
from safetensors.torch import load_file
from tiny_runs import history, tiny_model
from transformers import TrainerCallback

from fastrl.trainers.checkpoint_files import newest_complete
from fastrl.trainers.distillation import DistillationTrainer

SETTINGS: dict[str, Any] = {"max_steps": 9, "save_strategy": "steps", "save_steps": 5, "lmbda": 0.5, "beta": 0.5} | {
    "per_device_train_batch_size": 2,
    "gradient_accumulation_steps": 2,
    "steps_per_generation": 4,  # two optimizer steps to a rollout
    "tokens_per_pass": 32,
    "seed": 6,  # of the five rollouts the second and the last are the student's own
}


def same(resumed: DistillationTrainer, straight: DistillationTrainer) -> None:
    expected = dict(straight.model.named_parameters())
    for name, weight in resumed.model.named_parameters():
        assert torch.equal(weight, expected[name]), name
    assert history(resumed) == history(straight)


class Killed(BaseException):
    pass


class Dies(TrainerCallback):
    """Ends the run in the middle of a step."""

    def on_substep_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Called by Trainer."""
        if state.global_step == 7:
            raise Killed


@pytest.mark.parametrize("situation", ["dropout", "lora_and_a_teacher_that_samples"])
def test_resumed_run_equals_the_uninterrupted_one(tmp_path: Path, situation: str) -> None:
    def make(folder: str, **arguments: Any) -> DistillationTrainer:
        settings = {**SETTINGS, "seq_kd": situation != "dropout"}
        if situation != "dropout":
            arguments["peft_config"] = LoraConfig(r=4, target_modules=["q_proj", "lm_head"], lora_dropout=0.1)
        model = tiny_model(attention_dropout=0.2 if situation == "dropout" else 0.0)
        return make_distillation(tmp_path / folder, model, arguments=arguments, **settings)

    straight = make("straight")
    straight.train()
    assert {log["on_policy"] for log in history(straight) if "on_policy" in log} == {0.0, 1.0}
    cut = make("cut", callbacks=[Dies()])
    with pytest.raises(Killed):
        cut.train()
    assert newest_complete(tmp_path / "cut") == str(tmp_path / "cut" / "checkpoint-5")
    saved = load_file(tmp_path / "cut" / "checkpoint-5" / "fastrl_state.safetensors")
    assert {"0.completion_ids", "3.completion_mask"} <= saved.keys()  # in the middle of a rollout
    resumed = make("cut")
    resumed.train(resume_from_checkpoint=True)
    same(resumed, straight)
