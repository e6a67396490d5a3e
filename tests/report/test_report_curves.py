"""Which metrics share a panel, what is drawn of them, and the comparison of runs. Figures are asked, not pixels."""

from __future__ import annotations

import math
import re
from pathlib import Path
from typing import Any

import pytest
from small_runs import grpo_log

from fastrl.report.curves import comparison_figure, panel_svg, panels_figure, plot_curves, running_mean
from fastrl.report.panels import metric_names, metric_series, panel_of, panels_of, split_prefix

HISTORY: list[dict[str, Any]] = [grpo_log(step) for step in range(1, 17)]
EVALUATIONS = [{"eval_reward": 0.3, "eval_a_reward": 0.1, "eval_b_reward": 0.2, "step": step} for step in (8, 16)]


@pytest.mark.parametrize(
    ("metric", "subject"),
    [
        ("rewards/my_func/mean", "reward"),
        ("rewards/chosen", "preference"),
        ("rewards/accuracies", "preference"),
        ("accuracy", "preference"),  # of a reward model
        ("eval_logps/rejected", "preference"),
        ("mean_token_accuracy", "policy"),
        ("sampling/importance_sampling_ratio/mean", "policy"),
        ("value_loss", "value"),
        ("completions/mean_terminated_length", "completions"),
        ("aux_loss", "loss"),
        ("tokens_per_second", "speed"),
        ("a user's own", "other"),
    ],
)
def test_every_metric_has_a_subject(metric: str, subject: str) -> None:
    assert panel_of(metric).subject == subject


def test_prefix_of_an_evaluation_is_told_from_the_metric() -> None:
    assert split_prefix("eval_mean_token_accuracy") == ("eval", "mean_token_accuracy")
    assert split_prefix("eval_helpful_rewards/accuracies") == ("eval_helpful", "rewards/accuracies")
    assert split_prefix("eval_hold_out_loss") == ("eval_hold_out", "loss")
    assert split_prefix("eval_of_mine") == ("eval", "of_mine")
    assert split_prefix("evaluate") == ("", "evaluate")


def test_names_leave_out_what_is_no_curve() -> None:
    names = metric_names([*HISTORY, {"step": 16, "train_runtime": 1.0, "eval_runtime": 1.0, "total_flos": 1.0}])
    assert "reward" in names and "my $metric_<b>" in names
    assert not {"step", "epoch", "seconds", "rewards/form/mean", "train_runtime", "eval_runtime", "total_flos"} & {
        *names
    }


def test_series_takes_the_last_log_of_a_step_and_skips_what_is_no_number() -> None:
    history = [
        {"step": 2, "reward": 1, "num_tokens": 20},
        {"step": 1, "reward": 0, "num_tokens": 10},
        {"step": 2, "reward": 3, "num_tokens": 25},
        {"step": 3, "reward": math.nan, "num_tokens": 30},
        {"step": 4, "reward": None},
        {"step": 5, "reward": 4},  # an evaluation logs no tokens
    ]
    series = metric_series(history, "reward")
    assert (series.x, series.y) == ([1.0, 2.0, 5.0], [0.0, 3.0, 4.0])
    assert metric_series(history, "reward", "num_tokens").x == [10.0, 25.0, 30.0]


def test_running_mean_looks_back_only() -> None:
    assert running_mean([0.0, 2.0, 4.0, 6.0], window=2) == [0.0, 1.0, 3.0, 5.0]


def test_one_axes_per_panel_and_one_colour_per_metric() -> None:
    panels = panels_of(metric_names(HISTORY + EVALUATIONS))
    figure = panels_figure(HISTORY + EVALUATIONS, panels, "title")
    assert len(figure.axes) == len(panels)
    by_title = {axes.get_title(loc="left"): axes for axes in figure.axes}
    reward = by_title["reward"]
    drawn = [line for line in reward.lines if len(line.get_xdata())]
    assert len(drawn) == 5  # each log and the running mean; three evaluations
    assert len({line.get_color() for line in drawn}) == 1
    assert len({line.get_linestyle() for line in drawn}) == 4
    legend = [text.get_text() for text in reward.get_legend().get_texts()]
    assert legend == ["training", "eval", "eval_a", "eval_b"]
    lengths = [text.get_text() for text in by_title["completion length (tokens)"].get_legend().get_texts()]
    assert lengths == ["mean_length", "min_length", "max_length"]
    assert by_title["my $metric_<b>"].lines


def test_long_runs_are_thinned_without_moving_the_curve() -> None:
    history = [{"step": step, "learning_rate": step / 5000} for step in range(1, 5001)]
    (axes,) = panels_figure(history, panels_of(["learning_rate"])).axes
    (line,) = axes.lines
    x, y = map(list, line.get_data())
    assert len(x) == 1000 and y == pytest.approx([step / 5000 for step in x])


def test_overview_is_a_picture(tmp_path: Path) -> None:
    path = plot_curves(HISTORY, tmp_path / "curves.png", title="a $ sign")
    assert path.read_bytes().startswith(b"\x89PNG") and path.stat().st_size > 10_000
    with pytest.raises(ValueError, match="no metrics"):
        plot_curves([{"step": 1}], tmp_path / "none.png")


def test_svg_names_nothing_outside_itself_and_takes_the_pages_colour() -> None:
    ((panel, names),) = panels_of(["my $metric_<b>"])
    svg = panel_svg(HISTORY, panel, names)
    assert svg.startswith("<svg viewBox=") and svg.rstrip().endswith("</svg>")
    assert "http" not in svg and "currentColor" in svg and "my $metric_&lt;b&gt;" in svg
    assert set(re.findall(r'(?:href="|url\()#(\w+)', svg)) == set(re.findall(r' id="(\w+)"', svg))


def test_comparison_has_a_line_per_run_that_logged_the_metric() -> None:
    other = [{key: value for key, value in entry.items() if key != "entropy"} for entry in HISTORY[:5]]
    figure = comparison_figure({"a": HISTORY, "_b": other}, ["reward", "entropy"], x="seconds", smooth=1)
    reward, entropy = figure.axes
    assert [text.get_text() for text in reward.get_legend().get_texts()] == [
        "a",
        " _b",
    ]  # matplotlib hides a label that begins with _
    assert [len(line.get_xdata()) for line in reward.lines] == [16, 5] and len(entropy.lines) == 1
    assert reward.lines[0].get_xdata()[-1] == 32.0
    assert reward.lines[0].get_color() != reward.lines[1].get_color()
