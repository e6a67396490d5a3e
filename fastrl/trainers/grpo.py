"""Group Relative Policy Optimization: what it adds to `OnlineTrainer` are advantages within groups and its loss."""

import dataclasses
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase, TrainerCallback

from fastrl.objectives import AdaptiveEntropy, PolicyObjective, RolloutCorrection, combine_rewards, compute_advantages
from fastrl.rollout import RolloutEngine
from fastrl.trainers import model_setup
from fastrl.trainers.arguments import refuse_given, with_quantization
from fastrl.trainers.dynamic_sampling import GroupRefill
from fastrl.trainers.grpo_config import GRPOConfig
from fastrl.trainers.metrics import reward_metrics
from fastrl.trainers.micro_batches import MicroBatch, live_fractions, live_sequences, ranks_tokens
from fastrl.trainers.online import OnlineTrainer
from fastrl.trainers.packing import Pass
from fastrl.trainers.reference_sync import ReferenceSync
from fastrl.trainers.reward_runner import RewardFunction, reward_runner
from fastrl.trainers.rollout_collector import Samples
from fastrl.trainers.rollouts import Rollouts
from fastrl.trainers.scoring import ReferenceHead, policy_loss, policy_metrics, reference_head


class GRPOTrainer(OnlineTrainer):
    """Trains a causal LM with GRPO (Shao et al. 2024) and the variants that `GRPOConfig` names.

    The signature, the arguments and the metric names are TRL 1.16's; a TRL user changes an import. One optimizer step:
    sample `num_generations` completions of each prompt, reward them, make advantages within each prompt's group, and
    follow the gradient of the clipped objective (`fastrl.PolicyObjective`), computed from hidden states and LM head by
    `fastrl.linear_policy_loss`.

    Args:
        model: a path, a transformers causal LM, or one under PEFT.
        reward_funcs: one or several functions `f(prompts, completions, completion_ids, trainer_state, **columns)` that
            return one number or None per completion, sync or async (see `RewardRunner`); or reward models, by path or
            as objects (see `fastrl.rewards.RewardModel`). `fastrl.rewards` has functions, DAPO's soft overlong
            punishment among them.
        args: a `GRPOConfig`; None: its defaults.
        train_dataset, eval_dataset: rows with a "prompt" (a string or a conversation); other columns go to the reward
            functions. A dict of datasets evaluates on each.
        processing_class: the tokenizer; None: the one beside the model. Without a pad token it gets its eos token.
        reward_processing_classes: tokenizers of the reward models.
        callbacks, optimizers: as in `transformers.Trainer`.
        peft_config: wraps the model in an adapter.
        rollout_engine: samples the completions; None: vLLM with `use_vllm`, else the model itself.
        correction: of the mismatch with another engine; None: TRL's, as `vllm_importance_sampling_*` say.
        quantization_config: of a model given by path.
        tools, rollout_func, environment_factory: refused.

    Departures from TRL:
      - Sequences that carry no gradient (advantage 0, no KL, no entropy bonus, no experts) skip the model's forward and
        backward (`skip_dead_sequences`). Gradients and optimizer state are those of the full computation, but the
        metric `entropy` is a mean over the sequences that ran. `live_fraction` (of tokens), `live_sequence_fraction`:
        how many did. `top_entropy_quantile`, `use_adaptive_entropy`, clip_cov and kl_cov need every token.
      - The loss is normalized over the very sequences of the optimizer step, so that any split into micro-batches gives
        the same gradient. TRL averages micro-batch means for grpo with uneven last windows, and for dapo takes the
        token count of the rollout, scaled, when a rollout spans several optimizer steps. bnpo is by definition
        normalized per micro-batch, here as there, and clip_cov and kl_cov choose their tokens per micro-batch.
      - The entropy bonus is the mean over the tokens of the optimizer step; TRL averages the micro-batches' means.
        With `top_entropy_quantile` < 1 both the ranking and the bonus are per micro-batch, as in TRL.
      - Old and reference log-probabilities are scored with dropout off, as the completions were sampled. With several
        iterations over a rollout the old ones are those of its first optimizer step, if that takes the whole rollout.
      - The auxiliary loss of experts is that of each pass, weighted by its completion tokens.
      - A group's prompt is encoded once where the model makes that exact (`share_prompts`), and a micro-batch goes
        through the model in passes of `tokens_per_pass`. With dropout a group then shares the prompt's masks.
      - Position ids are passed, so padding does not shift learned position embeddings.
      - A reward of NaN or infinity is an error; None is "no reward".
      - The reference of a PEFT model is the model without its adapter, also where the adapter given was trained
        before; with `beta` > 0 and no PEFT it is a copy of the model given, so it works for models without a path.
      - The order of prompts is a function of seed and epoch; checkpoints are atomic and hold pending rollouts.
      - `dynamic_sampling` (DAPO), `async_rollouts`, `old_logps_from_engine`, the exact KL (`kl_estimator="full"`),
        further objectives and advantages, and a LoRA adapter on the lm_head are fastrl's. Streamed datasets and tools
        are not supported.

    Departures from the paper (TRL's defaults share them): dapo aggregation instead of a mean per sequence, no KL term,
    and with `num_iterations` = 1 and a rollout per step the ratio is identically 1.

    Raises:
        TypeError, ValueError: an argument that cannot work, named; see `GRPOConfig`, `PromptDataset`, `RewardRunner`.
    """

    args: GRPOConfig

    def __init__(
        self,
        model: str | nn.Module,
        reward_funcs: RewardFunction
        | str
        | PreTrainedModel
        | list[RewardFunction | str | PreTrainedModel]
        | None = None,
        args: GRPOConfig | None = None,
        train_dataset: Any = None,
        eval_dataset: Any = None,
        processing_class: PreTrainedTokenizerBase | None = None,
        reward_processing_classes: PreTrainedTokenizerBase | list[PreTrainedTokenizerBase | None] | None = None,
        callbacks: list[TrainerCallback] | None = None,
        optimizers: tuple[torch.optim.Optimizer | None, torch.optim.lr_scheduler.LRScheduler | None] = (None, None),
        quantization_config: Any = None,
        peft_config: Any = None,
        tools: Any = None,
        rollout_func: Any = None,
        environment_factory: Any = None,
        *,
        rollout_engine: RolloutEngine | None = None,
        correction: RolloutCorrection | None = None,
    ) -> None:
        args = GRPOConfig() if args is None else args
        if not isinstance(args, GRPOConfig):
            raise TypeError(f"args: expected a fastrl.GRPOConfig, got {type(args).__name__}")
        args = with_quantization(args, model, quantization_config)
        refuse_given(
            {
                "tools": (tools, "completions are sampled in one go, without calls in between"),
                "rollout_func": (rollout_func, "pass a rollout_engine, which is given token ids"),
                "environment_factory": (environment_factory, "as tools"),
            }
        )
        self.objective: PolicyObjective = args.objective()
        self.correction = args.correction() if correction is None else correction
        if correction is not None and args.old_logps_from_engine:
            raise ValueError("correction: expected None with old_logps_from_engine, which leaves nothing to correct")
        self.rewards = reward_runner(reward_funcs, reward_processing_classes, args)
        super().__init__(
            model,
            self.rewards,
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
        # Where the whole rollout is in one optimizer step, that step's first passes score the tokens as they were
        # sampled, unless dropout is on.
        whole = args.gradient_accumulation_steps % args.steps_per_generation == 0
        self._keeps_first_logps = whole and args.num_iterations > 1 and not model_setup.has_dropout(self.model)
        self.reference_sync: ReferenceSync | None = None
        if args.sync_ref_model:
            if self.reference is None:
                raise ValueError("sync_ref_model: expected False with PEFT, got True")
            self.reference_sync = ReferenceSync(self.reference, args.ref_model_mixup_alpha, args.ref_model_sync_steps)
            self.add_callback(self.reference_sync)

    @property
    def needs_reference(self) -> bool:  # type: ignore[override]
        return self.args.beta != 0

    @property
    def wants_sampling_logps(self) -> bool:  # type: ignore[override]
        used = self.correction is not None or self.args.off_policy_mask_threshold is not None
        return self.args.old_logps_from_engine or (used and not self.engine_is_policy)

    @property
    def one_pass(self) -> bool:  # type: ignore[override]
        return ranks_tokens(self.objective)

    @property
    def split_matters(self) -> bool:  # type: ignore[override]
        return self.objective.loss_type == "bnpo" or ranks_tokens(self.objective)

    # Rollouts --------------------------------------------------------------------------------------------------------

    def make_rollouts(self, samples: Samples, *, score_old: bool) -> Rollouts:
        """Rewards, advantages within each prompt's group, and the log-probabilities that stay constant."""
        per_func = self.collector.reward(samples, self.state)
        self._log_rewards(samples, per_func)
        if self.args.dynamic_sampling and not self.evaluating:
            refill = GroupRefill(self.collector, self.draw_examples, self.total, self.args.max_resample_rounds)
            samples, per_func = refill(samples, per_func, self.state)
        advantages = self._advantages(samples, per_func)
        self.log_samples(samples, self.collector.own_rows(per_func), advantages)
        rollouts = Rollouts(**samples.batch.tensors(), advantages=advantages, sampling_logps=samples.sampling_logps)
        rollouts = self._with_old_logps(rollouts, score_old, samples.mode)
        if self.objective.sampled_kl:
            rollouts = dataclasses.replace(rollouts, ref_logps=self.reference_logps(rollouts))
        return rollouts

    def _with_old_logps(self, rollouts: Rollouts, score_old: bool, mode: str) -> Rollouts:
        sampling = rollouts.sampling_logps
        if self.args.old_logps_from_engine and (score_old or not self.engine_is_policy):
            if sampling is None:
                raise ValueError("old_logps_from_engine: the rollout engine gives no log-probabilities")
            if bool(sampling.isnan().any()):  # what it could not tell
                sampling = sampling.where(~sampling.isnan(), self.policy_logps(rollouts))
            return dataclasses.replace(rollouts, old_logps=sampling)
        correction = None if sampling is None or self.engine_is_policy else self.correction
        if correction is None and (self._keeps_first_logps or not score_old):
            return rollouts
        old_logps = self.policy_logps(rollouts)
        rollouts = dataclasses.replace(rollouts, old_logps=old_logps)
        if correction is None or sampling is None:
            return rollouts
        corrected = self.corrected(old_logps, sampling, correction, rollouts.mask, mode)
        if correction.rejections:
            rollouts = dataclasses.replace(rollouts, loss_mask=corrected.mask)
        return dataclasses.replace(rollouts, importance_ratio=corrected.weights)

    def _advantages(self, samples: Samples, per_func: Tensor) -> Tensor:
        args, group_ids = self.args, torch.arange(len(per_func), device=per_func.device) // samples.group
        advantages, rewards = combine_rewards(
            per_func,
            self.rewards.weights.to(per_func),
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
        return self.collector.own_rows(advantages)

    def _log_rewards(self, samples: Samples, per_func: Tensor) -> None:
        args, weights = self.args, self.rewards.weights.to(per_func)
        _, rewards = combine_rewards(
            per_func, weights, torch.zeros(len(per_func), dtype=torch.int64).to(weights.device)
        )
        over_batch = args.scale_rewards == "batch" or args.multi_objective_aggregation == "normalize_then_sum"
        deviation_over = "batch" if over_batch else "group"
        metrics = reward_metrics(per_func, self.rewards.names, rewards, samples.group, deviation_over)
        self.metrics.add(samples.mode, metrics)

    # The loss --------------------------------------------------------------------------------------------------------

    @property
    def _skips_dead(self) -> bool:
        return self.args.skip_dead_sequences and not self.args.use_adaptive_entropy

    def start_window(self, parts: list[Rollouts]) -> None:
        self._window_entropy = torch.zeros(2)  # sum over tokens, tokens
        self._first_logps: dict[int, Tensor] = {}  # of the parts of the rollout, by id
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
        reference: ReferenceHead | None = None
        if objective.exact_kl:
            with self.reference_model() as model_before:
                reference = reference_head(model_before, part)
        self._objective_in_use = objective  # the op knows it by a weak reference, also in the backward
        out = policy_loss(
            partial(self.run, model),
            part,
            batch,
            objective,
            reference=reference,
            temperature=self.args.temperature,
            score_dead=self.evaluating or not self._skips_dead,
            backend=self.args.loss_backend,
            grad_tolerance=self.args.grad_tolerance,
        )
        if self._keeps_first_logps and not self.evaluating:
            logps = self._first_logps.setdefault(id(batch.part), torch.zeros_like(batch.part.mask, dtype=torch.float32))
            logps[batch.rows[part.sequences], : out.logps.shape[1]] = out.logps.float()
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
        for i, part in enumerate(self._buffer):
            if part.old_logps is None and id(part) in self._first_logps:
                self._buffer[i] = dataclasses.replace(part, old_logps=self._first_logps[id(part)])
        if self.args.use_adaptive_entropy or self.args.entropy_coef != 0:
            self.metrics.add("train", {"entropy_coef": self.entropy.coef})

    # Checkpoints -----------------------------------------------------------------------------------------------------

    def resume_state(self) -> tuple[dict[str, Any], dict[str, Tensor]]:
        """That of every online method, the adaptive coefficient, and a reference that moves."""
        state, tensors = super().resume_state()
        if self.reference_sync is not None:
            tensors = {**tensors, **self.reference_sync.tensors()}
        return {**state, "entropy": self.entropy.state_dict()}, tensors

    def load_resume_state(self, state: dict[str, Any], tensors: dict[str, Tensor]) -> None:
        if self.reference_sync is not None:
            tensors = self.reference_sync.load(tensors)
        super().load_resume_state(state, tensors)
        self.entropy.load_state_dict(state["entropy"])
