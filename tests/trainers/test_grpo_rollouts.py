"""What happens to rollouts between engine and loss: other engines, correction, references that move, experts, logs."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from test_grpo_gradients import scripted
from tiny_runs import WORDS, ScriptedEngine, record_rollouts, tiny_model
from transformers import LlamaConfig, LlamaForSequenceClassification, MixtralConfig, MixtralForCausalLM

from fastrl.integrations import router_loss
from fastrl.objectives import RolloutCorrection, rollout_correction
from fastrl.rollout import Completions, SamplingParams
from fastrl.trainers import GRPOConfig, GRPOTrainer
from fastrl.trainers.activation_offloading import OffloadedActivations

Make = Callable[..., GRPOTrainer]


class TellingEngine(ScriptedEngine):
    """Says log-probabilities, of its own invention, where it is asked for them."""

    def generate(
        self, prompt_ids: Sequence[Sequence[int]], num_generations: int, sampling: SamplingParams
    ) -> Completions:
        """See RolloutEngine."""
        ids = super().generate(prompt_ids, num_generations, sampling).ids
        generator = torch.Generator().manual_seed(len(ids))
        logps = [(-3.5 - torch.rand(len(row), generator=generator)).tolist() for row in ids]
        return Completions(ids, logps if sampling.logps else None)


def told(make_trainer: Make, **settings: Any) -> tuple[GRPOTrainer, list[Any]]:
    trainer, _ = scripted(make_trainer, trainer_arguments={"rollout_engine": TellingEngine()}, **settings)
    made = record_rollouts(trainer)
    trainer.train()
    return trainer, made


@pytest.mark.parametrize("mode", ["sequence_mask", "token_truncate"])
def test_the_mismatch_with_another_engine_is_corrected(make_trainer: Make, mode: str) -> None:
    trainer, (rollouts,) = told(make_trainer, vllm_importance_sampling_mode=mode)
    correction = RolloutCorrection.trl(mode, 3.0, None)
    expected = rollout_correction(rollouts.old_logps, rollouts.sampling_logps, correction, mask=rollouts.mask)
    assert torch.equal(rollouts.importance_ratio, expected.weights)
    assert not torch.equal(expected.weights, rollouts.mask.float())
    log = trainer.state.log_history[0]
    name = "sampling/importance_sampling_ratio/mean"
    assert log[name] == pytest.approx(expected.metrics[name].item())
    assert log["sampling/sampling_logp_difference/mean"] > 0


def test_tokens_that_a_correction_rejects_leave_the_loss(make_trainer: Make) -> None:
    correction = RolloutCorrection.verl(rollout_is="token", rollout_rs="token_k1", rollout_rs_threshold="0.9_1.2")
    arguments = {"rollout_engine": TellingEngine(), "correction": correction}
    trainer, _ = scripted(make_trainer, trainer_arguments=arguments)
    made = record_rollouts(trainer)
    trainer.train()
    (rollouts,) = made
    expected = rollout_correction(
        rollouts.old_logps, rollouts.sampling_logps, correction, mask=rollouts.completion_mask
    ).mask
    assert torch.equal(rollouts.mask, expected) and 0 < expected.sum() < rollouts.completion_mask.sum()
    assert trainer.state.log_history[0]["rollout_corr/rollout_rs_masked_fraction"] > 0


def test_the_correction_can_be_switched_off(make_trainer: Make) -> None:
    _, (rollouts,) = told(make_trainer, vllm_importance_sampling_correction=False)
    assert rollouts.importance_ratio is None and rollouts.sampling_logps is None and rollouts.old_logps is None


def test_old_logps_of_the_engine_cost_no_pass(make_trainer: Make) -> None:
    trainer, (rollouts,) = told(make_trainer, old_logps_from_engine=True)
    assert torch.equal(rollouts.old_logps, rollouts.sampling_logps) and rollouts.importance_ratio is None
    assert trainer.state.log_history[0]["clip_ratio/region_mean"] > 0  # its numbers are far from the policy's


def test_own_sampling_logps_are_those_of_the_policy(make_trainer: Make) -> None:
    trainer = make_trainer(old_logps_from_engine=True, num_iterations=2, temperature=0.8)
    made = record_rollouts(trainer)
    scores = []
    make = trainer.make_rollouts
    trainer.make_rollouts = lambda *a, **k: scores.append(trainer.policy_logps(rollouts := make(*a, **k))) or rollouts  # type: ignore[method-assign,func-returns-value]
    trainer.train()
    torch.testing.assert_close(made[0].old_logps, scores[0], rtol=1e-4, atol=1e-4)


def test_a_reference_follows_the_policy(make_trainer: Make) -> None:
    trainer, recorder = scripted(
        make_trainer, beta=0.1, sync_ref_model=True, ref_model_sync_steps=2, ref_model_mixup_alpha=0.25, max_steps=3
    )
    assert trainer.reference is not None
    before = {name: p.clone() for name, p in trainer.reference.named_parameters()}
    trainer.train()
    for name, parameter in trainer.reference.named_parameters():
        expected = 0.75 * before[name] + 0.25 * recorder.weights[2][name]
        torch.testing.assert_close(parameter, expected)
    assert trainer.state.log_history[-2]["kl"] > 0


def test_experts_get_their_auxiliary_loss_alone_where_no_reward_differs(make_trainer: Make) -> None:
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = MixtralConfig(
        vocab_size=len(WORDS), num_key_value_heads=2, num_local_experts=4, pad_token_id=0, bos_token_id=1,
        eos_token_id=2, sliding_window=None, max_position_embeddings=64, **sizes,
    )  # fmt: skip
    model = MixtralForCausalLM(config)
    trainer, recorder = scripted(
        make_trainer,
        model=model,
        reward_funcs=lambda completions: [0.0] * len(completions),
        router_aux_loss_coef=0.5,
        share_prompts=False,
    )
    made = record_rollouts(trainer)
    trainer.train()
    model.load_state_dict(recorder.weights[0])
    model.zero_grad()
    (layout,) = trainer.packer.passes(made[0].select(made[0].mask.any(-1)))
    out = model.model(**layout.inputs, output_router_logits=True)
    (0.5 * router_loss(model, out.router_logits, layout.tokens)).backward()
    assert trainer.state.log_history[0]["aux_loss"] > 0
    for name, parameter in model.named_parameters():
        if parameter.grad is not None:
            torch.testing.assert_close(recorder.grads[0][name], parameter.grad, rtol=1e-4, atol=1e-6)
    assert any("gate" in name and grad.abs().max() > 1e-5 for name, grad in recorder.grads[0].items())


def test_an_auxiliary_loss_without_experts_is_refused(make_trainer: Make) -> None:
    with pytest.raises(ValueError, match=r"router_aux_loss_coef: 0.1, but LlamaForCausalLM has no mixture"):
        make_trainer(router_aux_loss_coef=0.1)


def test_offloaded_activations_change_no_gradient(make_trainer: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    _, recorder = (pair := scripted(make_trainer))
    pair[0].train()
    moved = []

    def moves(self: OffloadedActivations, tensor: torch.Tensor) -> bool:  # also what is on the CPU already
        moved.append(self._is_activation(tensor))
        return moved[-1]

    monkeypatch.setattr(OffloadedActivations, "moves", moves)
    monkeypatch.setattr("fastrl.trainers.activation_offloading.SMALLEST", 16)
    trainer, offloaded = scripted(make_trainer, activation_offloading=True)
    trainer.train()
    assert sum(moved) > 20 and not all(moved)
    for name, grad in recorder.grads[0].items():
        assert torch.equal(grad, offloaded.grads[0][name])


def test_the_head_in_fp32(make_trainer: Make) -> None:
    model = tiny_model().to(torch.bfloat16)
    trainer = make_trainer(model, cast_lm_head_to_fp32=True)
    trainer.train()
    assert model.lm_head.weight.dtype == torch.float32 and model.model.norm.weight.dtype == torch.bfloat16
    with pytest.raises(ValueError, match="cast_lm_head_to_fp32: not with tied embeddings"):
        make_trainer(tiny_model(tie_word_embeddings=True), cast_lm_head_to_fp32=True)


def test_a_reward_model_and_a_table_of_completions(make_trainer: Make, tokenizer: Any, tmp_path: Path) -> None:
    torch.manual_seed(1)
    config = LlamaConfig(
        vocab_size=len(WORDS), hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2,
        num_labels=1, pad_token_id=0,
    )  # fmt: skip
    judge = LlamaForSequenceClassification(config)

    def length(completion_ids: list[list[int]], log_extra: Any, **kwargs: Any) -> list[float]:
        log_extra("tokens", [len(ids) for ids in completion_ids])
        return [float(len(ids)) for ids in completion_ids]

    trainer = make_trainer(
        reward_funcs=[judge, length],
        reward_weights=[1.0, 0.5],
        log_completions=True,
        num_completions_to_print=1,
        reward_timeout=60.0,
        trainer_arguments={"reward_processing_classes": [tokenizer, None]},
    )
    trainer.train()
    log = trainer.state.log_history[0]
    assert log["rewards/LlamaForSequenceClassification/std"] > 0 and log["rewards/length/mean"] > 0
    import pyarrow.parquet as pq

    (table, _) = (pq.read_table(path) for path in sorted((tmp_path / "run" / "completions").glob("*.parquet")))
    assert table.num_rows == 8
    rewards = table["rewards/length"] if "rewards/length" in table.column_names else table["length"]
    assert rewards.to_pylist() == [float(n) for n in table["tokens"].to_pylist()]
    assert sum(table["advantage"].to_pylist()) == pytest.approx(0.0, abs=1e-4)


# Dynamic sampling


def half_hopeless(completions: list[str], answer: list[str], **kwargs: Any) -> list[float | None]:
    """The same for every completion of an odd prompt; no reward at all for the prompt 5."""
    rewards = [0.0 if int(i) % 2 else float(len(c.split())) for c, i in zip(completions, answer, strict=True)]
    return [None if i == "5" else reward for reward, i in zip(rewards, answer, strict=True)]


def groups_of(rollouts: Any) -> list[tuple[int, ...]]:
    return [tuple(ids[mask].tolist()) for ids, mask in zip(rollouts.prompt_ids, rollouts.prompt_mask, strict=True)][::4]


def test_unanimous_groups_give_way_to_others(make_trainer: Make) -> None:
    trainer, _ = scripted(
        make_trainer, reward_funcs=half_hopeless, dynamic_sampling=True, max_steps=6, shuffle_dataset=False
    )
    made = record_rollouts(trainer)
    trainer.train()
    lively = {(6,), (9, 10, 11), (16,), (19, 20, 21, 22, 23)}  # the prompts 0, 2, 4 and 6
    for rollouts in made:
        assert len(rollouts) == 8 and set(groups_of(rollouts)) <= lively
        assert (rollouts.advantages.view(2, 4) != 0).any(-1).all()
    logs = trainer.state.log_history[:6]
    assert [log["dynamic_sampling/groups_unfilled"] for log in logs] == [0.0] * 6
    assert all(log["dynamic_sampling/groups_dropped"] >= 1 for log in logs)  # an even prompt comes with an odd one
    # the reward is that of the prompts as they came
    assert logs[0]["frac_reward_zero_std"] == 0.5
    drawn = trainer._drawn
    assert drawn > 0 and trainer.resume_state()[0]["drawn"] == drawn


def test_a_dataset_without_a_lesson_ends_the_refill(make_trainer: Make) -> None:
    trainer, recorder = scripted(
        make_trainer, reward_funcs=lambda completions: [None] * len(completions), dynamic_sampling=True,
        max_resample_rounds=2,
    )  # fmt: skip
    made = record_rollouts(trainer)
    trainer.train()
    assert trainer.engine.calls == 3 and len(made[0]) == 8 and not made[0].advantages.any()
    log = trainer.state.log_history[0]
    assert log["dynamic_sampling/rounds"] == 2 and log["dynamic_sampling/groups_unfilled"] == 2
    assert log["dynamic_sampling/unanimous_fraction"] == 1.0
    assert not any(grad.any() for grad in recorder.grads[0].values())


def test_dynamic_sampling_needs_whole_groups(make_trainer: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(GRPOConfig, "world_size", 2)
    with pytest.raises(ValueError, match=r"dynamic_sampling: a process's completions \(2 "):
        make_trainer(dynamic_sampling=True, per_device_train_batch_size=2)


# Asynchronous rollouts


def test_rollouts_of_an_older_policy_are_corrected(make_trainer: Make, prompts: Any) -> None:
    trainer = make_trainer(
        async_rollouts=True, max_staleness=2, max_steps=6, eval_strategy="steps", eval_steps=3,
        per_device_eval_batch_size=8, trainer_arguments={"eval_dataset": prompts.select(range(2))},
    )  # fmt: skip
    made = record_rollouts(trainer)
    trainer.train()
    logs = [log for log in trainer.state.log_history if "sampling/staleness" in log]
    staleness = [log["sampling/staleness"] for log in logs]
    assert len(staleness) == 6 and max(staleness) <= 2 and staleness[-1] >= 1
    trained = [rollouts for rollouts in made if rollouts.importance_ratio is not None]
    assert any((rollouts.importance_ratio - rollouts.mask.float()).abs().max() > 1e-3 for rollouts in trained)
    names = {"eval_reward", "eval_completions/mean_length"}
    assert any(names <= log.keys() for log in trainer.state.log_history)
    assert trainer.evaluate()["eval_reward"] >= 0  # with the engine alone, once training is over
    # the order of prompts is that of the synchronous run
    expected = [groups_of(rollouts) for rollouts in made if len(rollouts) == 8][:2]
    other = make_trainer(max_steps=2)
    others = record_rollouts(other)
    other.train()
    assert [groups_of(rollouts) for rollouts in others] == expected


def test_asynchronous_rollouts_without_correction_are_refused(make_trainer: Make) -> None:
    with pytest.raises(ValueError, match="async_rollouts: expected False, as GRPOTrainer does not correct"):
        make_trainer(async_rollouts=True, vllm_importance_sampling_correction=False)


def test_data_from_their_beginning_are_not_sampled_ahead(make_trainer: Make) -> None:
    settings = {"save_strategy": "steps", "save_steps": 1}
    make_trainer(async_rollouts=True, max_steps=1, **settings).train()
    settings = {"max_steps": 2, "ignore_data_skip": True, "seed": 3}
    ahead, in_turn = (make_trainer(async_rollouts=ahead, **settings) for ahead in (True, False))
    with pytest.raises(ValueError, match=r"^ignore_data_skip: .* resume with async_rollouts=False, or without"):
        ahead.train(resume_from_checkpoint=True)
    in_turn.train(resume_from_checkpoint=True)
    assert in_turn.state.global_step == 2


class CopyEngine(ScriptedEngine):
    """Has the weights of its last update, and notes at each evaluation whether they are the policy's of now."""

    def __init__(self, policy: Any) -> None:
        super().__init__()
        self.policy = policy
        self.fresh: list[bool] = []

    def sync_weights(self, model: Any) -> None:
        """See RolloutEngine."""
        super().sync_weights(model)
        self.weights = self.policy.lm_head.weight.detach().clone()

    def generate(
        self, prompt_ids: Sequence[Sequence[int]], num_generations: int, sampling: SamplingParams
    ) -> Completions:
        """See RolloutEngine."""
        if num_generations == 2:
            self.fresh.append(torch.equal(self.weights, self.policy.lm_head.weight))
        return super().generate(prompt_ids, num_generations, sampling)


@pytest.mark.parametrize("ahead", [False, True], ids=["in turn", "async"])
@pytest.mark.parametrize("several", [False, True], ids=["one dataset", "two"])
def test_an_evaluation_is_of_the_weights_of_now(make_trainer: Make, prompts: Any, ahead: bool, several: bool) -> None:
    model = tiny_model()
    engine = CopyEngine(model)
    trainer = make_trainer(
        model,
        trainer_arguments={
            "rollout_engine": engine,
            "eval_dataset": {"one": prompts, "two": prompts} if several else prompts,
        },
        async_rollouts=ahead,
        max_steps=4,
        eval_strategy="steps",
        eval_steps=2,
        num_generations_eval=2,
        per_device_eval_batch_size=4,
    )
    trainer.train()
    batches = len(prompts) * 2 // 4
    assert engine.fresh == [True] * batches * 2 * (2 if several else 1)
    assert engine.synced == 4 + 2  # an update for each rollout, one for each evaluation
    if ahead:
        assert all(log["sampling/staleness"] <= 1 for log in trainer.state.log_history if "sampling/staleness" in log)
