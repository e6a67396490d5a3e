"""An SFT run for the tests of resuming; as a script, it is killed."""

import sys
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
FOREVER = {"max_steps": 12, "save_steps": 1}  # long enough to be killed in
TIMES = ("tokens_per_second", "runtime", "per_second", "train_loss", "total_flos")


def train(directory: Path, *, resume: bool = False, **settings: Any) -> SFTTrainer:
    """Twelve texts, four of them in a step."""
    callbacks, peft = settings.pop("callbacks", None), settings.pop("peft", None)
    model = tiny_model(attention_dropout=settings.pop("dropout", 0.0))
    arguments = {
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
    trainer = SFTTrainer(
        model,
        SFTConfig(str(directory), **arguments),
        train_dataset=[{"text": text} for text in TEXTS],
        eval_dataset=[{"text": text} for text in TEXTS[:3]],
        processing_class=make_tokenizer(),
        callbacks=callbacks,
        peft_config=peft,
    )
    trainer.train(resume_from_checkpoint=resume)
    return trainer


def history(trainer: SFTTrainer) -> list[dict[str, Any]]:
    """What was logged, without what the clock decides."""
    kept = [{k: v for k, v in log.items() if not any(part in k for part in TIMES)} for log in trainer.state.log_history]
    return [log for log in kept if len(log) > 2]  # the closing summary has only epoch and step left


if __name__ == "__main__":
    train(Path(sys.argv[1]), **FOREVER)
