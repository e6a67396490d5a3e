"""What online methods share: prompts are sampled from, and a loss that never builds the logits is taken on the samples.
What is not the loop itself lives beside this file: prompts, rewards, rollouts, packing, scoring, checkpoints."""

import math
import time
from collections import deque
from collections.abc import Sequence
from contextlib import nullcontext
from typing import Any, NamedTuple

import torch
from accelerate.utils import set_seed
from torch import Tensor, nn

from fastrl.trainers import model_setup
from fastrl.trainers.activation_offloading import OffloadedActivations
from fastrl.trainers.micro_batches import MicroBatch, groups_together, micro_batches
from fastrl.trainers.online_config import OnlineConfig
from fastrl.trainers.packing import Pass
from fastrl.trainers.prompts import Example
from fastrl.trainers.reward_runner import RewardRunner
from fastrl.trainers.rollout_collector import Samples
from fastrl.trainers.rollouts import Rollouts, from_named_tensors, named_tensors
from fastrl.trainers.rollouts_ahead import RolloutsAhead
from fastrl.trainers.sampling_trainer import SamplingTrainer
from fastrl.trainers.scoring import token_means
from fastrl.trainers.token_batch import TokenBatch


class LossPass(NamedTuple):
    """What one forward and backward is taken of."""

    layout: Pass[Any]
    batch: MicroBatch[Any]


class OnlineTrainer(SamplingTrainer):
    """Samples completions of prompts and trains on them, a window of micro-batches for each optimizer step.

    A method must define

        make_rollouts(samples, score_old)      what is trained on: rewards, advantages, constants from a model
        pass_loss(model, part, batch)          loss and metrics of one pass of a micro-batch; the losses of all passes
                                               of an optimizer step add up to its loss (`MicroBatch` has the counts)

    and may define

        rollouts_type                          its `TokenBatch`; pending ones are saved in checkpoints
        needs_reference                        whether `reference_model` is used: then a copy is kept, without PEFT
        prepare_policy(policy)                 wraps or extends the model before Trainer takes it (a value head)
        collect_samples(examples, name, mode)  where completions come from, if not from the policy
        start_window(parts)                    before the first micro-batch of an optimizer step
        live_sequences(rollouts)               which sequences need the model; the others skip it
        split_matters                          whether the gradient depends on how a step is cut into micro-batches
        wants_sampling_logps                   whether the engine shall tell the log-probabilities of its tokens
        one_pass                               whether a micro-batch must go through the model in one pass
        merge_metrics(parts, batch)            a micro-batch's metrics from those of its passes
        finish_window()                        after its last backward, before the optimizer
        resume_state, load_resume_state        extended by state of its own

    It uses what `SamplingTrainer` has.
    """

    # The loss is normalized over the optimizer step: Trainer must not divide it by the number of micro-batches.
    loss_is_scaled_for_ga = True
    rollouts_type: type[TokenBatch] = Rollouts
    split_matters = False
    one_pass = False

    def __init__(self, model: str | nn.Module, rewards: RewardRunner | None, args: OnlineConfig, **kwargs: Any) -> None:
        super().__init__(model, rewards, args, **kwargs)
        self.activations = OffloadedActivations(self.model) if args.activation_offloading else nullcontext()
        self._generate_every = args.steps_per_generation * args.num_iterations  # micro-batches until the next rollout
        self._ahead: RolloutsAhead | None = None  # while training asynchronously
        self._evaluates_anew = False  # whether the engine needs the weights of now, for an evaluation
        self._evaluates_several = False  # datasets in one evaluation
        self._micro_step = 0  # micro-batches taken so far
        self._buffer: list[Any] = []  # the current rollout, in steps_per_generation parts
        self._window: deque[MicroBatch[Any]] = deque()  # what is left of the current optimizer step
        self._passes_run: list[tuple[Pass[Any], dict[str, Tensor]]] = []  # of the micro-batch, with metrics
        if args.async_rollouts and not self.wants_sampling_logps:
            raise ValueError(
                f"async_rollouts: expected False, as {type(self).__name__} does not correct for an older policy here "
                "(GRPO does, with vllm_importance_sampling_correction or old_logps_from_engine)"
            )
        # Processes that share a prompt must not sample the same completions.
        set_seed(args.seed, device_specific=True)

    # What a method defines -------------------------------------------------------------------------------------------

    def make_rollouts(self, samples: Samples, *, score_old: bool) -> Any:
        """What is trained on, of `rollouts_type`, one sequence for each sample, in order.

        score_old: the policy will have changed when it is used, so that log-probabilities of now must be kept.
        """
        raise NotImplementedError

    def collect_samples(self, examples: Sequence[Example], name: str, mode: str) -> Samples:
        """Completions of this process's examples; see `RolloutCollector.collect`."""
        if mode == "train":
            self.engine.sync_weights(self.model)
        elif self._evaluates_anew:
            (self._ahead.refresh if self._ahead else self.engine.sync_weights)(self.model)
            self._evaluates_anew = False
        return self.collector.collect(examples, name, mode, self.state)

    def pass_loss(self, model: nn.Module, part: Pass[Any], batch: MicroBatch[Any]) -> tuple[Tensor, dict[str, Tensor]]:
        """The share of a micro-batch's loss that one of its passes has, and metrics: detached scalars."""
        raise NotImplementedError

    def start_window(self, parts: list[Any]) -> None:
        """Called with the rollouts of each micro-batch of an optimizer step, before the first."""

    def live_sequences(self, rollouts: Any) -> Tensor:
        """(B,) bool: the sequences that go through the model."""
        return rollouts.mask.any(-1)

    def merge_metrics(
        self, parts: list[tuple[Pass[Any], dict[str, Tensor]]], batch: MicroBatch[Any]
    ) -> dict[str, Tensor]:
        """The metrics of a micro-batch from those of its passes, of which there may be none."""
        return token_means(parts)

    def finish_window(self) -> None:
        """Called after the last backward of an optimizer step."""

    # One optimizer step ----------------------------------------------------------------------------------------------

    def training_step(self, model: nn.Module, inputs: Any, num_items_in_batch: Any = None) -> Tensor:
        """Forward and backward of the next micro-batch, or neither if nothing in it carries a gradient."""
        if self._window_is_new:  # here, and not where the data is fetched: a resumed run has its random state by now
            self._start_window()
        batch = self._window.popleft()
        self.metrics.count_tokens(batch.rollouts.num_tokens)
        live = batch.rollouts.mask.any(-1) if self.router_coef else self.live_sequences(batch.rollouts)
        if self.accelerator.num_processes > 1 and not bool(live.any()):
            live[0] = True  # for the collectives of the backward
        if not bool(live.all()):
            batch = batch.select(live)
        loss = torch.zeros((), device=self.args.device)
        if len(batch.rollouts):
            loss = self._forward_and_backward(model, batch)
            self._window_ran = True
        self._add_pass_metrics(batch)
        if not self._window:
            self._finish_window(model)
        return loss

    def _forward_and_backward(self, model: nn.Module, batch: MicroBatch[Any]) -> Tensor:
        *first, last = self._passes(batch)
        loss = torch.zeros((), device=self.args.device)
        with self.activations:
            with self.accelerator.no_sync(model):  # each process has its own number of passes
                for part in first:
                    loss += super().training_step(model, part, None)  # type: ignore[arg-type]
            return loss + super().training_step(model, last, None)  # type: ignore[arg-type]

    def _passes(self, batch: MicroBatch[Any]) -> list[LossPass]:
        return [LossPass(layout, batch) for layout in self.packer.passes(batch.rollouts, together=self.one_pass)]

    def _start_window(self) -> None:
        self._step_started = time.perf_counter()
        self._window_is_new = self._window_ran = False
        parts = []
        for examples in self._window_examples:
            if self._micro_step % self._generate_every == 0:
                self._buffer = self._collect(examples)
            parts.append(self._buffer[self._micro_step % self.args.steps_per_generation])
            self._micro_step += 1
        self.start_window(parts)
        self._window = deque(micro_batches(parts, self.total, self.accelerator.num_processes))

    def _collect(self, examples: Any) -> list[Any]:
        # The policy that sampled is the policy that trains, unless an optimizer step comes in between.
        on_policy = self.args.gradient_accumulation_steps % self._generate_every == 0
        if self.args.async_rollouts:
            samples = self._rollouts_ahead().collect(examples, self.model, self.state)
        else:
            samples = self.collect_samples(examples, "train_dataset", "train")
        rollouts = self.make_rollouts(samples, score_old=not on_policy)
        rollouts = rollouts.select(torch.randperm(len(rollouts)).to(self.args.device))
        parts = self.args.steps_per_generation
        if not self.split_matters:
            # So many neighbouring parts of a rollout always are in the same optimizer step.
            together = math.gcd(parts, self.args.gradient_accumulation_steps)
            rollouts = groups_together(rollouts, parts // together)
        return rollouts.split(parts)

    def _rollouts_ahead(self) -> RolloutsAhead:
        if self._ahead is None:
            steps = self.state.max_steps * self.args.gradient_accumulation_steps
            numbers = (self._micro_step // self._generate_every, math.ceil(steps / self._generate_every))
            settings = (self.args.max_staleness, self.rollout_examples)
            self._ahead = RolloutsAhead(self.collector, self.model, *settings, *numbers)
        return self._ahead

    def train(self, resume_from_checkpoint: str | bool | None = None, *args: Any, **kwargs: Any) -> Any:
        """See `ResumableTrainer.train`."""
        if resume_from_checkpoint and self.args.async_rollouts and self.args.ignore_data_skip:
            raise ValueError(
                "ignore_data_skip: a run can't go on with other data or from their beginning while async_rollouts "
                "samples them ahead, by their place in the run: resume with async_rollouts=False, or without "
                "ignore_data_skip and with the data, seeds and batches of the checkpoint"
            )
        try:
            return super().train(resume_from_checkpoint, *args, **kwargs)
        finally:
            if self._ahead is not None:
                self._ahead.close()
                self._ahead = None

    def compute_loss(
        self, model: nn.Module, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Tensor:
        """The loss of a `LossPass`; its metrics are added once the micro-batch is done."""
        if return_outputs:
            raise ValueError(f"return_outputs: {type(self).__name__} has no outputs but the loss")
        part, batch = inputs
        loss, metrics = self.pass_loss(model, part, batch)
        if self.router_coef:
            share = part.batch.mask.sum() / max(batch.step_tokens, 1.0)
            loss = loss + self.router_coef * share * self._router_loss
            metrics = {**metrics, "aux_loss": self._router_loss.detach()}
        self._passes_run.append((part, metrics))
        return loss

    def _add_pass_metrics(self, batch: MicroBatch[Any]) -> None:
        metrics = self.merge_metrics(self._passes_run, batch)
        self._passes_run = []
        self.add_means(self._eval_prefix or "train", metrics)

    def _finish_window(self, model: nn.Module) -> None:
        if not self._window_ran:
            model_setup.fill_missing_gradients(model)
        self.finish_window()
        self.metrics.add("train", {"step_time": time.perf_counter() - self._step_started})

    # Evaluation, logs, checkpoints -----------------------------------------------------------------------------------

    def evaluate(
        self, eval_dataset: Any = None, ignore_keys: list[str] | None = None, metric_key_prefix: str = "eval"
    ) -> dict[str, float]:
        """Samples and rewards completions of the evaluation prompts; the metrics are those of training, prefixed."""
        if isinstance(self.eval_dataset if eval_dataset is None else eval_dataset, dict):
            self._evaluates_anew = self._evaluates_several = True  # each by a call of its own
            try:
                return super().evaluate(eval_dataset, ignore_keys, metric_key_prefix)
            finally:
                self._evaluates_several = False
        self._eval_prefix = metric_key_prefix
        self._evaluates_anew = self._evaluates_anew or not self._evaluates_several
        try:
            return super().evaluate(eval_dataset, ignore_keys, metric_key_prefix)
        finally:
            self._eval_prefix = None

    def prediction_step(
        self, model: nn.Module, inputs: Any, prediction_loss_only: bool, ignore_keys: list[str] | None = None
    ) -> tuple[Tensor, None, None]:
        """The loss of one evaluation batch, of which rewards and lengths are the by-product that matters."""
        samples = self.collect_samples(inputs, "eval_dataset", self._eval_prefix or "eval")
        rollouts = self.make_rollouts(samples, score_old=False)
        (batch,) = micro_batches([rollouts], self.total, self.accelerator.num_processes)
        with torch.no_grad():
            loss = torch.stack([self.compute_loss(model, part) for part in self._passes(batch)]).sum()
        self._add_pass_metrics(batch)
        return loss, None, None

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Adds the means of the metrics since the last log."""
        prefix = self._eval_prefix
        metrics = self.metrics.drain(prefix or "train")
        logs.update({f"{prefix}_{name}" if prefix else name: value for name, value in metrics.items()})  # type: ignore[misc]
        super().log(logs, start_time)
        if self.completions is not None:
            self.completions.flush(self.state.global_step, prefix or "train")

    def geometry(self) -> dict[str, Any]:
        """What says which prompts a rollout has and which optimizer steps use it."""
        sizes = ("per_device_train_batch_size", "gradient_accumulation_steps", "steps_per_generation")
        return {name: getattr(self.args, name) for name in (*sizes, "num_iterations", "num_generations", "world_size")}

    def resume_state(self) -> tuple[dict[str, Any], dict[str, Tensor]]:
        """Rollouts that are still in use, the place among them, metrics not yet logged."""
        pending = self._buffer if self._micro_step % self._generate_every else []
        state = {
            "micro_step": self._micro_step,
            "geometry": self.geometry(),
            "metrics": self.metrics.state_dict(),
            "drawn": self._drawn,
        }
        return state, named_tensors(pending)

    def load_resume_state(self, state: dict[str, Any], tensors: dict[str, Tensor]) -> None:
        """See `resume_state`.

        Raises:
            ValueError: a checkpoint inside a rollout, resumed with batches of another shape.
        """
        same = state["geometry"] == self.geometry()
        if tensors and not same:
            raise ValueError(
                f"the checkpoint holds rollouts in use, made with {state['geometry']}; it cannot be resumed with "
                f"{self.geometry()}"
            )
        self._micro_step = state["micro_step"] if same else 0
        self.metrics.load_state_dict(state["metrics"])
        self._drawn = state["drawn"]
        self._buffer = from_named_tensors(self.rollouts_type, tensors)
