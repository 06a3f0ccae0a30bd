"""Which gradients of this step are usable, and why the others are not."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, NamedTuple

import torch

from ..log import harmless
from .marks import deepspeed_holds_gradient
from .parameters import EXCLUDED, FROZEN, NO_GRADIENT, NON_FINITE

if TYPE_CHECKING:
    from collections.abc import Sequence

    from .parameters import AdaLoraParameter, SkipReason


class StepGradients(NamedTuple):
    """What this step's gradients are good for."""

    reasons: dict[str, SkipReason | None]
    """Per parameter name, in the model's order: why it cannot be scored, or None where its gradient is usable."""
    zeroed: bool
    """Whether gradients are there and all of them exactly zero, as ``zero_grad(set_to_none=False)`` leaves them."""
    came: bool
    """Whether any gradient has come at this step, be it one that is not finite or excluded; zeros are none."""
    zeros: tuple[str, ...] = ()
    """The names of those whose gradient is exactly zero."""
    lent: bool = False
    """Whether they are those of an earlier optimizer step, lent to a call that has found none."""


def skip_reason(parameter: torch.nn.Parameter) -> SkipReason | None:
    """Return why this parameter has no gradient, or None where it has one."""
    if not parameter.requires_grad:
        return FROZEN
    if parameter.grad is None and not deepspeed_holds_gradient(parameter):
        return NO_GRADIENT
    return None


def step_gradients(parameters: Sequence[AdaLoraParameter]) -> StepGradients:
    """Judge this step's gradients. Where all are exactly zero they count as missing, for scores of 0 prune every rank.

    So do zeros where all else is not finite: clipping to a norm that has overflowed makes zeros of what was finite.

    Gradients that DeepSpeed holds are taken as usable, unseen: looking would be a collective, and DeepSpeed leaves out
    overflowed steps by itself. So are those without values (on the meta device, of fake tensors), and those of a kind
    that torch has no norm for: PEFT's own code is to deal with them.
    """
    reasons = {p.name: EXCLUDED if p.excluded else skip_reason(p.parameter) for p in parameters}
    there = [(parameter, parameter.parameter.grad) for parameter in parameters if reasons[parameter.name] is None]
    seen = [(parameter, gradient) for parameter, gradient in there if gradient is not None and not gradient.is_meta]
    found = magnitudes([gradient for _, gradient in seen])
    if found is None:
        seen, found = [], []
    for (parameter, _), magnitude in zip(seen, found, strict=True):
        if not math.isfinite(magnitude):
            reasons[parameter.name] = NON_FINITE
    zeros = [parameter.name for (parameter, _), magnitude in zip(seen, found, strict=True) if magnitude == 0]
    if len(seen) == len(there) and not any(map(math.isfinite, filter(None, found))):
        reasons.update(dict.fromkeys(zeros, NO_GRADIENT))
    found_reasons = set(reasons.values())
    came = None in found_reasons or NON_FINITE in found_reasons or _excluded_have_gradients(parameters)
    return StepGradients(reasons, bool(seen) and len(zeros) == len(there), came, tuple(zeros))


def _excluded_have_gradients(parameters: Sequence[AdaLoraParameter]) -> bool:
    """Say whether the user's exclusions are why there is nothing to score, and not a call that comes too late."""
    gradients = [p.parameter.grad for p in parameters if p.excluded and p.parameter.grad is not None]
    return any(magnitudes(gradients) or ())


def magnitudes(tensors: Sequence[torch.Tensor]) -> list[float] | None:
    """Return for each tensor a number that is 0 just where all of it is 0, and finite just where all of it is.

    None where torch has no such number for one of them, as for sparse and for fake tensors. It is the tensor's
    Euclidean norm, the quickest for torch. Large finite values make it overflow, and tiny ones vanish, so where it says
    0 or no number it is the maximum norm, which does neither. An empty tensor gives 0.
    """
    with harmless("look at gradients"):
        found = _norms(tensors, 2.0)
        doubtful = [index for index, norm in enumerate(found) if norm == 0 or not math.isfinite(norm)]
        for index, norm in zip(doubtful, _norms([tensors[index] for index in doubtful], math.inf), strict=True):
            found[index] = norm
        return found
    return None


def _norms(tensors: Sequence[torch.Tensor], order: float) -> list[float]:
    """Return the norms with one synchronisation for each device and data type, instead of one for each tensor."""
    found = [0.0] * len(tensors)
    groups: dict[tuple[torch.device, torch.dtype], list[int]] = {}
    for index, tensor in enumerate(tensors):
        if tensor.numel():
            groups.setdefault((tensor.device, tensor.dtype), []).append(index)
    for indices in groups.values():
        with torch.no_grad():
            norms = torch._foreach_norm([tensors[index] for index in indices], order)
            values = torch.stack(norms).tolist()
        for index, value in zip(indices, values, strict=True):
            found[index] = value
    return found
