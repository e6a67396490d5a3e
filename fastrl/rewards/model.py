"""A trained reward model as a reward function: for training, and to choose among completions in an evaluation."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from os import PathLike
from typing import Any

import torch
from transformers import AutoModelForSequenceClassification, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils import logging

from fastrl.data.formats import Encoder
from fastrl.rewards.completions import Completion

logger = logging.get_logger(__name__)

Prompt = str | Sequence[Mapping[str, Any]]

# Of the config of a model and of its tokenizer, true where the texts that it was trained on had the tokenizer's special
# tokens and an end-of-sequence token: `fastrl.trainers.RewardTrainer` says so.
COMPLETE_TEXTS = "fastrl_complete_texts"


class RewardModel:
    """Scores completions after their prompts with a sequence classifier of one label, as TRL's trainers do.

    Text is prompt + completion; a conversation is the tokenizer's chat template of both, which brings its own special
    tokens. A text gets none, unless the model is of fastrl's `RewardTrainer`: then it gets those that it had in
    training, and the end-of-sequence token where it has none. The model decides which token its score is read at (in
    transformers, the last one that is not `pad_token_id`).

    Args:
        model: folder or hub name, loaded with `num_labels=1`, or the model itself.
        tokenizer: the model's own if None; one without a pad token pads with its end token, or with token 0.
        device: where to move the model. None: where it is; one given by path goes to the GPU if there is one.
        batch_size: texts at a time; texts of similar length go together.
        model_init_kwargs: for `from_pretrained`, where the model is given by path.
        chat_template_kwargs: for the chat template.
        trust_remote_code: for a model or tokenizer given by path.

    Raises:
        TypeError: the model is neither a path nor a transformers model.
        ValueError: the model has several labels, or model_init_kwargs come with a model object.
        OSError: there is no model at the path.
    """

    def __init__(
        self,
        model: str | PathLike[str] | PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase | None = None,
        *,
        device: torch.device | str | None = None,
        batch_size: int = 32,
        model_init_kwargs: Mapping[str, Any] | None = None,
        chat_template_kwargs: Mapping[str, Any] | None = None,
        trust_remote_code: bool = False,
    ) -> None:
        if isinstance(model, str | PathLike):
            loading = {"trust_remote_code": trust_remote_code, **(model_init_kwargs or {}), "num_labels": 1}
            loaded = AutoModelForSequenceClassification.from_pretrained(model, **loading)
            path = str(model)
            device = device or ("cuda" if torch.cuda.is_available() else "cpu")
        elif not isinstance(model, PreTrainedModel):
            raise TypeError(f"reward model: expected a path or a transformers model, got {type(model).__name__}")
        elif model_init_kwargs:
            raise ValueError(
                "model_init_kwargs: only used with a reward model given by path, but the model is an object"
            )
        else:
            loaded, path = model, str(model.config._name_or_path)
        labels = loaded.config.num_labels
        if labels != 1:
            raise ValueError(f"reward model: expected a sequence classifier with num_labels=1, got {labels} labels")
        if tokenizer is None:
            tokenizer = AutoTokenizer.from_pretrained(path, trust_remote_code=trust_remote_code)
        if tokenizer.pad_token_id is None:
            tokenizer.pad_token = tokenizer.eos_token or tokenizer.convert_ids_to_tokens(0)
        loaded.config.get_text_config().pad_token_id = tokenizer.pad_token_id
        said_by = (loaded.config.to_dict(), tokenizer.init_kwargs)  # an adapter comes with a tokenizer only
        self.complete_texts = any(said.get(COMPLETE_TEXTS, False) for said in said_by)
        self.model = loaded if device is None else loaded.to(device)
        self.tokenizer = tokenizer
        self.batch_size = batch_size
        self.chat_template_kwargs = dict(chat_template_kwargs or {})
        self.__name__ = path.rstrip("/").split("/")[-1] or type(loaded).__name__  # of its metrics, as in TRL

    def __call__(
        self, prompts: Sequence[Prompt], completions: Sequence[Completion], **kwargs: Any
    ) -> list[float | None]:
        """The score of each completion; None for one that, with its prompt, is longer than the model's context.

        Args:
            prompts: B strings, or B conversations.
            completions: B of the same kind.
        """
        texts = [self._text(prompt, completion) for prompt, completion in zip(prompts, completions, strict=True)]
        strings = all(isinstance(prompt, str) for prompt in prompts)
        return self._score(texts, special_tokens=self.complete_texts and strings)

    def score(self, texts: Sequence[str]) -> list[float | None]:
        """The score of each text as it stands; see `__call__`."""
        return self._score(texts, special_tokens=False)

    @torch.no_grad()
    def _score(self, texts: Sequence[str], special_tokens: bool) -> list[float | None]:
        from fastrl.trainers.prompts import context_length_of

        if not texts:
            return []
        ids: list[list[int]] = self.tokenizer(text=list(texts), add_special_tokens=special_tokens)["input_ids"]
        limit = context_length_of(self.model.config)
        fitting = [i for i in range(len(ids)) if limit is None or len(ids[i]) <= limit]
        if len(fitting) < len(ids):
            logger.warning_once(
                f"Texts of more than {limit} tokens do not fit the reward model {self.__name__} and get no reward."
            )
        fitting.sort(key=lambda i: len(ids[i]))
        scores: list[float | None] = [None] * len(ids)
        self.model.eval()
        for first in range(0, len(fitting), self.batch_size):
            rows = fitting[first : first + self.batch_size]
            batch = self.tokenizer.pad(
                {"input_ids": [ids[i] for i in rows]}, padding_side="right", return_tensors="pt"
            ).to(self.model.device)
            values = self.model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits[:, 0]
            for i, value in zip(rows, values.float().tolist(), strict=True):
                scores[i] = value
        return scores

    def _text(self, prompt: Prompt, completion: Completion) -> str:
        if isinstance(prompt, str) and isinstance(completion, str):
            text = prompt + completion
            return Encoder(self.tokenizer).with_eos(text) if self.complete_texts else text
        if isinstance(prompt, str) or isinstance(completion, str):
            raise ValueError("reward model: a prompt and its completion are of one kind: strings, or conversations")
        messages: list[Any] = [*prompt, *completion]
        return str(self.tokenizer.apply_chat_template(messages, tokenize=False, **self.chat_template_kwargs))


def with_reward_models(
    reward_funcs: Any,
    processing_classes: Any = None,
    *,
    device: torch.device | str | None = None,
    model_init_kwargs: Mapping[str, Any] | None = None,
    chat_template_kwargs: Mapping[str, Any] | None = None,
    trust_remote_code: bool = False,
) -> list[Callable[..., Any]]:
    """The argument `reward_funcs` of TRL's trainers as functions: paths and models become a `RewardModel`.

    Args:
        reward_funcs: one or a list of functions, paths or hub names, and sequence classifiers.
        processing_classes: `reward_processing_classes`: one tokenizer or None for each of them.
        device, model_init_kwargs, chat_template_kwargs, trust_remote_code: see `RewardModel`; model_init_kwargs is for
            models given by path.

    Raises:
        ValueError: another number of processing classes than of functions; and what `RewardModel` raises.
    """
    functions = reward_funcs if isinstance(reward_funcs, list | tuple) else [reward_funcs]
    if not isinstance(processing_classes, list | tuple):
        processing_classes = [processing_classes] if processing_classes is not None else [None] * len(functions)
    if len(processing_classes) != len(functions):
        raise ValueError(
            f"reward_processing_classes: expected {len(functions)} as there are so many reward functions, got "
            f"{len(processing_classes)}"
        )
    return [
        RewardModel(
            function,
            tokenizer,
            device=device,
            model_init_kwargs=model_init_kwargs if isinstance(function, str) else None,
            chat_template_kwargs=chat_template_kwargs,
            trust_remote_code=trust_remote_code,
        )
        if isinstance(function, str | PreTrainedModel)
        else function
        for function, tokenizer in zip(functions, processing_classes, strict=True)
    ]
