"""Packed groups: hidden states and gradients of unmodified models are those of every sequence alone; where a model
cannot do that it is known beforehand; passes hold every sequence once and stay within their tokens."""

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
import transformers
from peft import LoraConfig, PromptTuningConfig, get_peft_model
from test_patch_model import FAMILIES, TINY, V, tiny
from tiny_runs import GradientRecorder, ScriptedEngine, tiny_model
from torch import nn

from fastrl.integrations import patch_model
from fastrl.trainers import GRPOTrainer
from fastrl.trainers.packing import Packer, prompt_numbers
from fastrl.trainers.prompt_sharing import PromptSharing, prompt_sharing
from fastrl.trainers.rollouts import Rollouts
from fastrl.trainers.scoring import completion_logps
from fastrl.trainers.token_batch import TokenBatch, pad

MORE = {
    "gemma2_short_window": ("Gemma2ForCausalLM", dict(head_dim=8, sliding_window=4, **TINY)),
    "gemma2_wide_window": ("Gemma2ForCausalLM", dict(head_dim=8, sliding_window=64, **TINY)),
    "mistral_window": ("MistralForCausalLM", dict(sliding_window=4, **TINY)),
    "phi3": ("Phi3ForCausalLM", TINY),
    "olmo2": ("Olmo2ForCausalLM", TINY),
    "smollm3": ("SmolLM3ForCausalLM", dict(no_rope_layer_interval=2, **TINY)),
    "gpt_neox": ("GPTNeoXForCausalLM", {k: v for k, v in TINY.items() if k != "num_key_value_heads"}),
    "mixture_of_experts": ("MixtralForCausalLM", dict(num_local_experts=4, sliding_window=None, **TINY)),
    "qwen3_moe": (
        "Qwen3MoeForCausalLM",
        dict(head_dim=8, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=16, **TINY),
    ),
    "attention_sinks": ("GptOssForCausalLM", dict(head_dim=8, num_local_experts=4, sliding_window=64, **TINY)),
    "falcon_rotary": ("FalconForCausalLM", {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}),
    "falcon_alibi": (
        "FalconForCausalLM",
        {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "alibi": True},
    ),
    "gpt_neo_local": (
        "GPTNeoForCausalLM",
        {"hidden_size": 32, "num_layers": 2, "num_heads": 4, "attention_types": [[["global", "local"], 1]]},
    ),
    "bloom": ("BloomForCausalLM", {"hidden_size": 32, "n_layer": 2, "n_head": 4}),
    "mamba": ("MambaForCausalLM", {"hidden_size": 32, "num_hidden_layers": 2, "state_size": 4}),
    "recurrent_gemma": (
        "RecurrentGemmaForCausalLM",
        {"num_hidden_layers": 3, "hidden_size": 32, "num_attention_heads": 4},
    ),
    "convolutions": ("Lfm2ForCausalLM", dict(layer_types=["conv", "full_attention"], **TINY)),
    "linear_attention": (
        "Qwen3NextForCausalLM",
        dict(
            head_dim=8, layer_types=["linear_attention", "full_attention"], num_experts=2, num_experts_per_tok=1, **TINY
        ),
    ),
    "counted_positions": (
        "BartForCausalLM",
        {"d_model": 32, "decoder_ffn_dim": 48, "decoder_layers": 2, "decoder_attention_heads": 4, "is_decoder": True},
    ),
    "rwkv": ("RwkvForCausalLM", {"hidden_size": 32, "num_hidden_layers": 2, "attention_hidden_size": 32}),
}
# Longest sequence that may share its prompt, where that is not any.
LIMITS = {
    "gemma2_softcap": 4096, "gemma2_no_cap": 4096, "gemma3": 4096, "gemma2_short_window": 4, "gemma2_wide_window": 64,
    "mistral_window": 4, "attention_sinks": 64, "falcon_alibi": 0, "gpt_neo_local": 0, "bloom": 0, "mamba": 0,
    "recurrent_gemma": 0, "convolutions": 0, "linear_attention": 0, "counted_positions": 0, "rwkv": 0,
}  # fmt: skip
REFUSED = {
    "falcon_alibi": "ALiBi", "gpt_neo_local": "local attention", "bloom": "takes no position_ids",
    "mamba": "takes no position_ids", "recurrent_gemma": "recurrent", "convolutions": "convolutions",
    "linear_attention": "recurrent", "counted_positions": "takes no position_ids", "rwkv": "takes no position_ids",
}  # fmt: skip

PROMPTS = [[6, 7, 8, 9, 10], [11], [12, 13, 14]]
GROUP = [[17, 18, 19], [20], [21, 22, 23, 24, 25, 2], [], [26, 27]]


def make(family: str) -> transformers.PreTrainedModel:
    if family in FAMILIES:
        return tiny(family)
    name, arguments = MORE[family]
    cls = getattr(transformers, name)
    torch.manual_seed(0)
    special = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
    model = cls(cls.config_class(vocab_size=V, **special, **arguments)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.mul_(3.0)
    return model


def rollouts_of(prompts: list[list[int]], completions: list[list[int]]) -> Rollouts:
    device = torch.device("cpu")
    ids, mask = pad(prompts, 0, left=True, device=device)
    completion_ids, completion_mask = pad(completions, 0, left=False, device=device)
    return Rollouts(ids, mask, completion_ids, completion_mask, torch.ones(len(prompts)))


def shuffled_groups() -> Rollouts:
    """Groups of five, two and one; one of them whole, one cut; an empty completion; not side by side."""
    rows = [(PROMPTS[0], c) for c in GROUP] + [(PROMPTS[1], c) for c in GROUP[1:3]] + [(PROMPTS[2], GROUP[0])]
    order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(3)).tolist()
    return rollouts_of([rows[i][0] for i in order], [rows[i][1] for i in order])


def upstream(rollouts: Rollouts) -> torch.Tensor:
    """A random gradient of every hidden state that scores a token, 0 elsewhere."""
    grad = torch.randn(*rollouts.completion_ids.shape, 32, generator=torch.Generator().manual_seed(5))
    return grad * rollouts.completion_mask[..., None]


def run(model: nn.Module, rollouts: Rollouts, packer: Packer) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Hidden states that score tokens (B, T, D), and the gradients of a random linear function of them."""
    model.zero_grad()
    grad = upstream(rollouts)
    found = torch.zeros_like(grad)
    with patch_model(model):
        for part in packer.passes(rollouts):
            hidden = part.select(model(**part.inputs, fastrl_head=lambda hidden, head: hidden)).float()
            width = hidden.shape[1]
            mask = part.batch.completion_mask[..., None]
            found[part.sequences, :width] = torch.where(mask, hidden, 0.0).detach()
            (hidden * grad[part.sequences, :width]).sum().backward()
    grads = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    return found, grads


def alone(model: nn.Module, rollouts: Rollouts) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """The same, one sequence at a time, without padding, mask or position ids."""
    model.zero_grad()
    grad = upstream(rollouts)
    found = torch.zeros_like(grad)
    with patch_model(model):
        for row in range(len(rollouts)):
            prompt = rollouts.prompt_ids[row][rollouts.prompt_mask[row]]
            completion = rollouts.completion_ids[row][rollouts.completion_mask[row]]
            if not len(completion):
                continue
            ids = torch.cat([prompt, completion[:-1]])[None]
            hidden = model(input_ids=ids, fastrl_head=lambda hidden, head: hidden)[0, -len(completion) :].float()
            found[row, : len(completion)] = hidden.detach()
            (hidden * grad[row, : len(completion)]).sum().backward()
    return found, {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def assert_same(
    got: tuple[torch.Tensor, dict[str, torch.Tensor]], want: tuple[torch.Tensor, dict[str, torch.Tensor]]
) -> None:
    torch.testing.assert_close(got[0], want[0], rtol=1e-4, atol=1e-4)
    scale = max(float(grad.abs().max()) for grad in want[1].values())
    for name, grad in want[1].items():
        torch.testing.assert_close(got[1][name], grad, rtol=1e-3, atol=1e-5 * scale, msg=name)


@pytest.mark.parametrize("family", [*FAMILIES, *MORE])
def test_which_models_share_prompts(family: str) -> None:
    sharing = prompt_sharing(make(family))
    assert sharing.longest == LIMITS.get(family, math.inf), sharing
    assert REFUSED.get(family, "window" if family in LIMITS else "") in sharing.why
    assert (sharing.why == "") is (sharing.longest == math.inf)


EXACT = [family for family in [*FAMILIES, *MORE] if LIMITS.get(family, 64) >= 64]
ONLY_EAGER = {"gemma2_softcap", "gemma2_no_cap", "gemma2_wide_window", "attention_sinks"}


@pytest.mark.parametrize(
    ("family", "attention"),
    [(family, "sdpa") for family in EXACT if family not in ONLY_EAGER]
    + [(family, "eager") for family in EXACT if family != "falcon_rotary"],  # whose attention cannot be chosen later
)
def test_packed_groups_are_exact(family: str, attention: str) -> None:
    model = make(family)
    model.set_attn_implementation(attention)
    assert model.config._attn_implementation == attention
    rollouts = shuffled_groups()
    want = alone(model, rollouts)
    packer = Packer.for_model(model, tokens_per_pass=30)
    parts = packer.passes(rollouts)
    assert sum(part.inputs["input_ids"].numel() for part in parts) < rollouts.num_tokens
    assert_same(run(model, rollouts, packer), want)
    assert_same(run(model, rollouts, Packer.for_model(model, share_prompts=False, tokens_per_pass=40)), want)


def test_one_pass_takes_everything_and_refuses_a_bound() -> None:
    model = make("qwen2")
    assert len(Packer.for_model(model, one_pass=True).passes(shuffled_groups())) == 1
    with pytest.raises(ValueError, match=r"tokens_per_pass.*FSDP"):
        Packer.for_model(model, tokens_per_pass=30, one_pass=True)


def test_the_comparison_notices_a_completion_that_sees_another() -> None:
    model = make("qwen2")
    rollouts = shuffled_groups()
    want, _ = alone(model, rollouts)
    (part,) = Packer.for_model(model, tokens_per_pass=1000).passes(rollouts)
    size = part.inputs["input_ids"].shape[1]
    wrong = {**part.inputs, "attention_mask": torch.ones(size, size, dtype=torch.bool).tril()[None, None]}
    with patch_model(model):
        hidden = part.select(model(**wrong, fastrl_head=lambda hidden, head: hidden))
    leaked = torch.where(part.batch.completion_mask[..., None], hidden, 0.0)
    assert float((leaked - want[part.sequences]).abs().max()) > 0.1


@pytest.mark.parametrize("family", ["gemma2_short_window", "mistral_window", *REFUSED])
def test_other_models_get_padded_rows_that_are_exact(family: str) -> None:
    """Also where padding leaves a trace in what comes after it: recurrent states, positions that the model counts."""
    model = make(family)
    rollouts = shuffled_groups()
    packer = Packer.for_model(model, tokens_per_pass=25)
    parts = packer.passes(rollouts)
    assert len(parts) > 1 and all(len(part.inputs["input_ids"]) == len(part.batch) for part in parts)
    assert_same(run(model, rollouts, packer), alone(model, rollouts))


def test_true_is_honoured_or_refused() -> None:
    with pytest.raises(ValueError, match=r"share_prompts: not exact for this model: BloomForCausalLM takes no pos"):
        Packer.for_model(make("bloom"), share_prompts=True)
    packer = Packer.for_model(make("mistral_window"), share_prompts=True)
    with pytest.raises(ValueError, match=r"not exact for a sequence of 10 tokens: .* sliding window of 4 tokens"):
        packer.passes(shuffled_groups())
    short = rollouts_of([[6, 7], [6, 7]], [[8, 9], [10]])
    assert packer.passes(short)[0].inputs["input_ids"].tolist() == [[6, 7, 8]]
    model = make("qwen2")
    model.config._attn_implementation = "flash_attention_2"
    with pytest.raises(ValueError, match="flash_attention_2"):
        Packer.for_model(model, share_prompts=True)
    assert Packer.for_model(model).sharing.longest == 0
    assert Packer.for_model(make("qwen2"), share_prompts=False).sharing == PromptSharing(0, "share_prompts is False")


def test_prompt_learning_is_not_packed() -> None:
    model = get_peft_model(make("qwen2"), PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3))
    assert prompt_sharing(model).longest == 0
    rollouts = shuffled_groups()
    (part,) = Packer.for_model(model).passes(rollouts)
    with patch_model(model):
        hidden = part.select(model(**part.inputs, fastrl_head=lambda hidden, head: hidden))
        b = part.batch
        prompt, completion = (b.prompt_ids[0][b.prompt_mask[0]], b.completion_ids[0][b.completion_mask[0]])
        ids = torch.cat([prompt, completion[:-1]])[None]
        alone_in_its_row = model(input_ids=ids, fastrl_head=lambda hidden, head: hidden)[0, -len(completion) :]
    torch.testing.assert_close(hidden[0, : len(completion)], alone_in_its_row, rtol=1e-4, atol=1e-4)
    assert prompt_sharing(get_peft_model(make("qwen2"), LoraConfig(target_modules=["q_proj"]))).longest == math.inf


@pytest.mark.parametrize("share", [None, False], ids=["packed", "padded"])
@pytest.mark.parametrize("tokens", [1, 9, 17, 40, math.inf])
def test_passes_hold_every_sequence_once_within_their_tokens(tokens: float, share: bool | None) -> None:
    rollouts = shuffled_groups()
    parts = Packer.for_model(make("llama_tied"), share, tokens).passes(rollouts)
    assert sorted(torch.cat([part.sequences for part in parts]).tolist()) == list(range(len(rollouts)))
    for part in parts:
        size = part.inputs["input_ids"].numel()
        longer = int((part.batch.completion_mask.sum(1) > 1).sum())  # those with inputs besides their prompt
        assert size <= tokens or longer <= 1, (size, part.sequences)
        for name, tensor in part.batch.tensors().items():
            if tensor.ndim == 1:
                assert torch.equal(tensor, getattr(rollouts, name)[part.sequences])
    if tokens == math.inf:
        assert len(parts) == 1
    assert Packer.for_model(make("llama_tied"), share).passes(rollouts.select(torch.zeros(8, dtype=torch.bool))) == []


def test_long_completions_repeat_their_prompt_when_attention_costs_more() -> None:
    """Eight completions of 2,000 tokens after a prompt of 10 would attend over rows of 16,000 tokens for nothing."""
    rollouts = rollouts_of([[6] * 10] * 8, [[7] * 2000] * 8)
    packer = Packer.for_model(make("llama_tied"), tokens_per_pass=100_000)
    assert packer.passes(rollouts)[0].inputs["input_ids"].shape == (8, 2009)
    rollouts = rollouts_of([[6] * 2000] * 8, [[7] * 10] * 8)
    assert packer.passes(rollouts)[0].inputs["input_ids"].shape == (1, 2072)


def test_equal_prompts_are_told_by_their_tokens_not_their_padding() -> None:
    rollouts = rollouts_of([[6, 7], [7], [0, 7], [6, 7], [7]], [[8]] * 5)
    assert len(set(prompt_numbers(rollouts).tolist())) == 3
    assert prompt_numbers(rollouts)[1] == prompt_numbers(rollouts)[4] != prompt_numbers(rollouts)[2]


def test_bf16_packed_is_as_near_to_fp32_as_padded() -> None:
    rollouts = shuffled_groups()
    truth, _ = alone(make("qwen2"), rollouts)
    model = make("qwen2").to(torch.bfloat16)
    errors = [
        float((run(model, rollouts, Packer.for_model(model, share))[0] - truth).norm() / truth.norm())
        for share in (None, False)
    ]
    assert errors[0] < 2 * errors[1] < 0.2, errors


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_autocast_packed_is_as_near_to_fp32_as_padded(attention: str) -> None:
    rollouts = shuffled_groups()
    truth, _ = alone(make("qwen2"), rollouts)
    model = make("qwen2")
    model.set_attn_implementation(attention)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = [run(model, rollouts, Packer.for_model(model, share))[0] for share in (None, False)]
    errors = [float((hidden - truth).norm() / truth.norm()) for hidden in found]
    assert 0 < errors[0] < 2 * errors[1] < 0.2, errors


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_scores_do_not_depend_on_the_layout(attention: str) -> None:
    model = tiny_model()
    model.set_attn_implementation(attention)
    rollouts = shuffled_groups()
    with patch_model(model):
        scores = [
            completion_logps(model, rollouts, Packer.for_model(model, share, tokens), temperature=0.8)
            for share, tokens in ((None, 1000), (None, 12), (False, 1000), (False, 12))
        ]
    assert scores[0].any()
    for other in scores[1:]:
        torch.testing.assert_close(other, scores[0], rtol=1e-4, atol=1e-5)


Make = Callable[..., GRPOTrainer]


def train(make_trainer: Make, **settings: Any) -> tuple[GRPOTrainer, GradientRecorder]:
    recorder = GradientRecorder()
    arguments = {"rollout_engine": ScriptedEngine(), "callbacks": [recorder], **settings.pop("trainer_arguments", {})}
    trainer = make_trainer(
        **{"max_grad_norm": 0.0, "max_steps": 2, "trainer_arguments": arguments, "learning_rate": 1e-3, **settings}
    )
    trainer.train()
    return trainer, recorder


SITUATIONS: dict[str, dict[str, Any]] = {
    "dapo": {},
    "grpo_kl_entropy": {"loss_type": "grpo", "beta": 0.1, "entropy_coef": 0.01},
    "sequence_level": {"importance_sampling_level": "sequence", "num_iterations": 2},
    "bnpo_accumulated": {"loss_type": "bnpo", "per_device_train_batch_size": 4, "gradient_accumulation_steps": 2},
    "top_entropy": {"top_entropy_quantile": 0.5},
    "several_steps_per_rollout": {"per_device_train_batch_size": 4, "steps_per_generation": 4},
    "checkpointing": {"gradient_checkpointing": True},
    "clipped": {"num_iterations": 2, "learning_rate": 2e-2},
    "off_policy_mask": {"off_policy_mask_threshold": 0.01, "num_iterations": 2, "learning_rate": 1e-2},
}


@pytest.mark.parametrize("situation", SITUATIONS)
def test_training_is_the_same_packed_padded_and_in_any_number_of_passes(make_trainer: Make, situation: str) -> None:
    """Gradients of every step and every metric."""
    runs = []
    for layout in (
        {},
        {"tokens_per_pass": 16},
        {"share_prompts": False},
        {"share_prompts": False, "tokens_per_pass": 16},
    ):
        trainer, recorder = train(make_trainer, **SITUATIONS[situation], **layout)
        runs.append((recorder.grads, trainer.state.log_history[:2]))
    for grads, logs in runs[1:]:
        for step, wanted in zip(grads, runs[0][0], strict=True):
            for name, grad in wanted.items():
                torch.testing.assert_close(step[name], grad, rtol=2e-3, atol=2e-6, msg=name)
        for log, wanted in zip(logs, runs[0][1], strict=True):
            for name in wanted.keys() - {"step_time", "tokens_per_second"}:
                assert log[name] == pytest.approx(wanted[name], rel=1e-3, abs=1e-5, nan_ok=True), name


@pytest.mark.parametrize("share", [None, False])
def test_a_forward_has_no_more_tokens_than_asked_for(make_trainer: Make, share: bool | None) -> None:
    """Neither in scoring nor in training, whatever the micro-batch."""
    sizes: dict[int | None, list[int]] = {}
    for tokens in (None, 24):
        trainer = make_trainer(
            beta=0.1,
            num_iterations=2,
            share_prompts=share,
            tokens_per_pass=tokens,
            trainer_arguments={"rollout_engine": ScriptedEngine()},
        )
        sizes[tokens] = seen = []
        for model in (trainer.model, trainer.reference):
            model.get_input_embeddings().register_forward_pre_hook(
                lambda module, args, seen=seen: seen.append(args[0].numel())
            )
        trainer.train()
    assert max(sizes[24]) <= 24 < max(sizes[None])
    assert len(sizes[24]) > len(sizes[None]) == 3  # reference scores, two iterations; the first gives the old scores


def test_lora_is_the_same_packed_and_padded(make_trainer: Make) -> None:
    runs = []
    for share in (True, False):
        arguments = {"peft_config": LoraConfig(r=4, target_modules=["q_proj", "lm_head"], lora_dropout=0.0)}
        arguments |= {"rollout_engine": ScriptedEngine(), "callbacks": [recorder := GradientRecorder()]}
        make_trainer(
            share_prompts=share, tokens_per_pass=20, beta=0.1, max_grad_norm=0.0, trainer_arguments=arguments
        ).train()
        runs.append(recorder.grads)
    for packed, padded in zip(*runs, strict=True):
        assert packed
        for name, grad in padded.items():
            torch.testing.assert_close(packed[name], grad, rtol=2e-3, atol=2e-6, msg=name)


def test_micro_batches_hold_whole_groups_where_the_optimizer_step_allows(make_trainer: Make) -> None:
    """8 sequences of two prompts in micro-batches of 4: a group each, unless the loss depends on the split."""
    for loss_type, expected in (("dapo", 1), ("bnpo", 2)):
        trainer, _ = train(
            make_trainer, loss_type=loss_type, per_device_train_batch_size=4, gradient_accumulation_steps=2, max_steps=1
        )
        distinct = [len(set(prompt_numbers(part).tolist())) for part in trainer._buffer]
        assert max(distinct) == expected, (loss_type, distinct)


def test_tokens_per_pass_must_be_positive(make_trainer: Make) -> None:
    with pytest.raises(ValueError, match="tokens_per_pass: expected None or at least 1, got 0"):
        make_trainer(tokens_per_pass=0)


def test_tokens_that_do_not_count_are_seen_but_not_scored() -> None:
    """A loss mask with holes: the model still sees the whole completion, up to the last token that counts."""
    model = make("phi3")
    ids = torch.randint(5, 60, (2, 9), generator=torch.Generator().manual_seed(0))
    prompts, completions = ids[:, :4], ids[:, 4:]
    everything = torch.ones_like(completions, dtype=torch.bool)
    counted = torch.tensor([[True, False, False, True, False], [False, True, False, False, False]])
    batch = TokenBatch(prompts, torch.ones_like(prompts, dtype=torch.bool), completions, everything, loss_mask=counted)
    whole = model.model(input_ids=ids).last_hidden_state[:, 3:-1]
    for share in (None, False):
        (part,) = Packer.for_model(model, share).passes(batch)
        assert part.batch.completion_ids.shape == (2, 4)  # nothing after the last token that counts
        hidden = part.select(model.model(**part.inputs).last_hidden_state)
        torch.testing.assert_close(hidden[part.batch.mask], whole[:, :4][counted[:, :4]], rtol=1e-4, atol=1e-5)
