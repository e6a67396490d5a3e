"""The benchmark of the whole optimizer step, on a tiny model: every contender's gradients are compared, a wrong one
gets no time, and what is not installed or fails is named."""

import importlib.util
from typing import Any

import pytest
import torch
from tiny_runs import make_tokenizer, tiny_model

from fastrl.benchmark import optimizer_step
from fastrl.benchmark.optimizer_step import CONTENDERS, EAGER, GROUP, optimizer_step_rows, with_live_share
from fastrl.trainers.rollouts import Rollouts
from fastrl.trainers.token_batch import pad

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A tiny model with its tokenizer."""
    folder = tmp_path_factory.mktemp("model")
    tiny_model().save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)
    return str(folder)


def stored() -> Rollouts:
    """Two groups, completions of one to seven tokens."""
    generator = torch.Generator().manual_seed(0)
    completions = [torch.randint(6, 40, (i % 7 + 1,), generator=generator).tolist() for i in range(2 * GROUP)]
    ids, mask = pad([[7, 8, 9]] * GROUP + [[10]] * GROUP, 0, left=True, device=CPU)
    completion_ids, completion_mask = pad(completions, 0, left=False, device=CPU)
    return Rollouts(ids, mask, completion_ids, completion_mask, torch.randn(2 * GROUP, generator=generator))


def test_live_share_is_of_whole_groups() -> None:
    half = with_live_share(stored(), 0.5)
    assert half.rollouts.advantages[:GROUP].all() and not half.rollouts.advantages[GROUP:].any()
    counts = stored().completion_mask.sum(1)
    assert half.live_share == pytest.approx(float(counts[:GROUP].sum() / counts.sum()))
    assert with_live_share(stored(), 1.0).live_share == 1.0


def test_rows(model_folder: str) -> None:
    """Everybody's gradients are the eager loss's; a row has what a table of the benchmark needs."""
    said: list[str] = []
    rows = optimizer_step_rows(CPU, seconds=0, model_path=model_folder, rollouts=stored(), say=said.append)
    assert [row["contender"] for row in rows[::2]] == list(CONTENDERS)
    for row in rows:
        if row["contender"].startswith("TRL") and importlib.util.find_spec("trl") is None:
            assert row["refused"] == "TRL is not installed"
            continue
        assert "refused" not in row, row
        assert row["errors"]["gradients"] < 1e-4 and row["rounds"] == 1
        assert row["errors"]["gradients"] > 0 or row["contender"] == EAGER
        assert 0 < row["min_s"] <= row["median_s"] <= row["max_s"] and row["peak_bytes"] > 1e8
        assert row["completion_tokens"] == int(stored().completion_mask.sum()) and row["prompt_tokens"] == 4 * GROUP
        weights = sum(p.numel() for p in tiny_model().model.layers.parameters() if p.ndim == 2)
        assert row["cost"] == 6 * weights * (row["prompt_tokens"] + row["completion_tokens"])
    assert any("round 1: fastrl, its defaults, live share 1" in line for line in said)


def test_wrong_gradients_get_no_time(model_folder: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(optimizer_step.ALLOWED, "float32", 1e-12)
    one = ["fastrl, no checkpointing"]
    arguments: dict[str, Any] = {"seconds": 0, "live_shares": [1.0], "rollouts": stored(), "say": str}
    rows = optimizer_step_rows(CPU, contenders=one, model_path=model_folder, **arguments)
    assert "median_s" in rows[0] and "median_s" not in rows[1]
    assert rows[1]["refused"].startswith("wrong: gradients ")


def test_errors(model_folder: str, monkeypatch: pytest.MonkeyPatch) -> None:
    arguments: dict[str, Any] = {"seconds": 0, "live_shares": [1.0], "rollouts": stored(), "say": str}
    with pytest.raises(ValueError, match="contenders: unknown verl; expected some of eager"):
        optimizer_step_rows(CPU, contenders=["verl"], model_path=model_folder, **arguments)
    monkeypatch.setitem(CONTENDERS, "fastrl, broken", {"loss_type": "nonsense"})
    with pytest.raises(RuntimeError, match=r"fastrl, broken: its process failed:(.|\n)*loss_type: expected one of"):
        optimizer_step_rows(CPU, contenders=["fastrl, broken"], model_path=model_folder, **arguments)
