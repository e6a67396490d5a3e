"""The public functions on heads and rewards: validate, choose a backend, call the operator."""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from . import backends, ops, planner, reference, validation
from .head import LogitTransform, accumulation_dtype


class TokenStats(NamedTuple):
    """Statistics of given tokens, in the shape of `ids`, fp32 (fp64 for fp64 inputs); exactly 0 outside the mask."""

    logps: Tensor  # log-probability of the token, natural logarithm
    entropy: Tensor | None  # entropy of the distribution it was drawn from, in nats; None unless asked for
    lse: Tensor  # log-sum-exp of the logits after scale, softcap and temperature


def harmonize(hidden: Tensor, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor, Tensor | None]:
    """The operands of the head in one dtype: autocast's where it is on, else the wider of the two."""
    device = hidden.device.type
    if torch.is_autocast_enabled(device):
        dtype = torch.get_autocast_dtype(device)
    else:
        dtype = torch.promote_types(hidden.dtype, weight.dtype)
    return hidden.to(dtype), weight.to(dtype), bias


def linear_logprobs(
    hidden: Tensor,  # (..., D)
    weight: Tensor,  # (V, D)
    ids: Tensor,  # (...)
    *,
    bias: Tensor | None = None,  # (V,)
    temperature: float = 1.0,
    logit_scale: float = 1.0,
    softcap: float | None = None,
    mask: Tensor | None = None,  # (...)
    entropy: bool = False,
    tp_group: dist.ProcessGroup | None = None,
    backend: str | None = None,
    memory_budget: int | None = None,
    grad_tolerance: float = 0.0,
    capturable: bool = False,
    explain: bool = False,
) -> TokenStats:
    """Log-probabilities of given tokens straight from hidden states and the LM head, without the logits.

    Eager equivalent: `z = softcap_(logit_scale * (hidden @ weight.T + bias)) / temperature`, then
    `z.log_softmax(-1).gather(-1, ids[..., None])`, the entropy of `z.softmax(-1)` and `z.logsumexp(-1)`.

    Differentiable in hidden, weight and bias through all three outputs. The forward costs 2NDV FLOPs for N tokens in
    the mask, the backward 6lNDV, l being the share of tokens whose upstream gradient is not exactly 0 (4lNDV where the
    logits of all tokens fit the memory budget, and are kept); no term is computed, and no buffer made, for an input
    that needs no gradient. Beside inputs, outputs and gradients it holds one tile of logits, see memory_budget; for a
    half-precision weight also dW in fp32. Calling it twice gives the same bits.

    Args:
        hidden: `(..., D)`, fp32, fp64, bf16 or fp16.
        weight: `(V, D)`, the LM head; under `tp_group` this rank's rows of it. A dtype other than hidden's is widened;
            under autocast both are cast as `F.linear` would.
        ids: `(...)` integers in `[0, V)`, already aligned: `ids[i]` is scored by `hidden[i]`; never shifted here.
        bias: `(V,)`.
        temperature, logit_scale, softcap: see `LogitTransform`.
        mask: `(...)`, nonzero where the token counts. Elsewhere the row is never read (it may hold NaN, its id may be
            anything), the outputs are exactly 0 and no gradient flows.
        entropy: also return the entropy.
        tp_group: process group over which the vocabulary is sharded, in rank order, in shards of any size; hidden and
            ids are the same on every rank, and so are the results and hidden's gradient.
        backend: None chooses; "reference" (eager), "cpu", "triton", "cuda" force.
        memory_budget: bytes that tiles of logits may take. None: 48 MiB on the CPU, 512 MiB on a GPU, but at least 128
            rows, and never more than half of the free memory. A budget given is kept to the row.
        grad_tolerance: 0 (exact), or the share of the gradient, in the sum of the rows' L1 norms of dlogits, that the
            backward may leave out: the rows of smallest norm are dropped as if they were dead. Exact where a gradient
            flows through lse.
        capturable: nothing depends on values (no dropping of rows, no synchronisation), so that a CUDA graph can
            capture the call; ids are then not checked on a GPU, one out of range gives NaN.
        explain: print the planner's schedule and its reasons.

    Returns:
        TokenStats in fp32 (fp64 for fp64 inputs).

    Raises:
        ValueError, TypeError: an argument of the wrong shape, dtype or device, an id out of range, a sharded weight;
            the message names it.
        RuntimeError: the forced backend does not work on this machine; the message says why.

    The gradient is that of Cut Cross Entropy (Wijmans et al. 2024, eq. 4), extended by the entropy's
    `-p (log p + H)`.
    """
    validation.check_weight(weight, bias, hidden)
    validation.check_ids(ids, tuple(hidden.shape[:-1]), hidden.device)
    validation.check_run(memory_budget, grad_tolerance, capturable)
    mask = validation.check_mask(mask, tuple(ids.shape), hidden.device)
    transform = LogitTransform(float(temperature), float(logit_scale), None if softcap is None else float(softcap))
    name = backends.choose(backend, hidden.device)
    hidden, weight, bias = harmonize(hidden, weight, bias)
    shape = ids.shape
    hidden, ids = hidden.reshape(-1, hidden.shape[-1]), ids.reshape(-1).to(torch.int64)
    mask = None if mask is None else mask.reshape(-1)
    if name == "reference":
        given = {"memory_budget": memory_budget, "grad_tolerance": grad_tolerance, "capturable": capturable}
        if refused := [option for option, value in given.items() if value]:
            raise ValueError(
                f"{', '.join(refused)}: the reference builds all the logits; use backend 'cpu' or 'triton'"
            )
        if tp_group is not None:
            raise ValueError("tp_group: the reference has no tensor parallelism; use backend 'cpu' or 'triton'")
        ops.check_range(mask, ids, weight.shape[0])
        logps, entropies, lse = reference.linear_logprobs(hidden, weight, ids, bias, transform, mask, entropy)
    else:
        group = "" if tp_group is None else tp_group.group_name
        wanted = torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in (hidden, weight, bias))
        keep = (
            wanted
            and tp_group is None
            and planner.keeps_logits(ids.shape[0], weight.shape[0], weight.dtype, hidden.device, memory_budget)
        )
        logps, entropies, lse, *_ = ops.linear_logprobs(
            hidden, weight, bias, ids, mask, entropy, keep, float(grad_tolerance), transform.temperature,
            transform.logit_scale, transform.softcap, name, group, memory_budget, capturable, explain,
        )  # fmt: skip
    return TokenStats(logps.view(shape), entropies.view(shape) if entropy else None, lse.view(shape))  # type: ignore[union-attr]


def logprobs_from_logits(
    logits: Tensor,  # (..., V)
    ids: Tensor,  # (...)
    *,
    temperature: float = 1.0,
    mask: Tensor | None = None,  # (...)
    entropy: bool = False,
    backend: str | None = None,
) -> TokenStats:
    """Log-probabilities of given tokens from logits that exist already; differentiable in the logits.

    Eager equivalent: `(logits / temperature).log_softmax(-1).gather(-1, ids[..., None])`, entropy and logsumexp alike.
    Logits are read once and reduced in fp32 (fp64 for fp64); nothing of their size is made but their gradient.

    Args:
        logits: `(..., V)`, fp32, fp64, bf16 or fp16; not modified.
        ids: `(...)` integers in `[0, V)`, aligned with the logits.
        temperature: above 0.
        mask: `(...)`, nonzero where the token counts; elsewhere nothing is read and the outputs are 0.
        entropy: also return the entropy.
        backend: None chooses; "reference", "cpu", "triton" force.

    Raises:
        ValueError, TypeError, RuntimeError: as `linear_logprobs`.
    """
    validation.check_floating("logits", logits)
    if logits.ndim < 1 or logits.shape[-1] == 0:
        raise ValueError(f"logits: expected shape (..., V) with V >= 1, got {tuple(logits.shape)}")
    validation.check_ids(ids, tuple(logits.shape[:-1]), logits.device)
    mask = validation.check_mask(mask, tuple(ids.shape), logits.device)
    transform = LogitTransform(float(temperature))
    name = backends.choose(backend, logits.device)
    shape, vocabulary = ids.shape, logits.shape[-1]
    ids, mask = ids.reshape(-1).to(torch.int64), None if mask is None else mask.reshape(-1)
    logits = logits.reshape(-1, vocabulary)
    if name == "reference":
        ops.check_range(mask, ids, vocabulary)
        logps, entropies, lse = reference.logprobs_from_logits(logits, ids, transform, mask, entropy)
    else:
        if logits.stride(-1) != 1 and vocabulary > 1:
            logits = logits.contiguous()
        if name == "cpu" and logits.dtype == torch.float16:
            logits = logits.float()  # the row kernels have no fp16 loads
        logps, entropies, lse, *_ = ops.logprobs_from_logits(logits, ids, mask, entropy, transform.temperature, name)
    return TokenStats(logps.view(shape), entropies.view(shape) if entropy else None, lse.view(shape))  # type: ignore[union-attr]


def group_advantages(
    rewards: Tensor,  # (B,)
    group_ids: Tensor,  # (B,)
    *,
    baseline: str = "mean",
    scale: str = "group",
    eps: float = 1e-4,
    backend: str | None = None,
) -> Tensor:
    """Group-relative advantages `(r - baseline) / (std + eps)`, as TRL 1.16 computes them; no gradient.

    A NaN reward (no reward function scored the completion) is left out of every statistic and gets 0. A group whose
    rewards are all equal gets exactly 0, so that the fused losses drop its tokens; so does a reward that is alone in
    its group.

    Args:
        rewards: `(B,)` floating point, NaN where there is none.
        group_ids: `(B,)` integers; rows of equal id form a group, of any size, in any order.
        baseline: "mean" of the group (GRPO, Shao et al. 2024, eq. 3), or "leave_one_out", the mean of the others
            (RLOO, Ahmadian et al. 2024, eq. 8).
        scale: "group" divides by the group's standard deviation (Bessel) + eps, "batch" by the batch's, "none" not
            at all (Dr. GRPO, Liu et al. 2025). TRL's `scale_rewards`.
        eps: added to the standard deviation: 1e-4 in TRL, 1e-6 in verl, 1e-9 in OpenRLHF.
        backend: None chooses; "reference", "cpu", "triton" force.

    Returns:
        `(B,)` in the dtype of rewards.

    Raises:
        ValueError, TypeError: an unknown baseline or scale, a negative eps, or an argument of the wrong shape or dtype.
    """
    if baseline not in ("mean", "leave_one_out"):
        raise ValueError(f"baseline: expected 'mean' or 'leave_one_out', got {baseline!r}")
    if scale not in ("group", "batch", "none"):
        raise ValueError(f"scale: expected 'group', 'batch' or 'none', got {scale!r}")
    if not eps >= 0:
        raise ValueError(f"eps: expected a number of at least 0, got {eps}")
    validation.check_floating("rewards", rewards)
    if rewards.ndim != 1:
        raise ValueError(f"rewards: expected shape (B,), got {tuple(rewards.shape)}")
    validation.check_shape("group_ids", group_ids, tuple(rewards.shape), "one group per reward")
    validation.check_device("group_ids", group_ids, rewards.device)
    if group_ids.dtype.is_floating_point or group_ids.dtype == torch.bool:
        raise TypeError(f"group_ids: expected integers, got {group_ids.dtype}")
    name = backends.choose(backend, rewards.device)
    rewards, group_ids = rewards.detach().contiguous(), group_ids.to(torch.int64).contiguous()
    if name == "reference":
        return reference.group_advantages(rewards, group_ids, baseline, scale, eps)
    return ops.group_advantages(rewards, group_ids, baseline, scale, float(eps), name)


def gae(
    rewards: Tensor,  # (B, T)
    values: Tensor,  # (B, T)
    mask: Tensor,  # (B, T)
    *,
    gamma: float = 1.0,
    lam: float = 0.95,
    through_mask: bool = False,
    backend: str | None = None,
) -> tuple[Tensor, Tensor]:
    """Generalized advantage estimation (Schulman et al. 2016, eq. 16) over the tokens of the mask; no gradient.

    Eager equivalent, from the last token of a sequence to its first, `A` and `V_next` starting at 0:
    `A = r + gamma * V_next - V + gamma * lam * A; V_next = V`. The return, which the value function learns, is `A + V`.

    Tokens outside the mask (padding on either side, a tool's answer between two turns) are skipped: the step before
    them bootstraps from the next token of the mask, undiscounted by the gap, as in verl 0.9. With `through_mask` they
    are steps of reward 0 and value 0 that discount, as in OpenRLHF 0.11. A sequence ends with its last token: the
    value after it is 0. A reverse scan on every backend but the reference, one pass over memory.

    Args:
        rewards: `(B, T)` floating point, per token (an outcome reward goes on the last token).
        values: `(B, T)` floating point: the value function at each token, before it is taken.
        mask: `(B, T)`, nonzero where the token counts. Elsewhere rewards and values are never used and may be NaN.
        gamma: discount per token; lam: the lambda of the estimator; both in [0, 1].
        through_mask: discount through the tokens outside the mask instead of skipping them.
        backend: None chooses; "reference", "cpu", "triton" force.

    Returns:
        advantages and returns, each `(B, T)` in fp32 (fp64 where an input is fp64), not whitened, exactly 0 outside the
        mask.

    Raises:
        ValueError, TypeError: gamma or lam out of range, or an argument of the wrong shape, dtype or device.
        RuntimeError: the forced backend does not work on this machine; the message says why.
    """
    for name, x in (("gamma", gamma), ("lam", lam)):
        if not 0 <= x <= 1:
            raise ValueError(f"{name}: expected a number in [0, 1], got {x}")
    validation.check_floating("rewards", rewards)
    validation.check_floating("values", values)
    if rewards.ndim != 2:
        raise ValueError(f"rewards: expected shape (B, T), got {tuple(rewards.shape)}")
    validation.check_shape("values", values, tuple(rewards.shape), "one per token, as rewards")
    if values.device != rewards.device:
        raise ValueError(f"values: expected on {rewards.device}, where rewards is, got {values.device}")
    checked = validation.check_mask(mask, tuple(rewards.shape), rewards.device)
    if checked is None:
        raise ValueError("mask: expected a (B, T) tensor, got None")
    chosen = backends.choose(backend, rewards.device)
    dtype = accumulation_dtype(torch.promote_types(rewards.dtype, values.dtype))
    rewards, values = (x.detach().to(dtype).contiguous() for x in (rewards, values))
    if chosen == "reference":
        return reference.gae(rewards, values, checked, gamma, lam, through_mask)
    return ops.gae(rewards, values, checked.contiguous(), float(gamma), float(lam), through_mask, chosen)
