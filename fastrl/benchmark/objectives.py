"""A row per objective on given log-probabilities, scores or rewards: ours against the project that it comes from.

Both get the same tensors and compute the same numbers (ours under the origin's preset): loss and gradients, and the
metrics that each makes in the call. The truth is the origin's own code in fp64.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastrl.objectives.aggregation import aggregate_loss
from fastrl.objectives.dpo import PreferenceObjective
from fastrl.objectives.estimators import compute_advantages
from fastrl.objectives.kl import kl_estimate
from fastrl.objectives.kto import KTOObjective, kto_kl, kto_loss
from fastrl.objectives.pairs import PairObjective
from fastrl.objectives.policy import PolicyObjective, policy_loss
from fastrl.objectives.preference import preference_loss
from fastrl.objectives.reference_free import CPOObjective, ORPOObjective
from fastrl.objectives.reward_model import reward_model_loss
from fastrl.objectives.rollout_correction import RolloutCorrection, rollout_correction
from fastrl.objectives.value import value_loss

from . import objective_peers as peers
from .comparisons import Comparison
from .objective_peers import Form


class Batch(NamedTuple):
    """Completions of uneven length, (B, T); logps are 0 outside the mask, as fused heads give them."""

    mask: Tensor  # int64, 0 or 1
    logps: Tensor
    old_logps: Tensor  # 0.1 randn away
    ref_logps: Tensor  # likewise
    entropy: Tensor
    advantages: Tensor  # (B,)

    @property
    def sizes(self) -> dict[str, int]:
        return {"B": self.mask.shape[0], "T": self.mask.shape[1]}


def make_batch(b: int, t: int, device: torch.device) -> Batch:
    generator = torch.Generator(device).manual_seed(0)

    def randn(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, device=device)

    lengths = torch.randint(t // 2, t + 1, (b, 1), generator=generator, device=device)
    mask = (torch.arange(t, device=device) < lengths).long()

    def inside(logps: Tensor) -> Tensor:
        return logps.clamp(max=-1e-3) * mask

    logps = -(randn(b, t) - 0.5).exp()
    old, ref = (inside(logps + 0.1 * randn(b, t)) for _ in range(2))
    return Batch(mask, inside(logps), old, ref, randn(b, t).abs(), randn(b))


# Policy -------------------------------------------------------------------------------------------------------------

# verl's name: our loss type and options, then verl's. Every candidate of clip_cov is cut, so that no draw is left.
_COV = {"clip_cov_ratio": 0.1, "clip_cov_lb": 4.0, "clip_cov_ub": 1e9}
VERL_POLICIES: Mapping[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
    "vanilla": ("ppo", {}, {}),
    "dppo_tv": ("dppo_tv", {"epsilon": 0.05}, {"clip_ratio_low": 0.05, "clip_ratio_high": 0.05}),
    "dppo_kl": ("dppo_kl", {"epsilon": 0.01}, {"clip_ratio_low": 0.01, "clip_ratio_high": 0.01}),
    "gspo": ("gspo", {"epsilon": 0.004}, {"clip_ratio_low": 0.004, "clip_ratio_high": 0.004}),
    "sapo": ("sapo", {}, {}),
    "gpg": ("gpg", {}, {}),
    "clip_cov": ("clip_cov", _COV, {"policy": _COV}),
    "kl_cov": ("kl_cov", {"ppo_kl_coef": 0.1}, {"policy": {"ppo_kl_coef": 0.1}}),
    "geo_mean": ("gmpo", {"epsilon": 0.1}, {"clip_ratio_low": 0.1, "clip_ratio_high": 0.1}),
    "dro": ("dro", {"dro_beta": 0.05}, {"policy": {"dro_beta": 0.05}}),
    "cispo": ("cispo", {}, {}),
}

# Our loss type, then options of both, then TRL's alone.
TRL_POLICIES: tuple[tuple[str, dict[str, Any], dict[str, Any]], ...] = (
    ("grpo", {}, {}),
    ("grpo", {"beta": 0.04}, {}),
    ("bnpo", {}, {}),
    ("dr_grpo", {"max_completion_length": 512}, {}),
    ("dapo", {"delta": 1.3}, {}),
    ("luspo", {"importance_sampling_level": "sequence", "epsilon": 0.004}, {}),
    ("gspo", {"epsilon": 0.004}, {"loss_type": "grpo", "importance_sampling_level": "sequence"}),
    ("cispo", {"epsilon_high": 1.1}, {}),
    ("sapo", {}, {}),
    ("vespo", {}, {}),
    ("gmpo", {"epsilon": 0.1}, {"module": "trl.experimental.gmpo.gmpo", "kind": "GMPO"}),
    ("rloo", {}, {"module": "trl.trainer.rloo", "kind": "RLOO"}),
)


def policy_comparisons(b: int, t: int, device: torch.device) -> Iterator[Comparison]:
    """Every policy loss of verl, with advantages per token as it has them, and of TRL, with one per completion."""
    batch = make_batch(b, t, device)
    tokens = {"logps": batch.logps, "old_logps": batch.old_logps}
    each = {**tokens, "advantages": batch.advantages.unsqueeze(-1) * batch.mask, "mask": batch.mask != 0}
    for name, (loss_type, options, config) in VERL_POLICIES.items():
        aggregation = "seq-mean-token-mean" if name in ("gspo", "sapo") else "token-mean"
        if name == "gspo":
            options = {**options, "aggregation": aggregation}
        objective = PolicyObjective(loss_type=loss_type, preset="verl", **options)
        yield Comparison(
            group="policy losses of verl", title=loss_type, sizes=batch.sizes, inputs=each,
            ours=partial(_policy, objective),
            peers={f"verl {name}": partial(peers.verl_policy, name, aggregation, **config)},
        )  # fmt: skip
    items = int(batch.mask.sum())
    for loss_type, options, config in TRL_POLICIES:
        objective = PolicyObjective(loss_type=loss_type, preset="trl", **options)
        inputs = {**tokens, "advantages": batch.advantages, "mask": batch.mask, "entropy": batch.entropy}
        inputs["ref_logps"] = batch.ref_logps
        arguments = {"loss_type": loss_type, "items": items, **options, **config}
        title = loss_type + ", KL" * bool(objective.beta)
        yield Comparison(
            group="policy losses of TRL", title=title, sizes=batch.sizes, inputs=inputs,
            ours=partial(_policy, objective),
            peers={f"TRL {arguments.get('kind', 'GRPO')}Trainer": partial(peers.trl_policy, **arguments)},
        )  # fmt: skip


def _policy(objective: PolicyObjective, logps: Tensor, ref_logps: Tensor | None = None, **inputs: Any) -> Tensor:
    return policy_loss(logps, objective, ref_logps=ref_logps if objective.beta else None, **inputs).loss


# Value and KL -------------------------------------------------------------------------------------------------------


def critic_comparisons(b: int, t: int, device: torch.device) -> Iterator[Comparison]:
    """The value loss and the KL penalty of verl's actor."""
    batch = make_batch(b, t, device)
    values = {
        "values": batch.logps, "old_values": batch.old_logps, "returns": batch.entropy - 1, "mask": batch.mask != 0,
    }  # fmt: skip
    for aggregation in ("token-mean", "seq-mean-token-mean"):
        yield Comparison(
            group="value and KL", title=f"clipped value loss, {aggregation}", sizes=batch.sizes, inputs=values,
            leaves=("values",), ours=partial(_value, aggregation),
            peers={"verl compute_value_loss": partial(peers.verl_value, 0.2, aggregation)},
        )  # fmt: skip
    pair = {"logps": batch.logps, "ref_logps": batch.ref_logps, "mask": batch.mask != 0}
    for estimator in ("k1", "abs", "k2", "k3", "k1+", "k3+"):
        yield Comparison(
            group="value and KL", title=f"KL, {estimator}", sizes=batch.sizes, inputs=pair,
            ours=partial(_kl, estimator),
            peers={"verl kl_penalty": partial(peers.verl_kl, estimator)},
        )  # fmt: skip


def _value(aggregation: str, values: Tensor, old_values: Tensor, returns: Tensor, mask: Tensor) -> Tensor:
    return value_loss(
        values, returns, mask=mask, old_values=old_values, cliprange_value=0.2, aggregation=aggregation, eps=1e-8
    ).loss


def _kl(estimator: str, logps: Tensor, ref_logps: Tensor, mask: Tensor) -> Tensor:
    return aggregate_loss(kl_estimate(logps, ref_logps, estimator, clamp="verl"), "token-mean", mask=mask)


# Rollout correction -------------------------------------------------------------------------------------------------

# By title, verl's arguments.
CORRECTIONS: Mapping[str, dict[str, Any]] = {
    "token weights": {"rollout_is": "token", "rollout_is_threshold": 1.2},
    "token weights, IcePop": {"rollout_is": "token", "rollout_is_threshold": "0.8_1.2"},
    "token weights, batch normalised": {
        "rollout_is": "token", "rollout_is_threshold": 1.2, "rollout_is_batch_normalize": True,
    },
    "sequence weights": {"rollout_is": "sequence", "rollout_is_threshold": 2.0},
    "token rejection": {"rollout_rs": "token_k1", "rollout_rs_threshold": "0.8_1.25"},
    "chained rejections": {
        "rollout_rs": "seq_mean_k1,token_k3,seq_max_k2", "rollout_rs_threshold": "0.99_1.01,0.05,0.1",
    },
    "sequence weights and rejection": {
        "rollout_is": "sequence", "rollout_is_threshold": 2.0, "rollout_rs": "seq_mean_k3",
        "rollout_rs_threshold": 0.006,
    },
}  # fmt: skip


def correction_comparisons(b: int, t: int, device: torch.device) -> Iterator[Comparison]:
    """verl's importance weights and rejection masks between rollout engine and trainer."""
    batch = make_batch(b, t, device)
    inputs = {"logps": batch.logps, "rollout_logps": batch.old_logps, "mask": batch.mask}
    for title, options in CORRECTIONS.items():
        correction = RolloutCorrection.verl(**options)
        yield Comparison(
            group="rollout correction", title=title, sizes=batch.sizes, inputs=inputs, leaves=(),
            ours=partial(_correction, correction), peers={"verl": partial(peers.verl_correction, **options)},
        )  # fmt: skip


def _correction(correction: RolloutCorrection, logps: Tensor, rollout_logps: Tensor, mask: Tensor) -> dict[str, Tensor]:
    out = rollout_correction(logps, rollout_logps, correction, mask=mask)
    return {"mask": out.mask} if out.weights is None else {"mask": out.mask, "weights": out.weights}


# Advantages ---------------------------------------------------------------------------------------------------------


def advantage_comparisons(b: int, t: int, device: torch.device) -> Iterator[Comparison]:
    """Every estimator of verl, from rewards per token (an outcome at the last one), in groups of eight."""
    batch = make_batch(b, t, device)
    last = (batch.mask.sum(-1) - 1).unsqueeze(-1)
    rewards = torch.zeros_like(batch.logps).scatter(1, last, batch.advantages.unsqueeze(-1))
    groups = torch.arange(b, device=device) // 8
    base = {"rewards": rewards, "mask": batch.mask}
    path = {"old_log_probs": batch.old_logps, "sum_pi_squared": batch.entropy.clamp(max=1.0)}
    discounts = {"gamma": 0.99, "lam": 0.95}
    # The name, then tensors that both take, options of verl's, options of ours.
    rows: tuple[tuple[str, dict[str, Tensor], dict[str, Any], dict[str, Any]], ...] = (
        ("grpo", {}, {}, {}),
        ("grpo_vectorized", {}, {}, {}),
        ("grpo_passk", {}, {"config": {}}, {}),
        ("rloo", {}, {}, {}),
        ("rloo_vectorized", {}, {}, {}),
        ("opo", {}, {}, {}),
        ("gpg", {}, {}, {}),
        ("reinforce_plus_plus_baseline", {}, {}, {}),
        ("reinforce_plus_plus", {}, {"config": {"gamma": 0.99}}, {"gamma": 0.99}),
        ("remax", {"reward_baselines": batch.advantages.flip(0)}, {}, {}),
        ("gae", {"values": batch.entropy}, discounts, discounts),
        ("optimal_token_baseline", path, {}, {}),
        ("tir_optimal_token_baseline", path, {}, {}),
    )
    for name, tensors, theirs, options in rows:
        index = None if name in ("gae", "remax", "reinforce_plus_plus") else groups
        yield Comparison(
            group="advantages", title=name, sizes=batch.sizes, inputs={**base, **tensors}, leaves=(),
            ours=partial(_advantages, name, groups, options),
            peers={"verl": partial(peers.verl_advantages, name, index, **theirs)},
        )  # fmt: skip
    functions = {"correct": batch.advantages, "format": batch.advantages.flip(0)}
    yield Comparison(
        group="advantages", title="gdpo", sizes=batch.sizes, leaves=(),
        inputs={"rewards": torch.stack(list(functions.values()), -1), "mask": batch.mask},
        ours=partial(_advantages, "gdpo", groups, {}),
        peers={"verl": partial(peers.verl_gdpo, functions, groups)},
    )  # fmt: skip


# verl's names of the tensors that ours takes under others.
_OURS = {"reward_baselines": "baseline_rewards", "old_log_probs": "logps"}


def _advantages(
    name: str, groups: Tensor, options: Mapping[str, Any], rewards: Tensor, mask: Tensor, **tensors: Tensor
) -> dict[str, Tensor]:
    named: dict[str, Any] = {_OURS.get(key, key): x for key, x in tensors.items()}
    advantages, returns = compute_advantages(name, rewards, mask, preset="verl", group_ids=groups, **named, **options)
    return {"advantages": advantages, "returns": returns}


# Preferences and rewards --------------------------------------------------------------------------------------------

_SMOOTHED = {"exo_pair": 1e-3, "robust": 0.1}
DPO_LOSSES = (
    "sigmoid", "hinge", "ipo", "exo_pair", "nca_pair", "robust", "bco_pair", "sppo_hard", "aot", "aot_unpaired",
    "apo_zero", "apo_down", "discopop", "sft", "sigmoid_norm",
)  # fmt: skip


def preference_comparisons(b: int, t: int, device: torch.device) -> Iterator[Comparison]:
    """The preference losses of TRL's trainers on b answers, and its reward model's loss on b pairs."""
    batch = make_batch(b, t, device)
    tokens = {"logps": batch.logps, "mask": batch.mask}
    judged = {**tokens, "ref_logps": batch.ref_logps}

    def compare(title: str, ours: Form, name: str, peer: partial[Form], inputs: Mapping[str, Tensor]) -> Comparison:
        return Comparison(
            group="preference", title=title, sizes=batch.sizes, inputs=inputs, ours=ours, peers={name: peer}
        )

    for loss in DPO_LOSSES:
        smoothing = _SMOOTHED.get(loss, 0.0)
        objective = PreferenceObjective(loss_type=loss, beta=0.1, label_smoothing=smoothing)
        peer = partial(peers.trl_dpo, loss, batch.mask, beta=0.1, label_smoothing=smoothing)
        yield compare(f"DPO, {loss}", partial(_pairs, objective), "TRL DPOTrainer", peer, judged)
    for loss in ("sigmoid", "hinge", "ipo", "simpo"):
        cpo = CPOObjective(loss_type=loss, beta=0.1)
        peer = partial(peers.trl_pairs, "CPO", mean=cpo.average_log_prob, loss_type=loss, beta=0.1)
        yield compare(f"CPO, {loss}", partial(_pairs, cpo), "TRL CPOTrainer", peer, tokens)
    peer = partial(peers.trl_pairs, "ORPO", mean=True, beta=0.1)
    yield compare("ORPO", partial(_pairs, ORPOObjective(beta=0.1)), "TRL ORPOTrainer", peer, tokens)
    labels = torch.arange(b, device=device) % 2 == 0
    for loss in ("kto", "apo_zero_unpaired"):
        peer = partial(peers.trl_kto, loss, batch.mask, labels, beta=0.1)
        ours = partial(_kto, KTOObjective(loss_type=loss, beta=0.1), labels)
        mismatched = {"kl_logps": batch.logps.flip(0), "ref_kl_logps": batch.ref_logps.flip(0)}
        yield compare(f"KTO, {loss}", ours, "TRL KTOTrainer", peer, {**judged, **mismatched})
    scores = torch.randn(3, b, generator=torch.Generator(device).manual_seed(1), device=device)
    yield Comparison(
        group="preference", title="reward model", sizes={"B": b}, leaves=("chosen", "rejected"),
        inputs=dict(zip(("chosen", "rejected", "margin"), scores, strict=True)), ours=_reward,
        peers={"TRL RewardTrainer": partial(peers.trl_reward, center_rewards_coefficient=0.01)},
    )  # fmt: skip


def _pairs(objective: PairObjective, logps: Tensor, mask: Tensor, ref_logps: Tensor | None = None) -> Tensor:
    chosen, rejected = logps.chunk(2)
    chosen_mask, rejected_mask = mask.chunk(2)
    if ref_logps is None:
        return preference_loss(chosen, rejected, objective, chosen_mask=chosen_mask, rejected_mask=rejected_mask).loss
    ref_chosen, ref_rejected = ref_logps.chunk(2)
    return preference_loss(
        chosen, rejected, objective, chosen_mask=chosen_mask, rejected_mask=rejected_mask, ref_chosen_logps=ref_chosen,
        ref_rejected_logps=ref_rejected, chosen_entropy=ref_chosen, rejected_entropy=ref_rejected,
    ).loss  # fmt: skip


def _kto(
    objective: KTOObjective, labels: Tensor, logps: Tensor, ref_logps: Tensor, kl_logps: Tensor, ref_kl_logps: Tensor,
    mask: Tensor,
) -> Tensor:  # fmt: skip
    kl = kto_kl(kl_logps, ref_kl_logps, mask=mask.flip(0)) if objective.needs_kl else None
    return kto_loss(logps, objective, labels=labels, mask=mask, ref_logps=ref_logps, kl=kl, entropy=ref_logps).loss


def _reward(chosen: Tensor, rejected: Tensor, margin: Tensor) -> Tensor:
    return reward_model_loss(chosen, rejected, margin=margin, center_rewards_coefficient=0.01).loss
