"""A reward model as a reward function: TRL's scores, whatever the batch; paths and models among reward functions."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForSequenceClassification, PreTrainedTokenizerFast

from fastrl.rewards import RewardModel, with_reward_models
from fastrl.trainers.reward_runner import RewardRunner

WORDS = ["<pad>", "</s>", "<unk>", "<user>", "<assistant>", *"abcdefghij"]
TEMPLATE = "{% for m in messages %}<{{ m['role'] }}> {{ m['content'] }} </s> {% endfor %}"
PROMPTS = ["a b ", "c ", "d e f g ", "a "]
COMPLETIONS = ["a", "b c d e", "f", "j i h g f e d c b a"]


def make_tokenizer(**special: str) -> PreTrainedTokenizerFast:
    backend = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="</s>", unk_token="<unk>", **special)
    tokenizer.chat_template = TEMPLATE
    return tokenizer


def make_model(labels: int = 1) -> LlamaForSequenceClassification:
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = LlamaConfig(vocab_size=len(WORDS), max_position_embeddings=16, num_labels=labels, pad_token_id=0, **sizes)
    return LlamaForSequenceClassification(config).train()  # it must be put into eval mode


def alone(model: LlamaForSequenceClassification, text: str) -> float:
    """The logit at the last token, one text at a time: nothing is padded."""
    ids = torch.tensor([[WORDS.index(word) for word in text.split()]])
    with torch.no_grad():
        hidden = model.eval().model(input_ids=ids).last_hidden_state
        return model.score(hidden)[0, -1, 0].item()


@pytest.mark.parametrize("batch_size", [1, 3, 32])
def test_scores_are_those_of_each_text_alone(batch_size: int) -> None:
    model = make_model()
    expected = [alone(model, p + c) for p, c in zip(PROMPTS, COMPLETIONS, strict=True)]
    reward = RewardModel(model.train(), make_tokenizer(pad_token="<pad>"), batch_size=batch_size)
    assert reward(PROMPTS, COMPLETIONS) == pytest.approx(expected, rel=1e-5)
    assert len({round(score, 4) for score in expected}) == len(expected) and not model.training


def test_conversations_go_through_the_chat_template() -> None:
    model = make_model()
    # TRL pads with the end-of-sequence token where there is no other, and the model then reads the token before it.
    tokenizer = make_tokenizer(pad_token="<pad>")
    prompt = [{"role": "user", "content": "a b"}]
    completion = [{"role": "assistant", "content": "c"}]
    expected = alone(model, "<user> a b </s> <assistant> c </s>")
    assert RewardModel(model, tokenizer)([prompt], [completion]) == pytest.approx([expected], rel=1e-5)
    with pytest.raises(ValueError, match="of one kind"):
        RewardModel(model, tokenizer)([prompt], ["c"])


def test_a_tokenizer_without_a_pad_token_pads_with_the_end_token() -> None:
    model = make_model()
    expected = [alone(model, p + c) for p, c in zip(PROMPTS, COMPLETIONS, strict=True)]
    reward = RewardModel(model, make_tokenizer())
    assert reward(PROMPTS, COMPLETIONS) == pytest.approx(expected, rel=1e-5)
    assert model.config.pad_token_id == WORDS.index("</s>")


def test_a_text_that_does_not_fit_gets_no_reward() -> None:
    reward = RewardModel(make_model(), make_tokenizer(pad_token="<pad>"))
    scores = reward(["a " * 15, "a "], ["b b", "b"])
    assert scores[0] is None and scores[1] is not None
    assert reward([], []) == []


def test_among_reward_functions(tmp_path: Path) -> None:
    model = make_model()
    folder = tmp_path / "judge"
    model.save_pretrained(folder)
    make_tokenizer(pad_token="<pad>").save_pretrained(folder)
    loaded = LlamaForSequenceClassification.from_pretrained(folder)

    def length(completions: list[str]) -> list[float]:
        return [float(len(text)) for text in completions]

    functions = with_reward_models([str(folder), length, loaded], device="cpu")
    runner = RewardRunner(functions, timeout=60.0)
    assert runner.names == ["judge", "length", "judge_2"]
    rewards = runner(PROMPTS, COMPLETIONS, [[0]] * 4, {}, None)
    expected = [alone(model, p + c) for p, c in zip(PROMPTS, COMPLETIONS, strict=True)]
    assert rewards[:, 0].tolist() == rewards[:, 2].tolist() == pytest.approx(expected, rel=1e-5)
    assert rewards[:, 1].tolist() == [len(text) for text in COMPLETIONS] and not math.isnan(rewards.sum())
    assert with_reward_models(length) == [length]
    with pytest.raises(ValueError, match="reward_processing_classes: expected 1"):
        with_reward_models(length, [None, None])


def test_what_is_no_reward_model() -> None:
    with pytest.raises(ValueError, match="num_labels=1, got 3 labels"):
        RewardModel(make_model(3), make_tokenizer())
    with pytest.raises(TypeError, match="expected a path or a transformers model, got function"):
        RewardModel(alone)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="the model is an object"):
        RewardModel(make_model(), make_tokenizer(), model_init_kwargs={"dtype": "bfloat16"})
