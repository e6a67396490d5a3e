"""RewardTrainer: each loss by its definition, one step whatever the split, what is saved, resuming, what is refused."""

import random
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset, IterableDataset
from dpo_runs import assert_same_gradients, run
from peft import LoraConfig, PeftModel
from reward_runs import OUTCOMES, PAIRS, RANKED, ROWS, STEPWISE, reward_trainer, tiny_classifier
from tiny_runs import TEMPLATE, make_tokenizer, tiny_model
from torch import Tensor
from torch.nn import functional as F
from transformers import AutoModelForSequenceClassification, AutoModelForTokenClassification, AutoTokenizer

from fastrl.rewards import RewardModel

CLOCK = ("per_second", "runtime", "preparation_time")
WHOLE: dict[str, Any] = {"per_device_train_batch_size": 8, "max_steps": 1}


def metrics_of(log: Mapping[str, Any]) -> dict[str, Any]:
    """Without what the clock decides."""
    return {name: value for name, value in log.items() if not any(part in name for part in (*CLOCK, "epoch", "step"))}


# Each loss by its definition -----------------------------------------------------------------------------------------


def scores_of(model: Any, text: str) -> Tensor:
    """The scores (T, C) of one text's tokens, by transformers alone."""
    ids = make_tokenizer()(text, return_tensors="pt")["input_ids"]
    return model.score(model.model(input_ids=ids).last_hidden_state)[0]


def of_text(model: Any, prompt: str, answer: str) -> Tensor:
    """The score of a text that ends with the end-of-sequence token."""
    return scores_of(model, prompt + answer + " </s>")[-1, 0]


def ranked_losses(model: Any, kind: str) -> Tensor:
    losses = []
    for row in RANKED:
        scores = [of_text(model, row["prompt"], answer) for answer in row["completions"]]
        answers, terms = list(zip(scores, row["ranks"], strict=True)), []
        for score, rank in answers if len(set(row["ranks"])) > 1 else []:
            if kind == "pairwise":
                worse = [F.logsigmoid(score - other) for other, its in answers if rank < its]
                terms += [term / (len(scores) * (len(scores) - 1) / 2) for term in worse]
            else:
                terms.append(score - torch.stack([other for other, its in answers if its >= rank]).logsumexp(0))
        losses += [-torch.stack(terms).sum()] if terms else []
    assert len(losses) == len(RANKED) - 1
    return torch.stack(losses).mean()


def outcome_loss(model: Any) -> Tensor:
    terms = []
    for row in OUTCOMES:
        scores = scores_of(model, row["prompt"] + row["completion"] + " </s>")[:, 0]
        answer = scores[len(row["prompt"].split()) :]
        terms.append(
            F.binary_cross_entropy_with_logits(answer, torch.full_like(answer, row["label"]), reduction="none")
        )
    return torch.cat(terms).mean()


def step_loss(model: Any) -> Tensor:
    """transformers' token classification loss on TRL's former tokenization, here with a separator of one token."""
    terms = []
    for row in STEPWISE:
        text, ends = f"<s> {row['prompt']}", []
        for step in row["completions"]:
            text += f" {step} ="
            ends.append(len(text.split()) - 1)
        labels = torch.tensor(row["labels"]).long()
        terms.append(F.cross_entropy(scores_of(model, text)[ends], labels, reduction="none"))
    return torch.cat(terms).mean()


@pytest.mark.parametrize("kind", ["pairwise", "plackett_luce", "orm", "prm"])
def test_loss_and_gradients_are_those_of_the_definition(tmp_path: Path, kind: str) -> None:
    settings: dict[str, Any] = {"step_separator": "="} if kind == "prm" else {}
    (grads,), (log,) = run(reward_trainer(tmp_path, loss_type=kind, **settings, **WHOLE))
    model = tiny_classifier(2, steps=True).eval() if kind == "prm" else tiny_classifier()
    loss = {"orm": outcome_loss, "prm": step_loss}.get(kind, lambda model: ranked_losses(model, kind))(model)
    loss.backward()
    assert log["loss"] == pytest.approx(loss.item(), rel=1e-5)
    wanted = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    assert_same_gradients(grads, wanted)


def test_a_ranking_of_two_is_a_pair(tmp_path: Path) -> None:
    rows = [{"prompt": r["prompt"], "completions": [r["rejected"], r["chosen"]], "scores": [0.1, 0.7]} for r in PAIRS]
    plain = [{name: row[name] for name in ("prompt", "chosen", "rejected")} for row in PAIRS]
    (wanted,), (log,) = run(reward_trainer(tmp_path, trainer={"train_dataset": plain}, **WHOLE))
    for kind in ("pairwise", "plackett_luce"):
        (grads,), (mine,) = run(reward_trainer(tmp_path, trainer={"train_dataset": rows}, loss_type=kind, **WHOLE))
        assert_same_gradients(grads, wanted)
        assert metrics_of(mine) == pytest.approx(metrics_of(log), rel=1e-5)


def test_three_classes_and_the_last_step_only(tmp_path: Path) -> None:
    rows = [{**row, "labels": [2 * label for label in row["labels"]]} for row in STEPWISE]
    trainer: Any = reward_trainer(
        tmp_path,
        trainer={"model": tiny_classifier(3, steps=True), "train_dataset": rows, "eval_dataset": rows},
        loss_type="prm",
        train_on_last_step_only=True,
        per_device_train_batch_size=8,
        max_steps=5,
    )
    assert [sum(row["loss_mask"][0]) for row in trainer.train_dataset] == [1] * len(rows)
    assert [sum(row["loss_mask"][0]) for row in trainer.eval_dataset] == [len(row["labels"]) for row in rows]
    assert {label for row in trainer.train_dataset for label in row["labels"]} == {-100, 0, 2}
    _, logs = run(trainer)
    assert logs[-1]["loss"] < logs[0]["loss"] - 0.1


def test_steps_are_cut_as_trl_cut_them(tmp_path: Path) -> None:
    """The prompt loses its beginning, the steps lose their end, and so does the whole."""
    limits: dict[str, Any] = {
        "max_prompt_length": 3,
        "max_completion_length": 6,
        "max_length": 9,
        "step_separator": "=",
    }
    trainer: Any = reward_trainer(tmp_path, loss_type="prm", **limits)
    tokenizer = make_tokenizer()
    for row, tokens in zip(STEPWISE, trainer.train_dataset, strict=True):
        prompt = ["<s>", *row["prompt"].split()][-3:]
        steps = [word for step in row["completions"] for word in (*step.split(), "<unk>")][:6]
        ids = tokens["prompt_ids"][0] + tokens["completion_ids"][0]
        assert tokenizer.convert_ids_to_tokens(ids) == [*prompt, *steps][:9]
        assert len(tokens["loss_mask"][0]) == len(tokens["labels"]) == len(tokens["completion_ids"][0]) + 1


# One optimizer step --------------------------------------------------------------------------------------------------

SPLITS: dict[str, dict[str, Any]] = {
    "accumulated": {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 4},
    "one at a time, padded": {
        "per_device_train_batch_size": 1,
        "gradient_accumulation_steps": 8,
        "share_prompts": False,
    },
    "small passes, recomputed": {"tokens_per_pass": 12, "gradient_checkpointing": True},
    "offloaded": {"tokens_per_pass": 40, "activation_offloading": True},
}


@pytest.mark.parametrize("kind", ROWS)
def test_any_split_gives_the_same_step(tmp_path: Path, kind: str) -> None:
    settings: dict[str, Any] = {"center_rewards_coefficient": 0.2} if kind == "bradley_terry" else {}
    (wanted,), (logged,) = run(reward_trainer(tmp_path, loss_type=kind, **settings, **WHOLE))
    for split in SPLITS.values():
        (grads,), (log,) = run(reward_trainer(tmp_path, loss_type=kind, **settings, **{**WHOLE, **split}))
        assert_same_gradients(grads, wanted)
        assert metrics_of(log) == pytest.approx(metrics_of(logged), rel=1e-4, abs=1e-5), split


def test_a_pair_meets_in_one_pass_and_its_prompt_runs_once(tmp_path: Path) -> None:
    rows = [{"prompt": "a b c d e f g h", "chosen": " i j", "rejected": " k"}] * 3
    trainer = reward_trainer(tmp_path, trainer={"train_dataset": rows}, tokens_per_pass=16)
    tokenized: Any = trainer.train_dataset
    batch: Any = trainer.data_collator([tokenized[i] for i in range(3)])
    assert batch.num_tokens == 3 * (8 + 3 + 8 + 2)
    passes = trainer.passes(batch)
    assert [sorted(part.sequences.tolist()) for part in passes] == [[0, 1], [2, 3], [4, 5]]
    assert {tuple(part.inputs["input_ids"].shape) for part in passes} == {(1, 8 + 3 + 2)}


@pytest.mark.parametrize("kind", ["bradley_terry", "plackett_luce", "orm", "prm"])
def test_evaluation_does_not_depend_on_the_batch_size(tmp_path: Path, kind: str) -> None:
    found = []
    for size in (8, 3):
        trainer = reward_trainer(
            tmp_path, trainer={"eval_dataset": ROWS[kind]}, loss_type=kind, per_device_eval_batch_size=size
        )
        found.append(metrics_of(trainer.evaluate()))
    assert found[0].keys() >= {"eval_loss", "eval_accuracy"}
    assert found[1] == pytest.approx(found[0], rel=1e-5, abs=1e-6)


def test_bf16_autocast(tmp_path: Path) -> None:
    (wanted,), (log,) = run(reward_trainer(tmp_path, **WHOLE))
    (grads,), (mine,) = run(reward_trainer(tmp_path, **{**WHOLE, "bf16": True}))
    assert mine["loss"] == pytest.approx(log["loss"], rel=0.02) and mine["loss"] != log["loss"]
    assert_same_gradients(grads, wanted, tolerance=0.1)


def test_an_adapter_with_the_score_layer(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    config: dict[str, Any] = {"r": 4, "target_modules": ["q_proj", "v_proj"]}
    saved = LoraConfig(**config, modules_to_save=["score"])
    trainer = reward_trainer(tmp_path, trainer={"peft_config": saved}, gradient_checkpointing=True)
    grads, _ = run(trainer)
    assert sum("score.modules_to_save" in name for name in grads[0]) == 1 and len(grads[0]) == 1 + 2 * 2 * 2
    trainer.save_model(str(tmp_path / "adapter"))
    loaded = PeftModel.from_pretrained(tiny_classifier(), str(tmp_path / "adapter"))
    ids = make_tokenizer()("a b c d", return_tensors="pt")["input_ids"]
    trained: Any = trainer.model
    with torch.no_grad():
        assert torch.equal(loaded.eval()(input_ids=ids).logits, trained.eval()(input_ids=ids).logits)
        assert not torch.equal(loaded(input_ids=ids).logits, tiny_classifier().eval()(input_ids=ids).logits)
    task = reward_trainer(
        tmp_path, trainer={"peft_config": LoraConfig(**config, task_type="SEQ_CLS")}
    )  # adds it itself
    assert any("score" in name for name in run(task)[0][0])


def test_a_score_layer_that_is_not_trained_is_noticed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    warned: list[str] = []
    monkeypatch.setattr("fastrl.trainers.reward.logger.warning", warned.append)
    reward_trainer(tmp_path, trainer={"peft_config": LoraConfig(r=2, target_modules=["q_proj"])})
    assert len(warned) == 1 and "modules_to_save=['score']" in warned[0]


# What is saved -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("pad_token", ["<pad>", "</s>"])
@pytest.mark.parametrize("kind", ["bradley_terry", "orm"])
def test_what_is_saved_scores_as_the_trainer_did(tmp_path: Path, kind: str, pad_token: str) -> None:
    """By transformers alone, with padding, and as a reward function, which adds the end token itself."""
    trainer = reward_trainer(tmp_path, trainer={"eval_dataset": ROWS[kind]}, loss_type=kind, pad_token=pad_token)
    trainer.train()
    trainer.save_model(str(tmp_path / "saved"))
    if kind == "orm":
        prompts, answers = ([row[name] for row in OUTCOMES] for name in ("prompt", "completion"))
    else:
        prompts = [row["prompt"] for row in PAIRS] * 2
        answers = [row["chosen"] for row in PAIRS] + [row["rejected"] for row in PAIRS]
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "saved")
    model = AutoModelForSequenceClassification.from_pretrained(tmp_path / "saved")
    assert type(model).__name__ == "LlamaForSequenceClassification" and model.config.num_labels == 1
    texts = [prompt + answer + " </s>" for prompt, answer in zip(prompts, answers, strict=True)]
    with torch.no_grad():
        plain = model.eval()(**tokenizer(texts, padding=True, return_tensors="pt")).logits[:, 0]
    metrics = trainer.evaluate()
    assert metrics["eval_mean_reward"] == pytest.approx(plain.mean().item(), rel=1e-5)
    assert metrics["eval_min_reward"] == pytest.approx(plain.min().item(), rel=1e-5)
    assert metrics["eval_max_reward"] == pytest.approx(plain.max().item(), rel=1e-5)
    assert plain.max() - plain.min() > 0.1
    if kind == "bradley_terry":
        chosen, rejected = plain.chunk(2)
        assert metrics["eval_accuracy"] == (chosen > rejected).float().mean().item()
        assert metrics["eval_margin"] == pytest.approx((chosen - rejected).mean().item(), rel=1e-5)
    reward = RewardModel(str(tmp_path / "saved"), device="cpu", batch_size=3)
    assert reward(prompts, answers) == pytest.approx(plain.tolist(), rel=1e-5)
    other = RewardModel(tiny_classifier(), make_tokenizer())
    assert not other.complete_texts and reward.complete_texts


def test_a_process_reward_model_is_a_token_classifier(tmp_path: Path) -> None:
    trainer = reward_trainer(tmp_path, loss_type="prm", step_separator="=")
    trainer.train()
    trainer.save_model(str(tmp_path / "saved"))
    model = AutoModelForTokenClassification.from_pretrained(tmp_path / "saved").eval()
    with torch.no_grad():
        assert trainer.evaluate(STEPWISE)["eval_loss"] == pytest.approx(step_loss(model).item(), rel=1e-5)


# Learning ------------------------------------------------------------------------------------------------------------


def test_it_learns_what_people_like(tmp_path: Path) -> None:
    """The answer with more letters before n, of texts never seen."""
    letters = random.Random(0)

    def answer() -> str:
        return "".join(f" {letters.choice('abcdefghijklmnopqrstuvwxyz')}" for _ in range(letters.randint(3, 8)))

    def row() -> dict[str, str]:
        pair = sorted([answer(), answer()], key=lambda text: sum(word < "n" for word in text.split()))
        return {"prompt": "x y", "chosen": pair[1], "rejected": pair[0]}

    def clear(rows: int) -> list[dict[str, str]]:
        made: list[dict[str, str]] = []
        while len(made) < rows:
            new = row()
            good, bad = (sum(word < "n" for word in new[side].split()) for side in ("chosen", "rejected"))
            made += [new] if good > bad else []
        return made

    trainer = reward_trainer(
        tmp_path,
        trainer={"train_dataset": clear(480), "eval_dataset": clear(200)},
        per_device_train_batch_size=16,
        max_steps=60,
        optim="adamw_torch",
        learning_rate=3e-3,
        logging_steps=30,
    )
    before = trainer.evaluate()["eval_accuracy"]
    trainer.train()
    after = trainer.evaluate()["eval_accuracy"]
    assert before < 0.75 and after > 0.9, (before, after)


# Data and what is refused --------------------------------------------------------------------------------------------


def test_tokenized_pairs_are_taken_as_they_are(tmp_path: Path) -> None:
    tokenizer = make_tokenizer()
    ids = {
        f"{side}_ids": [tokenizer(row["prompt"] + row[side] + " </s>")["input_ids"] for row in PAIRS]
        for side in ("chosen", "rejected")
    }
    plain = [{name: row[name] for name in ("prompt", "chosen", "rejected")} for row in PAIRS]
    (wanted,), (log,) = run(reward_trainer(tmp_path, trainer={"train_dataset": plain}, **WHOLE))
    (grads,), (mine,) = run(reward_trainer(tmp_path, trainer={"train_dataset": Dataset.from_dict(ids)}, **WHOLE))
    assert_same_gradients(grads, wanted)
    assert metrics_of(mine) == pytest.approx(metrics_of(log), rel=1e-5)


@pytest.mark.parametrize(
    "wrong, message",
    [
        ({"rows": [{"prompt": "a", "chosen": " b"}]}, "train_dataset: row 0: no 'rejected'; it has 'prompt', 'chosen'"),
        ({"rows": [{"prompt": "a", "completions": [" b"]}], "loss_type": "pairwise"}, "row 0: .* at least two, got 1"),
        ({"rows": [{"prompt": "a", "completion": " b"}], "loss_type": "orm"}, "row 0: no 'label'"),
        ({"rows": [{**STEPWISE[0], "labels": [0, 1, 2]}], "loss_type": "prm"}, "row 0: label 2: expected one of 0, 1,"),
        ({"rows": [{**STEPWISE[0], "labels": [True]}], "loss_type": "prm"}, "row 0: 1 labels for 3 steps"),
        ({"rows": [{"input_ids": [5, 6], "labels": [1]}], "loss_type": "prm"}, "row 0: 2 input_ids, but 1 labels"),
        ({"rows": []}, "train_dataset: the dataset is empty"),
        ({"rows": PAIRS, "eval_dataset": []}, "eval_dataset: the dataset is empty"),
        ({"rows": IterableDataset.from_generator(lambda: iter(PAIRS))}, "train_dataset: streamed"),
        ({"max_length": 2}, "no row has a token to train on"),
        ({"max_length": None, "rows": [{**PAIRS[0], "prompt": "a " * 70}]}, "row 0: .* context of 64; set"),
        ({"loss_type": "mse"}, "loss_type: expected one of bradley_terry, .* orm, prm, got 'mse'"),
        ({"loss_type": "orm", "center_rewards_coefficient": 0.1}, "only loss_type 'bradley_terry' has a use for it"),
        ({"max_prompt_length": 3}, "max_prompt_length: expected None: only loss_type 'prm' has a use for it, got 3"),
        ({"model_init_kwargs": {"num_labels": 2}}, "model_init_kwargs: num_labels=1, a reward model has one score"),
        ({"model": tiny_classifier(2)}, "'bradley_terry' expects num_labels to be 1, got 2"),
        ({"model": tiny_classifier(1, steps=True), "loss_type": "prm"}, "num_labels to be two or more, got 1"),
        ({"model": tiny_model()}, "needs a sequence classifier .*, got LlamaForCausalLM"),
        ({"model": tiny_classifier(), "loss_type": "prm"}, "needs a token classifier .* got LlamaForSequenceClassif"),
        ({"pad_token": "<nope>"}, "pad_token: '<nope>' is not in the vocabulary"),
        ({"eos_token": "<nope>"}, "eos_token: '<nope>' is not in the vocabulary"),
        ({"compute_metrics": print}, "compute_metrics: not supported: evaluation keeps no scores"),
        ({"data_collator": print}, "data_collator: not supported"),
    ],
)  # fmt: skip
def test_what_cannot_work_is_named(tmp_path: Path, wrong: dict[str, Any], message: str) -> None:
    wrong = dict(wrong)
    arguments = {"train_dataset": wrong.pop("rows")} if "rows" in wrong else {}
    for name in ("model", "eval_dataset", "compute_metrics", "data_collator"):
        if name in wrong:
            arguments[name] = wrong.pop(name)
    with pytest.raises((ValueError, TypeError), match=message):
        reward_trainer(tmp_path, trainer=arguments, **wrong)


SCRIPT = """
from datasets import load_dataset
from peft import LoraConfig
from trl import RewardConfig, RewardTrainer

dataset = load_dataset("json", data_files="{data}", split="train")
training_args = RewardConfig(
    "{output}", center_rewards_coefficient=0.01, max_length=32, per_device_train_batch_size=2, num_train_epochs=2,
    learning_rate=1e-3, logging_steps=1, eval_strategy="epoch", report_to="none", use_cpu=True, bf16=False,
)
trainer = RewardTrainer(
    model="{model}",
    args=training_args,
    train_dataset=dataset,
    eval_dataset=dataset,
    peft_config=LoraConfig(r=4, task_type="SEQ_CLS"),
)
trainer.train()
trainer.save_model("{output}")
"""


def test_a_script_of_trl_runs_with_another_import(tmp_path: Path) -> None:
    """The model is a causal LM, as in TRL's documentation."""
    tokenizer = make_tokenizer()
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(tmp_path / "model")
    tiny_model().save_pretrained(tmp_path / "model")
    user, good, bad = (
        {"role": r, "content": c} for r, c in (("user", "a b"), ("assistant", "c"), ("assistant", "d e"))
    )
    Dataset.from_list([{"chosen": [user, good], "rejected": [user, bad]}] * 6).to_json(tmp_path / "data.jsonl")
    paths = {"data": tmp_path / "data.jsonl", "output": tmp_path / "output", "model": tmp_path / "model"}
    script = SCRIPT.format(**paths).replace(
        "from trl import RewardConfig, RewardTrainer",
        "from fastrl.trainers.reward import RewardTrainer\nfrom fastrl.trainers.reward_config import RewardConfig",
    )
    found: dict[str, Any] = {}
    exec(script, found)
    losses = [log["eval_loss"] for log in found["trainer"].state.log_history if "eval_loss" in log]
    assert len(losses) == 2 and losses[1] < losses[0]
    prompts, answers = [[user]] * 2, [[good], [bad]]
    reward = RewardModel(str(tmp_path / "output"), device="cpu")  # an adapter
    chosen, rejected = reward(prompts, answers)
    assert chosen - rejected == pytest.approx(found["trainer"].evaluate()["eval_margin"], rel=1e-5)
    assert reward.complete_texts


# Resuming ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["pairwise", "prm"])
def test_resumed_run_equals_the_uninterrupted_one(tmp_path: Path, kind: str) -> None:
    settings: dict[str, Any] = {
        "loss_type": kind,
        "max_steps": 6,
        "logging_steps": 2,
        "train_sampling_strategy": "random",
    }
    saving: dict[str, Any] = {"save_strategy": "steps", "save_steps": 3}  # between two logs
    straight, cut = reward_trainer(tmp_path / "straight", **settings), reward_trainer(tmp_path, **settings, **saving)
    _, logs = run(straight)
    cut.train()
    shutil.rmtree(tmp_path / "run" / "checkpoint-6")
    resumed = reward_trainer(tmp_path, **settings, **saving)
    resumed.train(resume_from_checkpoint=True)
    again = [log for log in resumed.state.log_history if "loss" in log]
    assert [metrics_of(log) for log in again] == [metrics_of(log) for log in logs] and len(logs) == 3
    for mine, theirs in zip(resumed.model.parameters(), straight.model.parameters(), strict=True):
        assert torch.equal(mine, theirs)
