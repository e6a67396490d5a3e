"""What a trainer asks of the thing that samples completions, and nothing more: token ids in, token ids out."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple, Protocol, runtime_checkable

from torch import nn


@dataclass(frozen=True)
class SamplingParams:
    """How to sample. Names follow TRL and transformers; the defaults sample from the model's own distribution."""

    max_tokens: int  # per completion, the end-of-sequence token included
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0  # 0: all tokens
    min_p: float | None = None
    repetition_penalty: float = 1.0
    engine_kwargs: dict[str, Any] = field(default_factory=dict)  # the engine's own; they win over the fields above


class Completions(NamedTuple):
    """Sampled completions, those of one prompt side by side: prompt 0's first, then prompt 1's."""

    ids: list[list[int]]  # each cut after its first end-of-sequence token, which it includes; may be empty
    logps: list[list[float]] | None = None  # of the sampled tokens under the sampling distribution, if known


@runtime_checkable
class RolloutEngine(Protocol):
    """Samples completions with the current policy."""

    def generate(
        self, prompt_ids: Sequence[Sequence[int]], num_generations: int, sampling: SamplingParams
    ) -> Completions:
        """`num_generations` completions for each prompt: `len(prompt_ids) * num_generations` in all."""
        ...

    def sync_weights(self, model: nn.Module) -> None:
        """Called after the policy has changed and before the next `generate`; nothing to do in-process."""
        ...
