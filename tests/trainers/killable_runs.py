"""One small run of each trainer, made of what is hard to resume; as a script, each one kills itself."""

from __future__ import annotations

import json
import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from distillation_runs import make_distillation
from dpo_runs import PAIRS, dpo_trainer
from peft import LoraConfig
from ppo_runs import ROWS, make_ppo
from reward_runs import OUTCOMES, RANKED, STEPWISE, reward_trainer
from sft_runs import TEXTS, sft_trainer
from tiny_runs import count_letters, make_tokenizer, tiny_model
from transformers import TrainerCallback

from fastrl.trainers import GRPOConfig, GRPOTrainer

# Every run evaluates, accumulates, and logs less often than it saves.
COMMON: dict[str, Any] = {
    "max_steps": 7,
    "save_strategy": "steps",
    "save_steps": 1,
    "logging_steps": 2,
    "eval_strategy": "steps",
    "eval_steps": 2,
    "per_device_train_batch_size": 2,
    "per_device_eval_batch_size": 4,
    "gradient_accumulation_steps": 2,
    "report_to": "none",
    "disable_tqdm": True,
    "gradient_checkpointing": False,
    "use_cpu": True,
    "bf16": False,
}
SHUFFLED = {"train_sampling_strategy": "random", "optim": "adamw_torch", "learning_rate": 1e-3}
LORA = LoraConfig(r=4, target_modules=["q_proj", "lm_head"], lora_dropout=0.1)
PROMPTS = [{"prompt": row} for row in ROWS]


def _grpo(folder: Path, trainer: dict[str, Any], **settings: Any) -> GRPOTrainer:
    sizes = {"num_generations": 4, "max_completion_length": 6, "learning_rate": 1e-2}
    args = GRPOConfig(str(folder), **{**COMMON, **sizes, **settings})
    return GRPOTrainer(tiny_model(), count_letters, args, PROMPTS, processing_class=make_tokenizer(), **trainer)


# Name -> a function of the output folder and of further arguments of the trainer (callbacks).
RUNS: dict[str, Callable[[Path, dict[str, Any]], Any]] = {
    "sft_packed_by_workers": lambda folder, trainer: sft_trainer(
        folder,
        packing=True,
        max_length=8,
        **{**COMMON, "dataloader_num_workers": 2},
        trainer={"eval_dataset": [{"text": text} for text in TEXTS[:3]], **trainer},
    ),
    "dpo_mixed_lora": lambda folder, trainer: dpo_trainer(
        folder,
        **{**COMMON, **SHUFFLED, "loss_type": ["sigmoid", "sft"]},
        trainer={"eval_dataset": PAIRS[:3], "peft_config": LORA, **trainer},
    ),
    "kto": lambda folder, trainer: dpo_trainer(
        folder,
        **{**COMMON, **SHUFFLED, "loss_type": "kto"},
        trainer={"train_dataset": OUTCOMES, "eval_dataset": OUTCOMES[:3], **trainer},
    ),
    "reward_k_wise": lambda folder, trainer: reward_trainer(
        folder,
        **{**COMMON, **SHUFFLED, "loss_type": "plackett_luce"},
        trainer={"eval_dataset": RANKED[:3], **trainer},
    ),
    "reward_outcomes": lambda folder, trainer: reward_trainer(
        folder, **{**COMMON, **SHUFFLED, "loss_type": "orm"}, trainer={"eval_dataset": OUTCOMES[:3], **trainer}
    ),
    "prm": lambda folder, trainer: reward_trainer(
        folder, **{**COMMON, **SHUFFLED, "loss_type": "prm"}, trainer={"eval_dataset": STEPWISE[:3], **trainer}
    ),
    "ppo_mini_batches": lambda folder, trainer: make_ppo(
        folder,
        **{**COMMON, "num_mini_batches": 2, "num_ppo_epochs": 2, "kl_target": 0.1, "kl_horizon": 20},
        arguments={"eval_dataset": PROMPTS[:4], **trainer},
    ),
    "grpo_iterations_of_refilled_rollouts": lambda folder, trainer: _grpo(
        folder,
        {"eval_dataset": PROMPTS[:2], **trainer},
        steps_per_generation=4,
        num_iterations=2,
        dynamic_sampling=True,
        beta=0.1,
        sync_ref_model=True,
        ref_model_sync_steps=2,
    ),
    "distillation_mixed": lambda folder, trainer: make_distillation(
        folder,
        **{**COMMON, "steps_per_generation": 4, "lmbda": 0.5, "beta": 0.5, "seed": 6},
        arguments={"eval_dataset": [{"prompt": "a", "completion": " b"}] * 4, **trainer},
    ),
}


class Dies(TrainerCallback):
    """SIGKILL at a moment of a step: the name of an event, or "writing" for the middle of a checkpoint."""

    def __init__(self, step: int, moment: str) -> None:
        self.step, self.moment = step, moment
        if moment != "writing":
            setattr(self, moment, self.die)

    def die(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Called by Trainer."""
        if state.global_step >= self.step:
            os.kill(os.getpid(), signal.SIGKILL)

    def inside(self, trainer: Any) -> None:
        """Makes the trainer die when it has written the model, but not the rest of its checkpoint."""
        save = trainer._save_optimizer_and_scheduler

        def dies(folder: str) -> None:
            save(folder)
            self.die(trainer.args, trainer.state, trainer.control)

        trainer._save_optimizer_and_scheduler = dies


def main(folder: Path, deaths: dict[str, tuple[int, str]]) -> None:
    """Forks a process for each run before anything is computed: imports are what takes its time."""
    torch.set_num_threads(1)
    for name, (step, moment) in deaths.items():
        child = os.fork()
        if not child:
            death = Dies(step, moment)
            trainer = RUNS[name](folder / name, {"callbacks": [death]})
            if moment == "writing":
                death.inside(trainer)
            trainer.train()
            os._exit(0)
        _, status = os.waitpid(child, 0)
        assert os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL, (name, step, moment, status)


if __name__ == "__main__":
    main(Path(sys.argv[1]), json.loads(sys.argv[2]))
