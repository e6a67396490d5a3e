"""`report.html` of runs that finished, were killed, or are another trainer's; and `fastrl plot`."""

from __future__ import annotations

import json
import re
from html.parser import HTMLParser
from pathlib import Path

import pytest
from small_runs import SAMPLE

from fastrl.cli import main
from fastrl.report.page import page_html, write_page
from fastrl.report.runs import NotARunError, read_run
from fastrl.trainers.completion_log import CompletionLog

_VOID = {"meta", "img", "br", "hr"}


class Reader(HTMLParser):
    """Checks that every element is closed in its turn; collects text, scripts and what is referred to."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.texts: list[str] = []
        self.elements: list[str] = []
        self.references: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append(tag)
        self.references += [value or "" for name, value in attrs if name in ("href", "src", "xlink:href", "action")]
        if tag not in _VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attrs)
        if tag not in _VOID:
            self.open.pop()

    def handle_endtag(self, tag: str) -> None:
        assert self.open and self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if data.strip():
            self.texts.append(data.strip())


def read_page(text: str) -> Reader:
    reader = Reader()
    reader.feed(text)
    reader.close()
    assert not reader.open
    return reader


def test_page_of_a_killed_run(grpo_run: Path) -> None:
    log = CompletionLog(grpo_run, size=8, num_to_print=0)
    for step in (4, 8, 12):
        log.add("train", ["p"] * 6, [f"{i} {step} {SAMPLE}" for i in range(6)], {"exact": [0, 1, 0, 0, 0, None]})
        log.flush(step)
    points = [{"mean": 0.25, "standard_error": 0.1}, {"mean": 0.5, "standard_error": None}]
    evaluation = {"prompts": 8, "samples_per_prompt": 2, "sizes": [1, 2], "curves": {"pass@n": points}, "notes": []}
    evaluation |= {"greedy": None, "rewards": {"exact": points[0]}, "cut_off": 0.0, "settings": {"model": "m"}}
    for folder, content in (("eval/hard", evaluation), ("elsewhere", {"curves": 1})):
        (grpo_run / folder).mkdir(parents=True)
        (grpo_run / folder / "results.json").write_text(json.dumps(content))
    files = write_page(grpo_run)
    assert [path.name for path in files[:3]] == ["report.html", "curves.png", "curves_reward.png"]
    assert all(path.read_bytes().startswith(b"\x89PNG") for path in files[1:])
    text = files[0].read_text()
    page = read_page(text)
    shown = " ".join(page.texts)
    assert SAMPLE in page.texts and f"1 4 {SAMPLE}" in page.texts and f"1 12 {SAMPLE}" in page.texts
    assert f"1 8 {SAMPLE}" not in page.texts  # the first and the last log only
    assert "script" not in page.elements and "link" not in page.elements
    assert all(reference.startswith(("#", "data:")) for reference in page.references) and "http" not in text
    assert "not finished: last log at step 16 of 20" in shown
    assert "0.15 → 0.7" in shown and "reward, means of the first and the last 5 logs" in shown
    assert "2 M parameters, 1.00% trained" in shown and "1.6 k tokens" in shown and "0 min 32 s of training" in shown
    assert "90% of the groups had equal rewards" in shown
    assert "dataset_name data <of> mine learning_rate 1e-06" in shown and "fastrl grpo --config 'a b'" in shown
    assert page.elements.count("svg") == 13
    assert "Accuracy over 8 prompts, 2 samples each" in shown and "0.250 ± 0.100" in shown and "elsewhere" not in shown
    defined = re.findall(r' id="(\w+)"', text)
    assert len(defined) == len(set(defined))


def test_page_of_another_trainers_run(trl_run: Path) -> None:
    run = read_run(trl_run)
    assert run.last_step == 12 and [change.metric for change in run.headline()] == ["reward", "loss"]
    page = read_page(page_html(run))
    assert "Configuration" not in page.texts and "Curves" in page.texts


def test_warnings_of_a_preference_run(tmp_path: Path) -> None:
    entries = [
        {"logps/chosen": -50.0 - s, "rewards/margins": s / 10, "rewards/a/errors": 1, "step": s} for s in range(9)
    ]
    entries[-1] |= {"loss": None, "completions/clipped_ratio": 0.9, "train_runtime": 1.0}
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(entry) + "\n" for entry in entries))
    run = read_run(tmp_path)
    not_finite, displacement, failures = run.warnings()
    assert "first at step 8" in not_finite and "a (errors)" in failures
    assert "the chosen answers became less likely" in displacement and "rpo_alpha" in displacement
    assert run.status == "finished after 8 steps"
    for entry in entries:
        entry["logps/chosen"] = -50.0
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(entry) + "\n" for entry in entries))
    assert not any("less likely" in warning for warning in read_run(tmp_path).warnings())


def test_what_is_no_run(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    (tmp_path / "empty").mkdir()
    for name, message in (("nowhere", "there is no folder"), ("file", "is not a folder"), ("empty", "is not a run")):
        with pytest.raises(NotARunError, match=message):
            read_run(tmp_path / name)


def test_plot_of_one_run(trl_run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plot", str(trl_run)]) == 0
    written = [Path(line) for line in capsys.readouterr().out.splitlines()]
    assert written[0] == trl_run / "report" / "report.html" and all(path.stat().st_size for path in written)


def test_plot_compares_runs(
    grpo_run: Path, trl_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    drawn = {}

    def recorded(histories, metrics, **options):  # type: ignore[no-untyped-def]
        drawn.update(options, runs=list(histories), metrics=metrics)
        return comparison_figure(histories, metrics, **options)

    from fastrl.report.curves import comparison_figure

    monkeypatch.setattr("fastrl.report.curves.comparison_figure", recorded)
    assert main(["plot", str(grpo_run), str(trl_run)]) == 0
    assert (tmp_path / "comparison.png").read_bytes().startswith(b"\x89PNG")
    assert drawn == {"runs": ["grpo_run", "trl_run"], "metrics": ["reward", "loss"], "x": "step", "smooth": None}
    out = tmp_path / "two.svg"
    words = ["--x", "tokens", "--metrics", "loss", "--smooth", "3", "--out", str(out)]
    assert main(["plot", str(grpo_run), str(trl_run), *words]) == 0
    assert out.stat().st_size and drawn["x"] == "num_tokens" and drawn["metrics"] == ["loss"] and drawn["smooth"] == 3
    capsys.readouterr()
    assert main(["plot", str(trl_run), "--metrics", "list"]) == 0
    assert capsys.readouterr().out.split() == ["loss", "reward", "num_tokens"]


def test_mistakes_are_one_line(
    grpo_run: Path, trl_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    lonely = tmp_path / "lonely"
    lonely.mkdir()
    (lonely / "metrics.jsonl").write_text('{"step": 1, "odd": 1.0}\n')
    mistakes = {
        (str(tmp_path / "nowhere"),): "there is no folder",
        (str(grpo_run), str(grpo_run)): "given twice",
        (str(grpo_run), str(lonely)): "no metric in common",
        (str(grpo_run), str(trl_run), "--x", "time"): "did not log seconds",
        (str(grpo_run), "--metrics", "rewrad"): "'rewrad'; did you mean 'reward'?",
        (str(grpo_run), str(trl_run), "--smooth", "0"): "--smooth: expected",
        (str(grpo_run), str(trl_run), "--out", "a.txt"): "--out: expected",
        (str(grpo_run), str(trl_run), "--out", str(tmp_path / "no" / "a.png")): "can't write",
    }
    for words, message in mistakes.items():
        assert main(["plot", *words]) == 2
        error = capsys.readouterr().err
        assert message in error and error.count("\n") == 1
