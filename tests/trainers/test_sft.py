"""SFTTrainer: the loss and gradients of an eager forward with labels, whatever the split, the packing and the model."""

import dataclasses
import inspect
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset, IterableDataset
from peft import LoraConfig, get_peft_model
from tiny_runs import WORDS, GradientRecorder, make_tokenizer, tiny_model
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, CohereConfig, Gemma2Config, GraniteConfig, MixtralConfig

from fastrl.trainers.activation_offloading import OffloadedActivations
from fastrl.trainers.sft import SFTTrainer
from fastrl.trainers.sft_config import SFTConfig

TEXTS = ["a b c d", "e", "f g h i j k l m", "n o", "p q r s t u", "v w x y z 0 1 2 3 4", "5 6", "7 8 9"]
PAIRS = [
    {"prompt": "a b", "completion": " c d"},
    {"prompt": "e", "completion": " f g h i"},
    {"prompt": "j k l m n", "completion": " o"},
    {"prompt": "a b", "completion": " p q r"},
]
MARKED = (  # a chat template that marks what the assistant says
    "{% for m in messages %}<{{ m['role'] }}> {% if m['role'] == 'assistant' %}{% generation %}{{ m['content'] }} </s>"
    "{% endgeneration %} {% else %}{{ m['content'] }} {% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<assistant> {% endif %}"
)

Make = Callable[..., SFTTrainer]
Text = tuple[list[int], list[int]]  # ids and labels


def chat(*turns: str) -> list[dict[str, str]]:
    """User and assistant by turns."""
    return [{"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(turns)]


@pytest.fixture
def make(tmp_path: Path) -> Make:
    """`make(model, rows, **config)`: one step over four rows, in order."""

    def make(
        model: Any = None, rows: Any = None, *, trainer: dict[str, Any] | None = None, **config: Any
    ) -> SFTTrainer:
        settings: dict[str, Any] = {
            "per_device_train_batch_size": 4,
            "max_steps": 1,
            "learning_rate": 1e-2,
            "logging_steps": 1,
            "save_strategy": "no",
            "report_to": "none",
            "disable_tqdm": True,
            "gradient_checkpointing": False,
            "use_cpu": True,
            "max_grad_norm": 0.0,
            "train_sampling_strategy": "sequential",
            **config,
        }
        return SFTTrainer(
            tiny_model() if model is None else model,
            SFTConfig(str(tmp_path / "run"), **settings),
            train_dataset=[{"text": text} for text in TEXTS] if rows is None else rows,
            **{"processing_class": make_tokenizer(), **(trainer or {})},
        )

    return make


def trained(trainer: SFTTrainer) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The gradient before the first step, and what that step logged."""
    recorder = GradientRecorder()
    trainer.add_callback(recorder)
    trainer.train()
    return recorder.grads[0], trainer.state.log_history[0]


def texts_of(texts: list[str]) -> list[Text]:
    ids = [make_tokenizer()(text + " </s>")["input_ids"] for text in texts]
    return [(row, row) for row in ids]


def eager(model: nn.Module, texts: list[Text], dft: bool = False) -> tuple[Tensor, dict[str, Tensor]]:
    """The mean loss over all labels and its gradient, from a forward of each text alone."""
    terms, count = [], 0
    model.train()
    for ids, labels in texts:
        logits = model(input_ids=torch.tensor([ids])).logits[0, :-1].float()
        wanted = torch.tensor(labels[1:])
        loss = nn.functional.cross_entropy(logits, wanted, ignore_index=-100, reduction="none")
        terms.append((loss * (-loss.detach()).exp() if dft else loss).sum())
        count += int((wanted != -100).sum())
    loss = torch.stack(terms).sum() / count
    names, parameters = zip(*[(n, p) for n, p in model.named_parameters() if p.requires_grad], strict=True)
    return loss.detach(), dict(zip(names, torch.autograd.grad(loss, parameters), strict=True))


def assert_same(grads: dict[str, Tensor], wanted: dict[str, Tensor], tolerance: float = 2e-5) -> None:
    assert grads.keys() == wanted.keys()
    for name, want in wanted.items():
        torch.testing.assert_close(
            grads[name], want, rtol=tolerance, atol=tolerance * float(want.abs().max()), msg=name
        )


# Loss and gradients --------------------------------------------------------------------------------------------------

SMALL = {
    "vocab_size": len(WORDS), "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 64, "pad_token_id": 0,
    "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
FAMILIES = {
    "gemma2": lambda: Gemma2Config(**SMALL, head_dim=8, final_logit_softcapping=3.0, attn_implementation="eager"),
    "cohere": lambda: CohereConfig(**SMALL, logit_scale=0.25),
    "granite": lambda: GraniteConfig(**SMALL, logits_scaling=3.0),
    "llama_tied": lambda: tiny_model(tie_word_embeddings=True).config,
    "llama": lambda: tiny_model().config,
}


def random_model(family: str) -> Any:
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(FAMILIES[family]())
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 2:
                parameter.mul_(4.0)
    return model


@pytest.mark.parametrize("family", FAMILIES)
def test_equals_an_eager_forward_with_labels(make: Make, family: str) -> None:
    want, wanted = eager(random_model(family), texts_of(TEXTS[:4]))
    grads, log = trained(make(random_model(family)))
    torch.testing.assert_close(torch.tensor(log["loss"]), want, rtol=1e-5, atol=0)
    assert_same(grads, wanted)
    assert log["num_tokens"] == sum(len(ids) for ids, _ in texts_of(TEXTS[:4]))


SPLITS: dict[str, dict[str, Any]] = {
    "accumulation": {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 4},
    "small passes": {"tokens_per_pass": 6},
    "padded, small passes": {"share_prompts": False, "tokens_per_pass": 12},
    "checkpointing": {"gradient_checkpointing": True},
    "reference": {"loss_backend": "reference"},
}


@pytest.mark.parametrize("rows", ["texts", "pairs"])
def test_any_split_gives_the_same_step(make: Make, rows: str) -> None:
    data = [{"text": text} for text in TEXTS[:4]] if rows == "texts" else PAIRS
    grads, log = trained(make(rows=data))
    for name, split in SPLITS.items():
        others, other = trained(make(rows=data, **split))
        assert_same(others, grads)
        for metric in ("loss", "entropy", "num_tokens"):
            assert other[metric] == pytest.approx(log[metric], rel=1e-5), (name, metric)


def test_offloaded_activations(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    """On the CPU nothing is worth moving; here everything but parameters is, and the gradient stays as it was."""
    monkeypatch.setattr("fastrl.trainers.activation_offloading.SMALLEST", 1)
    moved: list[int] = []

    def moves(self: OffloadedActivations, tensor: Tensor) -> bool:
        moved.append(tensor.numel())
        return self._is_activation(tensor)

    monkeypatch.setattr(OffloadedActivations, "moves", moves)
    grads, log = trained(make())
    assert not moved
    others, other = trained(make(activation_offloading=True))
    assert_same(others, grads, 0.0)
    assert other["loss"] == log["loss"] and len(moved) > 20


def test_dynamic_fine_tuning(make: Make) -> None:
    want, wanted = eager(tiny_model(), texts_of(TEXTS[:4]), dft=True)
    grads, log = trained(make(loss_type="dft"))
    torch.testing.assert_close(torch.tensor(log["loss"]), want, rtol=1e-5, atol=0)
    assert_same(grads, wanted)


def test_bf16_autocast(make: Make) -> None:
    _, wanted = eager(tiny_model(), texts_of(TEXTS[:4]))
    grads, _ = trained(make(bf16=True))
    for name, want in wanted.items():
        assert (grads[name] - want).norm() < 0.05 * want.norm() + 1e-6, name
    assert not all(torch.equal(grads[name], want) for name, want in wanted.items())


@pytest.mark.parametrize("checkpointing", [False, True])
def test_lora_on_the_head_and_modules_to_save(make: Make, checkpointing: bool) -> None:
    lora = {"r": 4, "target_modules": ["q_proj", "lm_head"], "modules_to_save": ["embed_tokens"]}

    def adapted() -> Any:
        model = get_peft_model(tiny_model(), LoraConfig(**lora))
        torch.manual_seed(3)
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                nn.init.normal_(parameter, std=0.3)
        return model

    want, wanted = eager(adapted(), texts_of(TEXTS[:4]))
    grads, log = trained(make(adapted(), gradient_checkpointing=checkpointing))
    assert log["loss"] == pytest.approx(want.item(), rel=1e-5)
    assert_same(grads, wanted)
    assert any("lm_head" in name for name in grads) and any("embed_tokens" in name for name in grads)
    fresh = make(trainer={"peft_config": LoraConfig(**lora)})
    assert trained(fresh)[1]["loss"] == pytest.approx(eager(tiny_model(), texts_of(TEXTS[:4]))[0].item(), rel=1e-5)


def mixture() -> Any:
    torch.manual_seed(0)
    config = MixtralConfig(**SMALL, num_local_experts=4, num_experts_per_tok=2, router_aux_loss_coef=0.3)
    model = AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim >= 2:
                parameter.mul_(6.0)
    return model


def test_mixture_of_experts(make: Make) -> None:
    """The auxiliary loss is the model's own over the tokens that run: all but the last of each text."""
    texts, model = texts_of(["a b c d e", "f g h", "j k"]), mixture()
    batch = make_tokenizer().pad({"input_ids": [ids[:-1] for ids, _ in texts]}, return_tensors="pt")
    aux = model(**batch, output_router_logits=True).aux_loss
    want, wanted = eager(model, texts)
    extra = torch.autograd.grad(0.3 * aux, list(model.parameters()), allow_unused=True)
    wanted = {n: w + (0 if e is None else e) for (n, w), e in zip(wanted.items(), extra, strict=True)}
    rows = [{"text": text} for text in ("a b c d e", "f g h", "j k")]
    for split in ({}, {"share_prompts": False}):
        grads, log = trained(make(mixture(), rows, per_device_train_batch_size=3, **split))
        assert log["loss"] == pytest.approx((want + 0.3 * aux).item(), rel=1e-5)
        assert log["aux_loss"] == pytest.approx(aux.item(), rel=1e-5)
        assert_same(grads, wanted)
    grads, log = trained(make(mixture(), rows, per_device_train_batch_size=3, router_aux_loss_coef=0.0))
    assert log["loss"] == pytest.approx(want.item(), rel=1e-5) and "aux_loss" not in log
    with pytest.raises(ValueError, match=r"router_aux_loss_coef: 0\.1, but LlamaForCausalLM has no mixture"):
        make(router_aux_loss_coef=0.1)


# What counts ---------------------------------------------------------------------------------------------------------


def logged_loss(make: Make, rows: Any, **config: Any) -> float:
    trainer = config.pop("trainer", None)
    return float(trained(make(rows=rows, trainer=trainer, per_device_train_batch_size=len(rows), **config))[1]["loss"])


def test_completion_only(make: Make) -> None:
    whole = texts_of([row["prompt"] + row["completion"] for row in PAIRS])
    lengths = [len(row["prompt"].split()) for row in PAIRS]
    masked = [(ids, [-100] * n + ids[n:]) for (ids, _), n in zip(whole, lengths, strict=True)]
    for option, texts in ((None, masked), (True, masked), (False, whole)):
        want, _ = eager(tiny_model(), texts)
        assert logged_loss(make, PAIRS, completion_only_loss=option) == pytest.approx(want.item(), rel=1e-5)
    tokenized = [{"input_ids": ids, "labels": labels} for ids, labels in masked]
    assert logged_loss(make, tokenized) == pytest.approx(eager(tiny_model(), masked)[0].item(), rel=1e-5)
    masks = [{"input_ids": ids, "completion_mask": [int(x != -100) for x in labels]} for ids, labels in masked]
    for mode in (None, {"skip_prepare_dataset": True}):
        loss = logged_loss(make, masks, dataset_kwargs=mode, max_length=3 if mode else 1024)
        assert loss == pytest.approx(eager(tiny_model(), masked)[0].item(), rel=1e-5)


def test_assistant_only(make: Make) -> None:
    tokenizer = make_tokenizer()
    tokenizer.chat_template = MARKED
    rows = [{"messages": chat("a", "b c", "d e", "f")}, {"messages": chat("g h", "i")}]
    ids = tokenizer("<user> a <assistant> b c </s> <user> d e <assistant> f </s>")["input_ids"]
    second = tokenizer("<user> g h <assistant> i </s>")["input_ids"]
    marked = [[0, 0, 0, 1, 1, 1, 0, 0, 0, 0, 1, 1], [0, 0, 0, 0, 1, 1]]
    texts = [
        (row, [t if m else -100 for t, m in zip(row, mask, strict=True)])
        for row, mask in zip((ids, second), marked, strict=True)
    ]
    given = {"processing_class": tokenizer}
    want, _ = eager(tiny_model(), texts)
    assert logged_loss(make, rows, assistant_only_loss=True, trainer=given) == pytest.approx(want.item(), rel=1e-5)
    split = [{"prompt": row["messages"][:-1], "completion": row["messages"][-1:]} for row in rows]
    last = [(ids, [-100] * 10 + ids[10:]), texts[1]]
    for only in (False, True):
        loss = logged_loss(make, split, assistant_only_loss=only, trainer=given)
        assert loss == pytest.approx(eager(tiny_model(), last)[0].item(), rel=1e-5)
    unmarked = make_tokenizer()
    unmarked.chat_template = "{% for m in messages %}<{{ m['role'] }}> {{ m['content'] }} {% endfor %}"
    with pytest.raises(ValueError, match=r"train_dataset: row 0: assistant_only_loss: .*\{% generation %\}"):
        make(rows=rows, assistant_only_loss=True, trainer={"processing_class": unmarked})
    with pytest.raises(ValueError, match="row 0: assistant_only_loss: only for conversations"):
        make(assistant_only_loss=True)


@pytest.mark.parametrize("strategy", ["bfd", "bfd_split", "wrapped"])
def test_packing(make: Make, strategy: str) -> None:
    """A block holds several texts, and each trains as if it were alone (but in a wrapped stream)."""
    ids = [row for row, _ in texts_of(TEXTS)]
    size = 8
    if strategy == "bfd":
        pieces = [(row[:size], row[:size]) for row in ids]
    elif strategy == "bfd_split":
        pieces = [(row[i : i + size], row[i : i + size]) for row in ids for i in range(0, len(row) - 1, size)]
    else:
        stream = [token for row in ids for token in row]
        labels = [-100 if first else token for row in ids for first, token in zip([1] + [0] * 99, row, strict=False)]
        pieces = [(stream[i : i + size], labels[i : i + size]) for i in range(0, len(stream), size)]
    trainer = make(packing=True, packing_strategy=strategy, max_length=size, per_device_train_batch_size=99)
    blocks = [trainer.train_dataset[i] for i in range(len(trainer.train_dataset))]
    tokens = [sum(map(len, block["prompt_ids"] + block["completion_ids"])) for block in blocks]
    assert max(tokens) <= size and len(blocks) <= -(-sum(tokens) // size) + 1
    want, wanted = eager(tiny_model(), pieces)
    grads, log = trained(trainer)
    assert log["loss"] == pytest.approx(want.item(), rel=1e-5)
    assert_same(grads, wanted)


def test_truncation_and_what_is_left_out(make: Make) -> None:
    """Of 2 5-token and longer texts three tokens stay; a prompt that fills max_length leaves nothing to learn."""
    ids = [row for row, _ in texts_of(TEXTS)]
    for mode, kept in (("keep_start", slice(None, 3)), ("keep_end", slice(-3, None))):
        want, _ = eager(tiny_model(), [(row[kept], row[kept]) for row in ids])
        loss = logged_loss(make, [{"text": text} for text in TEXTS], max_length=3, truncation_mode=mode)
        assert loss == pytest.approx(want.item(), rel=1e-5)
    assert len(make(rows=PAIRS, max_length=3).train_dataset) == 3
    with pytest.raises(ValueError, match=r"train_dataset: no row has a token to train on.*max_length"):
        make(rows=PAIRS[2:3], max_length=5)


# Evaluation, texts, refusals -----------------------------------------------------------------------------------------


def test_evaluation_does_not_depend_on_the_batch_size(make: Make) -> None:
    rows = [{"text": text} for text in TEXTS]
    want, _ = eager(tiny_model(), texts_of(TEXTS))
    hits = total = 0
    model = tiny_model().eval()
    for ids, _ in texts_of(TEXTS):
        best = model(input_ids=torch.tensor([ids])).logits[0, :-1].argmax(-1)
        hits, total = hits + int((best == torch.tensor(ids[1:])).sum()), total + len(ids) - 1
    for size in (1, 3, 8):
        trainer = make(trainer={"eval_dataset": {"x": rows, "y": rows[:1]}}, per_device_eval_batch_size=size)
        metrics = trainer.evaluate()
        assert metrics["eval_x_loss"] == pytest.approx(want.item(), rel=1e-5)
        assert metrics["eval_x_mean_token_accuracy"] == pytest.approx(hits / total)
        assert metrics["eval_y_loss"] == pytest.approx(eager(tiny_model(), texts_of(TEXTS[:1]))[0].item(), rel=1e-5)
    fresh = trainer.evaluate(rows[:1])  # tokenized on the way
    assert fresh["eval_loss"] == metrics["eval_y_loss"] and fresh["eval_entropy"] > 0
    with pytest.raises(ValueError, match="eval_dataset: the dataset is empty"):
        trainer.evaluate([])
    with pytest.raises(ValueError, match="eval_dataset: evaluation needs one"):
        make().evaluate()


def test_evaluation_between_steps_leaves_training_alone(make: Make) -> None:
    rows = [{"text": text} for text in TEXTS]
    logs = []
    for evaluates in (False, True):
        extra = {"eval_strategy": "steps", "eval_steps": 1} if evaluates else {}
        trainer = make(max_steps=3, trainer={"eval_dataset": rows[:2]}, **extra)
        trainer.train()
        logs.append(
            [(log["loss"], log["entropy"], log["num_tokens"]) for log in trainer.state.log_history if "loss" in log]
        )
    assert logs[0] == logs[1] and len(logs[0]) == 3


def test_formatting_function_and_datasets(make: Make) -> None:
    rows = Dataset.from_list([{"q": "a b", "r": "c"}, {"q": "d", "r": "e f"}])
    want = eager(tiny_model(), texts_of(["a b c", "d e f"]))[0].item()
    for processes in (None, 2):
        trainer = {"formatting_func": lambda row: f"{row['q']} {row['r']}"}
        assert logged_loss(make, rows, trainer=trainer, dataset_num_proc=processes) == pytest.approx(want, rel=1e-5)
    with pytest.raises(ValueError, match=r"formatting_func: .*completion_only_loss=True"):
        make(rows=rows, trainer=trainer, completion_only_loss=True)


def test_chat_template_and_tokens_by_argument(make: Make, tmp_path: Path) -> None:
    template = tmp_path / "template.jinja"
    template.write_text(MARKED)
    rows = [{"messages": chat("a", "b")}]
    trainer = make(rows=rows, chat_template_path=str(template), eos_token="<unk>", pad_token="<s>")
    assert trainer.processing_class.chat_template == MARKED and trainer.processing_class.pad_token == "<s>"
    assert trainer.model.generation_config.eos_token_id == [3, 2] and trainer.model.config.pad_token_id == 1
    assert "".join(map(str, trainer.train_dataset[0]["completion_ids"][0])) == "6572"
    source = make_tokenizer()
    source.chat_template = MARKED + "<more>"
    source.add_tokens(["<more>"])
    source.save_pretrained(tmp_path / "source")
    grown = make(rows=rows, chat_template_path=str(tmp_path / "source"))
    assert grown.model.get_input_embeddings().num_embeddings == len(WORDS) + 1
    assert trained(grown)[1]["loss"] > 0
    with pytest.raises(ValueError, match="chat_template_path: its tokenizer adds 1 tokens"):
        make(rows=rows, chat_template_path=str(tmp_path / "source"), trainer={"peft_config": LoraConfig(r=2)})
    with pytest.raises(ValueError, match="eos_token: 'nope' is not in the vocabulary"):
        make(eos_token="nope")
    with pytest.raises(ValueError, match="row 0: the row is a conversation, but the tokenizer has no chat template"):
        make(rows=rows)


@pytest.mark.parametrize(
    "wrong, message",
    [
        ({"rows": []}, "train_dataset: the dataset is empty"),
        ({"rows": [{"label": 1}]}, "train_dataset: row 0: no column 'text'"),
        ({"rows": [{"text": "a b"}, {"text": 3}]}, "train_dataset: row 1: expected a string or a list of messages"),
        ({"rows": [{"text": " a" * 99}]}, "train_dataset: row 0: 100 tokens are more than the model's context of 64"),
        ({"rows": IterableDataset.from_generator(lambda: iter([{"text": "a"}]))}, "train_dataset: streamed"),
        ({"trainer": {"data_collator": list}}, "data_collator: not supported: batches are made of packed rows"),
        ({"trainer": {"compute_metrics": len}}, "compute_metrics: not supported: it needs the logits"),
        ({"trainer": {"eval_dataset": {"x": []}}}, r"eval_dataset\['x'\]: the dataset is empty"),
        ({"label_smoothing_factor": 0.1}, "SFTConfig: not supported: label_smoothing_factor=0.1"),
        ({"loss_type": "mse"}, "loss_type: expected one of nll, dft, got 'mse'"),
        ({"packing": True, "max_length": None}, "max_length: expected the length of a block"),
        ({"dataset_kwargs": {"add_special_tokens": False}}, "dataset_kwargs: expected no other key"),
        ({"train_sampling_strategy": "group_by_length"}, "train_sampling_strategy: expected one of random, sequential"),
    ],
)
def test_what_cannot_work_is_named(make: Make, wrong: dict[str, Any], message: str) -> None:
    with pytest.raises((ValueError, TypeError), match=message):
        make(**wrong)


@pytest.mark.parametrize("loss_type", ["nll", "dft"])
def test_trl_takes_the_same_steps(tmp_path: Path, loss_type: str) -> None:
    trl = pytest.importorskip("trl")
    logs = []
    for trainer, config in ((trl.SFTTrainer, trl.SFTConfig), (SFTTrainer, SFTConfig)):
        args = config(
            str(tmp_path / trainer.__module__), loss_type=loss_type, per_device_train_batch_size=1, max_steps=3,
            gradient_accumulation_steps=2, learning_rate=1e-2, logging_steps=1, save_strategy="no", report_to="none",
            disable_tqdm=True, use_cpu=True, bf16=False, train_sampling_strategy="sequential", eval_strategy="steps",
            eval_steps=3, per_device_eval_batch_size=4,
        )  # fmt: skip
        rows = Dataset.from_list(PAIRS)
        run = trainer(tiny_model(), args, train_dataset=rows, eval_dataset=rows, processing_class=make_tokenizer())
        run.train()
        logs.append(run.state.log_history[:4])
    # Not "entropy": TRL's is the mean of the micro-batches' means.
    names = ("loss", "grad_norm", "num_tokens", "eval_loss", "eval_entropy", "eval_mean_token_accuracy")
    for theirs, ours in zip(*logs, strict=True):
        for name in theirs.keys() & set(names):
            assert ours[name] == pytest.approx(theirs[name], rel=2e-4), name
    assert set(names) <= set().union(*logs[1])


def test_every_argument_of_trl_is_there_with_its_default() -> None:
    trl = pytest.importorskip("trl")
    theirs = {field.name: field for field in dataclasses.fields(trl.SFTConfig)}
    ours = {field.name: field for field in dataclasses.fields(SFTConfig)}
    assert theirs.keys() <= ours.keys()
    different = {name for name in theirs if theirs[name].default != ours[name].default}
    assert different <= {"gradient_checkpointing"}  # its transformers 5 name is activation_checkpointing
    assert SFTConfig("run", use_cpu=True).activation_checkpointing is True
    wanted = list(inspect.signature(trl.SFTTrainer.__init__).parameters)
    assert list(inspect.signature(SFTTrainer.__init__).parameters) == wanted
