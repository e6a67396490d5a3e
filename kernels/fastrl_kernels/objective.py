"""What an objective is to the kernels: a function of the per-token statistics of some tokens, and constants of them."""

from __future__ import annotations

import itertools
import weakref
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor


@dataclass(frozen=True)
class TokenBatch:
    """Per-token inputs of an objective, all of one shape `[...]`: `[B, T]` from a trainer, `[n]` inside a chunk.

    `advantages` and `gate` may also be `[B, 1]`. Everything but `logps` and `entropy` is constant.
    """

    logps: Tensor  # log-probability of the taken token under the policy
    entropy: Tensor | None  # entropy of the policy at this position, in nats
    advantages: Tensor
    old_logps: Tensor | None = None  # None: the policy that sampled is this one, the ratio is 1
    ref_logps: Tensor | None = None
    gate: Tensor | None = None  # factor of the policy term: rollout-mismatch ratio times any token mask
    mask: Tensor | None = None  # bool; None where every token counts (inside a chunk)


class TokenObjective(Protocol):
    """A token-local objective: the loss of a token depends on its own logp and entropy and on constants only."""

    def token_loss(self, tokens: TokenBatch) -> Tensor:
        """Per-token loss `[...]`, before aggregation weights and without the entropy bonus."""
        ...


_counter = itertools.count()
_objectives: weakref.WeakValueDictionary[str, TokenObjective] = weakref.WeakValueDictionary()


def register_objective(objective: TokenObjective) -> str:
    """A handle under which an operator finds the objective again (operators take tensors, numbers and strings only)."""
    handle = f"{type(objective).__name__}-{next(_counter)}"
    _objectives[handle] = objective
    return handle


def find_objective(handle: str) -> TokenObjective:
    """The objective behind a handle.

    Raises:
        LookupError: the objective was garbage-collected; keep it alive as long as a graph that uses it.
    """
    try:
        return _objectives[handle]
    except KeyError:
        raise LookupError(
            f"objective {handle!r} no longer exists; keep a reference to it while its loss is in use"
        ) from None


def _autograd_enabled_here() -> torch._C._ForceDispatchKeyGuard:
    """Lets autograd record inside an operator's implementation, which runs with the autograd dispatch keys excluded."""
    keys = torch._C.DispatchKey
    excluded = torch._C._dispatch_tls_local_exclude_set()
    for key in (
        keys.AutogradFunctionality,
        keys.AutogradOther,
        keys.AutogradCPU,
        keys.AutogradCUDA,
        keys.ADInplaceOrView,
    ):
        excluded = excluded.remove(key)
    return torch._C._ForceDispatchKeyGuard(torch._C._dispatch_tls_local_include_set(), excluded)


def coefficients(
    objective: TokenObjective,
    tokens: TokenBatch,  # [n] vectors
    weight: Tensor,  # (n,) aggregation weight of each token's loss
    entropy_weight: Tensor | None,  # (n,) weight of each token's entropy in the bonus, or None for no bonus
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Contribution of each token to the loss, and the gradient of their sum with respect to logps and entropy.

    Runs the objective's one definition under autograd, on vectors of one chunk.
    """
    with _autograd_enabled_here(), torch.enable_grad():
        logps = tokens.logps.detach().requires_grad_()
        entropy = None if tokens.entropy is None else tokens.entropy.detach().requires_grad_()
        live = TokenBatch(logps, entropy, tokens.advantages, tokens.old_logps, tokens.ref_logps, tokens.gate)
        terms = objective.token_loss(live) * weight
        if entropy_weight is not None and entropy is not None:
            terms = terms - entropy_weight * entropy
        inputs = [logps] if entropy is None else [logps, entropy]
        grads = torch.autograd.grad(terms.sum(), inputs, allow_unused=True)
    grad_logps = torch.zeros_like(logps) if grads[0] is None else grads[0]
    return terms.detach(), grad_logps.detach(), None if entropy is None or grads[1] is None else grads[1].detach()
