"""What the tests of distillation share: small runs of a student with a teacher of another width."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from datasets import Dataset
from tiny_runs import GradientRecorder, ScriptedEngine, make_tokenizer, tiny_model
from torch import Tensor
from transformers import PreTrainedModel

from fastrl.trainers.distillation import DistillationTrainer
from fastrl.trainers.distillation_config import DistillationConfig

PROMPTS = ["a", "b c", "d e f", "g h i j", "k", "l m", "n o p q r", "s t"]
COMPLETIONS = [" b", " d e f g", "", " k l m n o p q", " l m", " n", " s t u", " u v w"]


def tiny_teacher(**config: Any) -> PreTrainedModel:
    """Wider than the student, of one layer."""
    return tiny_model(seed=7, hidden_size=48, num_hidden_layers=1, **config)


def make_distillation(
    folder: Path,
    model: Any = None,
    teacher: Any = None,
    *,
    rows: Any = None,
    arguments: dict[str, Any] | None = None,
    **config: Any,
) -> DistillationTrainer:
    """Rollouts of eight completions of at most eight tokens, no checkpoints; arguments: further ones of the trainer."""
    settings: dict[str, Any] = {
        "output_dir": str(folder),
        "per_device_train_batch_size": 8,
        "max_completion_length": 8,
        "max_steps": 2,
        "learning_rate": 1e-2,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        "gradient_checkpointing": False,
        "use_cpu": True,
        "bf16": False,
        **config,
    }
    return DistillationTrainer(
        tiny_model() if model is None else model,
        tiny_teacher() if teacher is None else teacher,
        DistillationConfig(**settings),
        Dataset.from_dict({"prompt": PROMPTS, "completion": COMPLETIONS}) if rows is None else rows,
        **{"processing_class": make_tokenizer(), **(arguments or {})},
    )


def mixed_steps(folder: Path, batch: int) -> tuple[list[dict[str, Tensor]], list[dict[str, float]]]:
    """Gradients and logs of four optimizer steps, of which the student's own completions are taken in the second."""
    recorder = GradientRecorder()
    trainer = make_distillation(
        folder,
        per_device_train_batch_size=batch,
        max_steps=4,
        lmbda=0.5,
        seed=6,
        max_grad_norm=0.0,
        learning_rate=1e-3,
        arguments={"rollout_engine": ScriptedEngine(), "callbacks": [recorder]},
    )
    trainer.train()
    return recorder.grads, trainer.state.log_history[:-1]
