"""Reward models on `transformers.Trainer`: of pairs, of rankings, of outcomes and of steps."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any, ClassVar

import torch
from datasets import List, Value
from torch import Tensor, nn
from transformers import (
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    PreTrainedTokenizerBase,
    TrainerCallback,
)
from transformers.utils import logging

from fastrl.data.formats import Encoder
from fastrl.data.reward_rows import ComparedRow, OutcomeRow, RankedRow, StepRow
from fastrl.data.token_rows import TokenRow, TokenRows
from fastrl.integrations import LMHead
from fastrl.integrations.transformers_models import head_of, innermost_causal_lm
from fastrl.objectives.reward_model import (
    RANKING_KINDS,
    RewardOutput,
    linear_outcome_reward_loss,
    linear_process_reward_loss,
    ranking_loss,
    reward_model_loss,
)
from fastrl.objectives.score_head import row_scores
from fastrl.rewards.model import COMPLETE_TEXTS
from fastrl.trainers import model_setup
from fastrl.trainers.arguments import refuse_given, with_quantization
from fastrl.trainers.metrics import MetricRange
from fastrl.trainers.offline import OfflineTrainer, PassOutput
from fastrl.trainers.packing import Pass
from fastrl.trainers.reward_batch import RewardBatch, by_prompt, collate_rewards, ranked_pairs
from fastrl.trainers.reward_config import PRMConfig, RewardConfig
from fastrl.trainers.row_batch import whole_row_passes

logger = logging.get_logger(__name__)

_ROWS: dict[str, Any] = {"bradley_terry": ComparedRow, "orm": OutcomeRow, **dict.fromkeys(RANKING_KINDS, RankedRow)}
_COLUMNS: dict[str, dict[str, Any]] = {
    "bradley_terry": {"margin": Value("float32")},
    **{kind: {"ranks": List(Value("float32"))} for kind in RANKING_KINDS},
    "orm": {"label": Value("bool")},
    "prm": {"labels": List(Value("int32"))},
}


class RewardTrainer(OfflineTrainer):
    """Trains a reward model. The signature, the arguments and the metric names are TRL 1.16's.

    The model is a sequence classifier of one label, whose score of a text is read at its last token; with
    `loss_type="prm"` a token classifier of two or more. What `save_model` writes is loaded by
    `AutoModelForSequenceClassification` (`AutoModelForTokenClassification`) and by `fastrl.rewards.RewardModel`, which
    also adds the end-of-sequence token that the texts had in training.

    Args:
        model: a path, also of a causal LM, which gets a new score layer; or such a classifier, also under PEFT.
        args: a `RewardConfig`; None: its defaults.
        train_dataset, eval_dataset: rows in the format of `args.loss_type` (see `RewardConfig`), standard or
            conversational (see `fastrl.data.formats`). A preference's prompt may be explicit or implicit; it may also
            be tokenized: "chosen_ids", "rejected_ids". Stepwise rows may be "input_ids" and "labels" (-100: none). A
            dict of datasets evaluates on each.
        processing_class: the tokenizer; None: the one beside the model.
        callbacks, optimizers, optimizer_cls_and_kwargs: as in `transformers.Trainer`.
        peft_config: wraps the model in an adapter; give it `modules_to_save=["score"]`, so that the score layer learns.
        quantization_config: of a model given by path.
        data_collator, compute_metrics, preprocess_logits_for_metrics: refused, the message says why.

    A prompt is encoded once for all of its answers, and the score layer sees only the hidden states that the loss
    reads. The loss is a mean over the pairs of the optimizer step (K-ranked: the prompts with answers of different
    rank; orm: the answers' tokens; prm: the steps).

    Metrics: loss, num_tokens, accuracy; not with "prm": min_reward, mean_reward, max_reward; with pairs and rankings
    margin; with "orm" token_accuracy, its accuracy being that of the score that judges the answer.

    Departures from TRL:
      - min_reward and max_reward are those of the optimizer step (TRL: means over the micro-batches), in evaluation of
        the whole set (TRL: means over batches).
      - `eval_loss` is the mean over all that counts in the evaluation set, whatever the batch size.
      - A row with a margin of None has a margin of 0.
      - Streamed datasets and images: refused.
    """

    config_class: ClassVar[type[RewardConfig]] = RewardConfig
    collate: Any = staticmethod(collate_rewards)

    def __init__(
        self,
        model: str | nn.Module,
        args: RewardConfig | None = None,
        data_collator: Any = None,
        train_dataset: Any = None,
        eval_dataset: Any = None,
        processing_class: PreTrainedTokenizerBase | None = None,
        compute_metrics: Any = None,
        callbacks: list[TrainerCallback] | None = None,
        optimizers: tuple[torch.optim.Optimizer | None, torch.optim.lr_scheduler.LRScheduler | None] = (None, None),
        optimizer_cls_and_kwargs: tuple[type[torch.optim.Optimizer], dict[str, Any]] | None = None,
        preprocess_logits_for_metrics: Any = None,
        quantization_config: Any = None,
        peft_config: Any = None,
    ) -> None:
        refused = {
            "data_collator": (data_collator, "batches are made of packed rows"),
            "compute_metrics": (compute_metrics, "evaluation keeps no scores; it reports accuracy and rewards"),
            "preprocess_logits_for_metrics": (preprocess_logits_for_metrics, "evaluation keeps no scores"),
        }
        refuse_given(refused)
        args = with_quantization(args or self.config_class(), model, quantization_config)
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
        self._rewards = MetricRange(self.args.device)
        head = head_of(innermost_causal_lm(self.model))
        if not any(parameter.requires_grad for parameter in head.parameters()):
            logger.warning("The score layer is not trained: add modules_to_save=['score'] to the adapter's config.")

    # Set-up ----------------------------------------------------------------------------------------------------------

    def load_model(self, model: str | nn.Module, args: RewardConfig) -> Any:
        """See `OfflineTrainer`; a path may also be a causal LM's.

        Raises:
            TypeError: another kind of model. ValueError: a reward model of several labels.
        """
        steps = args.loss_type == "prm"
        auto_class = AutoModelForTokenClassification if steps else AutoModelForSequenceClassification
        kwargs = args.model_init_kwargs
        if isinstance(model, str):
            kwargs = {"num_labels": 2 if steps else 1, **(kwargs or {})}
        policy = model_setup.load_model(model, kwargs, args.trust_remote_code, auto_class)
        name, kind = type(innermost_causal_lm(policy)).__name__, "Token" if steps else "Sequence"
        if not name.endswith(f"For{kind}Classification"):
            raise TypeError(
                f"model: loss_type {args.loss_type!r} needs a {kind.lower()} classifier (AutoModelFor{kind}"
                f"Classification), got {name}"
            )
        labels = policy.config.num_labels
        if (labels < 2) if steps else (labels != 1):
            expected = "two or more" if steps else "1"
            raise ValueError(f"model: loss_type {args.loss_type!r} expects num_labels to be {expected}, got {labels}")
        self._classes = labels
        return policy

    def set_up(self, policy: Any, args: RewardConfig, peft_config: Any) -> Any:
        """Template and special tokens that the arguments name."""
        has_adapter = peft_config is not None or model_setup.is_peft_model(policy)
        model_setup.use_named_tokens(self.tokenizer, policy, args, has_adapter)
        if args.loss_type != "prm":
            setattr(policy.config, COMPLETE_TEXTS, True)
            self.tokenizer.init_kwargs[COMPLETE_TEXTS] = True  # is saved with an adapter, which the config is not
        return policy

    # Data ------------------------------------------------------------------------------------------------------------

    def row_function(self, args: RewardConfig) -> Callable[[Mapping[str, Any]], TokenRow]:
        """What makes answers, and what is known of them, of a row."""
        encoder = Encoder(self.tokenizer)
        if args.loss_type != "prm":
            made: Callable[..., TokenRow] = _ROWS[args.loss_type](encoder, self.pad_token_id, args.max_length)
            return made
        return StepRow(
            encoder,
            classes=self._classes,
            step_separator=args.step_separator,
            last_step_only=args.train_on_last_step_only,
            max_length=args.max_length,
            max_prompt_length=args.max_prompt_length,
            max_completion_length=args.max_completion_length,
        )

    def tokenized(self, rows: Any, name: str, **settings: Any) -> TokenRows:
        """With the columns of the loss type; in evaluation every step counts."""
        row = self.row_function(self.args)
        if isinstance(row, StepRow) and name != "train_dataset":
            row = replace(row, last_step_only=False)
        return super().tokenized(rows, name, tokenize=row, columns=_COLUMNS[self.args.loss_type], **settings)

    def passes(self, batch: RewardBatch) -> list[Pass[RewardBatch]]:  # type: ignore[override]
        """Answers that are compared in one pass."""
        alone = self.args.loss_type in ("orm", "prm")
        return self.packer.passes(batch) if alone else whole_row_passes(self.packer, batch)

    # Loss ------------------------------------------------------------------------------------------------------------

    def counts(self, batch: RewardBatch) -> dict[str, float]:
        """Pairs, prompts whose answers differ in rank, or tokens with a label."""
        if batch.rank is not None:
            return {"rows": float((ranked_pairs(batch) > 0).sum())}
        if batch.margin is not None:
            return {"rows": len(batch) / 2}
        return super().counts(batch)

    def pass_loss(self, model: nn.Module, part: Pass[RewardBatch], normalizers: Mapping[str, float]) -> PassOutput:
        """The loss of a pass, and the metrics of its answers."""

        def loss(hidden: Tensor, head: LMHead) -> RewardOutput:
            return self._loss(part.select_counted(hidden), head, part.batch, normalizers)

        out: RewardOutput = self.run(model, part, loss)
        return PassOutput(out.loss, self._metrics(out, part.batch))

    def _loss(self, states: Tensor, head: LMHead, batch: RewardBatch, normalizers: Mapping[str, float]) -> RewardOutput:
        if self.args.loss_type in ("orm", "prm"):
            arguments: dict[str, Any] = {"bias": head.bias, "normalizer": normalizers["tokens"]}
            if batch.labels is not None:
                labels = batch.labels[batch.mask]
                return linear_process_reward_loss(states[None], head.weight, labels[None], **arguments)
            assert batch.label is not None  # of "orm"
            labels = batch.label[:, None].expand_as(batch.mask)[batch.mask].float()
            return linear_outcome_reward_loss(states[None], head.weight, labels[None], **arguments)
        places = torch.arange(len(states), device=states.device)
        scores = row_scores(states, head.weight, head.bias, places).squeeze(-1)
        if batch.margin is not None:
            chosen, rejected = scores.view(-1, 2).unbind(-1)
            return reward_model_loss(
                chosen,
                rejected,
                margin=batch.margin[::2],
                center_rewards_coefficient=self.args.center_rewards_coefficient,
                normalizer=normalizers["rows"],
            )
        assert batch.rank is not None  # of rankings
        table, present = by_prompt(scores, batch.row)
        ranks, _ = by_prompt(batch.rank, batch.row)
        return ranking_loss(table, ranks, kind=self.args.loss_type, mask=present, normalizer=normalizers["rows"])

    # Metrics ---------------------------------------------------------------------------------------------------------

    def _metrics(self, out: RewardOutput, batch: RewardBatch) -> dict[str, tuple[Any, Any]]:
        if batch.labels is not None:
            return {"accuracy": _summed(out, "accuracy", batch.mask.sum())}
        metrics: dict[str, tuple[Any, Any]] = {}
        if batch.label is not None:
            rewards = out.scores[batch.mask.sum(-1).cumsum(0) - 1, 0]  # at the last token of each answer that counts
            metrics["accuracy"] = (((rewards > 0) == batch.label).sum(), len(batch))
            metrics["token_accuracy"] = _summed(out, "accuracy", batch.mask.sum())
        else:
            pairs = torch.tensor(len(batch) // 2) if batch.rank is None else ranked_pairs(batch).sum()
            metrics |= {name: _summed(out, name, pairs) for name in ("accuracy", "margin")}
            rewards = out.scores if batch.rank is None else out.scores[by_prompt(batch.rank, batch.row)[1]]
        self._rewards.add(rewards)
        return {**metrics, "mean_reward": (rewards.sum(), len(rewards))}

    def _range(self) -> dict[str, float]:
        if self.args.loss_type == "prm":
            return {}
        return dict(zip(("min_reward", "max_reward"), self._rewards.take(self.accelerator.gather), strict=True))

    def _finish_step(self) -> None:
        super()._finish_step()
        self.metrics.add("train", self._range())

    def evaluation_loop(self, *args: Any, metric_key_prefix: str = "eval", **kwargs: Any) -> Any:
        """See `OfflineTrainer`."""
        training, self._rewards = self._rewards, MetricRange(self.args.device)
        output = super().evaluation_loop(*args, metric_key_prefix=metric_key_prefix, **kwargs)
        output.metrics.update({f"{metric_key_prefix}_{name}": value for name, value in self._range().items()})
        self._rewards = training
        return output


def _summed(out: RewardOutput, name: str, count: Tensor) -> tuple[Tensor, Tensor]:
    """A mean of a loss, NaN where it is over nothing, as a sum and a count."""
    return torch.nan_to_num(out.metrics[name]) * count.to(out.loss.device), count


class PRMTrainer(RewardTrainer):
    """`RewardTrainer` with the defaults of TRL's former `PRMTrainer`: step by step."""

    config_class: ClassVar[type[RewardConfig]] = PRMConfig
