"""Which gradients of this step are usable, and why the others are not."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, NamedTuple

import torch

from .parameters import EXCLUDED, FROZEN, NO_GRADIENT, NON_FINITE, deepspeed_holds_gradient

if TYPE_CHECKING:
    from collections.abc import Sequence

    from .parameters import AdaLoraParameter, SkipReason


class StepGradients(NamedTuple):
    """What this step's gradients are good for."""

    reasons: dict[str, SkipReason | None]
    """Per parameter name, in the model's order: why it cannot be scored, or None where its gradient is usable."""
    zeroed: bool
    """Whether gradients are there and all of them exactly zero, as ``zero_grad(set_to_none=False)`` leaves them."""


def skip_reason(parameter: torch.nn.Parameter) -> SkipReason | None:
    """Return why this parameter has no gradient, or None where it has one."""
    if not parameter.requires_grad:
        return FROZEN
    if parameter.grad is None and not deepspeed_holds_gradient(parameter):
        return NO_GRADIENT
    return None


def step_gradients(parameters: Sequence[AdaLoraParameter]) -> StepGradients:
    """Judge this step's gradients. Where all are exactly zero they count as missing, for scores of 0 prune every rank.

    Gradients that DeepSpeed holds are taken as usable, unseen: looking would be a collective, and DeepSpeed leaves out
    overflowed steps by itself.
    """
    reasons = {p.name: EXCLUDED if p.excluded else skip_reason(p.parameter) for p in parameters}
    present = [p for p in parameters if reasons[p.name] is None and p.parameter.grad is not None]
    magnitudes = largest_magnitudes([p.parameter.grad for p in present if p.parameter.grad is not None])
    for parameter, magnitude in zip(present, magnitudes, strict=True):
        if not math.isfinite(magnitude):
            reasons[parameter.name] = NON_FINITE
    unseen = sum(reason is None for reason in reasons.values()) > len(present)
    zeroed = bool(present) and not unseen and not any(magnitudes)
    if zeroed:
        reasons.update((parameter.name, NO_GRADIENT) for parameter in present)
    return StepGradients(reasons, zeroed)


def largest_magnitudes(tensors: Sequence[torch.Tensor]) -> list[float]:
    """Return the largest absolute value in each tensor; NaN and inf come through, an empty tensor gives 0.

    One ``_foreach_norm`` and one synchronisation for each device and data type, instead of one for each tensor. The
    maximum norm, unlike the Euclidean one, neither overflows for large finite gradients nor vanishes for tiny ones.
    """
    found = [0.0] * len(tensors)
    groups: dict[tuple[torch.device, torch.dtype], list[int]] = {}
    for index, tensor in enumerate(tensors):
        if tensor.numel():
            groups.setdefault((tensor.device, tensor.dtype), []).append(index)
    for indices in groups.values():
        with torch.no_grad():
            norms = torch._foreach_norm([tensors[index] for index in indices], math.inf)
            values = torch.stack(norms).tolist()
        for index, value in zip(indices, values, strict=True):
            found[index] = value
    return found
