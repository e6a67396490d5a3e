"""PPO: its gradients are those of the definition, its rewards, values and KL go where they should, and it learns."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from ppo_runs import ROWS, Definition, early_letters, make_ppo, sequences_of, tiny_classifier
from safetensors.torch import load_file
from tiny_runs import GradientRecorder, ScriptedEngine, make_tokenizer, record_rollouts, tiny_model
from transformers import AutoModelForCausalLM, HfArgumentParser

from fastrl.rewards import RewardModel
from fastrl.rollout import TransformersEngine
from fastrl.rollout.policy_weights import policy_weights
from fastrl.trainers.ppo import PPOTrainer
from fastrl.trainers.ppo_config import PPOConfig
from fastrl.trainers.value_model import CRITIC, HEAD_FILE


def scores_of(completions: list[str], **kwargs: Any) -> list[float]:
    return [2 * score - 0.5 for score in early_letters(completions)]


def record_windows(trainer: PPOTrainer) -> list[list[tuple[list[int], list[int]]]]:
    """The sequences of each optimizer step."""
    windows: list[list[tuple[list[int], list[int]]]] = []
    trainer.start_window = lambda parts: windows.append([s for part in parts for s in sequences_of(part)])  # type: ignore[method-assign]
    return windows


# The definition ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("separate", [False, True], ids=["value head", "value model"])
@pytest.mark.parametrize(
    "settings",
    [
        {"kl_estimator": "k1", "entropy_coef": 0.02},
        {
            "kl_estimator": "k3",
            "whiten_rewards": True,
            "per_device_train_batch_size": 2,
            "gradient_accumulation_steps": 4,
        }
        | {"tokens_per_pass": 20, "local_rollout_forward_batch_size": 3},
    ],
    ids=["one micro-batch", "many passes"],
)
def test_steps_equal_the_definition(tmp_path: Path, separate: bool, settings: dict[str, Any]) -> None:
    """Two epochs of two mini-batches: loss and gradients of every step, with clips that hold and uneven lengths."""
    recorder, values = GradientRecorder(), tiny_classifier().double() if separate else None
    trainer = make_ppo(
        tmp_path,
        tiny_model().double(),
        reward_funcs=scores_of,
        arguments={
            "ref_model": tiny_model(seed=1).double(),
            "value_model": values,
            "rollout_engine": ScriptedEngine((8, 3, 8, 1, 3, 7, 5, 0)),
            "callbacks": [recorder],
        },
        **{
            "num_ppo_epochs": 2,
            "num_mini_batches": 2,
            "max_steps": 4,
            "learning_rate": 1e-3,
            "lr_scheduler_type": "constant",
            "max_grad_norm": 0.0,
            "kl_coef": 0.1,
            "gamma": 0.9,
            "lam": 0.8,
            "cliprange": 0.05,
            "cliprange_value": 0.02,
            "vf_coef": 0.5,
            "temperature": 0.8,
            "missing_eos_penalty": 0.3,
            **settings,
        },
    )
    torch.manual_seed(3)
    if not separate:
        torch.nn.init.normal_(trainer.critic.score.weight)  # type: ignore[union-attr, arg-type]
    windows, made = record_windows(trainer), record_rollouts(trainer)  # type: ignore[arg-type]
    trainer.train()

    (rollout,) = made
    sequences = sequences_of(rollout)
    assert {len(completion) for _, completion in sequences} == {0, 1, 3, 5, 8}
    texts = make_tokenizer().batch_decode([c for _, c in sequences], skip_special_tokens=True)
    scores = [score - 0.3 * (2 not in c) for score, (_, c) in zip(scores_of(texts), sequences, strict=True)]
    definition = Definition(trainer.args, sequences, scores)
    prefix = f"{CRITIC}."

    def models(step: int) -> tuple[Any, ...]:
        weights, policy = recorder.weights[step], tiny_model().double()
        policy.load_state_dict({name: w for name, w in weights.items() if not name.startswith(prefix)})
        own = {name.removeprefix(prefix): w for name, w in weights.items() if name.startswith(prefix)}
        if separate:
            critic = tiny_classifier().double()
            critic.load_state_dict({name.removeprefix("model."): w for name, w in own.items()})
            return policy, critic.score, critic
        head = torch.nn.Linear(32, 1).double()
        head.load_state_dict({name.removeprefix("score."): w for name, w in own.items()})
        return policy, head, None

    policy, head, critic = models(0)
    definition.prepare(policy, tiny_model(seed=1).double(), head, critic)
    for row, (_, completion) in enumerate(sequences):
        for name in ("advantages", "returns", "old_logps", "old_values"):
            ours, expected = getattr(rollout, name)[row, : len(completion)], getattr(definition, name)[row]
            torch.testing.assert_close(ours.double(), expected, rtol=1e-5, atol=1e-5)
    losses = [log["loss"] for log in trainer.state.log_history if "loss" in log]
    for step, window in enumerate(windows):
        policy, head, critic = models(step)
        loss = definition.loss(policy, head, critic, [sequences.index(sequence) for sequence in window])
        loss.backward()
        assert losses[step] == pytest.approx(loss.item(), abs=1e-5)
        gradients = {name: p.grad for name, p in policy.named_parameters()}
        if separate:
            gradients |= {f"{prefix}model.{name}": p.grad for name, p in critic.named_parameters()}
        else:
            gradients |= {f"{prefix}score.{name}": p.grad for name, p in head.named_parameters()}
        assert gradients.keys() == recorder.grads[step].keys()
        for name, gradient in gradients.items():
            torch.testing.assert_close(recorder.grads[step][name], gradient, rtol=1e-5, atol=1e-5, msg=f"{step} {name}")
    logs = trainer.state.log_history
    assert len(windows) == 4 and all(len(window) == 4 for window in windows)
    assert max(log.get("policy/clipfrac_avg", 0) for log in logs) > 0
    assert max(log.get("val/clipfrac_avg", 0) for log in logs) > 0


def test_any_split_gives_the_same_gradient(tmp_path: Path) -> None:
    grads = []
    for micro, steps, tokens in ((8, 1, None), (4, 2, 24), (1, 8, None)):
        recorder = GradientRecorder()
        trainer = make_ppo(
            tmp_path,
            num_ppo_epochs=1,
            max_steps=1,
            per_device_train_batch_size=micro,
            gradient_accumulation_steps=steps,
            tokens_per_pass=tokens,
            max_grad_norm=0.0,
            arguments={"rollout_engine": ScriptedEngine(), "callbacks": [recorder]},
        )
        made = record_rollouts(trainer)  # type: ignore[arg-type]
        trainer.train()
        assert made[0].old_logps is None  # on policy
        assert trainer.state.log_history[0]["val/ratio"] == 1.0
        grads.append(recorder.grads[0])
    assert grads[0][f"{CRITIC}.score.weight"].abs().sum() > 0
    for other in grads[1:]:
        for name, gradient in grads[0].items():
            torch.testing.assert_close(other[name], gradient, rtol=1e-4, atol=1e-6)


def test_without_kl_and_value_head_the_policy_is_not_scored(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """On policy with a value model of its own, nothing of the rollout but the values is needed beforehand."""
    trainer = make_ppo(
        tmp_path, kl_coef=0.0, num_ppo_epochs=1, max_steps=1, arguments={"value_model": tiny_classifier()}
    )
    calls = []
    monkeypatch.setattr("fastrl.trainers.value_model.head_logps", lambda *args, **kwargs: calls.append(args))
    trainer.train()
    assert trainer.reference is None and not calls
    assert "objective/kl" not in trainer.state.log_history[0]


# Rewards -------------------------------------------------------------------------------------------------------------


def test_reward_model_and_functions(tmp_path: Path) -> None:
    judge = tiny_classifier(seed=5, max_position_embeddings=64)
    trainer = make_ppo(
        tmp_path, reward_model=judge, reward_funcs=[early_letters], reward_weights=[1.0, 0.5], max_steps=1
    )
    given: list[Any] = []
    collect = trainer.collector.collect
    trainer.collector.collect = lambda *a, **k: given.append(collect(*a, **k)) or given[-1]  # type: ignore[method-assign, func-returns-value]
    trainer.train()
    prompts = [example.row["prompt"] for example in given[0].examples]
    judged = RewardModel(judge, make_tokenizer())(prompts, given[0].completions)
    expected = [a + 0.5 * b for a, b in zip(judged, early_letters(given[0].completions), strict=True)]  # type: ignore[operator]
    log = trainer.state.log_history[0]
    assert log["objective/scores"] == pytest.approx(sum(expected) / 8, rel=1e-4)
    assert log["rewards/LlamaForSequenceClassification/mean"] == pytest.approx(sum(judged) / 8, rel=1e-4)  # type: ignore[arg-type]
    assert log["objective/rlhf_reward"] == pytest.approx(log["objective/scores"] + log["objective/non_score_reward"])


def test_reward_model_by_path_in_the_arguments(tmp_path: Path) -> None:
    tiny_classifier(seed=5).save_pretrained(tmp_path / "judge")
    make_tokenizer().save_pretrained(tmp_path / "judge")
    trainer = make_ppo(tmp_path, reward_funcs=None, reward_model_path=str(tmp_path / "judge"), max_steps=1)
    assert trainer.rewards.names == ["judge"]


def test_a_completion_without_a_score_is_left_out(tmp_path: Path) -> None:
    def every_second(completions: list[str], **kwargs: Any) -> list[float | None]:
        return [None if i % 2 else 1.0 for i in range(len(completions))]

    trainer = make_ppo(tmp_path, reward_funcs=every_second, max_steps=1, arguments={"rollout_engine": ScriptedEngine()})
    made = record_rollouts(trainer)  # type: ignore[arg-type]
    trainer.train()
    assert not made[0].mask[1::2].any() and made[0].mask[::2].any()
    assert trainer.state.log_history[0]["objective/scores"] == 1.0
    assert not made[0].advantages[1::2].any()


@pytest.mark.parametrize(
    "stop", [{"stop_token": "eos"}, {"stop_token": None}, {"stop_token": None, "stop_token_id": 7}]
)
def test_stop_tokens(tmp_path: Path, stop: dict[str, Any]) -> None:
    trainer = make_ppo(tmp_path, response_length=24, **stop)
    samples = trainer.collector.collect(
        [trainer._prompts[i] for i in range(8)] * 4, "train_dataset", "train", trainer.state
    )
    token = 2 if stop["stop_token"] else stop.get("stop_token_id")
    ends = [ids.index(token) + 1 if token in ids else 24 for ids in samples.completion_ids]
    assert [len(ids) for ids in samples.completion_ids] == ends
    assert token is None or min(ends) < 24
    assert token == 2 or any(2 in ids[:-1] for ids in samples.completion_ids)


def test_adaptive_kl_follows_its_formula(tmp_path: Path) -> None:
    trainer = make_ppo(
        tmp_path, kl_target=0.2, kl_horizon=40, kl_coef=0.1, num_ppo_epochs=1, max_steps=5, learning_rate=3e-2
    )
    trainer.train()
    logs, coef = [log for log in trainer.state.log_history if "objective/kl" in log], 0.1
    for log in logs:
        assert log["objective/kl_coef"] == pytest.approx(coef)
        assert log["objective/non_score_reward"] == pytest.approx(-coef * log["objective/kl"], abs=1e-6)
        coef *= 1 + min(max(log["objective/kl"] / 0.2 - 1, -0.2), 0.2) * 8 / 40
    assert trainer.kl.coef == pytest.approx(coef) and coef != 0.1


# Models --------------------------------------------------------------------------------------------------------------


def test_the_value_head_is_saved_beside_the_policy_and_read_again(tmp_path: Path) -> None:
    trainer = make_ppo(tmp_path)
    trainer.train()
    folder = tmp_path / "saved"
    trainer.save_model(str(folder))
    assert not any(CRITIC in name for name in load_file(folder / "model.safetensors"))
    assert not any(CRITIC in name for name, _ in policy_weights(trainer.model))
    AutoModelForCausalLM.from_pretrained(folder)
    again = make_ppo(tmp_path, str(folder))
    saved = load_file(folder / HEAD_FILE)
    assert saved["weight"].abs().sum() > 0
    for name, tensor in again.critic.score.state_dict().items():  # type: ignore[union-attr]
        assert torch.equal(tensor, saved[name])


def test_lora_with_a_value_model(tmp_path: Path) -> None:
    """The adapter and the whole critic are trained; what is saved are an adapter and a model."""
    before = tiny_classifier()
    trainer = make_ppo(
        tmp_path,
        arguments={
            "peft_config": LoraConfig(r=4, target_modules=["q_proj", "lm_head"]),
            "value_model": tiny_classifier(),
        },
    )
    trained = {name for name, p in trainer.model.named_parameters() if p.requires_grad}
    assert trained and all("lora" in name or CRITIC in name for name in trained)
    trainer.train()
    assert trainer.reference is None and trainer.state.log_history[0]["objective/kl"] == pytest.approx(0.0, abs=1e-5)
    trainer.save_model(str(tmp_path / "saved"))
    assert not any(CRITIC in name for name in load_file(tmp_path / "saved" / "adapter_model.safetensors"))
    saved = type(before).from_pretrained(tmp_path / "saved" / "value_model")
    assert not torch.equal(saved.score.weight, before.score.weight)
    assert torch.equal(saved.score.weight, trainer.critic.model.score.weight)  # type: ignore[union-attr]


def test_an_adapter_as_the_reference(tmp_path: Path) -> None:
    model = get_peft_model(tiny_model(), LoraConfig(r=4, target_modules=["q_proj"]), adapter_name="policy")
    model.add_adapter("before", LoraConfig(r=4, target_modules=["q_proj"], init_lora_weights=False))
    trainer = make_ppo(tmp_path, model, model_adapter_name="policy", ref_adapter_name="before", max_steps=1)
    trainer.train()
    log = trainer.state.log_history[0]
    assert abs(log["objective/kl"]) > 1e-3  # the other adapter is random
    assert model.active_adapter == "policy"
    assert {
        name for name, p in model.named_parameters() if p.requires_grad and "lora" in name and ".before." in name
    } == set()
    with pytest.raises(ValueError, match=r"ref_adapter_name: expected None or an adapter of the model \(it has none\)"):
        make_ppo(tmp_path, ref_adapter_name="before")


def test_a_script_of_trl(tmp_path: Path) -> None:
    """Its arguments from a command line, a model of every kind, rows of input_ids, completions at the end."""
    line = "--num_ppo_epochs 1 --num_mini_batches 1 --per_device_train_batch_size 8 --gradient_accumulation_steps 1"
    line += f" --output_dir {tmp_path} --total_episodes 24 --missing_eos_penalty 1.0 --response_length 8 --use_cpu"
    line += " --local_rollout_forward_batch_size 4 --report_to none --learning_rate 1e-3 --logging_steps 1 --bf16 false"
    (training_args,) = HfArgumentParser(PPOConfig).parse_args_into_dataclasses(line.split())
    tokenizer = make_tokenizer()
    dataset = Dataset.from_dict({"prompt": ROWS * 2})
    dataset = dataset.map(lambda row: {"input_ids": tokenizer(row["prompt"])["input_ids"]}, remove_columns=["prompt"])
    trainer = PPOTrainer(
        args=training_args,
        processing_class=tokenizer,
        model=tiny_model(),
        ref_model=tiny_model(),
        reward_model=tiny_classifier(seed=5),
        value_model=tiny_classifier(seed=5),
        train_dataset=dataset,
        eval_dataset=dataset.select(range(8)),
        peft_config=None,
    )
    trainer.train()
    trainer.save_model(training_args.output_dir)
    assert trainer.state.global_step == 3
    assert [log["episode"] for log in trainer.state.log_history if "episode" in log] == [8, 16, 24]
    metrics = trainer.generate_completions()
    assert metrics["eval_objective/kl"] != 0 and "eval_val/explained_variance" in metrics


def test_tokenized_prompts_are_those_of_their_text(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="train_dataset: the input_ids of row 0 are not those of their text"):
        make_ppo(tmp_path, train_dataset=Dataset.from_dict({"input_ids": [[0, 6, 7]] * 8}))


def test_another_engine_is_corrected_for(tmp_path: Path) -> None:
    """Completions of another model than the policy: the ratio between the two is a factor of the policy term."""
    engine = TransformersEngine(tiny_model(seed=1), eos_token_ids=[2], pad_token_id=0)
    engine.sync_weights = lambda model: None  # type: ignore[method-assign]
    trainer = make_ppo(
        tmp_path,
        vllm_importance_sampling_mode="token_truncate",
        vllm_importance_sampling_clip_max=2.0,
        max_steps=1,
        temperature=1.0,
        arguments={"rollout_engine": engine},
    )
    made = record_rollouts(trainer)  # type: ignore[arg-type]
    trainer.train()
    (rollout,) = made
    assert rollout.importance_ratio is not None and rollout.old_logps is not None
    logps = over_sampled(engine.model, sequences_of(rollout))
    for row, expected in enumerate(logps):
        ratio = (rollout.old_logps[row, : len(expected)] - expected).exp().clamp(max=2.0)
        torch.testing.assert_close(rollout.importance_ratio[row, : len(expected)], ratio, rtol=1e-3, atol=1e-4)


@torch.no_grad()
def over_sampled(model: torch.nn.Module, sequences: list[tuple[list[int], list[int]]]) -> list[torch.Tensor]:
    """Log-probabilities of completions, one sequence at a time."""
    found = []
    for prompt, completion in sequences:
        ids = torch.tensor([prompt + completion])
        log_probs = torch.log_softmax(model(input_ids=ids).logits[0], -1)[len(prompt) - 1 : -1]
        found.append(log_probs.gather(-1, ids[0, len(prompt) :, None]).squeeze(-1))
    return found


def test_it_learns(tmp_path: Path) -> None:
    """The reward on prompts that were not trained on goes up."""
    held_out = Dataset.from_dict({"prompt": ["u v", "w", "x y z", "z a"] * 8})
    trainer = make_ppo(
        tmp_path,
        response_length=6,
        per_device_train_batch_size=16,
        per_device_eval_batch_size=32,
        max_steps=48,
        logging_steps=48,
        temperature=1.0,
        kl_coef=0.01,
        train_dataset=Dataset.from_dict({"prompt": ROWS * 4}),
        arguments={"eval_dataset": held_out},
    )
    before = trainer.evaluate()["eval_objective/scores"]
    trainer.train()
    after = trainer.evaluate()["eval_objective/scores"]
    assert after > before + 0.2, (before, after)


# Arguments -----------------------------------------------------------------------------------------------------------


def config(**settings: Any) -> PPOConfig:
    return PPOConfig("run", use_cpu=True, bf16=False, report_to="none", **settings)


@pytest.mark.parametrize(
    ("given", "micro", "steps", "rollout"),
    [((8, 1, 1), 8, 1, 8), ((8, 4, 2), 8, 2, 32), ((64, 1, 4), 16, 1, 64), ((4, 3, 2), 2, 3, 12), ((1, 6, 6), 1, 1, 6)],
)
def test_batches_are_those_of_trl(given: tuple[int, int, int], micro: int, steps: int, rollout: int) -> None:
    batch, accumulation, parts = given
    args = config(
        per_device_train_batch_size=batch,
        gradient_accumulation_steps=accumulation,
        num_mini_batches=parts,
        total_episodes=100,
    )
    assert (args.per_device_train_batch_size, args.gradient_accumulation_steps) == (micro, steps)
    assert (
        (args.batch_size, args.mini_batch_size) == (rollout, rollout // parts) == (batch * accumulation, micro * steps)
    )
    assert args.generation_batch_size == rollout and args.num_iterations == 4 and args.max_completion_length == 53
    assert args.num_total_batches == math.ceil(100 / rollout) and args.max_steps == args.num_total_batches * 4 * parts
    assert dataclasses.replace(args, seed=1).max_steps == args.max_steps


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"num_iterations": 2}, "num_iterations: it is called num_ppo_epochs here, expected None or 4, got 2"),
        ({"max_completion_length": 9}, "max_completion_length: it is called response_length here"),
        ({"num_ppo_epochs": 0}, "num_ppo_epochs: expected at least 1, got 0"),
        ({"response_length": -1}, "response_length: expected at least 1 token, got -1"),
        ({"per_device_train_batch_size": 0}, "per_device_train_batch_size: expected at least 1, got 0"),
        ({"batch_size": 3}, "batch_size: expected None, as it is computed"),
        ({"num_total_batches": 3}, "num_total_batches: expected None"),
        ({"per_device_train_batch_size": 3, "num_mini_batches": 2}, "num_mini_batches: expected a divisor of"),
        ({"steps_per_generation": 4}, "steps_per_generation: expected gradient_accumulation_steps x num_mini_batches"),
        ({"total_episodes": 8, "max_steps": 3}, "max_steps: expected -1 with total_episodes"),
        ({"num_sample_generations": 3}, "num_sample_generations: expected 10 or 0"),
        ({"stop_token": "period"}, "stop_token: expected None or 'eos'"),
        ({"stop_token": "eos", "stop_token_id": 3}, "stop_token_id: expected None with stop_token"),
        ({"mask_truncated_completions": True}, "mask_truncated_completions: expected False without stop_token"),
        ({"missing_eos_penalty": -1.0}, "missing_eos_penalty: expected None or a number above 0"),
        ({"kl_estimator": "k3+"}, "kl_estimator: expected k1 or k2 or k3 or abs"),
        ({"kl_target": 6.0, "kl_coef": 0.0}, "kl_target: expected a number above 0, and kl_coef likewise"),
        ({"kl_target": 6.0, "kl_horizon": 4.0}, "kl_horizon: expected at least a rollout"),
        ({"cliprange": -0.1}, "cliprange: expected a number of at least 0"),
        ({"gamma": 1.5}, "gamma: expected a number in"),
        ({"ref_adapter_name": "a", "kl_coef": 0.0}, "ref_adapter_name: expected None without a KL"),
        ({"ds3_gather_for_generation": False}, "ds3_gather_for_generation: not supported"),
    ],
)
def test_refused_settings(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        config(**settings)


def test_refused_arguments(tmp_path: Path) -> None:
    model, critic = tiny_model(), tiny_classifier()
    wide = type(critic)(type(critic.config)(**{**critic.config.to_dict(), "num_labels": 2}))
    for arguments, error, message in [
        ({"data_collator": list}, ValueError, "data_collator: not supported"),
        ({"ref_model": model}, ValueError, "ref_model: expected a model of its own"),
        ({"value_model": model}, ValueError, "value_model: expected a model of its own"),
        ({"value_model": wide}, ValueError, "value_model: expected a classifier with num_labels=1, got 2"),
        ({"value_model": 3}, TypeError, "value_model: expected a path or a transformers model, got int"),
    ]:
        with pytest.raises(error, match=message):
            make_ppo(tmp_path, model, arguments=arguments)
    with pytest.raises(ValueError, match="reward_model: expected a model, its path"):
        make_ppo(tmp_path, reward_funcs=None)
    with pytest.raises(TypeError, match=r"args: expected a fastrl.PPOConfig"):
        PPOTrainer(None, make_tokenizer(), model)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"model: expected a model, or its path in args.sft_model_path"):
        PPOTrainer(config(), make_tokenizer(), None)
