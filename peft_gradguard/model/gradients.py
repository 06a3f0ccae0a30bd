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


SMALL = 1 << 12
"""A tensor of at most so many numbers takes torch longer to look for than to read."""
CPU_CHUNK = (1 << 15) - 1
"""The numbers worked on together: as many as torch takes in one thread. What PEFT's own code does without a second
thread is so here as well: a forked process hangs in torch's threads where its parent has used them."""


class StepGradients(NamedTuple):
    """What this step's gradients are good for."""

    reasons: dict[str, SkipReason | None]
    """Per parameter name, in the model's order: why it cannot be scored, or None where its gradient is usable."""
    zeroed: bool
    """Whether gradients are there and all of them exactly zero, as ``zero_grad(set_to_none=False)`` leaves them."""
    came: bool
    """Whether any gradient has come at this step, be it one that is not finite or excluded; zeros are none."""
    zeros: frozenset[str] = frozenset()
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
    reasons: dict[str, SkipReason | None] = {}
    seen: list[str] = []
    gradients: list[torch.Tensor] = []
    there = 0
    for parameter in parameters:
        name, gradient = parameter.name, parameter.parameter.grad
        reasons[name] = reason = EXCLUDED if parameter.excluded else skip_reason(parameter.parameter)
        if reason is None:
            there += 1
            if gradient is not None and not gradient.is_meta:
                seen.append(name)
                gradients.append(gradient)
    found = magnitudes(gradients)
    if found is None:
        seen, found = [], []
    reasons.update((name, NON_FINITE) for name, size in zip(seen, found, strict=True) if not math.isfinite(size))
    zeros = [name for name, size in zip(seen, found, strict=True) if size == 0]
    if len(seen) == there and not any(map(math.isfinite, filter(None, found))):
        reasons.update(dict.fromkeys(zeros, NO_GRADIENT))
    found_reasons = set(reasons.values())
    came = None in found_reasons or NON_FINITE in found_reasons or _excluded_have_gradients(parameters)
    return StepGradients(reasons, bool(seen) and len(zeros) == there, came, frozenset(zeros))


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


def is_captured(tensor: torch.Tensor) -> bool:
    """Say whether a CUDA graph is recorded, which would break where a value is looked at."""
    return tensor.is_cuda and torch.cuda.is_current_stream_capturing()


def can_be_read(tensor: torch.Tensor) -> bool:
    """Say whether its values are here, and may be looked at."""
    return not tensor.is_meta and not is_captured(tensor)


def _norms(tensors: Sequence[torch.Tensor], order: float) -> list[float]:
    """Return the norms with one synchronisation for each device and data type, instead of one for each tensor."""
    found = [0.0] * len(tensors)
    groups: dict[tuple[torch.device, torch.dtype], list[int]] = {}
    for index, tensor in enumerate(tensors):
        if tensor.numel():
            groups.setdefault((tensor.device, tensor.dtype), []).append(index)
    for indices in groups.values():
        with torch.no_grad():
            order_of, norms = _norms_of_a_kind(indices, tensors, order)
            values = torch.cat(norms).tolist()
        for index, value in zip(order_of, values, strict=True):
            found[index] = value
    return found


def _norms_of_a_kind(
    indices: Sequence[int], tensors: Sequence[torch.Tensor], order: float
) -> tuple[list[int], list[torch.Tensor]]:
    """Return the norms of those of one device and data type, in some order. Small ones of one size are rows of one."""
    rows: dict[int, list[int]] = {}
    others = []
    for index in indices:
        tensor = tensors[index]
        numbers = tensor.numel()
        if numbers <= SMALL and type(tensor) is torch.Tensor and tensor.layout is torch.strided:
            rows.setdefault(numbers, []).append(index)
        else:
            others.append(index)
    order_of, norms = list(others), []
    if others:
        norms.append(torch.stack(torch._foreach_norm([tensors[index] for index in others], order)))
    for numbers, those in rows.items():
        for start in range(0, len(those), CPU_CHUNK // numbers):
            chunk = those[start : start + CPU_CHUNK // numbers]
            flat: torch.Tensor = torch._utils._flatten_dense_tensors([tensors[index] for index in chunk])  # type: ignore[no-untyped-call]
            norms.append(torch.linalg.vector_norm(flat.view(len(chunk), numbers), order, dim=1))
            order_of += chunk
    return order_of, norms
