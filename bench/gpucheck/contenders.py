"""The floor, ours, and the peers, each as one function from a problem to log-probabilities or a loss.

A peer that can't be imported, or can't run here, is listed with the reason; nothing stands in for it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

import fastrl

from .problems import DAPO, Problem, eager_logps
from .record import Settings

Logps = Callable[[Tensor, Tensor, Problem], Tensor]  # (hidden, weight, problem) -> logps (B, T)
Loss = Callable[[Tensor, Tensor, Problem], Tensor]  # (hidden, weight, problem) -> loss


@dataclass
class Contender:
    """One row of the benchmark."""

    name: str
    logps: Logps | None = None  # scoring; and the loss, through policy_loss, unless `loss` is given
    loss: Loss | None = None
    loss_flops: str = "6NDV"  # formula of the forward and backward; n is the number of live rows, N of all
    score_flops: str = "2NDV"
    absent: str | None = None  # why it can't run here

    def evaluate(self, hidden: Tensor, weight: Tensor, problem: Problem) -> Tensor:
        """The loss of the problem, with a graph."""
        if self.loss is not None:
            return self.loss(hidden, weight, problem)
        if self.logps is None:
            raise ValueError(f"{self.name} has no loss")
        return problem.policy(self.logps(hidden, weight, problem))


def ours(settings: Settings) -> Contender:
    def logps(hidden: Tensor, weight: Tensor, p: Problem) -> Tensor:
        return fastrl.linear_logprobs(hidden, weight, p.ids, backend=settings.backend).logps

    def loss(hidden: Tensor, weight: Tensor, p: Problem) -> Tensor:
        return fastrl.linear_policy_loss(
            hidden, weight, p.ids, DAPO, advantages=p.advantages, mask=p.mask, old_logps=p.old_logps,
            backend=settings.backend,
        ).loss  # fmt: skip

    return Contender("fastrl", logps, loss, "6nDV")


def ours_two_pass(settings: Settings) -> Contender:
    return Contender("fastrl, two pass", ours(settings).logps, None, "(2N + 6n)DV")


def eager(settings: Settings) -> Contender:
    return Contender("eager PyTorch", lambda h, w, p: eager_logps(h, w, p.ids))


def compiled(settings: Settings) -> Contender:
    if settings.tiny:
        return Contender("torch.compile", absent="not in --tiny: compiling takes longer than everything else")
    function = torch.compile(eager_logps, dynamic=False)
    return Contender("torch.compile", lambda h, w, p: function(h, w, p.ids))


def torch_linear_cross_entropy(settings: Settings) -> Contender:
    name = "F.linear_cross_entropy"
    function = getattr(torch.nn.functional, "linear_cross_entropy", None)
    options = getattr(torch.nn, "LinearCrossEntropyOptions", None)
    if function is None or options is None:
        return Contender(name, absent=f"torch {torch.__version__} does not have it (2.13 does)")

    def logps(hidden: Tensor, weight: Tensor, p: Problem) -> Tensor:
        nll = function(hidden.flatten(0, 1), weight, p.ids.flatten(), reduction="none", options=options())
        return -nll.view(p.ids.shape)

    return Contender(name, logps, loss_flops="8NDV")


def trl(settings: Settings) -> Contender:
    name = "TRL ChunkedLogProbFunction"
    try:
        from trl.kernels import ChunkedLogProbFunction
    except ImportError as error:
        return Contender(name, absent=f"trl.kernels can't be imported: {error}")

    def logps(hidden: Tensor, weight: Tensor, p: Problem) -> Tensor:
        # As trl.trainer.utils calls it: 32768 columns at a time, no optional outputs.
        arguments = (hidden.flatten(0, 1), weight, None, p.ids.flatten(), 1.0, 32768, None, 1.0, ())
        return ChunkedLogProbFunction.apply(*arguments)[0].view(p.ids.shape)

    return Contender(name, logps, loss_flops="8NDV")


def liger(settings: Settings) -> Contender:
    name = "Liger FusedLinearGRPOLoss"
    try:
        from liger_kernel.chunked_loss import LigerFusedLinearGRPOLoss
    except ImportError as error:
        return Contender(name, absent=f"liger_kernel can't be imported: {error}")
    function = LigerFusedLinearGRPOLoss(beta=0.0, use_ref_model=False, loss_type="dapo", compiled=not settings.tiny)

    def loss(hidden: Tensor, weight: Tensor, p: Problem) -> Tensor:
        return function(
            hidden, weight, p.ids, p.mask.long(), p.advantages, old_per_token_logps=p.old_logps
        )[0]  # fmt: skip

    return Contender(name, None, loss)


def cce(settings: Settings) -> Contender:
    name = "cut-cross-entropy"
    if not settings.on_gpu:
        return Contender(name, absent="runs on GPUs only")
    try:
        from cut_cross_entropy import linear_cross_entropy
    except ImportError as error:
        return Contender(name, absent=f"cut_cross_entropy can't be imported: {error}")

    def logps(hidden: Tensor, weight: Tensor, p: Problem) -> Tensor:
        # filter_eps=None: by default it drops small gradients, which is another result.
        nll = linear_cross_entropy(hidden.flatten(0, 1), weight, p.ids.flatten(), reduction="none", filter_eps=None)
        return -nll.float().view(p.ids.shape)

    return Contender(name, logps, loss_flops="8NDV")


PEERS = (eager, compiled, torch_linear_cross_entropy, trl, liger, cce)


def flops(formula: str, problem: Problem) -> float:
    """The value of one of the formulas above."""
    n_all, d, v = problem.sizes
    live = int(((problem.advantages != 0).unsqueeze(-1) & problem.mask).sum())
    factors = {"2NDV": 2 * n_all, "6NDV": 6 * n_all, "8NDV": 8 * n_all, "6nDV": 6 * live,
               "(2N + 6n)DV": 2 * n_all + 6 * live}  # fmt: skip
    return float(factors[formula]) * d * v


def gemm_floor(problem: Problem, backward: bool) -> Callable[[], None]:
    """The bare matrix products of the loss (three) or of scoring (one), whole, into buffers that are there already."""
    x = problem.hidden.flatten(0, 1)
    n, d, v = problem.sizes
    logits, dx, dw = x.new_empty(n, v), x.new_empty(n, d), x.new_empty(v, d)

    def run() -> None:
        torch.mm(x, problem.weight.t(), out=logits)
        if backward:
            torch.mm(logits, problem.weight, out=dx)
            torch.mm(logits.t(), x, out=dw)

    return run
