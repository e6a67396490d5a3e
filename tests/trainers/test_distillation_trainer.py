"""Distillation: loss and gradients are those of the definition on full logits and of TRL, completions come from where
`lmbda` says, and the student comes near its teacher."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from distillation_runs import COMPLETIONS, PROMPTS, make_distillation, tiny_teacher
from peft import LoraConfig
from ppo_runs import sequences_of
from tiny_runs import TEMPLATE, WORDS, GradientRecorder, ScriptedEngine, make_tokenizer, record_rollouts, tiny_model
from torch import Tensor, nn
from transformers import Gemma2Config, Gemma2ForCausalLM, PreTrainedModel

from fastrl.rollout import Completions, SamplingParams
from fastrl.trainers.distillation import DistillationTrainer
from fastrl.trainers.distillation_config import NO_CORRECTION, NO_REWARDS, DistillationConfig
from fastrl.trainers.online_config import REFUSED


def gemma() -> PreTrainedModel:
    """A teacher of another family, with softcapped logits and an attention that shares no prompts."""
    torch.manual_seed(9)
    config = Gemma2Config(
        vocab_size=len(WORDS), hidden_size=24, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, head_dim=12, max_position_embeddings=64, final_logit_softcapping=2.0,
        pad_token_id=0, bos_token_id=1, eos_token_id=2, query_pre_attn_scalar=12,
    )  # fmt: skip
    config._attn_implementation = "eager"
    model = Gemma2ForCausalLM(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(12.0 if parameter.ndim == 2 else 1.0)
    return model


def definition(
    student: nn.Module, teacher: nn.Module, sequences: Any, beta: float, temperature: float
) -> tuple[Tensor, Tensor]:
    """The mean over all tokens of the divergence from full logits, a sequence at a time, and of the entropy."""
    terms, entropies = [], []
    for prompt, completion in sequences:
        ids = torch.tensor([prompt + completion])
        log_p, log_q = (
            (m(input_ids=ids).logits[0, len(prompt) - 1 : -1] / temperature).log_softmax(-1) for m in (student, teacher)
        )
        log_q = log_q.detach()
        p, q = log_p.exp(), log_q.exp()
        mixture = ((1 - beta) * p + beta * q).log()
        if beta == 0:
            terms.append((q * (log_q - log_p)).sum(-1))
        elif beta == 1:
            terms.append((p * (log_p - log_q)).sum(-1))
        else:
            terms.append(beta * (q * (log_q - mixture)).sum(-1) + (1 - beta) * (p * (log_p - mixture)).sum(-1))
        entropies.append(-(p * log_p).sum(-1))
    return torch.cat(terms).mean(), torch.cat(entropies).mean()


class NoEngine:
    """Fails where something is sampled."""

    def generate(self, *args: Any) -> Completions:
        raise AssertionError("sampled")

    def sync_weights(self, model: nn.Module) -> None:
        raise AssertionError("synced")


# The loss ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("teacher", "settings"),
    [
        (tiny_teacher, {"beta": 1.0}),
        (tiny_teacher, {"beta": 0.0, "temperature": 1.7, "per_device_train_batch_size": 4, "tokens_per_pass": 24}),
        (gemma, {"beta": 0.3, "per_device_train_batch_size": 1, "temperature": 0.8}),
    ],
    ids=["reverse KL", "forward KL, many passes", "JSD, Gemma 2"],
)
def test_steps_equal_the_definition(tmp_path: Path, teacher: Any, settings: dict[str, Any]) -> None:
    """Loss, entropy and gradients of two optimizer steps over completions of uneven lengths."""
    recorder = GradientRecorder()
    steps = 8 // settings.get("per_device_train_batch_size", 8)
    trainer = make_distillation(
        tmp_path,
        tiny_model().double(),
        teacher().double(),
        arguments={"rollout_engine": ScriptedEngine(), "callbacks": [recorder]},
        **{"gradient_accumulation_steps": steps, "max_grad_norm": 0.0, **settings},
    )
    made = record_rollouts(trainer)  # type: ignore[arg-type]
    trainer.train()
    assert {int(n) for n in made[0].mask.sum(-1)} >= {0, 1, 6}
    for step, rollout in enumerate(made):
        student = tiny_model().double()
        student.load_state_dict(recorder.weights[step])
        args = (settings["beta"], settings.get("temperature", 1.0))
        loss, entropy = definition(student, teacher().double(), sequences_of(rollout), *args)
        loss.backward()
        log = trainer.state.log_history[step]
        assert log["loss"] == pytest.approx(loss.item(), rel=1e-5) and loss.item() > 0.01
        if steps == 1:  # else a mean over micro-batches, as in TRL
            assert log["entropy"] == pytest.approx(entropy.item(), rel=1e-5)
        for name, parameter in student.named_parameters():
            assert parameter.grad is not None and parameter.grad.abs().max() > 0
            torch.testing.assert_close(recorder.grads[step][name], parameter.grad, rtol=1e-5, atol=1e-8, msg=name)


@pytest.mark.parametrize("beta", [0.5, 1.0])
def test_same_weights_and_metrics_as_trl(tmp_path: Path, beta: float) -> None:
    trl = pytest.importorskip("trl")  # only named at the end of the run where TRL is not installed
    settings = {"beta": beta, "temperature": 1.3, "max_steps": 3, "weight_decay": 0.1}
    never_empty = (5, 4, 8, 1, 3, 7, 2, 6)  # TRL cannot do with a completion of zero tokens
    rows = Dataset.from_dict({"prompt": PROMPTS})
    ours = make_distillation(tmp_path, rows=rows, arguments={"rollout_engine": ScriptedEngine(never_empty)}, **settings)
    engine = ScriptedEngine(never_empty)

    class Scripted(trl.DistillationTrainer):  # type: ignore[name-defined]
        def _generate_single_turn(self, prompt_ids: Any, *args: Any, **kwargs: Any) -> list[list[int]]:
            return engine.generate(prompt_ids, 1, SamplingParams(max_tokens=8)).ids

    names = ("per_device_train_batch_size", "max_completion_length", "learning_rate", "use_cpu", "logging_steps")
    shared = {name: getattr(ours.args, name) for name in (*names, "save_strategy", "report_to", "disable_tqdm")}
    config = trl.DistillationConfig(str(tmp_path), gradient_checkpointing=False, bf16=False, **shared, **settings)
    theirs = Scripted(tiny_model(), tiny_teacher(), config, rows, processing_class=make_tokenizer())
    ours.train()
    theirs.train()
    for (name, weight), other in zip(ours.model.named_parameters(), theirs.model.parameters(), strict=True):
        assert float((weight - other).abs().max()) < 1e-3, name  # AdamW makes the rounding of small gradients visible
    for mine, reference in zip(ours.state.log_history[:3], theirs.state.log_history[:3], strict=True):
        for name, value in reference.items():
            assert name in mine
            if isinstance(value, float) and not math.isnan(value) and name != "step_time":
                assert mine[name] == pytest.approx(value, rel=1e-3, abs=1e-5), name


def test_same_loss_as_gkd(tmp_path: Path) -> None:
    """Of a rollout with the dataset's completions, on the logits of the two models."""
    gkd = pytest.importorskip("trl.experimental.gkd")
    trainer = make_distillation(tmp_path, lmbda=0.0, beta=0.3, max_steps=1)
    made = record_rollouts(trainer)  # type: ignore[arg-type]
    student, teacher = tiny_model(), tiny_teacher()
    trainer.train()
    batch = made[0]
    ids = torch.cat([batch.prompt_ids, batch.completion_ids], 1)
    mask = torch.cat([batch.prompt_mask, batch.completion_mask], 1).long()
    labels = torch.cat([torch.full_like(batch.prompt_ids, -100), batch.completion_ids], 1)
    labels[:, batch.prompt_ids.shape[1] :].masked_fill_(~batch.mask, -100)
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    with torch.no_grad():
        logits = [
            m(input_ids=ids, attention_mask=mask, position_ids=positions).logits[:, :-1] for m in (student, teacher)
        ]
    expected = gkd.GKDTrainer.generalized_jsd_loss(*logits, labels=labels[:, 1:], beta=0.3)
    assert trainer.state.log_history[0]["loss"] == pytest.approx(expected.item(), rel=1e-4)


def test_any_split_gives_the_same_gradient(tmp_path: Path) -> None:
    grads = []
    for micro, steps, settings in ((8, 1, {}), (4, 2, {"tokens_per_pass": 20}), (1, 8, {"share_prompts": False})):
        recorder = GradientRecorder()
        make_distillation(
            tmp_path,
            per_device_train_batch_size=micro,
            gradient_accumulation_steps=steps,
            num_generations=4,
            max_steps=1,
            max_grad_norm=0.0,
            arguments={"rollout_engine": ScriptedEngine(), "callbacks": [recorder]},
            **settings,
        ).train()
        grads.append(recorder.grads[0])
    for other in grads[1:]:
        for name, gradient in grads[0].items():
            torch.testing.assert_close(other[name], gradient, rtol=1e-4, atol=1e-7)


# Completions ---------------------------------------------------------------------------------------------------------


def test_off_policy_takes_the_completions_of_the_dataset(tmp_path: Path) -> None:
    """Nothing is sampled, in evaluation neither; what is too long is cut."""
    rows = [{"prompt": p, "completion": c} for p, c in zip(PROMPTS, COMPLETIONS, strict=True)]
    trainer = make_distillation(
        tmp_path,
        lmbda=0.0,
        rows=rows,
        max_completion_length=7,
        max_steps=1,
        arguments={"rollout_engine": NoEngine(), "eval_dataset": rows[:2]},
    )
    made = record_rollouts(trainer)  # type: ignore[arg-type]
    trainer.train()
    tokenize = make_tokenizer()
    expected = [
        (tokenize(p)["input_ids"], tokenize(f"{c} </s>")["input_ids"][:7])
        for p, c in zip(PROMPTS, COMPLETIONS, strict=True)
    ]
    assert sorted(sequences_of(made[0])) == sorted(expected)
    assert max(len(completion) for _, completion in expected) == 7
    assert "on_policy" not in trainer.state.log_history[0]
    loss, _ = definition(trainer.model, tiny_teacher(), expected[:2], 1.0, 1.0)
    assert trainer.evaluate()["eval_loss"] == pytest.approx(loss.item(), rel=1e-4)


@pytest.mark.parametrize("columns", ["messages", "prompt-completion"])
def test_conversations(tmp_path: Path, columns: str) -> None:
    talks = [
        [{"role": "user", "content": p}, {"role": "assistant", "content": f"{c.strip()} </s>"}]
        for p, c in zip(PROMPTS, COMPLETIONS, strict=True)
    ]
    rows: Any = Dataset.from_dict({"messages": talks})
    if columns != "messages":
        rows = [{"prompt": talk[:1], "completion": talk[1:]} for talk in talks]
    tokenizer = make_tokenizer()
    tokenizer.chat_template = TEMPLATE
    trainer = make_distillation(tmp_path, lmbda=0.0, rows=rows, max_steps=1, arguments={"processing_class": tokenizer})
    made = record_rollouts(trainer)  # type: ignore[arg-type]
    trainer.train()
    words = {(" ".join(WORDS[i] for i in p), " ".join(WORDS[i] for i in c)) for p, c in sequences_of(made[0])}
    pairs = zip(PROMPTS, COMPLETIONS, strict=True)
    assert words == {(f"<user> {p} <assistant>", f"{c.strip()} </s>".strip()) for p, c in pairs}


def test_a_mixture(tmp_path: Path) -> None:
    """About the share lmbda of the rollouts is sampled; which ones depends on the seed."""
    own: list[list[float]] = []
    for seed in (1, 2):
        engine = ScriptedEngine()
        settings = {"lmbda": 0.4, "max_steps": 10, "seed": seed, "max_completion_length": 2}
        trainer = make_distillation(tmp_path, arguments={"rollout_engine": engine}, **settings)
        trainer.train()
        own.append([log["on_policy"] for log in trainer.state.log_history[:10]])
        assert 2 <= engine.calls == engine.synced == sum(own[-1]) <= 7
    assert own[0] != own[1]


def test_the_teacher_samples(tmp_path: Path) -> None:
    trainer = make_distillation(
        tmp_path,
        lmbda=0.0,
        seq_kd=True,
        rows=Dataset.from_dict({"prompt": PROMPTS}),
        max_steps=1,
        generation_kwargs={"do_sample": False},
        arguments={"rollout_engine": NoEngine()},
    )
    made = record_rollouts(trainer)  # type: ignore[arg-type]
    trainer.train()
    teacher: Any = tiny_teacher()
    for prompt, completion in sequences_of(made[0]):
        out = teacher.generate(torch.tensor([prompt]), max_new_tokens=8, do_sample=False)[0, len(prompt) :].tolist()
        assert completion == out


# Models --------------------------------------------------------------------------------------------------------------


def test_the_teacher_stays_as_it_is(tmp_path: Path) -> None:
    """Frozen, and without dropout: the loss at the start is the same twice."""
    losses: list[float] = []
    for _ in range(2):
        teacher = tiny_teacher(attention_dropout=0.5).train()
        trainer = make_distillation(tmp_path, teacher=teacher, lmbda=0.0, max_steps=2, seed=len(losses))
        trainer.train()
        losses.append(trainer.state.log_history[0]["loss"])
        for name, weight in tiny_teacher().named_parameters():
            assert torch.equal(weight, teacher.get_parameter(name))
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)


def test_a_teacher_by_path(tmp_path: Path) -> None:
    tiny_teacher().save_pretrained(tmp_path / "teacher")
    settings: dict[str, Any] = {"output_dir": str(tmp_path), "use_cpu": True, "report_to": "none"}
    args = DistillationConfig(
        **settings,
        teacher_model_name_or_path=str(tmp_path / "teacher"),
        teacher_model_init_kwargs={"dtype": "bfloat16"},
        per_device_train_batch_size=2,
    )
    rows = Dataset.from_dict({"prompt": PROMPTS})
    trainer = DistillationTrainer(tiny_model(), None, args, rows, processing_class=make_tokenizer())
    assert trainer.teacher.dtype == torch.bfloat16 and trainer.model.dtype == torch.float32
    args = DistillationConfig(**settings)
    with pytest.raises(ValueError, match="teacher_model: expected a model, or its path in args"):
        DistillationTrainer(tiny_model(), None, args, rows, processing_class=make_tokenizer())
    args = dataclasses.replace(args, teacher_model_revision="main")
    with pytest.raises(ValueError, match="teacher_model_revision: expected None with a teacher that is an object"):
        DistillationTrainer(tiny_model(), tiny_teacher(), args, rows, processing_class=make_tokenizer())


def test_arguments_that_cannot_work(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"teacher_model: expected the student's vocabulary of \d+ tokens, got 64"):
        make_distillation(tmp_path, teacher=tiny_teacher(vocab_size=64))
    model = tiny_model()
    with pytest.raises(ValueError, match="teacher_model: expected a model of its own"):
        make_distillation(tmp_path, model, model)
    rows = Dataset.from_dict({"prompt": PROMPTS})
    with pytest.raises(ValueError, match=r"train_dataset: no column 'completion', which lmbda 0\.5"):
        make_distillation(tmp_path, rows=rows, lmbda=0.5)
    with pytest.raises(ValueError, match=r"^tools: not supported: "):
        make_distillation(tmp_path, arguments={"tools": [print]})
    with pytest.raises(ValueError, match="quantization_config: only for a model given by path"):
        make_distillation(tmp_path, arguments={"quantization_config": object()})
    late = [{"prompt": p, "completion": c} for p, c in zip(PROMPTS, COMPLETIONS, strict=True)]
    late[3]["completion"] = None  # type: ignore[assignment]
    with pytest.raises(ValueError, match="train_dataset: row 3: no 'completion'"):
        make_distillation(tmp_path, rows=late, lmbda=0.0).train()


@pytest.mark.parametrize("lmbda", [0.0, 1.0])
def test_it_learns(tmp_path: Path, lmbda: float) -> None:
    """The divergence from the teacher on prompts and completions that were not trained on falls; with LoRA, too."""
    teacher: Any = tiny_teacher()
    with torch.no_grad():
        teacher.lm_head.weight.mul_(4.0)
        teacher.model.layers[0].self_attn.o_proj.weight.zero_()
    letters = torch.randint(6, len(WORDS), (32, 6), generator=torch.Generator().manual_seed(0))
    texts = [" ".join(WORDS[i] for i in row) for row in letters]
    lora = LoraConfig(r=8, target_modules=["gate_proj", "down_proj"], modules_to_save=["lm_head"]) if lmbda else None
    trainer = make_distillation(
        tmp_path,
        teacher=teacher,
        lmbda=lmbda,
        rows=Dataset.from_dict({"prompt": [t[:3] for t in texts], "completion": [t[3:] for t in texts]}),
        max_steps=24,
        logging_steps=24,
        learning_rate=3e-2,
        per_device_eval_batch_size=8,
        arguments={
            "peft_config": lora,
            "eval_dataset": Dataset.from_dict({"prompt": ["u v", "w", "x y z", "z a"] * 2, "completion": COMPLETIONS}),
        },
    )
    before = trainer.evaluate()["eval_loss"]
    trainer.train()
    after = trainer.evaluate()["eval_loss"]
    assert after < 0.7 * before
    if lora is not None:
        trainer.save_model(str(tmp_path / "saved"))
        assert (tmp_path / "saved" / "adapter_model.safetensors").exists()


# Configuration -------------------------------------------------------------------------------------------------------


UNUSED = [f.name for f in dataclasses.fields(DistillationConfig) if f.metadata in (NO_CORRECTION, NO_REWARDS)]


def config(tmp_path: Path, **settings: Any) -> DistillationConfig:
    return DistillationConfig(**{"output_dir": str(tmp_path), "use_cpu": True, "report_to": "none", **settings})


def test_arguments_and_defaults_of_trl(tmp_path: Path) -> None:
    trl = pytest.importorskip("trl")  # only named at the end of the run where TRL is not installed
    ours, theirs = config(tmp_path), trl.DistillationConfig(str(tmp_path), use_cpu=True, report_to="none")
    differ = {"bf16", "pad_to_multiple_of", "logging_dir"}
    base = {field.name for field in dataclasses.fields(trl.SFTConfig.__mro__[2])}
    for field in dataclasses.fields(theirs):
        assert hasattr(ours, field.name), field.name
        if field.name not in differ | base:
            assert getattr(ours, field.name) == getattr(theirs, field.name), field.name
    assert len(UNUSED) == 9 and not {field.name for field in dataclasses.fields(theirs)} & set(UNUSED)
    assert (ours.lmbda, ours.seq_kd, ours.num_generations) == (1.0, False, 1)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"beta": 1.5}, r"beta: expected a number in \[0, 1\], got 1.5"),
        ({"lmbda": -0.1}, "lmbda: expected a number"),
        ({"seq_kd": True}, "seq_kd: expected False with lmbda 1"),
        ({"lmbda": 0.0, "use_vllm": True}, "use_vllm: expected False with lmbda 0"),
        ({"lmbda": 0.5, "remove_unused_columns": True}, "remove_unused_columns: expected False"),
        ({"max_completion_length": None}, "max_completion_length: expected a number of tokens, got None"),
        *(({name: 7}, f"{name}: expected .*, as (there are no rewards|nothing is corrected)") for name in UNUSED),
        *(
            ({name: 7}, f"{name}: not supported")
            for name in ("max_tool_calling_iterations", "ds3_gather_for_generation")
        ),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else "",
)
def test_values_out_of_range_are_named(tmp_path: Path, settings: dict[str, Any], message: str) -> None:
    assert "max_tool_calling_iterations" in REFUSED
    with pytest.raises(ValueError, match=message):
        config(tmp_path, **settings)
