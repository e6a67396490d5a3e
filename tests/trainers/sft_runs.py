"""SFT runs for the tests of resuming."""

from pathlib import Path
from typing import Any

from tiny_runs import make_tokenizer, tiny_model

from fastrl.trainers.sft import SFTTrainer
from fastrl.trainers.sft_config import SFTConfig

TEXTS = [
    "a b c d", "e", "f g h i j k l m", "n o", "p q r s t u", "v w x y z 0 1 2", "5 6", "7 8 9", "a c e g i", "b d",
    "f h j l n p r t v x", "0 2 4",
]  # fmt: skip
EVALUATING = {"eval_strategy": "steps", "eval_steps": 3, "per_device_eval_batch_size": 1}


def sft_trainer(directory: Path, *, trainer: dict[str, Any] | None = None, **settings: Any) -> SFTTrainer:
    """Twelve texts, four of them in a step; "dropout" is the model's."""
    model = tiny_model(attention_dropout=settings.pop("dropout", 0.0))
    config = {
        "per_device_train_batch_size": 4,
        "learning_rate": 1e-2,
        "logging_steps": 1,
        "save_strategy": "steps",
        "save_steps": 3,
        "report_to": "none",
        "disable_tqdm": True,
        "gradient_checkpointing": False,
        "use_cpu": True,
        "lr_scheduler_type": "constant",
        **settings,
    }
    arguments = {
        "train_dataset": [{"text": text} for text in TEXTS],
        "eval_dataset": [{"text": text} for text in TEXTS[:3]],
        "processing_class": make_tokenizer(),
        **(trainer or {}),
    }
    return SFTTrainer(model, SFTConfig(str(directory), **config), **arguments)


def train(directory: Path, *, resume: bool = False, **settings: Any) -> SFTTrainer:
    """Such a run; "callbacks" and "peft" are the trainer's."""
    given = {"callbacks": settings.pop("callbacks", None), "peft_config": settings.pop("peft", None)}
    trainer = sft_trainer(directory, trainer=given, **settings)
    trainer.train(resume_from_checkpoint=resume)
    return trainer
