"""Sampling with `model.generate`: left-padded, KV-cached, in eval mode and without activation checkpointing, with all
of the model's state put back afterwards."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from transformers import (
    ContinuousBatchingConfig,
    GenerationConfig,
    LogitsProcessor,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    StoppingCriteria,
    StoppingCriteriaList,
)

from fastrl.integrations.transformers_models import innermost_causal_lm
from fastrl.rollout.engine import Completions, SamplingParams, check_prompts
from fastrl.rollout.policy_weights import CRITIC


class TransformersEngine:
    """A `RolloutEngine` on a transformers model in this process.

    Args:
        model: the model, or a function that returns it (a trainer's model is wrapped only once training starts).
        eos_token_ids: every token that ends a completion.
        pad_token_id: fills the left of shorter prompts; any id will do, it is masked.
        bos_token_id: passed to generate, if the model has one.
        tokenizer: reads the completions' text; needed for `SamplingParams.stop` alone.
        continuous_batching: entries of `transformers.ContinuousBatchingConfig`: completions leave the batch when they
            end, through `model.generate_batch`. None: `model.generate`, whose batch stays whole until the longest
            completion ends; see README.md in this folder for when which is faster.

    Never touches the global generation settings: `model.generation_config` is replaced for the call, because generate
    fills what a passed config leaves unset from it (a model shipped with top_k=20 would be sampled with it).
    """

    def __init__(
        self,
        model: nn.Module | Callable[[], nn.Module],
        *,
        eos_token_ids: Sequence[int],
        pad_token_id: int,
        bos_token_id: int | None = None,
        tokenizer: PreTrainedTokenizerBase | None = None,
        continuous_batching: dict[str, Any] | None = None,
    ) -> None:
        self._model = model
        self.eos_token_ids = list(eos_token_ids)
        self.pad_token_id = pad_token_id
        self.bos_token_id = bos_token_id
        self.tokenizer = tokenizer
        self.continuous_batching = continuous_batching

    @property
    def model(self) -> nn.Module:
        """The unwrapped model."""
        return self._model if isinstance(self._model, nn.Module) else self._model()

    def shares_weights_with(self, model: nn.Module) -> bool:
        """Whether generation runs on the very parameters of `model`."""
        return innermost_causal_lm(self.model) is innermost_causal_lm(model)

    @torch.no_grad()
    def sync_weights(self, model: nn.Module) -> None:
        """Nothing to do for the very model that is trained; a copy of it gets its weights.

        Raises:
            ValueError: the engine's model is not a copy of `model`: its parameters have other names.
        """
        if self.shares_weights_with(model):
            return
        own, new = (
            {name: p for name, p in innermost_causal_lm(m).named_parameters() if not name.startswith(CRITIC)}
            for m in (self.model, model)
        )
        if own.keys() != new.keys():
            raise ValueError(
                f"model: expected the parameters of the engine's copy; {sorted(own.keys() ^ new.keys())[:3]}"
            )
        for name, parameter in own.items():
            parameter.copy_(new[name])

    def generate(
        self, prompt_ids: Sequence[Sequence[int]], num_generations: int, sampling: SamplingParams
    ) -> Completions:
        """See `RolloutEngine.generate`. `engine_kwargs` are entries of `transformers.GenerationConfig`. A seed leaves
        torch's random state as it was; without one it moves on.

        Raises:
            ValueError: a prompt without tokens, a config entry that GenerationConfig does not know, or stop strings
                without a tokenizer or with continuous batching.
            RuntimeError: continuous batching failed on a prompt.
        """
        if sampling.stop and self.tokenizer is None:
            raise ValueError("stop: finding stop strings takes the tokenizer, TransformersEngine(..., tokenizer=...)")
        if not prompt_ids:
            return Completions([], [] if sampling.logps else None, [])
        check_prompts(prompt_ids)
        rows = [list(ids) for ids in prompt_ids for _ in range(num_generations)]
        model = self.model
        config = self._generation_config(sampling)
        with torch.no_grad(), _generation_mode(model, config), _seeded(sampling.seed, model):
            if self.continuous_batching is not None:
                return self._generate_batch(model, rows, config, sampling)
            return self._generate(model, rows, config, sampling)

    def _generate(
        self, model: nn.Module, rows: list[list[int]], config: GenerationConfig, sampling: SamplingParams
    ) -> Completions:
        width = max(map(len, rows))
        device = next(model.parameters()).device
        input_ids = torch.tensor([[self.pad_token_id] * (width - len(ids)) + ids for ids in rows], device=device)
        attention_mask = torch.tensor([[0] * (width - len(ids)) + [1] * len(ids) for ids in rows], device=device)
        stops = _StopStrings(width, sampling.stop, self.tokenizer)
        with _recorded_logps(model) if sampling.logps else nullcontext() as recorder:
            output = model.generate(  # type: ignore[operator]
                input_ids=input_ids,
                attention_mask=attention_mask,
                generation_config=config,
                stopping_criteria=StoppingCriteriaList([stops] if sampling.stop else []),
            )
        ids = output[:, width:]
        logps = None if recorder is None else recorder.logps(ids).tolist()
        return self._cut(ids.tolist(), logps, stops.lengths)

    def _generate_batch(
        self, model: nn.Module, rows: list[list[int]], config: GenerationConfig, sampling: SamplingParams
    ) -> Completions:
        if sampling.stop:
            raise ValueError("stop: stop strings do not work with continuous batching, which looks at ids alone")
        settings = {**(self.continuous_batching or {}), "return_logprobs": sampling.logps}
        # Left alone it draws a seed that torch's random state does not determine.
        settings.setdefault("seed", int(torch.randint(2**31, ())))
        if next(model.parameters()).device.type == "cpu":
            # Or the cache takes nine tenths of the machine's memory. A block holds page_size tokens of one completion.
            page, new = settings.get("page_size", ContinuousBatchingConfig.page_size), sampling.max_tokens
            settings.setdefault("num_blocks", 1 + sum(math.ceil((len(ids) + new) / page) for ids in rows))
            settings.setdefault("max_batch_tokens", min(8192, sum(map(len, rows))))
        outputs = innermost_causal_lm(model).generate_batch(  # type: ignore[operator]
            rows,
            generation_config=config,
            continuous_batching_config=ContinuousBatchingConfig(**settings),
            warmup=False,
        )
        failed = [output.error for output in outputs.values() if output.error is not None]
        if failed or len(outputs) != len(rows):
            raise RuntimeError(f"continuous batching gave {len(outputs)} of {len(rows)} completions; {failed[:1]}")
        logps = [list(output.logprobs) for output in outputs.values()] if sampling.logps else None
        return self._cut([list(output.generated_tokens) for output in outputs.values()], logps, {})

    def _cut(self, rows: list[list[int]], logps: list[list[float]] | None, stops: dict[int, int]) -> Completions:
        """Completions without what was sampled after their end; `stops` says where a stop string ended a row."""
        ends = [self._end(ids, stops.get(row)) for row, ids in enumerate(rows)]
        return Completions(
            [ids[:end] for ids, end in zip(rows, ends, strict=True)],
            None if logps is None else [row[:end] for row, end in zip(logps, ends, strict=True)],
            ["length" if end is None else "stop" for end in ends],
        )

    def _end(self, ids: list[int], stop: int | None) -> int | None:
        eos = next((i + 1 for i, token in enumerate(ids) if token in self.eos_token_ids), None)
        ends = [end for end in (eos, stop) if end is not None]
        return min(ends, default=None)

    def _generation_config(self, sampling: SamplingParams) -> GenerationConfig:
        settings: dict[str, Any] = {
            "max_new_tokens": sampling.max_tokens,
            "do_sample": sampling.temperature > 0,
            "use_cache": True,
            "repetition_penalty": sampling.repetition_penalty,
            "pad_token_id": self.pad_token_id,
            "bos_token_id": self.bos_token_id,
            "eos_token_id": self.eos_token_ids or None,
        }
        if sampling.temperature > 0:
            settings |= {name: getattr(sampling, name) for name in ("top_p", "top_k", "min_p")}
            settings["temperature"] = float(sampling.temperature)  # transformers refuses a whole number
        settings |= sampling.engine_kwargs
        known = GenerationConfig().to_dict().keys() | {"cache_implementation"}
        unknown = sorted(settings.keys() - known)
        if unknown:
            raise ValueError(f"generation_kwargs: transformers.GenerationConfig has no entry {', '.join(unknown)}")
        return GenerationConfig(**settings, disable_compile=True)


class _StopStrings(StoppingCriteria):
    """Ends the rows whose new text holds a stop string, and keeps at how many tokens each of them ended."""

    def __init__(self, width: int, stop: Sequence[str], tokenizer: PreTrainedTokenizerBase | None) -> None:
        self.width, self.stop, self.tokenizer = width, stop, tokenizer
        # A token is at least one byte; one more, because the first token of a piece may lose its leading blank.
        self.tail = 1 + max((len(text.encode()) for text in stop), default=0)
        self.lengths: dict[int, int] = {}

    def __call__(self, input_ids: Tensor, scores: Any, **kwargs: Any) -> Tensor:
        tails = input_ids[:, max(self.width, input_ids.shape[1] - self.tail) :]
        texts = self.tokenizer.batch_decode(tails, clean_up_tokenization_spaces=False)  # type: ignore[union-attr]
        for row, text in enumerate(texts):
            if any(stop in text for stop in self.stop):
                self.lengths.setdefault(row, input_ids.shape[1] - self.width)
        return torch.tensor([row in self.lengths for row in range(len(texts))], device=input_ids.device)


class _SampledLogps(LogitsProcessor):
    """Log-probabilities of the sampled tokens: a step's scores are kept until the next step shows what was taken."""

    def __init__(self) -> None:
        self.columns: list[Tensor] = []
        self.scores: Tensor | None = None

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        self._take(input_ids[:, -1])
        self.scores = scores
        return scores

    def _take(self, ids: Tensor) -> None:
        if self.scores is not None:
            taken = self.scores.gather(-1, ids[:, None]).squeeze(-1)
            self.columns.append(taken - self.scores.logsumexp(-1))

    def logps(self, ids: Tensor) -> Tensor:
        """(B, T) for the new tokens that generate returned."""
        if len(self.columns) < ids.shape[1]:
            self._take(ids[:, -1])
        return torch.stack(self.columns[: ids.shape[1]], dim=-1)


@contextmanager
def _recorded_logps(model: nn.Module) -> Iterator[_SampledLogps]:
    # A processor passed to generate would run before temperature, top-k and the like.
    recorder = _SampledLogps()
    causal_lm = innermost_causal_lm(model)
    make = causal_lm._get_logits_processor

    def with_recorder(*args: Any, **kwargs: Any) -> Any:
        processors = make(*args, **kwargs)  # type: ignore[operator]
        processors.append(recorder)
        return processors

    causal_lm.__dict__["_get_logits_processor"] = with_recorder
    try:
        yield recorder
    finally:
        del causal_lm.__dict__["_get_logits_processor"]


@contextmanager
def _seeded(seed: int | None, model: nn.Module) -> Iterator[None]:
    device = next(model.parameters()).device
    with torch.random.fork_rng([device] if device.type == "cuda" else [], enabled=seed is not None):
        if seed is not None:
            torch.manual_seed(seed)
        yield


@contextmanager
def _generation_mode(model: nn.Module, config: GenerationConfig) -> Iterator[None]:
    training = {module: module.training for module in model.modules()}
    # Checkpointing switches the KV cache off, and in eval mode only costs time.
    checkpointed = [module for module in model.modules() if getattr(module, "gradient_checkpointing", False)]
    owners = [module for module in model.modules() if isinstance(module, PreTrainedModel) and module.can_generate()]
    configs = [module.generation_config for module in owners]
    model.eval()
    for module in checkpointed:
        module.gradient_checkpointing = False  # type: ignore[assignment]
    for owner in owners:
        owner.generation_config = config
    try:
        yield
    finally:
        for owner, original in zip(owners, configs, strict=True):
            owner.generation_config = original
        for module in checkpointed:
            module.gradient_checkpointing = True  # type: ignore[assignment]
        for module, mode in training.items():
            module.training = mode
