"""What the forms of the policy loss take, checked once: shapes, devices, and how tokens form sequences."""

from __future__ import annotations

import torch
from torch import Tensor

from fastrl_kernels import TokenBatch, validation

from .sequences import Sequences


def checked_tokens(
    shape: tuple[int, ...],  # (B, T), or (N,) with cu_seqlens
    dtype: torch.dtype,
    device: torch.device,
    *,
    logps: Tensor | None = None,  # shape
    entropy: Tensor | None = None,  # shape
    advantages: Tensor,  # (B,) or shape
    mask: Tensor,  # shape
    old_logps: Tensor | None = None,  # shape
    ref_logps: Tensor | None = None,  # shape
    importance_ratio: Tensor | None = None,  # shape or (B, 1)
    selected: Tensor | None = None,  # shape
    cu_seqlens: Tensor | None = None,  # (B + 1,)
    ratio_inside: bool = False,
) -> tuple[TokenBatch, Tensor]:
    """The tokens of a batch, constants cast (advantages stand in for logps until they are known), and its mask.

    ratio_inside: importance_ratio is no factor of the loss; it goes to the field of its name instead of the gate.

    Raises:
        ValueError, TypeError: a wrong shape or device; the message names the argument.
    """
    sequences = Sequences.padded(shape[0]) if cu_seqlens is None else _packed(cu_seqlens, shape[0], device)
    b = sequences.count
    checked = validation.check_mask(mask, shape, device)
    if checked is None:
        raise ValueError(f"mask: expected a tensor of shape {tuple(shape)}, got None")
    per_sequence = advantages.shape == (b,)
    if not per_sequence and advantages.shape != shape:
        raise ValueError(f"advantages: expected shape ({b},) or {tuple(shape)}, got {tuple(advantages.shape)}")
    of_ratio = None if importance_ratio is None else tuple(importance_ratio.shape)
    if importance_ratio is not None and of_ratio != tuple(shape) and of_ratio != (b, 1):
        raise ValueError(f"importance_ratio: expected shape {tuple(shape)} or ({b}, 1), got {of_ratio}")
    given = {"old_logps": old_logps, "ref_logps": ref_logps, "selected": selected}
    for name, x in given.items():
        if x is not None:
            validation.check_shape(name, x, shape, "one per token, as logps and ids")
    for name, x in {**given, "advantages": advantages, "importance_ratio": importance_ratio}.items():
        if x is not None:
            validation.check_device(name, x, device)

    def constant(x: Tensor | None) -> Tensor | None:
        if x is None:
            return None
        return x.detach() if x.dtype == dtype else x.detach().to(dtype)  # `to` takes longer than the rest

    adv, ratio = constant(advantages), constant(importance_ratio)
    assert adv is not None  # advantages are
    adv = sequences.spread(adv) if per_sequence else adv
    gate = None if ratio_inside else ratio
    if cu_seqlens is not None and gate is not None and gate.ndim == 2:
        gate = sequences.spread(gate.squeeze(-1))
    tokens = TokenBatch(
        adv if logps is None else logps, entropy, adv, constant(old_logps), constant(ref_logps), gate,
        sequences=sequences,
        per_sequence=per_sequence or (cu_seqlens is None and adv.shape[-1] == 1),
        importance_ratio=ratio if ratio_inside else None,
        mask=checked,
        selected=None if selected is None else selected != 0,
    )  # fmt: skip
    return tokens, checked


def _packed(cu_seqlens: Tensor, tokens: int, device: torch.device) -> Sequences:
    if cu_seqlens.device != device:
        raise ValueError(f"cu_seqlens: expected on {device}, where hidden (or logps) is, got {cu_seqlens.device}")
    return Sequences.packed(cu_seqlens, tokens)


def clean(x: Tensor | None, mask: Tensor) -> Tensor | None:
    """0 outside the mask, so that 0 * inf can't happen there, in values and in gradients; one per row stays."""
    return x if x is None or x.shape != mask.shape else torch.where(mask, x, 0.0)
