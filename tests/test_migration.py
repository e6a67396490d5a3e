"""The page of the migration from TRL: true of the code, whether or not TRL is here."""

from __future__ import annotations

import importlib.util
import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch

import fastrl
from fastrl.objectives.advantages import combine_rewards
from fastrl.trainers import GRPOConfig, SFTConfig, migration

PAGE = migration.PAGE.read_text()


def test_every_argument_is_listed() -> None:
    assert migration.missing(PAGE) == []
    without = PAGE.replace("| `packing` |", "| `pakcing` |")
    assert migration.missing(without) == ["SFTConfig.packing"]


def test_rows_say_what_the_code_says() -> None:
    assert PAGE.count("\n| `") > 200
    assert migration.outdated(PAGE) == []
    row = "| `packing` | `False` | same |"
    assert migration.outdated(PAGE.replace(row, "| `packing` | `True` | same |")) == ["SFTConfig.packing: same"]


def test_a_cell_tells_the_three_outcomes_apart() -> None:
    assert migration.here(SFTConfig, "packing", "`False`") == "same"
    assert migration.here(SFTConfig, "max_length", "`None`") == "default `1024`"
    assert migration.here(GRPOConfig, "use_liger_kernel", "`False`").startswith("refused unless `False`: ")
    assert migration.here(SFTConfig, "nothing", "`1`").startswith("refused")


def test_tables_are_up_to_date_where_trl_is() -> None:
    if importlib.util.find_spec("trl") is None:
        assert "trl" not in globals()
    else:
        assert migration.filled(PAGE) == PAGE, "run python -m fastrl.trainers.migration"


RLOO = json.loads((Path(__file__).parent / "golden" / "trl_rloo.json").read_text())["cases"]
# The page gives GRPO's settings for RLOO without a KL term, normalization and clipped rewards.
PLAIN_RLOO = [
    case
    for case in RLOO
    if not (case["config"]["beta"] or case["config"]["normalize_advantages"] or case["config"]["reward_clip_range"])
]


@pytest.mark.parametrize("case", PLAIN_RLOO, ids=lambda case: case["name"])
def test_settings_of_grpo_for_rloo(case: dict[str, Any], tmp_path: Path) -> None:
    """The advantages and the gradient that TRL's RLOOTrainer has."""
    settings = eval(f"dict({PAGE.split('GRPOConfig(')[1].split(')')[0]})")
    config, inputs, outputs = case["config"], case["inputs"], case["outputs"]
    group, epsilons = config["num_generations"], {name: config[name] for name in ("epsilon", "epsilon_high")}
    settings |= {"num_generations": group, "per_device_train_batch_size": group, **epsilons}
    args = GRPOConfig(output_dir=str(tmp_path), use_cpu=True, **settings)

    def tensor(name: str) -> torch.Tensor:
        rows = inputs[name] if name in inputs else outputs[name]
        values = [[math.nan if x is None else x for x in row] if isinstance(row, list) else row for row in rows]
        return torch.tensor(values, dtype=torch.float64)

    rewards = tensor("rewards_per_func")
    weights = torch.tensor(config["reward_weights"] or [1.0] * rewards.shape[1], dtype=torch.float64)
    groups = torch.arange(len(rewards)) // group
    advantages, _ = combine_rewards(
        rewards, weights, groups, baseline=args.advantage_baseline, scale=str(args.scale_rewards)
    )
    torch.testing.assert_close(advantages, tensor("advantages"), rtol=1e-6, atol=1e-6)
    logps = tensor("logps").requires_grad_()
    out = fastrl.policy_loss(
        logps,
        args.objective(),
        advantages=tensor("advantages"),
        mask=tensor("completion_mask").bool(),
        old_logps=tensor("old_per_token_logps"),
    )
    torch.testing.assert_close(torch.autograd.grad(out.loss, logps)[0], tensor("grad_logps"), rtol=1e-6, atol=1e-9)
