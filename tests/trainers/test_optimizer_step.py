"""The benchmark of the whole optimizer step, on a tiny model: every contender's gradients are compared, a wrong one
gets no time, and what is not installed or fails is named."""

import importlib.util
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from tiny_runs import make_tokenizer, tiny_model

from fastrl.benchmark import optimizer_step, step_data, suite
from fastrl.benchmark.optimizer_step import optimizer_step_rows
from fastrl.benchmark.step_data import GROUP, with_live_share
from fastrl.benchmark.step_methods import EAGER, METHODS
from fastrl.benchmark.step_worker import ContenderFailed, take_steps
from fastrl.benchmark.tables import steps
from fastrl.trainers.rollouts import Rollouts
from fastrl.trainers.token_batch import pad

CPU = torch.device("cpu")
HAS_TRL = importlib.util.find_spec("trl") is not None


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A tiny model with its tokenizer."""
    folder = tmp_path_factory.mktemp("model")
    tiny_model().save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)
    return str(folder)


@pytest.fixture
def in_process(monkeypatch: pytest.MonkeyPatch) -> None:
    """Contenders without a process of their own: what takes seconds is its imports."""
    monkeypatch.setattr(optimizer_step, "Worker", InProcess)
    monkeypatch.setattr(step_data, "SENTENCES", ("a b", "c d e f", "g", "h i j 1 2 3", "k l"))


class InProcess:
    """As `Worker`, but that each step is one of a new trainer, after a warm-up."""

    def __init__(self, settings_file: Path, settings: dict[str, Any]) -> None:
        self.settings = json.loads(json.dumps(settings))

    def step(self, data: int | None, gradients: Path | None = None) -> dict[str, Any]:
        """See `Worker`."""
        answers: list[dict[str, Any]] = []
        orders = [{"data": None, "gradients": None}, {"data": data, "gradients": gradients and str(gradients)}]
        if data is None:
            return {}
        try:
            take_steps(self.settings, iter(orders), answers.append)
        except ValueError as error:
            raise ContenderFailed(f"it failed:\n{error}") from error
        assert len(answers) == 2
        return answers[1]

    def stop(self) -> None:
        """Nothing to end."""


def stored() -> Rollouts:
    """Two groups, completions of one to seven tokens."""
    generator = torch.Generator().manual_seed(0)
    completions = [torch.randint(6, 40, (i % 7 + 1,), generator=generator).tolist() for i in range(2 * GROUP)]
    ids, mask = pad([[7, 8, 9]] * GROUP + [[10]] * GROUP, 0, left=True, device=CPU)
    completion_ids, completion_mask = pad(completions, 0, left=False, device=CPU)
    return Rollouts(ids, mask, completion_ids, completion_mask, torch.randn(2 * GROUP, generator=generator))


def one_round(method: str, model_folder: str, **more: Any) -> list[dict[str, Any]]:
    """Rows after one round."""
    settings: dict[str, Any] = {"seconds": 0, "live_shares": [1.0], "rollouts": stored(), "say": str, **more}
    return optimizer_step_rows(CPU, method, model_path=model_folder, **settings)


def test_live_share_is_of_whole_groups() -> None:
    half = with_live_share(stored(), 0.5)
    assert isinstance(half.stored, Rollouts) and half.note == f", live share {half.facts['live_share']:.2g}"
    assert half.stored.advantages[:GROUP].all() and not half.stored.advantages[GROUP:].any()
    counts = stored().completion_mask.sum(1)
    assert half.facts["live_share"] == pytest.approx(float(counts[:GROUP].sum() / counts.sum()))
    assert with_live_share(stored(), 1.0).facts["live_share"] == 1.0


def test_rows(model_folder: str) -> None:
    """Of contenders in processes of their own: gradients are compared; a row has what a table needs."""
    said: list[str] = []
    ours = "fastrl, its defaults"
    rows = one_round("grpo", model_folder, contenders=[ours], live_shares=[1.0, 0.5], say=said.append)
    assert [row["contender"] for row in rows] == [EAGER, EAGER, ours, ours]
    for row in rows:
        assert "refused" not in row, row["refused"]
        assert row["errors"]["gradients"] < 1e-4 and row["rounds"] == 1
        assert row["errors"]["gradients"] > 0 or row["contender"] == EAGER
        assert 0 < row["min_s"] <= row["median_s"] <= row["max_s"] and row["peak_bytes"] > 1e8
        assert row["completion_tokens"] == int(stored().completion_mask.sum()) and row["prompt_tokens"] == 4 * GROUP
        weights = sum(p.numel() for p in tiny_model().model.layers.parameters() if p.ndim == 2)
        assert row["cost"] == 6 * weights * (row["prompt_tokens"] + row["completion_tokens"])
    assert any("round 1: fastrl, its defaults, live share 1" in line for line in said)
    assert rows[2]["to_eager"] == rows[2]["median_s"] / rows[0]["median_s"] and rows[2]["to_trl"] is None


WRONG: dict[str, dict[str, Any]] = {
    "grpo": {"loss_type": "grpo"},
    "grpo_kl": {"beta": 0.4},
    "sft": {"loss_type": "dft"},
    "dpo": {"beta": 0.11},
    "dpo_precomputed": {"beta": 0.11},
    "reward": {"center_rewards_coefficient": 0.01},
    "kto": {"desirable_weight": 1.01},
    "distillation": {"beta": 0.9},
    "ppo": {"vf_coef": 0.11},
}


@pytest.mark.usefixtures("in_process")
@pytest.mark.parametrize("method", METHODS)
def test_gradients_are_those_of_the_eager_loss_or_there_is_no_time(
    model_folder: str, method: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Everybody's are, and those of a slightly other loss are told from them."""
    contenders = METHODS[method].contenders
    monkeypatch.setitem(contenders, "fastrl, wrong", WRONG[method])
    *rows, wrong = one_round(method, model_folder)
    assert [row["contender"] for row in [*rows, wrong]] == list(contenders) and len(rows) >= 3
    assert (method == "ppo") == all("TRL" not in row["contender"] for row in rows)
    for row in rows:
        if HAS_TRL or not row["contender"].startswith("TRL"):
            assert "refused" not in row, row["refused"]
            assert row["errors"]["gradients"] < 2e-5 and row["to_eager"] > 0
            assert row["errors"]["gradients"] > 0 or row["contender"] == EAGER
        else:
            assert row["refused"] == "TRL is not installed"
    theirs = [row["median_s"] for row in rows if row["contender"].startswith("TRL") and "median_s" in row]
    assert rows[-1]["to_trl"] == (rows[-1]["median_s"] / min(theirs) if theirs else None)
    assert "median_s" not in wrong
    assert wrong["refused"].startswith("wrong: gradients ") and wrong["refused"].endswith("allowed 5e-04")
    page = "\n".join(steps([*rows, wrong]))
    assert f"### {METHODS[method].title} optimizer step" in page and f"B {rows[0]['B']}, " in page
    assert all(row["contender"] in page for row in rows) and f"| **fastrl, wrong** | {wrong['refused']} |" in page
    if theirs:
        first, *others = [row["errors"] for row in rows[1:]]
        assert "TRL" not in first and all(errors["TRL"] < 2e-5 for errors in others)


def test_the_names_of_the_command_line_are_those_of_the_methods() -> None:
    assert tuple(METHODS) == suite.STEP_METHODS


@pytest.mark.usefixtures("in_process")
def test_a_factor_of_the_loss_is_not_hidden_by_clipping(model_folder: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(METHODS["sft"].contenders, "fastrl, clipped", {"max_grad_norm": 1e-3})
    rows = one_round("sft", model_folder, contenders=["fastrl, clipped"])
    assert rows[1]["refused"].startswith("wrong: gradients ")


def test_the_policy_is_not_its_reference(model_folder: str, tmp_path: Path) -> None:
    """Else DPO's gradient would not depend on the reference, and distillation would have none."""
    gradients = tmp_path / "gradients"
    race = optimizer_step._Race(
        CPU, tmp_path, model_folder, "distillation", METHODS["distillation"].data(model_folder, stored, ()), str
    )
    race.names = [EAGER]
    orders: Iterator[dict[str, Any]] = iter([{"data": 0, "gradients": str(gradients)}])
    took: list[dict[str, Any]] = []
    take_steps(race._settings(EAGER), orders, took.append)
    assert len(took) == 1 and max(float(g.abs().max()) for g in load_file(gradients).values()) > 1e-5


@pytest.mark.usefixtures("in_process")
def test_errors(model_folder: str, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match="contenders: unknown verl; expected some of eager"):
        one_round("grpo", model_folder, contenders=["verl"])
    with pytest.raises(ValueError, match=r"method: expected one of grpo, .*, got 'prm'"):
        one_round("prm", model_folder)
    broken = {"loss_type": "nonsense"}
    if HAS_TRL:
        monkeypatch.setitem(METHODS["sft"].contenders, "TRL, broken", {"trl": True, **broken})
        rows = one_round("sft", model_folder, contenders=["TRL, broken"])
        assert "median_s" in rows[0] and rows[1]["refused"].startswith("failed: ")
    monkeypatch.setitem(METHODS["sft"].contenders, "fastrl, broken", broken)
    with pytest.raises(ContenderFailed, match="loss_type: expected one of"):
        one_round("sft", model_folder, contenders=["fastrl, broken"])


def test_a_process_that_fails_is_named_with_its_output(model_folder: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(METHODS["grpo"].contenders, EAGER, {"loss_type": "nonsense"})
    with pytest.raises(
        ContenderFailed, match=r"eager loss, padded: its process failed:(.|\n)*loss_type: expected one of"
    ):
        one_round("grpo", model_folder, contenders=[])
