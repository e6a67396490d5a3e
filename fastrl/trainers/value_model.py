"""What estimates the value of each token for PPO: a head on the policy's hidden states, or a model of its own.

Either is a child of the policy (`CRITIC`), so that whatever wraps, optimizes or clips the policy does so with it; what
saves or copies the policy leaves it out, and it has files of its own beside the policy's."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import AutoModelForSequenceClassification, PreTrainedModel

from fastrl.integrations import LMHead, patch_model
from fastrl.objectives.score_head import row_scores
from fastrl.rollout.policy_weights import CRITIC
from fastrl.trainers.packing import Packer, Pass
from fastrl.trainers.scoring import head_logps, over_passes
from fastrl.trainers.token_batch import TokenBatch

HEAD_FILE = "value_head.safetensors"  # in the policy's folder
MODEL_FOLDER = "value_model"


class Critic(nn.Module):
    """A value of every token: a linear head of one output on hidden states."""

    reads_policy = False  # whether those are the policy's

    def scored(self, part: Pass[Any], states: Tensor | None) -> tuple[Tensor, LMHead]:
        """Hidden states (B, T, D) for the tokens of a pass and the head on them, given the policy's states of these
        tokens (needed if it reads them)."""
        raise NotImplementedError

    def values(self, part: Pass[Any], states: Tensor | None) -> Tensor:
        """(B, T), 0 where masked; in fp32 (fp64 for fp64) as `fastrl.linear_value_loss` computes them."""
        hidden, head = self.scored(part, states)
        mask = part.batch.mask
        rows = mask.flatten().nonzero().squeeze(-1)
        scores = row_scores(hidden, head.weight, head.bias, rows).squeeze(-1)
        return scores.new_zeros(mask.numel()).index_copy(0, rows, scores).view(mask.shape)

    def save(self, folder: str) -> None:
        """Into the policy's folder."""
        raise NotImplementedError

    def load(self, folder: str) -> None:
        """From there.

        Raises:
            ValueError: such a critic does not lie there.
        """
        raise NotImplementedError


class ValueHead(Critic):
    """A linear layer on the policy's last hidden states; 0 at first, or read from the policy's folder."""

    reads_policy = True

    def __init__(self, policy: Any) -> None:
        super().__init__()
        weight = policy.get_input_embeddings().weight
        self.score = nn.Linear(policy.config.get_text_config().hidden_size, 1, device=weight.device, dtype=weight.dtype)
        nn.init.zeros_(self.score.weight)
        nn.init.zeros_(self.score.bias)
        folder = str(getattr(policy.config, "_name_or_path", "") or "")
        if folder and Path(folder, HEAD_FILE).is_file():
            self.load(folder)

    def scored(self, part: Pass[Any], states: Tensor | None) -> tuple[Tensor, LMHead]:
        assert states is not None
        states = states[..., : self.score.in_features]  # an adapter on the lm_head has added columns
        return states, LMHead(self.score.weight, self.score.bias)

    def save(self, folder: str) -> None:
        tensors = {name: tensor.detach().contiguous().cpu() for name, tensor in self.score.state_dict().items()}
        save_file(tensors, Path(folder, HEAD_FILE))

    def load(self, folder: str) -> None:
        self.score.load_state_dict(load_file(_existing(folder, HEAD_FILE)))


class ValueModel(Critic):
    """A sequence classifier of one label, read at every token.

    Raises:
        TypeError, ValueError: not such a model.
    """

    def __init__(self, model: str | nn.Module, trust_remote_code: bool) -> None:
        super().__init__()
        if isinstance(model, str | os.PathLike):
            model = AutoModelForSequenceClassification.from_pretrained(
                model, num_labels=1, trust_remote_code=trust_remote_code
            )
        if not isinstance(model, PreTrainedModel):
            raise TypeError(f"value_model: expected a path or a transformers model, got {type(model).__name__}")
        if model.config.num_labels != 1:
            raise ValueError(f"value_model: expected a classifier with num_labels=1, got {model.config.num_labels}")
        self.model: Any = model
        self.patch = patch_model(model)

    def scored(self, part: Pass[Any], states: Tensor | None) -> tuple[Tensor, LMHead]:
        out: tuple[Tensor, LMHead] = self.model(
            **part.inputs, fastrl_head=lambda hidden, head: (part.select(hidden), head)
        )
        return out

    def save(self, folder: str) -> None:
        self.model.save_pretrained(Path(folder, MODEL_FOLDER))

    def load(self, folder: str) -> None:
        saved = type(self.model).from_pretrained(_existing(folder, MODEL_FOLDER), dtype=self.model.dtype)
        self.model.load_state_dict(saved.state_dict())


def _existing(folder: str, name: str) -> Path:
    path = Path(folder, name)
    if not path.exists():
        raise ValueError(f"{folder} has no {name}: what was trained there had another critic, or none")
    return path


def make_critic(policy: Any, value_model: str | nn.Module | None, trust_remote_code: bool) -> Critic:
    """A value model, or a head without one, as a child of the policy, which is saved without it."""
    critic = ValueHead(policy) if value_model is None else ValueModel(value_model, trust_remote_code)
    critic.requires_grad_(True)
    setattr(policy, CRITIC, critic)
    if isinstance(policy, PreTrainedModel):
        names = {f"{CRITIC}.{name}" for name in critic.state_dict()}
        policy._keys_to_ignore_on_save = {*(policy._keys_to_ignore_on_save or ()), *names}
    return critic


def logps_and_values(
    policy: nn.Module,
    critic: Critic,
    batch: TokenBatch,
    packer: Packer,
    *,
    needs_logps: bool,
    temperature: float,
    backend: str | None,
    sequences: int | None,
) -> tuple[Tensor | None, Tensor]:
    """(B, T) log-probabilities and values of the completions' tokens, 0 where masked, without gradient or dropout.

    From one forward of the policy, which does not run if nothing is asked of it: then there are no log-probabilities.

    Args:
        needs_logps: also if the critic has a model of its own.
        sequences: at most so many in a forward.
    """
    needs_policy = needs_logps or critic.reads_policy

    def run(model: nn.Module, part: Pass[Any]) -> Tensor:
        def score(hidden: Tensor, head: LMHead) -> Tensor:
            states = part.select(hidden)
            logps = head_logps(states, head, part.batch, temperature=temperature, backend=backend)
            values = critic.values(part, states)
            return torch.stack([logps.to(values), values])

        if not needs_policy:
            return critic.values(part, None).unsqueeze(-1)
        both: Tensor = model(**part.inputs, fastrl_head=score)
        return both.permute(1, 2, 0)

    scored = over_passes(policy, batch, packer, run, sequences)
    if scored.ndim == 2:  # no token counts
        scored = scored.unsqueeze(-1)
    return scored[..., 0].contiguous() if needs_policy else None, scored[..., -1].contiguous()


def layout_of_both(packer: Packer, critic: Critic) -> Packer:
    """The policy's layout, which the critic can follow; see `Packer.for_both`."""
    return packer.for_both(critic.model, "value_model") if isinstance(critic, ValueModel) else packer
