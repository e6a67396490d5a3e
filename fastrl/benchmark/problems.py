"""Inputs of the benchmarks and checks at the LM head, plain PyTorch forms of the losses, and their fp64 truth."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

import fastrl

DAPO = fastrl.PolicyObjective(loss_type="dapo")


@dataclass
class Problem:
    """One batch of an RL step at the LM head."""

    hidden: Tensor  # (B, T, D)
    weight: Tensor  # (V, D)
    ids: Tensor  # (B, T)
    advantages: Tensor  # (B,)
    mask: Tensor  # (B, T) bool
    old_logps: Tensor  # (B, T) fp32
    ref_logps: Tensor  # (B, T) fp32

    @property
    def sizes(self) -> tuple[int, int, int]:
        """N, D, V."""
        return self.ids.numel(), self.hidden.shape[-1], self.weight.shape[0]

    @property
    def live_tokens(self) -> int:
        """Tokens whose advantage is not zero."""
        return int(((self.advantages != 0).unsqueeze(-1) & self.mask).sum())

    def with_live_share(self, share: float) -> Problem:
        """The same batch with all but about `share` of the sequences at advantage zero, scattered over the batch."""
        b = self.advantages.numel()
        order = torch.randperm(b, generator=torch.Generator().manual_seed(0)).to(self.advantages.device)
        advantages = torch.where(self.advantages == 0, 1.0, self.advantages)
        advantages[order[max(1, round(share * b)) :]] = 0.0
        return replace(self, advantages=advantages)

    def leaves(self, frozen_weight: bool = False) -> tuple[Tensor, Tensor]:
        """Fresh differentiable hidden and weight."""
        return self.hidden.detach().requires_grad_(), self.weight.detach().requires_grad_(not frozen_weight)

    def policy(self, logps: Tensor, objective: fastrl.PolicyObjective = DAPO, entropy: Tensor | None = None) -> Tensor:
        """The loss of this batch on given log-probabilities (and entropies), in their dtype."""
        return fastrl.policy_loss(
            logps, objective, advantages=self.advantages, mask=self.mask, old_logps=self.old_logps.to(logps.dtype),
            ref_logps=self.ref_logps.to(logps.dtype) if objective.beta else None, entropy=entropy,
        ).loss  # fmt: skip


@dataclass
class Truth:
    """fp64 results of a problem."""

    loss: Tensor
    logps: Tensor  # (B, T)
    hidden_grad: Tensor  # (B, T, D)
    weight_grad: Tensor | None  # (V, D); None for a frozen head


def make_problem(
    b: int, t: int, d: int, v: int, dtype: torch.dtype, device: torch.device, live_share: float = 1.0, seed: int = 0
) -> Problem:
    """Random logits of standard deviation 2.5 (a trained model's are alike); the sampling policy was close to this one.

    Ratios are exp(0.1 randn), so that some tokens are clipped; the reference differs as much.
    """
    generator = torch.Generator(device).manual_seed(seed)

    def randn(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, device=device, dtype=torch.float32)

    weight = randn(v, d).mul_(2.5 / d**0.5).to(dtype)
    noise = 0.1 * randn(2, b, t).double()
    problem = Problem(
        hidden=randn(b, t, d).to(dtype),
        weight=weight,
        ids=torch.randint(0, v, (b, t), generator=generator, device=device),
        advantages=randn(b),
        mask=torch.ones(b, t, dtype=torch.bool, device=device),
        old_logps=noise[0].float(),
        ref_logps=noise[1].float(),
    )
    logps = _plain_logps(problem)
    problem.old_logps, problem.ref_logps = (noise[0] + logps).float(), (noise[1] + logps).float()
    return problem if live_share == 1 else problem.with_live_share(live_share)


def eager_logps(hidden: Tensor, weight: Tensor, ids: Tensor) -> Tensor:
    """What a trainer without a fused loss runs: all the logits, then log-softmax in fp32 (fp64 for fp64)."""
    logits = torch.nn.functional.linear(hidden, weight)
    logits = logits if logits.dtype == torch.float64 else logits.float()
    return logits.log_softmax(-1).gather(-1, ids.unsqueeze(-1)).squeeze(-1)


def eager_logps_and_entropy(hidden: Tensor, weight: Tensor, ids: Tensor) -> tuple[Tensor, Tensor]:
    """The same with the entropy of each token's distribution."""
    logits = torch.nn.functional.linear(hidden, weight)
    log_p = (logits if logits.dtype == torch.float64 else logits.float()).log_softmax(-1)
    return log_p.gather(-1, ids.unsqueeze(-1)).squeeze(-1), -(log_p.exp() * log_p).sum(-1)


@torch.no_grad()
def _plain_logps(problem: Problem) -> Tensor:
    """`eager_logps` of the whole batch, in pieces."""
    hidden, ids = problem.hidden.flatten(0, 1), problem.ids.flatten()
    parts = [eager_logps(hidden[rows], problem.weight, ids[rows]) for rows in _row_chunks(problem)]
    return torch.cat(parts).view(problem.ids.shape)


def _row_chunks(problem: Problem) -> list[slice]:
    n, _, v = problem.sizes
    rows = max(1, 2**27 // v)  # 1 GiB of fp64 logits
    return [slice(i, min(i + rows, n)) for i in range(0, n, rows)]


def _column_blocks(problem: Problem) -> list[slice]:
    _, d, v = problem.sizes
    columns = max(1, 2**25 // d)  # 256 MiB of fp64 weight: the whole of a large head does not fit twice
    return [slice(i, min(i + columns, v)) for i in range(0, v, columns)]


def _exact_logits(problem: Problem, rows: slice) -> Tensor:
    hidden = problem.hidden.flatten(0, 1)[rows].double()
    return torch.cat([hidden @ problem.weight[c].double().T for c in _column_blocks(problem)], dim=1)


@torch.no_grad()
def exact_logps(problem: Problem) -> Tensor:
    """fp64 log-probabilities (B, T) of the problem's (rounded) inputs."""
    return exact_logps_and_entropy(problem, entropy=False)[0]


@torch.no_grad()
def exact_logps_and_entropy(problem: Problem, entropy: bool = True) -> tuple[Tensor, Tensor | None]:
    """fp64 log-probabilities and entropies (B, T)."""
    logps, entropies = [], []
    for rows in _row_chunks(problem):
        log_p = _exact_logits(problem, rows).log_softmax(-1)
        logps.append(log_p.gather(-1, problem.ids.flatten()[rows].unsqueeze(-1)).squeeze(-1))
        if entropy:
            entropies.append(-(log_p.exp() * log_p).sum(-1))
    shape = problem.ids.shape
    return torch.cat(logps).view(shape), torch.cat(entropies).view(shape) if entropy else None


def exact(
    problem: Problem, objective: fastrl.PolicyObjective = DAPO, *, nll: bool = False, frozen_weight: bool = False
) -> Truth:
    """fp64 loss, log-probabilities and gradients: autograd over plain PyTorch, in blocks that fit in memory.

    `nll`: of the mean negative log-likelihood instead of the objective.
    """
    with_entropy = objective.entropy_coef != 0 and not nll
    logps, entropy = exact_logps_and_entropy(problem, with_entropy)
    leaves = [x.requires_grad_() for x in (logps, entropy) if x is not None]
    loss = -logps.mean() if nll else problem.policy(logps, objective, entropy)
    upstream = torch.autograd.grad(loss, leaves)
    n, d, v = problem.sizes
    hidden, ids = problem.hidden.flatten(0, 1), problem.ids.flatten()
    hidden_grad = torch.zeros(n, d, dtype=torch.float64, device=hidden.device)
    weight_grad = None if frozen_weight else torch.zeros(v, d, dtype=torch.float64, device=hidden.device)
    for rows in _row_chunks(problem):
        logits = _exact_logits(problem, rows).requires_grad_()
        log_p = logits.log_softmax(-1)
        outputs = [log_p.gather(-1, ids[rows].unsqueeze(-1)).squeeze(-1)]
        outputs += [-(log_p.exp() * log_p).sum(-1)] * with_entropy
        total = sum((g.flatten()[rows] * y).sum() for g, y in zip(upstream, outputs, strict=True))
        (d_logits,) = torch.autograd.grad(total, logits)  # type: ignore[arg-type]
        for columns in _column_blocks(problem):
            hidden_grad[rows] += d_logits[:, columns] @ problem.weight[columns].double()
            if weight_grad is not None:
                weight_grad[columns] += d_logits[:, columns].T @ hidden[rows].double()
    return Truth(loss.detach(), logps.detach(), hidden_grad.view(problem.hidden.shape), weight_grad)


def relative_error(x: Tensor, truth: Tensor) -> float:
    """Distance in the 2-norm, relative to the truth; of a scalar loss, whose terms cancel, relative to at least 1.

    Infinite where the shapes differ or x holds a NaN. Read in slices: the fp64 copy of a large gradient is never made.
    """
    if x.shape != truth.shape:
        return float("inf")
    x, truth = x.detach().reshape(-1), truth.reshape(-1)
    gap = size = 0.0
    for start in range(0, x.numel(), 2**26):
        part = slice(start, start + 2**26)
        gap += (x[part].double() - truth[part]).square().sum().item()
        size += truth[part].double().square().sum().item()
    distance = gap**0.5 / max(size**0.5, 1.0 if x.numel() == 1 else 1e-30)
    return distance if distance == distance else float("inf")
