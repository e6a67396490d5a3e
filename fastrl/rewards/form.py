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
    (L - C - n) / C, to -1 at n = L, and -1 beyond. C = 0 is a step from 0 to -1 beyond n = L.

    Raises:
        ValueError: not 0 <= soft_punish_cache <= max_completion_len.
    """
    if not 0 <= soft_punish_cache <= max_completion_len:
        raise ValueError(
            "soft_punish_cache must be between 0 and max_completion_len, "
            f"got {soft_punish_cache} with max_completion_len {max_completion_len}"
        )

    def soft_overlong_punishment_reward(completion_ids: Sequence[Sequence[int]], **kwargs: Any) -> list[float]:
        """completion_ids: B lists of token ids."""
        free = max_completion_len - soft_punish_cache
        over = [max(len(ids) - free, 0) for ids in completion_ids]
        return [-min(tokens / max(soft_punish_cache, 1), 1.0) for tokens in over]

    return soft_overlong_punishment_reward


def get_length_penalty_reward(max_len: int, max_penalty: float = -1.0) -> Callable[..., list[float]]:
    """A penalty in proportion to length: 0 for no tokens, `max_penalty` for `max_len` tokens and more.

    Raises:
        ValueError: max_len is not positive, or max_penalty is.
    """
    if max_len < 1:
        raise ValueError(f"max_len: expected a positive number of tokens, got {max_len}")
    _check_penalty(max_penalty)

    def length_penalty_reward(completion_ids: Sequence[Sequence[int]], **kwargs: Any) -> list[float]:
        """completion_ids: B lists of token ids."""
        return [max_penalty * min(len(ids) / max_len, 1.0) for ids in completion_ids]

    return length_penalty_reward


def get_repetition_penalty_reward(ngram_size: int = 3, max_penalty: float = -1.0) -> Callable[..., list[float]]:
    """`max_penalty` times the share of a completion's n-grams of tokens that occurred before in it, 0 for fewer than
    `ngram_size` tokens: https://arxiv.org/abs/2502.03373, appendix C.2.

    Raises:
        ValueError: ngram_size is not positive, or max_penalty is.
    """
    if ngram_size < 1:
        raise ValueError(f"ngram_size: expected at least 1, got {ngram_size}")
    _check_penalty(max_penalty)

    def repetition_penalty_reward(completion_ids: Sequence[Sequence[int]], **kwargs: Any) -> list[float]:
        """completion_ids: B lists of token ids."""
        rewards = []
        for ids in completion_ids:
            grams = [tuple(ids[i : i + ngram_size]) for i in range(len(ids) - ngram_size + 1)]
            rewards.append(max_penalty * (1 - len(set(grams)) / len(grams)) if grams else 0.0)
        return rewards

    return repetition_penalty_reward


def _check_penalty(max_penalty: float) -> None:
    if max_penalty > 0:
        raise ValueError(f"max_penalty {max_penalty} should not be positive")
