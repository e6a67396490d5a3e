"""Rewards before they become advantages: missing ones, penalties on the length, KL taken off token by token, samples
drawn anew by them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fastrl_kernels import validation
from fastrl_kernels.head import accumulation_dtype

from .groups import Groups
from .masking import inside
from .sequences import sequences_of

PF_PPO_METHODS = ("pow", "max_min", "max_random")


def rewards_tensor(
    rewards: Tensor | Sequence[Any], *, device: torch.device | str | None = None, dtype: torch.dtype | None = None
) -> Tensor:
    """Rewards as a tensor, NaN where a reward function returned None.

    Args:
        rewards: numbers and None, nested as deep as wanted (`[B]` or `[B][F]`); a tensor is returned as it is.
        device, dtype: of the tensor that is made; None: the CPU and torch's default dtype.

    Raises:
        TypeError: a reward that is neither a number nor None.
    """
    if isinstance(rewards, Tensor):
        return rewards

    def numbers(x: Any) -> Any:
        if isinstance(x, Sequence) and not isinstance(x, str):
            return [numbers(y) for y in x]
        if x is None:
            return torch.nan
        try:
            return float(x)
        except (TypeError, ValueError):
            raise TypeError(f"rewards: expected numbers or None, got {x!r}") from None

    return torch.tensor(numbers(rewards), device=device, dtype=dtype or torch.get_default_dtype())


@torch.no_grad()
def token_rewards(
    rewards: Tensor,  # (B,), or (B, T) or (N,)
    mask: Tensor,  # (B, T) or (N,)
    *,
    kl: Tensor | None = None,  # (B, T) or (N,)
    kl_coef: float = 0.0,
    clip_range: tuple[float, float] | None = None,
    cu_seqlens: Tensor | None = None,  # (B + 1,)
) -> Tensor:
    """Rewards per token with the KL to the reference taken off: `clip(r_t) - kl_coef * kl_t`; no gradient.

    A reward per sequence goes on the last token of its mask, where the outcome is known (Ziegler et al. 2019;
    InstructGPT, Ouyang et al. 2022): the shaping of PPO, REINFORCE and REINFORCE++ in verl 0.9 and OpenRLHF 0.11. Its
    sum over a sequence is the shaped score of RLOO in TRL 1.16.

    OpenRLHF clips what is left of the score after its baseline, TRL's RLOO the raw score: pass the one that is meant.

    Args:
        rewards: `(B,)`, one per sequence, or in the shape of mask, one per token (the latter where both fit, which is
            one token per sequence, packed). NaN and inf stay at their token.
        mask: `(B, T)`, or `(N,)` with cu_seqlens, nonzero where the token counts; nothing is read elsewhere. A sequence
            without a token gets no reward.
        kl: estimates of the KL per token (`kl_estimate`), in the shape of mask; needed unless kl_coef is 0.
        kl_coef: weight of the KL, at least 0.
        clip_range: bounds of each reward, before the KL.
        cu_seqlens: offsets of packed sequences.

    Returns:
        in the shape of mask, fp32 (fp64 where an input is fp64), exactly 0 outside the mask.

    Raises:
        ValueError, TypeError: an argument out of range, or of the wrong shape or dtype; the message names it.
    """
    validation.check_floating("rewards", rewards)
    sequences = sequences_of(mask, cu_seqlens, "mask")
    if not kl_coef >= 0:
        raise ValueError(f"kl_coef: expected a number of at least 0, got {kl_coef}")
    if (kl is None) != (kl_coef == 0):
        raise ValueError(f"kl: needed with a kl_coef above 0 and only then, got kl_coef={kl_coef}")
    if clip_range is not None and not clip_range[0] <= clip_range[1]:
        raise ValueError(f"clip_range: expected (low, high), got {clip_range}")
    mask = mask.bool()
    shaped = rewards.to(accumulation_dtype(rewards.dtype))
    if clip_range is not None:
        shaped = shaped.clamp(*clip_range)
    if rewards.shape == mask.shape:
        shaped = inside(shaped, mask)
    elif rewards.shape == (sequences.count,):
        shaped = inside(sequences.spread(shaped), sequences.last_token(mask))
    else:
        raise ValueError(
            f"rewards: expected shape ({sequences.count},), one per sequence, or {tuple(mask.shape)}, one per token, "
            f"got {tuple(rewards.shape)}"
        )
    if kl is None:
        return shaped
    validation.check_floating("kl", kl)
    validation.check_shape("kl", kl, tuple(mask.shape), "one per token, as mask")
    return shaped - kl_coef * inside(kl, mask)


def overlong_penalty(lengths: Tensor, max_length: int, buffer: int, *, factor: float = 1.0) -> Tensor:
    """Soft overlong punishment (DAPO, Yu et al. 2025, eq. 13): to be added to the reward, within `[-factor, 0]`.

    `-factor * clip((length - (max_length - buffer)) / buffer, 0, 1)`: 0 up to `max_length - buffer`, then linear; with
    a buffer of 0, -factor above max_length. TRL 1.16's `get_soft_overlong_punishment` and OpenRLHF 0.11's
    `overlong_penalty_factor`; verl 0.9's too for lengths up to max_length, beyond which it goes on falling.
    For completions that run into the length limit: what is cut off is discouraged without a cliff.

    Args:
        lengths: `(B,)` tokens of each completion.
        max_length: tokens; buffer: tokens, in [0, max_length]; factor: at least 0.

    Raises:
        ValueError: an argument out of range.
    """
    if not 0 <= buffer <= max_length:
        raise ValueError(f"buffer: expected a number of tokens in [0, max_length={max_length}], got {buffer}")
    if not factor >= 0:
        raise ValueError(f"factor: expected a number of at least 0, got {factor}")
    excess = lengths.to(torch.get_default_dtype() if not lengths.is_floating_point() else lengths.dtype)
    excess = excess - (max_length - buffer)
    share = (excess / buffer).clamp(0, 1) if buffer else (excess > 0).to(excess)
    return 0.0 - factor * share


def stop_properly_penalty(rewards: Tensor, truncated: Tensor, coef: float) -> Tensor:
    """Rewards in which a truncated completion's is `coef * r` (coef >= 0) or `coef` itself (coef < 0).

    OpenRLHF 0.11's `stop_properly_penalty_coef`. Use it where a completion that was cut off can still be rewarded.

    A coef in [0, 1] scales a positive reward down, but a negative one up, towards 0: prefer a negative coef where
    rewards may be negative. OpenRLHF applies it after the overlong penalty.

    Args:
        rewards: `(B,)`; NaN stays NaN; truncated: `(B,)`, nonzero where the completion did not end by itself.

    Raises:
        ValueError: truncated has another shape.
    """
    validation.check_shape("truncated", truncated, tuple(rewards.shape), "one per reward")
    penalised = rewards * coef if coef >= 0 else torch.where(rewards.isnan(), rewards, coef)
    return torch.where(truncated != 0, penalised, rewards)


def length_penalty(lengths: Tensor, target: Tensor | float = 0.0, *, coef: float, both_sides: bool = False) -> Tensor:
    """Linear penalty on the length: `-coef * max(length - target, 0)`; to be added to the reward.

    With both_sides `-coef * |length - target|`, L1's LCPO-exact (Aggarwal and Welleck 2025), in which the prompt
    asks for the target length. Use it where answers should be short, or of a length asked for.

    Args:
        lengths: `(B,)` tokens of each completion.
        target: tokens, one for all or `(B,)`; coef: penalty per token, at least 0.

    Raises:
        ValueError: a negative coef.
    """
    if not coef >= 0:
        raise ValueError(f"coef: expected a number of at least 0, got {coef}")
    excess = lengths.to(torch.get_default_dtype() if not lengths.is_floating_point() else lengths.dtype) - target
    return 0.0 - coef * (excess.abs() if both_sides else excess.clamp(min=0))


def group_length_reward(lengths: Tensor, correct: Tensor, group_ids: Tensor) -> Tensor:
    """Length reward within a group (Kimi k1.5, 2025): short correct answers up, long wrong ones down.

    `w = 0.5 - (length - shortest) / (longest - shortest)` over the completions of a prompt; w for a correct answer,
    `min(0, w)` for a wrong one, 0 where all are equally long. To be weighted and added to the reward, where answers
    grow longer than they have to, and no target length can be named beforehand.

    Args:
        lengths: `(B,)` tokens; correct: `(B,)`, nonzero where the answer is right; group_ids: `(B,)` integers.

    Raises:
        ValueError: shapes that differ.
    """
    for name, x in (("correct", correct), ("group_ids", group_ids)):
        validation.check_shape(name, x, tuple(lengths.shape), "one per completion")
    groups, length = Groups(group_ids), lengths.to(torch.float64)
    shortest, longest = -groups.max(-length), groups.max(length)
    reward = torch.where(longest > shortest, 0.5 - (length - shortest) / (longest - shortest), 0.0)
    return torch.where(correct != 0, reward, reward.clamp(max=0)).to(torch.get_default_dtype())


@torch.no_grad()
def pf_ppo_weights(scores: Tensor, *, method: str = "pow", weight_pow: float = 2.0) -> Tensor:
    """PF-PPO's weights for drawing a batch's completions anew, by their rewards; not normalised, no gradient.

    Policy filtration (Zhang et al. 2024, arXiv:2409.06957) trains on the samples whose rewards are reliable. verl 0.9's
    `compute_pf_ppo_reweight_data`, in which r are the scores, by method:

        pow         |r|^weight_pow + 1e-8
        max_min     1 + 1e-8 at the highest and the lowest r, 1e-8 elsewhere
        max_random  0.4 + 1e-8 at the highest r, 0.1 + 1e-8 elsewhere

    The highest is that of the scores given: pass one prompt's to filter among its completions.

    Use it where a learned reward model is least sure of middling answers; not for rewards that are verified.

    Args:
        scores: `(B,)`, the total reward of each completion. A NaN or infinite one gets weight 0.
        method: one of the above.
        weight_pow: exponent of pow, at least 0.

    Returns:
        `(B,)` in fp32 (fp64 for fp64).

    Raises:
        ValueError, TypeError: an unknown method, a negative weight_pow, scores of the wrong shape or dtype, or without
            a finite one.
    """
    if method not in PF_PPO_METHODS:
        raise ValueError(f"method: expected one of {', '.join(PF_PPO_METHODS)}, got {method!r}")
    if not weight_pow >= 0:
        raise ValueError(f"weight_pow: expected a number of at least 0, got {weight_pow}")
    validation.check_floating("scores", scores)
    if scores.ndim != 1:
        raise ValueError(f"scores: expected shape (B,), one per completion, got {tuple(scores.shape)}")
    finite = scores.isfinite()
    if not bool(finite.any()):
        raise ValueError(f"scores: expected one that is finite at least, got {scores.tolist()[:8]}")
    scores = scores.to(accumulation_dtype(scores.dtype))
    highest = scores == torch.where(finite, scores, -torch.inf).max()
    if method == "pow":
        weights = scores.abs() ** weight_pow
    elif method == "max_min":
        weights = (highest | (scores == torch.where(finite, scores, torch.inf).min())).to(scores.dtype)
    else:
        weights = torch.where(highest, 0.4, 0.1).to(scores.dtype)
    return torch.where(finite, weights + 1e-8, 0.0)


def pf_ppo_resample(
    scores: Tensor,  # (B,)
    *,
    method: str = "pow",
    weight_pow: float = 2.0,
    generator: torch.Generator | None = None,
) -> Tensor:
    """`(B,)` indices of the completions to train on, drawn with replacement by `pf_ppo_weights`, which see.

    Every tensor of the batch is indexed with them; verl 0.9 does so with `use_pf_ppo`, after its GAE advantages, which
    see the whole batch.

    Args:
        generator: of the draw, on the device of scores; None: torch's own.
    """
    weights = pf_ppo_weights(scores, method=method, weight_pow=weight_pow)
    return torch.multinomial(weights, weights.shape[0], replacement=True, generator=generator)
