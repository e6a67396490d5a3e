"""vLLM for real, in process and behind the server: `make test-vllm`. Needs no GPU (vllm-cpu).

Measured with vllm-cpu 0.32.0 and SmolLM2 on an x86 CPU, |trainer's logp - vLLM's| over sampled tokens: both in fp32
mean 8e-6, max 7e-5; fp32 trainer, bf16 engine: mean 0.04, max 0.33. The bounds below leave a factor of three."""

from __future__ import annotations

import dataclasses
import math
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_runs import tiny_model
from torch import Tensor, nn

pytest.importorskip("vllm", reason="vLLM: `make test-vllm`")
os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
os.environ.setdefault("VLLM_LOGGING_LEVEL", "WARNING")

from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer

from fastrl import linear_logprobs, patch_model
from fastrl.data import demo_model_path
from fastrl.objectives.rollout_correction import Rejection, RolloutCorrection, rollout_correction
from fastrl.rollout import (
    AsyncRollouts,
    Completions,
    RolloutServerError,
    SamplingParams,
    VLLMClientEngine,
    VLLMEngine,
    policy_weights,
)

QUESTIONS = ["What is 2 + 3?", "Name a colour.", "Write a poem about the sea.", "Say yes."]
TEMPERATURE = 0.8
SAMPLING = SamplingParams(max_tokens=32, temperature=TEMPERATURE, logps=True, seed=11)
FP32_MEAN, FP32_MAX = 5e-5, 3e-4
BF16_MEAN, BF16_MAX = 0.16, 1.0
EAGER = {"enforce_eager": True, "max_num_seqs": 32, "gpu_memory_utilization": 0.1}


@pytest.fixture(autouse=True)
def poison_empty() -> None:
    """Not here: vLLM multiplies padding that it never wrote by zero."""


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return AutoTokenizer.from_pretrained(demo_model_path())


@pytest.fixture(scope="module")
def prompts(tokenizer: Any) -> list[list[int]]:
    def ids(question: str) -> list[int]:
        chat = [{"role": "user", "content": question}]
        return tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_dict=False)

    return [ids(question) for question in QUESTIONS]


def smollm(dtype: torch.dtype) -> Any:
    model = AutoModelForCausalLM.from_pretrained(demo_model_path(), dtype=dtype).eval()
    patch_model(model)
    return model


def perturb(model: nn.Module, scale: float = 0.03) -> None:
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 2:
                noise = torch.randn(parameter.shape, generator=generator) * parameter.float().std()
                parameter.add_((scale * noise).to(parameter.dtype))


@torch.no_grad()
def trainer_logps(model: Any, prompt: Sequence[int], ids: Sequence[int], temperature: float) -> Tensor:
    """What fastrl scores a completion with: from hidden states and head, without logits."""
    tokens = torch.tensor([[*prompt, *ids]])
    taken = tokens[:, -len(ids) :]

    def score(hidden: Tensor, head: Any) -> Tensor:
        x = hidden[:, -len(ids) - 1 : -1]
        return linear_logprobs(x, head.weight, taken, bias=head.bias, temperature=temperature).logps

    return model(input_ids=tokens, fastrl_head=score)[0].float()


def both(
    model: Any, prompts: Sequence[Sequence[int]], sampled: Completions, group: int, temperature: float = TEMPERATURE
) -> tuple[Tensor, Tensor, Tensor]:
    """The trainer's logps, vLLM's and the mask, each (B, T)."""
    assert sampled.logps is not None
    rows = [prompt for prompt in prompts for _ in range(group)]
    ours = [trainer_logps(model, p, ids, temperature) for p, ids in zip(rows, sampled.ids, strict=True)]
    theirs = [torch.tensor(logps) for logps in sampled.logps]
    pad = torch.nn.utils.rnn.pad_sequence
    return pad(ours, True), pad(theirs, True), pad([torch.ones(len(x), dtype=torch.bool) for x in ours], True)


def apart(model: Any, prompts: Any, sampled: Completions, group: int, temperature: float = TEMPERATURE) -> Tensor:
    ours, theirs, mask = both(model, prompts, sampled, group, temperature)
    return (ours - theirs).abs()[mask]


# In process, fp32 -----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def exact(tokenizer: Any) -> Iterator[tuple[VLLMEngine, Any]]:
    """An fp32 engine made from a model object, and that model."""
    model = smollm(torch.float32)
    torch.manual_seed(5)
    expected = torch.rand(2)
    torch.manual_seed(5)
    threads, variables = torch.get_num_threads(), dict(os.environ)
    engine = VLLMEngine(
        model,
        eos_token_ids=[tokenizer.eos_token_id],
        tokenizer=tokenizer,
        max_model_length=256,
        llm_kwargs=EAGER,
    )
    assert torch.equal(torch.rand(2), expected) and torch.get_num_threads() == threads
    for name in ("OMP_NUM_THREADS", "VLLM_ENABLE_V1_MULTIPROCESSING"):
        assert os.environ.get(name) == variables.get(name)
    yield engine, model
    engine.close()


def test_logps_are_the_trainers_and_weights_change_with_a_sync(exact: Any, prompts: Any) -> None:
    engine, model = exact
    before = engine.generate(prompts, 2, SAMPLING)
    assert len(before.ids) == 8 and len({tuple(ids) for ids in before.ids}) > 4
    difference = apart(model, prompts, before, 2)
    print(f"fp32: mean {difference.mean():.1e}, max {difference.max():.1e}")
    assert difference.mean() < FP32_MEAN and difference.max() < FP32_MAX

    perturb(model)
    stale = apart(model, prompts, engine.generate(prompts, 2, SAMPLING), 2)
    assert stale.mean() > 1000 * FP32_MEAN
    engine.sync_weights(model)
    after = engine.generate(prompts, 2, SAMPLING)
    difference = apart(model, prompts, after, 2)
    assert after.ids != before.ids
    assert difference.mean() < FP32_MEAN and difference.max() < FP32_MAX


def test_truncated_sampling_tells_the_logps_of_what_was_sampled_from(exact: Any, prompts: Any) -> None:
    engine, model = exact
    sampling = SamplingParams(max_tokens=16, temperature=TEMPERATURE, top_k=2, logps=True, seed=1)
    assert not sampling.from_policy
    sampled = engine.generate(prompts, 1, sampling)
    for prompt, ids, logps in zip(prompts, sampled.ids, sampled.logps, strict=True):
        with torch.no_grad():
            logits = model(input_ids=torch.tensor([prompt + ids])).logits[0, len(prompt) - 1 : -1] / TEMPERATURE
        kept = logits.masked_fill(logits < logits.topk(2).values[:, -1:], -torch.inf).log_softmax(-1)
        expected = kept[torch.arange(len(ids)), torch.tensor(ids)]
        torch.testing.assert_close(torch.tensor(logps), expected, rtol=1e-3, atol=1e-3)


def test_ends_stop_strings_and_reasons(exact: Any, prompts: Any, tokenizer: Any) -> None:
    engine, _ = exact
    free = engine.generate(prompts, 4, SamplingParams(max_tokens=24, seed=2))
    for ids, reason in zip(free.ids, free.finish_reasons, strict=True):
        assert tokenizer.eos_token_id not in ids[:-1]
        assert reason == ("stop" if ids[-1] == tokenizer.eos_token_id else "length")
        assert reason == "stop" or len(ids) == 24
    assert set(free.finish_reasons) == {"stop", "length"}
    stopped = engine.generate(prompts, 4, SamplingParams(max_tokens=24, seed=2, stop=("the", " is")))
    texts = [tokenizer.decode(ids) for ids in stopped.ids]
    found = ["the" in text or " is" in text for text in texts]
    assert any(found) and stopped.ids != free.ids
    for ids, free_ids, hit, reason in zip(stopped.ids, free.ids, found, stopped.finish_reasons, strict=True):
        assert ids == free_ids[: len(ids)]  # a stream of its own for each completion
        if hit:
            assert reason == "stop" and not any(s in tokenizer.decode(ids[:-1]) for s in ("the", " is"))
    regex = {"structured_outputs": {"regex": "(cat|dog)"}}
    answers = engine.generate(prompts, 1, SamplingParams(max_tokens=8, engine_kwargs=regex)).ids
    assert {tokenizer.decode(ids, skip_special_tokens=True) for ids in answers} <= {"cat", "dog"}


def test_random_state_and_seeds(exact: Any, prompts: Any) -> None:
    engine, _ = exact
    sampling = SamplingParams(max_tokens=8)
    torch.manual_seed(3)
    first = [engine.generate(prompts, 2, sampling).ids for _ in range(2)]
    torch.manual_seed(3)
    assert first == [engine.generate(prompts, 2, sampling).ids for _ in range(2)] and first[0] != first[1]
    seeded = [SamplingParams(max_tokens=8, seed=seed) for seed in (1, 1, 2)]
    one, again, other = (engine.generate([prompts[2]] * 3, 1, s).ids for s in seeded)
    assert one == again != other and len({tuple(ids) for ids in one}) > 1
    greedy = SamplingParams(max_tokens=8, temperature=0)
    assert engine.generate([prompts[0]], 2, greedy).ids[0] == engine.generate([prompts[0]], 1, greedy).ids[0]


def test_hundreds_of_seeded_requests(exact: Any, prompts: Any) -> None:
    """More prompts than a step of vLLM takes: on a CPU this failed ("CPU Generator does not use offset")."""
    engine, _ = exact
    budget = engine.llm.llm_engine.vllm_config.scheduler_config.max_num_batched_tokens
    many = [[5 + i, *prompts[2], *prompts[0]] for i in range(256)]
    assert sum(map(len, many)) > 2 * budget
    sampling = SamplingParams(max_tokens=2, seed=5, logps=True)
    sampled = engine.generate(many, 2, sampling)
    assert len(sampled.ids) == 512
    for first in (0, 300):  # a stream of its own for each completion, whoever else is there
        rows = slice(first, first + 8)
        alone = engine.generate(many[first // 2 : first // 2 + 4], 2, dataclasses.replace(sampling, seed=5 + first))
        assert sampled.ids[rows] == alone.ids


def test_what_cannot_be_sampled_is_refused(exact: Any, prompts: Any) -> None:
    engine, _ = exact
    with pytest.raises(ValueError, match=r"256 tokens.*400"):
        engine.generate([[5] * 400], 1, SAMPLING)
    with pytest.raises(ValueError, match=r"prompt_ids\[1\]: expected at least one token"):
        engine.generate([[5], []], 1, SAMPLING)
    with pytest.raises(ValueError, match=r"engine_kwargs: .*top_q"):
        engine.generate(prompts, 1, SamplingParams(max_tokens=2, engine_kwargs={"top_q": 1}))
    assert engine.generate([], 4, SAMPLING).ids == []
    with pytest.raises(ValueError, match="tensor_parallel_size: expected 1, got 2"):
        VLLMEngine("anything", eos_token_ids=[2], llm_kwargs={"tensor_parallel_size": 2})
    assert engine.generate(prompts, 1, SAMPLING).ids  # and it goes on


def test_background_generation_overlaps_and_is_bounded(exact: Any, prompts: Any) -> None:
    engine, model = exact
    engine.sync_weights(model)
    old = engine.generate(prompts, 2, SAMPLING)
    with AsyncRollouts(engine, model) as rollouts:
        rollouts.submit(prompts, 2, SAMPLING)
        work = 0  # of this thread while the other generates
        while not rollouts._results:
            torch.randn(64, 64) @ torch.randn(64, 64)
            work += 1
        assert work > 10
        perturb(model)
        rollouts.sync_weights(model)
        batch = rollouts.get()
        assert batch.completions.ids == old.ids and (batch.version, batch.staleness) == (0, 1)
        rollouts.submit(prompts, 2, SAMPLING)
        fresh = rollouts.get()
        assert (fresh.version, fresh.staleness) == (1, 0)
    assert apart(model, prompts, fresh.completions, 2).max() < FP32_MAX


# In process, bf16: the real mismatch ----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def mismatch(tokenizer: Any, prompts: Any) -> tuple[Tensor, Tensor, Tensor]:
    """Logps of an fp32 trainer and of a bf16 engine that was given its weights: the trainer's, the engine's, mask."""
    model = smollm(torch.float32)
    perturb(model)
    engine = VLLMEngine(
        str(demo_model_path()),
        eos_token_ids=[tokenizer.eos_token_id],
        dtype="bfloat16",
        max_model_length=256,
        llm_kwargs=EAGER,
    )
    stale = apart(model, prompts, engine.generate(prompts, 4, SAMPLING), 4)
    engine.sync_weights(model)
    out = both(model, prompts, engine.generate(prompts, 4, SAMPLING), 4)
    engine.close()
    assert stale.mean() > 1.5 * (out[0] - out[1]).abs()[out[2]].mean()
    return out


def test_bf16_engine_is_near_and_the_metrics_say_how_near(mismatch: Any) -> None:
    ours, theirs, mask = mismatch
    d = (ours - theirs)[mask].double()
    print(f"bf16 engine, fp32 trainer: mean {d.abs().mean():.3f}, max {d.abs().max():.3f}, of {mask.sum()} tokens")
    assert 1e-3 < d.abs().mean() < BF16_MEAN and d.abs().max() < BF16_MAX
    out = rollout_correction(ours, theirs, RolloutCorrection(level=None, rejections=()), mask=mask)
    metrics = {name: value.item() for name, value in out.metrics.items()}
    assert metrics["sampling/sampling_logp_difference/mean"] == pytest.approx(d.abs().mean().item(), rel=1e-4)
    assert metrics["sampling/sampling_logp_difference/max"] == pytest.approx(d.abs().max().item(), rel=1e-4)
    assert metrics["rollout_corr/kl"] == pytest.approx(-d.mean().item(), rel=1e-3, abs=1e-6)
    assert metrics["rollout_corr/k3_kl"] == pytest.approx((d.exp() - d - 1).mean().item(), rel=1e-2)
    assert 0 < metrics["rollout_corr/k3_kl"] < 0.05 and abs(metrics["rollout_corr/ppl_ratio"] - 1) < 0.2


@pytest.mark.parametrize("mode", ["token_truncate", "token_mask", "sequence_truncate", "sequence_mask"])
def test_correction_weights_of_the_real_mismatch(mismatch: Any, mode: str) -> None:
    ours, theirs, mask = mismatch
    d = torch.where(mask, ours - theirs, 0.0)
    log_ratio = d if mode.startswith("token") else d.sum(-1, keepdim=True).expand(d.shape)
    bound = log_ratio[mask].exp().quantile(0.9).item()  # one that acts
    out = rollout_correction(ours, theirs, RolloutCorrection.trl(mode, clip_max=bound), mask=mask)
    ratio = log_ratio.exp()
    expected = ratio.clamp(max=bound) if mode.endswith("truncate") else torch.where(ratio <= bound, ratio, 0.0)
    torch.testing.assert_close(out.weights, torch.where(mask, expected, 0.0), rtol=1e-4, atol=1e-5)
    assert (out.weights[mask] != ratio[mask]).any()
    loose = rollout_correction(ours, theirs, RolloutCorrection.trl(mode, clip_max=100.0), mask=mask)
    torch.testing.assert_close(loose.weights[mask], ratio[mask], rtol=1e-4, atol=1e-5)


def test_rejection_drops_the_tokens_that_are_far_off(mismatch: Any) -> None:
    ours, theirs, mask = mismatch
    d = (ours - theirs).abs()
    limit = d[mask].quantile(0.8).item()
    correction = RolloutCorrection(level=None, rejections=(Rejection(statistic="token_k1", upper=math.exp(limit)),))
    out = rollout_correction(ours, theirs, correction, mask=mask)
    assert torch.equal(out.mask, mask & (d <= limit))
    assert out.metrics["rollout_corr/rollout_rs_masked_fraction"].item() == pytest.approx(0.2, abs=0.03)


# Adapters -------------------------------------------------------------------------------------------------------------


def vllm_sized(**config: Any) -> Any:
    """A tiny Llama with heads that vLLM's attention takes."""
    sizes = {"hidden_size": 64, "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 32}
    return tiny_model(**{**sizes, **config})


def test_an_adapter_on_the_tied_head_is_merged(tmp_path: Path) -> None:
    model = get_peft_model(
        vllm_sized(tie_word_embeddings=True), LoraConfig(r=2, target_modules=["q_proj", "down_proj", "lm_head"])
    ).eval()
    patch_model(model)

    def move() -> None:
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if "lora_" in name:
                    parameter.add_(0.3 * torch.randn_like(parameter))

    move()
    engine = VLLMEngine(model, eos_token_ids=[2], llm_kwargs=EAGER)
    sampling = SamplingParams(max_tokens=16, logps=True, seed=4)
    for _ in range(2):
        sampled = engine.generate([[6, 7], [8]], 4, sampling)
        assert apart(plain(model), [[6, 7], [8]], sampled, 4, 1.0).max() < 1e-3
        move()
        assert apart(plain(model), [[6, 7], [8]], sampled, 4, 1.0).max() > 0.1
        engine.sync_weights(model)
    engine.close()

    tied = vllm_sized(tie_word_embeddings=True)
    engine = VLLMEngine(tied, eos_token_ids=[2], llm_kwargs=EAGER)
    with pytest.raises(ValueError, match="an adapter has untied its lm_head from the embedding"):
        engine.sync_weights(model)
    engine.sync_weights(tied)
    assert engine.generate([[6, 7]], 1, sampling).ids
    engine.close()


def plain(model: Any) -> Any:
    """The adapted model merged, as one that linear_logprobs's caller here can read."""
    merged = vllm_sized(tie_word_embeddings=False).eval()
    merged.load_state_dict(dict(policy_weights(model)))
    patch_model(merged)
    return merged


# The server -----------------------------------------------------------------------------------------------------------


@contextmanager
def serving(model: Any, *options: str) -> Iterator[tuple[str, subprocess.Popen]]:
    """The command itself, in fp32: where it listens, and the process."""
    command = [sys.executable, "-m", "fastrl.rollout.vllm_server", "--model", str(model), "--dtype", "float32"]
    command += ["--gpu-memory-utilization", "0.1", "--llm-kwargs", '{"enforce_eager": true, "max_num_seqs": 32}']
    process = subprocess.Popen([*command, *options], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    url = None
    lines: list[str] = []
    for line in process.stdout:
        lines.append(line)
        if found := re.search(r"serving \S+ at (http://\S+), completions end at \[2\]", line):
            url = found[1]
            break
    assert url is not None, "".join(lines)
    threading.Thread(target=process.stdout.read, daemon=True).start()
    try:
        yield url, process
    finally:
        process.kill()
        process.wait()


@pytest.fixture(scope="module")
def server() -> Iterator[tuple[str, subprocess.Popen]]:
    """With SmolLM2."""
    with serving(demo_model_path(), "--port", "0", "--max-model-length", "256") as served:
        yield served


def test_server_samples_from_the_weights_it_was_sent(server: Any, prompts: Any, tokenizer: Any) -> None:
    url, process = server
    model = smollm(torch.float32)
    client = VLLMClientEngine(url, bucket_bytes=64 * 2**20)
    before = client.generate(prompts, 2, SAMPLING)
    difference = apart(model, prompts, before, 2)
    assert client.version == 0 and difference.mean() < FP32_MEAN and difference.max() < FP32_MAX
    assert tokenizer.eos_token_id in {ids[-1] for ids in before.ids}

    perturb(model)
    assert apart(model, prompts, client.generate(prompts, 2, SAMPLING), 2).mean() > 1000 * FP32_MEAN
    start = time.perf_counter()
    client.sync_weights(model)
    print(f"weights over HTTP: {time.perf_counter() - start:.1f} s")
    after = client.generate(prompts, 2, SAMPLING)
    difference = apart(model, prompts, after, 2)
    assert client.version == 1 and after.ids != before.ids
    assert difference.mean() < FP32_MEAN and difference.max() < FP32_MAX
    stopped = client.generate(prompts, 1, SamplingParams(max_tokens=24, temperature=0, stop=("e",)))
    assert all("e" not in tokenizer.decode(ids[:-1]) for ids in stopped.ids)
    with pytest.raises(RolloutServerError, match=r"refused /generate: .*256"):
        client.generate([[5] * 400], 1, SAMPLING)

    process.send_signal(signal.SIGINT)
    assert process.wait(60) == 0
    with pytest.raises(RolloutServerError, match="no server to be reached"):
        client.generate(prompts, 1, SAMPLING)
