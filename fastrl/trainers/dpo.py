"""Preference optimisation on `transformers.Trainer`: DPO and its kin, KTO, and the methods without a reference."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, ClassVar, cast

import torch
from datasets import Value
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase, TrainerCallback

from fastrl.data.formats import Encoder
from fastrl.data.preference_rows import AnswerRow, PairRow, unpaired_rows, with_mismatched
from fastrl.data.token_rows import TokenRows
from fastrl.integrations import LMHead
from fastrl.objectives import (
    KTOObjective,
    LikelihoodWatch,
    PreferenceOutput,
    kto_kl,
    linear_kto_loss,
    linear_preference_loss,
)
from fastrl.objectives.pairs import PairObjective
from fastrl.trainers import model_setup
from fastrl.trainers.arguments import refuse_given, with_quantization
from fastrl.trainers.dpo_config import DPOConfig, KTOConfig, needs_reference
from fastrl.trainers.offline import OfflineTrainer, PassOutput
from fastrl.trainers.packing import Pass
from fastrl.trainers.preference_batch import PreferenceBatch, by_kind, collate_preferences, summed_logps
from fastrl.trainers.preference_metrics import answer_metrics, pair_metrics, token_metrics
from fastrl.trainers.reference import Reference
from fastrl.trainers.reference_sync import ReferenceSync
from fastrl.trainers.row_batch import whole_row_passes
from fastrl.trainers.scoring import completion_logps, pass_logps


class DPOTrainer(OfflineTrainer):
    """Trains a causal LM on preferences. The signature, the arguments and the metric names are TRL 1.16's.

    Args:
        model: a path, a transformers causal LM, or one under PEFT.
        ref_model: the reference. None: the model as it is before training: a copy of it; under a new adapter the model
            without it; under an adapter that it came with, the model with that adapter's weights as they were.
        args: a `DPOConfig`; None: its defaults.
        train_dataset, eval_dataset: rows of preferences, standard or conversational, the prompt explicit or implicit
            (see `fastrl.data.formats`); TPO also needs a column "reference", the gold answer. KTO takes unpaired rows,
            and preferences, which it takes apart as TRL does. A dict of datasets evaluates on each.
        processing_class: the tokenizer; None: the one beside the model.
        callbacks, optimizers, peft_config: as in `OfflineTrainer`. The others: refused, the message says why.

    A pair's prompt is encoded once, and both answers run in one pass. What the loss is divided by are the pairs (KTO:
    answers) of the optimizer step, for an NLL term its tokens. Three losses depend on more than one pair:
      - "kto": its estimate of the KL is over all rows of the optimizer step, in evaluation over the batch (TRL: always
        over the batch). A row's prompt is mismatched with the answer of the row before it, within as many rows of the
        dataset as an optimizer step has (TRL: a micro-batch has), whatever the order in which the rows come.
      - "aot", "aot_unpaired": pairs are ranked within the micro-batch, as in TRL, and it runs in one pass.
      - "bco_pair": the reward is shifted by nothing, as in TRL.

    `LikelihoodWatch` warns once if the chosen answers become less likely while the margin rises, and names what helps:
    `rpo_alpha=1.0` (or "sft" among the loss types), `loss_type="apo_zero"`, `dpop_lambda=5.0`. Its metrics are there.

    Metrics: TRL's loss, entropy, num_tokens, rewards/{chosen,rejected,accuracies,margins}, logps/{chosen,rejected},
    logits/{chosen,rejected} (not where the model caps its logits), nll_loss with an NLL term, kl for KTO, aux_loss with
    a mixture of experts; in evaluation mean_token_accuracy of the chosen answers; and rewards/displaced, the share of
    the pairs of positive margin whose chosen answer is less likely than under the reference.

    Departures from TRL:
      - `mean_token_accuracy` is there in evaluation only: it needs the largest logit, which the fused loss never has.
      - `eval_loss` and evaluation's metrics are means over the whole evaluation set, whatever the batch size; in
        `eval_loss` an NLL term is each batch's own mean.
      - KTO's mismatched answers are cut at `max_length` twice: with their own prompt, then with the other.
      - ORPO's NLL is that of the chosen answers, without their prompts.
      - `lm_head` may have a LoRA adapter. Streamed datasets and images: refused.
    """

    config_class: ClassVar[type[DPOConfig]] = DPOConfig
    collate: Any = staticmethod(collate_preferences)

    objective: PairObjective | KTOObjective

    def __init__(
        self,
        model: str | nn.Module,
        ref_model: PreTrainedModel | None = None,
        args: DPOConfig | None = None,
        data_collator: Any = None,
        train_dataset: Any = None,
        eval_dataset: Any = None,
        processing_class: PreTrainedTokenizerBase | None = None,
        compute_metrics: Any = None,
        callbacks: list[TrainerCallback] | None = None,
        optimizers: tuple[torch.optim.Optimizer | None, torch.optim.lr_scheduler.LRScheduler | None] = (None, None),
        quantization_config: Any = None,
        peft_config: Any = None,
    ) -> None:
        refused = {
            "data_collator": (data_collator, "batches are made of packed rows"),
            "compute_metrics": (compute_metrics, "it needs the logits"),
        }
        refuse_given(refused)
        args = with_quantization(args or self.config_class(), model, quantization_config)
        if ref_model is not None and not isinstance(ref_model, PreTrainedModel):
            raise TypeError(f"ref_model: expected a transformers model, got {type(ref_model).__name__}")
        if ref_model is model:
            raise ValueError("ref_model: is the model itself; leave it out, and a copy is made")
        self._ref_model: Any = ref_model
        super().__init__(
            model=model,
            args=args,
            train_dataset=train_dataset,
            eval_dataset=eval_dataset,
            processing_class=processing_class,
            callbacks=callbacks,
            optimizers=optimizers,
            peft_config=peft_config,
        )
        self.watch = LikelihoodWatch()
        self.sync: ReferenceSync | None = None
        self.reference: Reference | None = None
        if needs_reference(self.objective):
            self.reference = self._make_reference(new_adapter=peft_config is not None)
        if self.args.precompute_ref_log_probs:
            rows, sets = (cast(Any, rows) for rows in (self.train_dataset, self.eval_dataset))
            self.train_dataset = self._with_reference(rows, self.args.per_device_train_batch_size)
            if isinstance(sets, dict):
                self.eval_dataset = {name: self._with_reference(rows) for name, rows in sets.items()}
            elif sets is not None:
                self.eval_dataset = self._with_reference(sets)

    def set_up(self, policy: Any, args: DPOConfig, peft_config: Any) -> Any:
        """The objective, and the copy that will be the reference where nothing else can be."""
        self.objective = args.objective()
        if args.pad_token is not None:
            model_setup.set_pad_token(self.tokenizer, args.pad_token)
        if not needs_reference(self.objective):
            if self._ref_model is not None:
                raise ValueError(f"ref_model: {' and '.join(args.loss_type)} has no reference; leave it out")
            return policy
        has_adapter = peft_config is not None or model_setup.is_peft_model(policy)
        if self._ref_model is None and not has_adapter and not args.precompute_ref_log_probs:
            self._ref_model = model_setup.frozen_copy(policy)
        if args.sync_ref_model and has_adapter:
            raise ValueError("sync_ref_model: not with an adapter, whose reference is the model without it")
        return policy

    def _make_reference(self, new_adapter: bool) -> Reference:
        model = self._ref_model
        if model is not None:
            if self.args.disable_dropout:
                model_setup.disable_dropout(model)
            self.patches.append(self.patch(model))
            model = self.accelerator.prepare_model(model, evaluation_mode=True)
        if self.args.sync_ref_model:
            self.sync = ReferenceSync(model, self.args.ref_model_mixup_alpha, self.args.ref_model_sync_steps)
            self.add_callback(self.sync)
        return Reference(self.model, model, new_adapter)

    # Data ------------------------------------------------------------------------------------------------------------

    def row_function(self, args: DPOConfig) -> PairRow | AnswerRow:
        """Each answer with its prompt, cut to `max_length`."""
        encoder, cut = Encoder(self.tokenizer), (args.max_length, args.truncation_mode)
        return AnswerRow(encoder, *cut) if self.kinds == 1 else PairRow(encoder, self.kinds == 3, *cut)

    def tokenized(self, rows: Any, name: str, **settings: Any) -> TokenRows:
        """KTO's rows have one answer and a label; if it estimates a KL also a mismatched answer."""
        if self.kinds > 1:
            return super().tokenized(rows, name, **settings)
        args = self.args
        table = super().tokenized(unpaired_rows(rows, name), name, columns={"label": Value("bool")}, **settings)
        if not self.needs_kl:
            return table
        group = args.per_device_train_batch_size * args.gradient_accumulation_steps * args.world_size
        limits = [n for n in (args.max_length, self._tokenizing["context_length"]) if n is not None]
        return with_mismatched(table, group, min(limits, default=None), args.truncation_mode)

    def get_eval_dataloader(self, eval_dataset: Any = None) -> Any:
        """See `OfflineTrainer`; the reference is run over rows that it has not seen, if it is to be run once."""
        new = eval_dataset is not None and not isinstance(eval_dataset, str | TokenRows)
        if new and self.args.precompute_ref_log_probs:
            eval_dataset = self._with_reference(self.tokenized(eval_dataset, "eval_dataset"))
        return super().get_eval_dataloader(eval_dataset)

    def _with_reference(self, rows: TokenRows, batch_size: int | None = None) -> TokenRows:
        assert self.reference is not None  # DPOConfig has seen to that
        if self.reference.is_policy and self.state.global_step:
            raise ValueError(
                "eval_dataset: precompute_ref_log_probs keeps no reference, and the model has been trained since; give "
                "the trainer this dataset when it is made, or a ref_model"
            )
        size = self.args.precompute_ref_batch_size or batch_size or self.args.per_device_eval_batch_size
        tail_weight = None if isinstance(self.objective, KTOObjective) else self.objective.tail_weight
        with self.reference.active() as reference:

            def values(batch: PreferenceBatch) -> Tensor:
                return summed_logps(self._logps(reference, batch), batch, self.kinds, tail_weight)

            return self.precomputed(rows, "ref_logps", values, size)

    def _logps(self, model: nn.Module, batch: PreferenceBatch) -> Tensor:
        """(B, T), without gradient."""
        with self.accelerator.autocast():
            return completion_logps(model, batch, self.packer, temperature=1.0, backend=self.args.loss_backend)

    # Loss ------------------------------------------------------------------------------------------------------------

    @property
    def kinds(self) -> int:
        """Sequences of a row that the loss is of: a pair, a pair and a gold answer, or for KTO an answer."""
        if isinstance(self.objective, KTOObjective):
            return 1
        return 3 if self.objective.nll_on_gold else 2

    @property
    def needs_kl(self) -> bool:
        """Whether rows have a mismatched answer."""
        return isinstance(self.objective, KTOObjective) and self.objective.needs_kl

    def counts(self, batch: PreferenceBatch) -> dict[str, float]:
        """Rows, and the tokens of those answers whose likelihood an NLL term raises."""
        if self.kinds == 1:
            batch = batch.only(mismatched=False)
        counts = {"rows": len(batch) / self.kinds, "tokens": float(batch.mask.sum())}
        if self.kinds > 1:
            counts["nll_tokens"] = float(batch.mask[0 if self.kinds == 2 else 2 :: self.kinds].sum())
        return counts

    def step_values(self, batches: list[PreferenceBatch]) -> dict[str, float]:
        """KTO's estimate of the KL between policy and reference, over the mismatched answers of a step."""
        if not self.needs_kl or self.reference is None:
            return {}
        total, rows = torch.zeros((), device=self.args.device), 0
        for batch in (batch.only(mismatched=True) for batch in batches):
            ref_logps = batch.ref_logps
            if ref_logps is None:
                with self.reference.active() as reference:
                    ref_logps = self._logps(reference, batch)
            total += kto_kl(self._logps(self.model, batch), ref_logps, mask=batch.mask) * len(batch)
            rows += len(batch)
        total, count = self._total(torch.stack([total, total.new_tensor(rows)]))
        return {"kl": float(total / count)}

    def passes(self, batch: PreferenceBatch) -> list[Pass[PreferenceBatch]]:  # type: ignore[override]
        """The answers of a row in one pass, and where pairs are ranked all of them."""
        if isinstance(self.objective, KTOObjective):
            return self.packer.passes(batch.only(mismatched=False))
        if self.objective.sorts_batch:
            return self.packer.passes(batch, together=True)
        return whole_row_passes(self.packer, batch)

    def pass_loss(self, model: nn.Module, part: Pass[PreferenceBatch], normalizers: Mapping[str, float]) -> PassOutput:
        """The loss of a pass, and the metrics of its rows."""
        part = by_kind(part, self.kinds)
        batch, ref_logps = part.batch, self._pass_ref_logps(part)
        metrics: dict[str, tuple[Any, Any]] = {}

        def loss(hidden: Tensor, head: LMHead) -> PreferenceOutput:
            states = part.select(hidden)
            metrics.update(token_metrics(states, batch, head, self.kinds, evaluating=not model.training))
            return self._loss(states, head, batch, ref_logps, normalizers)

        out: PreferenceOutput = self.run(model, part, loss)
        if isinstance(self.objective, KTOObjective):
            metrics |= answer_metrics(out.metrics, batch)
        else:
            divisor = None if self.objective.sorts_batch else normalizers["nll_tokens"]
            metrics |= pair_metrics(out.metrics, batch, self.kinds, divisor)
        return PassOutput(out.loss, metrics)

    def _pass_ref_logps(self, part: Pass[PreferenceBatch]) -> Tensor | None:
        if self.reference is None or part.batch.ref_logps is not None:
            return part.batch.ref_logps
        with self.reference.active() as reference:
            return pass_logps(reference, part, temperature=1.0, backend=self.args.loss_backend)

    def _loss(
        self,
        states: Tensor,
        head: LMHead,
        batch: PreferenceBatch,
        ref_logps: Tensor | None,
        normalizers: Mapping[str, float],
    ) -> PreferenceOutput:
        objective = self.objective
        arguments: dict[str, Any] = {
            "mask": batch.mask,
            "ref_logps": ref_logps,
            "normalizer": normalizers["rows"],
            "entropy": True,
            "bias": head.bias,
            "logit_scale": head.logit_scale,
            "softcap": head.softcap,
            "backend": self.args.loss_backend,
        }
        if isinstance(objective, KTOObjective):
            assert batch.label is not None  # `tokenized` has seen to that
            arguments |= {"labels": batch.label, "kl": normalizers.get("kl")}
            return linear_kto_loss(states, head.weight, batch.completion_ids, objective, **arguments)
        if objective.sorts_batch:
            arguments["normalizer"] = None
        elif objective.nll_weight:
            arguments["nll_normalizer"] = normalizers["nll_tokens"]
        out = linear_preference_loss(states, head.weight, batch.completion_ids, objective, **arguments)
        if objective.sorts_batch:  # the mean over the micro-batch
            out = out._replace(loss=out.loss * (len(batch) / self.kinds / normalizers["rows"]))
        return out

    # Metrics ---------------------------------------------------------------------------------------------------------

    def _finish_step(self) -> None:
        super()._finish_step()
        latest = self.metrics.latest("train")
        if self.kinds == 1:
            latest["rewards/margins"] = latest["rewards/chosen"] - latest["rewards/rejected"]
            self.metrics.add("train", {"rewards/margins": latest["rewards/margins"]})
        watched = self.watch.update(latest)
        self.metrics.add("train", {name: value for name, value in watched.items() if math.isfinite(value)})

    def evaluation_loop(self, *args: Any, metric_key_prefix: str = "eval", **kwargs: Any) -> Any:
        """See `OfflineTrainer`."""
        output = super().evaluation_loop(*args, metric_key_prefix=metric_key_prefix, **kwargs)
        if self.kinds == 1:
            chosen, rejected = (
                output.metrics[f"{metric_key_prefix}_rewards/{side}"] for side in ("chosen", "rejected")
            )
            output.metrics[f"{metric_key_prefix}_rewards/margins"] = chosen - rejected
        return output

    # Checkpoints -----------------------------------------------------------------------------------------------------

    def resume_state(self) -> tuple[dict[str, Any], dict[str, Tensor]]:
        """Adds the watch, and a reference that follows the policy."""
        state, tensors = super().resume_state()
        kept = {} if self.sync is None else self.sync.tensors()
        return {**state, "watch": self.watch.state_dict()}, {**tensors, **kept}

    def load_resume_state(self, state: dict[str, Any], tensors: dict[str, Tensor]) -> None:
        """See `resume_state`."""
        super().load_resume_state(state, tensors if self.sync is None else self.sync.load(tensors))
        self.watch.load_state_dict(state["watch"])


class KTOTrainer(DPOTrainer):
    """`DPOTrainer` with the defaults of TRL's `KTOTrainer`: answers that are each good or bad, not in pairs."""

    config_class: ClassVar[type[DPOConfig]] = KTOConfig
