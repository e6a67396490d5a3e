"""The eager definition of every op, in plain PyTorch: builds all the logits, differentiated by autograd, fp64-clean.

This is the only truth: every backend is compared with it. The tile-level functions at the end define what a backend
has to provide.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from .head import LogitTransform, RowStats, accumulation_dtype


def transform_logits(product: Tensor, transform: LogitTransform, bias: Tensor | None = None) -> Tensor:
    """Logits (..., V) from raw products (..., V), in the accumulation dtype."""
    z = product.to(accumulation_dtype(product.dtype))
    if bias is not None:
        z = z + bias.to(z.dtype)
    z = z * transform.logit_scale
    if transform.softcap is not None:
        z = transform.softcap * torch.tanh(z / transform.softcap)
    return z / transform.temperature


def _entropy(logp: Tensor) -> Tensor:
    """Entropy (...) in nats of log-probabilities (..., V); a token of probability 0 adds 0."""
    return -(logp.exp() * logp.masked_fill(logp == -torch.inf, 0.0)).sum(-1)


def logprobs_from_logits(
    logits: Tensor,  # (N, V)
    ids: Tensor,  # (N,)
    transform: LogitTransform,
    mask: Tensor | None = None,  # (N,)
    entropy: bool = False,
) -> tuple[Tensor, Tensor | None, Tensor]:
    """`log_softmax(logits).gather(ids)`, entropy, log-sum-exp, each (N,); rows outside the mask are 0, never read."""
    n = ids.shape[0]
    rows = torch.arange(n, device=ids.device) if mask is None else mask.nonzero().squeeze(-1)
    z = transform_logits(logits[rows], transform)
    logp = torch.log_softmax(z, -1)

    def scatter(values: Tensor) -> Tensor:
        return values.new_zeros(n).index_put((rows,), values)

    taken = scatter(logp.gather(-1, ids[rows].unsqueeze(-1)).squeeze(-1))
    return taken, scatter(_entropy(logp)) if entropy else None, scatter(torch.logsumexp(z, -1))


def linear_logprobs(
    hidden: Tensor,  # (N, D)
    weight: Tensor,  # (V, D)
    ids: Tensor,  # (N,)
    bias: Tensor | None,  # (V,)
    transform: LogitTransform,
    mask: Tensor | None = None,  # (N,)
    entropy: bool = False,
) -> tuple[Tensor, Tensor | None, Tensor]:
    """`logprobs_from_logits(hidden @ weight.T + bias, ids)`, the product in the accumulation dtype."""
    dtype = accumulation_dtype(torch.promote_types(hidden.dtype, weight.dtype))
    if mask is not None:
        hidden = hidden.masked_fill(~mask.unsqueeze(-1), 0.0)
    product = hidden.to(dtype) @ weight.to(dtype).T
    if bias is not None:
        product = product + bias.to(dtype)
    return logprobs_from_logits(product, ids, transform, mask, entropy)


def relative_entropy(log_p: Tensor, log_q: Tensor) -> Tensor:
    """KL(p || q) in nats (...) of log-probabilities (..., V); p = 0 adds 0, q = 0 where p is not makes it inf."""
    p = log_p.exp()
    return (p * torch.where(p == 0, 0.0, log_p - log_q)).sum(-1)


def _mixture(log_p: Tensor, log_q: Tensor, beta: float) -> tuple[Tensor, Tensor, Tensor]:
    """log p and log q without infinities, and the log of `(1 - beta) p + beta q`."""
    log_p, log_q = log_p.clamp(min=-1e30), log_q.clamp(min=-1e30)
    return log_p, log_q, torch.logaddexp(log_p + math.log1p(-beta), log_q + math.log(beta))


def divergence(log_p: Tensor, log_q: Tensor, kind: str, beta: float) -> Tensor:
    """Divergence (...) of the student p from the teacher q, log-probabilities (..., V); see `linear_divergence`."""
    if kind == "forward_kl":
        return relative_entropy(log_q, log_p)
    if kind == "reverse_kl":
        return relative_entropy(log_p, log_q)
    log_p, log_q, log_m = _mixture(log_p, log_q, beta)
    return beta * relative_entropy(log_q, log_m) + (1 - beta) * relative_entropy(log_p, log_m)


def topk_divergence(log_p: Tensor, log_q: Tensor, kind: str, beta: float, tail: str) -> Tensor:
    """`divergence` (...) by the log-probabilities (..., K) of a few tokens; -inf in log_q: the token is not given.

    tail: "drop" sums over the tokens and no more; "renormalize" takes the distributions given that one of the tokens is
    taken; "bucket" has one more outcome, any other token.
    """
    log_p = torch.where(log_q > -torch.inf, log_p, -torch.inf)
    return divergence(_outcomes(log_p, tail), _outcomes(log_q, tail), kind, beta)


def _outcomes(logps: Tensor, tail: str) -> Tensor:
    if tail == "renormalize":
        return logps.log_softmax(-1)
    if tail == "bucket":
        # log(1 - sum p); a rest of less than the rounding of the sum is taken for that rounding.
        taken = logps.logsumexp(-1, keepdim=True).clamp(max=-torch.finfo(logps.dtype).eps)
        return torch.cat([logps, torch.log(-torch.expm1(taken))], -1)
    return logps


def linear_divergence(
    hidden: Tensor,  # (N, D)
    weight: Tensor,  # (V, D)
    bias: Tensor | None,  # (V,)
    transform: LogitTransform,
    ref_hidden: Tensor,  # (N, D2)
    ref_weight: Tensor,  # (V, D2)
    ref_bias: Tensor | None,  # (V,)
    ref_transform: LogitTransform,
    kind: str,
    beta: float,
    mask: Tensor | None = None,  # (N,)
) -> Tensor:
    """`divergence` of `log_softmax(hidden @ weight.T + bias)` from the second head, (N,); 0 outside the mask."""
    n = hidden.shape[0]
    rows = torch.arange(n, device=hidden.device) if mask is None else mask.nonzero().squeeze(-1)
    dtype = accumulation_dtype(weight.dtype)

    def log_probs(x: Tensor, w: Tensor, b: Tensor | None, to_logit: LogitTransform) -> Tensor:
        return transform_logits(x[rows].to(dtype) @ w.to(dtype).T, to_logit, b).log_softmax(-1)

    log_p = log_probs(hidden, weight, bias, transform)
    log_q = log_probs(ref_hidden, ref_weight, ref_bias, ref_transform)
    return log_p.new_zeros(n).index_put((rows,), divergence(log_p, log_q, kind, beta))


def linear_topk_logprobs(
    hidden: Tensor,  # (N, D)
    weight: Tensor,  # (V, D)
    ids: Tensor,  # (N, K)
    bias: Tensor | None,  # (V,)
    transform: LogitTransform,
    mask: Tensor | None = None,  # (N,)
) -> Tensor:
    """`log_softmax(hidden @ weight.T + bias).gather(ids)`, (N, K); rows outside the mask are 0, never read."""
    n, dtype = ids.shape[0], accumulation_dtype(weight.dtype)
    rows = torch.arange(n, device=ids.device) if mask is None else mask.nonzero().squeeze(-1)
    z = transform_logits(hidden[rows].to(dtype) @ weight.to(dtype).T, transform, bias)
    taken = z.log_softmax(-1).gather(-1, ids[rows])
    return taken.new_zeros(ids.shape).index_put((rows,), taken)


def group_advantages(rewards: Tensor, group_ids: Tensor, baseline: str, scale: str, eps: float) -> Tensor:
    """`(r - baseline) / (std + eps)` per group, (B,); NaN rewards get 0. See `functional.group_advantages`."""
    r = rewards.to(torch.float64)
    scored = ~r.isnan()
    _, group = group_ids.unique(return_inverse=True)
    groups = int(group.max()) + 1 if group.numel() else 0

    def total(x: Tensor) -> Tensor:  # sum over the scored members of each row's group
        return x.new_zeros(groups).index_add(0, group[scored], x[scored])[group]

    count = total(torch.ones_like(r))
    mean = total(r) / count
    low = r.new_full((groups,), torch.inf).scatter_reduce(0, group[scored], r[scored], "amin")[group]
    high = r.new_full((groups,), -torch.inf).scatter_reduce(0, group[scored], r[scored], "amax")[group]
    if baseline == "mean":
        advantages = r - mean
    else:
        advantages = r - (total(r) - r) / (count - 1)
    if scale == "group":
        advantages = advantages / ((total((r - mean) ** 2) / (count - 1)).sqrt() + eps)
    elif scale == "batch":
        spread = r[scored]
        deviation = (
            (spread - spread.mean()).square().sum() / (spread.numel() - 1)
        ).sqrt()  # NaN for one, and no warning
        advantages = advantages / (deviation + eps)
    nothing = ~scored | (count < 2) | (low == high) | advantages.isnan()
    return advantages.masked_fill(nothing, 0.0).to(rewards.dtype)


def gae(
    rewards: Tensor, values: Tensor, mask: Tensor, gamma: float, lam: float, through_mask: bool
) -> tuple[Tensor, Tensor]:
    """Generalized advantage estimation, step by step from the last; see `functional.gae`."""
    rewards, values = torch.where(mask, rewards, 0.0), torch.where(mask, values, 0.0)
    advantages = torch.zeros_like(rewards)
    advantage = next_value = rewards.new_zeros(rewards.shape[0])
    for t in reversed(range(rewards.shape[1])):
        step = mask[:, t] | through_mask
        delta = rewards[:, t] + gamma * next_value - values[:, t]
        advantage = torch.where(step, delta + gamma * lam * advantage, advantage)
        next_value = torch.where(step, values[:, t], next_value)
        advantages[:, t] = advantage
    advantages = torch.where(mask, advantages, 0.0)
    return advantages, advantages + values


# What a backend provides, on a tile of raw products -----------------------------------------------------------------


def row_stats(
    tile: Tensor,  # (n, V) raw products
    ids: Tensor,  # (n,) int64; -1: not in this vocabulary shard
    transform: LogitTransform,
    bias: Tensor | None,  # (V,)
    entropy: bool,
) -> RowStats:
    """Row pass 1: the statistics of each row of a tile."""
    z = transform_logits(tile, transform, bias)
    row_max = z.amax(-1)
    shifted = z - row_max.unsqueeze(-1)
    log_sum = shifted.exp().sum(-1).log()
    taken = shifted.gather(-1, ids.clamp(min=0).unsqueeze(-1)).squeeze(-1) - log_sum
    taken = torch.where((ids >= 0) | taken.isnan(), taken, -torch.inf)
    p = (shifted - log_sum.unsqueeze(-1)).exp()
    mean = (p * shifted.masked_fill(shifted == -torch.inf, 0.0)).sum(-1)
    return RowStats(row_max, log_sum, taken, mean if entropy else None)


def row_grad(
    tile: Tensor,  # (n, V) raw products
    out: Tensor,  # (k, V) receives the gradient of the raw products; may be the tile itself
    ids: Tensor,  # (n,)
    transform: LogitTransform,
    bias: Tensor | None,  # (V,)
    row_max: Tensor,  # (n,)
    log_sum: Tensor,  # (n,)
    mean: Tensor | None,  # (n,), needed with grad_entropy
    grad_logps: Tensor | None,  # (n,)
    grad_entropy: Tensor | None,  # (n,)
    grad_lse: Tensor | None,  # (n,)
    source: Tensor | None = None,  # (k,) int64
    target: Tensor | None = None,  # (k,) int64
) -> None:
    """Row pass 2: `out[target[i]]` becomes the gradient of row `source[i]` of the tile.

    `[g_logp (onehot - p) - g_H p (log p + H) + g_lse p] * d logit / d product`, with `log p + H = z - row_max - mean`.
    """
    if source is not None:
        tile, ids, row_max, log_sum = tile[source], ids[source], row_max[source], log_sum[source]
        mean, grad_logps, grad_entropy, grad_lse = (
            None if x is None else x[source] for x in (mean, grad_logps, grad_entropy, grad_lse)
        )
    z = transform_logits(tile, transform, bias)
    shifted = z - row_max.unsqueeze(-1)
    logp = shifted - log_sum.unsqueeze(-1)
    grad = torch.zeros_like(logp)
    if grad_logps is not None:
        onehot = (ids.unsqueeze(-1) == torch.arange(tile.shape[-1], device=tile.device)).to(z.dtype)
        grad += grad_logps.unsqueeze(-1) * (onehot - logp.exp())
    if grad_entropy is not None and mean is not None:
        grad -= grad_entropy.unsqueeze(-1) * logp.exp() * (shifted.clamp(min=-1e30) - mean.unsqueeze(-1))
    if grad_lse is not None:
        grad += grad_lse.unsqueeze(-1) * logp.exp()
    if transform.softcap is not None:
        grad *= 1 - (z * transform.temperature / transform.softcap) ** 2
    grad *= transform.logit_scale / transform.temperature
    if target is None:
        out.copy_(grad)
    else:
        out[target] = grad.to(out.dtype)


def divergence_rows(
    tile: Tensor,  # (n, V) raw products of the student
    ref_tile: Tensor,  # (n, V) raw products of the teacher
    kind: str,
    beta: float,
    transform: LogitTransform,
    ref_transform: LogitTransform,
    bias: Tensor | None,  # (V,)
    ref_bias: Tensor | None,  # (V,)
    token_weight: Tensor | None = None,  # (n,)
    out: Tensor | None = None,  # (n, V); may be the student's tile; given with token_weight
) -> Tensor:
    """`divergence` of each row, (n,); `out` receives its gradient in the student's products, times `token_weight`."""
    values = []
    for start in range(0, tile.shape[0], 16):  # few rows at a time: what is made beside the tiles stays small
        part = slice(start, start + 16)
        z = transform_logits(tile[part], transform, bias)
        log_p = z.log_softmax(-1)
        log_q = transform_logits(ref_tile[part], ref_transform, ref_bias).log_softmax(-1)
        values.append(divergence(log_p, log_q, kind, beta))
        if out is None or token_weight is None:
            continue
        p = log_p.exp()
        if kind == "forward_kl":
            grad = p - log_q.exp()
        else:
            if kind == "jsd":
                log_p, _, log_q = _mixture(log_p, log_q, beta)
            gap = torch.where(p == 0, 0.0, log_p - log_q)
            grad = (1 - beta if kind == "jsd" else 1.0) * p * (gap - (p * gap).sum(-1, keepdim=True))
        if transform.softcap is not None:
            grad *= 1 - (z * transform.temperature / transform.softcap) ** 2
        out[part] = grad * (token_weight[part] * (transform.logit_scale / transform.temperature)).unsqueeze(-1)
    return torch.cat(values) if values else tile.new_empty(0, dtype=accumulation_dtype(tile.dtype))
