"""The rows of `fastrl bench --ops objectives`: ours agrees with the origins' own code, and what does not is refused."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from fastrl.benchmark import objective_heads, objectives, suite, tables
from fastrl.benchmark.comparisons import OP, Comparison, objective_workload
from fastrl.benchmark.objective_peers import Absent
from fastrl.benchmark.workload import Effort, _errors, allowed_errors, measure

CPU = torch.device("cpu")
ONCE = Effort(0.0, 1, 1)
GROUPS = {
    "policy": (objectives.policy_comparisons, 6, 9),
    "critic": (objectives.critic_comparisons, 6, 9),
    "correction": (objectives.correction_comparisons, 6, 9),
    "advantages": (objectives.advantage_comparisons, 16, 9),
    "preference": (objectives.preference_comparisons, 6, 9),
    "heads": (objective_heads.head_comparisons, 2, 7, 16, 211),
}


def silent(text: str) -> None:
    """Progress that nobody reads."""


def comparisons(group: str) -> Iterator[Comparison]:
    make, *sizes = GROUPS[group]
    return make(*sizes, CPU)


def toy(**changes: object) -> Comparison:
    """The sum of squares, which "peer" has right."""
    values = {
        "group": "g", "title": "squares", "sizes": {"B": 3}, "inputs": {"logps": torch.arange(3.0)},
        "ours": lambda logps: logps.square().sum(), "peers": {"peer": lambda: lambda logps: (logps * logps).sum()},
    }  # fmt: skip
    return Comparison(**{**values, **changes})  # type: ignore[arg-type]


def gone() -> object:
    raise Absent("it is not installed")


@pytest.mark.parametrize("group", GROUPS)
def test_ours_agrees_with_every_peer_that_is_installed(group: str) -> None:
    absent, titles, compared = {}, [], 0
    for comparison in comparisons(group):
        titles.append((comparison.group, comparison.title))
        try:
            workload = objective_workload(comparison)
        except Absent as reason:
            absent[str(reason)] = comparison.title
            continue
        expected, judged = workload.expected(), None
        for entry in sorted(workload.entries, key=lambda e: not e.judge):
            errors = _errors(entry.call(), expected)
            judged = errors if entry.judge else judged
            allowed = allowed_errors(workload.dtype, entry, errors, judged)
            what = f"{comparison.group}: {comparison.title}: {entry.name}"
            assert all(errors[part] <= allowed[part] for part in errors), (what, errors, allowed)
        compared += len(comparison.peers) - len(workload.not_run)
    assert len(titles) == len(set(titles)) > 0
    assert all("can't be imported" in reason for reason in absent)
    if compared == 0:
        pytest.skip("; ".join(absent))


def test_a_result_that_differs_from_the_origin_gets_no_time() -> None:
    for factor in (1.0, 1.001):
        some = toy(ours=lambda logps, factor=factor: factor * logps.square().sum())
        rows = measure(objective_workload(some), CPU, ONCE, silent)
        assert ["refused" in row for row in rows] == [False, factor != 1, False]


def test_the_truth_is_the_peers_code_in_fp64_or_the_exact_form() -> None:
    dtypes: list[torch.dtype] = []

    def peer(logps: Tensor) -> Tensor:
        dtypes.append(logps.dtype)
        return logps.square().sum()

    rows = measure(objective_workload(toy(peers={"peer": lambda: peer})), CPU, ONCE, silent)
    assert dtypes[0] == torch.float64 and rows[2]["contender"] == "peer"
    wrong = toy(exact=lambda logps: 2 * logps.square().sum())
    assert ["refused" in row for row in measure(objective_workload(wrong), CPU, ONCE, silent)] == [
        False, True, False, True
    ]  # fmt: skip


def test_a_peer_that_is_absent_is_listed_and_without_any_there_is_no_row() -> None:
    some = objective_workload(toy(peers={"gone": gone, "peer": lambda: lambda logps: logps.square().sum()}))
    assert some.not_run == {"gone": "it is not installed"} and [e.name for e in some.entries] == ["fastrl", "peer"]
    with pytest.raises(Absent, match="not installed"):
        objective_workload(toy(peers={"gone": gone}))


def test_only_tokens_inside_the_mask_are_compared() -> None:
    mask = torch.tensor([[1, 0]])
    inputs = {"rewards": torch.tensor([[2.0, torch.nan]]), "mask": mask}
    same = toy(
        inputs=inputs, leaves=(), ours=lambda rewards, mask: {"advantages": rewards.nan_to_num()},
        peers={"peer": lambda: lambda rewards, mask: {"advantages": rewards}},
    )  # fmt: skip
    assert all("refused" not in row for row in measure(objective_workload(same), CPU, ONCE, silent))


def test_the_run_has_a_table_of_objectives(monkeypatch: pytest.MonkeyPatch) -> None:
    def some(b: int, t: int, device: torch.device) -> Iterator[Comparison]:
        yield toy(title=f"b {b}, t {t}")
        yield toy(title="alone", peers={"gone": gone})

    for name in ("policy", "preference", "advantage", "correction", "critic"):
        monkeypatch.setattr(suite, f"{name}_comparisons", some)
    monkeypatch.setattr(suite, "head_comparisons", lambda *sizes: iter(()))
    results = suite.Suite(suite.Options(CPU, (OP,), quick=True, minutes=0.05), silent, lambda r: None).run()
    assert results.failures == [] and results.absent == {"gone": "it is not installed"}
    page = tables.markdown(results, "fastrl bench")
    assert (
        "### g" in page and "| b 16, t 128 |" in page and "| peer |" in page and "- gone: it is not installed" in page
    )
