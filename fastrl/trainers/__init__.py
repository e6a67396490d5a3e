"""Thin trainers on `transformers.Trainer`."""

import transformers

# Trainer has said since 5.23 whether a loss is already normalized; before, it would divide ours once more, in silence.
if not hasattr(transformers.Trainer, "loss_is_scaled_for_ga") or not hasattr(transformers.Trainer, "_run_epoch"):
    raise ImportError(f"fastrl.trainers needs transformers >= 5.23, found {transformers.__version__}")

from fastrl.trainers.distillation import DistillationTrainer
from fastrl.trainers.distillation_config import DistillationConfig
from fastrl.trainers.dpo import DPOTrainer, KTOTrainer
from fastrl.trainers.dpo_config import DPOConfig, KTOConfig
from fastrl.trainers.grpo import GRPOTrainer
from fastrl.trainers.grpo_config import GRPOConfig
from fastrl.trainers.ppo import PPOTrainer
from fastrl.trainers.ppo_config import PPOConfig
from fastrl.trainers.reward import PRMTrainer, RewardTrainer
from fastrl.trainers.reward_config import PRMConfig, RewardConfig
from fastrl.trainers.sft import SFTTrainer
from fastrl.trainers.sft_config import SFTConfig

__all__ = [
    "DPOConfig",
    "DPOTrainer",
    "DistillationConfig",
    "DistillationTrainer",
    "GRPOConfig",
    "GRPOTrainer",
    "KTOConfig",
    "KTOTrainer",
    "PPOConfig",
    "PPOTrainer",
    "PRMConfig",
    "PRMTrainer",
    "RewardConfig",
    "RewardTrainer",
    "SFTConfig",
    "SFTTrainer",
]
