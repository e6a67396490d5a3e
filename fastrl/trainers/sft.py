"""Supervised fine-tuning on `transformers.Trainer`, with a loss that never builds the logits."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase, TrainerCallback

from fastrl.data.formats import Encoder, FormatError, Row, Text, sequence_of, truncated
from fastrl.data.packed_rows import PackedRows, wrapped
from fastrl.data.token_rows import TokenRow, TokenRows, token_row
from fastrl.integrations import LMHead
from fastrl.objectives import LossOutput, linear_sft_loss
from fastrl.trainers import model_setup
from fastrl.trainers.arguments import refuse_given, with_quantization
from fastrl.trainers.offline import OfflineTrainer, PassOutput
from fastrl.trainers.packing import Pass
from fastrl.trainers.row_batch import RowBatch
from fastrl.trainers.sft_config import SFTConfig


class SFTTrainer(OfflineTrainer):
    """Trains a causal LM on given answers or texts. The signature, the arguments and the metric names are TRL 1.16's.

    Args:
        model: a path, a transformers causal LM, or one under PEFT.
        args: an `SFTConfig`; None: its defaults.
        train_dataset, eval_dataset: rows of language modelling or prompt-completion, standard or conversational (see
            `fastrl.data.formats`), or of "input_ids" with "labels" (-100: does not count), "completion_mask" or
            "assistant_masks". A dict of datasets evaluates on each.
        processing_class: the tokenizer; None: the one beside the model.
        callbacks, optimizers, optimizer_cls_and_kwargs: as in `transformers.Trainer`.
        peft_config: wraps the model in an adapter.
        formatting_func: a row -> its text, or a list of messages.
        quantization_config: of a model given by path.
        data_collator, compute_loss_func, compute_metrics, preprocess_logits_for_metrics: refused, the message says why.

    Metrics: loss, entropy, num_tokens, with a mixture of experts aux_loss, and in evaluation mean_token_accuracy.

    Departures from TRL:
      - `mean_token_accuracy` is there in evaluation only: it needs the largest logit, which the fused loss never has.
      - Metrics and `eval_loss` are means over all tokens that count, whatever the batch size; TRL's are means of the
        batches' means.
      - Rows with "completion_mask" count it unless `completion_only_loss=False`; TRL needs True for that.
      - A text of which no token counts is left out also where a single token is all there is.
      - `assistant_only_loss` needs a chat template with {% generation %}; TRL swaps in one for the families it knows.
      - `lm_head` may have a LoRA adapter.
      - A mixture of experts' auxiliary loss is that of each pass, weighted by its tokens.
      - Streamed datasets and images: refused.
    """

    config_class: ClassVar[type[SFTConfig]] = SFTConfig

    def __init__(
        self,
        model: str | nn.Module,
        args: SFTConfig | None = None,
        data_collator: Any = None,
        train_dataset: Any = None,
        eval_dataset: Any = None,
        processing_class: PreTrainedTokenizerBase | None = None,
        compute_loss_func: Any = None,
        compute_metrics: Any = None,
        callbacks: list[TrainerCallback] | None = None,
        optimizers: tuple[torch.optim.Optimizer | None, torch.optim.lr_scheduler.LRScheduler | None] = (None, None),
        optimizer_cls_and_kwargs: tuple[type[torch.optim.Optimizer], dict[str, Any]] | None = None,
        preprocess_logits_for_metrics: Any = None,
        quantization_config: Any = None,
        peft_config: Any = None,
        formatting_func: Callable[[Row], Any] | None = None,
    ) -> None:
        refused = {
            "data_collator": (data_collator, "batches are made of packed rows"),
            "compute_loss_func": (compute_loss_func, "it needs the logits; override pass_loss in a subclass"),
            "compute_metrics": (compute_metrics, "it needs the logits"),
            "preprocess_logits_for_metrics": (preprocess_logits_for_metrics, "there are no logits"),
        }
        refuse_given(refused)
        args = with_quantization(args or self.config_class(), model, quantization_config)
        if formatting_func is not None and args is not None and args.completion_only_loss:
            raise ValueError(
                "formatting_func: makes texts without a completion, so completion_only_loss=True cannot be met; leave "
                "one of them out"
            )
        self._formatting_func = formatting_func
        super().__init__(
            model=model,
            args=args,
            train_dataset=train_dataset,
            eval_dataset=eval_dataset,
            processing_class=processing_class,
            callbacks=callbacks,
            optimizers=optimizers,
            optimizer_cls_and_kwargs=optimizer_cls_and_kwargs,
            peft_config=peft_config,
        )

    def set_up(self, policy: Any, args: SFTConfig, peft_config: Any) -> Any:
        """Template and special tokens that the arguments name."""
        has_adapter = peft_config is not None or model_setup.is_peft_model(policy)
        model_setup.use_named_tokens(self.tokenizer, policy, args, has_adapter)
        return policy

    # Data ------------------------------------------------------------------------------------------------------------

    def row_function(self, args: SFTConfig) -> TextRow:
        """See `TextRow`."""
        return TextRow(
            Encoder(self.tokenizer),
            text_field=args.dataset_text_field,
            completion_only=args.completion_only_loss,
            assistant_only=args.assistant_only_loss,
            formatting_func=self._formatting_func,
            max_length=None if args.skip_prepare_dataset else args.max_length,
            truncation_mode=args.truncation_mode,
            only_ids=args.skip_prepare_dataset,
        )

    def tokenized(self, rows: Any, name: str, **settings: Any) -> TokenRows:
        """Shuffled once and packed, if asked."""
        args, row = self.args, self.row_function(self.args)
        packs = args.packing if name == "train_dataset" or args.eval_packing is None else args.eval_packing
        if packs and not args.skip_prepare_dataset:
            row = replace(row, truncation_mode=_TRUNCATION[args.packing_strategy])
            if args.packing_strategy == "wrapped":
                settings["context_length"] = None  # of a block, which is what the model sees
        table = super().tokenized(rows, name, tokenize=row, **settings)
        if args.shuffle_dataset:
            table = TokenRows(table.rows.shuffle(seed=args.seed), name)
        if not packs or args.skip_prepare_dataset:
            return table
        return (wrapped if args.packing_strategy == "wrapped" else PackedRows)(table, args.max_length)

    # Loss ------------------------------------------------------------------------------------------------------------

    def pass_loss(self, model: nn.Module, part: Pass[RowBatch], normalizers: Mapping[str, float]) -> PassOutput:
        """The loss of a pass; in evaluation also how often the likeliest token is the right one."""
        batch = part.batch
        correct: Tensor | None = None

        def loss(hidden: Tensor, head: LMHead) -> LossOutput:
            nonlocal correct
            states = part.select(hidden)
            if not model.training:
                correct = top1_count(states[batch.mask], batch.completion_ids[batch.mask], head)
            return linear_sft_loss(
                states,
                head.weight,
                batch.completion_ids,
                mask=batch.mask,
                loss_type=self.args.loss_type,
                normalizer=normalizers["tokens"],
                entropy=True,
                bias=head.bias,
                logit_scale=head.logit_scale,
                softcap=head.softcap,
                backend=self.args.loss_backend,
            )

        out: LossOutput = self.run(model, part, loss)
        tokens = batch.mask.sum()
        metrics = {"entropy": (out.metrics["entropy"] * tokens, tokens)}
        if correct is not None:
            metrics["mean_token_accuracy"] = (correct, tokens)
        return PassOutput(out.loss, metrics)


_TRUNCATION = {"bfd": "keep_start", "bfd_split": "split", "wrapped": "none"}  # by packing strategy


@dataclass(frozen=True)
class TextRow:
    """A row to one sequence, or with truncation_mode "split" to several."""

    encoder: Encoder
    text_field: str
    completion_only: bool | None
    assistant_only: bool
    formatting_func: Callable[[Row], Any] | None
    max_length: int | None
    truncation_mode: str  # "keep_start", "keep_end", "split" or "none"
    only_ids: bool

    def __call__(self, row: Row) -> TokenRow:
        text = self._text(row)
        if self.truncation_mode == "split":
            pieces = [sequence_of(piece) for piece in text.split(self.max_length)]
            return token_row([piece for piece in pieces if piece.completion_ids] or pieces[:1])
        limit = None if self.truncation_mode == "none" else self.max_length
        return token_row([sequence_of(truncated(text, limit, self.truncation_mode))])

    def _text(self, row: Row) -> Text:
        if "input_ids" in row:
            return _given_ids(row, self.completion_only)
        if self.only_ids:
            raise FormatError("skip_prepare_dataset is set, but there is no column 'input_ids'")
        if self.formatting_func is not None:
            row = {self.text_field: self.formatting_func(row)}
        if row.get("prompt") is not None and row.get("completion") is not None:
            completion_only = self.completion_only is not False
            return self.encoder.prompt_completion(row, completion_only, self.assistant_only)
        if self.completion_only:
            raise FormatError("completion_only_loss=True: needs the columns 'prompt' and 'completion'")
        return self.encoder.language_modeling(row, self.text_field, self.assistant_only)


def _given_ids(row: Row, completion_only: bool | None) -> Text:
    """A row that is tokenized already: "labels" say what counts, or else the masks that there are."""
    ids = list(row["input_ids"])
    counted = [True] * len(ids)
    masks = ["assistant_masks"] if completion_only is False else ["completion_mask", "assistant_masks"]
    given = [[label != -100 for label in row["labels"]]] if row.get("labels") is not None else []
    given = given or [row[name] for name in masks if row.get(name) is not None]
    for mask in given:
        if len(mask) != len(ids):
            raise FormatError(f"{len(ids)} input_ids, but {len(mask)} labels or mask entries")
        counted = [a and bool(b) for a, b in zip(counted, mask, strict=True)]
    return Text(ids, counted)


@torch.no_grad()
def top1_count(hidden: Tensor, ids: Tensor, head: LMHead, rows: int = 1024) -> Tensor:
    """How many of `ids` (N,) have the largest logit, from hidden states (N, D), `rows` of them at a time.

    A positive scale and a soft cap leave the order of the logits as it is.
    """
    count = torch.zeros((), dtype=torch.int64, device=hidden.device)
    for states, targets in zip(hidden.split(rows), ids.split(rows), strict=True):
        count += (nn.functional.linear(states, head.weight, head.bias).argmax(-1) == targets).sum()
    return count
