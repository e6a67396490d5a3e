"""What the tests of RewardTrainer run: answers of uneven lengths, small steps whose gradients are recorded."""

from pathlib import Path
from typing import Any

import torch
from tiny_runs import make_tokenizer
from transformers import LlamaConfig, LlamaForSequenceClassification, LlamaForTokenClassification

from fastrl.trainers.reward import PRMTrainer, RewardTrainer
from fastrl.trainers.reward_config import PRMConfig, RewardConfig

PAIRS: list[dict[str, Any]] = [
    {"prompt": "a b c", "chosen": " d e f g", "rejected": " h", "margin": 0.5},
    {"prompt": "a", "chosen": " d", "rejected": " h i j k l m n o", "margin": 0.0},
    {"prompt": "x y", "chosen": " d z", "rejected": " h i", "margin": 1.0},
    {"prompt": "c", "chosen": " d 1 2 3", "rejected": " q r s", "margin": 0.2},
    {"prompt": "p q r s t u", "chosen": " v w x", "rejected": " v w y 5", "margin": 2.0},
    {"prompt": "0", "chosen": " 1 2 3 4 5 6", "rejected": " 9", "margin": 0.1},
    {"prompt": "k l", "chosen": " m", "rejected": " n o p", "margin": 0.3},
    {"prompt": "e f", "chosen": " g h i", "rejected": " j", "margin": 0.7},
]
RANKED: list[dict[str, Any]] = [
    {"prompt": "a b", "completions": [" c d e", " f", " g h", " i j"], "ranks": [2.0, 1.0, 2.0, 4.0]},
    {"prompt": "c", "completions": [" d", " e f g h"], "ranks": [1.0, 2.0]},
    {"prompt": "k l m", "completions": [" n", " o p q r", " s t"], "ranks": [3.0, 1.0, 2.0]},
    {"prompt": "x", "completions": [" y", " z 1"], "ranks": [1.0, 1.0]},  # says nothing
    {"prompt": "0 1", "completions": [" 2 3 4 5", " 6", " 7"], "ranks": [1.0, 2.0, 3.0]},
    {"prompt": "f", "completions": [" g h i", " j", " k l m n o"], "ranks": [1.0, 3.0, 2.0]},
    {"prompt": "q r s", "completions": [" t", " u v"], "ranks": [2.0, 1.0]},
    {"prompt": "8", "completions": [" 9 9", " 9", " 8 8 8 8"], "ranks": [1.0, 2.0, 2.0]},
]
OUTCOMES: list[dict[str, Any]] = [
    {"prompt": row["prompt"], "completion": row["chosen" if good else "rejected"], "label": good}
    for row, good in zip(PAIRS, [True, False, False, True, True, False, True, False], strict=True)
]
STEPWISE: list[dict[str, Any]] = [
    {"prompt": "a b c", "completions": ["d e", "f", "g h i"], "labels": [True, True, False]},
    {"prompt": "k", "completions": ["l m n o"], "labels": [True]},
    {"prompt": "p q r s t u v", "completions": ["w", "x"], "labels": [False, False]},
    {"prompt": "0 1", "completions": ["2 3", "4 5 6", "7", "8 9 0"], "labels": [True, False, True, False]},
    {"prompt": "c d", "completions": ["e f g h i", "j"], "labels": [True, False]},
    {"prompt": "z", "completions": ["y x", "w v"], "labels": [False, True]},
    {"prompt": "m n", "completions": ["o"], "labels": [False]},
    {"prompt": "e e e", "completions": ["f f", "g", "h"], "labels": [True, True, True]},
]
ROWS: dict[str, list[dict[str, Any]]] = {
    "bradley_terry": PAIRS,
    "pairwise": RANKED,
    "plackett_luce": RANKED,
    "orm": OUTCOMES,
    "prm": STEPWISE,
}
# A learning rate at which three steps of plain gradient descent move the scores.
STEPS: dict[str, Any] = {
    "per_device_train_batch_size": 4,
    "max_steps": 3,
    "learning_rate": 0.1,
    "optim": "sgd",
    "max_grad_norm": 0.0,
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


def tiny_classifier(labels: int = 1, *, steps: bool = False, seed: int = 0, **config: Any) -> Any:
    """Two layers of width 32, whose scores differ from text to text."""
    sizes = {
        "vocab_size": 42, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
        "num_key_value_heads": 2, "max_position_embeddings": 64, "pad_token_id": 0, "bos_token_id": 1,
        "eos_token_id": 2, "num_labels": labels,
    }  # fmt: skip
    torch.manual_seed(seed)
    cls = LlamaForTokenClassification if steps else LlamaForSequenceClassification
    model = cls(LlamaConfig(**{**sizes, **config}))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 2:
                parameter.mul_(4.0)
    return model


def reward_trainer(folder: Path, *, trainer: dict[str, Any] | None = None, **config: Any) -> RewardTrainer:
    """Over the rows of `loss_type`, in order."""
    settings = {**STEPS, **config}
    kind = settings.get("loss_type", "bradley_terry")
    arguments = {
        "model": None,
        "train_dataset": ROWS.get(kind),
        "processing_class": make_tokenizer(),
        **(trainer or {}),
    }
    if arguments["model"] is None:
        arguments["model"] = tiny_classifier(2, steps=True) if kind == "prm" else tiny_classifier()
    args = (PRMConfig if kind == "prm" else RewardConfig)(str(folder / "run"), **settings)
    return (PRMTrainer if kind == "prm" else RewardTrainer)(args=args, **arguments)
