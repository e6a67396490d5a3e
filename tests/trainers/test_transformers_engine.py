"""TransformersEngine: what it samples from, where it cuts, and that it leaves the model as it was."""

import pytest
import torch
from tiny_runs import WORDS, tiny_model

from fastrl.rollout import RolloutEngine, SamplingParams, TransformersEngine

PROMPTS = [[6, 7, 8], [9], [10, 11]]


def engine(model: torch.nn.Module, eos: tuple[int, ...] = (2,)) -> TransformersEngine:
    return TransformersEngine(model, eos_token_ids=eos, pad_token_id=0, bos_token_id=1)


def test_shape_and_order() -> None:
    torch.manual_seed(0)
    rollouts = engine(tiny_model())
    assert isinstance(rollouts, RolloutEngine)
    sampled = rollouts.generate(PROMPTS, 4, SamplingParams(max_tokens=6))
    assert len(sampled.ids) == 12 and sampled.logps is None
    assert all(1 <= len(ids) <= 6 for ids in sampled.ids)
    assert rollouts.generate([], 4, SamplingParams(max_tokens=6)).ids == []


def test_greedy_choice_does_not_depend_on_the_padding_of_its_batch() -> None:
    rollouts = engine(tiny_model("qwen2"), eos=())
    sampling = SamplingParams(max_tokens=8, top_k=1)
    together = rollouts.generate(PROMPTS, 1, sampling).ids
    assert together == [rollouts.generate([prompt], 1, sampling).ids[0] for prompt in PROMPTS]
    assert len({tuple(ids) for ids in together}) == 3


def test_cut_after_the_first_of_any_end_token() -> None:
    torch.manual_seed(0)
    ends = tuple(range(2, 20))
    for ids in engine(tiny_model(), ends).generate(PROMPTS, 8, SamplingParams(max_tokens=12)).ids:
        inside = [token in ends for token in ids]
        assert not any(inside[:-1]) and (inside[-1] or len(ids) == 12)


def test_end_token_that_is_also_the_padding() -> None:
    torch.manual_seed(0)
    rollouts = TransformersEngine(tiny_model(), eos_token_ids=[2], pad_token_id=2)
    for ids in rollouts.generate([[6, 7], [8]] * 20, 1, SamplingParams(max_tokens=20)).ids:
        assert 2 not in ids[:-1]


def test_the_models_own_generation_settings_do_not_leak_in() -> None:
    """A model shipped with top_k=1 would always sample the same token."""
    model = tiny_model()
    model.generation_config.top_k = 1
    torch.manual_seed(0)
    sampled = engine(model, ()).generate([[6, 7]], 50, SamplingParams(max_tokens=1)).ids
    assert len({ids[0] for ids in sampled}) > 5


@pytest.mark.parametrize(
    "sampling",
    [
        {"top_k": 3},
        {"top_p": 0.2},
        {"min_p": 0.9},
        {"temperature": 0.01},
        {"engine_kwargs": {"suppress_tokens": [i for i in range(len(WORDS)) if i not in (7, 8)]}},
    ],
    ids=lambda s: next(iter(s)),
)
def test_sampling_settings_reach_the_sampler(sampling: dict) -> None:
    torch.manual_seed(0)
    model = tiny_model()
    plain = engine(model, ()).generate([[6, 7]], 60, SamplingParams(max_tokens=1)).ids
    settled = engine(model, ()).generate([[6, 7]], 60, SamplingParams(max_tokens=1, **sampling)).ids
    assert len({ids[0] for ids in settled}) <= max(3, len({ids[0] for ids in plain}) // 2)


def test_repetition_penalty_reaches_the_sampler() -> None:
    sampling = SamplingParams(max_tokens=10, top_k=1, repetition_penalty=1e6)
    (ids,) = engine(tiny_model(), ()).generate([[6, 7]], 1, sampling).ids
    assert len(set(ids)) == 10


def test_the_model_is_left_as_it_was() -> None:
    model = tiny_model()
    model.gradient_checkpointing_enable()
    model.train()
    model.model.layers[0].eval()  # a user's frozen part
    before = {name: module.training for name, module in model.named_modules()}
    checkpointed = [name for name, m in model.named_modules() if getattr(m, "gradient_checkpointing", False)]
    config, settings = model.generation_config, model.generation_config.to_dict()
    used_cache: list[bool] = []
    model.model.register_forward_pre_hook(
        lambda module, args, kwargs: used_cache.append(kwargs.get("past_key_values") is not None), with_kwargs=True
    )
    engine(model).generate(PROMPTS, 1, SamplingParams(max_tokens=4))
    assert all(used_cache[1:])
    assert {name: module.training for name, module in model.named_modules()} == before
    assert checkpointed == [name for name, m in model.named_modules() if getattr(m, "gradient_checkpointing", False)]
    assert checkpointed
    assert model.generation_config is config and config.to_dict() == settings


def test_errors() -> None:
    with pytest.raises(ValueError, match=r"prompt_ids\[1\]: expected at least one token"):
        engine(tiny_model()).generate([[6], []], 1, SamplingParams(max_tokens=4))
    with pytest.raises(ValueError, match="GenerationConfig has no entry top_q"):
        engine(tiny_model()).generate([[6]], 1, SamplingParams(max_tokens=4, engine_kwargs={"top_q": 1}))
