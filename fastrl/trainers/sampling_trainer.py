"""A trainer of prompts with everything to sample and score completions: model, reference, engine, rewards."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from accelerate.utils import set_seed
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase, TrainerCallback

from fastrl.integrations import LMHead, patch_model, router_loss, router_loss_coef
from fastrl.objectives import CorrectedRollouts, RolloutCorrection, rollout_correction
from fastrl.rollout import RolloutEngine, TransformersEngine, make_engine
from fastrl.trainers import model_setup
from fastrl.trainers.arguments import refuse_launch
from fastrl.trainers.completion_log import CompletionLog
from fastrl.trainers.online_config import OnlineConfig
from fastrl.trainers.packing import Packer, Pass
from fastrl.trainers.prompt_trainer import PromptTrainer
from fastrl.trainers.prompts import context_length_of
from fastrl.trainers.reward_runner import RewardRunner
from fastrl.trainers.rollout_collector import RolloutCollector, Samples
from fastrl.trainers.scoring import completion_logps
from fastrl.trainers.token_batch import TokenBatch


class SamplingTrainer(PromptTrainer):
    """Sets up what online methods use: `collector` (samples and rewards), `packer`, `policy_logps`, `reference_logps`,
    `reference_model`, `run` (the model on a pass), `log_samples`, `add_means`, `total`, `engine_is_policy`,
    `evaluating`.

    Args:
        model: a path, a transformers causal LM, or one under PEFT.
        rewards: called by `collector.reward`; None: a method without rewards.
        ref_model: a path or a model to be the reference, frozen; None: the model as it is given.
        peft_config: wraps the model in an adapter.
        rollout_engine: samples the completions; None: the one that `args` ask for (`fastrl.rollout.make_engine`).
        The rest: as in `transformers.Trainer`.

    Raises:
        TypeError, ValueError: an argument that cannot work, named.
    """

    needs_reference = False
    wants_sampling_logps = False
    scored_together: int | None = None  # most sequences of a forward without gradient, besides `tokens_per_pass`

    def __init__(
        self,
        model: str | nn.Module,
        rewards: RewardRunner | None,
        args: OnlineConfig,
        *,
        train_dataset: Any,
        eval_dataset: Any = None,
        processing_class: PreTrainedTokenizerBase | None = None,
        callbacks: list[TrainerCallback] | None = None,
        optimizers: tuple[torch.optim.Optimizer | None, torch.optim.lr_scheduler.LRScheduler | None] = (None, None),
        peft_config: Any = None,
        rollout_engine: RolloutEngine | None = None,
        ref_model: str | nn.Module | None = None,
    ) -> None:
        self.args = args
        self.check_datasets(train_dataset, eval_dataset)
        set_seed(args.seed)  # an adapter's weights are random
        policy = model_setup.load_model(model, args.model_init_kwargs, args.trust_remote_code)
        tokenizer = model_setup.load_tokenizer(processing_class, policy, args.trust_remote_code)
        pad_token_id, eos_token_ids = model_setup.special_tokens(tokenizer, policy)
        eos_token_ids = self.stop_token_ids(tokenizer, eos_token_ids)
        self.router_coef = router_loss_coef(policy, args.router_aux_loss_coef)
        if args.cast_lm_head_to_fp32:
            model_setup.cast_head_to_fp32(policy)
        if args.disable_dropout:
            model_setup.disable_dropout(policy)
        self.reference: nn.Module | None = None
        if ref_model is not None and self.needs_reference:
            init_kwargs = args.model_init_kwargs if isinstance(ref_model, str) else None
            reference: nn.Module = model_setup.load_model(ref_model, init_kwargs, args.trust_remote_code)
            self.reference = reference.eval().requires_grad_(False)
        if peft_config is not None:
            policy = model_setup.add_adapter(policy, peft_config)
        elif self.reference is None and self.needs_reference and not model_setup.is_peft_model(policy):
            self.reference = model_setup.frozen_copy(policy)
        policy = self.prepare_policy(policy)
        super().__init__(
            model=policy,
            args=args,
            train_dataset=train_dataset,
            eval_dataset=eval_dataset,
            processing_class=tokenizer,
            callbacks=callbacks,
            optimizers=optimizers,
        )
        refuse_launch(self)
        self.model_accepts_loss_kwargs = False
        self.patches = [patch_model(policy)]
        if self.reference is not None:
            self.patches.append(patch_model(self.reference))
            self.reference = self.accelerator.prepare_model(self.reference, evaluation_mode=True)
        # Under FSDP every process must run the model equally often.
        self.packer = Packer.for_model(policy, args.share_prompts, args.tokens_per_pass, one_pass=self.is_fsdp_enabled)
        sampler: Any = None
        if args.async_rollouts and not args.use_vllm and rollout_engine is None:
            sampler = model_setup.frozen_copy(policy)  # generation beside the optimizer needs weights that stay
        self.engine = rollout_engine or make_engine(
            args,
            sampler or (lambda: self.accelerator.unwrap_model(self.model_wrapped)),
            tokenizer,
            eos_token_ids=eos_token_ids,
            pad_token_id=pad_token_id,
        )
        self.engine_is_policy = isinstance(self.engine, TransformersEngine) and self.engine.shares_weights_with(policy)
        lengths = [context_length_of(policy.config), getattr(self.engine, "max_model_length", None)]
        self.collector = RolloutCollector(
            args=args,
            accelerator=self.accelerator,
            engine=self.engine,
            tokenizer=tokenizer,
            rewards=rewards,
            metrics=self.metrics,
            pad_token_id=pad_token_id,
            eos_token_ids=eos_token_ids,
            context_length=min((length for length in lengths if length is not None), default=None),
            wants_logps=self.wants_sampling_logps,
        )
        self.completions: CompletionLog | None = None
        if args.log_completions:
            self.completions = CompletionLog(
                str(args.output_dir),
                size=args.generation_batch_size,
                num_to_print=args.num_completions_to_print,
                unique_prompts=args.log_unique_prompts,
                report_to=args.report_to,  # type: ignore[arg-type]
                main_process=self.is_world_process_zero(),
                console=self.progress.console,
            )
        self._eval_prefix: str | None = None

    def prepare_policy(self, policy: Any) -> Any:
        """The model that is trained, made of the one that was loaded (under its adapter)."""
        return policy

    def stop_token_ids(self, tokenizer: PreTrainedTokenizerBase, eos_token_ids: list[int]) -> list[int]:
        """The tokens that end a completion, given those that tokenizer and model declare."""
        return eos_token_ids

    @property
    def evaluating(self) -> bool:
        return self._eval_prefix is not None

    @contextmanager
    def reference_model(self) -> Iterator[nn.Module]:
        """The model as it was before training."""
        if self.reference is not None:
            yield self.reference
            return
        with self.accelerator.unwrap_model(self.model).disable_adapter():
            yield self.model

    def policy_logps(self, batch: TokenBatch) -> Tensor:
        """(B, T) log-probabilities of the completions' tokens, without gradient; see `completion_logps`."""
        return self._logps(self.model, batch)

    def reference_logps(self, batch: TokenBatch) -> Tensor:
        """The same under the reference."""
        with self.reference_model() as reference:
            return self._logps(reference, batch)

    def _logps(self, model: nn.Module, batch: TokenBatch) -> Tensor:
        return completion_logps(model, batch, self.packer, sequences=self.scored_together, **self.scoring)

    @property
    def scoring(self) -> dict[str, Any]:
        """How the LM head is read, wherever tokens are scored."""
        return {"temperature": self.args.temperature, "backend": self.args.loss_backend}

    def corrected(
        self, logps: Tensor, sampling_logps: Tensor, correction: RolloutCorrection, mask: Tensor, mode: str
    ) -> CorrectedRollouts:
        """The factor of the policy term that makes up for an engine other than the policy; its metrics are logged."""
        out = rollout_correction(logps, sampling_logps, correction, mask=mask)
        self.add_means(mode, out.metrics)
        return out

    def run(self, model: nn.Module, part: Pass[Any], function: Callable[[Tensor, LMHead], Any]) -> Any:
        """`function(hidden, head)` inside the model's forward over a pass; `part.select(hidden)` scores the tokens.

        With a mixture of experts, the load-balancing loss of the pass is kept for `compute_loss`.
        """
        if not self.router_coef:
            return model(**part.inputs, fastrl_head=function)

        def with_router(hidden: Tensor, head: LMHead) -> Any:
            assert head.router_logits is not None  # asked for below
            return function(hidden, head), router_loss(model, head.router_logits, part.tokens)

        out, self._router_loss = model(**part.inputs, fastrl_head=with_router, output_router_logits=True)
        return out

    def log_samples(self, samples: Samples, rewards: Tensor, advantages: Tensor | None = None) -> None:
        """Keeps samples of this process for the table of completions: rewards (B, F), advantages (B,)."""
        if self.completions is None:
            return
        names = self.collector.rewards.names if self.collector.rewards else []
        self.completions.add(
            samples.mode,
            [example.row["prompt"] for example in samples.examples],
            samples.completions,
            {name: column.tolist() for name, column in zip(names, rewards.unbind(-1), strict=True)},
            None if advantages is None else advantages.tolist(),
            samples.columns,
        )

    def add_means(self, mode: str, metrics: Mapping[str, Tensor]) -> None:
        """Logs the means over processes of scalars, which all of them give."""
        if metrics:
            values = torch.stack([value.float() for _, value in sorted(metrics.items())])
            values = self.accelerator.reduce(values, reduction="mean")
            self.metrics.add(mode, dict(zip(sorted(metrics), values.tolist(), strict=True)))

    def total(self, counts: Tensor) -> Tensor:
        """Sums over processes."""
        return self.accelerator.reduce(counts.to(self.args.device), reduction="sum").cpu()
