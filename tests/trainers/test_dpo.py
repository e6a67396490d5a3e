"""DPOTrainer: one step whatever the split, every kind of reference, KTO, methods without one, what is refused."""

import random
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset, IterableDataset
from dpo_runs import PAIRS, assert_same_gradients, dpo_trainer, run
from peft import LoraConfig, get_peft_model
from tiny_runs import TEMPLATE, WORDS, make_tokenizer, tiny_model

from fastrl.objectives import kto_loss

LORA: dict[str, Any] = {"r": 4, "target_modules": ["q_proj", "v_proj"], "lora_dropout": 0.0}
UNPAIRED: list[dict[str, Any]] = [
    {"prompt": p["prompt"], "completion": p["chosen"] if i % 3 else p["rejected"], "label": bool(i % 3)}
    for i, p in enumerate(PAIRS)
]


def moved(seed: int = 1) -> Any:
    """The tiny model with other weights."""
    model = tiny_model()
    torch.manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.02 * torch.randn_like(parameter))
    return model


# One optimizer step --------------------------------------------------------------------------------------------------

SPLITS: dict[str, dict[str, Any]] = {
    "accumulated": {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 4},
    "one at a time, padded": {
        "per_device_train_batch_size": 1,
        "gradient_accumulation_steps": 8,
        "share_prompts": False,
    },
    "small passes, recomputed": {"tokens_per_pass": 12, "gradient_checkpointing": True},
    "larger passes, padded": {"share_prompts": False, "tokens_per_pass": 48},
}


@pytest.mark.parametrize(
    "settings",
    [
        {"loss_type": ["sigmoid", "sft"], "loss_weights": [1.0, 0.3]},
        {"loss_type": "ipo", "ld_alpha": 0.4, "use_weighting": True},
        {"loss_type": "kto"},
        {"loss_type": "simpo", "beta": 2.0},
        {"loss_type": "tpo-l"},
    ],
    ids=lambda settings: str(settings["loss_type"]),
)
def test_any_split_gives_the_same_step(tmp_path: Path, settings: dict[str, Any]) -> None:
    reference = {} if settings["loss_type"] in ("simpo", "tpo-l") else {"ref_model": moved()}
    kto = settings["loss_type"] == "kto"

    def step(**split: Any) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
        rows = {"train_dataset": UNPAIRED} if kto else {}
        config = {"per_device_train_batch_size": 8, "max_steps": 1, **settings, **split}
        (grads,), (log,) = run(dpo_trainer(tmp_path, trainer={**reference, **rows}, **config))
        return grads, log

    wanted, logged = step()
    assert max(float(grad.abs().max()) for grad in wanted.values()) > 1e-3
    for split in SPLITS.values():
        grads, log = step(**split)
        assert_same_gradients(grads, wanted)
        for name, value in logged.items():
            if name not in ("epoch", "step", "tokens_per_second"):
                assert log[name] == pytest.approx(value, rel=1e-4, abs=1e-5), (split, name)


def test_a_pair_is_never_split_and_its_prompt_runs_once(tmp_path: Path) -> None:
    rows = [{"prompt": "a b c d e f g h", "chosen": " i j", "rejected": " k"}] * 3
    trainer = dpo_trainer(tmp_path, trainer={"train_dataset": rows}, tokens_per_pass=12)
    tokenized: Any = trainer.train_dataset
    batch: Any = trainer.data_collator([tokenized[i] for i in range(3)])
    passes = trainer.passes(batch)
    assert [sorted(part.sequences.tolist()) for part in passes] == [[0, 1], [2, 3], [4, 5]]
    # The last token of a sequence is never an input: 8 of the prompt, i and j, k.
    assert {tuple(part.inputs["input_ids"].shape) for part in passes} == {(1, 8 + 2 + 1)}


def test_kto_against_its_formula(tmp_path: Path) -> None:
    """Gradients with the KL of mismatched answers, from forwards of single sequences."""
    model, other, tokenizer = tiny_model(), moved(), make_tokenizer()
    trainer: Any = dpo_trainer(
        tmp_path,
        trainer={"model": tiny_model(), "ref_model": moved(), "train_dataset": UNPAIRED},
        loss_type="kto",
        per_device_train_batch_size=8,
        max_steps=1,
    )

    def logps(network: Any, prompt: str, answer: str) -> torch.Tensor:
        ids = tokenizer(prompt + answer + " </s>", return_tensors="pt")["input_ids"]
        first = len(tokenizer(prompt)["input_ids"])
        scores = network(input_ids=ids).logits[0, :-1].log_softmax(-1)
        return scores.gather(-1, ids[0, 1:, None])[first - 1 :].sum()

    prompts, answers = ([row[name] for row in UNPAIRED] for name in ("prompt", "completion"))
    with torch.no_grad():
        before = torch.stack([logps(other, *row) for row in zip(prompts, answers, strict=True)])
        wrong = [*zip(prompts, [answers[-1], *answers[:-1]], strict=True)]
        kl = torch.stack([logps(model, *row) - logps(other, *row) for row in wrong]).mean()
    now = torch.stack([logps(model, *row) for row in zip(prompts, answers, strict=True)])
    labels = torch.tensor([row["label"] for row in UNPAIRED])
    out = kto_loss(
        now[:, None], trainer.objective, labels=labels, mask=torch.ones(8, 1), ref_logps=before, kl=kl
    )  # fmt: skip
    out.loss.backward()
    (grads,), (log,) = run(trainer)
    assert_same_gradients(grads, {name: p.grad for name, p in model.named_parameters() if p.grad is not None})
    assert log["loss"] == pytest.approx(out.loss.item(), rel=1e-5)
    assert log["kl"] == pytest.approx(max(kl.item(), 0.0), rel=1e-4) and log["kl"] != 0


def test_evaluation_does_not_depend_on_the_batch_size(tmp_path: Path) -> None:
    found = []
    for size in (8, 3):
        trainer = dpo_trainer(
            tmp_path,
            trainer={"eval_dataset": PAIRS, "ref_model": moved()},
            loss_type=["sigmoid", "sft"],
            per_device_eval_batch_size=size,
        )
        found.append({k: v for k, v in trainer.evaluate().items() if not k.endswith(("runtime", "per_second"))})
    assert found[0].keys() >= {"eval_loss", "eval_rewards/accuracies", "eval_mean_token_accuracy", "eval_nll_loss"}
    weight = {"eval_loss": 1e-2}  # an NLL is averaged over the tokens of a batch
    for name, value in found[0].items():
        assert found[1][name] == pytest.approx(value, rel=weight.get(name, 1e-5), abs=1e-6), name


# References ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("settings", [{"ld_alpha": 0.3}, {"loss_type": "kto"}], ids=["dpo", "kto"])
def test_precomputed_reference_gives_the_same_steps(tmp_path: Path, settings: dict[str, Any]) -> None:
    plain = dpo_trainer(tmp_path, trainer={"eval_dataset": PAIRS}, **settings)
    before = dpo_trainer(
        tmp_path,
        trainer={"eval_dataset": {"one": PAIRS, "two": PAIRS[:3]}},
        precompute_ref_log_probs=True,
        precompute_ref_batch_size=3,
        **settings,
    )
    assert before.reference is not None and before.reference.model is None
    (wanted, logs), (grads, logged) = run(plain), run(before)
    for step, gradients in enumerate(wanted):
        assert_same_gradients(grads[step], gradients)
        assert logged[step]["loss"] == pytest.approx(logs[step]["loss"], rel=1e-5)
    metrics, mine = plain.evaluate(), before.evaluate()
    assert mine["eval_one_loss"] == pytest.approx(metrics["eval_loss"], rel=1e-5)
    with pytest.raises(ValueError, match="precompute_ref_log_probs keeps no reference"):
        before.evaluate(PAIRS)


def test_reference_of_a_new_adapter_is_the_model_without_it(tmp_path: Path) -> None:
    config = LoraConfig(**LORA, init_lora_weights=False)  # B is not 0: policy and reference differ from the start
    adapter = dpo_trainer(tmp_path, trainer={"peft_config": config})
    given = dpo_trainer(tmp_path, trainer={"peft_config": config, "ref_model": tiny_model()})
    (grads, logs), (wanted, reference) = run(adapter), run(given)
    for mine, theirs in zip(grads, wanted, strict=True):
        assert_same_gradients(mine, theirs)
    assert logs[0]["rewards/margins"] == pytest.approx(reference[0]["rewards/margins"], rel=1e-4)
    assert abs(logs[0]["rewards/margins"]) > 1e-4


def test_reference_of_an_old_adapter_is_what_it_was(tmp_path: Path) -> None:
    torch.manual_seed(3)
    model = get_peft_model(tiny_model(), LoraConfig(**LORA, init_lora_weights=False))
    names = [name for name, p in model.named_parameters() if p.requires_grad]
    trainer = dpo_trainer(tmp_path, trainer={"model": model})
    grads, logs = run(trainer)
    assert logs[0]["rewards/margins"] == pytest.approx(0.0, abs=1e-6)  # the adapter counts as the reference
    assert abs(logs[2]["rewards/margins"]) > 0.01
    assert sorted(grads[0]) == sorted(names) and all(p.is_leaf for p in model.parameters())


@pytest.mark.parametrize(
    "settings",
    [{"sync_ref_model": True, "ref_model_sync_steps": 2}, {"loss_type": "kto"}, {"precompute_ref_log_probs": True}],
    ids=["moving reference", "kto", "precomputed"],
)
def test_resumed_run_equals_the_uninterrupted_one(tmp_path: Path, settings: dict[str, Any]) -> None:
    settings = {**settings, "max_steps": 6, "learning_rate": 0.1}
    saving: dict[str, Any] = {"save_strategy": "steps", "save_steps": 3}
    straight, cut = dpo_trainer(tmp_path / "straight", **settings), dpo_trainer(tmp_path, **settings, **saving)
    _, logs = run(straight)
    cut.train()
    shutil.rmtree(tmp_path / "run" / "checkpoint-6")
    resumed = dpo_trainer(tmp_path, **settings, **saving)
    resumed.train(resume_from_checkpoint=True)
    assert resumed.state.log_history[5]["loss"] == logs[5]["loss"] != logs[2]["loss"]
    for mine, theirs in zip(resumed.model.parameters(), straight.model.parameters(), strict=True):
        assert torch.equal(mine, theirs)


def test_methods_without_a_reference_make_none(tmp_path: Path) -> None:
    for settings in ({"loss_type": "simpo"}, {"loss_type": "orpo"}, {"loss_type": "sft"}, {"reference_free": True}):
        assert dpo_trainer(tmp_path, **settings).reference is None
    with pytest.raises(ValueError, match="ref_model: simpo has no reference"):
        dpo_trainer(tmp_path, trainer={"ref_model": tiny_model()}, loss_type="simpo")


# The watch -----------------------------------------------------------------------------------------------------------


def alike(pairs: int) -> list[dict[str, str]]:
    """Two answers that differ in their first token."""
    letters = random.Random(0)

    def words(count: int) -> str:
        return "".join(f" {letters.choice(WORDS[6:])}" for _ in range(count))

    made = []
    for _ in range(pairs):
        prompt, end = words(3), words(6)
        made.append({"prompt": prompt.strip(), "chosen": words(1) + end, "rejected": words(1) + end})
    return made


def test_falling_likelihood_is_seen_and_an_argument_helps(tmp_path: Path) -> None:
    """DPO pushes both answers down where they are alike; the watch warns and names what helps."""
    rows, model = alike(8), tiny_model()
    swapped = [{"prompt": r["prompt"], "chosen": r["rejected"], "rejected": r["chosen"]} for r in rows]
    learned = {"loss_type": "sft", "optim": "adamw_torch", "learning_rate": 1e-2, "max_steps": 60}
    run(dpo_trainer(tmp_path, trainer={"model": model, "train_dataset": rows + swapped}, **learned))
    weights = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    settings = {"max_steps": 40, "per_device_train_batch_size": 8, "learning_rate": 0.2}

    def trained(**remedy: float) -> dict[str, Any]:
        model.load_state_dict(weights)
        trainer = dpo_trainer(tmp_path, trainer={"model": model, "train_dataset": rows}, **settings, **remedy)
        trainer.watch.window = 10
        log: dict[str, Any] = run(trainer)[1][-1]
        return log

    with pytest.warns(UserWarning, match="have become less likely.*rpo_alpha=1.0"):
        log = trained()
    assert log["chosen_likelihood_falls"] == 1 and log["logps/chosen_change"] < 0 < log["rewards/margins_change"]
    helped = trained(rpo_alpha=1.0)
    assert helped["chosen_likelihood_falls"] == 0 and helped["logps/chosen"] > log["logps/chosen"] + 1


# Data and what is refused --------------------------------------------------------------------------------------------


def chat(*turns: str) -> list[dict[str, str]]:
    return [{"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(turns)]


def test_conversations_with_an_implicit_prompt(tmp_path: Path) -> None:
    rows = [
        {"chosen": chat("a b", "c d"), "rejected": chat("a b", "e")},
        {"chosen": chat("f", "g"), "rejected": chat("f", "h")},
    ]
    tokenizer = make_tokenizer()
    tokenizer.chat_template = TEMPLATE
    for loss_type, length in (("sigmoid", 2), ("kto", 4)):
        trainer: Any = dpo_trainer(
            tmp_path,
            trainer={"train_dataset": Dataset.from_list(rows), "processing_class": tokenizer},
            loss_type=loss_type,
        )
        assert len(trainer.train_dataset) == length
        row = trainer.train_dataset[0]
        assert tokenizer.decode(row["prompt_ids"][0]) == "<user> a b <assistant>"
        assert tokenizer.decode(row["completion_ids"][0]) == "c d"
    assert [trainer.train_dataset[i]["label"] for i in range(4)] == [True, True, False, False]
    assert [tokenizer.decode(trainer.train_dataset[i]["completion_ids"][1]) for i in range(4)] == ["h", "c d", "g", "e"]


@pytest.mark.parametrize(
    "wrong, message",
    [
        ({"rows": [{"prompt": "a", "chosen": " b"}]}, "train_dataset: row 0: no 'rejected'; it has 'prompt', 'chosen'"),
        ({"rows": []}, "train_dataset: the dataset is empty"),
        ({"rows": PAIRS, "eval_dataset": []}, "eval_dataset: the dataset is empty"),
        ({"rows": IterableDataset.from_generator(lambda: iter(PAIRS))}, "train_dataset: streamed"),
        ({"rows": [{"chosen": chat("a", "b"), "rejected": chat("a", "c")}]}, "row 0: .*no chat template"),
        ({"rows": [{"prompt": "a b c d", "chosen": " e", "rejected": " f"}], "max_length": 3}, "no row has a token"),
        ({"rows": [{"prompt": "a " * 70, "chosen": " e", "rejected": " f"}]}, "row 0: .* context of 64; set"),
        ({"rows": [{"prompt": "a", "completion": " b"}], "loss_type": "kto"}, "row 0: no 'label'"),
        ({"rows": [*PAIRS, {"prompt": "a", "chosen": " b"}], "loss_type": "kto"}, "row 8: no 'rejected'"),
        ({"rows": [{**PAIRS[0], "reference": None}], "loss_type": "tpo"}, "row 0: no 'reference'"),
        ({"loss_type": "mse"}, r"loss_type: expected some of sigmoid, .* got \['mse'\]"),
        ({"loss_type": ["simpo", "sigmoid"]}, "loss_type: expected simpo alone"),
        ({"simpo_gamma": 1.0}, "simpo_gamma: expected 0.5: sigmoid has no use for it, got 1.0"),
        ({"loss_type": "orpo", "label_smoothing": 0.1}, "label_smoothing: expected 0.0: orpo has no use for it"),
        ({"loss_type": "kto", "per_device_train_batch_size": 1}, "per_device_train_batch_size: kto compares"),
        ({"loss_type": "simpo", "precompute_ref_log_probs": True}, "precompute_ref_log_probs: expected False, simpo"),
        ({"sync_ref_model": True, "precompute_ref_log_probs": True}, "sync_ref_model: not with precompute"),
        ({"peft_config": LoraConfig(**LORA), "sync_ref_model": True}, "sync_ref_model: not with an adapter"),
        ({"truncation_mode": "middle"}, "truncation_mode: expected 'keep_start', 'keep_end', got 'middle'"),
        ({"pad_token": "<nope>"}, "pad_token: '<nope>' is not in the vocabulary"),
        ({"ref_model": "a path"}, "ref_model: expected a transformers model, got str"),
        ({"compute_metrics": print}, "compute_metrics: not supported: it needs the logits"),
        ({"data_collator": print}, "data_collator: not supported"),
    ],
)  # fmt: skip
def test_what_cannot_work_is_named(tmp_path: Path, wrong: dict[str, Any], message: str) -> None:
    arguments = {"train_dataset": wrong.pop("rows", PAIRS)}
    for name in ("eval_dataset", "peft_config", "ref_model", "compute_metrics", "data_collator"):
        if name in wrong:
            arguments[name] = wrong.pop(name)
    with pytest.raises((ValueError, TypeError), match=message):
        dpo_trainer(tmp_path, trainer=arguments, **wrong)


SCRIPT = """
from datasets import load_dataset
from {module} import DPOConfig, DPOTrainer

train_dataset = load_dataset("json", data_files="{data}", split="train")

trainer = DPOTrainer(
    model="{model}",
    args=DPOConfig("{output}", report_to="none", use_cpu=True, bf16=False),
    train_dataset=train_dataset,
)
trainer.train()
"""


def test_the_script_of_trls_documentation(tmp_path: Path) -> None:
    """Model and dataset are small; nothing else is changed but the import."""
    tokenizer = make_tokenizer()
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(tmp_path / "model")
    tiny_model().save_pretrained(tmp_path / "model")
    rows = [{"chosen": chat("a b", "c d"), "rejected": chat("a b", "e")} for _ in range(4)]
    Dataset.from_list(rows).to_json(tmp_path / "data.jsonl")
    script = SCRIPT.format(
        module="fastrl",
        data=tmp_path / "data.jsonl",
        model=tmp_path / "model",
        output=tmp_path / "output",
    )
    found: dict[str, Any] = {}
    exec(script, found)
    assert found["trainer"].state.global_step == 3
