"""TRL's own RewardTrainer on the same pairs: the same gradients in three steps, the same metrics under the same names.
Run where TRL is installed; its absence is named at the end of the run."""

import inspect
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from datasets import Dataset
from dpo_runs import assert_same_gradients, run
from reward_runs import PAIRS, STEPS, reward_trainer, tiny_classifier
from tiny_runs import TEMPLATE, make_tokenizer

from fastrl.trainers.reward import RewardTrainer
from fastrl.trainers.reward_config import RewardConfig

trl = pytest.importorskip("trl")

PLAIN = [{key: value for key, value in row.items() if key != "margin"} for row in PAIRS]
IMPLICIT = [{"chosen": row["prompt"] + row["chosen"], "rejected": row["prompt"] + row["rejected"]} for row in PAIRS]


def chat(row: dict[str, Any]) -> dict[str, Any]:
    """With messages instead of texts."""
    answers = {name: [{"role": "assistant", "content": row[name]}] for name in ("chosen", "rejected")}
    return {"prompt": [{"role": "user", "content": row["prompt"]}], **answers}


CASES: dict[str, tuple[list[dict[str, Any]], dict[str, Any]]] = {
    "pairs": (PLAIN, {}),
    "margins, centered": (PAIRS, {"center_rewards_coefficient": 0.3}),
    "implicit prompt, long rows left out": (IMPLICIT, {"max_length": 7, "max_steps": 1}),
    "conversations, padded with the end token": ([chat(row) for row in PAIRS], {"pad_token": "</s>"}),
    "padded with the end token": (PLAIN, {"pad_token": "</s>", "gradient_accumulation_steps": 2}),
    "another end token": (PLAIN, {"eos_token": "<user>", "gradient_checkpointing": True}),
}


@pytest.mark.filterwarnings("ignore:`pad_token` is deprecated", "ignore:`gradient_checkpointing`")
@pytest.mark.parametrize("case", CASES)
def test_same_gradients_and_metrics(tmp_path: Path, case: str) -> None:
    rows, settings = CASES[case]
    shared = {"per_device_eval_batch_size": 16, **settings}

    def arguments() -> dict[str, Any]:
        tokenizer, data = make_tokenizer(), Dataset.from_list(rows)
        tokenizer.chat_template = TEMPLATE
        return {"processing_class": tokenizer, "train_dataset": data, "eval_dataset": data}

    ours = reward_trainer(tmp_path, trainer=arguments(), **shared)
    theirs = trl.RewardTrainer(
        tiny_classifier(), args=trl.RewardConfig(str(tmp_path / "trl"), **{**STEPS, **shared}), **arguments()
    )
    assert len(ours.train_dataset) == len(theirs.train_dataset)
    (grads, logs), (wanted, reference) = run(ours), run(theirs)
    for mine, gradients in zip(grads, wanted, strict=True):
        assert_same_gradients(mine, gradients)
    evaluated = {k: v for k, v in theirs.evaluate().items() if not k.endswith(("runtime", "per_second"))}
    averaged = {"min_reward", "max_reward"} if "gradient_accumulation_steps" in settings else set()
    for mine, theirs_ in [*zip(logs, reference, strict=True), (ours.evaluate(), evaluated)]:
        assert {"accuracy", "margin", "mean_reward"} <= {name.removeprefix("eval_") for name in theirs_}
        for name, value in theirs_.items():
            if name not in averaged:
                assert mine[name] == pytest.approx(value, rel=1e-4, abs=1e-5), name
    assert any(abs(log["margin"]) > 0.05 for log in logs)  # the scores differ


FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "learned positions": ("GPT2", {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64}),
    "a window of 4 tokens, padded rows": ("Mistral", {"sliding_window": 4}),
    "experts": ("Mixtral", {"num_local_experts": 4, "num_experts_per_tok": 2}),
}


@pytest.mark.parametrize("family", FAMILIES)
def test_other_families(tmp_path: Path, family: str) -> None:
    name, config = FAMILIES[family]
    cls = getattr(transformers, f"{name}ForSequenceClassification")
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    more = config if name == "GPT2" else {**sizes, "num_key_value_heads": 2, **config}
    special = {"vocab_size": 42, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "num_labels": 1}

    def arguments() -> dict[str, Any]:
        torch.manual_seed(0)
        model = cls(cls.config_class(**special, **more))
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.mul_(3.0)
        return {"model": model, "processing_class": make_tokenizer(), "train_dataset": Dataset.from_list(PAIRS)}

    (grads, logs), (wanted, reference) = (
        run(reward_trainer(tmp_path, trainer=arguments(), max_steps=1)),
        run(trl.RewardTrainer(args=trl.RewardConfig(str(tmp_path), **{**STEPS, "max_steps": 1}), **arguments())),
    )
    assert_same_gradients(grads[0], wanted[0])
    assert logs[0]["loss"] == pytest.approx(reference[0]["loss"], rel=1e-5)


def test_every_argument_of_trl_is_there_with_its_default() -> None:
    wanted, found = (
        {item.name: item.default for item in fields(config)} for config in (trl.RewardConfig, RewardConfig)
    )
    assert wanted.keys() <= found.keys()
    # its name in transformers 5 is activation_checkpointing
    assert {name for name in wanted if wanted[name] != found[name]} <= {"gradient_checkpointing"}
    assert RewardConfig(use_cpu=True).activation_checkpointing is True
    ours, theirs = (list(inspect.signature(t.__init__).parameters) for t in (RewardTrainer, trl.RewardTrainer))
    assert ours == theirs
