"""Distillation: what it adds to `OnlineTrainer` are a teacher, completions that need not be sampled, and its loss."""

import random
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase, TrainerCallback

from fastrl.data.formats import Encoder, FormatError, as_chatml, columns_of, sequence_of
from fastrl.integrations import LMHead
from fastrl.objectives import DistillationOutput, linear_distillation_loss
from fastrl.rollout import Completions, RolloutEngine, TransformersEngine
from fastrl.trainers import model_setup
from fastrl.trainers.arguments import refuse_given, with_quantization
from fastrl.trainers.distillation_config import DistillationConfig
from fastrl.trainers.micro_batches import MicroBatch
from fastrl.trainers.online import OnlineTrainer
from fastrl.trainers.packing import Pass
from fastrl.trainers.prompts import Example, PromptDataset, context_length_of, split_conversations
from fastrl.trainers.rollout_collector import Samples
from fastrl.trainers.scoring import states_and_head
from fastrl.trainers.token_batch import TokenBatch
from fastrl_kernels import linear_logprobs


class DistillationTrainer(OnlineTrainer):
    """Trains a causal LM to have a teacher's next-token distributions (GKD, Agarwal et al. 2024).

    The signature, the arguments and the metric names are TRL 1.16's; a TRL user changes an import. One optimizer step:
    take completions of the prompts, and follow the gradient of the divergence of the student from the teacher, a mean
    over the completions' tokens, computed from the hidden states and LM heads of both (`fastrl.linear_distillation_
    loss`): no logits are built. The completions are

        lmbda = 1       sampled by the student: on-policy distillation, TRL's `DistillationTrainer`
        lmbda = 0       those of the dataset, or with `seq_kd` sampled by the teacher: off-policy distillation
        between         of a share `lmbda` of the rollouts the former, of the others the latter: TRL's `GKDTrainer`

    An evaluation is on the student's samples with `lmbda` 1 or `seq_kd`, and else on the dataset's completions.

    Args:
        model: the student: a path, a transformers causal LM, or one under PEFT.
        teacher_model: a path or a model, of any hidden size and family, with the student's vocabulary and tokenizer;
            None: `args.teacher_model_name_or_path`.
        args: a `DistillationConfig`; None: its defaults.
        train_dataset, eval_dataset: rows with a "prompt" (a string or a conversation), and for `lmbda` < 1 without
            `seq_kd` a "completion"; or with "messages", of which the last is the completion. A dict of datasets
            evaluates on each.
        processing_class: the tokenizer; None: the one beside the model. Without a pad token it gets its eos token.
        callbacks, optimizers: as in `transformers.Trainer`.
        peft_config: wraps the student in an adapter.
        rollout_engine: samples the student's completions; None: vLLM with `use_vllm`, else the model itself.
        quantization_config: of a student given by path.
        tools: refused.

    Departures from TRL:
      - The loss is a mean over the tokens of the optimizer step, whatever its split into micro-batches; so it is in
        TRL, but for what GKD generates. `temperature` is that of sampling and of both distributions, in GKD only of
        the former.
      - Whose completions a rollout has depends on the seed and on its number only, and is the same for all processes;
        in GKD each process draws for each micro-batch. Metric `on_policy`, for 0 < lmbda < 1: the share of rollouts
        that the student sampled.
      - Completions of the dataset are tokenized as `SFTTrainer` does it, and cut at `max_completion_length`.
      - The teacher runs with dropout off. Vocabularies of different sizes are refused, as in TRL, also where one of
        them is only padded: give the smaller one `resize_token_embeddings`.
      - Streamed datasets, images and tools are not supported.

    The student's entropy, a metric of TRL's, takes another forward of its head: 2NDV FLOPs beside the loss's 8NDV.

    Raises:
        TypeError, ValueError: an argument that cannot work, named; see `DistillationConfig`, `PromptDataset`.
    """

    args: DistillationConfig
    rollouts_type = TokenBatch
    needs_reference = True  # the teacher

    def __init__(
        self,
        model: str | nn.Module,
        teacher_model: str | PreTrainedModel | None = None,
        args: DistillationConfig | None = None,
        train_dataset: Any = None,
        eval_dataset: Any = None,
        processing_class: PreTrainedTokenizerBase | None = None,
        callbacks: list[TrainerCallback] | None = None,
        optimizers: tuple[torch.optim.Optimizer | None, torch.optim.lr_scheduler.LRScheduler | None] = (None, None),
        quantization_config: Any = None,
        peft_config: Any = None,
        tools: Any = None,
        *,
        rollout_engine: RolloutEngine | None = None,
    ) -> None:
        args = DistillationConfig() if args is None else args
        if not isinstance(args, DistillationConfig):
            raise TypeError(f"args: expected a fastrl.DistillationConfig, got {type(args).__name__}")
        args = with_quantization(args, model, quantization_config)
        refuse_given({"tools": (tools, "completions are sampled in one go, without calls in between")})
        if teacher_model is model and not isinstance(model, str):
            raise ValueError("teacher_model: expected a model of its own, got the student itself")
        train_dataset, eval_dataset = split_conversations(train_dataset), split_conversations(eval_dataset)
        self.args = args
        super().__init__(
            model,
            None,
            args,
            train_dataset=train_dataset,
            eval_dataset=eval_dataset,
            processing_class=processing_class,
            callbacks=callbacks,
            optimizers=optimizers,
            peft_config=peft_config,
            rollout_engine=rollout_engine,
            ref_model=self._load_teacher(teacher_model),
        )
        if self.is_fsdp_enabled:
            raise ValueError("fsdp: not supported with distillation, which reads the teacher's head; DDP is")
        teacher = self.teacher
        sizes = [m.config.get_text_config().vocab_size for m in (self.accelerator.unwrap_model(self.model), teacher)]
        if sizes[0] != sizes[1]:
            raise ValueError(
                f"teacher_model: expected the student's vocabulary of {sizes[0]} tokens, got {sizes[1]}; where both "
                "have the same tokenizer and one is padded, give the smaller one resize_token_embeddings"
            )
        self.packer = self.packer.for_both(teacher, "teacher_model")
        lengths = [self.collector.context_length, context_length_of(teacher.config)]
        self.collector.context_length = min((length for length in lengths if length is not None), default=None)
        self.encoder = Encoder(self.collector.tokenizer)
        self.teacher_engine = TransformersEngine(
            teacher,
            eos_token_ids=self.collector.eos_token_ids,
            pad_token_id=self.collector.pad_token_id,
            bos_token_id=self.collector.tokenizer.bos_token_id,
            tokenizer=self.collector.tokenizer,
        )

    def _load_teacher(self, teacher: str | PreTrainedModel | None) -> Any:
        args = self.args
        teacher = args.teacher_model_name_or_path if teacher is None else teacher
        if teacher is None:
            raise ValueError("teacher_model: expected a model, or its path in args.teacher_model_name_or_path")
        init_kwargs = dict(args.teacher_model_init_kwargs or {})
        if args.teacher_model_revision is not None:
            init_kwargs.setdefault("revision", args.teacher_model_revision)
        if init_kwargs and not isinstance(teacher, str):
            raise ValueError(
                "teacher_model_init_kwargs, teacher_model_revision: expected None with a teacher that is an object, "
                f"got {init_kwargs}"
            )
        return model_setup.load_model(teacher, init_kwargs, args.trust_remote_code)

    @property
    def teacher(self) -> Any:
        """The teacher, not wrapped."""
        return self.accelerator.unwrap_model(self.reference)

    def check_datasets(self, train_dataset: Any, eval_dataset: Any) -> None:  # type: ignore[override]
        """Raises what `PromptDataset` raises, and ValueError where completions are needed and there are none."""
        super().check_datasets(train_dataset, eval_dataset)
        evaluation = eval_dataset if isinstance(eval_dataset, dict) else {"eval_dataset": eval_dataset}
        for name, rows in {"train_dataset": train_dataset, **evaluation}.items():
            if (
                self.args.needs_completions
                and rows is not None
                and PromptDataset(rows, name)[0].row.get("completion") is None
            ):
                raise ValueError(
                    f"{name}: no column 'completion', which lmbda {self.args.lmbda} without seq_kd needs; lmbda 1 has "
                    "the student sample all completions"
                )

    # Completions -----------------------------------------------------------------------------------------------------

    def collect_samples(self, examples: Sequence[Example], name: str, mode: str) -> Samples:
        """Completions of the student, of the dataset or of the teacher."""
        if self._on_policy(mode):
            return super().collect_samples(examples, name, mode)
        if self.args.seq_kd:
            sampled = self.teacher_engine.generate(*self.collector.request(examples, name, mode))
            return self.collector.collect(examples, name, mode, self.state, sampled)
        rows = [self._tokenized(example, name) for example in examples]
        prompts, completions = [prompt for prompt, _ in rows], Completions([ids for _, ids in rows])
        return self.collector.collect(examples, name, mode, self.state, completions, prompts)

    def _on_policy(self, mode: str) -> bool:
        lmbda = self.args.lmbda
        if mode != "train":
            return lmbda == 1 or self.args.seq_kd
        rollout = self._micro_step // self._generate_every
        student = random.Random(f"{self.args.seed} {rollout}").random() < lmbda
        if 0 < lmbda < 1:
            self.metrics.add(mode, {"on_policy": float(student)})
        return student

    def _tokenized(self, example: Example, name: str) -> tuple[list[int], list[int]]:
        """Token ids of a row's prompt and completion."""
        try:
            row = as_chatml(example.row)
            template = {**(self.args.chat_template_kwargs or {}), **(row.get("chat_template_kwargs") or {})}
            prompt, completion = columns_of(row, "prompt", "completion")
            (text,) = self.encoder.completions(prompt, [completion], {**row, "chat_template_kwargs": template}).texts()
        except FormatError as error:
            raise ValueError(f"{name}: row {example.position}: {error}") from error
        prompt_ids, completion_ids, _ = sequence_of(text)
        room = self.args.max_completion_length
        if self.collector.context_length is not None:
            room = min(room, self.collector.context_length - len(prompt_ids))
        return prompt_ids, completion_ids[:room]

    def make_rollouts(self, samples: Samples, *, score_old: bool) -> TokenBatch:
        """The samples as they are."""
        self.log_samples(samples, torch.zeros(len(samples.examples), 0))
        return samples.batch

    # The loss --------------------------------------------------------------------------------------------------------

    def pass_loss(
        self, model: nn.Module, part: Pass[TokenBatch], batch: MicroBatch[TokenBatch]
    ) -> tuple[Tensor, dict[str, Tensor]]:
        args, mask = self.args, part.batch.mask
        with self.reference_model() as teacher:
            teacher_states, teacher_head = states_and_head(teacher, part)

        def loss(hidden: Tensor, head: LMHead) -> tuple[DistillationOutput, Tensor]:
            states = part.select(hidden)
            out = linear_distillation_loss(
                states,
                head.weight,
                teacher_states,
                teacher_head.weight,
                kind=args.kind,
                beta=args.beta if args.kind == "jsd" else None,
                mask=mask,
                normalizer=max(batch.step_tokens, 1.0),
                bias=head.bias,
                teacher_bias=teacher_head.bias,
                logit_scale=head.logit_scale,
                softcap=head.softcap,
                teacher_logit_scale=teacher_head.logit_scale,
                teacher_softcap=teacher_head.softcap,
                **self.scoring,
            )
            return out, self._entropy(states, head, part.batch)

        out, entropy = self.run(model, part, loss)
        return out.loss, {"entropy": entropy}

    @torch.no_grad()
    def _entropy(self, states: Tensor, head: LMHead, batch: TokenBatch) -> Tensor:
        """Of the student, a mean over the tokens that count, in nats."""
        stats = linear_logprobs(
            states.detach(),
            head.weight.detach(),
            batch.completion_ids,
            bias=head.bias,
            logit_scale=head.logit_scale,
            softcap=head.softcap,
            mask=batch.mask,
            entropy=True,
            **self.scoring,
        )
        assert stats.entropy is not None  # asked for
        return stats.entropy.sum() / batch.mask.sum().clamp(min=1)
