"""Proximal Policy Optimization with a critic: what it adds to `OnlineTrainer` are rewards per token, values and GAE."""

import time
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase, TrainerCallback

from fastrl.integrations import LMHead
from fastrl.objectives import (
    PolicyObjective,
    PPOOutput,
    combine_rewards,
    explained_variance,
    gae,
    kl_estimate,
    linear_ppo_loss,
    token_rewards,
    whiten,
)
from fastrl.rollout import RolloutEngine
from fastrl.trainers import model_setup
from fastrl.trainers.arguments import refuse_given
from fastrl.trainers.metrics import reward_metrics
from fastrl.trainers.micro_batches import MicroBatch
from fastrl.trainers.online import OnlineTrainer
from fastrl.trainers.packing import Pass
from fastrl.trainers.ppo_config import PPOConfig
from fastrl.trainers.ppo_rollouts import PPORollouts, loss_metrics, objective_metrics
from fastrl.trainers.prompts import with_prompts
from fastrl.trainers.reward_runner import RewardFunction, RewardRunner, reward_runner
from fastrl.trainers.rollout_collector import Samples
from fastrl.trainers.scoring import token_means
from fastrl.trainers.token_batch import TokenBatch
from fastrl.trainers.value_model import layout_of_both, logps_and_values, make_critic

RewardModelLike = str | PreTrainedModel


class PPOTrainer(OnlineTrainer):
    """Trains a causal LM with PPO as InstructGPT does (Ouyang et al. 2022; Schulman et al. 2017).

    Signature, arguments and metric names are those of TRL's last version with PPO; a TRL user changes an import. One
    rollout: sample completions, score them, take `kl_coef` times the KL to the reference off the reward of every token,
    put the score on the last one, and make advantages by GAE from the values. Then `num_ppo_epochs` epochs of
    `num_mini_batches` optimizer steps of the clipped policy loss plus `vf_coef` times the clipped value loss, both from
    hidden states in one call (`fastrl.linear_ppo_loss`).

    The values come from a head on the policy's hidden states, or from `value_model`. With the policy is saved
    value_head.safetensors, which is read again when `model` is that folder, or a folder value_model.

    Args:
        args: a `PPOConfig`.
        processing_class: the tokenizer; None: the one beside the model.
        model: a path, a transformers causal LM, or one under PEFT; None: `args.sft_model_path`.
        ref_model: the same, what the KL is to; None: the model as it is given (under PEFT: without its adapter).
        reward_model: a `fastrl.rewards.RewardModel`'s model (with the policy's tokenizer) or path (with its own); None:
            `args.reward_model_path`, unless there are reward functions.
        train_dataset, eval_dataset: rows with a "prompt" (a string or a conversation), or with TRL's "input_ids"; other
            columns go to the reward functions.
        value_model: a sequence classifier of one label with the policy's vocabulary, or its path, such as the reward
            model's; trained with the policy. None: a value head.
        data_collator: only None.
        peft_config: wraps the policy in an adapter; the critic is trained whole.
        reward_funcs: one or several, as in `GRPOTrainer`; `args.reward_weights` are the reward model's, then theirs.
        rollout_engine: samples the completions; None: the one that `args` ask for.
        The rest: as in `transformers.Trainer`.

    Departures from TRL:
      - Both losses are means over the tokens of the optimizer step, whatever its split into micro-batches; TRL averages
        the micro-batches' means. Whitening is over the rollout of all processes.
      - The score is on the completion's last token; TRL puts it on the padding after it, which then has a value too.
      - Mini-batches stay the same in all epochs over a rollout; TRL draws them anew.
      - Reward models see prompt and completion as `RewardTrainer` showed them, others the text without special tokens.
        A completion without any score is left out of the loss.

    Raises:
        TypeError, ValueError: an argument that cannot work, named; see `PPOConfig`, `PromptDataset`, `RewardRunner`.
    """

    args: PPOConfig
    objective: PolicyObjective
    rollouts_type = PPORollouts

    def __init__(
        self,
        args: PPOConfig,
        processing_class: PreTrainedTokenizerBase | None,
        model: str | nn.Module | None,
        ref_model: str | nn.Module | None = None,
        reward_model: RewardModelLike | None = None,
        train_dataset: Any = None,
        value_model: RewardModelLike | None = None,
        data_collator: Any = None,
        eval_dataset: Any = None,
        optimizers: tuple[torch.optim.Optimizer | None, torch.optim.lr_scheduler.LRScheduler | None] = (None, None),
        callbacks: list[TrainerCallback] | None = None,
        peft_config: Any = None,
        *,
        reward_funcs: RewardFunction | RewardModelLike | list[RewardFunction | RewardModelLike] | None = None,
        rollout_engine: RolloutEngine | None = None,
    ) -> None:
        if not isinstance(args, PPOConfig):
            raise TypeError(f"args: expected a fastrl.PPOConfig, got {type(args).__name__}")
        model = args.sft_model_path if model is None else model
        refuse_given({"data_collator": (data_collator, "prompts are laid out here")})
        if model is None:
            raise ValueError("model: expected a model, or its path in args.sft_model_path")
        if ref_model is model and not isinstance(model, str):
            raise ValueError("ref_model: expected a model of its own, got the policy itself; None makes a copy of it")
        if value_model is not None and not isinstance(value_model, str) and value_model in (model, reward_model):
            raise ValueError("value_model: expected a model of its own, for it is trained; got another argument's")
        self._value_model, self.args = value_model, args
        self.rewards = self._reward_runner(reward_model, reward_funcs, processing_class)
        self.objective = args.objective()
        self.correction = args.correction()
        self.scored_together = args.local_rollout_forward_batch_size
        self.kl = args.kl_controller()
        self._started, self._episodes, self._episodes_here = time.perf_counter(), 0, 0
        self._ratios: list[float] = []  # mean ratio of each micro-batch of the rollout
        if processing_class is not None:
            train_dataset = with_prompts(train_dataset, processing_class, "train_dataset")
            eval_dataset = with_prompts(eval_dataset, processing_class, "eval_dataset")
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
            ref_model=ref_model,
        )
        if self.is_fsdp_enabled:
            raise ValueError("fsdp: not supported with PPO, whose critic runs beside the policy; DDP is")
        self.packer = layout_of_both(self.packer, self.critic)

    def _reward_runner(self, reward_model: Any, reward_funcs: Any, tokenizer: Any) -> RewardRunner:
        given = reward_funcs if isinstance(reward_funcs, list | tuple) else [reward_funcs]
        functions = [function for function in (reward_model, *given) if function is not None]
        functions = functions or [path for path in [self.args.reward_model_path] if path is not None]
        if not functions:
            raise ValueError("reward_model: expected a model, its path in args.reward_model_path, or reward_funcs")
        tokenizers = [tokenizer if isinstance(function, PreTrainedModel) else None for function in functions]
        return reward_runner(functions, tokenizers, self.args)

    # Models ----------------------------------------------------------------------------------------------------------

    @property
    def needs_reference(self) -> bool:  # type: ignore[override]
        return self.args.kl_coef != 0 and self.args.ref_adapter_name is None

    @property
    def wants_sampling_logps(self) -> bool:  # type: ignore[override]
        return self.correction is not None and not self.engine_is_policy

    def stop_token_ids(self, tokenizer: PreTrainedTokenizerBase, eos_token_ids: list[int]) -> list[int]:
        """Those of `args`; what counts as an end for `missing_eos_penalty` without any is the tokenizer's."""
        eos = tokenizer.eos_token_id
        if self.args.stop_token == "eos" and eos is None:
            raise ValueError("stop_token: the tokenizer has no end-of-sequence token, expected None")
        stop = eos if self.args.stop_token == "eos" else self.args.stop_token_id
        self._ends = {token for token in (stop, eos) if token is not None}
        return [] if stop is None else [stop]

    def prepare_policy(self, policy: Any) -> Any:
        """The policy with its critic."""
        args = self.args
        model_setup.check_adapters(
            policy, model_adapter_name=args.model_adapter_name, ref_adapter_name=args.ref_adapter_name
        )
        if args.model_adapter_name is not None:
            policy.set_adapter(args.model_adapter_name)
        self.critic = make_critic(policy, self._value_model, args.trust_remote_code)
        if args.disable_dropout:
            model_setup.disable_dropout(self.critic)
        return policy

    def reference_model(self) -> AbstractContextManager[nn.Module]:  # type: ignore[override]
        """The model as it was before training, or the policy under `ref_adapter_name`."""
        args = self.args
        if args.ref_adapter_name is None:
            return super().reference_model()
        policy = self.accelerator.unwrap_model(self.model)
        return model_setup.active_adapter(policy, args.ref_adapter_name, args.model_adapter_name or "default")

    # Rollouts --------------------------------------------------------------------------------------------------------

    def make_rollouts(self, samples: Samples, *, score_old: bool) -> PPORollouts:
        """Rewards per token, values, and from them advantages and returns."""
        args, mode, scores = self.args, samples.mode, self._scores(samples)
        batch = TokenBatch(**{**samples.batch.tensors(), "loss_mask": samples.batch.mask & ~scores.isnan()[:, None]})
        mask = batch.mask
        correction = None if samples.sampling_logps is None or self.engine_is_policy else self.correction
        keep = score_old or correction is not None
        with self.accelerator.autocast():
            logps, values = logps_and_values(
                self.model,
                self.critic,
                batch,
                self.packer,
                needs_logps=keep or self.kl.coef > 0,
                sequences=self.scored_together,
                **self.scoring,
            )
        kl = None
        if self.kl.coef > 0:
            assert logps is not None
            kl = kl_estimate(logps, self.reference_logps(batch), args.kl_estimator)
        rewards = token_rewards(scores.nan_to_num(), mask, kl=kl, kl_coef=self.kl.coef)
        self._log_objective(mode, scores, mask, logps, kl)
        if args.whiten_rewards:
            rewards = self._whitened(rewards, mask, shift_mean=False)
        advantages, returns = gae(rewards, values, mask, gamma=args.gamma, lam=args.lam)
        everyones = [self.collector.everyones(x) for x in (values, returns, mask)]
        explained = explained_variance(everyones[0], everyones[1], mask=everyones[2])
        self.metrics.add(mode, {"val/explained_variance": float(explained)})
        if args.whiten_advantages:
            advantages = self._whitened(advantages, mask)
        ratio = None
        if correction is not None:
            ratio = self.corrected(logps, samples.sampling_logps, correction, mask, mode).weights  # type: ignore[arg-type]
        return PPORollouts(
            **batch.tensors(),
            advantages=advantages,
            returns=returns,
            old_values=values,
            old_logps=logps if keep else None,
            importance_ratio=ratio,
        )

    def _scores(self, samples: Samples) -> Tensor:
        """(B,) the weighted sum of this process's rewards, NaN where there is none."""
        per_func = self.collector.reward(samples, self.state)
        lone = torch.arange(len(per_func), device=per_func.device)
        _, rewards = combine_rewards(per_func, self.rewards.weights.to(per_func), lone)
        self.metrics.add(samples.mode, reward_metrics(per_func, self.rewards.names, rewards, samples.group, "batch"))
        self.log_samples(samples, self.collector.own_rows(per_func))
        scores = self.collector.own_rows(rewards)
        eos, completions = self.processing_class.eos_token_id, samples.completion_ids  # type: ignore[union-attr]
        eos_tokens = torch.tensor(sum(ids.count(eos) for ids in completions))
        self.metrics.add(samples.mode, {"val/num_eos_tokens": float(self.total(eos_tokens))})
        if self.args.missing_eos_penalty is not None:
            endless = torch.tensor([self._ends.isdisjoint(ids) for ids in completions], device=scores.device)
            scores = scores - self.args.missing_eos_penalty * endless
        return scores

    def _whitened(self, x: Tensor, mask: Tensor, shift_mean: bool = True) -> Tensor:
        """Over the rollout of all processes."""
        everyones = whiten(self.collector.everyones(x), self.collector.everyones(mask), shift_mean=shift_mean)
        return self.collector.own_rows(everyones)[:, : x.shape[1]]

    def _log_objective(self, mode: str, scores: Tensor, mask: Tensor, logps: Tensor | None, kl: Tensor | None) -> None:
        """objective/*, the count of episodes, and the KL's weight for the next rollout."""
        metrics = objective_metrics(scores, mask, logps, kl, self.kl.coef)
        self.add_means(mode, metrics)
        if mode != "train":
            return
        episodes = len(scores) * self.accelerator.num_processes
        self._episodes, self._episodes_here = self._episodes + episodes, self._episodes_here + episodes
        self.metrics.set("train", "episode", self._episodes)
        self.metrics.set("train", "eps", int(self._episodes_here / (time.perf_counter() - self._started)))
        if self.args.kl_target is not None:
            self.metrics.add("train", {"objective/kl_coef": self.kl.coef})
            self.kl.update(float(self.accelerator.reduce(metrics["objective/kl"], reduction="mean")), episodes)

    # The loss --------------------------------------------------------------------------------------------------------

    def pass_loss(
        self, model: nn.Module, part: Pass[PPORollouts], batch: MicroBatch[PPORollouts]
    ) -> tuple[Tensor, dict[str, Tensor]]:
        rollouts, tokens = part.batch, max(batch.step_tokens, 1.0)

        def loss(hidden: Tensor, head: LMHead) -> PPOOutput:
            states = part.select(hidden)
            value_hidden, value_head = self.critic.scored(part, states)
            return linear_ppo_loss(
                states,
                head.weight,
                rollouts.completion_ids,
                self.objective,
                value_hidden=value_hidden,
                value_weight=value_head.weight,
                value_bias=value_head.bias,
                vf_coef=self.args.vf_coef,
                cliprange_value=self.args.cliprange_value,
                normalizer=tokens,
                value_normalizer=tokens,
                entropy_normalizer=tokens if self.args.entropy_coef else None,
                bias=head.bias,
                logit_scale=head.logit_scale,
                softcap=head.softcap,
                score_dead=True,
                **rollouts.constants,
                **self.scoring,
            )

        out: PPOOutput = self.run(model, part, loss)
        return out.loss, loss_metrics(out, rollouts)

    def merge_metrics(
        self, parts: list[tuple[Pass[Any], dict[str, Tensor]]], batch: MicroBatch[Any]
    ) -> dict[str, Tensor]:
        merged = token_means(parts)
        for name in merged.keys() & {"loss/policy_avg", "loss/value_avg"}:
            # Shares of the optimizer step's loss: their sum is it, and so is the mean of so many times as much.
            merged[name] = torch.stack([metrics[name] for _, metrics in parts]).sum() * batch.count
        if "val/ratio" in merged and not self.evaluating:
            self._ratios.append(merged["val/ratio"].item())
        return merged

    def finish_window(self) -> None:
        if self._micro_step % self._generate_every == 0:  # the last of its rollout
            if len(self._ratios) > 1:
                self.metrics.add("train", {"val/ratio_var": torch.tensor(self._ratios).var().item()})
            self._ratios = []

    # Checkpoints -----------------------------------------------------------------------------------------------------

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Any] | None = None) -> None:
        super()._save(output_dir, state_dict)
        if self.args.should_save:
            self.critic.save(output_dir or str(self.args.output_dir))

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        super()._load_from_checkpoint(resume_from_checkpoint, model)
        self.critic.load(resume_from_checkpoint)

    def _load_best_model(self) -> None:
        super()._load_best_model()
        self.critic.load(str(self.state.best_model_checkpoint))

    def generate_completions(self, sampling: bool = False) -> dict[str, float]:
        """TRL's name for an evaluation: `log_completions` shows its completions with their rewards."""
        return self.evaluate()

    def resume_state(self) -> tuple[dict[str, Any], dict[str, Tensor]]:
        """That of every online method, the KL's weight, and counts."""
        state, tensors = super().resume_state()
        return {**state, "kl": self.kl.state_dict(), "episodes": self._episodes, "ratios": self._ratios}, tensors

    def load_resume_state(self, state: dict[str, Any], tensors: dict[str, Tensor]) -> None:
        super().load_resume_state(state, tensors)
        self.kl.load_state_dict(state["kl"])
        self._episodes, self._ratios = state["episodes"], state["ratios"]
