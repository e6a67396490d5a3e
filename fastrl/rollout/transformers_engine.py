"""Sampling with `model.generate`: left-padded, KV-cached, in eval mode and without activation checkpointing, with all
of the model's state put back afterwards."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from transformers import GenerationConfig, PreTrainedModel

from fastrl.rollout.engine import Completions, SamplingParams


class TransformersEngine:
    """A `RolloutEngine` on a transformers model in this process.

    Args:
        model: the model, or a function that returns it (a trainer's model is wrapped only once training starts).
        eos_token_ids: every token that ends a completion.
        pad_token_id: fills the left of shorter prompts; any id will do, it is masked.
        bos_token_id: passed to generate, if the model has one.

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
    ) -> None:
        self._model = model
        self.eos_token_ids = list(eos_token_ids)
        self.pad_token_id = pad_token_id
        self.bos_token_id = bos_token_id

    @property
    def model(self) -> nn.Module:
        """The unwrapped model."""
        return self._model if isinstance(self._model, nn.Module) else self._model()

    def sync_weights(self, model: nn.Module) -> None:
        """Nothing to do: generation runs on the very parameters that are trained."""

    def generate(
        self, prompt_ids: Sequence[Sequence[int]], num_generations: int, sampling: SamplingParams
    ) -> Completions:
        """See `RolloutEngine.generate`. `engine_kwargs` are entries of `transformers.GenerationConfig`.

        Raises:
            ValueError: a prompt without tokens, or a config entry that GenerationConfig does not know.
        """
        if not prompt_ids:
            return Completions([])
        rows = [list(ids) for ids in prompt_ids for _ in range(num_generations)]
        empty = next((i for i, ids in enumerate(prompt_ids) if not len(ids)), None)
        if empty is not None:
            raise ValueError(f"prompt_ids[{empty}]: expected at least one token, got none")
        width = max(map(len, rows))
        model = self.model
        device = next(model.parameters()).device
        input_ids = torch.tensor([[self.pad_token_id] * (width - len(ids)) + ids for ids in rows], device=device)
        attention_mask = torch.tensor([[0] * (width - len(ids)) + [1] * len(ids) for ids in rows], device=device)
        config = self._generation_config(sampling)
        with torch.no_grad(), _generation_mode(model, config):
            output = model.generate(  # type: ignore[operator]
                input_ids=input_ids, attention_mask=attention_mask, generation_config=config
            )
        return Completions([self._until_eos(ids) for ids in output[:, width:].tolist()])

    def _generation_config(self, sampling: SamplingParams) -> GenerationConfig:
        settings: dict[str, Any] = {
            "max_new_tokens": sampling.max_tokens,
            "do_sample": True,
            "use_cache": True,
            "temperature": sampling.temperature,
            "top_p": sampling.top_p,
            "top_k": sampling.top_k,
            "min_p": sampling.min_p,
            "repetition_penalty": sampling.repetition_penalty,
            "pad_token_id": self.pad_token_id,
            "bos_token_id": self.bos_token_id,
            "eos_token_id": self.eos_token_ids or None,
            **sampling.engine_kwargs,
        }
        known = GenerationConfig().to_dict().keys() | {"cache_implementation"}
        unknown = sorted(settings.keys() - known)
        if unknown:
            raise ValueError(f"generation_kwargs: transformers.GenerationConfig has no entry {', '.join(unknown)}")
        return GenerationConfig(**settings, disable_compile=True)

    def _until_eos(self, ids: list[int]) -> list[int]:
        end = next((i for i, token in enumerate(ids) if token in self.eos_token_ids), len(ids) - 1)
        return ids[: end + 1]


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
