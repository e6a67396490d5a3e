"""The kernels over (B, T) vectors, compiled for real chips in every configuration: no spills, wide loads."""

from __future__ import annotations

import importlib
import itertools
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from compiling import CHIPS, Recorder, assert_fits, assert_wide_addresses, compile_recorded, record

from fastrl_kernels.objective import PolicySpec, TokenBatch
from fastrl_kernels.triton import gae, policy_terms
from fastrl_kernels.triton.tokens import token_config, token_configs

DTYPES = (torch.float32, torch.float64)
TOKENS = {"short": 64, "long": 4096}
# A sequence-level objective adds two passes over the row; k3 with the ratio is the longest arithmetic.
HEAVY = PolicySpec(0.8, 1.2, 1.5, 0.1, "k3", True, False)
PLAIN = PolicySpec(0.8, 1.2, float("inf"), 0.0, "k3", True, False)
SEQUENCE = PolicySpec(0.8, 1.2, 1.5, 0.1, "k3", True, True)


def record_terms(
    monkeypatch: pytest.MonkeyPatch, spec: PolicySpec, tokens: int, dtype: torch.dtype, full: bool, **flags: bool
) -> Recorder:
    """The launch for two rows; full: with entropy, old and reference logps, a gate, masks and a bonus."""
    x, mask = torch.zeros(2, tokens, dtype=dtype), torch.ones(2, tokens, dtype=torch.bool)
    optional = x if full else None
    ref = x if full or spec.beta != 0 else None
    batch = TokenBatch(x, optional, x if full else x[:, :1], x, ref, optional, mask if full else None)
    module = importlib.import_module("fastrl_kernels.triton.policy_terms")
    recorder = Recorder(module.policy_terms_kernel)
    with monkeypatch.context() as patch:
        patch.setattr(module, "policy_terms_kernel", recorder)
        policy_terms(spec, batch, x, optional, *([mask, mask] if full else []), **flags)
    return recorder


def check(recorder: Recorder, arch: int, folder: Path, monkeypatch: pytest.MonkeyPatch, *pointers: str) -> None:
    compiled = compile_recorded(recorder, arch, folder, monkeypatch)
    assert_fits(compiled, arch)
    assert_wide_addresses(compiled, *pointers)
    if pointers[0] == "logps_ptr":
        wide = "v2.b64" if recorder.arguments["logps_ptr"].dtype == torch.float64 else "v4.b32"
        assert f"ld.global.{wide}" in compiled.ptx and f"st.global.{wide}" in compiled.ptx
        # Fused multiply-adds would round a product of the loss unlike the definition; exp and division have their own.
        assert not re.search(r"contract", compiled.ttir)


@pytest.mark.parametrize("arch", CHIPS)
@pytest.mark.parametrize("tokens", TOKENS.values(), ids=TOKENS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_policy_terms(
    arch: int, tokens: int, dtype: torch.dtype, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pointers = ("logps_ptr", "weight_ptr", "old_logps_ptr", "grad_logps_ptr")
    forms: list[Any] = [(HEAVY, True, {}), (SEQUENCE, True, {})]
    if arch == 90:  # what a chunk of the fused loss launches
        forms.append((PLAIN, False, {"sums": False}))
    for index, (spec, full, flags) in enumerate(forms):
        folder = tmp_path / str(index)
        folder.mkdir()
        check(record_terms(monkeypatch, spec, tokens, dtype, full, **flags), arch, folder, monkeypatch, *pointers)


@pytest.mark.parametrize("arch", CHIPS)
@pytest.mark.parametrize("tokens", TOKENS.values(), ids=TOKENS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_gae(arch: int, tokens: int, dtype: torch.dtype, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    x, mask = torch.zeros(2, tokens, dtype=dtype), torch.ones(2, tokens, dtype=torch.bool)
    for through in (False, True):
        folder = tmp_path / str(through)
        folder.mkdir()
        recorder = record(monkeypatch, "gae", x, x, mask, 0.99, 0.95, through)
        check(recorder, arch, folder, monkeypatch, "rewards_ptr", "values_ptr", "mask_ptr", "returns_ptr")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_configuration_is_compiled_here(dtype: torch.dtype) -> None:
    assert [token_config(t, dtype) for t in TOKENS.values()] == list(token_configs(dtype))
    assert {token_config(t, dtype) for t in range(1, 5000)} == set(token_configs(dtype))


def test_rows_are_on_grid_axis_0(monkeypatch: pytest.MonkeyPatch) -> None:
    # Axis 1 ends at 65,535. A chunk's one row is cut over axis 1, in blocks.
    n = 65_537
    x = torch.zeros(n, 1)
    assert record(monkeypatch, "gae", x, x, x == 0, 1.0, 1.0, False).grid == (n,)
    module = importlib.import_module("fastrl_kernels.triton.policy_terms")
    recorder = Recorder(module.policy_terms_kernel)
    monkeypatch.setattr(module, "policy_terms_kernel", recorder)
    policy_terms(PLAIN, TokenBatch(x, None, x), x, None)
    assert recorder.grid == (n, 1)
    row = x.t()
    policy_terms(PLAIN, TokenBatch(row, None, row), row, None, sums=False)
    assert recorder.grid == (1, 129)
    policy_terms(SEQUENCE, TokenBatch(row, None, row, ref_logps=row), row, None, sums=False)
    assert recorder.grid == (1, 1)


def test_cpu_tensors_are_refused_outside_the_interpreter() -> None:
    x = torch.zeros(2, 3)
    with pytest.raises(RuntimeError, match="CUDA"):
        gae(x, x, x == 0, 1.0, 1.0, False)
    with pytest.raises(RuntimeError, match="CUDA"):
        policy_terms(PLAIN, TokenBatch(x, None, x), x, None)


@pytest.mark.full
@pytest.mark.parametrize("arch", CHIPS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("tokens", TOKENS.values(), ids=TOKENS)
def test_every_form(
    arch: int, dtype: torch.dtype, tokens: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    kinds = itertools.product(("k1", "k2", "k3"), (True, False), (True, False), (0.1, 0.0), (True, False))
    for index, (estimator, times_ratio, sequence, beta, full) in enumerate(kinds):
        spec = PolicySpec(0.8, 1.2, 1.5, beta, estimator, times_ratio, sequence)
        folder = tmp_path / str(index)
        folder.mkdir()
        assert_fits(
            compile_recorded(record_terms(monkeypatch, spec, tokens, dtype, full), arch, folder, monkeypatch), arch
        )
