"""GRPOTrainer from end to end: what can be passed in, what comes out, what is logged."""

import asyncio
import copy
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from tiny_runs import TEMPLATE, WORDS, ScriptedEngine, count_letters, record_rollouts, tiny_model
from transformers import PreTrainedTokenizerFast

import fastrl
from fastrl.rollout import Completions, SamplingParams
from fastrl.trainers import GRPOTrainer, model_setup

Make = Callable[..., GRPOTrainer]

TRL_METRICS = {
    "loss", "grad_norm", "learning_rate", "num_tokens", "step_time", "reward", "reward_std", "frac_reward_zero_std",
    "rewards/count_letters/mean", "rewards/count_letters/std", "entropy",
    "completions/mean_length", "completions/min_length", "completions/max_length", "completions/clipped_ratio",
    "completions/mean_terminated_length", "completions/min_terminated_length", "completions/max_terminated_length",
    "clip_ratio/low_mean", "clip_ratio/low_min", "clip_ratio/high_mean", "clip_ratio/high_max",
    "clip_ratio/region_mean",
}  # fmt: skip


def test_top_level_names() -> None:
    assert fastrl.GRPOTrainer is GRPOTrainer
    assert {"GRPOTrainer", "GRPOConfig", "patch_model"} <= set(dir(fastrl))


def test_reward_rises(make_trainer: Make) -> None:
    """The whole chain has the right sign."""
    trainer = make_trainer(max_steps=25, per_device_train_batch_size=32, num_generations=8, learning_rate=5e-3)
    trainer.train()
    rewards = [log["reward"] for log in trainer.state.log_history if "reward" in log]
    assert sum(rewards[-5:]) / 5 > sum(rewards[:5]) / 5 + 0.4, rewards


def test_logs_have_trls_names_and_true_values(make_trainer: Make) -> None:
    trainer = make_trainer(beta=0.1, trainer_arguments={"rollout_engine": ScriptedEngine()})
    made = record_rollouts(trainer)
    trainer.train()
    log = trainer.state.log_history[0]
    assert TRL_METRICS | {"kl", "live_fraction", "live_sequence_fraction", "tokens_per_second"} <= log.keys()
    lengths = [int(n) for n in made[0].completion_mask.sum(1)]
    ends = [bool((made[0].completion_ids[i] == 2).any()) for i in range(8)]
    terminated = [n for n, end in zip(lengths, ends, strict=True) if end]
    assert log["completions/mean_length"] == pytest.approx(sum(lengths) / 8)
    assert (log["completions/min_length"], log["completions/max_length"]) == (min(lengths), max(lengths))
    assert log["completions/clipped_ratio"] == pytest.approx(1 - sum(ends) / 8)
    assert log["completions/mean_terminated_length"] == pytest.approx(sum(terminated) / len(terminated))
    assert log["num_tokens"] == sum(lengths) + int(made[0].prompt_mask.sum())
    assert log["reward"] == log["rewards/count_letters/mean"]
    assert log["kl"] == 0 and log["entropy"] > 0  # the policy is its reference in the first step
    assert log["live_fraction"] == 1.0
    assert trainer.state.log_history[1]["kl"] > 0


def test_all_tokens_are_scored_when_nothing_is_skipped(make_trainer: Make) -> None:
    """Without skipping, `entropy` is TRL's: over all tokens, those of unanimous groups too."""
    entropies = []
    for rewards in (count_letters, lambda completions: [1.0] * len(completions)):
        engine = ScriptedEngine()
        trainer = make_trainer(
            None, rewards, skip_dead_sequences=False, max_steps=1, trainer_arguments={"rollout_engine": engine}
        )
        trainer.train()
        entropies.append(trainer.state.log_history[0]["entropy"])
    assert entropies[0] == pytest.approx(entropies[1], abs=1e-5)


# Models


def alternating(completions: list[str]) -> list[float]:
    """Never unanimous."""
    return [float(i % 2) for i in range(len(completions))]


def test_model_by_path_with_reference(make_trainer: Make, tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    tiny_model("qwen2").save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    path, options = str(tmp_path / "model"), {"dtype": "float32"}
    trainer = make_trainer(path, alternating, processing_class=None, beta=0.1, model_init_kwargs=options)
    before = copy.deepcopy(trainer.reference.state_dict())
    trainer.train()
    assert trainer.state.log_history[1]["kl"] > 0
    assert all(torch.equal(value, before[name]) for name, value in trainer.reference.state_dict().items())
    assert not any(p.requires_grad for p in trainer.reference.parameters())
    trainer.save_model(str(tmp_path / "trained"))
    assert type(trainer.model).from_pretrained(tmp_path / "trained").config.vocab_size == len(WORDS)


@pytest.mark.parametrize("target", [["q_proj"], ["q_proj", "lm_head"]], ids=["backbone", "backbone_and_head"])
@pytest.mark.parametrize("wrapped", [False, True], ids=["peft_config", "peft_model"])
def test_lora(make_trainer: Make, target: list[str], wrapped: bool) -> None:
    config = LoraConfig(r=4, target_modules=target)
    model = tiny_model()
    before = {name: p.clone() for name, p in model.named_parameters()}
    arguments = {} if wrapped else {"peft_config": config}
    trainer = make_trainer(
        get_peft_model(model, config) if wrapped else model, beta=0.1, max_steps=3, trainer_arguments=arguments
    )
    assert trainer.reference is None  # the disabled adapter is
    trainer.train()
    assert trainer.state.log_history[0]["kl"] == pytest.approx(0, abs=1e-6)  # LoRA's B starts at zero
    assert trainer.state.log_history[2]["kl"] > 1e-6
    moved = [name for name, p in trainer.model.named_parameters() if "lora_B" in name and p.abs().max() > 0]
    assert len(moved) == 2 + ("lm_head" in target)  # two layers
    for name, parameter in model.named_parameters():
        if "lora" not in name:
            assert torch.equal(parameter, before[name.replace("base_layer.", "")]), name
            assert parameter.grad is None


def test_several_iterations_and_gradient_checkpointing(make_trainer: Make) -> None:
    """Activation checkpointing recomputes the backbone inside the patched forward; the result is the same."""
    ends = []
    for checkpointing in (False, True):
        trainer = make_trainer(num_iterations=2, max_steps=4, gradient_checkpointing=checkpointing)
        assert trainer.model.training
        trainer.train()
        ends.append(dict(trainer.model.named_parameters()))
    for name, weight in ends[0].items():
        torch.testing.assert_close(weight, ends[1][name], rtol=1e-5, atol=1e-6)


def test_dropout_can_be_disabled(make_trainer: Make) -> None:
    model = tiny_model()
    model.model.layers[0].self_attn.dropout = torch.nn.Dropout(0.5)
    assert make_trainer(model, disable_dropout=True).model.model.layers[0].self_attn.dropout.p == 0


# Prompts


def test_tokenizer_without_pad_token(make_trainer: Make, tokenizer: PreTrainedTokenizerFast) -> None:
    tokenizer.pad_token = None
    trainer = make_trainer(processing_class=tokenizer)
    assert tokenizer.pad_token == "</s>"
    trainer.train()
    assert trainer.model.config.pad_token_id == trainer.model.generation_config.pad_token_id == 2


def test_every_end_token_of_the_model_ends_a_completion(make_trainer: Make) -> None:
    model = tiny_model()
    model.generation_config.eos_token_id = [6, 7, 8, 9, 10]
    trainer = make_trainer(model)
    made = record_rollouts(trainer)
    trainer.train()
    assert sorted(trainer.collector.eos_token_ids) == [2, 6, 7, 8, 9, 10]
    for ids, mask in zip(made[0].completion_ids, made[0].completion_mask, strict=True):
        assert not set(ids[mask][:-1].tolist()) & {2, 6, 7, 8, 9, 10}


def test_conversations(make_trainer: Make, tokenizer: PreTrainedTokenizerFast) -> None:
    tokenizer.chat_template = TEMPLATE
    rows = [[{"role": "user", "content": text}] for text in ("a b", "c", "d", "e")]
    seen: dict[str, Any] = {}

    def reward(prompts: list[Any], completions: list[Any], completion_ids: list[Any], **kwargs: Any) -> list[float]:
        kwargs["log_metric"]("my_metric", 3.0)
        seen.update(prompts=prompts, completions=completions, ids=completion_ids, **kwargs)
        return count_letters(completions)

    trainer = make_trainer(
        None,
        reward,
        train_dataset=Dataset.from_dict({"prompt": rows, "level": [0, 1, 2, 3]}),
        processing_class=tokenizer,
        shuffle_dataset=False,
        max_steps=1,
        chat_template_kwargs={"unused": True},
    )
    made = record_rollouts(trainer)
    trainer.train()
    assert seen["prompts"][0] == rows[0] and seen["level"] == [0] * 4 + [1] * 4
    assert seen["trainer_state"] is trainer.state
    assert trainer.state.log_history[0]["my_metric"] == 3.0
    (message,) = seen["completions"][0]
    assert message["role"] == "assistant"
    text = tokenizer.decode(seen["ids"][0], skip_special_tokens=True)
    assert message["content"] == text
    prompt = made[0].prompt_ids[0][made[0].prompt_mask[0]].tolist()
    assert prompt == [WORDS.index(word) for word in ("<user>", "a", "b", "<assistant>")]


def test_rewards_of_several_functions(make_trainer: Make) -> None:
    async def judge(completions: list[str], answer: list[str]) -> list[float | None]:
        await asyncio.sleep(0)
        return [float(a) if int(a) % 2 else None for a in answer]

    for aggregation in ("sum_then_normalize", "normalize_then_sum"):
        trainer = make_trainer(
            None,
            [count_letters, judge],
            reward_weights=[1.0, 0.5],
            multi_objective_aggregation=aggregation,
            scale_rewards="batch",
            shuffle_dataset=False,
        )
        trainer.train()
        log = trainer.state.log_history[0]  # prompts 0 (no reward from the judge) and 1
        assert log["rewards/judge/mean"] == 1.0 and log["rewards/judge/std"] == 0.0
        assert log["reward"] == pytest.approx(log["rewards/count_letters/mean"] + 0.25)


def test_completions_without_any_reward_carry_no_gradient(make_trainer: Make) -> None:
    trainer = make_trainer(None, lambda completions: [None] * len(completions))
    trainer.train()
    log = trainer.state.log_history[0]
    assert log["live_fraction"] == 0 and log["loss"] == 0 and log["reward"] is None


@pytest.mark.parametrize(
    "settings",
    [
        {"mask_truncated_completions": True},
        {"top_entropy_quantile": 0.3, "entropy_coef": 0.01, "gradient_accumulation_steps": 2},
        {"off_policy_mask_threshold": 0.1, "num_iterations": 2},
        {"importance_sampling_level": "sequence", "loss_type": "grpo", "num_iterations": 2},
        {"loss_type": "dr_grpo", "scale_rewards": "none", "epsilon_high": 0.28, "delta": 2.0},
        {"loss_type": "bnpo", "gradient_accumulation_steps": 2},
        {"advantage_baseline": "leave_one_out", "kl_estimator": "k2", "beta": 0.05},
        {"use_adaptive_entropy": True, "entropy_coef": 0.1, "entropy_target": 5.0},
        {"top_k": 5, "top_p": 0.9, "min_p": 0.01, "repetition_penalty": 1.1, "temperature": 0.8},
        {"loss_backend": "reference"},
        {"generation_kwargs": {"suppress_tokens": [6, 7]}},
        {"generation_batch_size": 16},
        {"remove_unused_columns": True},
    ],
    ids=lambda settings: next(iter(settings)),
)
def test_options(make_trainer: Make, settings: dict[str, Any]) -> None:
    trainer = make_trainer(**settings)
    before = {name: p.clone() for name, p in trainer.model.named_parameters()}
    trainer.train()
    assert all(math.isfinite(log["loss"]) for log in trainer.state.log_history[:2])
    assert any(not torch.equal(p, before[name]) for name, p in trainer.model.named_parameters())
    assert all(bool(p.isfinite().all()) for p in trainer.model.parameters())


def test_truncated_completions_are_masked(make_trainer: Make) -> None:
    trainer = make_trainer(mask_truncated_completions=True, trainer_arguments={"rollout_engine": ScriptedEngine()})
    made = record_rollouts(trainer)
    trainer.train()
    for ids, mask in zip(made[0].completion_ids, made[0].mask, strict=True):
        assert bool(mask.any()) is bool((ids == 2).any())


def test_adaptive_entropy_steers(make_trainer: Make) -> None:
    trainer = make_trainer(use_adaptive_entropy=True, entropy_coef=0.1, entropy_target=5.0, entropy_coef_delta=0.01)
    trainer.train()
    first, second = trainer.state.log_history[:2]
    assert first["entropy_coef"] == pytest.approx(0.11) and second["entropy_coef"] == pytest.approx(0.12)
    assert first["loss"] == pytest.approx(first["policy_loss"])  # nothing measured yet: no bonus
    assert second["loss"] == pytest.approx(second["policy_loss"] - 0.11 * second["entropy"], abs=1e-5)


class EmptyEngine(ScriptedEngine):
    def generate(self, prompt_ids: Any, num_generations: int, sampling: SamplingParams) -> Completions:
        return Completions([[] for _ in range(len(prompt_ids) * num_generations)])


@pytest.mark.parametrize(
    "settings", [{}, {"beta": 0.1}, {"entropy_coef": 0.1, "loss_type": "grpo"}, {"num_iterations": 2}]
)
def test_completions_of_zero_tokens(make_trainer: Make, settings: dict[str, Any]) -> None:
    trainer = make_trainer(
        None,
        lambda completions: [float(i) for i in range(len(completions))],
        trainer_arguments={"rollout_engine": EmptyEngine()},
        **settings,
    )
    trainer.train()
    log = trainer.state.log_history[0]
    assert log["loss"] == 0 and log["completions/max_length"] == 0 and log["live_fraction"] == 0
    assert all(bool(p.isfinite().all()) for p in trainer.model.parameters())


def test_context_is_never_exceeded(make_trainer: Make) -> None:
    """A completion may fill the context to the last token."""
    trainer = make_trainer(tiny_model(max_position_embeddings=12), max_completion_length=50)
    trainer.model.generation_config.eos_token_id = None
    trainer.engine.eos_token_ids = trainer.collector.eos_token_ids = []
    made = record_rollouts(trainer)
    trainer.train()
    for rollouts in made:
        longest = (rollouts.prompt_mask.sum(1) + rollouts.completion_mask.sum(1)).max()
        assert longest == 12


# Evaluation and logging


def test_evaluation(make_trainer: Make, prompts: Dataset) -> None:
    trainer = make_trainer(
        eval_strategy="steps",
        eval_steps=1,
        per_device_eval_batch_size=8,
        num_generations_eval=2,
        trainer_arguments={"eval_dataset": {"one": prompts.select(range(3)), "two": prompts.select(range(4))}},
    )
    sizes: list[int] = []
    collect = trainer.collector.collect

    def counting(examples: Any, *args: Any, **kwargs: Any) -> Any:
        sizes.append(len(examples))
        return collect(examples, *args, **kwargs)

    trainer.collector.collect = counting  # type: ignore[method-assign]
    before = [p.clone() for p in trainer.model.parameters()]
    metrics = trainer.evaluate()
    assert all(torch.equal(p, q) for p, q in zip(trainer.model.parameters(), before, strict=True))
    assert sizes == [6, 8]  # two completions for each prompt
    for name in ("eval_one_reward", "eval_two_reward", "eval_two_rewards/count_letters/mean", "eval_one_entropy"):
        assert isinstance(metrics[name], float)
    assert "eval_one_completions/mean_length" in metrics and "eval_one_loss" in metrics
    assert not any(name.startswith("eval") for name in trainer.metrics.values["train"])
    trainer.train()
    assert len([log for log in trainer.state.log_history if "eval_one_reward" in log]) == 2


def test_tensorboard(make_trainer: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    events = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    monkeypatch.setenv("TENSORBOARD_LOGGING_DIR", str(tmp_path / "logs"))
    make_trainer(report_to="tensorboard").train()
    (file,) = (tmp_path / "logs").rglob("events*")
    accumulator = events.EventAccumulator(str(file))
    accumulator.Reload()
    assert len(accumulator.Scalars("train/reward")) == 2
    assert {"train/live_fraction", "train/completions/mean_length"} <= set(accumulator.Tags()["scalars"])


def test_the_patch_can_be_removed_after_training(make_trainer: Make) -> None:
    trainer = make_trainer()
    trainer.train()
    for patch in trainer.patches:
        patch.remove()
    ids = torch.tensor([[6, 7, 8]])
    assert trainer.model(input_ids=ids).logits.shape == (1, 3, len(WORDS))


# Errors


@pytest.mark.parametrize(
    ("rows", "error", "message"),
    [
        ([], ValueError, "train_dataset: the dataset is empty"),
        (None, ValueError, "train_dataset: needed"),
        ([{"question": "a"}], ValueError, "train_dataset: no column 'prompt'; it has 'question'"),
        (Dataset.from_dict({"text": ["a"]}), ValueError, "no column 'prompt'; it has 'text'"),
        (Dataset.from_dict({"prompt": ["a"]}).to_iterable_dataset(), TypeError, "streamed"),
        (["a", "b"], TypeError, "expected rows that are dicts, got str"),
        ([{"prompt": 3}], ValueError, "the prompt of row 0 is int 3; expected a string, or a list of messages"),
        ([{"prompt": ["a"]}], ValueError, r"the prompt of row 0 is list \['a'\]"),
        ([{"prompt": []}], ValueError, "the prompt of row 0 is list"),
        ([{"prompt": "a"}], ValueError, "1 prompts are fewer than one rollout takes .2"),
        ([{"prompt": "a"}] * 3 + [{"prompt": None}] * 3, ValueError, "the prompt of row [345] is NoneType None"),
        ([{"prompt": "a"}] * 7 + [{"prompt": "a " * 70}], ValueError, "prompt of row 7 has 70 tokens.*context of 64"),
        ([{"prompt": "a"}] * 7 + [{"prompt": ""}], ValueError, "the prompt of row 7 has no tokens"),
        ([{"prompt": [{"role": "user", "content": "a"}]}] * 2, ValueError, "the tokenizer has no chat template"),
    ],
    ids=str,
)
def test_bad_datasets_are_one_clear_error(make_trainer: Make, rows: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        make_trainer(train_dataset=rows, max_steps=8).train()


def test_strings_and_conversations_do_not_mix(make_trainer: Make, tokenizer: PreTrainedTokenizerFast) -> None:
    tokenizer.chat_template = TEMPLATE
    rows = [{"prompt": "a"}, {"prompt": [{"role": "user", "content": "a"}]}]
    with pytest.raises(ValueError, match="strings and conversations are mixed"):
        make_trainer(train_dataset=rows, processing_class=tokenizer).train()


def test_a_prompt_that_the_template_refuses_is_named(make_trainer: Make, tokenizer: PreTrainedTokenizerFast) -> None:
    tokenizer.chat_template = (
        "{% if messages | length > 1 %}{{ raise_exception('one turn only') }}{% endif %}" + TEMPLATE
    )
    turn = {"role": "user", "content": "a"}
    with pytest.raises(ValueError, match="train_dataset: the prompt of row 1: TemplateError: one turn only"):
        make_trainer(train_dataset=[{"prompt": [turn]}, {"prompt": [turn] * 2}], processing_class=tokenizer).train()


def test_a_long_prompt_is_found_before_anything_is_sampled(make_trainer: Make) -> None:
    engine = ScriptedEngine()
    rows = [{"prompt": "a"}, {"prompt": "b " * 64}]
    with pytest.raises(ValueError, match="row 1 has 64 tokens"):
        make_trainer(train_dataset=rows, trainer_arguments={"rollout_engine": engine}).train()
    assert engine.calls == 0


def test_other_bad_arguments(make_trainer: Make, prompts: Dataset, tmp_path: Path) -> None:
    with pytest.raises(TypeError, match=r"args: expected a fastrl.GRPOConfig, got dict"):
        GRPOTrainer(tiny_model(), count_letters, args={}, train_dataset=prompts)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="model: expected a path or a transformers model, got Linear"):
        make_trainer(torch.nn.Linear(2, 2))
    with pytest.raises(TypeError, match="processing_class: expected a tokenizer, got str"):
        make_trainer(processing_class="gpt2")
    with pytest.raises(ValueError, match="processing_class: needed"):
        make_trainer(processing_class=None)
    with pytest.raises(ValueError, match="model_init_kwargs: only used with a model given by path"):
        make_trainer(model_init_kwargs={"dtype": "float32"})
    with pytest.raises(TypeError, match=r"peft_config: expected a peft.PeftConfig such as LoraConfig, got dict"):
        make_trainer(trainer_arguments={"peft_config": {}})
    with pytest.raises(ValueError, match="peft_config: the model already has a PEFT adapter"):
        wrapped = get_peft_model(tiny_model(), LoraConfig(target_modules=["q_proj"]))
        make_trainer(wrapped, trainer_arguments={"peft_config": LoraConfig(target_modules=["q_proj"])})
    with pytest.raises(ValueError, match=r"eval_dataset\['hard'\]: no column 'prompt'"):
        make_trainer(trainer_arguments={"eval_dataset": {"hard": [{"question": "a"}]}})
    with pytest.raises(ValueError, match="per_device_eval_batch_size x processes"):
        make_trainer(per_device_eval_batch_size=3, trainer_arguments={"eval_dataset": prompts}).evaluate()
    with pytest.raises(ValueError, match="eval_dataset: evaluation needs one"):
        make_trainer().evaluate()


def test_an_engine_that_loses_completions_is_an_error(make_trainer: Make) -> None:
    class Lossy(ScriptedEngine):
        def generate(self, prompt_ids: Any, num_generations: int, sampling: SamplingParams) -> Completions:
            return Completions(super().generate(prompt_ids, num_generations, sampling).ids[1:])

    with pytest.raises(RuntimeError, match="the rollout engine gave 7 completions for 8 prompts"):
        make_trainer(trainer_arguments={"rollout_engine": Lossy()}).train()


def test_a_path_is_loaded_in_float32_as_by_trl(tmp_path: Path) -> None:
    tiny_model().bfloat16().save_pretrained(tmp_path)
    assert model_setup.load_model(str(tmp_path), None, False).dtype == torch.float32
    assert model_setup.load_model(str(tmp_path), {"dtype": "bfloat16"}, False).dtype == torch.bfloat16
