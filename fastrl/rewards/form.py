"""Rewards for the form of a completion: its tags and its length. Names and values as in TRL."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from typing import Any

from fastrl.rewards.completions import Completion, completion_text

_THINK_FORMAT = re.compile(r"<think>(?!.*<think>).*?</think>.*", re.DOTALL)


def think_format_reward(completions: Sequence[Completion], **kwargs: Any) -> list[float]:
    """1 where a completion opens with one `<think>...</think>` block, otherwise 0.

    Args:
        completions: B completions.
    """
    return [1.0 if _THINK_FORMAT.fullmatch(completion_text(completion)) else 0.0 for completion in completions]


def get_soft_overlong_punishment(max_completion_len: int, soft_punish_cache: int) -> Callable[..., list[float]]:
    """A reward that punishes long completions: DAPO (https://arxiv.org/abs/2503.14476), equation 13.

    With n tokens, L = `max_completion_len` and C = `soft_punish_cache`: 0 up to n = L - C, then falling linearly,
    (L - C - n) / C, to -1 at n = L, and -1 beyond.

    Raises:
        ValueError: not 0 < soft_punish_cache <= max_completion_len.
    """
    if not 0 < soft_punish_cache <= max_completion_len:
        raise ValueError(
            "soft_punish_cache must be between 1 and max_completion_len, "
            f"got {soft_punish_cache} with max_completion_len {max_completion_len}"
        )

    def soft_overlong_punishment_reward(completion_ids: Sequence[Sequence[int]], **kwargs: Any) -> list[float]:
        """completion_ids: B lists of token ids."""
        free = max_completion_len - soft_punish_cache
        return [-min(max(len(ids) - free, 0) / soft_punish_cache, 1.0) for ids in completion_ids]

    return soft_overlong_punishment_reward
