"""What the tests of DPOTrainer run: pairs of uneven lengths, small steps whose gradients are recorded."""

from pathlib import Path
from typing import Any

import torch
from tiny_runs import GradientRecorder, make_tokenizer, tiny_model

from fastrl.trainers.dpo import DPOTrainer, KTOTrainer
from fastrl.trainers.dpo_config import DPOConfig, KTOConfig

PAIRS = [
    {"prompt": "a b c", "chosen": " d e f g", "rejected": " h", "reference": " i j"},
    {"prompt": "a", "chosen": " d", "rejected": " h i j k l m n o", "reference": " d d"},
    {"prompt": "x y", "chosen": " d z", "rejected": " h i", "reference": " q"},
    {"prompt": "c", "chosen": " d 1 2 3", "rejected": " q r s", "reference": " 4 5 6"},
    {"prompt": "p q r s t u", "chosen": " v w x", "rejected": " v w y 5", "reference": " v"},
    {"prompt": "0", "chosen": " 1 2 3 4 5 6", "rejected": " 9", "reference": " 7 8"},
    {"prompt": "k l", "chosen": " m", "rejected": " n o p", "reference": " m m m"},
    {"prompt": "e f", "chosen": " g h i", "rejected": " j", "reference": " g"},
]
# A learning rate at which three steps of plain gradient descent move the rewards.
STEPS: dict[str, Any] = {
    "per_device_train_batch_size": 4,
    "max_steps": 3,
    "learning_rate": 0.5,
    "optim": "sgd",
    "lr_scheduler_type": "constant",
    "logging_steps": 1,
    "save_strategy": "no",
    "report_to": "none",
    "disable_tqdm": True,
    "gradient_checkpointing": False,
    "bf16": False,
    "use_cpu": True,
    "train_sampling_strategy": "sequential",
}


def dpo_trainer(folder: Path, *, trainer: dict[str, Any] | None = None, **config: Any) -> DPOTrainer:
    """Over `PAIRS`, in order; "kto": a `KTOTrainer`."""
    settings = {**STEPS, **config}
    kto = settings.get("loss_type") == "kto"
    arguments = {"model": None, "train_dataset": PAIRS, "processing_class": make_tokenizer(), **(trainer or {})}
    if arguments["model"] is None:
        arguments["model"] = tiny_model()
    args = (KTOConfig if kto else DPOConfig)(str(folder / "run"), **settings)
    return (KTOTrainer if kto else DPOTrainer)(args=args, **arguments)


def run(trainer: Any) -> tuple[list[dict[str, torch.Tensor]], list[dict[str, Any]]]:
    """The gradients before each optimizer step, and what each step logged."""
    recorder = GradientRecorder()
    trainer.add_callback(recorder)
    trainer.train()
    return recorder.grads, [log for log in trainer.state.log_history if "loss" in log]


def assert_same_gradients(
    grads: dict[str, torch.Tensor], wanted: dict[str, torch.Tensor], tolerance: float = 1e-4
) -> None:
    """Each tensor's error is small beside its largest entry; at least one is not zero."""
    assert grads.keys() == wanted.keys()
    assert any(float(want.abs().max()) > 1e-4 for want in wanted.values())
    for name, want in wanted.items():
        torch.testing.assert_close(grads[name], want, rtol=0, atol=tolerance * float(want.abs().max()) + 1e-7, msg=name)
