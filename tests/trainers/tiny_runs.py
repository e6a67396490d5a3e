"""What the trainer tests run on: a language model of a few thousand weights, scripted completions, recorders."""

from collections.abc import Sequence
from typing import Any

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import nn
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen2ForCausalLM,
    TrainerCallback,
)

from fastrl.rollout import Completions, SamplingParams
from fastrl.trainers import GRPOTrainer
from fastrl.trainers.rollouts import Rollouts

WORDS = ["<pad>", "<s>", "</s>", "<unk>", "<user>", "<assistant>", *"abcdefghijklmnopqrstuvwxyz", *"0123456789"]
TEMPLATE = (
    "{% for m in messages %}<{{ m['role'] }}> {{ m['content'] }} {% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)


def make_tokenizer() -> PreTrainedTokenizerFast:
    """One token per letter or digit, separated by blanks; without a chat template."""
    backend = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, pad_token="<pad>", bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    )


def tiny_model(family: str = "llama", seed: int = 0, **config: Any) -> PreTrainedModel:
    """Two layers of width 32; weights spread enough that its samples differ in length and content."""
    sizes = {
        "vocab_size": len(WORDS),
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 64,
        "pad_token_id": 0,
        "bos_token_id": 1,
        "eos_token_id": 2,
        **config,
    }
    torch.manual_seed(seed)
    model = LlamaForCausalLM(LlamaConfig(**sizes)) if family == "llama" else Qwen2ForCausalLM(Qwen2Config(**sizes))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 2:
                parameter.mul_(4.0)
    return model


def count_letters(completions: list[Any], **kwargs: Any) -> list[float]:
    """A reward that differs within most groups: the number of early letters, capped."""
    texts = [c if isinstance(c, str) else c[0]["content"] for c in completions]
    return [float(min(sum(token in "abcdefghijklm" for token in text.split()), 3)) for text in texts]


class ScriptedEngine:
    """Completions that depend on the prompt and on how often it was asked before, not on the model: 0 to 8 tokens."""

    def __init__(self, lengths: Sequence[int] = (5, 0, 8, 1, 3, 7, 2, 6)) -> None:
        self.lengths = lengths
        self.calls = 0
        self.synced = 0

    def generate(
        self, prompt_ids: Sequence[Sequence[int]], num_generations: int, sampling: SamplingParams
    ) -> Completions:
        """See RolloutEngine."""
        self.calls += 1
        completions: list[list[int]] = []
        asked: dict[tuple[int, ...], int] = {}
        for ids in prompt_ids:
            for _ in range(num_generations):
                nth = asked[tuple(ids)] = asked.get(tuple(ids), -1) + 1
                length = self.lengths[(sum(ids) + nth) % len(self.lengths)]
                generator = torch.Generator().manual_seed(1000 * sum(ids) + nth)
                tokens = torch.randint(6, len(WORDS), (length,), generator=generator).tolist()
                completions.append([*tokens[:-1], 2] if length and length < sampling.max_tokens else tokens)
        return Completions(completions)

    def sync_weights(self, model: nn.Module) -> None:
        """Counts."""
        self.synced += 1


class GradientRecorder(TrainerCallback):
    """Keeps a copy of every gradient, and of the weights, just before each optimizer step."""

    def __init__(self) -> None:
        self.grads: list[dict[str, torch.Tensor]] = []
        self.weights: list[dict[str, torch.Tensor]] = []

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, model: nn.Module, **kwargs: Any) -> None:
        """Called by Trainer."""
        self.grads.append({n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None})
        self.weights.append({n: p.detach().clone() for n, p in model.named_parameters()})


def record_rollouts(trainer: GRPOTrainer) -> list[Rollouts]:
    """A list that every batch of rollouts is appended to as it is made, before it is shuffled and split."""
    made: list[Rollouts] = []
    make = trainer.make_rollouts

    def making(*args: Any, **kwargs: Any) -> Rollouts:
        made.append(make(*args, **kwargs))
        return made[-1]

    trainer.make_rollouts = making  # type: ignore[method-assign]
    return made


# Parts of the names of what the clock decides.
TIMES = ("step_time", "tokens_per_second", "runtime", "per_second", "train_loss", "total_flos")


def history(trainer: Any) -> list[dict[str, Any]]:
    """What was logged, without what the clock decides."""
    kept = []
    for log in trainer.state.log_history:
        timeless = {k: v for k, v in log.items() if k != "eps" and not any(part in k for part in TIMES)}
        if len(timeless) > 2:  # the closing summary has only epoch and step left
            kept.append(timeless)
    return kept
