"""`fastrl doctor`: what it prints, and when it fails."""

from __future__ import annotations

import pytest
import torch

from fastrl.cli import doctor, main
from fastrl_kernels import backends


@pytest.fixture
def small(monkeypatch):
    """The self-test at a size that takes no time."""
    monkeypatch.setattr(doctor, "_TOKENS", 45)
    monkeypatch.setattr(doctor, "_HIDDEN", 16)
    monkeypatch.setattr(doctor, "_VOCABULARY", 131)


def test_reports_versions_devices_backends_and_passes(small, capsys):
    assert main(["doctor"]) == 0
    lines = [line.split() for line in capsys.readouterr().out.splitlines() if line.strip()]
    assert ["torch", torch.__version__] in lines
    words = {(line[0], line[-1]) for line in lines}
    for name, reason in backends.available().items():
        if reason is None:
            assert (name, "works") in words
            assert [name, "float32"] in [line[:2] for line in lines if line[-1] == "ok"]
            assert [name, "bfloat16"] in [line[:2] for line in lines if line[-1] == "ok"]
        else:
            assert [name, "no:"] in [line[:2] for line in lines]


def test_fails_when_the_native_backend_does_not_work(monkeypatch, capsys):
    native = "triton" if torch.cuda.is_available() else "cpu"
    monkeypatch.setattr(backends, "available", lambda: {"reference": None, native: "it is not built"})
    assert main(["doctor", "--no-test"]) == 1
    out = capsys.readouterr().out
    assert f"problem: the backend for this machine, {native}, does not work: it is not built" in out


def test_fails_when_a_backend_is_wrong(small, monkeypatch, capsys):
    import fastrl

    right = fastrl.linear_policy_loss

    def slightly_wrong(hidden, *args, **kwargs):
        return right(hidden * 1.001, *args, **kwargs)

    monkeypatch.setattr(fastrl, "linear_policy_loss", slightly_wrong)
    assert main(["doctor"]) == 1
    out = capsys.readouterr().out
    assert "WRONG" in out and "further from fp64 than 4 times plain PyTorch" in out


def test_names_a_package_that_training_needs(monkeypatch, capsys):
    version = doctor.importlib.metadata.version

    def without_transformers(name):
        if name == "transformers":
            raise doctor.importlib.metadata.PackageNotFoundError(name)
        return version(name)

    monkeypatch.setattr(doctor.importlib.metadata, "version", without_transformers)
    main(["doctor", "--no-test"])
    assert "training needs it: pip install 'fastrl[train]'" in capsys.readouterr().out


def test_calibration_is_measured_once_and_kept(tmp_path, monkeypatch, capsys):
    from fastrl_kernels import planner

    monkeypatch.setenv("FASTRL_CACHE", str(tmp_path))
    planner._costs_of.cache_clear()
    main(["doctor", "--no-test"])
    assert capsys.readouterr().out.count("(assumed)") == 2
    main(["doctor", "--no-test", "--calibrate"])
    measured = [line for line in capsys.readouterr().out.splitlines() if "(measured)" in line]
    assert len(measured) == 2
    planner._costs_of.cache_clear()
    main(["doctor", "--no-test"])
    assert [line for line in capsys.readouterr().out.splitlines() if "(measured)" in line] == measured
    planner._costs_of.cache_clear()
