"""A PPO run that is cut off and resumed is the run that was not: weights bit for bit, critic included."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig
from ppo_runs import early_letters, make_ppo, tiny_classifier
from safetensors.torch import load_file
from tiny_runs import history

from fastrl.trainers.checkpoint_files import newest_complete
from fastrl.trainers.ppo import PPOTrainer
from fastrl.trainers.value_model import HEAD_FILE

SETTINGS: dict[str, Any] = {"max_steps": 10, "save_strategy": "steps", "save_steps": 6, "num_mini_batches": 2} | {
    "num_ppo_epochs": 2,  # four optimizer steps to a rollout
    "per_device_train_batch_size": 2,
    "gradient_accumulation_steps": 4,
}


def same(resumed: PPOTrainer, straight: PPOTrainer) -> None:
    expected = dict(straight.model.named_parameters())
    assert any("fastrl_critic" in name for name in expected)
    for name, weight in resumed.model.named_parameters():
        assert torch.equal(weight, expected[name]), name
    assert history(resumed) == history(straight)


class Killed(BaseException):
    pass


@pytest.mark.parametrize("situation", ["adaptive_kl", "value_model", "lora"])
def test_resumed_run_equals_the_uninterrupted_one(tmp_path: Path, situation: str) -> None:
    settings = {**SETTINGS, "kl_target": 0.1, "kl_horizon": 20} if situation == "adaptive_kl" else SETTINGS

    def make(folder: str, last: int = 99) -> PPOTrainer:
        def reward(completions: list[Any], trainer_state: Any, **kwargs: Any) -> list[float]:
            if trainer_state.global_step >= last:
                raise Killed
            return early_letters(completions)

        arguments: dict[str, Any] = {}
        if situation == "value_model":
            arguments["value_model"] = tiny_classifier(attention_dropout=0.2)
        if situation == "lora":
            arguments["peft_config"] = LoraConfig(r=4, target_modules=["q_proj", "lm_head"], lora_dropout=0.1)
        dropout = {"disable_dropout": situation == "adaptive_kl"}
        return make_ppo(tmp_path / folder, reward_funcs=reward, arguments=arguments, **settings, **dropout)

    straight = make("straight")
    straight.train()
    cut = make("cut", last=8)
    with pytest.raises(Killed):
        cut.train()
    assert newest_complete(tmp_path / "cut") == str(tmp_path / "cut" / "checkpoint-6")
    saved = load_file(tmp_path / "cut" / "checkpoint-6" / "fastrl_state.safetensors")
    assert {"0.returns", "3.old_values", "3.old_logps"} <= saved.keys()  # in the middle of a rollout
    resumed = make("cut")
    resumed.train(resume_from_checkpoint=True)
    same(resumed, straight)
    if situation == "adaptive_kl":
        assert len({log.get("objective/kl_coef", 0) for log in history(straight)}) > 2


def test_a_checkpoint_with_another_critic_is_refused(tmp_path: Path) -> None:
    make_ppo(tmp_path, max_steps=1, save_strategy="steps", save_steps=1).train()
    other = make_ppo(tmp_path, arguments={"value_model": tiny_classifier()})
    with pytest.raises(ValueError, match=r"checkpoint-1 is of another run \(model: .* weights in .* there, .* here"):
        other.train(resume_from_checkpoint=str(tmp_path / "checkpoint-1"))


def test_the_best_model_has_its_critic(tmp_path: Path) -> None:
    trainer = make_ppo(
        tmp_path,
        max_steps=3,
        save_strategy="steps",
        save_steps=1,
        eval_strategy="steps",
        eval_steps=1,
        load_best_model_at_end=True,
        metric_for_best_model="eval_episodes_so_far",
        greater_is_better=False,  # the first one
        arguments={"eval_dataset": Dataset.from_dict({"prompt": ["a"] * 8})},
    )
    log = trainer.metrics.add
    trainer.metrics.add = lambda mode, metrics: log(mode, {**metrics, "episodes_so_far": float(trainer._episodes)})  # type: ignore[method-assign]
    trainer.train()
    assert str(trainer.state.best_model_checkpoint).endswith("checkpoint-1")
    saved = load_file(tmp_path / "checkpoint-1" / HEAD_FILE)
    assert torch.equal(trainer.critic.score.weight, saved["weight"])  # type: ignore[union-attr, arg-type]
    last = load_file(tmp_path / "checkpoint-3" / HEAD_FILE)
    assert not torch.equal(last["weight"], saved["weight"])
