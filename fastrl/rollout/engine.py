"""What a trainer asks of the thing that samples completions, and nothing more: token ids in, token ids out."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple, Protocol, runtime_checkable

from torch import nn


@dataclass(frozen=True)
class SamplingParams:
    """How to sample. Names follow TRL and transformers; the defaults sample from the model's own distribution."""

    max_tokens: int  # per completion, the end-of-sequence token included
    temperature: float = 1.0  # 0: greedy
    top_p: float = 1.0
    top_k: int = 0  # 0: all tokens
    min_p: float | None = None
    repetition_penalty: float = 1.0
    stop: tuple[str, ...] = ()  # a completion ends with the token that completes one of these in its text
    seed: int | None = None  # the same call with it gives the same completions; None: the engine's own random state
    logps: bool = False  # return the log-probabilities of the sampled tokens
    engine_kwargs: dict[str, Any] = field(default_factory=dict)  # the engine's own; they win over the fields above

    @property
    def from_policy(self) -> bool:
        """Whether tokens are drawn from `softmax(logits / temperature)` itself, nothing cut off or penalised.

        Only then are the engine's logps those of the policy, up to the engine's rounding, so that they can serve as
        `old_logps`. Otherwise they are those of the distribution that was sampled from, and larger.
        """
        whole = self.top_p == 1 and self.top_k == 0 and not self.min_p and self.repetition_penalty == 1
        return whole and self.temperature > 0 and self.engine_kwargs.keys() <= {"cache_implementation"}


class Completions(NamedTuple):
    """Sampled completions, those of one prompt side by side: prompt 0's first, then prompt 1's."""

    ids: list[list[int]]  # each cut after its first end-of-sequence token, which it includes; may be empty
    # Of the sampled tokens under the distribution that they were drawn from: after temperature, penalties and
    # truncation, renormalised (vLLM's "processed_logprobs"; greedy: at temperature 1). None: not asked for.
    logps: list[list[float]] | None = None
    finish_reasons: list[str] | None = None  # "stop": an end-of-sequence token or a stop string; "length": cut off


@runtime_checkable
class RolloutEngine(Protocol):
    """Samples completions with the current policy."""

    def generate(
        self, prompt_ids: Sequence[Sequence[int]], num_generations: int, sampling: SamplingParams
    ) -> Completions:
        """`num_generations` completions for each prompt: `len(prompt_ids) * num_generations` in all."""
        ...

    def sync_weights(self, model: nn.Module) -> None:
        """Called after the policy has changed and before the next `generate`: from then on it samples from `model`."""
        ...


def model_sizes(config: Any) -> dict[str, Any]:
    """What two models must have in common for one to take the other's weights, as far as a configuration tells."""
    text = config.get_text_config()
    names = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
    return {name: getattr(text, name) for name in names if isinstance(getattr(text, name, None), int)}


def check_prompts(prompt_ids: Sequence[Sequence[int]]) -> None:
    """Refuses a prompt without tokens.

    Raises:
        ValueError: names the first one.
    """
    empty = next((i for i, ids in enumerate(prompt_ids) if not len(ids)), None)
    if empty is not None:
        raise ValueError(f"prompt_ids[{empty}]: expected at least one token, got none")
