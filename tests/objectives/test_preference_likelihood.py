"""The watch for falling likelihoods, and the example that shows DPO's failure and its remedies."""

from __future__ import annotations

import importlib.util
import math
import random
import warnings
from pathlib import Path
from types import ModuleType

import pytest
import torch

from fastrl.objectives.likelihood import LikelihoodWatch

EXAMPLE = Path(__file__).parent.parent.parent / "examples" / "dpo_likelihood.py"


def run(watch: LikelihoodWatch, slope: float, margin: float, noise: float = 0.0, steps: int = 40) -> dict[str, float]:
    """The last report after steps in which logps/chosen and the margin change by so much per step."""
    source = random.Random(0)
    for i in range(steps):
        values = {"logps/chosen": -20 + slope * i + source.gauss(0, noise), "rewards/margins": margin * i}
        report = watch.update({k: torch.tensor(v) for k, v in values.items()})
    return report


def test_it_warns_once_where_the_chosen_fall_and_margins_rise() -> None:
    watch = LikelihoodWatch(window=5)
    with pytest.warns(UserWarning, match="rpo_alpha=1.0.*apo_zero.*dpop_lambda") as caught:
        report = run(watch, slope=-0.5, margin=0.1)
    assert len(caught) == 1 and Path(caught[0].filename) == Path(__file__)
    assert report["chosen_likelihood_falls"] == 1.0
    assert report["logps/chosen_change"] == pytest.approx(-0.5 * 35) and report["rewards/margins_change"] > 0


@pytest.mark.parametrize(
    ("slope", "margin", "noise"),
    [(0.5, 0.1, 0.0), (-0.5, -0.1, 0.0), (-0.5, 0.0, 0.0), (0.0, 0.1, 3.0), (0.0, 0.0, 0.0)],
    ids=["rises", "both fall", "margin stays", "noise", "nothing"],
)
def test_it_is_silent_elsewhere(slope: float, margin: float, noise: float) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert run(LikelihoodWatch(window=5), slope, margin, noise)["chosen_likelihood_falls"] == 0.0


def test_it_judges_nothing_before_two_windows_and_skips_what_is_not_finite() -> None:
    watch = LikelihoodWatch(window=3, warn=False)
    for i in range(5):
        report = watch.update({"logps/chosen": -1.0 * i, "rewards/margins": 1.0 * i})
        assert math.isnan(report["logps/chosen_change"]) and report["chosen_likelihood_falls"] == 0.0
        watch.update({"logps/chosen": -math.inf, "rewards/margins": 1.0})
    report = watch.update({"logps/chosen": -5.0, "rewards/margins": 5.0})
    assert report == {"logps/chosen_change": -3.0, "rewards/margins_change": 3.0, "chosen_likelihood_falls": 1.0}
    with pytest.raises(KeyError):
        watch.update({"logps/chosen": 1.0})


def test_its_state_survives_a_restart() -> None:
    watch, again = LikelihoodWatch(window=4, warn=False), LikelihoodWatch(window=4, warn=False)
    run(watch, -0.3, 0.1, 0.2, steps=10)
    again.load_state_dict(watch.state_dict())
    point = {"logps/chosen": -30.0, "rewards/margins": 2.0}
    assert again.update(point) == watch.update(point)


def test_wrong_arguments_are_named() -> None:
    with pytest.raises(ValueError, match="window: expected at least 2 updates, got 1"):
        LikelihoodWatch(window=1)
    with pytest.raises(ValueError, match="sigmas"):
        LikelihoodWatch(sigmas=-1.0)


def example() -> ModuleType:
    spec = importlib.util.spec_from_file_location("dpo_likelihood", EXAMPLE)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_example_shows_the_failure_and_the_remedies(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    module = example()
    histories = module.run()
    plain, *remedied = histories.values()
    assert plain[-1]["logps/chosen"] < plain[0]["logps/chosen"] - 0.5  # nats
    assert plain[-1]["rewards/margins"] > 0.5 and plain[-1]["chosen_likelihood_falls"] == 1.0
    assert len(remedied) == 3
    for history in remedied:
        assert history[-1]["logps/chosen"] > history[0]["logps/chosen"] - 0.1
        assert history[-1]["rewards/margins"] > 0.1 and history[-1]["chosen_likelihood_falls"] == 0.0
    printed = capsys.readouterr().out
    assert printed.count("warning: The chosen answers have become less likely") == 1
    module.plot(histories, str(tmp_path / "curves.png"))
    assert (tmp_path / "curves.png").stat().st_size > 1000
