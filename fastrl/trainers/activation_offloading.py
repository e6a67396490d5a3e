"""Activations in the CPU's memory between forward and backward: less memory of the GPU, at the price of the copies."""

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks

SMALLEST = 1024  # elements; copying less than that frees nothing


class OffloadedActivations:
    """What autograd saves for the backward goes to pinned memory, and comes back when the backward asks for it.

    Parameters stay, and so do small tensors and what is on the CPU already. A context manager, to be used again and
    again; forward and backward belong inside it. Eager equivalent: `torch.autograd.graph.save_on_cpu`, which copies
    parameters too.

    Args:
        model: whose parameters are not copied.
    """

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        self._parameters: set[int] = set()  # where they are kept
        self._hooks: saved_tensors_hooks | None = None

    def __enter__(self) -> None:
        self._parameters = {p.untyped_storage().data_ptr() for p in self._model.parameters()}
        self._hooks = saved_tensors_hooks(self._pack, self._unpack)
        self._hooks.__enter__()

    def __exit__(self, *exception: object) -> None:
        assert self._hooks is not None  # entered
        self._hooks.__exit__(*exception)

    def moves(self, tensor: Tensor) -> bool:
        """Whether a tensor is worth the way."""
        return tensor.device.type != "cpu" and self._is_activation(tensor)

    def _is_activation(self, tensor: Tensor) -> bool:
        if isinstance(tensor, nn.Parameter) or tensor.numel() < SMALLEST or tensor.layout != torch.strided:
            return False
        return tensor.untyped_storage().data_ptr() not in self._parameters

    def _pack(self, tensor: Tensor) -> Tensor | tuple[torch.device, Tensor]:
        if not self.moves(tensor):
            return tensor
        copy = torch.empty(tensor.size(), dtype=tensor.dtype, pin_memory=tensor.is_cuda)
        return tensor.device, copy.copy_(tensor)

    def _unpack(self, saved: Tensor | tuple[torch.device, Tensor]) -> Tensor:
        if isinstance(saved, Tensor):
            return saved
        device, copy = saved
        return copy.to(device, non_blocking=True)
