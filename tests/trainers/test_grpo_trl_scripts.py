"""Scripts of TRL's documentation, as they stand there but for the import, on a model of a few thousand weights."""

import math
from pathlib import Path
from typing import Any

import pytest
from datasets import Dataset
from tiny_runs import TEMPLATE, make_tokenizer, tiny_model

QUICKSTART = """
from datasets import load_dataset
from trl import GRPOTrainer
from trl.rewards import accuracy_reward

dataset = load_dataset("trl-lib/DeepMath-103K", split="train")

trainer = GRPOTrainer(
    model="Qwen/Qwen2-0.5B-Instruct",
    reward_funcs=accuracy_reward,
    train_dataset=dataset,
)
trainer.train()
"""

SEVERAL_REWARDS = """
from datasets import load_dataset
from trl import GRPOConfig, GRPOTrainer

dataset = load_dataset("trl-lib/ultrafeedback-prompt", split="train")

# Dummy reward function for demonstration purposes
def reward_num_unique_letters(completions, **kwargs):
    completion_contents = [completion[0]["content"] for completion in completions]
    return [float(len(set(content))) for content in completion_contents]

def math_reward_func(prompts, completions, task, **kwargs):
    rewards = []
    for prompt, completion, t in zip(prompts, completions, task):
        rewards.append(1.0 if t == "math" else None)
    return rewards

async def async_reward_func(prompts, completions, log_extra=None, log_metric=None, **kwargs):
    if log_extra:
        log_extra("length", [len(completion[0]["content"]) for completion in completions])
    if log_metric:
        log_metric("accuracy", 0.5)
    return [0.0] * len(completions)

training_args = GRPOConfig(
    output_dir="Qwen2-0.5B-GRPO",
    per_device_train_batch_size=4,
    num_generations=4,
    max_completion_length=16,
    beta=0.04,
    num_iterations=2,
    scale_rewards=False,
    loss_type="dr_grpo",
    mask_truncated_completions=True,
    log_completions=True,
    num_completions_to_print=1,
    max_steps=3,
    logging_steps=1,
    save_steps=2,
)
trainer = GRPOTrainer(
    model="Qwen/Qwen2-0.5B-Instruct",
    reward_funcs=[reward_num_unique_letters, math_reward_func, async_reward_func],
    args=training_args,
    train_dataset=dataset,
)
trainer.train()
"""

ROWS = [
    {"prompt": [{"role": "user", "content": "a b c"}], "solution": "$3$", "task": "math"},
    {"prompt": [{"role": "user", "content": "d e"}], "solution": "$5$", "task": "coding"},
]


@pytest.mark.parametrize("script", [QUICKSTART, SEVERAL_REWARDS], ids=["quickstart", "several_rewards"])
def test_a_script_runs_unchanged_but_for_the_import(
    script: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = 1 if script is QUICKSTART else 2
    tokenizer = make_tokenizer()
    tokenizer.chat_template = TEMPLATE
    for saved in (tokenizer, tiny_model("qwen2", max_position_embeddings=1024)):
        saved.save_pretrained(tmp_path / "Qwen/Qwen2-0.5B-Instruct")  # where a hub's name would be looked up first
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("datasets.load_dataset", lambda name, split: Dataset.from_list(ROWS[:rows]))
    names: dict[str, Any] = {}
    exec(script.replace("from trl", "from fastrl"), names)
    log = names["trainer"].state.log_history
    assert math.isfinite(log[-1]["train_loss"])
    steps = names["trainer"].state.max_steps
    assert names["trainer"].state.global_step == steps == 3
    if script is SEVERAL_REWARDS:
        assert log[0]["rewards/reward_num_unique_letters/std"] > 0 and log[0]["accuracy"] == 0.5
        assert (tmp_path / "Qwen2-0.5B-GRPO/checkpoint-2").is_dir()
        assert len(list((tmp_path / "Qwen2-0.5B-GRPO/completions").iterdir())) == 2  # rollouts
