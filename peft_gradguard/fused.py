"""PEFT's scores computed for all parameters at once, where that has been seen to give PEFT's own, bit for bit.

PEFT's ``update_ipt`` starts a dozen small tensor operations for each parameter. ``torch._foreach_*`` starts each of
them for hundreds of parameters together.
"""

from __future__ import annotations

import logging
from collections import Counter
from typing import TYPE_CHECKING, NamedTuple

import torch

from .parameters import deepspeed_holds_gradient
from .replaced import is_undisturbed
from .settings import FUSED, read_fused
from .skips import memory_of
from .zero import peft_asks_deepspeed

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from peft.tuners.adalora import RankAllocator

    from .parameters import AdaLoraParameter
    from .view import ModelView

    Tensors = list[torch.Tensor]

logger = logging.getLogger("peft_gradguard")

COMPARISONS = 3
"""The scoring steps of each group that are computed both ways before PEFT's way is left out."""
CHUNK = 1 << 18
"""The numbers that are computed together: a megabyte of float32, so that what is at work stays in the cache."""


class Group(NamedTuple):
    """What is computed together, and compared together."""

    device: torch.device
    dtype: torch.dtype
    beta1: float
    beta2: float


class Scores(NamedTuple):
    """The names of ``RankAllocator``'s dictionaries of scores, each ``{parameter's name: tensor of its shape}``."""

    ipt: dict[str, torch.Tensor]
    exp_avg_ipt: dict[str, torch.Tensor]
    exp_avg_unc: dict[str, torch.Tensor]


class Trust:
    """How far the scores computed here are known to be PEFT's, for one allocator."""

    def __init__(self) -> None:
        self.agreed: Counter[Group] = Counter()
        """The steps in which both ways gave the same."""
        self.objection = None if read_fused() else f"{FUSED} switches it off"
        """Why this allocator's scores are left to PEFT for good; None where they are not."""
        self.said = False


def score(allocator: RankAllocator, view: ModelView, peft_scores: Callable[[ModelView], None]) -> None:
    """Do what PEFT's ``update_ipt`` does for the parameters shown: by that method, until both ways are known to agree.

    A step with a parameter that has no scores yet, or scores of another data type, is PEFT's as a whole.
    """
    memory = memory_of(allocator)
    trust = memory.trust = memory.trust or Trust()
    trust.objection = trust.objection or _objection(allocator, view.shown)
    groups = {} if trust.objection else _groups(allocator, view.shown)
    if not groups:
        peft_scores(view)
    elif all(trust.agreed[group] >= COMPARISONS for group in groups):
        _score(_scores_of(allocator), groups)
    else:
        # By reference: PEFT puts new tensors in the place of these.
        before = Scores(*map(dict, _scores_of(allocator)))
        peft_scores(view)
        trust.objection = _compare(before, _scores_of(allocator), groups, trust.agreed)
    if trust.objection and not trust.said:
        trust.said = True
        logger.debug("AdaLoRA's scores are left to PEFT's own code: %s (adapter %r).", trust.objection, memory.adapter)


def _scores_of(allocator: RankAllocator) -> Scores:
    return Scores(allocator.ipt, allocator.exp_avg_ipt, allocator.exp_avg_unc)


def _objection(allocator: RankAllocator, parameters: list[AdaLoraParameter]) -> str | None:
    """Return why PEFT's own code must score, from now on and for good, or None."""
    if not is_undisturbed(allocator, "update_ipt"):
        return "other code overrides or wraps update_ipt"
    if peft_asks_deepspeed(allocator) or any(deepspeed_holds_gradient(p.parameter) for p in parameters):
        return "DeepSpeed holds the gradients"
    for name, parameter, *_, shard in parameters:
        if shard is not None:
            return f"{name} is sharded"
        if type(parameter) is not torch.nn.Parameter or type(parameter.grad) is not torch.Tensor:
            return f"{name} or its gradient is no plain tensor"
        if parameter.layout != torch.strided or parameter.grad.layout != torch.strided:
            return f"{name} or its gradient is not dense"
    return None


def _groups(allocator: RankAllocator, parameters: list[AdaLoraParameter]) -> dict[Group, list[AdaLoraParameter]]:
    """Sort parameters by what is computed together; none where one does not go with its gradient or its scores."""
    ipt, averages, uncertainties = _scores_of(allocator)
    groups: dict[tuple[torch.device, torch.dtype], list[AdaLoraParameter]] = {}
    for entry in parameters:
        name, weight, gradient = entry.name, entry.parameter, entry.parameter.grad
        average, uncertainty = averages.get(name), uncertainties.get(name)
        if name not in ipt or gradient is None or average is None or uncertainty is None:
            return {}
        if not gradient.dtype == average.dtype == uncertainty.dtype == weight.dtype:
            return {}
        if not (average.device == uncertainty.device == weight.device and average.is_same_size(weight)):
            return {}
        groups.setdefault((weight.device, weight.dtype), []).append(entry)
    return {Group(*kind, allocator.beta1, allocator.beta2): entries for kind, entries in groups.items()}


def _chunks(parameters: list[AdaLoraParameter]) -> Iterator[list[AdaLoraParameter]]:
    """Cut into runs of at most ``CHUNK`` numbers, or of one parameter."""
    chunk: list[AdaLoraParameter] = []
    size = 0
    for parameter in parameters:
        size += parameter.parameter.numel()
        if chunk and size > CHUNK:
            yield chunk
            chunk, size = [], parameter.parameter.numel()
        chunk.append(parameter)
    yield chunk


def _factors(group: Group) -> list[torch.Tensor]:
    """Return the four factors, as tensors: torch multiplies lists by those of their own type in half the time.

    Half precision is multiplied in single precision, by the factor as it is there.
    """
    dtype = torch.promote_types(group.dtype, torch.float32)
    factors = (group.beta1, 1 - group.beta1, group.beta2, 1 - group.beta2)
    return [torch.tensor(factor, dtype=dtype) for factor in factors]


def _new_scores(chunk: list[AdaLoraParameter], old: Scores, factors: list[torch.Tensor]) -> list[Tensors]:
    """Compute ``ipt``, ``exp_avg_ipt`` and ``exp_avg_unc`` as PEFT's ``update_ipt`` does (AdaLoRA paper, eqs. 8 to 10).

    Each product and each sum by itself, for a fused multiply-add (``alpha=``, ``addcmul``, ``lerp``) rounds otherwise.
    In-place only where nobody else has the tensor.
    """
    beta1, rest1, beta2, rest2 = factors
    with torch.no_grad():
        ipt = torch._foreach_mul([p.parameter for p in chunk], [p.parameter.grad for p in chunk])  # type: ignore[misc]
        torch._foreach_abs_(ipt)
        average = torch._foreach_mul([old.exp_avg_ipt[p.name] for p in chunk], beta1)
        torch._foreach_add_(average, torch._foreach_mul(ipt, rest1))
        distance = torch._foreach_sub(ipt, average)
        torch._foreach_abs_(distance)
        torch._foreach_mul_(distance, rest2)
        uncertainty = torch._foreach_mul([old.exp_avg_unc[p.name] for p in chunk], beta2)
        torch._foreach_add_(uncertainty, distance)
    return [list(ipt), list(average), list(uncertainty)]


def _score(scores: Scores, groups: dict[Group, list[AdaLoraParameter]]) -> None:
    for group, parameters in groups.items():
        factors = _factors(group)
        for chunk in _chunks(parameters):
            for kind, values in zip(scores, _new_scores(chunk, scores, factors), strict=True):
                kind.update(zip((parameter.name for parameter in chunk), values, strict=True))


def _compare(
    before: Scores, pefts: Scores, groups: dict[Group, list[AdaLoraParameter]], agreed: Counter[Group]
) -> str | None:
    """Count for each group whether PEFT's scores are those computed here; return in words what is not the same."""
    if list(map(list, before)) != list(map(list, pefts)):
        return "this PEFT keeps them under other names"
    try:
        for group, parameters in groups.items():
            factors, telling = _factors(group), False
            for chunk in _chunks(parameters):
                for parameter, *ours in zip(chunk, *_new_scores(chunk, before, factors), strict=True):
                    name = parameter.name
                    if not all(_equal(our, kind[name]) for our, kind in zip(ours, pefts, strict=True)):
                        return f"this PEFT computes {name}'s in another way"
                    # Zeros are the same under any arithmetic.
                    telling = telling or all(bool(kind[name].any()) for kind in (pefts.ipt, *before[1:]))
            agreed[group] += telling
    except Exception as error:
        return f"they cannot be computed together ({error!r})"
    return None


def _equal(one: torch.Tensor, other: torch.Tensor) -> bool:
    """Say whether two tensors are the same in all that PEFT's next steps see; NaN equals NaN."""
    kinds = {(type(t), t.device, t.dtype, t.shape, t.stride(), t.requires_grad) for t in (one, other)}
    return len(kinds) == 1 and (torch.equal(one, other) or torch.allclose(one, other, rtol=0, atol=0, equal_nan=True))
