"""When the guard computes PEFT's scores itself: where that has been seen to give PEFT's own, bit for bit."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING

import torch

from ..log import say
from ..model.marks import deepspeed_holds_gradient
from ..settings import FUSED, read_fused
from ..stacks.deepspeed import peft_asks_deepspeed
from ..wrapper import is_undisturbed
from .known import is_known
from .together import new_scores

if TYPE_CHECKING:
    from collections import Counter
    from collections.abc import Callable

    from peft.tuners.adalora import RankAllocator

    from ..memory.trust import Group
    from ..model.parameters import AdaLoraParameter
    from ..model.view import ModelView
    from ..rules.call import AllocatorCall
    from .together import Scores

    Groups = dict[Group, list[AdaLoraParameter]]

COMPARISONS = 3
"""The scoring steps of each group that are computed both ways before PEFT's way is left out."""


def score(call: AllocatorCall, peft_scores: Callable[[ModelView], None]) -> None:
    """Do what PEFT's ``update_ipt`` does for the parameters shown: by that method, until both ways are known to agree.

    A step with a parameter that has no scores yet, or scores of another data type, is PEFT's as a whole.
    """
    allocator, view, trust = call.allocator, call.view, call.memory.trust
    if not trust.switch_was_read:
        trust.switch_was_read = True
        trust.objection = None if read_fused() else f"{FUSED} switches it off"
    trust.objection = trust.objection or _objection(allocator, peft_scores, view.shown)
    groups = {} if trust.objection else _groups(allocator, view.shown)
    if not groups:
        peft_scores(view)
    elif all(trust.agreed[group] >= COMPARISONS for group in groups):
        _score(allocator, groups)
    else:
        # By reference: PEFT puts new tensors in the place of these.
        averages, uncertainties = dict(allocator.exp_avg_ipt), dict(allocator.exp_avg_unc)
        peft_scores(view)
        trust.objection = _compare(allocator, averages, uncertainties, groups, trust.agreed)
    if trust.objection and not trust.said:
        trust.said = True
        why = "AdaLoRA's scores are left to PEFT's own code: %s (adapter %r)."
        say(logging.DEBUG, why, trust.objection, call.memory.adapter)


def _objection(
    allocator: RankAllocator, peft_scores: Callable[[ModelView], None], parameters: list[AdaLoraParameter]
) -> str | None:
    """Return why PEFT's own code must score, from now on and for good, or None."""
    if not is_undisturbed(allocator, "update_ipt"):
        return "other code overrides or wraps update_ipt"
    if not is_known(getattr(peft_scores, "__func__", None)):
        return "its update_ipt is not that of a PEFT release that peft_gradguard knows"
    if peft_asks_deepspeed(allocator) or any(deepspeed_holds_gradient(p.parameter) for p in parameters):
        return "DeepSpeed holds the gradients"
    for parameter in parameters:
        weight, gradient = parameter.parameter, parameter.parameter.grad
        if parameter.shard is not None:
            return f"{parameter.name} is sharded"
        if type(weight) is not torch.nn.Parameter or type(gradient) is not torch.Tensor:
            return f"{parameter.name} or its gradient is no plain tensor"
    return None


def _groups(allocator: RankAllocator, parameters: list[AdaLoraParameter]) -> Groups:
    """Sort parameters by what is computed together; none where one does not go with its gradient or its scores."""
    groups: dict[tuple[torch.device, torch.dtype], list[AdaLoraParameter]] = {}
    ipt, averages, uncertainties = allocator.ipt, allocator.exp_avg_ipt, allocator.exp_avg_unc
    for parameter in parameters:
        name, weight, gradient = parameter.name, parameter.parameter, parameter.parameter.grad
        average, uncertainty = averages.get(name), uncertainties.get(name)
        if name not in ipt or gradient is None or average is None or uncertainty is None:
            return {}
        if not gradient.dtype == average.dtype == uncertainty.dtype == weight.dtype:
            return {}
        if not (average.device == uncertainty.device == weight.device and average.is_same_size(weight)):
            return {}
        groups.setdefault((weight.device, weight.dtype), []).append(parameter)
    return {(*kind, allocator.beta1, allocator.beta2): parameters for kind, parameters in groups.items()}


def _score(allocator: RankAllocator, groups: Groups) -> None:
    ipt, averages, uncertainties = allocator.ipt, allocator.exp_avg_ipt, allocator.exp_avg_unc
    for (*_, beta1, beta2), parameters in groups.items():
        for name, *new in new_scores(parameters, averages, uncertainties, (beta1, beta2)):
            ipt[name], averages[name], uncertainties[name] = new


def _compare(
    allocator: RankAllocator, averages: Scores, uncertainties: Scores, groups: Groups, agreed: Counter[Group]
) -> str | None:
    """Count for each group whether PEFT has made of the old scores what is made of them here, or say what differs."""
    pefts = allocator.ipt, allocator.exp_avg_ipt, allocator.exp_avg_unc
    if any(list(kind) != list(averages) for kind in pefts):
        return "this PEFT keeps them under other names"
    try:
        for group, parameters in groups.items():
            telling = False
            for name, *new in new_scores(parameters, averages, uncertainties, group[2:]):
                if not all(_equal(ours, kind[name]) for ours, kind in zip(new, pefts, strict=True)):
                    return f"this PEFT computes those of {name} in another way"
                # Zeros are the same under any arithmetic.
                telling = telling or all(bool(kind[name].any()) for kind in (allocator.ipt, averages, uncertainties))
            agreed[group] += telling
    except Exception as error:
        return f"they cannot be computed together ({error!r})"
    return None


def _equal(one: torch.Tensor, other: torch.Tensor) -> bool:
    """Say whether two tensors are the same in all that PEFT's next steps see; NaN equals NaN."""
    kinds = {(type(t), t.device, t.dtype, t.shape, t.stride(), t.requires_grad) for t in (one, other)}
    return len(kinds) == 1 and (torch.equal(one, other) or torch.allclose(one, other, rtol=0, atol=0, equal_nan=True))
