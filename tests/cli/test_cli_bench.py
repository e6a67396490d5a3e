"""`fastrl bench`: its arguments, its files, its progress, its exit code."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from fastrl.benchmark import suite
from fastrl.cli import main


@pytest.fixture
def tiny(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(suite.SHAPES, "smollm2", suite.Shape("tiny", 16, 300))


def bench(out: Path, *options: str) -> int:
    arguments = ["bench", "--out", str(out), "--device", "cpu", "--tokens", "64", "--length", "8", *options]
    return main(arguments)


def test_a_run_writes_its_files_and_shows_progress(tiny: None, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    out = tmp_path / "new" / "results"
    options = ("--quick", "--ops", "train", "live", "score", "--shapes", "smollm2", "--peers", "eager", "quack")
    assert bench(out, *options) == 0
    shown = capsys.readouterr()
    results = json.loads((out / "results.json").read_text())
    assert results["command"].startswith("fastrl bench --out") and results["facts"]["versions"]["torch"]
    assert {row["op"] for row in results["rows"]} == {"train", "live", "score"}
    for row in results["rows"]:
        assert row["floor"] or row["errors"]
        assert row["median_s"] > 0 and row["min_s"] <= row["median_s"] <= row["max_s"] and row["to_floor"] > 0
        assert {"N", "D", "V", "formula", "cost", "peak_bytes"} <= row.keys()
    assert results["absent"] == {"quack linear_cross_entropy": "its kernels need a CUDA device"}
    page = (out / "results.md").read_text()
    assert "three bare GEMMs" in page and "**fastrl**" in page and page.strip() in shown.out
    assert (out / "time_against_live_share.png").exists() and (out / "benchmark.png").exists()
    assert "s left] forward + backward, tiny: checking fastrl" in shown.err


def test_no_peers_at_all(tiny: None, tmp_path: Path) -> None:
    assert bench(tmp_path, "--ops", "frozen", "--shapes", "smollm2", "--peers") == 0
    rows = json.loads((tmp_path / "results.json").read_text())["rows"]
    assert {row["contender"] for row in rows} == {"two bare GEMMs", "fastrl"}


def test_a_wrong_result_of_ours_is_exit_code_1(
    tiny: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    import fastrl

    right = fastrl.linear_logprobs
    monkeypatch.setattr(
        fastrl, "linear_logprobs", lambda *a, **k: (s := right(*a, **k))._replace(logps=1.001 * s.logps)
    )
    assert bench(tmp_path, "--ops", "score", "--shapes", "smollm2", "--peers", "eager") == 1
    assert "**FAILED**: fastrl: score, tiny: wrong: logps" in capsys.readouterr().out


def test_interrupted_it_keeps_what_it_has(tiny: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(self: suite.Suite, effort: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(suite.Suite, "_logits", interrupt)
    options = ("--ops", "train", "logits", "--shapes", "smollm2", "--peers", "eager")
    assert bench(tmp_path, *options) == 130
    assert json.loads((tmp_path / "results.json").read_text())["rows"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--ops", "trian"), "--ops: unknown name 'trian'; did you mean 'train'?"),
        (("--peers", "nobody"), "--peers: unknown name 'nobody'; --peers list shows all"),
        (("--shapes", "llama-3-80b"), "--shapes: unknown name 'llama-3-80b'; did you mean 'llama-3-8b'?"),
        (("--step", "dop"), "--step: unknown name 'dop'; did you mean 'dpo'?"),
        (("--device", "tpu"), "--device: "),
        (("--device", "meta"), "--device: cpu or cuda, got meta"),
        (("--tokens", "0"), "--tokens: expected a number above 0, got 0"),
        (("--minutes", "-1"), "--minutes: expected a number above 0, got -1.0"),
        (("--backend", "cuda"), "--backend: "),
        (("--backend", "nonsense"), "--backend: backend must be None or one of"),
    ],
)
def test_mistakes_are_one_line(
    options: tuple[str, ...], message: str, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    assert main(["bench", "--device", "cpu", "--out", str(tmp_path / "out"), *options]) == 2
    error = capsys.readouterr().err
    assert message in error and len(error.strip().splitlines()) == 1
    assert not (tmp_path / "out").exists()


def test_an_out_that_is_a_file(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    (tmp_path / "file").write_text("x")
    assert main(["bench", "--out", str(tmp_path / "file"), "--device", "cpu"]) == 2
    assert "--out" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("option", "names"),
    [("--ops", suite.OPS), ("--peers", suite.PEERS), ("--shapes", suite.SHAPES), ("--step", suite.STEP_METHODS)],
)
def test_names_are_listed(option: str, names: tuple[str, ...], capsys: pytest.CaptureFixture) -> None:
    assert main(["bench", option, "list"]) == 0
    assert capsys.readouterr().out.split() == list(names)
