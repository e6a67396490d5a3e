"""What trainers on a fixed dataset share: rows tokenized once, packed passes without padding, a loss that is normalized
over the whole optimizer step, metrics, evaluation. A subclass says what a row is and what its loss is."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import nullcontext
from functools import partial
from typing import Any, ClassVar, NamedTuple

import torch
from accelerate.utils import set_seed
from torch import Tensor, nn
from torch.utils.data import DataLoader, Sampler
from transformers import PreTrainedTokenizerBase, TrainerCallback

from fastrl.data.token_rows import TokenRow, TokenRows, check_datasets, tokenize_rows
from fastrl.integrations import LMHead, patch_model, router_loss, router_loss_coef
from fastrl.trainers import model_setup
from fastrl.trainers.activation_offloading import OffloadedActivations
from fastrl.trainers.arguments import refuse_launch
from fastrl.trainers.checkpointing import ResumableTrainer
from fastrl.trainers.metrics import MetricSums
from fastrl.trainers.offline_config import OfflineConfig
from fastrl.trainers.packing import Packer, Pass
from fastrl.trainers.prompts import context_length_of
from fastrl.trainers.row_batch import RowBatch, collate_rows, own_rows, whole_row_passes, with_values
from fastrl.trainers.sampler import RepeatSampler


class PassOutput(NamedTuple):
    """What a trainer computes from one pass."""

    loss: Tensor  # the sum of the pass's terms, each divided by its normalizer
    metrics: Mapping[str, tuple[Any, Any]]  # name -> (sum, count), whose quotient over a step is logged


class _Work(NamedTuple):
    part: Pass[Any]
    normalizers: Mapping[str, float]


class OfflineTrainer(ResumableTrainer):
    """Trains a causal LM on the rows of a dataset; SFT, DPO, reward models and off-policy distillation are subclasses.

    A subclass defines
      - `row_function()`, what tokenizes a row (`fastrl.data.formats`), and `columns`, what rows hold besides tokens;
      - `pass_loss()`: the loss of a packed pass, divided by the normalizers, and its metrics as sums and counts;
      - `counts()`, if the loss is divided by something else than the tokens that count;
      - `collate`, if its batches hold more than tokens;
      - `whole_rows = True`, if the sequences of a row must meet in one pass, as a pair's loss needs it;
      - `set_up()`, for what happens to model and tokenizer before an adapter is put on (a reference, a template).

    What a loss is divided by is counted over the optimizer step and all processes, so that any split into micro-batches
    and passes gives the same loss and gradient. Metrics are quotients of sums over the step. `eval_loss` is the mean
    over all that counts in the evaluation set, whatever the batch size; TRL's is a mean of the batches' means. The
    order of rows is a function of (seed, epoch): a resumed run sees the rows that the uninterrupted one does.

    Args:
        model: a path, a transformers causal LM, or one under PEFT.
        args: the subclass's config.
        train_dataset, eval_dataset: rows in a format of `fastrl.data.formats`, a `datasets.Dataset` or a list of dicts;
            a dict of evaluation datasets evaluates on each.
        processing_class: the tokenizer; None: the one beside the model. Without a pad token it gets its eos token.
        callbacks, optimizers, optimizer_cls_and_kwargs: as in `transformers.Trainer`.
        peft_config: wraps the model in an adapter.

    Raises:
        TypeError, ValueError: an argument that cannot work, named; a row that cannot be tokenized, named.
    """

    # The loss is normalized over the optimizer step: Trainer must not divide it by the number of micro-batches.
    loss_is_scaled_for_ga = True
    config_class: ClassVar[type[OfflineConfig]] = OfflineConfig
    columns: ClassVar[Mapping[str, Any]] = {}  # of the rows, besides the tokens: name -> datasets type
    whole_rows: ClassVar[bool] = False
    collate: Any = staticmethod(collate_rows)  # (rows, pad_token_id) -> RowBatch

    args: Any
    model: Any

    def __init__(
        self,
        model: str | nn.Module,
        args: OfflineConfig | None = None,
        train_dataset: Any = None,
        eval_dataset: Any = None,
        processing_class: PreTrainedTokenizerBase | None = None,
        callbacks: list[TrainerCallback] | None = None,
        optimizers: tuple[torch.optim.Optimizer | None, torch.optim.lr_scheduler.LRScheduler | None] = (None, None),
        peft_config: Any = None,
        optimizer_cls_and_kwargs: tuple[type[torch.optim.Optimizer], dict[str, Any]] | None = None,
    ) -> None:
        args = self.config_class() if args is None else args
        if not isinstance(args, self.config_class):
            raise TypeError(f"args: expected a fastrl.{self.config_class.__name__}, got {type(args).__name__}")
        check_datasets(train_dataset, eval_dataset)
        set_seed(args.seed)  # an adapter's weights are random
        policy = self.load_model(model, args)
        self.tokenizer = model_setup.load_tokenizer(processing_class, policy, args.trust_remote_code)
        if args.disable_dropout:
            model_setup.disable_dropout(policy)
        policy = self.set_up(policy, args, peft_config)
        self.pad_token_id, self.eos_token_ids = model_setup.special_tokens(self.tokenizer, policy)
        if peft_config is not None:
            policy = model_setup.add_adapter(policy, peft_config)
        self.router_coef = router_loss_coef(policy, args.router_aux_loss_coef)
        self.args = args
        self._tokenizing: dict[str, Any] = {
            "tokenize": self.row_function(args),
            "columns": self.columns,
            "context_length": context_length_of(policy.config),
            "num_proc": args.dataset_num_proc,
            "progress": not args.disable_tqdm,
        }
        super().__init__(
            model=policy,
            args=args,
            data_collator=partial(type(self).collate, pad_token_id=self.pad_token_id),
            train_dataset=self.tokenized(train_dataset, "train_dataset"),
            eval_dataset=self._tokenized_eval(eval_dataset),
            processing_class=self.tokenizer,
            callbacks=callbacks,
            optimizers=optimizers,
            optimizer_cls_and_kwargs=optimizer_cls_and_kwargs,
        )
        refuse_launch(self)
        self.patches = [self.patch(policy)]
        # Under FSDP every process must run the model equally often.
        self.packer = Packer.for_model(policy, args.share_prompts, args.tokens_per_pass, one_pass=self.is_fsdp_enabled)
        self.activations = OffloadedActivations(policy) if args.activation_offloading else nullcontext()
        self._sums = MetricSums(self.args.device)  # of the optimizer step or the evaluation
        self._tokens = 0  # of the optimizer step, in this process
        self._micro_batches_left = 0  # of the optimizer step
        self._eval_prefix: str | None = None

    # What a subclass defines -----------------------------------------------------------------------------------------

    def load_model(self, model: str | nn.Module, args: Any) -> Any:
        """The model to train, from a path or an object."""
        return model_setup.load_model(model, args.model_init_kwargs, args.trust_remote_code)

    def patch(self, model: nn.Module) -> Any:
        """Makes the model score without logits."""
        return patch_model(model)

    def set_up(self, policy: Any, args: Any, peft_config: Any) -> Any:
        """Prepares model and `self.tokenizer`, before the adapter and the tokenization; the model to go on with."""
        return policy

    def row_function(self, args: Any) -> Callable[[Mapping[str, Any]], TokenRow]:
        """What makes a `token_row` of a row of the dataset; loadable by worker processes."""
        raise NotImplementedError

    def counts(self, batch: Any) -> dict[str, float]:
        """What the loss of a micro-batch is divided by, by name; the first is also the weight of `eval_loss`."""
        return {"tokens": float(batch.mask.sum())}

    def step_values(self, batches: list[Any]) -> dict[str, float]:
        """What else `pass_loss` finds among the normalizers, from all micro-batches of a step, before its passes."""
        return {}

    def pass_loss(self, model: nn.Module, part: Pass[Any], normalizers: Mapping[str, float]) -> PassOutput:
        """Runs the model on a pass (`self.run`). `normalizers` are the `counts` of the optimizer step, per process."""
        raise NotImplementedError

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

    # Data ------------------------------------------------------------------------------------------------------------

    def tokenized(self, rows: Any, name: str, **settings: Any) -> TokenRows:
        """The rows that the argument `name` was given, tokenized; `settings` replace those of `tokenize_rows`."""
        return tokenize_rows(rows, name, **{**self._tokenizing, **settings})

    def _tokenized_eval(self, eval_dataset: Any) -> Any:
        if isinstance(eval_dataset, dict):
            return {key: self.tokenized(rows, f"eval_dataset[{key!r}]") for key, rows in eval_dataset.items()}
        return None if eval_dataset is None else self.tokenized(eval_dataset, "eval_dataset")

    def _get_train_sampler(self, train_dataset: Any = None) -> Sampler:
        args: Any = self.args
        rows: Any = self.train_dataset if train_dataset is None else train_dataset
        seed = args.seed if args.data_seed is None else args.data_seed
        self._sampler = RepeatSampler(rows, 1, shuffle=args.train_sampling_strategy == "random", seed=seed)
        return self._sampler

    def _get_eval_sampler(self, eval_dataset: Any) -> Sampler:
        return RepeatSampler(eval_dataset, 1, shuffle=False)

    def get_eval_dataloader(self, eval_dataset: Any = None) -> DataLoader:
        """The rows in order; a dataset that is not tokenized yet is."""
        if eval_dataset is None and self.eval_dataset is None:
            raise ValueError("eval_dataset: evaluation needs one")
        if eval_dataset is not None and not isinstance(eval_dataset, str | TokenRows):
            eval_dataset = self.tokenized(eval_dataset, "eval_dataset")
        return super().get_eval_dataloader(eval_dataset)

    def _get_collator_with_removed_columns(self, data_collator: Any, description: str | None = None) -> Any:
        return data_collator  # tokenized rows have the columns that they need

    def _run_epoch(self, model: nn.Module, epoch: int, *args: Any, **kwargs: Any) -> None:
        self._sampler.set_epoch(epoch)  # accelerate's wrappers do not always pass the epoch on
        super()._run_epoch(model, epoch, *args, **kwargs)

    def _prepare_inputs(self, inputs: Any) -> Any:
        return inputs  # a batch that is on the device, or a pass

    def precomputed(self, rows: TokenRows, name: str, values: Callable[[Any], Tensor], batch_size: int) -> TokenRows:
        """The rows with a column of what `values` gives for each sequence: see `with_values`."""
        return with_values(self, rows, name, values, batch_size)

    # One optimizer step ----------------------------------------------------------------------------------------------

    def _get_num_items_in_batch(self, batch_samples: list, device: torch.device) -> Any:
        self._micro_batches_left = len(batch_samples)
        counts = [self._counts(batch) for batch in batch_samples]
        names = list(counts[0])
        totals = self._total(torch.tensor([[count[name] for name in names] for count in counts]).sum(0))
        # The gradient is averaged over processes, so that each one's share must count that much more. Where nothing is
        # there to count every term is 0, whatever it is divided by.
        shares = [float(total) / self.accelerator.num_processes or 1.0 for total in totals]
        return {**dict(zip(names, shares, strict=True)), **self.step_values(batch_samples)}

    def _counts(self, batch: Any) -> dict[str, float]:
        counts = self.counts(batch)
        counts.setdefault("tokens", float(batch.mask.sum()))  # the weight of a router's loss
        return counts

    def _total(self, counts: Tensor) -> Tensor:
        return self.accelerator.reduce(counts.double().to(self.args.device), reduction="sum").cpu()

    def passes(self, batch: RowBatch) -> list[Pass[Any]]:
        """What the model runs on for a batch, by the token budget; whole rows in each where the loss needs that."""
        return whole_row_passes(self.packer, batch) if self.whole_rows else self.packer.passes(batch)

    def training_step(self, model: nn.Module, inputs: Any, num_items_in_batch: Any = None) -> Tensor:
        """Forward and backward of a micro-batch, pass by pass."""
        batch: RowBatch = inputs
        *first, last = [_Work(part, num_items_in_batch) for part in self.passes(batch)]
        loss = torch.zeros((), device=self.args.device)
        with self.activations:
            with self.accelerator.no_sync(model):  # each process has its own number of passes
                for work in first:
                    loss += super().training_step(model, work, None)  # type: ignore[arg-type]
            loss += super().training_step(model, last, None)  # type: ignore[arg-type]
        self._tokens += batch.num_tokens
        self._micro_batches_left -= 1
        if not self._micro_batches_left:
            self._finish_step()
        return loss

    def compute_loss(
        self, model: nn.Module, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Tensor:
        """The loss of a pass; its metrics are added to those of the step."""
        if return_outputs:
            raise ValueError(f"return_outputs: {type(self).__name__} has no outputs but the loss")
        out = self.pass_loss(model, inputs.part, inputs.normalizers)
        self._sums.add(out.metrics)
        if not self.router_coef:
            return out.loss
        # A mean over a forward's tokens: passes count by their share of the tokens that the loss counts.
        tokens = float(inputs.part.batch.mask.sum())
        self._sums.add({"aux_loss": (self._router_loss.detach() * tokens, tokens)})
        return out.loss + self._router_loss * (self.router_coef * tokens / inputs.normalizers["tokens"])

    def _finish_step(self) -> None:
        tokens, self._tokens = int(self._total(torch.tensor(self._tokens))), 0
        self.state.num_input_tokens_seen += tokens
        self.metrics.count_tokens(tokens)
        self.metrics.add("train", self._sums.take(self._total))
        self.metrics.set("train", "num_tokens", self.state.num_input_tokens_seen)

    def _track_num_input_tokens(self, inputs: Any) -> None:
        pass  # counted with the metrics

    def floating_point_ops(self, inputs: Any) -> int:
        """6 per token and weight, embeddings left out."""
        return 6 * inputs.num_tokens * self.model.num_parameters(exclude_embeddings=True)

    # Evaluation, logs, checkpoints -----------------------------------------------------------------------------------

    def evaluate(
        self, eval_dataset: Any = None, ignore_keys: list[str] | None = None, metric_key_prefix: str = "eval"
    ) -> dict[str, float]:
        """`eval_loss` and the metrics of training, prefixed, over the whole evaluation set."""
        if isinstance(self.eval_dataset if eval_dataset is None else eval_dataset, dict):
            return super().evaluate(eval_dataset, ignore_keys, metric_key_prefix)
        self._eval_prefix = metric_key_prefix
        try:
            return super().evaluate(eval_dataset, ignore_keys, metric_key_prefix)
        finally:
            self._eval_prefix = None

    def evaluation_loop(  # type: ignore[override]
        self, dataloader: DataLoader, description: str, *, metric_key_prefix: str = "eval", **kwargs: Any
    ) -> Any:
        """Adds the metrics, and a loss that does not depend on how the set is cut into batches."""
        self._sums = MetricSums(self.args.device)
        output: Any = super().evaluation_loop(dataloader, description, metric_key_prefix=metric_key_prefix, **kwargs)
        metrics = self._sums.take(self._total) | {"num_tokens": float(self.state.num_input_tokens_seen)}
        output.metrics.update({f"{metric_key_prefix}_{name}": value for name, value in metrics.items()})
        self._sums = MetricSums(self.args.device)
        return output

    def prediction_step(
        self, model: nn.Module, inputs: Any, prediction_loss_only: bool, ignore_keys: list[str] | None = None
    ) -> tuple[None, None, None]:
        """Adds the loss and the metrics of a batch; there are no predictions."""
        own: Any = own_rows(inputs, self.accelerator, self.args.eval_batch_size)
        self._sums.weight = float(len(own) > 0)  # a process without rows of its own tells the same metrics as others
        batch = own if len(own) else inputs
        counts = {name: count or 1.0 for name, count in self._counts(batch).items()} | self.step_values([batch])
        with torch.no_grad(), self.compute_loss_context_manager():
            losses = [self.compute_loss(model, _Work(part, counts)) for part in self.passes(batch)]
        weight = next(iter(counts.values()))
        self._sums.add({"loss": (torch.stack(losses).sum() * weight, weight)})
        return None, None, None

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Adds the means of training's metrics since the last log."""
        if self._eval_prefix is None:
            logs.update(self.metrics.drain("train"))  # type: ignore[arg-type]
        super().log(logs, start_time)

    def resume_state(self) -> tuple[dict[str, Any], dict[str, Tensor]]:
        """Metrics not yet logged."""
        return {"metrics": self.metrics.state_dict()}, {}

    def load_resume_state(self, state: dict[str, Any], tensors: dict[str, Tensor]) -> None:
        """See `resume_state`."""
        self.metrics.load_state_dict(state["metrics"])
