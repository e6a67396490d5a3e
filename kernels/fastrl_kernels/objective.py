"""What an objective is to the kernels: a function of the per-token statistics of some tokens, and constants of them."""

from __future__ import annotations

import itertools
import math
import weakref
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor


@dataclass(frozen=True)
class TokenBatch:
    """Per-token inputs of an objective, all of one shape `[...]`: `[B, T]` or packed `[N]` from a trainer, `[n]` inside
    a chunk.

    In a padded batch `advantages`, `gate` and `importance_ratio` may also be `[B, 1]`. Everything but `logps` and
    `entropy` is constant. What follows `mask` is for objectives that are not token-local: inside a chunk it is unset.
    """

    logps: Tensor  # log-probability of the taken token under the policy
    entropy: Tensor | None  # entropy of the policy at this position, in nats
    advantages: Tensor
    old_logps: Tensor | None = None  # None: the policy that sampled is this one, the ratio is 1
    ref_logps: Tensor | None = None
    gate: Tensor | None = None  # factor of the policy term: rollout-mismatch ratio times any token mask
    mask: Tensor | None = None  # bool; None where every token counts (inside a chunk)
    sequences: Any = None  # how the tokens form sequences, as the objective knows it; None: rows of a padded batch
    per_sequence: bool = False  # advantages hold one value for all tokens of a sequence
    importance_ratio: Tensor | None = None  # the rollout-mismatch ratio, where it is not a factor and not in the gate
    selected: Tensor | None = None  # bool: the tokens that a statistic of the whole batch has picked
    ratio: Tensor | None = None  # the importance ratio, where it is known already


class TokenObjective(Protocol):
    """A token-local objective: the loss of a token depends on its own logp and entropy and on constants only.

    It may also have an attribute `kernel_spec: PolicySpec | None`. Where that is not None, a backend's `policy_terms`
    stands in for `token_loss` and its gradient.
    """

    def token_loss(self, tokens: TokenBatch) -> Tensor:
        """Per-token loss `[...]`, before aggregation weights and without the entropy bonus."""
        ...


@dataclass(frozen=True)
class PolicySpec:
    """The numbers of a clipped policy objective: all that a backend's `policy_terms` is told of it."""

    low: float  # the ratio is clipped to [low, high]
    high: float
    delta: float  # upper bound of the unclipped ratio; inf for none
    beta: float  # weight of the KL term; 0: it is not computed
    kl_estimator: str  # "k1", "k2" or "k3"
    kl_times_ratio: bool
    sequence: bool  # one ratio per row, from the row's mean log-ratio, instead of one per token


# Policy terms of the CPU's second kernel, in its order; see `fastrl.objectives.surrogates` for the formulas.
SURROGATES = (
    "clipped", "truncated", "likelihood", "soft", "quadratic", "variation", "divergence", "penalised", "gamma",
    "geometric",
)  # fmt: skip
# What a token's ratio is made of: its log-ratio; its row's mean, with the gradient of the token's own; its row's sum.
LEVELS = ("token", "row_mean", "row_sum")


@dataclass(frozen=True)
class SurrogateSpec:
    """The numbers of a policy term that needs its own row at most: all that `cpu.surrogate_terms` is told of it."""

    surrogate: str  # one of SURROGATES
    low: float  # the ratio is clipped to [low, high]; "variation", "divergence": largest step down and up
    high: float  # "geometric": the log-ratio is
    cap: float = math.inf  # of the ratio where the advantage is negative ("clipped"), or anywhere (those two)
    log_bounds: tuple[float, float] = (-math.inf, math.inf)  # of the log-ratio, without a gradient beyond them
    level: str = "token"  # one of LEVELS; "row_sum" goes with "clipped" only
    temperatures: tuple[float, float] = (1.0, 1.0)  # "soft": where the advantage is positive, and where not
    coef: float = 0.0  # "quadratic", "penalised"
    gammas: tuple[float, float, float, float] = (0.0, 0.0, 0.0, 0.0)  # "gamma": k, lambda where A >= 0, then elsewhere
    length_eps: float = 0.0  # "geometric": added to the length of a row
    reads_padding: bool = False  # "gamma": the importance ratios outside the mask count too
    moved: bool = True  # a token of advantage 0 or gate 0 carries no gradient


class TermSums(NamedTuple):
    """Sums over each row of a batch, (B,) in fp64, from which the loss and all metrics follow."""

    policy: Tensor  # weighted loss of the scored tokens, without the entropy bonus
    bonus: Tensor  # weighted entropy
    kl: Tensor  # KL of the scored tokens, before weights; 0 where beta is
    entropy: Tensor
    scored: Tensor  # number of scored tokens
    counted: Tensor  # number of tokens of the whole mask
    live: Tensor
    low: Tensor  # scored tokens clipped from below; for one ratio and advantage per row: 1 if it is clipped
    high: Tensor


class SurrogateSums(NamedTuple):
    """What `cpu.surrogate_terms` adds to the columns of `TermSums` (bonus and kl are 0 there)."""

    outside: Tensor  # scored tokens whose ratio is outside the bounds, whatever their advantage
    capped: Tensor  # "geometric": outside of negative advantage, where `outside` has the positive ones
    log_ratio: Tensor  # sum over the scored tokens, within log_bounds; "penalised": of absolute values
    drift: Tensor  # the same without bounds
    selected: Tensor  # scored tokens of `TokenBatch.selected`
    phi: Tensor  # "gamma": sum of the weights of the scored tokens; for one advantage per row: the row's weight


class SurrogateTerms(NamedTuple):
    """What `cpu.surrogate_terms` returns."""

    totals: list[float]  # of all rows: the columns of `TermSums` and of `SurrogateSums`, then of the rows that have a
    #   token the smallest share that is clipped from below and the largest from above; NaN where there is none
    grad_logps: Tensor | None  # (B, T) gradient of the loss
    logps: Tensor  # (B, T), 0 where not scored


class PolicyTerms(NamedTuple):
    """What a backend's `policy_terms` returns; None for what was not asked for."""

    terms: Tensor | None  # (B, T) contribution of each token to the loss; 0 where it is not scored
    grad_logps: Tensor | None  # (B, T) gradient of the sum of the terms
    grad_entropy: Tensor | None  # (B, T); also None without a bonus
    sums: Tensor | None  # (B, 9) fp64, the columns of TermSums


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


def weighted_terms(
    objective: TokenObjective,
    tokens: TokenBatch,
    weight: Tensor,  # aggregation weight of each token's loss
    entropy_weight: Tensor | None,  # weight of each token's entropy in the bonus, or None for no bonus
) -> Tensor:
    """Contribution of each token to the loss, from the objective's one definition; 0 where it is not scored."""
    terms = objective.token_loss(tokens) * weight
    if entropy_weight is not None and tokens.entropy is not None:
        terms = terms - entropy_weight * tokens.entropy
    return terms if tokens.mask is None else torch.where(tokens.mask, terms, 0.0)


def coefficients(
    objective: TokenObjective,
    tokens: TokenBatch,  # [n] vectors
    weight: Tensor,  # (n,)
    entropy_weight: Tensor | None,  # (n,)
    kernel: Callable[..., PolicyTerms] | None = None,  # a backend's policy_terms
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Contribution of each token of a chunk to the loss, and the gradient of their sum in logps and in entropy.

    One launch of `kernel` for an objective that has a `kernel_spec`; else the objective's definition under autograd.
    """
    spec: PolicySpec | None = getattr(objective, "kernel_spec", None)
    if kernel is not None and spec is not None:
        row = replace(tokens, **{k: x.unsqueeze(0) for k, x in vars(tokens).items() if isinstance(x, Tensor)})  # type: ignore[arg-type]
        bonus = None if entropy_weight is None else entropy_weight.unsqueeze(0)
        made = kernel(spec, row, weight.unsqueeze(0), bonus, sums=False)
        assert made.terms is not None and made.grad_logps is not None  # they were asked for
        return made.terms[0], made.grad_logps[0], None if made.grad_entropy is None else made.grad_entropy[0]
    with _autograd_enabled_here(), torch.enable_grad():
        logps = tokens.logps.detach().requires_grad_()
        entropy = None if tokens.entropy is None else tokens.entropy.detach().requires_grad_()
        terms = weighted_terms(objective, replace(tokens, logps=logps, entropy=entropy), weight, entropy_weight)
        inputs = [logps] if entropy is None else [logps, entropy]
        grads = torch.autograd.grad(terms.sum(), inputs, allow_unused=True)
    grad_logps = torch.zeros_like(logps) if grads[0] is None else grads[0]
    return terms.detach(), grad_logps.detach(), None if entropy is None or grads[1] is None else grads[1].detach()
