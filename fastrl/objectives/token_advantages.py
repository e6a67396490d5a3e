"""Advantages per token: discounted returns, GAE, the optimal token baseline, whitening; padded or packed."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.distributed as dist
from torch import Tensor

import fastrl_kernels
from fastrl_kernels import validation
from fastrl_kernels.head import accumulation_dtype

from .groups import Groups
from .masking import inside, known_finite
from .sequences import sequences_of

WHITENINGS = {"trl": 1e-4, "verl": 1e-8, "openrlhf": 1e-8}  # and their eps


class _Rows:
    """Packed tokens laid out in padded rows, for what walks along a sequence, and back."""

    def __init__(self, cu_seqlens: Tensor, tokens: int) -> None:
        start = cu_seqlens.to(torch.int64)
        lengths = start.diff()
        self._shape = (lengths.shape[0], int(lengths.max()) if lengths.numel() else 0)
        self._row = torch.arange(lengths.shape[0], device=start.device).repeat_interleave(lengths, output_size=tokens)
        self._column = torch.arange(tokens, device=start.device) - start[self._row]

    def pad(self, x: Tensor) -> Tensor:
        padded = x.new_zeros(self._shape)
        padded[self._row, self._column] = x
        return padded

    def pack(self, x: Tensor) -> Tensor:
        return x[self._row, self._column]


def _along_rows(
    function: Callable[..., tuple[Tensor, Tensor]], mask: Tensor, cu_seqlens: Tensor | None, **tokens: Tensor | None
) -> tuple[Tensor, Tensor]:
    """`function(mask=, **tokens)` of `(B, T)` tensors, also for packed ones."""
    sequences_of(mask, cu_seqlens, "mask")
    for name, x in tokens.items():
        if x is not None:
            validation.check_shape(name, x, tuple(mask.shape), "one per token, as mask")
    if cu_seqlens is None:
        return function(mask=mask, **tokens)
    rows = _Rows(cu_seqlens, mask.shape[0])
    first, second = function(mask=rows.pad(mask), **{n: None if x is None else rows.pad(x) for n, x in tokens.items()})
    return rows.pack(first), rows.pack(second)


def gae(
    rewards: Tensor,  # (B, T) or (N,)
    values: Tensor,  # (B, T) or (N,)
    mask: Tensor,  # (B, T) or (N,)
    *,
    gamma: float = 1.0,
    lam: float = 0.95,
    through_mask: bool = False,
    cu_seqlens: Tensor | None = None,  # (B + 1,)
    backend: str | None = None,
) -> tuple[Tensor, Tensor]:
    """Generalized advantage estimation (Schulman et al. 2016, eq. 16) over the tokens of the mask; no gradient.

    From the last token of a sequence to its first, `A` and `V_next` starting at 0:
    `A = r + gamma * V_next - V + gamma * lam * A; V_next = V`. The return, which the value function learns, is `A + V`.
    The estimator of PPO, where there is a value function. Not whitened: see `whiten`.

    Tokens outside the mask are skipped, as in verl 0.9; with through_mask they are steps of reward 0 and value 0 that
    discount, as in OpenRLHF 0.11. A reverse scan in one pass over memory on every backend but the reference; see
    `fastrl_kernels.gae` for its details and errors.

    Args:
        rewards: `(B, T)`, or `(N,)` with cu_seqlens, per token (`token_rewards` places an outcome's); values: the same.
        mask: of the same shape, nonzero where the token counts; nothing is read elsewhere.
        gamma: discount per token; lam: the lambda of the estimator; both in [0, 1].
        through_mask: discount through the tokens outside the mask instead of skipping them.
        cu_seqlens: offsets of packed sequences, which are laid out in rows for the scan.
        backend: None chooses; "reference", "cpu", "triton" force.

    Returns:
        advantages and returns in the shape of mask, fp32 (fp64 where an input is fp64), exactly 0 outside the mask.
    """
    options = {"gamma": gamma, "lam": lam, "through_mask": through_mask, "backend": backend}
    if cu_seqlens is None:
        return fastrl_kernels.gae(rewards, values, mask, **options)  # type: ignore[arg-type]

    def scan(mask: Tensor, rewards: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        return fastrl_kernels.gae(rewards, values, mask, **options)  # type: ignore[arg-type]

    return _along_rows(scan, mask, cu_seqlens, rewards=rewards, values=values)


def discounted_returns(
    rewards: Tensor,  # (B, T) or (N,)
    mask: Tensor,  # (B, T) or (N,)
    *,
    gamma: float = 1.0,
    through_mask: bool = False,
    cu_seqlens: Tensor | None = None,
    backend: str | None = None,
) -> Tensor:
    """Rewards to go, `R_t = r_t + gamma * R_next`, over the tokens of the mask; no gradient.

    The advantages of REINFORCE and, whitened, of REINFORCE++ (Hu et al. 2025). GAE's scan with lambda 1 and no values,
    and with gamma 1, if no backend is forced, a plain running sum; arguments, masks and result are `gae`'s. A reward
    that is NaN or infinite reaches the earlier tokens of its own sequence only.
    """
    if gamma != 1 or backend is not None:
        options = {"gamma": gamma, "lam": 1.0, "through_mask": through_mask, "backend": backend}
        return gae(rewards, torch.zeros_like(rewards), mask, cu_seqlens=cu_seqlens, **options)[0]  # type: ignore[arg-type]

    def undiscounted(mask: Tensor, rewards: Tensor) -> tuple[Tensor, Tensor]:
        kept = inside(rewards.to(accumulation_dtype(rewards.dtype)), mask)
        returns = inside(kept.flip(-1).cumsum_(-1).flip(-1), mask)
        return returns, returns

    validation.check_floating("rewards", rewards)
    return _along_rows(undiscounted, mask.bool(), cu_seqlens, rewards=rewards)[0]


@torch.no_grad()
def remax_advantages(
    rewards: Tensor,  # (B, T) or (N,)
    baseline_rewards: Tensor,  # (B,)
    mask: Tensor,  # (B, T) or (N,)
    *,
    cu_seqlens: Tensor | None = None,
    backend: str | None = None,
) -> tuple[Tensor, Tensor]:
    """ReMax (Li et al. 2024): rewards to go minus the reward of the greedy completion of the same prompt.

    One sampled completion per prompt is enough, at the price of a greedy one. verl 0.9's `remax` inside the mask; no
    gradient.

    Args:
        rewards: `(B, T)`, or `(N,)` with cu_seqlens, per token; mask: of the same shape.
        baseline_rewards: `(B,)`, the greedy completion's total reward.

    Returns:
        advantages and rewards to go, in the shape of mask, exactly 0 outside it. An advantage that a NaN or infinite
        reward of either completion would make so is 0.
    """
    mask = mask.bool()
    returns = discounted_returns(rewards, mask, cu_seqlens=cu_seqlens, backend=backend)
    sequences = sequences_of(mask, cu_seqlens, "mask")
    validation.check_shape("baseline_rewards", baseline_rewards, (sequences.count,), "one per sequence")
    advantages = returns - sequences.spread(baseline_rewards.to(returns.dtype))
    if not known_finite(advantages):
        mask = mask & advantages.isfinite()
    return inside(advantages, mask), returns


@torch.no_grad()
def linear_sum_pi_squared(
    hidden: Tensor,  # (..., D)
    weight: Tensor,  # (V, D)
    *,
    bias: Tensor | None = None,  # (V,)
    temperature: float = 1.0,
    logit_scale: float = 1.0,
    softcap: float | None = None,
    mask: Tensor | None = None,  # (...)
    lse: Tensor | None = None,  # (...)
    tp_group: dist.ProcessGroup | None = None,
    backend: str | None = None,
    memory_budget: int | None = None,
) -> Tensor:
    """Sum over the vocabulary of the squared probabilities, from hidden states and the LM head; no gradient.

        sum_v p_v^2 = exp(lse(2 z) - 2 lse(z))

    so that two scorings, at temperature and at half of it, give it without the logits: 4NDV FLOPs, 2NDV where lse is
    given. What `optimal_token_baseline` needs; verl 0.9's `calculate_sum_pi_squared_from_logits`.
    Eager equivalent: `z.softmax(-1).square().sum(-1)`, z being the logits of `linear_logprobs`.

    Args:
        hidden, weight, bias, temperature, logit_scale, softcap, mask, tp_group, backend, memory_budget: as
            `linear_logprobs` takes them.
        lse: `(...)`, that of `linear_logprobs` on the same arguments, from the scoring that gave the logps.

    Returns:
        `(...)` in [1 / V, 1] up to rounding, fp32 (fp64 for fp64 inputs), exactly 0 outside the mask.

    Raises:
        ValueError, TypeError, RuntimeError: as `linear_logprobs`; lse of another shape.
    """
    shape = tuple(hidden.shape[:-1])
    mask = validation.check_mask(mask, shape, hidden.device)
    ids = torch.zeros(shape, dtype=torch.int64, device=hidden.device)  # any token will do

    def scored(temperature: float) -> Tensor:
        return fastrl_kernels.linear_logprobs(
            hidden, weight, ids, bias=bias, temperature=temperature, logit_scale=logit_scale, softcap=softcap,
            mask=mask, tp_group=tp_group, backend=backend, memory_budget=memory_budget,
        ).lse  # fmt: skip

    if lse is None:
        lse = scored(temperature)
    validation.check_shape("lse", lse, shape, "one per token")
    result = (scored(temperature / 2) - 2 * lse).exp()
    return result if mask is None else inside(result, mask)


@torch.no_grad()
def optimal_token_baseline(
    rewards: Tensor,  # (B, T) or (N,)
    mask: Tensor,  # (B, T) or (N,)
    logps: Tensor,  # (B, T) or (N,)
    sum_pi_squared: Tensor,  # (B, T) or (N,)
    group_ids: Tensor,  # (B,)
    *,
    importance_weights: Tensor | None = None,  # (B, T) or (N,)
    skip_holes: bool = True,
    zero_tail: bool = True,
    eps: float = 1e-8,
    cu_seqlens: Tensor | None = None,
    backend: str | None = None,
) -> tuple[Tensor, Tensor]:
    """Rewards to go minus the baseline of least variance at each step, over the completions of a prompt; no gradient.

        A_t = G_t - sum_i(G_it W_it) / (sum_i W_it + eps),   W_t = sum over u <= t of 1 - 2 p_u + sum_v p_v^2

    where i runs over the group's completions that are t tokens long, and W, the squared norm of the score function in
    logit space, is the variance that a completion has gathered so far (Li et al. 2026, arXiv:2602.07078). verl 0.9's
    `tir_optimal_token_baseline`, and with skip_holes False its `optimal_token_baseline`. For long, noisy completions,
    where one baseline for all their tokens is coarse.

    Args:
        rewards: `(B, T)`, or `(N,)` with cu_seqlens, per token; mask: of the same shape, nonzero where it counts.
        logps: of the tokens under the policy that drew them; -inf is a token of probability 0.
        sum_pi_squared: sum over the vocabulary of the squared probabilities, at each token (`linear_sum_pi_squared`).
        group_ids: `(B,)` integers; completions of equal id answer one prompt.
        importance_weights: trainer to sampler, per token; W's terms are multiplied by their squares.
        skip_holes: t counts the tokens of the mask; else it is the column, and turns after a tool's answer of another
            length are compared out of step (verl's is so; the tail below then starts at a column that is a number of
            tokens).
        zero_tail: where one completion is longer than all others of its group, its baseline beyond the second longest,
            which would be its own return, is 0.
        eps: added to the sum of W.

    Returns:
        advantages and rewards to go, in the shape of mask, exactly 0 outside it. A completion with a reward or weight
        that is not finite gets advantages of 0 and counts for nothing; one that is alone keeps its rewards to go.
    """

    def rows(
        mask: Tensor, rewards: Tensor, logps: Tensor, sum_pi_squared: Tensor, importance_weights: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        mask = mask.bool()
        returns = discounted_returns(rewards, mask, backend=backend)
        validation.check_shape("group_ids", group_ids, (mask.shape[0],), "one per sequence")
        energy = 1 - 2 * logps.exp() + sum_pi_squared
        if importance_weights is not None:
            energy = energy * importance_weights.square()
        energy = inside(energy, mask).to(returns.dtype).cumsum(-1)
        totals = inside(rewards, mask).sum(-1) + energy[:, -1:].sum(-1)
        if not bool(totals.isfinite().all()):
            mask = mask & totals.isfinite().unsqueeze(-1)
        if not skip_holes:
            baselines = _step_baselines(returns, energy, mask, group_ids, zero_tail, eps)
            return inside(returns - baselines, mask), returns

        # Tokens of the mask move to the front of their row; the others to a column that is dropped.
        length = mask.shape[1]
        column = torch.where(mask, mask.cumsum(-1) - 1, length)

        def front(x: Tensor) -> Tensor:
            return x.new_zeros(x.shape[0], length + 1).scatter(1, column, x)[:, :length]

        baselines = _step_baselines(front(returns), front(energy), front(mask), group_ids, zero_tail, eps)
        in_place = baselines.gather(1, column.clamp(max=max(length - 1, 0)))
        return inside(returns - in_place, mask), returns

    return _along_rows(
        rows, mask, cu_seqlens, rewards=rewards, logps=logps, sum_pi_squared=sum_pi_squared,
        importance_weights=importance_weights,
    )  # fmt: skip


def _step_baselines(
    returns: Tensor,  # (B, T)
    energy: Tensor,  # (B, T)
    mask: Tensor,  # (B, T)
    group_ids: Tensor,  # (B,)
    zero_tail: bool,
    eps: float,
) -> Tensor:
    """`(B, T)`: the mean return at each step over a group, weighted by energy."""
    groups, length = Groups(group_ids), mask.sum(-1).to(torch.float64)
    weights = inside(energy, mask)
    baselines = groups.ratio(inside(returns, mask) * weights, weights, eps)
    tail = torch.where(groups.count(length > 0) < 2, 0.0, torch.inf)  # first step of each row without a baseline
    if zero_tail:
        longest = length == groups.max(length)
        second = groups.max(torch.where(longest, 0.0, length))
        tail = torch.where(longest & (groups.count(longest) == 1), torch.minimum(tail, second), tail)
    steps = torch.arange(mask.shape[1], device=mask.device, dtype=torch.float32)
    return inside(baselines, steps < tail.to(torch.float32).unsqueeze(-1))


@torch.no_grad()
def whiten(
    x: Tensor,  # of any shape
    mask: Tensor,  # as x
    *,
    preset: str = "verl",
    eps: float | None = None,
    shift_mean: bool = True,
    divide_by_std: bool = True,
) -> Tensor:
    """x to mean 0 and variance 1 over all the tokens (or sequences) of the mask; no gradient.

    With n values of mean m and sum of squared distances to it S:

        "verl"      (x - m) / sqrt(S / (n - 1) + eps)           eps 1e-8
        "openrlhf"  (x - m) / sqrt(max(S / n, eps))             eps 1e-8
        "trl"       (x - m) / (sqrt(S / (n - 1)) + eps)         eps 1e-4

    The statistics are those of the tensors given: pass the whole batch, not a micro-batch. The shape means nothing
    here, so packed and padded tokens give the same. Use it on the advantages of a critic (PPO) or on returns
    (REINFORCE++), so that a step does not depend on the scale of the rewards.

    Args:
        x: floating point; NaN and infinite values are left out of the statistics and get 0.
        mask: of the same shape, nonzero where x counts; x is not read elsewhere.
        preset: whose formula; eps: None for the preset's.
        shift_mean: False adds the mean back (verl's `masked_whiten(shift_mean=False)`).
        divide_by_std: False only subtracts the mean (OpenRLHF's `no_std_norm`).

    Returns:
        fp32 (fp64 for fp64) in the shape of x, exactly 0 outside the mask; where all values are equal the centred value
        is exactly 0. One value alone has no variance: 0 is taken (verl raises an error).

    Raises:
        ValueError: an unknown preset, a negative eps, neither shift_mean nor divide_by_std.
    """
    if preset not in WHITENINGS:
        raise ValueError(f"preset: expected one of {', '.join(WHITENINGS)}, got {preset!r}")
    eps = WHITENINGS[preset] if eps is None else eps
    if not eps >= 0:
        raise ValueError(f"eps: expected a number of at least 0, got {eps}")
    if not (shift_mean or divide_by_std):
        raise ValueError("shift_mean: without it and without divide_by_std there is nothing to do")
    validation.check_floating("x", x)
    checked = validation.check_mask(mask, tuple(x.shape), x.device)
    if checked is None:
        raise ValueError("mask: expected a tensor in the shape of x, got None")
    if x.numel() == 0:
        return x.to(accumulation_dtype(x.dtype))
    x, mask = inside(x, checked).to(accumulation_dtype(x.dtype)), checked
    if not bool(x.sum().isfinite()):
        mask = checked & x.isfinite()
        x = inside(x, mask)
    count = mask.sum()
    # One of the values: equal ones leave exact 0s, and a large common offset costs no digits.
    pivot = x.flatten()[mask.flatten().view(torch.uint8).argmax()]
    centred = inside(x - pivot, mask)
    shift = centred.sum() / count.clamp(min=1)
    centred = inside(centred - shift, mask)
    if divide_by_std:
        squares = centred.square().sum()
        if preset == "openrlhf":
            deviation = (squares / count.clamp(min=1)).clamp(min=eps).sqrt()
        elif preset == "verl":
            deviation = (squares / (count - 1).clamp(min=1) + eps).sqrt()
        else:
            deviation = (squares / (count - 1).clamp(min=1)).sqrt() + eps
        centred = centred / torch.where(deviation > 0, deviation, 1.0)
    return centred if shift_mean else inside(centred + (shift + pivot), mask)
