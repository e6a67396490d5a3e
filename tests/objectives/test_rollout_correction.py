"""Correction for the sampler's mismatch: numbers of verl, TRL and OpenRLHF, packed against padded, edges, errors."""

from __future__ import annotations

import json
import math
import os
import socket
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor

from fastrl.objectives.aggregation import aggregate_loss
from fastrl.objectives.rollout_correction import (
    LEVELS,
    REJECTIONS,
    CorrectedRollouts,
    Rejection,
    RolloutCorrection,
    rollout_correction,
)

GOLDEN = Path(__file__).parent.parent / "golden"
RTOL = 1e-6  # the origins' fractions go through single precision


def cases(name: str) -> list[dict[str, Any]]:
    return json.loads((GOLDEN / name).read_text())["cases"]


def tensor(values: Any) -> Tensor:
    """A float64 tensor; null is NaN."""

    def numbers(x: Any) -> Any:
        return [numbers(y) for y in x] if isinstance(x, list) else math.nan if x is None else float(x)

    return torch.tensor(numbers(values), dtype=torch.float64)


VERL = cases("verl_rollout_correction.json")
TRL = [case for case in cases("trl_grpo_scoring.json") if case["name"].startswith("isr_")]
OPENRLHF = [case for case in cases("openrlhf_losses.json") if case["name"].startswith("policy_is_")]


def test_all_cases_are_there() -> None:
    assert [len(VERL), len(TRL), len(OPENRLHF)] == [35, 20, 8]


def metrics_agree(got: dict[str, Tensor], want: dict[str, float], prefix: str, exact: bool) -> None:
    for name, value in want.items():
        single = not exact or "fraction" in name or "ratio" in name
        ours = got[prefix + name].item()
        assert ours == pytest.approx(value, rel=RTOL if single else 1e-9, abs=1e-9 if single else 1e-12), name


@pytest.mark.parametrize("case", VERL, ids=lambda c: c["name"])
def test_verl(case: dict[str, Any]) -> None:
    inputs, outputs = case["inputs"], case["outputs"]
    old, sampling, mask = (tensor(inputs[k]) for k in ("old_log_probs", "rollout_log_probs", "response_mask"))
    correction = RolloutCorrection.verl(**case["config"])
    out = rollout_correction(old, sampling, correction, mask=mask)
    wanted_weights = outputs.get("rollout_is_weights")
    if wanted_weights is None:
        assert out.weights is None
    else:
        torch.testing.assert_close(out.weights, tensor(wanted_weights), rtol=1e-9, atol=1e-15)
    torch.testing.assert_close(out.mask, tensor(outputs.get("response_mask", inputs["response_mask"])) != 0)
    prefix = "" if case["name"].startswith("full") else "rollout_corr/"
    metrics_agree(out.metrics, outputs["metrics"], prefix, exact=True)
    kinds = {
        "is_": "rollout_corr/rollout_is_",
        "rs": "rollout_corr/rollout_rs_",
        "fu": "rollout_corr/",
        "of": "rollout_corr/",
    }
    start = next(value for key, value in kinds.items() if case["name"].startswith(key))
    ours = {name for name in out.metrics if name.startswith(start)}
    assert case["name"].startswith("of") or ours == {prefix + name for name in outputs["metrics"]}


@pytest.mark.parametrize("case", TRL, ids=lambda c: c["name"])
def test_trl(case: dict[str, Any]) -> None:
    config, inputs, outputs = case["config"], case["inputs"], case["outputs"]
    mask = tensor(outputs["completion_mask"])
    if "tool_mask" in outputs:
        mask = mask * tensor(outputs["tool_mask"])
    name = "vllm_importance_sampling_"
    correction = RolloutCorrection.trl(config[name + "mode"], config[name + "clip_max"], config[name + "clip_min"])
    old, sampling = tensor(inputs["old_per_token_logps"]), tensor(inputs["sampling_per_token_logps"])
    out = rollout_correction(old, sampling, correction, mask=mask)
    assert out.weights is not None and torch.equal(out.mask, mask != 0)
    wanted = tensor(outputs["importance_sampling_ratio"]).expand(mask.shape)
    torch.testing.assert_close(out.weights, torch.where(mask != 0, wanted, 0.0), rtol=1e-9, atol=1e-15)
    sampling_metrics = {k: v for k, v in outputs["metrics"].items() if k.startswith("sampling/")}
    assert len(sampling_metrics) == 5
    metrics_agree(out.metrics, sampling_metrics, "", exact=False)


@pytest.mark.parametrize("case", OPENRLHF, ids=lambda c: c["name"])
def test_openrlhf(case: dict[str, Any]) -> None:
    """Its clipped PPO loss, with our weights: rejected tokens weigh 0 and still count in the denominator."""
    config, inputs, outputs = case["config"], case["inputs"], case["outputs"]
    names = ("log_probs", "old_log_probs", "rollout_log_probs", "advantages", "action_mask")
    logps, old, sampling, advantages, mask = (tensor(inputs[k]) for k in names)
    arguments = {k: config[f"is_correction_{k}"] for k in ("level", "mode", "gating", "threshold")}
    out = rollout_correction(old, sampling, RolloutCorrection.openrlhf(**arguments), mask=mask)
    assert out.weights is not None
    logps.requires_grad_()
    ratio = (logps - old).clamp(-20, 20).exp()
    low, high = 1 - config["clip_eps_low"], 1 + config["clip_eps_high"]
    surrogate = torch.min(ratio * advantages, ratio.clamp(low, high) * advantages)
    if config["dual_clip"] is not None:
        surrogate = torch.where(advantages < 0, surrogate.maximum(config["dual_clip"] * advantages), surrogate)
    kind = "token-mean" if config["token_level_loss"] else "seq-mean-token-mean"
    loss = aggregate_loss(-surrogate * out.weights * out.mask, kind, mask=mask, eps=1e-8)
    torch.testing.assert_close(loss.detach(), tensor(outputs["loss"]), rtol=1e-9, atol=1e-12)
    grad = torch.autograd.grad(loss, logps)[0]
    torch.testing.assert_close(grad, tensor(outputs["grad_logps"]), rtol=1e-9, atol=1e-12)
    metrics = outputs["metrics"]
    assert out.metrics["rollout_corr/kl"].item() == pytest.approx(metrics["vllm_kl"], rel=RTOL)
    if config["is_correction_mode"] == "mask":
        share = "seq_masked_fraction" if config["is_correction_level"] == "seq" else "masked_fraction"
        assert out.metrics[f"rollout_corr/rollout_rs_{share}"].item() == pytest.approx(
            metrics["is_filter_ratio"], rel=RTOL
        )


# The definition ------------------------------------------------------------------------------------------------------

LENGTHS = [5, 1, 6, 0, 4]
INSIDE = torch.arange(6) < torch.tensor(LENGTHS)[:, None]


def batch() -> tuple[Tensor, Tensor, Tensor]:
    """Logps of trainer and engine, and a mask with holes and empty sequences; NaN and inf outside the mask."""
    mask = INSIDE.clone()
    mask[0, 1] = mask[4, 3] = False
    old, gap = -torch.rand(5, 6, dtype=torch.float64) - 0.1, torch.randn(5, 6, dtype=torch.float64) * 0.5
    return old.masked_fill(~mask, torch.nan), (old - gap).masked_fill(~mask, torch.inf), mask


def by_hand(old: Tensor, sampling: Tensor, mask: Tensor, correction: RolloutCorrection) -> Tensor:
    """The weights, by a loop over the sequences."""
    weights = torch.zeros_like(old)
    for i in range(old.shape[0]):
        d = (old[i] - sampling[i])[mask[i]]
        log_ratio = {"token": d, "sequence": d.sum(), "geometric": d.mean()}[correction.level or ""]
        ratio = log_ratio.exp().expand(d.shape)
        low, high = correction.lower or 0.0, math.inf if correction.upper is None else correction.upper
        inside = (ratio >= low) & (ratio <= high)
        kept = ratio.clamp(low, high) if correction.mode == "truncate" else torch.where(inside, ratio, 0.0)
        weights[i, mask[i]] = kept
    return weights


CORRECTIONS = [
    RolloutCorrection(level=level, mode=mode, lower=lower, upper=upper)
    for level in LEVELS
    for mode in ("truncate", "mask")
    for lower, upper in ((None, 1.2), (0.8, None), (0.55, 1.7))
]


@pytest.mark.parametrize("correction", CORRECTIONS, ids=lambda c: f"{c.level}-{c.mode}-{c.lower}-{c.upper}")
def test_weights(correction: RolloutCorrection) -> None:
    old, sampling, mask = batch()
    before = old.clone(), sampling.clone(), mask.clone()
    out = rollout_correction(old, sampling, correction, mask=mask)
    assert out.weights is not None
    torch.testing.assert_close(out.weights, by_hand(old, sampling, mask, correction))
    unbounded = by_hand(old, sampling, mask, replace(correction, mode="truncate", lower=None, upper=None))
    assert 0 < (out.weights == unbounded)[mask].sum() < mask.sum()  # some are bounded
    assert torch.equal(out.mask, mask)
    for now, then in zip((old, sampling, mask), before, strict=True):
        assert torch.equal(now.nan_to_num(7.0), then.nan_to_num(7.0))
    normalized = rollout_correction(old, sampling, replace(correction, batch_normalize=True), mask=mask)
    assert normalized.weights is not None
    rows = (
        out.weights
        if correction.level == "token"
        else torch.stack([r[m][0] for r, m in zip(out.weights, mask, strict=True) if m.any()])
    )
    mean = rows.sum() / mask.sum() if correction.level == "token" else rows.mean()
    torch.testing.assert_close(normalized.weights, out.weights / mean)
    torch.testing.assert_close(normalized.metrics["rollout_corr/rollout_is_batch_norm_factor"], mean)


def assert_same(padded: CorrectedRollouts, packed: CorrectedRollouts, inside: Tensor) -> None:
    torch.testing.assert_close(padded.mask[inside], packed.mask)
    if padded.weights is not None:
        torch.testing.assert_close(padded.weights[inside], packed.weights)
    assert padded.metrics.keys() == packed.metrics.keys()
    for name, value in padded.metrics.items():
        torch.testing.assert_close(value, packed.metrics[name], msg=name)


ALL_REJECTIONS = tuple(
    Rejection(statistic=name, upper=1.3 if name.endswith(("k1", "ratio")) else 0.2) for name in REJECTIONS
)


@pytest.mark.parametrize("offset_dtype", (torch.int32, torch.int64), ids=str)
@pytest.mark.parametrize("level", LEVELS)
def test_packed_equals_padded(level: str, offset_dtype: torch.dtype) -> None:
    old, sampling, mask = batch()
    correction = RolloutCorrection(level=level, lower=0.8, batch_normalize=True, rejections=ALL_REJECTIONS, eps=1e-8)
    cu_seqlens = torch.tensor([0, *LENGTHS]).cumsum(0).to(offset_dtype)
    padded = rollout_correction(old, sampling, correction, mask=mask)
    packed = rollout_correction(
        old[INSIDE], sampling[INSIDE], correction, mask=mask[INSIDE].int(), cu_seqlens=cu_seqlens
    )
    assert_same(padded, packed, INSIDE)
    assert all(value.isfinite() and value.ndim == 0 for value in padded.metrics.values())


@pytest.mark.parametrize("statistic", REJECTIONS)
def test_rejection(statistic: str) -> None:
    """Each statistic by a loop over the sequences, in its own words; what it drops, it drops for the right reason."""
    old, sampling, mask = batch()
    level, kind = next(
        (level, statistic.removeprefix(level + "_"))
        for level in ("token", "seq_sum", "seq_mean", "seq_max")
        if statistic.startswith(level)
    )
    values = torch.zeros_like(old)
    for i in range(old.shape[0]):
        a, b = old[i][mask[i]], sampling[i][mask[i]]
        p, q = b.exp(), a.exp()
        p = p.clamp(1e-6, 1 - 1e-6)
        x = {
            "k1": b - a,
            "ratio": a - b,
            "k2": (a - b).square() / 2,
            "k3": (a - b).exp() - 1 - (a - b),
            "tv": (p - q).abs(),
            "binary_kl": p * (p / q).log() + (1 - p) * ((1 - p) / (1 - q)).log(),
        }[kind]
        if x.numel():
            x = {"token": x, "seq_sum": x.sum(), "seq_mean": x.mean(), "seq_max": x.max()}[level]
            values[i, mask[i]] = x
    logarithmic = kind in ("k1", "ratio")
    threshold = values[mask].abs().median().item()  # one entry lies on the bound
    upper = math.exp(threshold) if logarithmic else threshold
    (keep,) = (
        rollout_correction(old, sampling, RolloutCorrection(level=None, rejections=(r,)), mask=mask).mask
        for r in [Rejection(statistic=statistic, upper=upper * (1 + 1e-12))]
    )
    wanted = values <= threshold + 1e-9
    if logarithmic:
        wanted &= values >= -threshold - 1e-9
    assert torch.equal(keep, mask & wanted)
    assert 0 < keep.sum() < mask.sum()
    if not logarithmic:
        banded = Rejection(statistic=statistic, upper=1e6, lower=upper * (1 - 1e-12))
        out = rollout_correction(old, sampling, RolloutCorrection(level=None, rejections=(banded,)), mask=mask)
        assert torch.equal(out.mask, mask & (values >= threshold - 1e-9))


def test_chained_rejections() -> None:
    old, sampling, mask = batch()
    chain = (
        Rejection(statistic="token_k1", upper=1.8),
        Rejection(statistic="seq_mean_ratio", upper=1.25, lower=0.5),
        Rejection(statistic="seq_max_k3", upper=0.7),
    )
    alone = [
        rollout_correction(old, sampling, RolloutCorrection(level=None, rejections=(r,)), mask=mask).mask for r in chain
    ]
    out = rollout_correction(old, sampling, RolloutCorrection(level=None, rejections=chain), mask=mask)
    backwards = RolloutCorrection(level=None, rejections=chain[::-1])
    assert torch.equal(out.mask, torch.stack(alone).all(0))
    assert torch.equal(out.mask, rollout_correction(old, sampling, backwards, mask=mask).mask)
    assert all(not torch.equal(out.mask, one) for one in alone)
    assert out.metrics["rollout_corr/rollout_rs_masked_fraction"].item() == pytest.approx(
        1 - out.mask.sum().item() / mask.sum().item()
    )


# Edges ---------------------------------------------------------------------------------------------------------------


def test_ratio_at_a_bound() -> None:
    two = torch.full((1, 1), 2.0, dtype=torch.float64).log()
    ratio = two.exp().item()
    for level in LEVELS:
        for mode, lower, upper in (("mask", ratio, None), ("mask", None, ratio), ("truncate", ratio, ratio)):
            correction = RolloutCorrection(level=level, mode=mode, lower=lower, upper=upper)
            out = rollout_correction(two, torch.zeros_like(two), correction, mask=torch.ones(1, 1))
            assert out.weights is not None and out.weights.item() == ratio


@pytest.mark.parametrize("level", LEVELS)
def test_infinite_and_missing_logps(level: str) -> None:
    """-inf in the trainer: ratio 0. In the engine: the upper bound, or masked. No value from the sampler: ratio 1."""
    inf = torch.inf
    old = torch.tensor([[-inf, -1.0], [-1.0, -1.0], [-1.0, -1.0], [-1.0, -0.5], [-inf, -1.0], [-inf, -2.0]])
    sampling = torch.tensor([[-1.0, -1.0], [-inf, -1.0], [torch.nan, -1.0], [-0.5, -1.0], [-1.0, -inf], [-inf, -1.0]])
    mask = torch.ones(6, 2)
    bounded = rollout_correction(old, sampling, RolloutCorrection(level=level, upper=3.0), mask=mask).weights
    masked = rollout_correction(
        old, sampling, RolloutCorrection(level=level, mode="mask", upper=3.0), mask=mask
    ).weights
    assert bounded is not None and masked is not None
    assert bounded[:, 0].tolist()[:3] == [0, 3, 1] and masked[:, 0].tolist()[:3] == [0, 0, 1]
    assert bounded.isfinite().all() and masked.isfinite().all()
    if level == "token":
        assert bounded[4].tolist() == [0, 3] and bounded[5, 0] == 1
    else:
        assert bounded[4].tolist() == [0, 0]  # holds both infinities
    keep = rollout_correction(
        old,
        sampling,
        RolloutCorrection(level=None, rejections=(Rejection(statistic="seq_sum_k3", upper=0.5),)),
        mask=mask,
    ).mask
    assert keep.tolist() == [[kept] * 2 for kept in (False, False, True, True, False, True)]


@pytest.mark.parametrize("shape", ((3, 4), (0, 4), (2, 0)))
def test_nothing_to_correct(shape: tuple[int, int]) -> None:
    nan, mask = torch.full(shape, torch.nan), torch.zeros(shape)
    for level in LEVELS:
        correction = RolloutCorrection(level=level, batch_normalize=True, rejections=ALL_REJECTIONS)
        out = rollout_correction(nan, nan, correction, mask=mask)
        assert out.weights is not None and out.weights.shape == shape and not out.weights.any() and not out.mask.any()
        assert all(value.isfinite() for value in out.metrics.values())


def test_no_weight_is_left() -> None:
    """verl divides by zero here."""
    old, sampling, mask = torch.zeros(2, 3), torch.full((2, 3), -2.0), torch.ones(2, 3)
    correction = RolloutCorrection(mode="mask", lower=0.5, upper=2.0, batch_normalize=True)
    out = rollout_correction(old, sampling, correction, mask=mask)
    assert out.weights is not None and not out.weights.any()
    assert out.metrics["rollout_corr/rollout_is_eff_sample_size"] == 0
    assert out.metrics["rollout_corr/rollout_is_batch_norm_factor"] == 1


def test_no_gradient_and_dtypes() -> None:
    old, sampling, mask = (x.float() if x.is_floating_point() else x for x in batch())
    out = rollout_correction(old.requires_grad_(), sampling, RolloutCorrection(), mask=mask)
    assert out.weights is not None and not out.weights.requires_grad and out.weights.dtype == torch.float32
    out = rollout_correction(old.detach().bfloat16(), sampling.double(), RolloutCorrection(), mask=mask)
    assert out.weights is not None and out.weights.dtype == torch.float64


@pytest.mark.parametrize("level", LEVELS)
def test_split_equals_whole(level: str) -> None:
    """Without batch normalisation sequences do not see each other."""
    old, sampling, mask = batch()
    correction = RolloutCorrection(level=level, rejections=ALL_REJECTIONS[:4])
    whole = rollout_correction(old, sampling, correction, mask=mask)
    parts = [
        rollout_correction(*(x[i : i + 2] for x in (old, sampling)), correction, mask=mask[i : i + 2])
        for i in (0, 2, 4)
    ]
    assert torch.equal(torch.cat([p.weights for p in parts]), whole.weights)  # type: ignore[arg-type]
    assert torch.equal(torch.cat([p.mask for p in parts]), whole.mask)


def normalize_on_ranks(rank: int, port: int, folder: str) -> None:
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    torch.set_num_threads(1)
    dist.init_process_group("gloo", rank=rank, world_size=2)
    torch.manual_seed(0)
    old, sampling, mask = batch()
    mine = slice(0, 3) if rank == 0 else slice(3, 5)
    for level in LEVELS:
        correction = RolloutCorrection(level=level, batch_normalize=True)
        whole = rollout_correction(old, sampling, correction, mask=mask).weights
        part = rollout_correction(
            old[mine], sampling[mine], correction, mask=mask[mine], group=dist.group.WORLD
        ).weights
        assert whole is not None
        torch.testing.assert_close(part, whole[mine], msg=level)
    (Path(folder) / f"{rank}.ok").touch()
    dist.destroy_process_group()


def test_batch_normalize_over_ranks(tmp_path: Path) -> None:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = int(s.getsockname()[1])
    mp.spawn(normalize_on_ranks, (port, str(tmp_path)), nprocs=2)
    assert len(list(tmp_path.glob("*.ok"))) == 2


# Errors --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "message"),
    (
        ({"level": "seq"}, "level: expected None or one of token, sequence, geometric, got 'seq'"),
        ({"mode": "clip"}, "mode: expected one of truncate, mask, got 'clip'"),
        ({"upper": 0.0}, "upper: expected a number above 0, got 0.0"),
        ({"lower": -1.0}, r"lower: expected a number in \[0, upper = 2.0\], got -1.0"),
        ({"lower": 3.0}, "lower: expected a number in .*, got 3.0"),
        ({"level": None, "mode": "mask"}, "mode: without a level there are no weights"),
        ({"level": None, "lower": 0.5}, "lower: without a level there are no weights"),
        ({"level": None, "upper": 5.0}, "upper: without a level there are no weights"),
        ({"level": None, "batch_normalize": True}, "batch_normalize: without a level there are no weights"),
        ({"mode": "mask", "upper": None}, "mode: 'mask' needs a lower or an upper bound"),
        ({"rejections": (Rejection(statistic="token_k2", upper=1.0),) * 2}, "rejections: expected each statistic once"),
        ({"log_ratio_bound": 0.0}, "log_ratio_bound: expected None or a number above 0"),
        ({"eps": -1.0}, "eps: expected a number of at least 0"),
    ),
)
def test_wrong_corrections(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        RolloutCorrection(**arguments)


@pytest.mark.parametrize(
    ("make", "message"),
    (
        (
            lambda: Rejection(statistic="seq_max_k1", upper=2.0),
            "statistic: expected one of token_k1, .*, got 'seq_max_k1'",
        ),
        (lambda: Rejection(statistic="token_k2", upper=-1.0), "upper: expected a number above 0"),
        (lambda: Rejection(statistic="token_k1", upper=2.0, lower=3.0), "lower: expected a number in"),
        (lambda: Rejection(statistic="token_k1", upper=0.5), "lower: the default 1 / upper is above upper = 0.5"),
        (
            lambda: RolloutCorrection.trl("token"),
            "mode: expected token_ or sequence_ with truncate or mask, got 'token'",
        ),
        (
            lambda: RolloutCorrection.verl(rollout_is="token", rollout_is_threshold="a"),
            "rollout_is_threshold: expected",
        ),
        (lambda: RolloutCorrection.verl(rollout_is="geometric"), "rollout_is: expected None, 'token' or 'sequence'"),
        (lambda: RolloutCorrection.verl(rollout_rs="token_k1"), "rollout_rs_threshold: expected 1 or 1 thresholds"),
        (
            lambda: RolloutCorrection.verl(rollout_rs="token_k2", rollout_rs_threshold="1_2"),
            "token_k2 has an upper bound",
        ),
        (lambda: RolloutCorrection.openrlhf(level="geo"), "level: expected 'token' or 'seq'"),
        (lambda: RolloutCorrection.openrlhf(mode="truncate"), "mode: expected 'clip' or 'mask'"),
        (lambda: RolloutCorrection.openrlhf(gating="k3"), "gating: expected 'ratio', 'tv' or 'binary_kl'"),
        (lambda: RolloutCorrection.openrlhf(level="seq", mode="clip"), "mode: 'clip' is of the token ratio only"),
    ),
)
def test_wrong_settings(make: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()


def test_wrong_inputs() -> None:
    x, mask, correction = torch.zeros(2, 3), torch.ones(2, 3), RolloutCorrection()
    for arguments, error, message in (
        ((x, torch.zeros(2, 4)), ValueError, r"sampling_logps: expected shape \(2, 3\)"),
        ((x[0], x[0]), ValueError, r"old_logps: expected shape \(B, T\)"),
        ((x.long(), x), TypeError, "old_logps: expected one of"),
        ((x, x.to("meta")), ValueError, "sampling_logps: expected on cpu"),
    ):
        with pytest.raises(error, match=message):
            rollout_correction(*arguments, correction, mask=mask)
    with pytest.raises(ValueError, match="mask: expected shape"):
        rollout_correction(x, x, correction, mask=mask[:1])
    with pytest.raises(ValueError, match="mask: expected a tensor"):
        rollout_correction(x, x, correction, mask=None)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="group: only batch_normalize takes a mean over the ranks"):
        rollout_correction(x, x, correction, mask=mask, group=object())  # type: ignore[arg-type]
