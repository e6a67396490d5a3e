"""DPO's known failure and its remedies on a toy: the margin rises while the chosen answer becomes less likely.

    python examples/dpo_likelihood.py [--plot curves.png]

A small GRU over 50 tokens is first trained on both answers of 64 made-up pairs that differ in one token, then by each
of four preference objectives from the same start. Offline, a few seconds on one core. DPO's loss sees the difference of
the two answers only; where they are alike, what pushes the rejected one down takes the chosen one along (Pal et al.
2024). `LikelihoodWatch` sees it and warns; each remedy is one argument of the same objective. NLL raises the chosen
answer outright; the other two hold it near the reference while they can (with --steps 150, APO lets it slip too).
"""

from __future__ import annotations

import argparse
import copy
import warnings

import torch
from torch import Tensor, nn

import fastrl
from fastrl.objectives.dpo import PreferenceObjective
from fastrl.objectives.likelihood import LikelihoodWatch
from fastrl.objectives.preference import linear_preference_loss

VOCABULARY, PAIRS, PROMPT, ANSWER, HIDDEN = 50, 64, 4, 8, 48
OBJECTIVES = {
    "DPO": PreferenceObjective(beta=0.1),
    "DPO + NLL (rpo_alpha=1)": PreferenceObjective(beta=0.1, rpo_alpha=1.0),
    "APO zero": PreferenceObjective(beta=0.1, loss_type="apo_zero"),
    "DPO-Positive (dpop_lambda=5)": PreferenceObjective(beta=0.1, dpop_lambda=5.0),
}


class Model(nn.Module):
    """A causal language model of one GRU layer; its head is read by the fused losses."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(VOCABULARY, HIDDEN)
        self.gru = nn.GRU(HIDDEN, HIDDEN, batch_first=True)
        self.head = nn.Linear(HIDDEN, VOCABULARY, bias=False)

    def forward(self, tokens: Tensor) -> Tensor:  # (N, T) -> (N, T, HIDDEN)
        return self.gru(self.embedding(tokens))[0]


def pairs() -> Tensor:
    """`(2 PAIRS, PROMPT + ANSWER)`: chosen, then rejected, which has another token in one place."""
    chosen = torch.randint(VOCABULARY, (PAIRS, PROMPT + ANSWER))
    rejected = chosen.clone()
    rejected[:, PROMPT] = (chosen[:, PROMPT] + torch.randint(1, VOCABULARY, (PAIRS,))) % VOCABULARY
    return torch.cat([chosen, rejected])


def train(model: Model, tokens: Tensor, objective: PreferenceObjective, steps: int) -> list[dict[str, float]]:
    """The metrics of each step."""
    inputs, ids = tokens[:, :-1], tokens[:, 1:]
    mask = (torch.arange(ids.shape[1]) >= PROMPT - 1).expand(ids.shape)
    with torch.no_grad():
        ref_logps = fastrl.linear_logprobs(model(inputs), model.head.weight, ids, mask=mask).logps
    optimizer = torch.optim.SGD(model.parameters(), lr=0.2)
    watch, history = LikelihoodWatch(window=5), []
    for _ in range(steps):
        out = linear_preference_loss(model(inputs), model.head.weight, ids, objective, mask=mask, ref_logps=ref_logps)
        optimizer.zero_grad()
        out.loss.backward()
        optimizer.step()
        history.append({k: float(v) for k, v in out.metrics.items()} | watch.update(out.metrics))
    return history


def pretrain(model: Model, tokens: Tensor, steps: int) -> None:
    """Both answers alike: the reference."""
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    for _ in range(steps):
        loss = -fastrl.linear_logprobs(model(tokens[:, :-1]), model.head.weight, tokens[:, 1:]).logps.mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()


def run(steps: int = 75, seed: int = 0) -> dict[str, list[dict[str, float]]]:
    """Metrics per step, per objective."""
    torch.manual_seed(seed)
    model, tokens = Model(), pairs()
    pretrain(model, tokens, steps=60)
    histories = {}
    for name, objective in OBJECTIVES.items():
        print(f"\n{name}")
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            histories[name] = train(copy.deepcopy(model), tokens, objective, steps)
        for step in (0, steps // 2, steps - 1):
            at = histories[name][step]
            shown = ("logps/chosen", "logps/rejected", "rewards/margins", "rewards/displaced")
            print(f"  step {step:3d}:", ", ".join(f"{name} {at[name]:7.3f}" for name in shown))
        for warning in caught:
            print(f"  warning: {warning.message}")
    return histories


def plot(histories: dict[str, list[dict[str, float]]], path: str) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, 2, figsize=(10, 4))
    for axis, metric in zip(axes, ("logps/chosen", "rewards/margins"), strict=True):
        for name, history in histories.items():
            axis.plot([step[metric] for step in history], label=name)
        axis.set(title=metric, xlabel="step")
    axes[0].legend()
    figure.tight_layout()
    figure.savefig(path, dpi=120)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--plot", metavar="PNG", help="also draw the curves into this file (needs matplotlib)")
    parser.add_argument("--steps", type=int, default=75)
    arguments = parser.parse_args()
    result = run(arguments.steps)
    if arguments.plot:
        plot(result, arguments.plot)
