"""Group Relative Policy Optimization on `transformers.Trainer`: rollouts, rewards and a loss that never builds the
logits. What is not the algorithm itself lives beside this file: prompts, rewards, rollouts, scoring, checkpoints."""

import dataclasses
import math
import time
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from accelerate.utils import set_seed
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase, TrainerCallback

from fastrl.integrations import patch_model
from fastrl.objectives import AdaptiveEntropy, PolicyObjective
from fastrl.rollout import RolloutEngine, TransformersEngine
from fastrl.trainers import model_setup
from fastrl.trainers.grpo_config import GRPOConfig
from fastrl.trainers.micro_batches import MicroBatch, groups_together, live_fractions, normalized
from fastrl.trainers.packing import Packer, Pass
from fastrl.trainers.prompt_trainer import PromptTrainer
from fastrl.trainers.prompts import context_length_of
from fastrl.trainers.reward_runner import RewardFunction, RewardRunner
from fastrl.trainers.rollout_collector import RolloutCollector
from fastrl.trainers.rollouts import Rollouts, from_named_tensors, named_tensors
from fastrl.trainers.scoring import merged_metrics, no_clipping, policy_loss, policy_passes


class GRPOTrainer(PromptTrainer):
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

    # The loss is normalized over the optimizer step: Trainer must not divide it by the number of micro-batches.
    loss_is_scaled_for_ga = True

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
        rewards = RewardRunner(reward_funcs, args.reward_weights)
        self.check_datasets(train_dataset, eval_dataset)
        set_seed(args.seed)  # an adapter's weights are random
        policy = model_setup.load_model(model, args.model_init_kwargs, args.trust_remote_code)
        tokenizer = model_setup.load_tokenizer(processing_class, policy, args.trust_remote_code)
        pad_token_id, eos_token_ids = model_setup.special_tokens(tokenizer, policy)
        model_setup.refuse_router_loss(policy)
        if args.disable_dropout:
            model_setup.disable_dropout(policy)
        self.reference: nn.Module | None = None
        if peft_config is not None:
            policy = model_setup.add_adapter(policy, peft_config)
        elif args.beta != 0 and not model_setup.is_peft_model(policy):
            self.reference = model_setup.frozen_copy(policy)
        super().__init__(
            model=policy,
            args=args,
            train_dataset=train_dataset,
            eval_dataset=eval_dataset,
            processing_class=tokenizer,
            callbacks=callbacks,
            optimizers=optimizers,
        )
        if args.n_gpu > 1:
            raise ValueError("several GPUs in one process (DataParallel) are not supported: use torchrun or accelerate")
        if self.is_deepspeed_enabled:
            raise ValueError("DeepSpeed is not supported yet")
        self.model_accepts_loss_kwargs = False
        self.patches = [patch_model(policy)]
        if self.reference is not None:
            self.patches.append(patch_model(self.reference))
            self.reference = self.accelerator.prepare_model(self.reference, evaluation_mode=True)
        # Under FSDP every process must run the model equally often.
        self.packer = Packer.for_model(policy, args.share_prompts, args.tokens_per_pass, one_pass=self.is_fsdp_enabled)
        self.engine = rollout_engine or TransformersEngine(
            lambda: self.accelerator.unwrap_model(self.model_wrapped),
            eos_token_ids=eos_token_ids,
            pad_token_id=pad_token_id,
            bos_token_id=tokenizer.bos_token_id,
        )
        self.collector = RolloutCollector(
            args=args,
            accelerator=self.accelerator,
            engine=self.engine,
            tokenizer=tokenizer,
            rewards=rewards,
            metrics=self.metrics,
            pad_token_id=pad_token_id,
            eos_token_ids=eos_token_ids,
            context_length=context_length_of(policy.config),
            policy=lambda: self.model,
            reference=self._reference if args.beta != 0 else None,
            packer=self.packer,
        )
        bounds = (args.entropy_coef_min, args.entropy_coef_max, args.entropy_coef_delta, args.entropy_target)
        self.entropy = AdaptiveEntropy(args.entropy_coef, *bounds)
        self.objective: PolicyObjective = args.objective()
        self._generate_every = args.steps_per_generation * args.num_iterations  # micro-batches until the next rollout
        self._micro_step = 0  # micro-batches taken so far
        self._buffer: list[Rollouts] = []  # the current rollout, in steps_per_generation parts
        self._window: deque[MicroBatch] = deque()  # what is left of the current optimizer step
        self._passes_run: list[tuple[Pass[Rollouts], dict[str, Tensor]]] = []  # of the micro-batch, with metrics
        self._eval_prefix: str | None = None
        # Processes that share a prompt must not sample the same completions.
        set_seed(args.seed, device_specific=True)

    # One optimizer step ----------------------------------------------------------------------------------------------

    def training_step(self, model: nn.Module, inputs: Any, num_items_in_batch: Any = None) -> Tensor:
        """Forward and backward of the next micro-batch, or neither if nothing in it carries a gradient."""
        if self._window_is_new:  # here, and not where the data is fetched: a resumed run has its random state by now
            self._start_window()
        batch = self._window.popleft()
        self.metrics.count_tokens(batch.rollouts.num_tokens)
        if self._skips_dead:
            batch = batch.live_part(self.objective, keep_one=self.accelerator.num_processes > 1)
        if len(batch.rollouts):
            loss = self._forward_and_backward(model, batch)
            self._window_ran = True
        else:
            loss = torch.zeros((), device=self.args.device)
            self.metrics.add("train", no_clipping(batch, self.objective))
        if not self._window:
            self._finish_window(model)
        return loss

    def _forward_and_backward(self, model: nn.Module, batch: MicroBatch) -> Tensor:
        *first, last = policy_passes(batch, self.packer, self.objective)
        loss = torch.zeros((), device=self.args.device)
        with self.accelerator.no_sync(model):  # each process has its own number of passes
            for part in first:
                loss += super().training_step(model, part, None)  # type: ignore[arg-type]
        loss += super().training_step(model, last, None)  # type: ignore[arg-type]
        self._add_pass_metrics(batch)
        return loss

    @property
    def _skips_dead(self) -> bool:
        return self.args.skip_dead_sequences and not self.args.use_adaptive_entropy

    def _start_window(self) -> None:
        self._step_started = time.perf_counter()
        self._window_is_new = self._window_ran = False
        self._window_entropy = torch.zeros(2)  # sum over tokens, tokens
        if self.args.use_adaptive_entropy:
            self.objective = dataclasses.replace(self.objective, entropy_coef=self.entropy.apply_coef())
        parts = []
        for examples in self._window_examples:
            if self._micro_step % self._generate_every == 0:
                self._buffer = self._collect(examples)
            parts.append(self._buffer[self._micro_step % self.args.steps_per_generation])
            self._micro_step += 1
        self._window = deque(normalized(parts, self.objective, self._total, self.accelerator.num_processes))
        self.metrics.add("train", live_fractions(parts, self.objective, self._total))

    def _collect(self, examples: Any) -> list[Rollouts]:
        self.engine.sync_weights(self.model)
        # The policy that sampled is the policy that trains, unless an optimizer step comes in between.
        on_policy = self.args.gradient_accumulation_steps % self._generate_every == 0
        rollouts = self.collector.collect(examples, "train_dataset", "train", self.state, score_old=not on_policy)
        rollouts = rollouts.select(torch.randperm(len(rollouts)).to(self.args.device))
        # So many neighbouring parts of a rollout always are in the same optimizer step.
        parts = self.args.steps_per_generation
        together = math.gcd(parts, self.args.gradient_accumulation_steps)
        return groups_together(rollouts, self.objective, parts // together).split(parts)

    def _total(self, counts: Tensor) -> Tensor:
        return self.accelerator.reduce(counts.to(self.args.device), reduction="sum").cpu()

    def compute_loss(
        self, model: nn.Module, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Tensor:
        """The loss of a pass; its metrics are added once the micro-batch is done."""
        if return_outputs:
            raise ValueError("return_outputs: GRPOTrainer has no outputs but the loss")
        training, objective = self._eval_prefix is None, self.objective
        if training and objective.top_entropy_quantile < 1 and objective.entropy_coef != 0:
            # The bonus is then a mean over the micro-batch's own tokens.
            objective = dataclasses.replace(objective, entropy_coef=objective.entropy_coef / len(self._window_examples))
        self._objective_in_use = objective  # the op knows it by a weak reference, also in the backward
        out = policy_loss(
            model,
            inputs,
            objective,
            temperature=self.args.temperature,
            score_dead=not training or not self._skips_dead,
            backend=self.args.loss_backend,
            grad_tolerance=self.args.grad_tolerance,
        )
        self._passes_run.append((inputs.layout, out.metrics))
        return out.loss

    def _add_pass_metrics(self, batch: MicroBatch) -> None:
        metrics = merged_metrics(self._passes_run, batch, self.objective)
        self._passes_run = []
        names = sorted(metrics.keys() - {"live_fraction"})
        if self.args.entropy_coef == 0 and not self.args.use_adaptive_entropy:
            names.remove("policy_loss")
        values = self.accelerator.reduce(torch.stack([metrics[name].float() for name in names]), reduction="mean")
        self.metrics.add(self._eval_prefix or "train", dict(zip(names, values.tolist(), strict=True)))
        if self._eval_prefix is None and self.args.use_adaptive_entropy:
            self._window_entropy += torch.tensor([metrics["entropy"].item() * batch.tokens, batch.tokens])

    def _finish_window(self, model: nn.Module) -> None:
        if not self._window_ran:
            model_setup.fill_missing_gradients(model)
        if self.args.use_adaptive_entropy:
            self.entropy.update(*self._total(self._window_entropy).tolist())
        if self.args.use_adaptive_entropy or self.args.entropy_coef != 0:
            self.metrics.add("train", {"entropy_coef": self.entropy.coef})
        self.metrics.add("train", {"step_time": time.perf_counter() - self._step_started})

    @contextmanager
    def _reference(self) -> Iterator[nn.Module]:
        if self.reference is not None:
            yield self.reference
            return
        policy = self.accelerator.unwrap_model(self.model)
        with policy.disable_adapter():
            yield self.model

    # Evaluation, logs, checkpoints -----------------------------------------------------------------------------------

    def evaluate(
        self, eval_dataset: Any = None, ignore_keys: list[str] | None = None, metric_key_prefix: str = "eval"
    ) -> dict[str, float]:
        """Samples and rewards completions of the evaluation prompts; the metrics are those of training, prefixed."""
        if isinstance(self.eval_dataset if eval_dataset is None else eval_dataset, dict):
            return super().evaluate(eval_dataset, ignore_keys, metric_key_prefix)
        self._eval_prefix = metric_key_prefix
        try:
            return super().evaluate(eval_dataset, ignore_keys, metric_key_prefix)
        finally:
            self._eval_prefix = None

    def prediction_step(
        self, model: nn.Module, inputs: Any, prediction_loss_only: bool, ignore_keys: list[str] | None = None
    ) -> tuple[Tensor, None, None]:
        """The loss of one evaluation batch, of which rewards and lengths are the by-product that matters."""
        prefix = self._eval_prefix or "eval"
        rollouts = self.collector.collect(inputs, "eval_dataset", prefix, self.state, score_old=False)
        (batch,) = normalized([rollouts], self.objective, self._total, self.accelerator.num_processes)
        with torch.no_grad():
            parts = policy_passes(batch, self.packer, self.objective)
            loss = torch.stack([self.compute_loss(model, part) for part in parts]).sum()
        self._add_pass_metrics(batch)
        return loss, None, None

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Adds the means of the metrics since the last log."""
        prefix = self._eval_prefix
        metrics = self.metrics.drain(prefix or "train")
        logs.update({f"{prefix}_{name}" if prefix else name: value for name, value in metrics.items()})  # type: ignore[misc]
        super().log(logs, start_time)

    def _geometry(self) -> dict[str, Any]:
        sizes = ("per_device_train_batch_size", "gradient_accumulation_steps", "steps_per_generation")
        return {name: getattr(self.args, name) for name in (*sizes, "num_iterations", "num_generations", "world_size")}

    def resume_state(self) -> tuple[dict[str, Any], dict[str, Tensor]]:
        """Rollouts that are still in use, the place among them, the adaptive coefficient, metrics not yet logged."""
        pending = self._buffer if self._micro_step % self._generate_every else []
        state = {
            "micro_step": self._micro_step,
            "geometry": self._geometry(),
            "entropy": self.entropy.state_dict(),
            "metrics": self.metrics.state_dict(),
        }
        return state, named_tensors(pending)

    def load_resume_state(self, state: dict[str, Any], tensors: dict[str, Tensor]) -> None:
        """See `resume_state`.

        Raises:
            ValueError: a checkpoint inside a rollout, resumed with batches of another shape.
        """
        if tensors and state["geometry"] != self._geometry():
            raise ValueError(
                f"the checkpoint holds rollouts in use, made with {state['geometry']}; it cannot be resumed with "
                f"{self._geometry()}"
            )
        self._micro_step = state["micro_step"]
        self.entropy.load_state_dict(state["entropy"])
        self.metrics.load_state_dict(state["metrics"])
        self._buffer = from_named_tensors(tensors)
