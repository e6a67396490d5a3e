"""The README's Python examples run as they stand, and what it names exists."""

from __future__ import annotations

import re
from pathlib import Path

import torch
from transformers import LlamaConfig, LlamaForCausalLM

import fastrl

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()


def test_examples_run() -> None:
    blocks = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    assert len(blocks) == 4
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=50, **sizes))
    ids = torch.randint(50, (2, 5))
    names = {
        "hidden": torch.randn(2, 5, 16, requires_grad=True),
        "model": model,
        "ids": ids,
        "attention": torch.ones_like(ids),
        "advantages": torch.tensor([1.0, -1.0]),
        "mask": torch.ones(2, 5),
        "old": torch.randn(2, 5) - 4,
        "reference_logps": torch.randn(4, 5) - 4,
        "teacher_hidden": torch.randn(2, 5, 24),
        "teacher_weight": torch.randn(50, 24),
        "fastrl": fastrl,
        "torch": torch,
    }
    exec(blocks[0], names)
    assert names["hidden"].grad is not None and model.lm_head.weight.grad is not None  # type: ignore[attr-defined]
    exec(blocks[1], names)
    want = model(ids).logits[:, :-1].log_softmax(-1).gather(-1, ids[:, 1:, None])[..., 0]
    torch.testing.assert_close(names["out"].logps, want)  # type: ignore[attr-defined]
    exec(blocks[2], names)
    constants = {"advantages": names["advantages"], "mask": names["mask"]}
    hidden, weight = names["hidden"], model.lm_head.weight
    out = fastrl.linear_policy_loss(hidden, weight, ids, names["Reinforce"](), **constants)  # type: ignore[operator]
    stats = fastrl.linear_logprobs(hidden, weight, ids)  # type: ignore[arg-type]
    torch.testing.assert_close(out.loss, -(stats.logps * names["advantages"][:, None]).mean())  # type: ignore[index]
    exec(blocks[3], names)
    student = torch.log_softmax(hidden @ weight.T, -1)  # type: ignore[operator]
    teacher = torch.log_softmax(names["teacher_hidden"] @ names["teacher_weight"].T, -1)  # type: ignore[operator]
    want = (teacher.exp() * (teacher - student)).sum(-1).mean()  # forward KL
    torch.testing.assert_close(names["out"].loss, want)  # type: ignore[attr-defined]


def test_files_and_targets_exist() -> None:
    for name in re.findall(r"`((?:bench|kernels|examples|docs)/[\w./]+)`|\]\(([\w./]+)\)", README):
        path = ROOT / (name[0] or name[1])
        assert path.exists(), path
    targets = (ROOT / "Makefile").read_text()
    for target in re.findall(r"`?make ([a-z][\w-]+)", README):
        assert f"\n{target}:" in targets, target
