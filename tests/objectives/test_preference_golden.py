"""Numbers that TRL 1.16's and OpenRLHF 0.11.2's own code computed: DPO and kin, KTO, CPO, ORPO, TPO."""

from __future__ import annotations

import json
import math
from collections import defaultdict
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from fastrl.objectives.dpo import PreferenceObjective
from fastrl.objectives.kto import KTOObjective, kto_kl, kto_loss
from fastrl.objectives.preference import PreferenceOutput, linear_preference_loss, preference_loss
from fastrl.objectives.reference_free import TPO_LOSS_TYPES, CPOObjective, ORPOObjective, TPOObjective

GOLDEN = Path(__file__).parent.parent / "golden"


def cases(name: str) -> list[dict[str, Any]]:
    return json.loads((GOLDEN / name).read_text())["cases"]


def tensor(values: Any) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


def close(got: Tensor, want: Any, rtol: float = 1e-9, atol: float = 1e-13) -> None:
    torch.testing.assert_close(got.detach().double(), tensor(want), rtol=rtol, atol=atol)


def metrics_agree(got: dict[str, Tensor], want: dict[str, float], count: int, atol: float = 1e-12) -> None:
    for name, value in want.items():
        close(got[name], value, rtol=1e-6, atol=atol)
    assert len(want) == count


DPO, KTO, CPO, ORPO, TPO = (cases(f"trl_{name}.json") for name in ("dpo", "kto", "cpo", "orpo", "tpo"))
OPENRLHF = [case for case in cases("openrlhf_losses.json") if case["function"] == "DPOLoss"]


def test_all_cases_are_there() -> None:
    assert [len(x) for x in (DPO, KTO, CPO, ORPO, TPO)] == [90, 12, 20, 9, 9]
    assert len(OPENRLHF) == 4


@pytest.mark.filterwarnings("ignore:label_smoothing")
@pytest.mark.parametrize("case", DPO, ids=lambda c: c["name"])
def test_dpo(case: dict[str, Any]) -> None:
    config, inputs, outputs = dict(case["config"]), case["inputs"], case["outputs"]
    # The origin's own precision; in single, differences of sums of order 10.
    rtol, atol = {"float64": (1e-9, 1e-12), "float32": (3e-6, 1e-6)}[config.pop("dtype")]
    objective = PreferenceObjective(**config)
    logps = [tensor(inputs[f"{side}_logps"]).requires_grad_() for side in ("chosen", "rejected")]
    weighting = {k: tensor(v) for k, v in inputs.items() if k.endswith("log_sum_sq_probs")}
    assert bool(weighting) == objective.use_weighting
    out = preference_loss(
        *logps,
        objective,
        chosen_mask=tensor(inputs["chosen_mask"]),
        rejected_mask=tensor(inputs["rejected_mask"]),
        ref_chosen_logps=tensor(inputs["ref_chosen_logps"]),
        ref_rejected_logps=tensor(inputs["ref_rejected_logps"]),
        chosen_entropy=tensor(inputs["chosen_entropies"]),
        rejected_entropy=tensor(inputs["rejected_entropies"]),
        **weighting,
    )
    close(out.loss, outputs["loss"], rtol)
    grads = torch.autograd.grad(out.loss, logps, allow_unused=True)
    for side, x, grad in zip(("chosen", "rejected"), logps, grads, strict=True):
        want = outputs.get(f"grad_{side}_logps")
        if want is None:  # TRL's backward of hinge under use_weighting fails
            assert objective.loss_type == ("hinge",) and objective.use_weighting
            assert grad is not None and grad.any()
        else:
            close(torch.zeros_like(x) if grad is None else grad, want, rtol, atol=1e-12)
    metrics_agree(out.metrics, outputs["metrics"], 7, atol)

    # The reference's sums in place of its tokens, as a trainer that precomputes them has them.
    summed = preference_loss(
        *logps,
        objective,
        chosen_mask=tensor(inputs["chosen_mask"]),
        rejected_mask=tensor(inputs["rejected_mask"]),
        ref_chosen_logps=tensor(outputs["ref_chosen_sum"]),
        ref_rejected_logps=tensor(outputs["ref_rejected_sum"]),
        **weighting,
    )
    close(summed.loss, outputs["loss"], rtol)


@pytest.mark.filterwarnings("ignore:label_smoothing")
@pytest.mark.parametrize("case", OPENRLHF, ids=lambda c: c["name"])
def test_openrlhf_dpo(case: dict[str, Any]) -> None:
    config, inputs, outputs = case["config"], case["inputs"], case["outputs"]
    objective = PreferenceObjective(
        loss_type="ipo" if config["ipo"] else "sigmoid",
        beta=config["beta"],
        label_smoothing=config["label_smoothing"],
        preset="openrlhf",
    )
    logps = [tensor(inputs[f"policy_{side}_logps"]).unsqueeze(-1).requires_grad_() for side in ("chosen", "rejected")]
    out = preference_loss(
        *logps,
        objective,
        chosen_mask=torch.ones_like(logps[0]),
        rejected_mask=torch.ones_like(logps[1]),
        ref_chosen_logps=tensor(inputs["reference_chosen_logps"]),
        ref_rejected_logps=tensor(inputs["reference_rejected_logps"]),
    )
    close(out.loss, outputs["loss"])
    for side, grad in zip(("chosen", "rejected"), torch.autograd.grad(out.loss, logps), strict=True):
        close(grad.squeeze(-1), outputs[f"grad_policy_{side}"])
    close(out.rewards, outputs["chosen_rewards"] + outputs["rejected_rewards"])


@pytest.mark.parametrize("case", KTO, ids=lambda c: c["name"])
def test_kto(case: dict[str, Any]) -> None:
    inputs, outputs, objective = case["inputs"], case["outputs"], KTOObjective(**case["config"])
    kl = None
    if objective.needs_kl:
        kl_logps = tensor(inputs["kl_logps"])
        kl = kto_kl(kl_logps, tensor(inputs["ref_kl_logps"]), mask=kl_logps != 0)
    logps = tensor(inputs["logps"]).requires_grad_()
    out = kto_loss(
        logps,
        objective,
        labels=tensor(inputs["label"]),
        mask=tensor(inputs["completion_mask"]),
        ref_logps=tensor(inputs["ref_logps"]),
        kl=kl,
    )
    close(out.loss, outputs["loss"])
    close(torch.autograd.grad(out.loss, logps)[0], outputs["grad_logps"], atol=1e-12)
    metrics_agree(out.metrics, outputs["metrics"], len(outputs["metrics"]))
    absent = out.metrics.keys() - outputs["metrics"].keys()
    assert all(math.isnan(out.metrics[name]) for name in absent)
    assert bool(absent) == (len(set(inputs["label"])) == 1)


def per_sequence(case: dict[str, Any]) -> tuple[list[Tensor], dict[str, Tensor]]:
    """The case's log-probabilities per sequence as answers of one token, and its NLL as one token of another."""
    inputs = case["inputs"]
    logps = [tensor(inputs[f"{side}_logps"]).unsqueeze(-1).requires_grad_() for side in ("chosen", "rejected")]
    logps.append((-tensor([[inputs["nll_loss"]]])).requires_grad_())
    masks = {f"{side}_mask": torch.ones_like(x) for side, x in zip(("chosen", "rejected", "nll"), logps, strict=True)}
    return logps, masks


@pytest.mark.parametrize("case", CPO, ids=lambda c: c["name"])
def test_cpo(case: dict[str, Any]) -> None:
    outputs, objective = case["outputs"], CPOObjective(**case["config"])
    logps, masks = per_sequence(case)
    given = masks | {"nll_logps": logps[2]}
    if objective.cpo_alpha == 0:
        given = {k: v for k, v in given.items() if not k.startswith("nll")}
    out = preference_loss(logps[0], logps[1], objective, **given)
    close(out.loss, outputs["loss"])
    grads = torch.autograd.grad(out.loss, logps, allow_unused=True)
    for side, grad in zip(("chosen", "rejected"), grads, strict=False):
        assert grad is not None
        close(grad.squeeze(-1), outputs[f"grad_{side}_logps"])
    assert (0.0 if grads[2] is None else -grads[2].item()) == pytest.approx(outputs["grad_nll_loss"], rel=1e-9)
    wanted = dict(outputs["metrics"])
    if objective.cpo_alpha == 0:
        del wanted["nll_loss"]
    metrics_agree(out.metrics, wanted, 7 - (objective.cpo_alpha == 0))


@pytest.mark.parametrize("case", ORPO, ids=lambda c: c["name"])
def test_orpo(case: dict[str, Any]) -> None:
    outputs, objective = case["outputs"], ORPOObjective(**case["config"])
    logps, masks = per_sequence(case)
    out = preference_loss(logps[0], logps[1], objective, nll_logps=logps[2], **masks)
    close(out.loss, outputs["loss"], rtol=1e-6)
    grads = torch.autograd.grad(out.loss, logps)
    for side, grad in zip(("chosen", "rejected"), grads, strict=False):
        close(grad.squeeze(-1), outputs[f"grad_{side}_logps"], rtol=1e-6)
    assert -grads[2].item() == pytest.approx(outputs["grad_nll_loss"])
    metrics_agree(out.metrics, outputs["metrics"], 9)


def tpo(objective: TPOObjective, logits: Tensor, ids: Tensor, mask: Tensor) -> PreferenceOutput:
    """The loss of a joint batch, position t of the logits scoring token t + 1; the head is the identity."""
    hidden, weight = logits[:, :-1], torch.eye(logits.shape[-1], dtype=logits.dtype)
    return linear_preference_loss(hidden, weight, ids[:, 1:], objective, mask=mask[:, 1:])


@pytest.mark.parametrize("case", TPO, ids=lambda c: c["name"])
def test_tpo(case: dict[str, Any]) -> None:
    inputs, outputs = case["inputs"], case["outputs"]
    logits = tensor(inputs["logits"]).requires_grad_()
    ids, mask = (torch.tensor(inputs[name]) for name in ("input_ids", "completion_mask"))
    out = tpo(TPOObjective(**case["config"]), logits, ids, mask)
    close(out.loss, outputs["loss"])
    close(torch.autograd.grad(out.loss, logits)[0], outputs["grad_logits"], atol=1e-12)
    wanted = dict(outputs["metrics"])
    # Three need the logits; TRL's entropy counts the gold answers, ours is that of the pairs.
    for name in ("logits/chosen", "logits/rejected", "mean_token_accuracy", "entropy"):
        del wanted[name]
    metrics_agree(out.metrics, wanted, 6)


@pytest.mark.parametrize("loss_type", TPO_LOSS_TYPES)
def test_tpo_trainer_itself(loss_type: str) -> None:
    trainer = pytest.importorskip("trl.experimental.tpo.tpo_trainer", reason="needs TRL").TPOTrainer
    for alpha in (0.7, 0.0):
        config = {"loss_type": loss_type, "beta": 0.3, "tpo_alpha": alpha, "tpo_l_gamma": 0.8}
        config["label_smoothing"] = 0.0 if loss_type in ("hinge", "ipo") else 0.1
        n = 9 if alpha else 6
        logits, ids = torch.randn(n, 7, 12, dtype=torch.float64, requires_grad=True), torch.randint(12, (n, 7))
        mask = (torch.rand(n, 7) < 0.7).long()
        mask[:, 3] = 1

        def one(x: Tensor) -> Tensor:
            return x

        stub = SimpleNamespace(
            model=SimpleNamespace(training=True), accelerator=SimpleNamespace(gather=one, gather_for_metrics=one),
            _metrics={"train": defaultdict(list)}, _total_train_tokens=0, _tp_size=1, **config,
        )  # fmt: skip
        inputs = {"input_ids": ids, "completion_mask": mask, "attention_mask": torch.ones_like(ids)}
        want = trainer._compute_loss(stub, lambda logits=logits, **_: SimpleNamespace(logits=logits), inputs, False)
        out = tpo(TPOObjective(**config), logits, ids, mask)
        torch.testing.assert_close(out.loss, want)
        ours, theirs = (torch.autograd.grad(x, logits)[0] for x in (out.loss, want))
        torch.testing.assert_close(ours, theirs)
        assert ours.abs().sum() > 0
