"""Preference and distillation objectives straight from hidden states, against Liger's fused losses and TRL's on logits.

The truth is plain PyTorch in fp64, whole logits and the paper's formula: it shares nothing with what is timed.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import fastrl
from fastrl.objectives.distillation import linear_distillation_loss
from fastrl.objectives.dpo import PreferenceObjective
from fastrl.objectives.kto import KTOObjective, linear_kto_loss
from fastrl.objectives.pairs import PairObjective
from fastrl.objectives.preference import linear_preference_loss
from fastrl.objectives.reference_free import CPOObjective, ORPOObjective

from .comparisons import Comparison
from .objective_peers import Form, liger_jsd, liger_preference, trl_jsd
from .problems import eager_logps
from .workload import Entry

BETA = 0.1
GAMMA = 0.5  # SimPO's margin
KL = 0.3  # KTO's estimate, of the whole batch
SKEW = 0.5  # beta of the divergence
GROUP = "from hidden states"


def head_comparisons(pairs: int, t: int, d: int, v: int, device: torch.device) -> Iterator[Comparison]:
    """`pairs` chosen answers and as many rejected ones, of t tokens at most; the teacher's states are twice as wide."""
    generator = torch.Generator(device).manual_seed(0)

    def randn(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, device=device)

    b = 2 * pairs
    lengths = torch.randint(t // 2, t + 1, (b, 1), generator=generator, device=device)
    mask = torch.arange(t, device=device) < lengths
    ids = torch.randint(0, v, (b, t), generator=generator, device=device)
    scale = 2.5 / d**0.5  # logits of a standard deviation of 2.5, as those of a trained model
    hidden, weight = randn(b, t, d), scale * randn(v, d)
    policy = {"hidden": hidden, "weight": weight, "labels": torch.where(mask, ids, -100)}
    reference = {"ref_hidden": hidden + 0.05 * randn(b, t, d), "ref_weight": weight + 0.05 * scale * randn(v, d)}
    judged = {"desirable": torch.arange(b, device=device) % 2 == 0, "kl": torch.full((1,), KL, device=device)}
    teacher = {"teacher_hidden": randn(b, t, 2 * d), "teacher_weight": scale / 2**0.5 * randn(v, 2 * d)}
    one = 2.0 * b * t * d * v  # a matrix product of the policy

    def compare(
        title: str, ours: Form, exact: Form, extra: Mapping[str, Tensor], peers: Mapping[str, Any], products: int,
        scored: int,
    ) -> Comparison:  # fmt: skip
        """products: ours; scored: those of the reference or teacher, in units of the policy's."""
        others = (f"{6 + 2 * scored}NDV", (3 + scored) * one)
        return Comparison(
            group=GROUP, title=title, sizes={"N": b * t, "D": d, "V": v, "B": b, "T": t}, inputs={**policy, **extra},
            leaves=("hidden", "weight"), ours=ours, exact=exact, peers=peers,
            floor=_products(hidden.flatten(0, 1), weight, one),
            flops={
                "fastrl": (f"{2 * products + 2 * scored}NDV", (products + scored) * one),
                **dict.fromkeys(("eager PyTorch", *peers), others),
            },
        )  # fmt: skip

    def preference(kind: str, ours: Form, exact: Form, extra: Mapping[str, Tensor], **options: Any) -> Comparison:
        all_at_once = b if kind == "KTO" else pairs
        peers = {
            f"Liger {kind}": partial(liger_preference, kind, beta=BETA, **options),
            f"Liger {kind}, one chunk": partial(liger_preference, kind, beta=BETA, chunk_size=all_at_once, **options),
        }
        # Ours takes two passes: a pair's coefficient needs all of its tokens. Liger holds a chunk of pairs.
        return compare(kind, ours, exact, extra, peers, 4, 1 if extra else 0)

    yield preference("DPO", _dpo, _exact_dpo, reference, use_ref_model=True)
    yield preference("ORPO", partial(_pairs, ORPOObjective(beta=BETA)), _exact_orpo, {})
    yield preference("CPO", partial(_pairs, CPOObjective(beta=BETA)), _exact_cpo, {})
    simpo = CPOObjective(loss_type="simpo", beta=BETA, simpo_gamma=GAMMA, cpo_alpha=0.0)
    yield preference("SimPO", partial(_pairs, simpo), _exact_simpo, {}, compute_nll_loss=False, gamma=GAMMA)
    yield preference("KTO", _kto, _exact_kto, {**reference, **judged}, use_ref_model=True)
    jsd = {
        "Liger JSD": partial(liger_jsd, SKEW),
        "TRL generalized_jsd_loss": partial(trl_jsd, SKEW),
    }
    yield compare("generalised JSD", _jsd, _exact_jsd, teacher, jsd, 3, 2)


def _products(x: Tensor, weight: Tensor, one: float) -> Entry:
    logits, dx, dw = x.new_empty(x.shape[0], weight.shape[0]), torch.empty_like(x), torch.empty_like(weight)

    @torch.no_grad()
    def run() -> Mapping[str, Tensor]:
        torch.mm(x, weight.t(), out=logits)
        torch.mm(logits, weight, out=dx)
        torch.mm(logits.t(), x, out=dw)
        return {}

    return Entry("three bare GEMMs", run, "6NDV", 3 * one)


_DPO = PreferenceObjective(beta=BETA)
_KTO = KTOObjective(beta=BETA)


# Ours ---------------------------------------------------------------------------------------------------------------


def _pairs(
    objective: PairObjective, hidden: Tensor, weight: Tensor, labels: Tensor, ref_logps: Tensor | None = None
) -> Tensor:
    return linear_preference_loss(hidden, weight, labels, objective, mask=labels != -100, ref_logps=ref_logps).loss


def _reference(labels: Tensor, ref_hidden: Tensor, ref_weight: Tensor) -> Tensor:
    with torch.no_grad():
        return fastrl.linear_logprobs(ref_hidden, ref_weight, labels, mask=labels != -100).logps


def _dpo(hidden: Tensor, weight: Tensor, labels: Tensor, **reference: Tensor) -> Tensor:
    return _pairs(_DPO, hidden, weight, labels, _reference(labels, **reference))


def _kto(hidden: Tensor, weight: Tensor, labels: Tensor, desirable: Tensor, kl: Tensor, **reference: Tensor) -> Tensor:
    return linear_kto_loss(
        hidden, weight, labels, _KTO, labels=desirable, mask=labels != -100, kl=kl[0],
        ref_logps=_reference(labels, **reference),
    ).loss  # fmt: skip


def _jsd(hidden: Tensor, weight: Tensor, teacher_hidden: Tensor, teacher_weight: Tensor, labels: Tensor) -> Tensor:
    return linear_distillation_loss(
        hidden, weight, teacher_hidden, teacher_weight, kind="jsd", beta=SKEW, mask=labels != -100
    ).loss


# The truth ----------------------------------------------------------------------------------------------------------


def _sums(hidden: Tensor, weight: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Sum of each answer's log-probabilities, and its number of tokens."""
    mask = labels != -100
    logps = eager_logps(hidden, weight, torch.where(mask, labels, 0))
    return torch.where(mask, logps, 0).sum(-1), mask.sum(-1)


def _nll(sums: Tensor, counts: Tensor) -> Tensor:
    chosen = slice(sums.shape[0] // 2)
    return -sums[chosen].sum() / counts[chosen].sum()


def _margin(x: Tensor) -> Tensor:
    chosen, rejected = x.chunk(2)
    return chosen - rejected


def _exact_dpo(hidden: Tensor, weight: Tensor, labels: Tensor, ref_hidden: Tensor, ref_weight: Tensor) -> Tensor:
    with torch.no_grad():
        reference, _ = _sums(ref_hidden, ref_weight, labels)
    return -F.logsigmoid(BETA * _margin(_sums(hidden, weight, labels)[0] - reference)).mean()


def _exact_orpo(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    sums, counts = _sums(hidden, weight, labels)
    means = sums / counts
    odds = means - torch.log1p(-means.exp())
    return _nll(sums, counts) - BETA * F.logsigmoid(_margin(odds)).mean()


def _exact_cpo(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    sums, counts = _sums(hidden, weight, labels)
    return _nll(sums, counts) - F.logsigmoid(BETA * _margin(sums)).mean()


def _exact_simpo(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    sums, counts = _sums(hidden, weight, labels)
    return -F.logsigmoid(BETA * _margin(sums / counts) - GAMMA).mean()


def _exact_kto(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    ref_hidden: Tensor,
    ref_weight: Tensor,
    desirable: Tensor,
    kl: Tensor,
) -> Tensor:
    with torch.no_grad():
        reference, _ = _sums(ref_hidden, ref_weight, labels)
    gain = BETA * (_sums(hidden, weight, labels)[0] - reference - kl)
    return torch.sigmoid(torch.where(desirable, -gain, gain)).mean()


def _exact_jsd(
    hidden: Tensor, weight: Tensor, teacher_hidden: Tensor, teacher_weight: Tensor, labels: Tensor
) -> Tensor:
    log_p = (hidden @ weight.t()).log_softmax(-1)
    log_q = (teacher_hidden @ teacher_weight.t()).log_softmax(-1)
    p, q = log_p.exp(), log_q.exp()
    log_m = (SKEW * q + (1 - SKEW) * p).log()
    divergence = SKEW * (q * (log_q - log_m)).sum(-1) + (1 - SKEW) * (p * (log_p - log_m)).sum(-1)
    mask = labels != -100
    return torch.where(mask, divergence, 0).sum() / mask.sum()
