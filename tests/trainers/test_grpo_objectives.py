"""Every policy objective through the trainer: in passes, in micro-batches and without the dead sequences, the gradient
is that of its definition on logits over the whole optimizer step."""

import dataclasses
from collections.abc import Callable
from typing import Any

import pytest
import torch
from peft import LoraConfig
from test_grpo_gradients import scripted
from tiny_runs import record_rollouts, tiny_model

from fastrl.objectives import compute_advantages, policy_loss
from fastrl.objectives.surrogates import LOSSES
from fastrl.trainers import GRPOTrainer
from fastrl.trainers.rollouts import Rollouts

Make = Callable[..., GRPOTrainer]


def stale(trainer: GRPOTrainer) -> list[Rollouts]:
    """Rollouts of another policy and another engine, drawn after the fact; the list gets them as they are made."""
    make, made = trainer.make_rollouts, []

    def making(*args: Any, **kwargs: Any) -> Rollouts:
        rollouts = make(*args, **kwargs)
        generator = torch.Generator().manual_seed(5)
        old, sampling = (
            trainer.policy_logps(rollouts) + 0.3 * torch.randn(rollouts.mask.shape, generator=generator)
            for _ in range(2)
        )
        made.append(
            dataclasses.replace(
                rollouts,
                old_logps=old * rollouts.mask,
                sampling_logps=sampling * rollouts.mask,
                importance_ratio=0.5 + torch.rand(len(rollouts), 1, generator=generator),
            )
        )
        return made[-1]

    trainer.make_rollouts = making  # type: ignore[method-assign]
    return made


def distributions(model: torch.nn.Module, rollouts: Rollouts) -> torch.Tensor:
    """(B, T, V) log-probabilities."""
    ids = torch.cat([rollouts.prompt_ids, rollouts.completion_ids], 1)
    mask = torch.cat([rollouts.prompt_mask, rollouts.completion_mask], 1).long()
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    logits = model(input_ids=ids, attention_mask=mask, position_ids=positions).logits
    return torch.log_softmax(logits[:, -rollouts.completion_ids.shape[1] - 1 : -1], -1)


def defined_gradients(
    trainer: GRPOTrainer, weights: dict[str, torch.Tensor], rollouts: Rollouts
) -> dict[str, torch.Tensor]:
    model, reference = tiny_model().double(), tiny_model().double()
    model.load_state_dict({name: w.double() for name, w in weights.items()})
    full = distributions(model, rollouts)

    def taken(x: torch.Tensor) -> torch.Tensor:
        return x.gather(-1, rollouts.completion_ids.unsqueeze(-1)).squeeze(-1)

    objective, terms = trainer.objective, {}
    if objective.beta != 0:
        with torch.no_grad():
            before = distributions(reference, rollouts)
        terms = {"ref_logps": taken(before)}
        if objective.exact_kl:
            terms = {"kl": (full.exp() * (full - before)).sum(-1)}
    loss = policy_loss(
        taken(full),
        objective,
        advantages=rollouts.advantages.double(),
        mask=rollouts.mask,
        old_logps=None if rollouts.old_logps is None else rollouts.old_logps.double(),
        sampling_logps=None if rollouts.sampling_logps is None else rollouts.sampling_logps.double(),
        importance_ratio=None if rollouts.importance_ratio is None else rollouts.importance_ratio.double(),
        entropy=-(full.exp() * full).sum(-1),
        backend="reference",
        **terms,
    ).loss
    loss.backward()
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


OBJECTIVES: list[dict[str, Any]] = [
    *({"loss_type": name} for name in LOSSES if name not in ("bnpo", "clip_cov", "kl_cov")),
    {"loss_type": "luspo", "importance_sampling_level": "sequence"},
    {"loss_type": "vespo", "preset": "trl"},
    {"loss_type": "gmpo", "preset": "trl"},
    {"loss_type": "gspo", "preset": "verl", "entropy_coef": 0.05},
    {"loss_type": "ppo", "preset": "verl", "aggregation": "seq-mean-token-mean"},
    {"loss_type": "dapo", "preset": "openrlhf", "nll_coef": 0.1},
    {"loss_type": "dapo", "aggregation": "token-sum"},
    {"loss_type": "grpo", "off_policy_mask_threshold": 0.05},
    {"loss_type": "grpo", "beta": 0.3, "kl_estimator": "full", "entropy_coef": 0.02},
    {"loss_type": "gspo", "beta": 0.3, "kl_estimator": "full"},
    {"loss_type": "rloo", "beta": 0.3, "kl_estimator": "k2", "advantage_baseline": "leave_one_out"},
]


@pytest.mark.parametrize("settings", OBJECTIVES, ids=lambda s: "-".join(str(value) for value in s.values()))
def test_gradients_are_those_of_the_definition(make_trainer: Make, settings: dict[str, Any]) -> None:
    trainer, recorder = scripted(make_trainer, (4, 2), tokens_per_pass=16, **settings)  # several passes of each half
    made = stale(trainer)
    with torch.no_grad():  # the KL's gradient vanishes where the policy is its reference
        for i, parameter in enumerate(trainer.model.parameters()):
            parameter.add_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(i)) * 0.05)
    trainer.train()
    expected = defined_gradients(trainer, recorder.weights[0], made[0])
    scale = max(float(grad.abs().max()) for grad in expected.values())
    assert scale > 0
    for name, grad in expected.items():
        torch.testing.assert_close(recorder.grads[0][name].double(), grad, rtol=1e-4, atol=1e-5 * scale, msg=name)


@pytest.mark.parametrize("loss_type", ["clip_cov", "kl_cov"])
def test_covariances_are_taken_over_a_whole_micro_batch(make_trainer: Make, loss_type: str) -> None:
    gradients = []
    for tokens_per_pass in (1, None):
        share = {"clip_cov_ratio": 0.2, "clip_cov_lb": 0.0, "clip_cov_ub": 1e3, "kl_cov_ratio": 0.2}
        share = {name: value for name, value in share.items() if name.startswith(loss_type)}
        trainer, recorder = scripted(make_trainer, loss_type=loss_type, tokens_per_pass=tokens_per_pass, **share)
        stale(trainer)
        trainer.train()
        gradients.append(recorder.grads[0])
        assert trainer.state.log_history[0][f"{loss_type}/selected_mean"] > 0
    for name, grad in gradients[0].items():
        torch.testing.assert_close(grad, gradients[1][name], rtol=1e-4, atol=1e-6)


def test_exact_kl_with_an_adapter_is_zero_at_the_start(make_trainer: Make) -> None:
    """The reference is the model without its adapter, which begins as nothing."""
    trainer, _ = scripted(
        make_trainer,
        beta=0.5,
        kl_estimator="full",
        max_steps=2,
        trainer_arguments={"peft_config": LoraConfig(r=2, target_modules=["q_proj", "lm_head"])},
    )
    trainer.train()
    first, second = (log["kl"] for log in trainer.state.log_history[:2])
    assert abs(first) < 1e-6 < second


@pytest.mark.parametrize("estimator", ["opo", "gpg", "reinforce_plus_plus", "reinforce_plus_plus_baseline"])
def test_advantage_estimators(make_trainer: Make, estimator: str) -> None:
    trainer, _ = scripted(make_trainer, advantage_estimator=estimator)
    made, rewards = record_rollouts(trainer), []
    reward = trainer.collector.reward
    trainer.collector.reward = lambda *args: rewards.append(reward(*args)) or rewards[-1]  # type: ignore[method-assign,func-returns-value]
    trainer.train()
    groups = torch.arange(8) // 4
    expected, _ = compute_advantages(estimator, rewards[0][:, 0], made[0].mask, group_ids=groups)
    assert torch.equal(made[0].advantages[:, None] * made[0].mask, expected)
    assert len(made[0].advantages.unique()) > 3
