"""The trainer's gradients: equal to an eager loss on logits, the same for any split into micro-batches, and the same
whether or not sequences without a gradient are run."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from tiny_runs import GradientRecorder, ScriptedEngine, count_letters, record_rollouts, tiny_model

from fastrl.trainers import GRPOTrainer
from fastrl.trainers.rollouts import Rollouts

Make = Callable[..., GRPOTrainer]

# per_device_train_batch_size x gradient_accumulation_steps, always 8 sequences to an optimizer step
SPLITS = [(8, 1), (4, 2), (2, 4), (1, 8)]


def scripted(
    make_trainer: Make, split: tuple[int, int] = (8, 1), **settings: Any
) -> tuple[GRPOTrainer, GradientRecorder]:
    recorder = GradientRecorder()
    arguments = {"rollout_engine": ScriptedEngine(), "callbacks": [recorder], **settings.pop("trainer_arguments", {})}
    trainer = make_trainer(
        **{
            "per_device_train_batch_size": split[0],
            "gradient_accumulation_steps": split[1],
            "max_grad_norm": 0.0,
            "max_steps": 1,
            "trainer_arguments": arguments,
            **settings,
        }
    )
    return trainer, recorder


def eager_gradients(
    weights: dict[str, torch.Tensor],
    rollouts: Rollouts,
    loss_type: str,
    temperature: float,
    beta: float,
    entropy_coef: float,
) -> dict[str, torch.Tensor]:
    """GRPO on policy, from logits, in float64, over all sequences at once."""
    model = tiny_model().double()
    model.load_state_dict(weights)
    reference = tiny_model().double()
    ids = torch.cat([rollouts.prompt_ids, rollouts.completion_ids], 1)
    mask = torch.cat([rollouts.prompt_mask, rollouts.completion_mask], 1).long()
    inputs = {"input_ids": ids, "attention_mask": mask, "position_ids": (mask.cumsum(1) - 1).clamp(min=0)}
    length = rollouts.completion_ids.shape[1]

    def log_probs(net: torch.nn.Module) -> torch.Tensor:
        return torch.log_softmax(net(**inputs).logits[:, -length - 1 : -1] / temperature, -1)

    full = log_probs(model)
    logps = full.gather(-1, rollouts.completion_ids.unsqueeze(-1)).squeeze(-1)
    ratio = torch.exp(logps - logps.detach())
    advantages = rollouts.advantages.double()[:, None]
    per_token = -torch.min(ratio * advantages, ratio.clamp(0.8, 1.2) * advantages)
    if beta:
        with torch.no_grad():
            ref = log_probs(reference).gather(-1, rollouts.completion_ids.unsqueeze(-1)).squeeze(-1)
        per_token = per_token + beta * ratio * (torch.exp(ref - logps) - (ref - logps) - 1)
    counts = rollouts.completion_mask.double()
    per_token = torch.where(rollouts.completion_mask, per_token, 0.0)
    if loss_type == "grpo":
        loss = (per_token.sum(1) / counts.sum(1).clamp(min=1)).mean()
    elif loss_type == "dr_grpo":
        loss = per_token.sum() / (len(rollouts) * 8)
    else:
        loss = per_token.sum() / counts.sum()
    entropy = -(full.exp() * full).sum(-1)
    loss = loss - entropy_coef * (entropy * counts).sum() / counts.sum()
    loss.backward()
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize(
    ("settings", "split"),
    [
        ({"loss_type": "dapo"}, (8, 1)),
        ({"loss_type": "dapo", "temperature": 0.7}, (2, 4)),
        ({"loss_type": "grpo"}, (4, 2)),
        ({"loss_type": "dr_grpo"}, (1, 8)),
        ({"loss_type": "bnpo"}, (8, 1)),
        ({"loss_type": "grpo", "beta": 0.3}, (2, 4)),
        ({"loss_type": "dapo", "entropy_coef": 0.05, "temperature": 1.5}, (2, 4)),
        ({"loss_type": "grpo", "importance_sampling_level": "sequence"}, (4, 2)),
    ],
    ids=lambda value: "-".join(map(str, value.values() if isinstance(value, dict) else value)),
)
def test_gradients_equal_the_eager_loss(make_trainer: Make, settings: dict[str, Any], split: tuple[int, int]) -> None:
    trainer, recorder = scripted(make_trainer, split, **settings)
    made = record_rollouts(trainer)
    # the KL's gradient vanishes where the policy is its reference
    if settings.get("beta"):
        with torch.no_grad():
            for i, parameter in enumerate(trainer.model.parameters()):
                parameter.add_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(i)) * 0.05)
    trainer.train()
    (rollouts,) = made
    lengths = set(rollouts.completion_mask.sum(1).tolist())
    assert {0, 8} < lengths and len(lengths) > 4  # as uneven as can be
    if settings.get("importance_sampling_level") == "sequence":
        # exp(mean log ratio) has, on policy, 1/|o| of each token's gradient: exactly grpo's weights once more
        weights = {name: w.double() for name, w in recorder.weights[0].items()}
        expected = eager_sequence_gradients(weights, rollouts)
    else:
        arguments = {"loss_type": "dapo", "temperature": 1.0, "beta": 0.0, "entropy_coef": 0.0, **settings}
        weights = {name: w.double() for name, w in recorder.weights[0].items()}
        expected = eager_gradients(weights, rollouts, **arguments)
    assert recorder.grads[0].keys() == expected.keys()
    scale = max(float(grad.abs().max()) for grad in expected.values())
    for name, grad in expected.items():
        torch.testing.assert_close(recorder.grads[0][name].double(), grad, rtol=1e-4, atol=1e-5 * scale, msg=name)


def eager_sequence_gradients(weights: dict[str, torch.Tensor], rollouts: Rollouts) -> dict[str, torch.Tensor]:
    model = tiny_model().double()
    model.load_state_dict(weights)
    ids = torch.cat([rollouts.prompt_ids, rollouts.completion_ids], 1)
    mask = torch.cat([rollouts.prompt_mask, rollouts.completion_mask], 1).long()
    length = rollouts.completion_ids.shape[1]
    logits = model(input_ids=ids, attention_mask=mask, position_ids=(mask.cumsum(1) - 1).clamp(min=0)).logits
    logps = torch.log_softmax(logits[:, -length - 1 : -1], -1)
    logps = logps.gather(-1, rollouts.completion_ids.unsqueeze(-1)).squeeze(-1)
    counts = rollouts.completion_mask.sum(1).clamp(min=1)
    log_ratio = torch.where(rollouts.completion_mask, logps - logps.detach(), 0.0).sum(1) / counts
    has_tokens = rollouts.completion_mask.any(1)
    (-(torch.exp(log_ratio) * rollouts.advantages * has_tokens).sum() / len(rollouts)).backward()
    return {name: p.grad for name, p in model.named_parameters()}


@pytest.mark.parametrize("settings", [{"loss_type": "dapo"}, {"loss_type": "grpo", "beta": 0.1, "entropy_coef": 0.01}])
def test_any_split_gives_the_same_gradient(make_trainer: Make, settings: dict[str, Any]) -> None:
    gradients = []
    for split in SPLITS:
        trainer, recorder = scripted(make_trainer, split, **settings)
        result = trainer.train()
        gradients.append((recorder.grads[0], result.training_loss))
    for grads, loss in gradients[1:]:
        assert loss == pytest.approx(gradients[0][1], abs=1e-6)
        for name, grad in gradients[0][0].items():
            torch.testing.assert_close(grads[name], grad, rtol=1e-3, atol=2e-6, msg=name)


def test_several_rollouts_in_one_optimizer_step_share_its_normalizer(make_trainer: Make) -> None:
    """steps_per_generation < gradient_accumulation_steps: four rollouts of one group each, lengths uneven."""
    one, recorder_one = scripted(make_trainer, (16, 1), shuffle_dataset=False)
    four, recorder_four = scripted(make_trainer, (4, 4), steps_per_generation=1, shuffle_dataset=False)
    assert one.args.generation_batch_size == 16 and four.args.generation_batch_size == 4
    one.train()
    four.train()
    assert (one.engine.calls, four.engine.calls) == (1, 4)
    for name, grad in recorder_one.grads[0].items():
        torch.testing.assert_close(recorder_four.grads[0][name], grad, rtol=1e-3, atol=2e-6, msg=name)


def one_sided(completions: list[str], prompts: list[str], **kwargs: Any) -> list[float]:
    """Unanimous in the groups of prompts that begin early in the alphabet: no gradient there."""
    return [1.0 if p[0] < "h" else r for p, r in zip(prompts, count_letters(completions), strict=True)]


@pytest.mark.parametrize("level", ["token", "sequence"])
@pytest.mark.parametrize("split", [(8, 2), (2, 8)], ids=["part_of_a_batch", "whole_batches"])
def test_skipping_dead_sequences_changes_nothing(make_trainer: Make, split: tuple[int, int], level: str) -> None:
    """Neither gradients, nor the clip ratios, nor weights and optimizer state after several steps."""
    ends = []
    for skip in (True, False):
        trainer, recorder = scripted(
            make_trainer,
            split,
            skip_dead_sequences=skip,
            reward_funcs=one_sided,
            max_steps=4,
            weight_decay=0.1,
            num_iterations=2,
            learning_rate=2e-2,  # so that the second iteration clips
            importance_sampling_level=level,
        )
        trainer.train()
        state = {i: s["exp_avg_sq"] for i, s in trainer.optimizer.state_dict()["state"].items()}
        ends.append((recorder.grads, dict(trainer.model.named_parameters()), state, trainer.state.log_history))
    (grads, weights, state, logs), (all_grads, all_weights, all_state, all_logs) = ends
    for step, all_step in zip(grads, all_grads, strict=True):
        for name in all_step:
            torch.testing.assert_close(step[name], all_step[name], rtol=1e-3, atol=1e-6, msg=name)
    for name in weights:
        torch.testing.assert_close(weights[name], all_weights[name], rtol=1e-3, atol=1e-4, msg=name)
    for key in state:
        torch.testing.assert_close(state[key], all_state[key], rtol=1e-2, atol=1e-9)
    for log, all_log in zip(logs[:-1], all_logs[:-1], strict=True):
        assert 0 < log["live_fraction"] < 1 and log["live_fraction"] == all_log["live_fraction"]
        for name in all_log:
            if name.startswith(("clip_ratio", "reward", "completions")):
                assert log[name] == pytest.approx(all_log[name], abs=1e-6), name
    assert logs[1]["clip_ratio/region_mean"] > 0


def test_a_step_without_any_live_sequence_runs_no_model_and_still_steps_the_optimizer(make_trainer: Make) -> None:
    """AdamW moves by momentum and decays weights on a zero gradient; on a missing one it does neither."""

    def then_unanimous(completions: list[str], trainer_state: Any, **kwargs: Any) -> list[float]:
        return count_letters(completions) if trainer_state.global_step == 0 else [1.0] * len(completions)

    ends = []
    for skip in (True, False):
        trainer, _ = scripted(
            make_trainer, (2, 4), skip_dead_sequences=skip, reward_funcs=then_unanimous, max_steps=3, weight_decay=0.1
        )
        calls: list[int] = []

        def count(*args: Any, calls: list[int] = calls, trainer: GRPOTrainer = trainer) -> None:
            calls.append(trainer.state.global_step)

        trainer.model.model.register_forward_hook(count)
        trainer.train()
        assert (max(calls) == 0) is skip
        ends.append((dict(trainer.model.named_parameters()), trainer.optimizer.state_dict()["state"]))
    (weights, state), (all_weights, all_state) = ends
    for name in weights:
        torch.testing.assert_close(weights[name], all_weights[name], rtol=1e-4, atol=1e-5, msg=name)
    for key, entry in state.items():
        assert entry["step"] == all_state[key]["step"] == 3
        torch.testing.assert_close(entry["exp_avg"], all_state[key]["exp_avg"], rtol=1e-3, atol=1e-6)


def test_training_from_the_first_step_without_a_live_sequence(make_trainer: Make) -> None:
    trainer, recorder = scripted(make_trainer, (4, 2), reward_funcs=lambda completions: [0.0] * len(completions))
    assert trainer.train().training_loss == 0.0
    assert all(not grad.any() for grad in recorder.grads[0].values())
    assert trainer.state.log_history[0]["live_fraction"] == 0.0
    assert trainer.state.log_history[0]["grad_norm"] == 0.0


def test_old_logps_are_scored_only_when_the_policy_moves_under_a_rollout(make_trainer: Make) -> None:
    for settings, expected in (
        ({}, False),
        ({"split": (4, 2), "steps_per_generation": 1}, False),
        ({"num_iterations": 2}, False),  # the first passes tell
        ({"num_iterations": 2, "model": tiny_model(attention_dropout=0.1)}, True),  # not with dropout
        ({"num_iterations": 2, "split": (4, 2), "steps_per_generation": 4}, True),
        ({"split": (4, 2), "steps_per_generation": 4}, True),
    ):
        trainer, _ = scripted(make_trainer, **settings)
        made = record_rollouts(trainer)
        trainer.train()
        assert (made[0].old_logps is not None) is expected, settings


def test_second_iteration_uses_the_ratio_to_the_policy_that_sampled(make_trainer: Make) -> None:
    """Against the eager loss with old log-probabilities, after the weights have moved and clipping sets in."""
    trainer, recorder = scripted(make_trainer, (8, 1), num_iterations=2, max_steps=2, learning_rate=3e-2)
    made = record_rollouts(trainer)
    trainer.train()
    assert trainer.engine.calls == 1
    logged = trainer.state.log_history[1]
    assert logged["clip_ratio/region_mean"] > 0
    (rollouts,) = made
    assert rollouts.old_logps is None  # kept from the first step's passes
    ids = torch.cat([rollouts.prompt_ids, rollouts.completion_ids], 1)
    mask = torch.cat([rollouts.prompt_mask, rollouts.completion_mask], 1).long()
    length = rollouts.completion_ids.shape[1]
    model = tiny_model().double()

    def logps_at(step: int) -> torch.Tensor:
        model.load_state_dict({name: w.double() for name, w in recorder.weights[step].items()})
        logits = model(input_ids=ids, attention_mask=mask, position_ids=(mask.cumsum(1) - 1).clamp(min=0)).logits
        logps = torch.log_softmax(logits[:, -length - 1 : -1], -1)
        return logps.gather(-1, rollouts.completion_ids.unsqueeze(-1)).squeeze(-1)

    with torch.no_grad():
        old_logps = logps_at(0)
    ratio = torch.exp(logps_at(1) - old_logps)
    advantages = rollouts.advantages[:, None]
    per_token = -torch.min(ratio * advantages, ratio.clamp(0.8, 1.2) * advantages)
    (torch.where(rollouts.completion_mask, per_token, 0.0).sum() / rollouts.completion_mask.sum()).backward()
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(recorder.grads[1][name].double(), parameter.grad, rtol=1e-3, atol=1e-5, msg=name)


def test_a_gradient_tolerance_reaches_the_loss_and_is_logged(make_trainer: Make) -> None:
    exact, exact_gradients = scripted(make_trainer)
    exact.train()
    trainer, gradients = scripted(make_trainer, grad_tolerance=0.3, logging_steps=1)
    trainer.train()
    log = next(entry for entry in trainer.state.log_history if "grad_skipped/rows" in entry)
    assert 0 < log["grad_skipped/rows"] < 1 and 0 < log["grad_skipped/norm"] <= 0.3
    assert not any("grad_skipped/rows" in entry for entry in exact.state.log_history)
    (one,), (other,) = exact_gradients.grads, gradients.grads
    distance = sum(float((one[name] - other[name]).square().sum()) for name in one) ** 0.5
    size = sum(float(one[name].square().sum()) for name in one) ** 0.5
    assert 0 < distance < 0.6 * size
