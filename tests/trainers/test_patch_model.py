"""patch_model: the hidden state and head it hands over reproduce the model's own logits, for each kind of family and
wrapper; without `fastrl_head` nothing changes; what it cannot express is refused by name."""

import copy

import pytest
import torch
import transformers
from peft import LoraConfig, PeftConfig, TrainableTokensConfig, get_peft_model
from torch import nn

from fastrl.integrations import LMHead, patch_model
from fastrl.integrations.logits_source import UnsupportedHeadError

TINY = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}
V = 61  # odd, so that nothing is aligned by luck

# what each family adds to hidden @ W^T, and the scale and cap that must come out
FAMILIES = {
    "llama_tied": ("LlamaForCausalLM", dict(tie_word_embeddings=True, **TINY), 1.0, None),
    "qwen2": ("Qwen2ForCausalLM", TINY, 1.0, None),
    "qwen3": ("Qwen3ForCausalLM", dict(head_dim=8, **TINY), 1.0, None),
    "gemma2_softcap": ("Gemma2ForCausalLM", dict(head_dim=8, final_logit_softcapping=2.0, **TINY), 1.0, 2.0),
    "gemma2_no_cap": ("Gemma2ForCausalLM", dict(head_dim=8, final_logit_softcapping=None, **TINY), 1.0, None),
    "gemma3": ("Gemma3ForCausalLM", dict(head_dim=8, final_logit_softcapping=3.0, **TINY), 1.0, 3.0),
    "cohere_scale": ("CohereForCausalLM", dict(logit_scale=0.25, **TINY), 0.25, None),
    "granite_divides": ("GraniteForCausalLM", dict(logits_scaling=8.0, **TINY), 0.125, None),
    "gpt2_learned_positions": (
        "GPT2LMHeadModel",
        {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64},
        1.0,
        None,
    ),
    "opt_inner_decoder": (
        "OPTForCausalLM",
        {"hidden_size": 32, "ffn_dim": 48, "num_hidden_layers": 2, "num_attention_heads": 4, "word_embed_proj_dim": 32},
        1.0,
        None,
    ),
    "phi_head_bias": ("PhiForCausalLM", TINY, 1.0, None),
    "stablelm": ("StableLmForCausalLM", TINY, 1.0, None),
}


def tiny(family: str) -> transformers.PreTrainedModel:
    name, arguments, _, _ = FAMILIES[family]
    cls = getattr(transformers, name)
    torch.manual_seed(0)
    special = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
    model = cls(cls.config_class(vocab_size=V, **special, **arguments)).eval()
    with torch.no_grad():  # random weights give logits near 0, where a cap is invisible
        for parameter in model.parameters():
            parameter.mul_(3.0)
        if getattr(model.get_output_embeddings(), "bias", None) is not None:
            model.get_output_embeddings().bias.normal_()
    return model


def batch() -> dict[str, torch.Tensor]:
    torch.manual_seed(1)
    ids = torch.randint(3, V, (3, 9))
    mask = torch.ones_like(ids)
    mask[0, :4] = 0  # left padding
    return {"input_ids": ids, "attention_mask": mask, "position_ids": (mask.cumsum(-1) - 1).clamp(min=0)}


def logits_of(hidden: torch.Tensor, head: LMHead) -> torch.Tensor:
    z = nn.functional.linear(hidden, head.weight, head.bias) * head.logit_scale
    return z if head.softcap is None else head.softcap * torch.tanh(z / head.softcap)


@pytest.mark.parametrize("family", FAMILIES)
def test_logits_from_hidden_and_head_equal_the_models_own(family: str) -> None:
    model, inputs = tiny(family), batch()
    if family == "opt_inner_decoder":
        del inputs["position_ids"]  # OPT derives them from the mask
    expected = model(**inputs).logits
    with patch_model(model):
        unchanged = model(**inputs).logits
        seen, actual = model(**inputs, fastrl_head=lambda hidden, head: (head, logits_of(hidden, head)))
    assert torch.equal(unchanged, expected)
    assert (seen.logit_scale, seen.softcap) == FAMILIES[family][2:]
    torch.testing.assert_close(actual, expected, rtol=1e-6, atol=1e-6)


def test_gradients_equal_the_models_own() -> None:
    inputs = batch()
    upstream = torch.randn(3, 9, V)
    grads = []
    for patched in (False, True):
        model = tiny("gemma2_softcap")
        if patched:
            with patch_model(model):
                logits = model(**inputs, fastrl_head=logits_of)
        else:
            logits = model(**inputs).logits
        (logits * upstream).sum().backward()
        grads.append({name: p.grad for name, p in model.named_parameters()})
    for name, grad in grads[0].items():
        torch.testing.assert_close(grads[1][name], grad, rtol=1e-5, atol=1e-5, msg=name)


def test_patch_is_reversible_and_counted() -> None:
    model = tiny("qwen2")
    before = dict(model.__dict__)
    outer = patch_model(model)
    inner = patch_model(model)
    inner.remove()
    inner.remove()
    assert model(**batch(), fastrl_head=lambda hidden, head: hidden.shape) == (3, 9, 32)
    outer.remove()
    assert model.__dict__ == before
    called = []
    model(**batch(), fastrl_head=lambda hidden, head: called.append(head))
    assert not called


def test_a_deep_copy_of_a_patched_model_runs_its_own_weights() -> None:
    model = tiny("qwen2")
    with patch_model(model):
        twin = copy.deepcopy(model)
        with torch.no_grad():
            twin.lm_head.weight.zero_()
        assert not twin(**batch(), fastrl_head=logits_of).any()
        assert not twin(**batch()).logits.any()
        assert model(**batch(), fastrl_head=logits_of).any()


def test_generate_is_unchanged() -> None:
    model, inputs = tiny("qwen2"), batch()
    arguments = {"max_new_tokens": 5, "do_sample": False, "input_ids": inputs["input_ids"]}
    expected = model.generate(**arguments, attention_mask=inputs["attention_mask"])
    with patch_model(model):
        assert torch.equal(model.generate(**arguments, attention_mask=inputs["attention_mask"]), expected)


@pytest.mark.parametrize(
    "config",
    [
        LoraConfig(target_modules=["q_proj", "lm_head"], r=3, lora_alpha=5, lora_dropout=0.0),
        LoraConfig(target_modules=["q_proj"], modules_to_save=["lm_head"], r=3),
        LoraConfig(target_modules=["q_proj"], r=3),
        LoraConfig(target_modules=["lm_head"], r=3, lora_bias=True, bias="none"),
        LoraConfig(target_modules=["q_proj"], r=3, trainable_token_indices=[4, 9, 60]),
        TrainableTokensConfig(token_indices=[4, 9, 60]),
    ],
    ids=["lora_head", "modules_to_save", "lora_backbone", "lora_head_bias", "tied_tokens_and_lora", "tied_tokens"],
)
def test_peft_heads(config: PeftConfig) -> None:
    torch.manual_seed(0)
    model = get_peft_model(tiny("llama_tied" if "lm_head" not in str(config) else "qwen2"), config).double()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter) * 0.3)  # LoRA's B starts at zero
    inputs, upstream = batch(), torch.randn(3, 9, V, dtype=torch.float64)
    expected = model(**inputs).logits
    (expected * upstream).sum().backward()
    want = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    with patch_model(model):
        actual = model(**inputs, fastrl_head=logits_of)
        (actual * upstream).sum().backward()
        with model.disable_adapter():
            base = model(**inputs, fastrl_head=logits_of)
    torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-5)
    got = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    assert got.keys() == want.keys() and want
    for name in want:
        torch.testing.assert_close(got[name], want[name], rtol=1e-5, atol=1e-5, msg=name)
    with model.disable_adapter():
        torch.testing.assert_close(base, model(**inputs).logits, rtol=1e-5, atol=1e-5)


def test_lora_dropout_on_the_head_is_applied() -> None:
    torch.manual_seed(0)
    model = get_peft_model(tiny("qwen2"), LoraConfig(target_modules=["lm_head"], r=3, lora_dropout=0.5)).train()
    with torch.no_grad():
        model.get_base_model().lm_head.lora_B["default"].weight.normal_()
    with patch_model(model):
        torch.manual_seed(7)
        expected = model(**batch()).logits
        torch.manual_seed(7)
        actual = model(**batch(), fastrl_head=logits_of)
    torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-5)


def test_the_head_is_read_while_its_own_module_runs() -> None:
    """What gathers a sharded weight does so in the head module's forward hooks."""
    model, inputs = tiny("qwen2"), batch()
    expected = model(**inputs).logits
    full = model.lm_head.weight.data

    def gather(module: nn.Module, args: object) -> None:
        module.weight.data = full

    def release(module: nn.Module, args: object, output: object) -> None:
        module.weight.data = full.new_empty(0)

    model.lm_head.register_forward_pre_hook(gather)
    model.lm_head.register_forward_hook(release)
    model.lm_head.weight.data = full.new_empty(0)
    with patch_model(model), torch.no_grad():
        actual = model(**inputs, fastrl_head=logits_of)
    torch.testing.assert_close(actual, expected, rtol=1e-6, atol=1e-6)


def test_inside_wrappers() -> None:
    class Wrapper(nn.Module):  # what DDP, FSDP1 and DeepSpeed look like from outside
        def __init__(self, module: nn.Module) -> None:
            super().__init__()
            self.module = module

        def forward(self, *args: object, **kwargs: object) -> object:
            return self.module(*args, **kwargs)

    wrapped = Wrapper(get_peft_model(tiny("qwen2"), LoraConfig(target_modules=["q_proj"], r=2)))
    with patch_model(wrapped):
        torch.testing.assert_close(wrapped(**batch(), fastrl_head=logits_of), wrapped(**batch()).logits)


def test_under_autocast_the_head_is_cast() -> None:
    model = tiny("qwen2")
    with patch_model(model), torch.autocast("cpu", dtype=torch.bfloat16):
        dtypes = model(**batch(), fastrl_head=lambda hidden, head: (hidden.dtype, head.weight.dtype))
    assert dtypes == (torch.bfloat16, torch.bfloat16)


class ShiftedLogits(transformers.LlamaForCausalLM):
    def forward(self, input_ids=None, attention_mask=None, **kwargs):  # type: ignore[no-untyped-def]
        outputs = self.model(input_ids=input_ids, attention_mask=attention_mask, **kwargs)
        logits = self.lm_head(outputs.last_hidden_state)
        logits = logits + self.config.shift
        return transformers.modeling_outputs.CausalLMOutputWithPast(logits=logits)


def test_unknown_logit_processing_is_refused_by_its_statement() -> None:
    config = transformers.LlamaConfig(vocab_size=V, shift=1.0, **TINY)
    with pytest.raises(UnsupportedHeadError, match=r"ShiftedLogits\.forward: `logits \+ self\.config\.shift`"):
        patch_model(ShiftedLogits(config))
    with patch_model(ShiftedLogits(config), logit_scale=1.0) as model:  # the user's own statement is believed
        assert model(**batch(), fastrl_head=logits_of).shape == (3, 9, V)


@pytest.mark.parametrize("tied", [False, True])
def test_an_encoder_is_refused(tied: bool) -> None:
    sizes = {"d_model": 32, "d_ff": 48, "num_layers": 1, "num_heads": 4, "d_kv": 8}
    with pytest.raises(UnsupportedHeadError, match="T5ForConditionalGeneration has an encoder"):
        patch_model(
            transformers.T5ForConditionalGeneration(
                transformers.T5Config(vocab_size=V, tie_word_embeddings=tied, decoder_start_token_id=0, **sizes)
            )
        )


def test_a_head_with_its_own_transform_is_refused() -> None:
    config = transformers.BertConfig(vocab_size=V, is_decoder=True, **{**TINY, "num_key_value_heads": None})
    with pytest.raises(UnsupportedHeadError, match=r"self\.cls"):
        patch_model(transformers.BertLMHeadModel(config))


def test_unknown_head_modules_are_refused() -> None:
    class Quantized(nn.Linear):
        def forward(self, input: torch.Tensor) -> torch.Tensor:
            return super().forward(input).round()

    model = tiny("qwen2")
    model.lm_head = Quantized(32, V, bias=False)
    with patch_model(model), pytest.raises(UnsupportedHeadError, match="Quantized"):
        model(**batch(), fastrl_head=logits_of)
    dora = get_peft_model(tiny("qwen2"), LoraConfig(target_modules=["lm_head"], r=2, use_dora=True))
    with patch_model(dora), pytest.raises(UnsupportedHeadError, match="Dora"):
        dora(**batch(), fastrl_head=logits_of)
    with pytest.raises(UnsupportedHeadError, match="Linear is not a transformers causal LM"):
        patch_model(nn.Linear(2, 2))


# Sequence and token classifiers --------------------------------------------------------------------------------------

GPT2 = {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64}
CLASSIFIERS: dict[str, tuple[str, dict[str, object]]] = {
    "llama": ("LlamaForSequenceClassification", TINY),
    "gemma2": ("Gemma2ForSequenceClassification", dict(head_dim=8, **TINY)),
    "gpt2": ("GPT2ForSequenceClassification", GPT2),
    "qwen2_tokens": ("Qwen2ForTokenClassification", TINY),
    "gpt2_tokens": ("GPT2ForTokenClassification", GPT2),
}


def tiny_classifier(family: str) -> transformers.PreTrainedModel:
    name, arguments = CLASSIFIERS[family]
    cls = getattr(transformers, name)
    torch.manual_seed(0)
    special = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
    return cls(cls.config_class(vocab_size=V, num_labels=3, **special, **arguments))


@pytest.mark.parametrize("family", CLASSIFIERS)
def test_scores_of_a_classifier_and_their_gradients(family: str) -> None:
    """Also the dropout before the score layer; a sequence classifier's own score is the one at its last token."""
    model, inputs = tiny_classifier(family).train(), batch()
    last = slice(None) if "tokens" in family else -1
    grads = []
    for patched in (False, True):
        model.zero_grad()
        torch.manual_seed(3)
        if patched:
            with patch_model(model):
                scores = model(**inputs, fastrl_head=logits_of)[:, last]
        else:
            scores = expected = model(**inputs).logits
        scores.square().sum().backward()
        grads.append({name: p.grad.clone() for name, p in model.named_parameters()})
    torch.testing.assert_close(scores, expected, rtol=1e-5, atol=1e-6)
    for name, grad in grads[0].items():
        torch.testing.assert_close(grads[1][name], grad, rtol=1e-5, atol=1e-6, msg=name)
    assert "fastrl" not in str(model.__dict__)


def test_a_classifier_under_peft() -> None:
    config = LoraConfig(target_modules=["q_proj"], modules_to_save=["score"], r=2, task_type="SEQ_CLS")
    model = get_peft_model(tiny_classifier("llama"), config)
    with torch.no_grad():
        model.get_base_model().score.modules_to_save["default"].weight.normal_()
    with patch_model(model):
        scores = model(**batch(), fastrl_head=logits_of)[:, -1]
        with model.disable_adapter():
            other = model(**batch(), fastrl_head=logits_of)[:, -1]
    torch.testing.assert_close(scores, model(**batch()).logits)
    assert not torch.allclose(scores, other)


@pytest.mark.parametrize(
    "name, message",
    [
        ("BertForTokenClassification", "BertForTokenClassification: only classifiers with causal attention"),
        ("MptForSequenceClassification", "its attention modules do not say that they are"),
        ("ModernBertDecoderForSequenceClassification", r"`self\.head\(hidden_states\)` transforms the hidden state"),
        ("LlamaModel", r"LlamaModel has no output embedding \(lm_head\) and no score layer"),
    ],
)
def test_other_classifiers_are_refused(name: str, message: str) -> None:
    cls = getattr(transformers, name)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    mpt = {"d_model": 32, "n_heads": 4, "n_layers": 2}
    config = cls.config_class(vocab_size=V, pad_token_id=0, **(mpt if name.startswith("Mpt") else sizes))
    with pytest.raises(UnsupportedHeadError, match=message):
        patch_model(cls(config))
    with pytest.raises(ValueError, match="logit_scale, softcap: not for a classifier"):
        patch_model(tiny_classifier("llama"), logit_scale=2.0)
