"""Weights for another engine: merged, named as in a checkpoint, tied ones once, and the model left alone."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from peft import LoraConfig, PeftConfig, TrainableTokensConfig, get_peft_model
from safetensors.torch import load_file
from tiny_runs import tiny_model
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from transformers import AutoModelForCausalLM, Qwen3MoeConfig, Qwen3MoeForCausalLM

from fastrl.rollout.policy_weights import lm_head_is_tied, policy_weights

IDS = torch.tensor([[5, 6, 7, 8, 9]])


def test_names_are_those_that_save_pretrained_writes(tmp_path: Path) -> None:
    torch.manual_seed(0)
    experts = Qwen3MoeForCausalLM(
        Qwen3MoeConfig(
            vocab_size=40,
            hidden_size=32,
            intermediate_size=48,
            moe_intermediate_size=16,
            num_hidden_layers=1,
            num_attention_heads=4,
            num_key_value_heads=2,
            num_experts=3,
            num_experts_per_tok=1,
        )
    )
    for name, model in (("tied", tiny_model(tie_word_embeddings=True)), ("untied", tiny_model()), ("experts", experts)):
        model.save_pretrained(tmp_path / name)
        saved = load_file(tmp_path / name / "model.safetensors")
        weights = dict(policy_weights(model))
        assert weights.keys() == saved.keys() and lm_head_is_tied(model) == (name == "tied")
        for key, tensor in saved.items():
            assert torch.equal(weights[key], tensor), key


def spread(model: nn.Module) -> nn.Module:
    """Adapter weights that do something: LoRA's B starts at 0."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.requires_grad:
                parameter.add_(0.3 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(len(name))))
    return model


@pytest.mark.parametrize(
    "config",
    [
        {"target_modules": ["q_proj", "down_proj"]},
        {"target_modules": ["q_proj"], "use_dora": True},
        {"target_modules": ["v_proj", "lm_head"]},
        {"target_modules": ["v_proj"], "modules_to_save": ["lm_head"]},
    ],
    ids=["lora", "dora", "on the head", "modules_to_save"],
)
@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
def test_adapters_are_merged_into_copies(config: dict[str, Any], tied: bool, tmp_path: Path) -> None:
    base = tiny_model(tie_word_embeddings=tied)
    model = spread(get_peft_model(base, LoraConfig(r=2, **config))).eval()
    before = copy.deepcopy(model.state_dict())
    weights = dict(policy_weights(model))
    assert not any("lora" in name or "modules_to_save" in name for name in weights)
    on_head = "lm_head" in str(config)
    assert lm_head_is_tied(model) == (tied and not on_head)
    assert ("lm_head.weight" in weights) == (not tied or on_head)

    merged = tiny_model(tie_word_embeddings=lm_head_is_tied(model)).eval()
    missing, unexpected = merged.load_state_dict(weights, strict=False)
    assert not unexpected and set(missing) <= {"lm_head.weight"}
    torch.testing.assert_close(merged(IDS).logits, model(IDS).logits, rtol=1e-4, atol=1e-4)
    after = model.state_dict()
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())

    with model.disable_adapter():
        plain = dict(policy_weights(model))
    assert torch.equal(
        plain["model.layers.0.self_attn.v_proj.weight"], tiny_model().model.layers[0].self_attn.v_proj.weight
    )


@pytest.mark.parametrize(
    "config",
    [
        LoraConfig(target_modules=["q_proj"], trainable_token_indices=[5, 9]),
        TrainableTokensConfig(token_indices=[5, 9]),
    ],
    ids=["lora", "alone"],
)
@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
def test_trained_tokens_are_in_the_embedding(config: PeftConfig, tied: bool) -> None:
    base = tiny_model(tie_word_embeddings=tied)
    names, before = [name for name, _ in policy_weights(base)], base.get_input_embeddings().weight.clone()
    model = spread(get_peft_model(base, config)).eval()
    weights = dict(policy_weights(model))
    assert list(weights) == names and lm_head_is_tied(model) == tied
    changed = (weights["model.embed_tokens.weight"] != before).any(-1)
    assert changed.nonzero().flatten().tolist() == [5, 9]

    merged = tiny_model(tie_word_embeddings=tied).eval()
    merged.load_state_dict(weights, strict=not tied)
    torch.testing.assert_close(merged(IDS).logits, model(IDS).logits, rtol=1e-4, atol=1e-4)
    with model.disable_adapter():
        plain = dict(policy_weights(model))
    assert list(plain) == names and torch.equal(plain["model.embed_tokens.weight"], before)


def test_no_merged_weight_is_taken_for_one_that_was_there_before() -> None:
    """Merged copies are freed one after the other, so that the next may have the address of the last."""
    names = [name for name, _ in policy_weights(tiny_model(num_hidden_layers=8))]
    model = get_peft_model(tiny_model(num_hidden_layers=8), LoraConfig(r=2, target_modules="all-linear"))
    assert [name for name, _ in policy_weights(model)] == names


def test_a_loaded_checkpoint_keeps_its_names(tmp_path: Path) -> None:
    tiny_model().save_pretrained(tmp_path)
    model = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert dict(policy_weights(model)).keys() == load_file(tmp_path / "model.safetensors").keys()


@pytest.fixture
def one_process(tmp_path: Path) -> Iterator[None]:
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def test_shards_are_gathered(one_process: None) -> None:
    expected = {name: tensor.clone() for name, tensor in policy_weights(tiny_model())}
    model: Any = tiny_model()
    mesh = init_device_mesh("cpu", (1,))
    for module in (*model.model.layers, model):
        fully_shard(module, mesh=mesh)
    assert type(model.lm_head.weight) is not torch.nn.Parameter and hasattr(model.lm_head.weight, "full_tensor")
    weights = dict(policy_weights(model))
    assert weights.keys() == expected.keys()
    for name, tensor in expected.items():
        assert type(weights[name]) is torch.Tensor and torch.equal(weights[name], tensor)

    adapted = get_peft_model(tiny_model(), LoraConfig(r=2, target_modules=["q_proj"]))
    fully_shard(adapted, mesh=mesh)
    with pytest.raises(ValueError, match=r"adapter of the sharded layer .*q_proj"):
        dict(policy_weights(adapted))


def test_a_sharded_weight_that_is_not_there_is_refused() -> None:
    model = tiny_model()
    model.lm_head.weight.ds_id = 3  # as DeepSpeed's ZeRO-3 marks it
    with pytest.raises(ValueError, match=r"lm_head\.weight is sharded by DeepSpeed or FSDP1"):
        dict(policy_weights(model))
