"""Group Relative Policy Optimization: what it adds to `OnlineTrainer` are advantages within groups and its loss."""

import dataclasses
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase, TrainerCallback

from fastrl.objectives import AdaptiveEntropy, PolicyObjective, combine_rewards, compute_advantages
from fastrl.rollout import RolloutEngine
from fastrl.trainers.grpo_config import GRPOConfig
from fastrl.trainers.metrics import reward_metrics
from fastrl.trainers.micro_batches import MicroBatch, live_fractions, live_sequences, ranks_tokens
from fastrl.trainers.online import OnlineTrainer
from fastrl.trainers.packing import Pass
from fastrl.trainers.reward_runner import RewardFunction, RewardRunner
from fastrl.trainers.rollout_collector import Samples
from fastrl.trainers.rollouts import Rollouts
from fastrl.trainers.scoring import policy_loss, policy_metrics, reference_head


class GRPOTrainer(OnlineTrainer):
    """Trains a causal LM with GRPO (Shao et al. 2024) and the variants that `GRPOConfig` names.

    The signature, the arguments and the metric names are TRL 1.16's; a TRL user changes an import. One optimizer step:
    sample `num_generations` completions of each prompt, reward them, make advantages within each prompt's group, and
    follow the gradient of the clipped objective (`fastrl.PolicyObjective`), computed from hidden states and LM head by
    `fastrl.linear_policy_loss`.

    Args:
        model: a path, a transformers causal LM, or one under PEFT.
        reward_funcs: one or several functions `f(prompts, completions, completion_ids, trainer_state, **columns)` that
            return one number or None per completion; sync or async. See `RewardRunner`.
        args: a `GRPOConfig`; None: its defaults.
        train_dataset, eval_dataset: rows with a "prompt" (a string or a conversation); other columns go to the reward
            functions. A dict of datasets evaluates on each.
        processing_class: the tokenizer; None: the one beside the model. Without a pad token it gets its eos token.
        callbacks, optimizers: as in `transformers.Trainer`.
        peft_config: wraps the model in an adapter.
        rollout_engine: samples the completions; None: `TransformersEngine` on the model itself.

    Departures from TRL:
      - Sequences that carry no gradient (advantage 0, no KL, no entropy bonus) skip the model's forward and backward
        (`skip_dead_sequences`). Gradients and optimizer state are those of the full computation, but the metric
        `entropy` is a mean over the sequences that ran. `live_fraction` (of tokens) and `live_sequence_fraction` say
        how many did. A `top_entropy_quantile` or `use_adaptive_entropy` needs every token, so nothing is skipped.
      - dapo, grpo and dr_grpo are normalized over the very sequences of the optimizer step, so that any split into
        micro-batches gives the same gradient. TRL averages micro-batch means for grpo with uneven last windows, and
        for dapo takes the token count of the rollout, scaled, when a rollout spans several optimizer steps. bnpo is by
        definition normalized per micro-batch, here as there: its gradient depends on the split.
      - The entropy bonus is the mean over the tokens of the optimizer step; TRL averages the micro-batches' means.
        With `top_entropy_quantile` < 1 both the ranking and the bonus are per micro-batch, as in TRL.
      - Old and reference log-probabilities are scored with dropout off, as the completions were sampled.
      - A group's prompt is encoded once where the model makes that exact (`share_prompts`), and a micro-batch goes
        through the model in passes of `tokens_per_pass`. With dropout a group then shares the prompt's masks.
      - Position ids are passed, so padding does not shift learned position embeddings.
      - A reward of NaN or infinity is an error; None is "no reward".
      - The reference of a PEFT model is the model without its adapter, also where the adapter given was trained
        before; with `beta` > 0 and no PEFT it is a copy of the model given, so it works for models without a path.
      - The order of prompts is a function of seed and epoch; checkpoints are atomic and hold pending rollouts.
      - A LoRA adapter on the lm_head works. Streamed datasets, reward models, tools, vLLM: not yet.

    Departures from the paper (TRL's defaults share them): dapo aggregation instead of a mean per sequence, no KL term,
    and with `num_iterations` = 1 and a rollout per step the ratio is identically 1.

    Raises:
        TypeError, ValueError: an argument that cannot work, named; see `GRPOConfig`, `PromptDataset`, `RewardRunner`.
    """

    args: GRPOConfig

    def __init__(
        self,
        model: str | nn.Module,
        reward_funcs: RewardFunction | list[RewardFunction],
        args: GRPOConfig | None = None,
        train_dataset: Any = None,
        eval_dataset: Any = None,
        processing_class: PreTrainedTokenizerBase | None = None,
        callbacks: list[TrainerCallback] | None = None,
        optimizers: tuple[torch.optim.Optimizer | None, torch.optim.lr_scheduler.LRScheduler | None] = (None, None),
        peft_config: Any = None,
        *,
        rollout_engine: RolloutEngine | None = None,
    ) -> None:
        args = GRPOConfig() if args is None else args
        if not isinstance(args, GRPOConfig):
            raise TypeError(f"args: expected a fastrl.GRPOConfig, got {type(args).__name__}")
        self.objective: PolicyObjective = args.objective()
        super().__init__(
            model,
            RewardRunner(reward_funcs, args.reward_weights),
            args,
            train_dataset=train_dataset,
            eval_dataset=eval_dataset,
            processing_class=processing_class,
            callbacks=callbacks,
            optimizers=optimizers,
            peft_config=peft_config,
            rollout_engine=rollout_engine,
        )
        bounds = (args.entropy_coef_min, args.entropy_coef_max, args.entropy_coef_delta, args.entropy_target)
        self.entropy = AdaptiveEntropy(args.entropy_coef, *bounds)
        if self.objective.exact_kl and self.is_fsdp_enabled:
            raise ValueError("kl_estimator: 'full' reads the reference's head, which FSDP shards; expected an estimate")

    @property
    def needs_reference(self) -> bool:  # type: ignore[override]
        return self.args.beta != 0

    @property
    def one_pass(self) -> bool:  # type: ignore[override]
        return ranks_tokens(self.objective)

    @property
    def split_matters(self) -> bool:  # type: ignore[override]
        return self.objective.loss_type == "bnpo" or ranks_tokens(self.objective)

    # Rollouts --------------------------------------------------------------------------------------------------------

    def make_rollouts(self, samples: Samples, *, score_old: bool) -> Rollouts:
        """Rewards, advantages within each prompt's group, and the log-probabilities that stay constant."""
        advantages = self._advantages(samples)
        rollouts = Rollouts(**samples.batch.tensors(), advantages=advantages, sampling_logps=samples.sampling_logps)
        if score_old:
            rollouts = dataclasses.replace(rollouts, old_logps=self.policy_logps(rollouts))
        if self.objective.sampled_kl:
            rollouts = dataclasses.replace(rollouts, ref_logps=self.reference_logps(rollouts))
        return rollouts

    def _advantages(self, samples: Samples) -> Tensor:
        args, runner = self.args, self.collector.rewards
        assert runner is not None
        per_func = self.collector.reward(samples, self.state)
        group_ids = torch.arange(len(per_func), device=per_func.device) // samples.group
        advantages, rewards = combine_rewards(
            per_func,
            runner.weights.to(per_func),
            group_ids,
            aggregation=args.multi_objective_aggregation,
            baseline=args.advantage_baseline,
            scale=str(args.scale_rewards),
        )
        if args.advantage_estimator is not None:
            mask = self.collector.everyones(samples.batch.mask)
            estimated, _ = compute_advantages(args.advantage_estimator, rewards, mask, group_ids=group_ids)
            advantages = estimated.where(mask, -torch.inf).amax(-1)  # all tokens of a sequence have the same
            advantages = advantages.masked_fill(~mask.any(-1), 0.0)
        over_batch = args.scale_rewards == "batch" or args.multi_objective_aggregation == "normalize_then_sum"
        deviation_over = "batch" if over_batch else "group"
        metrics = reward_metrics(per_func, runner.names, rewards, samples.group, deviation_over)
        self.metrics.add(samples.mode, metrics)
        return self.collector.own_rows(advantages)

    # The loss --------------------------------------------------------------------------------------------------------

    @property
    def _skips_dead(self) -> bool:
        return self.args.skip_dead_sequences and not self.args.use_adaptive_entropy

    def start_window(self, parts: list[Rollouts]) -> None:
        self._window_entropy = torch.zeros(2)  # sum over tokens, tokens
        if self.args.use_adaptive_entropy:
            self.objective = dataclasses.replace(self.objective, entropy_coef=self.entropy.apply_coef())
        self.metrics.add("train", live_fractions(parts, self.objective, self.total))

    def live_sequences(self, rollouts: Rollouts) -> Tensor:
        if not self._skips_dead:
            return torch.ones_like(rollouts.advantages, dtype=torch.bool)
        return live_sequences(rollouts, self.objective)

    def pass_loss(
        self, model: nn.Module, part: Pass[Rollouts], batch: MicroBatch[Rollouts]
    ) -> tuple[Tensor, dict[str, Tensor]]:
        objective = self.objective
        if not self.evaluating and objective.top_entropy_quantile < 1 and objective.entropy_coef != 0:
            # The bonus is then a mean over the micro-batch's own tokens.
            objective = dataclasses.replace(objective, entropy_coef=objective.entropy_coef / batch.count)
        reference = None
        if objective.exact_kl:
            with self.reference_model() as model_before:
                reference = reference_head(model_before, part)
        self._objective_in_use = objective  # the op knows it by a weak reference, also in the backward
        out = policy_loss(
            model,
            part,
            batch,
            objective,
            reference=reference,
            temperature=self.args.temperature,
            score_dead=self.evaluating or not self._skips_dead,
            backend=self.args.loss_backend,
            grad_tolerance=self.args.grad_tolerance,
        )
        return out.loss, out.metrics

    def merge_metrics(
        self, parts: list[tuple[Pass[Any], dict[str, Tensor]]], batch: MicroBatch[Any]
    ) -> dict[str, Tensor]:
        metrics = policy_metrics(parts, batch, self.objective)
        if self.args.use_adaptive_entropy and not self.evaluating:
            self._window_entropy += torch.tensor([metrics["entropy"].item() * batch.tokens, batch.tokens])
        unlogged = {"live_fraction"}  # of what ran; `start_window` logs that of all
        if self.args.entropy_coef == 0 and not self.args.use_adaptive_entropy:
            unlogged.add("policy_loss")  # then it is the loss
        return {name: value for name, value in metrics.items() if name not in unlogged}

    def finish_window(self) -> None:
        if self.args.use_adaptive_entropy:
            self.entropy.update(*self.total(self._window_entropy).tolist())
        if self.args.use_adaptive_entropy or self.args.entropy_coef != 0:
            self.metrics.add("train", {"entropy_coef": self.entropy.coef})

    # Checkpoints -----------------------------------------------------------------------------------------------------

    def resume_state(self) -> tuple[dict[str, Any], dict[str, Tensor]]:
        """That of every online method, and the adaptive coefficient."""
        state, tensors = super().resume_state()
        return {**state, "entropy": self.entropy.state_dict()}, tensors

    def load_resume_state(self, state: dict[str, Any], tensors: dict[str, Tensor]) -> None:
        super().load_resume_state(state, tensors)
        self.entropy.load_state_dict(state["entropy"])
