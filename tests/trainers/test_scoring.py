"""Scoring: independent of padding, of batching and of dropout."""

import pytest
import torch
from tiny_runs import WORDS, tiny_model
from transformers import GPT2Config, GPT2LMHeadModel

from fastrl.integrations import patch_model
from fastrl.trainers.packing import Packer
from fastrl.trainers.rollouts import Rollouts
from fastrl.trainers.scoring import completion_logps
from fastrl.trainers.token_batch import pad

CPU = torch.device("cpu")
PROMPTS = [[6, 7, 8, 9, 10], [11], [12, 13], [14, 15, 16]]
COMPLETIONS = [[17, 18], [19, 20, 21, 22, 2], [], [23]]


def rollouts_of(prompts: list[list[int]], completions: list[list[int]]) -> Rollouts:
    ids, mask = pad(prompts, 0, left=True, device=CPU)
    completion_ids, completion_mask = pad(completions, 0, left=False, device=CPU)
    return Rollouts(ids, mask, completion_ids, completion_mask, torch.ones(len(prompts)))


def gpt2() -> GPT2LMHeadModel:
    torch.manual_seed(0)
    config = GPT2Config(vocab_size=len(WORDS), n_embd=32, n_layer=2, n_head=4, n_positions=32, initializer_range=0.5)
    return GPT2LMHeadModel(config)


@pytest.mark.parametrize("make", [gpt2, tiny_model], ids=["learned_positions", "rotary"])
@pytest.mark.parametrize("tokens", [1, 12, 100])
def test_scores_are_those_of_each_sequence_alone(make: type, tokens: int) -> None:
    """Left padding must not shift learned positions, whatever else is in the batch."""
    model = make().train()
    with patch_model(model):
        packer = Packer.for_model(model, tokens_per_pass=tokens)
        together = completion_logps(model, rollouts_of(PROMPTS, COMPLETIONS), packer, temperature=0.7)
    assert together.shape == (4, 5)
    model.eval()
    for row, (prompt, completion) in enumerate(zip(PROMPTS, COMPLETIONS, strict=True)):
        logits = model(input_ids=torch.tensor([prompt + completion])).logits[0] / 0.7
        logps = torch.log_softmax(logits, -1)
        expected = [float(logps[len(prompt) - 1 + t, token]) for t, token in enumerate(completion)]
        padding = [0.0] * (5 - len(completion))
        torch.testing.assert_close(together[row], torch.tensor(expected + padding), rtol=1e-4, atol=1e-4)


def test_scoring_is_without_dropout_and_leaves_training_on() -> None:
    model = tiny_model(attention_dropout=0.5).train()
    rollouts = rollouts_of(PROMPTS, COMPLETIONS)
    with patch_model(model):
        one, two = (completion_logps(model, rollouts, Packer.for_model(model), temperature=1.0) for _ in range(2))
    assert torch.equal(one, two) and one.any()
    assert all(module.training for module in model.modules())


def test_nothing_to_score() -> None:
    model = tiny_model()
    rollouts = rollouts_of(PROMPTS, [[], [], [], []])
    assert rollouts.completion_ids.shape == (4, 1)
    with patch_model(model):
        assert not completion_logps(model, rollouts, Packer.for_model(model), temperature=1.0).any()


def test_selecting_rows_cuts_the_padding_that_is_left() -> None:
    rollouts = rollouts_of(PROMPTS, COMPLETIONS)
    part = rollouts.select(torch.tensor([1, 2]))
    assert part.prompt_ids.tolist() == [[0, 11], [12, 13]]
    assert part.completion_ids.tolist() == [[19, 20, 21, 22, 2], [0] * 5]
    part = rollouts.select(torch.tensor([False, False, True, True]))
    assert part.prompt_mask.tolist() == [[False, True, True], [True] * 3]
    assert part.completion_ids.tolist() == [[0], [23]]
    assert part.num_tokens == 6
    assert [len(p) for p in rollouts.split(2)] == [2, 2]
