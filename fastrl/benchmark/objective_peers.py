"""The peers' own loss functions on given tensors: verl's, those of TRL's trainers, Liger's modules.

Each maker gives a function of the inputs that `objectives` names, or raises `Absent` with the reason. A TRL trainer is
made without its `__init__`: its configuration holds TRL's defaults, and only what a model would compute is replaced by
given tensors. Everything after the forward, metrics included, is the code of the installed version.
"""

from __future__ import annotations

import dataclasses
from collections import defaultdict
from collections.abc import Callable, Mapping
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from .peers import _import

# Takes the inputs by name; gives the loss, or named results where nothing is differentiated.
Form = Callable[..., Tensor | Mapping[str, Tensor]]


class Absent(Exception):
    """A peer that can't run here: the message says why."""


def need(module: str, attribute: str) -> Any:
    found, absent = _import(module, attribute)
    if absent:
        raise Absent(absent)
    return found


# verl ---------------------------------------------------------------------------------------------------------------

_CORE = "verl.trainer.ppo.core_algos"
_CORRECTION = "verl.trainer.ppo.rollout_corr_helper"


def verl_policy(name: str, aggregation: str, *, policy: Mapping[str, Any] | None = None, **config: Any) -> Form:
    """A registered policy loss: `config` are fields of the actor's configuration, `policy` of its `policy_loss`."""
    loss = need(_CORE, "get_policy_loss_fn")(name)
    actor = need("verl.workers.config", "ActorConfig")(
        strategy="fsdp", rollout_n=1, ppo_micro_batch_size_per_gpu=1,
        policy_loss=need("verl.workers.config", "PolicyLossConfig")(loss_mode=name, **(policy or {})), **config,
    )  # fmt: skip

    def run(logps: Tensor, old_logps: Tensor, advantages: Tensor, mask: Tensor) -> Tensor:
        return loss(old_logps, logps, advantages, mask, aggregation, actor)[0]

    return run


def verl_advantages(name: str, groups: Tensor | None = None, **options: Any) -> Form:
    """A registered estimator; it takes the groups as an array of names, as verl's trainer has them."""
    estimator = need(_CORE, "get_adv_estimator_fn")(name)
    if groups is not None:
        options["index"] = groups.cpu().numpy().astype(str).astype(object)
    if "config" in options:
        options["config"] = need("verl.trainer.config", "AlgoConfig")(**options["config"])

    def run(rewards: Tensor, mask: Tensor, **inputs: Any) -> dict[str, Tensor]:
        advantages, returns = estimator(token_level_rewards=rewards, response_mask=mask, **inputs, **options)
        return {"advantages": advantages, "returns": returns}

    return run


def verl_gdpo(functions: Mapping[str, Tensor], groups: Tensor) -> Form:
    """Its estimator for several rewards, which it reads from the batch by their names."""
    estimate = verl_advantages("gdpo", groups, config={"gdpo_reward_keys": list(functions)})
    given = {name: x.cpu().numpy() for name, x in functions.items()}

    def run(rewards: Tensor, mask: Tensor) -> Mapping[str, Tensor] | Tensor:
        batch = {"prompts": mask[:, :0], "attention_mask": mask}
        return estimate(mask.to(rewards.dtype), mask, non_tensor_batch=given, batch=batch)

    return run


def verl_correction(**options: Any) -> Form:
    """Rollout weights and rejection mask with their metrics, as the trainer asks for them in one call."""
    function = need(_CORRECTION, "compute_rollout_correction_and_rejection_mask")

    def run(logps: Tensor, rollout_logps: Tensor, mask: Tensor) -> dict[str, Tensor]:
        weights, kept, _ = function(logps, rollout_logps, mask, **options)
        out = {"mask": kept}
        return out if weights is None else {**out, "weights": weights.batch["rollout_is_weights"]}

    return run


def verl_value(cliprange: float, aggregation: str) -> Form:
    function = need(_CORE, "compute_value_loss")

    def run(values: Tensor, old_values: Tensor, returns: Tensor, mask: Tensor) -> Tensor:
        return function(values, returns, old_values, mask, cliprange, aggregation)[0]

    return run


def verl_kl(estimator: str) -> Form:
    """`kl_penalty` of each token, then the mean over the mask: the KL term of its actor's loss."""
    penalty, aggregate = need(_CORE, "kl_penalty"), need(_CORE, "agg_loss")

    def run(logps: Tensor, ref_logps: Tensor, mask: Tensor) -> Tensor:
        return aggregate(penalty(logps, ref_logps, estimator), mask, "token-mean")

    return run


# TRL ----------------------------------------------------------------------------------------------------------------


class _Model(SimpleNamespace):
    """What stands for a model: it returns what it was given."""

    training = True
    is_gradient_checkpointing = False
    _modules: Mapping[str, Any] = {}  # not compiled

    def __call__(self, **inputs: Any) -> Any:
        return self.outputs


def _trainer(module: str, kind: str, **state: Any) -> Any:
    """A trainer of TRL's without `__init__`: arguments have their defaults, `state` is what differs and the rest."""
    made, config = need(f"{module}_trainer", f"{kind}Trainer"), need(f"{module}_config", f"{kind}Config")
    args = {f.name: f.default for f in dataclasses.fields(config) if f.default is not dataclasses.MISSING}
    # One process: collective operations give back what they get.
    accelerator = SimpleNamespace(
        gather=_same, gather_for_metrics=_same, reduce=_same, pad_across_processes=_same, num_processes=1,
        device=torch.device("cpu"), sync_gradients=True,
    )  # fmt: skip
    itself = made.__new__(made)
    itself.__dict__.update(args)  # it keeps most of its arguments under the same name
    itself.__dict__.update(
        accelerator=accelerator, model=_Model(), aux_loss_enabled=False, _total_train_tokens=0, _tp_size=1,
        args=SimpleNamespace(**{**args, **state}), **state,
    )  # fmt: skip
    return itself


def _same(x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    return x


def _metrics() -> dict[str, Any]:
    return {"train": defaultdict(list)}


def trl_policy(module: str = "trl.trainer.grpo", kind: str = "GRPO", *, items: int, **config: Any) -> Form:
    """`_compute_loss` of the GRPO, GMPO or RLOO trainer where an optimizer step is one batch of `items` tokens."""
    epsilon = config.setdefault("epsilon", 0.2)
    itself = _trainer(
        module, kind, epsilon_low=epsilon, epsilon_high=config.pop("epsilon_high", epsilon), steps_per_generation=1,
        current_gradient_accumulation_steps=1, _entropy_bonus_enabled=False, use_adaptive_entropy=False, **config,
    )  # fmt: skip
    count = torch.tensor(items)

    def run(
        logps: Tensor, mask: Tensor, advantages: Tensor, entropy: Tensor, old_logps: Tensor, ref_logps: Tensor
    ) -> Tensor:
        nothing = mask[:, :0]
        itself._metrics = _metrics()
        itself._get_per_token_logps_and_entropies = lambda *args, **kwargs: (logps, entropy, None)
        batch = {
            "prompt_ids": nothing, "prompt_mask": nothing, "completion_ids": nothing, "completion_mask": mask,
            "advantages": advantages, "num_items_in_batch": count, "old_per_token_logps": old_logps,
            "ref_per_token_logps": ref_logps,
        }  # fmt: skip
        if kind == "RLOO":
            batch["old_logps"] = (old_logps * mask).sum(1)
        return itself._compute_loss(None, batch)

    return run


def trl_dpo(loss_type: str, mask: Tensor, **config: Any) -> Form:
    """`DPOTrainer._compute_loss`. Pairs are stacked, chosen first; masked logps are 0, as its fused head gives them."""
    itself = _trainer(
        "trl.trainer.dpo", "DPO", loss_types=[loss_type], loss_weights=[1.0], ref_model=_Model(),
        precompute_ref_logps=False, **config,
    )  # fmt: skip
    batch = _batch(mask)

    def run(logps: Tensor, ref_logps: Tensor, mask: Tensor) -> Tensor:
        itself._metrics = _metrics()
        itself.ref_model.outputs = SimpleNamespace(log_probs=ref_logps)
        return itself._compute_loss(_scored(logps, ref_logps, mask), batch, False)

    return run


def trl_kto(loss_type: str, mask: Tensor, labels: Tensor, **config: Any) -> Form:
    """`KTOTrainer._compute_loss`; the mismatched completions are given by their logps, summed as its forward does."""
    itself = _trainer(
        "trl.trainer.kto", "KTO", loss_type=loss_type, calculate_KL=loss_type == "kto", ref_model=_Model(),
        precompute_ref_logps=False, **config,
    )  # fmt: skip
    batch = {**_batch(mask), "label": labels}

    def run(logps: Tensor, ref_logps: Tensor, kl_logps: Tensor, ref_kl_logps: Tensor, mask: Tensor) -> Tensor:
        itself._metrics = _metrics()
        itself.ref_model.outputs = SimpleNamespace(log_probs=ref_logps)
        itself._compute_kl_logps = lambda m, _: (ref_kl_logps if m is itself.ref_model else kl_logps).sum(-1)
        return itself._compute_loss(_scored(logps, ref_logps, mask), batch, False)

    return run


def _batch(mask: Tensor) -> dict[str, Tensor]:
    """A batch with the first position, which nothing predicts."""
    whole = torch.cat([mask.new_zeros(mask.shape[0], 1), mask], dim=1)
    return {"input_ids": whole, "attention_mask": whole, "completion_mask": whole}


def _scored(logps: Tensor, other: Tensor, mask: Tensor) -> _Model:
    """A model with these logps; `other` stands for entropies and mean logits, which go into metrics only."""
    return _Model(outputs=SimpleNamespace(log_probs=logps, entropy=other, mean_logits=other, is_top1=mask.bool()))


def trl_pairs(kind: str, *, mean: bool, **config: Any) -> Form:
    """`get_batch_loss_metrics` of the CPO and ORPO trainers, on sums or means over the completions' logps."""
    itself = _trainer(f"trl.experimental.{kind.lower()}.{kind.lower()}", kind, **config)

    def run(logps: Tensor, mask: Tensor) -> Tensor:
        sums, counts = (logps * mask).sum(-1), mask.sum(-1)  # as its `get_batch_logps`
        chosen, rejected = (sums / counts if mean else sums).chunk(2)
        half = chosen.shape[0]
        nll = -sums[:half].sum() / counts[:half].sum()
        itself.concatenated_forward = lambda model, batch: (chosen, rejected, chosen, rejected, nll)
        return itself.get_batch_loss_metrics(None, {})[0]

    return run


def trl_reward(**config: Any) -> Form:
    """`RewardTrainer.compute_loss` on given scores."""
    itself = _trainer("trl.trainer.reward", "Reward", **config)

    def run(chosen: Tensor, rejected: Tensor, margin: Tensor) -> Tensor:
        itself._metrics = _metrics()
        model = _Model(outputs=SimpleNamespace(logits=torch.cat([chosen, rejected]).unsqueeze(-1)))
        return itself.compute_loss(model, {"margin": margin, "attention_mask": margin})

    return run


def trl_jsd(beta: float) -> Form:
    """`GKDTrainer.generalized_jsd_loss` on logits that are made whole."""
    loss = need("trl.experimental.gkd.gkd_trainer", "GKDTrainer").generalized_jsd_loss

    def run(hidden: Tensor, weight: Tensor, teacher_hidden: Tensor, teacher_weight: Tensor, labels: Tensor) -> Tensor:
        with torch.no_grad():
            teacher = teacher_hidden @ teacher_weight.t()
        return loss(hidden @ weight.t(), teacher, labels, beta=beta)

    return run


# Liger --------------------------------------------------------------------------------------------------------------


def liger_preference(kind: str, **options: Any) -> Form:
    """A fused linear preference loss, not compiled. A reference is given by its hidden states and head."""
    module = need("liger_kernel.chunked_loss", f"LigerFusedLinear{kind}Loss")(compiled=False, **options)
    names = {"desirable": "preference_labels", "ref_hidden": "ref_input"}

    def run(hidden: Tensor, weight: Tensor, labels: Tensor, **inputs: Tensor) -> Tensor:
        head = (hidden, weight) if kind == "KTO" else (weight, hidden)
        return module(*head, labels, **{names.get(name, name): x for name, x in inputs.items()})[0]

    return run


def liger_jsd(beta: float) -> Form:
    """The fused linear JSD, without the loss on hard labels."""
    module = need("liger_kernel.chunked_loss", "LigerFusedLinearJSDLoss")(
        weight_hard_loss=0.0, weight_soft_loss=1.0, beta=beta, compiled=False
    )

    def run(hidden: Tensor, weight: Tensor, teacher_hidden: Tensor, teacher_weight: Tensor, labels: Tensor) -> Tensor:
        return module(hidden.flatten(0, 1), weight, teacher_hidden.flatten(0, 1), teacher_weight, labels.flatten())

    return run
