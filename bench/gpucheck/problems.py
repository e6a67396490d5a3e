"""Inputs of the checks and benchmarks, plain PyTorch forms of the losses, and their fp64 truth in chunks of rows."""

from __future__ import annotations

from dataclasses import dataclass

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
    mask: Tensor  # (B, T)
    old_logps: Tensor  # (B, T)

    @property
    def sizes(self) -> tuple[int, int, int]:
        """N, D, V."""
        return self.ids.numel(), self.hidden.shape[-1], self.weight.shape[0]

    def leaves(self, frozen_weight: bool = False) -> tuple[Tensor, Tensor]:
        """Fresh differentiable hidden and weight."""
        return self.hidden.detach().requires_grad_(), self.weight.detach().requires_grad_(not frozen_weight)

    def policy(self, logps: Tensor, objective: fastrl.PolicyObjective = DAPO) -> Tensor:
        """The loss of this batch on given log-probabilities, in their dtype."""
        out = fastrl.policy_loss(
            logps, objective, advantages=self.advantages, mask=self.mask, old_logps=self.old_logps.to(logps.dtype)
        )
        return out.loss


@dataclass
class Truth:
    """fp64 results of a problem."""

    loss: Tensor
    logps: Tensor
    hidden_grad: Tensor
    weight_grad: Tensor


def make_problem(
    b: int, t: int, d: int, v: int, dtype: torch.dtype, device: torch.device, dead: float = 0.0, seed: int = 0
) -> Problem:
    """Random logits of standard deviation 2.5 (a trained model's are alike); `dead` is the share of zero advantages."""
    generator = torch.Generator(device).manual_seed(seed)

    def randn(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, device=device, dtype=torch.float32)

    weight = (randn(v, d) * (2.5 / d**0.5)).to(dtype)
    advantages = randn(b)
    advantages[: round(dead * b)] = 0.0
    problem = Problem(
        hidden=randn(b, t, d).to(dtype),
        weight=weight,
        ids=torch.randint(0, v, (b, t), generator=generator, device=device),
        advantages=advantages,
        mask=torch.ones(b, t, dtype=torch.bool, device=device),
        old_logps=randn(b, t),
    )
    # The sampling policy was close to this one: ratios of exp(0.1 randn), some of them clipped.
    problem.old_logps = (0.1 * problem.old_logps.double() + exact_logps(problem)).float()
    return problem


def eager_logps(hidden: Tensor, weight: Tensor, ids: Tensor) -> Tensor:
    """What a trainer without a fused loss runs: all the logits, then log-softmax in fp32 (fp64 for fp64)."""
    logits = torch.nn.functional.linear(hidden, weight)
    logits = logits if logits.dtype == torch.float64 else logits.float()
    return logits.log_softmax(-1).gather(-1, ids.unsqueeze(-1)).squeeze(-1)


def _row_chunks(problem: Problem) -> list[slice]:
    n, _, v = problem.sizes
    rows = max(1, 2**28 // v)  # 2 GiB of fp64 logits
    return [slice(i, min(i + rows, n)) for i in range(0, n, rows)]


@torch.no_grad()
def exact_logps(problem: Problem) -> Tensor:
    """fp64 log-probabilities (B, T) of the problem's (rounded) inputs."""
    hidden, weight = problem.hidden.flatten(0, 1), problem.weight.double()
    parts = [eager_logps(hidden[r].double(), weight, problem.ids.flatten()[r]) for r in _row_chunks(problem)]
    return torch.cat(parts).view_as(problem.ids)


def exact(problem: Problem, objective: fastrl.PolicyObjective = DAPO) -> Truth:
    """fp64 loss, log-probabilities and gradients: autograd over plain PyTorch, chunked by rows to fit in memory."""
    logps = exact_logps(problem).requires_grad_()
    loss = problem.policy(logps, objective)
    (upstream,) = torch.autograd.grad(loss, logps)
    weight = problem.weight.double().requires_grad_()
    hidden = problem.hidden.flatten(0, 1)
    parts = []
    for rows in _row_chunks(problem):
        x = hidden[rows].double().requires_grad_()
        part = eager_logps(x, weight, problem.ids.flatten()[rows])
        (part * upstream.flatten()[rows]).sum().backward()
        parts.append(x.grad)
    hidden_grad = torch.cat([p for p in parts if p is not None]).view(problem.hidden.shape)
    if weight.grad is None:
        raise RuntimeError("the fp64 truth has no weight gradient")
    return Truth(loss.detach(), logps.detach(), hidden_grad, weight.grad)
