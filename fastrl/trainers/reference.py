"""What a policy is held near to, and how it is kept: a model of its own, or the policy's own weights as they were."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn

from fastrl.trainers import model_setup


class Reference:
    """The reference of a policy.

    - With `model`: that one, frozen.
    - Of a policy that was given a new adapter: itself without the adapter.
    - Of a policy that came with an adapter: itself with the adapter's weights as they are now, of which a copy is kept.
    - Of any other policy: itself. That is the reference only as long as it has not been trained (`is_policy`).

    Args:
        policy: not wrapped for distributed training.
        model: of the same vocabulary.
        new_adapter: the policy's adapter was made for this training.
    """

    def __init__(self, policy: nn.Module, model: nn.Module | None, new_adapter: bool) -> None:
        self._policy: Any = policy
        self.model = None if model is None else model.eval().requires_grad_(False)
        self._drops_adapter = model is None and new_adapter
        self._before: list[tuple[nn.Parameter, Tensor]] = []
        if model is None and not new_adapter and model_setup.is_peft_model(policy):
            self._before = [(p, p.detach().clone()) for p in policy.parameters() if p.requires_grad]

    @property
    def is_policy(self) -> bool:
        """Whether training changes it."""
        return self.model is None and not self._drops_adapter and not self._before

    @contextmanager
    def active(self) -> Iterator[nn.Module]:
        """The reference, without dropout; the policy is itself again afterwards."""
        if self.model is not None:
            yield self.model
            return
        training = [module for module in self._policy.modules() if module.training]
        self._policy.eval()
        try:
            if self._drops_adapter:
                with self._policy.disable_adapter():
                    yield self._policy
            else:
                with self._weights_before():
                    yield self._policy
        finally:
            for module in training:
                module.training = True

    @contextmanager
    def _weights_before(self) -> Iterator[None]:
        now = [parameter.data for parameter, _ in self._before]
        try:
            for parameter, before in self._before:
                parameter.data = before.to(parameter.device)
            yield
        finally:
            for (parameter, _), data in zip(self._before, now, strict=True):
                parameter.data = data
