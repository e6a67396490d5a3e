"""PPO: a policy objective and a critic's value loss in one call; each is defined in its own file."""

from __future__ import annotations

from typing import Any, NamedTuple

from torch import Tensor

from .policy import LossOutput, PolicyObjective, linear_policy_loss, policy_loss
from .value import ValueOutput, linear_value_loss, value_loss


class PPOOutput(NamedTuple):
    """What a PPO loss returns."""

    loss: Tensor  # scalar, differentiable
    logps: Tensor  # (B, T), detached; 0 where a token was not scored
    values: Tensor  # (B, T), detached; 0 outside the mask
    metrics: dict[str, Tensor]  # those of the policy loss and of the value loss, detached scalars


def ppo_loss(
    logps: Tensor,  # (B, T)
    values: Tensor,  # (B, T)
    objective: PolicyObjective,
    *,
    advantages: Tensor,  # (B, T)
    returns: Tensor,  # (B, T)
    mask: Tensor,  # (B, T)
    old_values: Tensor | None = None,  # (B, T)
    vf_coef: float = 0.1,
    cliprange_value: float | None = 0.2,
    value_mask: Tensor | None = None,  # (B, T)
    value_aggregation: str = "token-mean",
    value_normalizer: Tensor | float | None = None,
    value_length: float | None = None,
    cu_seqlens: Tensor | None = None,  # (B + 1,)
    **policy: Any,
) -> PPOOutput:
    """Proximal policy optimization with a critic (Schulman et al. 2017, eq. 9):

        loss = policy_loss + vf_coef * value_loss          the entropy bonus is the objective's entropy_coef

    `policy_loss(logps, objective, advantages=..., mask=..., **policy)` plus `vf_coef` times `value_loss(values,
    returns, mask=value_mask, ...)`: neither formula is written again here. Advantages and returns come from
    `fastrl.gae`. Use it where a critic gives each token its own advantage; without a critic see the group-relative
    objectives.

    Args:
        logps, objective, advantages, mask: see `policy_loss`; policy: any other argument of it (old_logps, ref_logps,
            entropy, normalizer, ...). Pass advantages per token, as `gae` makes them.
        values, returns, old_values, cliprange_value: see `value_loss`.
        vf_coef: weight of the value loss; 0.1 in TRL. verl and OpenRLHF train the critic apart (its own optimizer).
        value_mask: where the values count; None: mask.
        value_aggregation, value_normalizer, value_length: of the value loss, see `value_loss`.
        cu_seqlens: `(B + 1,)` bounds of packed sequences; every `(B, T)` is then `(N,)`.

    Returns:
        PPOOutput. Metrics: those of `policy_loss` and `value_loss`.

    Raises:
        ValueError, TypeError: as `policy_loss` and `value_loss`.
    """
    actor = policy_loss(logps, objective, advantages=advantages, mask=mask, cu_seqlens=cu_seqlens, **policy)
    critic = value_loss(
        values, returns, mask=mask if value_mask is None else value_mask, old_values=old_values,
        cliprange_value=cliprange_value, aggregation=value_aggregation, normalizer=value_normalizer,
        length=value_length, cu_seqlens=cu_seqlens,
    )  # fmt: skip
    return _together(actor, critic, vf_coef)


def linear_ppo_loss(
    hidden: Tensor,  # (B, T, D)
    weight: Tensor,  # (V, D)
    ids: Tensor,  # (B, T)
    objective: PolicyObjective,
    *,
    value_weight: Tensor,  # (1, D)
    advantages: Tensor,  # (B, T)
    returns: Tensor,  # (B, T)
    mask: Tensor,  # (B, T)
    value_bias: Tensor | None = None,  # (1,)
    value_hidden: Tensor | None = None,  # (B, T, D')
    old_values: Tensor | None = None,  # (B, T)
    vf_coef: float = 0.1,
    cliprange_value: float | None = 0.2,
    value_mask: Tensor | None = None,  # (B, T)
    value_aggregation: str = "token-mean",
    value_normalizer: Tensor | float | None = None,
    value_length: float | None = None,
    cu_seqlens: Tensor | None = None,  # (B + 1,)
    **policy: Any,
) -> PPOOutput:
    """The PPO loss straight from hidden states, LM head and value head.

    Eager equivalent: `ppo_loss` of `linear_logprobs(hidden, weight, ids)` and of `hidden @ value_weight.T +
    value_bias`. The policy takes `linear_policy_loss`'s single pass over its live rows, 6lNDV FLOPs; the value head
    multiplies the rows of its mask, 6ND, a share 1 / V of that.

    Args:
        value_weight: `(1, D)`, value_bias: `(1,)`: the value head.
        value_hidden: `(B, T, D')`, hidden states of a critic with a body of its own; None: the policy's.
        hidden, weight, ids, policy (old_logps, bias, temperature, backend, ...): see `linear_policy_loss`.
        The rest: see `ppo_loss`.
    """
    actor = linear_policy_loss(
        hidden, weight, ids, objective, advantages=advantages, mask=mask, cu_seqlens=cu_seqlens, **policy
    )
    critic = linear_value_loss(
        hidden if value_hidden is None else value_hidden, value_weight, returns, bias=value_bias,
        mask=mask if value_mask is None else value_mask, old_values=old_values, cliprange_value=cliprange_value,
        aggregation=value_aggregation, normalizer=value_normalizer, length=value_length, cu_seqlens=cu_seqlens,
    )  # fmt: skip
    return _together(actor, critic, vf_coef)


def _together(actor: LossOutput, critic: ValueOutput, vf_coef: float) -> PPOOutput:
    return PPOOutput(
        actor.loss + vf_coef * critic.loss, actor.logps, critic.values, {**actor.metrics, **critic.metrics}
    )
