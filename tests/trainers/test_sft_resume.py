"""An SFT run that is cut off and resumed is the run that was not. TRL's script runs with another import."""

from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig
from sft_runs import train
from tiny_runs import history, make_tokenizer, tiny_model
from transformers import TrainerCallback

from fastrl.trainers.checkpoint_files import newest_complete

SITUATIONS: dict[str, dict[str, Any]] = {
    "second_epoch": {"max_steps": 7, "save_steps": 5},  # three steps to an epoch
    "accumulation_between_two_logs_in_workers": {
        "per_device_train_batch_size": 2,
        "gradient_accumulation_steps": 2,
        "logging_steps": 2,
        "dataloader_num_workers": 1,
    },
    "lora_and_dropout": {
        "peft": LoraConfig(r=4, target_modules=["q_proj", "lm_head"], lora_dropout=0.1),
        "dropout": 0.3,
    },
    "packing_and_evaluation": {
        "packing": True,
        "max_length": 8,
        "per_device_train_batch_size": 2,
        "eval_strategy": "steps",
        "eval_steps": 1,
    },
}


class Killed(Exception):
    pass


class DieAt(TrainerCallback):
    """Raises when a step begins."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Called by Trainer."""
        if state.global_step >= self.step:
            raise Killed


@pytest.mark.parametrize("situation", SITUATIONS)
def test_resumed_run_equals_the_uninterrupted_one(tmp_path: Path, situation: str) -> None:
    settings = {"max_steps": 5, "save_steps": 3, **SITUATIONS[situation]}
    straight = train(tmp_path / "straight", **settings)
    with pytest.raises(Killed):
        train(tmp_path / "cut", callbacks=[DieAt(settings["save_steps"] + 1)], **settings)
    assert newest_complete(tmp_path / "cut") == str(tmp_path / "cut" / f"checkpoint-{settings['save_steps']}")
    resumed = train(tmp_path / "cut", resume=True, **settings)
    assert resumed.state.global_step == settings["max_steps"]
    weights = dict(resumed.model.named_parameters())
    for name, weight in straight.model.named_parameters():
        assert torch.equal(weight, weights[name]), name
    assert history(resumed) == history(straight)
    assert len({log["loss"] for log in history(straight) if "loss" in log}) > 1
    assert resumed.state.num_input_tokens_seen == straight.state.num_input_tokens_seen > 0


def test_a_different_seed_is_a_different_order(tmp_path: Path) -> None:
    losses = [[log["loss"] for log in history(train(tmp_path / str(seed), max_steps=2, seed=seed))] for seed in (1, 2)]
    assert losses[0] != losses[1]


TRL_SCRIPT = """
from trl import SFTConfig, SFTTrainer
from datasets import load_dataset
from peft import LoraConfig

dataset = load_dataset("json", data_files={data!r}, split="train")
training_args = SFTConfig(
    output_dir={run!r}, max_length=16, packing=True, completion_only_loss=True, per_device_train_batch_size=2,
    gradient_accumulation_steps=2, learning_rate=2e-4, num_train_epochs=2, logging_steps=1, eval_strategy="epoch",
    gradient_checkpointing=True, report_to="none", use_cpu=True, dataset_num_proc=1,
    model_init_kwargs={{"dtype": "float32"}},
)
trainer = SFTTrainer(
    model={model!r},
    args=training_args,
    train_dataset=dataset,
    eval_dataset=dataset,
    peft_config=LoraConfig(r=4, target_modules="all-linear"),
)
trainer.train()
trainer.save_model({run!r})
"""


def test_a_script_of_trl_runs_with_another_import(tmp_path: Path) -> None:
    tiny_model().save_pretrained(tmp_path / "model")
    make_tokenizer().save_pretrained(tmp_path / "model")
    rows = [{"prompt": "a b c", "completion": " d e"}, {"prompt": "f", "completion": " g h i"}] * 6
    Dataset.from_list(rows).to_json(tmp_path / "data.json")
    paths = {name: str(tmp_path / file) for name, file in (("data", "data.json"), ("run", "run"), ("model", "model"))}
    code = TRL_SCRIPT.format(**paths).replace(
        "from trl import SFTConfig, SFTTrainer",
        "from fastrl.trainers.sft import SFTTrainer\nfrom fastrl.trainers.sft_config import SFTConfig",
    )
    scope: dict[str, Any] = {}
    exec(code, scope)
    losses = [log["eval_loss"] for log in scope["trainer"].state.log_history if "eval_loss" in log]
    assert len(losses) == 2 and losses[1] < losses[0]
    assert (tmp_path / "run" / "adapter_model.safetensors").is_file()
