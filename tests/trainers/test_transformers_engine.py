"""TransformersEngine: what it samples from, where it cuts, what it tells, and that it leaves the model as it was."""

import copy
from typing import Any

import pytest
import torch
from tiny_runs import WORDS, make_tokenizer, tiny_model

from fastrl.rollout import RolloutEngine, SamplingParams, TransformersEngine

PROMPTS = [[6, 7, 8], [9], [10, 11]]


def engine(model: torch.nn.Module, eos: tuple[int, ...] = (2,), **arguments: Any) -> TransformersEngine:
    return TransformersEngine(model, eos_token_ids=eos, pad_token_id=0, bos_token_id=1, **arguments)


def scored(model: torch.nn.Module, prompt: list[int], ids: list[int], warp: Any) -> torch.Tensor:
    """Log-probabilities (T,) of a completion by a plain forward, the logits (T, V) warped first."""
    with torch.no_grad():
        logits = model.eval()(input_ids=torch.tensor([prompt + ids])).logits[0, len(prompt) - 1 : -1].float()
    return warp(logits).log_softmax(-1)[torch.arange(len(ids)), torch.tensor(ids)]


def top3(logits: torch.Tensor) -> torch.Tensor:
    return logits.masked_fill(logits < logits.topk(3).values[:, -1:], -torch.inf)


def test_shape_and_order() -> None:
    torch.manual_seed(0)
    rollouts = engine(tiny_model())
    assert isinstance(rollouts, RolloutEngine)
    sampled = rollouts.generate(PROMPTS, 4, SamplingParams(max_tokens=6))
    assert len(sampled.ids) == 12 and sampled.logps is None and len(sampled.finish_reasons) == 12
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


def test_a_temperature_may_be_a_whole_number() -> None:
    model = tiny_model()
    whole, same = (SamplingParams(max_tokens=8, temperature=t, seed=1) for t in (2, 2.0))
    assert engine(model, ()).generate([[6, 7]], 4, whole) == engine(model, ()).generate([[6, 7]], 4, same)


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


BATCHING = {"page_size": 16, "num_blocks": 64, "max_batch_tokens": 128}


@pytest.mark.parametrize(
    ("sampling", "warp", "from_policy", "batching"),
    [
        ({}, lambda z: z, True, None),
        ({"temperature": 0.7}, lambda z: z / 0.7, True, None),
        ({"temperature": 0.7, "top_k": 3}, lambda z: top3(z / 0.7), False, None),
        ({"temperature": 0}, lambda z: z, False, None),
        ({"temperature": 0.7, "top_k": 3}, lambda z: top3(z / 0.7), False, BATCHING),
    ],
    ids=["plain", "temperature", "top_k", "greedy", "continuous"],
)
def test_logps_are_those_of_the_sampling_distribution(
    sampling: dict, warp: Any, from_policy: bool, batching: dict | None
) -> None:
    model = tiny_model()
    settings = SamplingParams(max_tokens=12, logps=True, seed=1, **sampling)
    assert settings.from_policy is from_policy
    ends = (2, 8, 12, 20, 33)
    sampled = engine(model, ends, continuous_batching=batching).generate(PROMPTS, 3, settings)
    lengths = [len(ids) for ids in sampled.ids]
    assert len(set(lengths)) > 1 or sampling.get("temperature") == 0
    rows = [prompt for prompt in PROMPTS for _ in range(3)]
    for prompt, ids, logps, reason in zip(rows, *sampled, strict=True):
        torch.testing.assert_close(torch.tensor(logps), scored(model, prompt, ids, warp), rtol=1e-4, atol=1e-4)
        assert reason == ("stop" if ids[-1] in ends else "length") and (reason == "stop" or len(ids) == 12)


def test_continuous_batching_samples_the_same_greedily_and_leaves_the_model() -> None:
    model = tiny_model().train()
    attention = model.config._attn_implementation
    sampling = SamplingParams(max_tokens=10, temperature=0)
    together = engine(model, continuous_batching=BATCHING).generate(PROMPTS, 2, sampling)
    assert together == engine(model).generate(PROMPTS, 2, sampling)
    assert model.training and model.config._attn_implementation == attention


def test_continuous_batching_reserves_no_more_cache_than_completions_need(monkeypatch: pytest.MonkeyPatch) -> None:
    model, configs = tiny_model(), []
    make = model.generate_batch

    def recorded(*args: Any, continuous_batching_config: Any, **kwargs: Any) -> Any:
        configs.append(continuous_batching_config)
        return make(*args, continuous_batching_config=continuous_batching_config, **kwargs)

    monkeypatch.setattr(model, "generate_batch", recorded)
    sampling = SamplingParams(max_tokens=10, temperature=0)
    for settings in ({"page_size": 16}, {"page_size": 16, "num_blocks": 40}):
        engine(model, continuous_batching=settings).generate(PROMPTS, 2, sampling)
    page = 16
    needed = 2 * sum(-(-(len(ids) + 10) // page) for ids in PROMPTS)
    assert [config.num_blocks for config in configs] == [needed + 1, 40]  # a given one wins
    assert configs[0].max_batch_tokens == 2 * sum(map(len, PROMPTS))


def test_seed() -> None:
    rollouts = engine(tiny_model(), ())
    torch.manual_seed(0)
    expected = torch.rand(3)
    torch.manual_seed(0)
    one, again, other = (
        rollouts.generate(PROMPTS, 2, SamplingParams(max_tokens=8, seed=seed)).ids for seed in (5, 5, 6)
    )
    assert one == again != other
    assert torch.equal(torch.rand(3), expected)


def test_continuous_batching_follows_torchs_random_state() -> None:
    rollouts = engine(tiny_model(), (), continuous_batching=BATCHING)
    sampled = []
    for _ in range(2):
        torch.manual_seed(7)
        sampled.append(rollouts.generate(PROMPTS, 2, SamplingParams(max_tokens=8)).ids)
    assert sampled[0] == sampled[1]


def test_stop_strings_end_a_completion_with_the_token_that_completes_them() -> None:
    tokenizer = make_tokenizer()
    rollouts = engine(tiny_model(), tokenizer=tokenizer)
    free = rollouts.generate(PROMPTS, 8, SamplingParams(max_tokens=12, seed=3, logps=True))
    text = [tokenizer.decode(ids) for ids in free.ids]
    stop = next(tokenizer.decode(ids[2:4]) for ids in free.ids if len(ids) > 5)  # two tokens long
    stopped = rollouts.generate(PROMPTS, 8, SamplingParams(max_tokens=12, seed=3, logps=True, stop=(stop, "nowhere")))
    ended = 0
    for ids, logps, reason, whole in zip(*stopped, text, strict=True):
        assert len(ids) == len(logps)
        inside = stop in tokenizer.decode(ids)
        assert inside == (stop in whole) or ids[-1] == 2  # the streams part only where a row has ended
        if inside:
            ended += 1
            assert reason == "stop" and stop not in tokenizer.decode(ids[:-1])
    assert ended
    with pytest.raises(ValueError, match="stop: finding stop strings takes the tokenizer"):
        engine(tiny_model()).generate(PROMPTS, 1, SamplingParams(max_tokens=4, stop=("a",)))
    with pytest.raises(ValueError, match="stop: stop strings do not work with continuous batching"):
        engine(tiny_model(), tokenizer=tokenizer, continuous_batching=BATCHING).generate(
            PROMPTS, 1, SamplingParams(max_tokens=4, stop=("a",))
        )


def test_a_copy_of_the_model_gets_its_weights() -> None:
    model = tiny_model()
    rollouts = engine(copy.deepcopy(model))
    assert not rollouts.shares_weights_with(model) and engine(model).shares_weights_with(model)
    sampling = SamplingParams(max_tokens=10, temperature=0)
    before = rollouts.generate(PROMPTS, 1, sampling)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter))
    assert rollouts.generate(PROMPTS, 1, sampling) == before
    rollouts.sync_weights(model)
    assert rollouts.generate(PROMPTS, 1, sampling) == engine(model).generate(PROMPTS, 1, sampling) != before
    with pytest.raises(ValueError, match="expected the parameters of the engine's copy"):
        rollouts.sync_weights(tiny_model("qwen2"))
