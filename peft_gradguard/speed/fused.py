"""When the guard computes PEFT's scores itself: where that has been seen to give PEFT's own, bit for bit."""

from __future__ import annotations

import logging
from contextlib import contextmanager
from typing import TYPE_CHECKING

import torch

from ..log import is_of_a_signal, say
from ..model.marks import deepspeed_holds_gradient
from ..settings import FUSED, read_fused
from ..stacks.deepspeed import peft_asks_deepspeed
from ..wrapper import undisturbed
from .flat import Plan, advanced, is_possible
from .known import is_known

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from peft.tuners.adalora import RankAllocator

    from ..memory.trust import Group, Trust
    from ..model.parameters import AdaLoraParameter
    from ..model.view import ModelView
    from ..rules.call import AllocatorCall
    from .flat import Scores, Waiting

COMPARISONS = 3
"""The scoring steps of each group that are computed both ways before PEFT's way is left out."""
KINDS = ("ipt", "exp_avg_ipt", "exp_avg_unc")
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
CANNOT = "they cannot be computed together ({!r})"
DEVICES = ("cpu", "cuda")
"""Where it can be seen who else holds some memory."""


def score(call: AllocatorCall, peft_scores: Callable[[ModelView], None]) -> None:
    """Do what PEFT's ``update_ipt`` does for the parameters shown: by that method, until both ways are known to agree.

    What has no scores yet, tensors that do not go together, and scores that somebody else holds stay PEFT's.
    """
    allocator, view, trust = call.allocator, call.view, call.memory.trust
    shown = view.shown
    if not trust.switch_was_read:
        trust.switch_was_read = True
        trust.objection = None if read_fused() else f"{FUSED} switches it off"
    trust.objection = trust.objection or _objection(allocator, shown)
    groups = {} if trust.objection else _groups(allocator, shown, trust)
    compared = {group: parameters for group, parameters in groups.items() if trust.agreed[group] < COMPARISONS}
    made: set[str] = set()
    for group in groups.keys() - compared.keys():
        made |= _made(allocator, trust, group, groups[group])
    rest = [parameter for parameter in shown if parameter.name not in made] if made else shown
    if rest:
        # By reference: PEFT puts new tensors in the place of these.
        before = [dict(kind) for kind in _kinds(allocator)] if compared else []
        _score_by_peft(peft_scores, view, rest)
        if before:
            trust.objection = _compare(before, _kinds(allocator), compared, trust)
    if trust.objection and not trust.said:
        trust.said = True
        why = "AdaLoRA's scores are left to PEFT's own code: %s (adapter %r)."
        say(logging.DEBUG, why, trust.objection, call.memory.adapter)


def _score_by_peft(peft_scores: Callable[[ModelView], None], view: ModelView, rest: list[AdaLoraParameter]) -> None:
    shown = view.shown
    if len(rest) == len(shown):
        peft_scores(view)
        return
    view.show(rest)
    try:
        peft_scores(view)
    finally:
        view.show(shown)


def _objection(allocator: RankAllocator, parameters: list[AdaLoraParameter]) -> str | None:
    """Return why PEFT's own code must score, from now on and for good, or None."""
    update_ipt = undisturbed(allocator, "update_ipt")
    if update_ipt is None:
        return "other code overrides or wraps update_ipt"
    if not is_known(update_ipt):
        return "its update_ipt is not that of a PEFT release that peft_gradguard knows"
    if not is_possible():
        return "this torch lacks what it takes to compute them together"
    without = [p.parameter for p in parameters if p.parameter.grad is None]
    if peft_asks_deepspeed(allocator) or any(map(deepspeed_holds_gradient, without)):
        return "DeepSpeed holds the gradients"
    return next((f"{p.name} is sharded" for p in parameters if p.shard is not None), None)


def _kinds(allocator: RankAllocator) -> list[Scores]:
    return [vars(allocator)[kind] for kind in KINDS]


def _groups(allocator: RankAllocator, parameters: list[AdaLoraParameter], trust: Trust) -> dict[Group, Waiting]:
    with _or_by_peft(trust):
        return _sorted(allocator, parameters)
    return {}


def _sorted(allocator: RankAllocator, parameters: list[AdaLoraParameter]) -> dict[Group, Waiting]:
    """Sort the parameters by what can be computed together; those that PEFT itself must score are left out."""
    # A subclass may keep its scores in other ways. What inference_mode makes cannot be changed in place outside of it.
    if any(type(vars(allocator).get(kind)) is not dict for kind in KINDS) or torch.is_inference_mode_enabled():
        return {}
    groups: dict[tuple[torch.device, torch.dtype], Waiting] = {}
    for parameter in parameters:
        weight = parameter.parameter
        gradient = weight.grad
        if (
            type(weight) is torch.nn.Parameter
            and type(gradient) is torch.Tensor
            and weight.is_contiguous()
            and gradient.layout is torch.strided
            and gradient.dtype is weight.dtype
            and gradient.is_same_size(weight)
        ):
            groups.setdefault((weight.device, weight.dtype), {})[parameter.name] = weight
    betas = allocator.beta1, allocator.beta2
    return {
        (*group, *betas): waiting
        for group, waiting in groups.items()
        if group[0].type in DEVICES and group[1] in DTYPES and {*map(type, betas)} == {float}
    }


def _made(allocator: RankAllocator, trust: Trust, group: Group, parameters: Waiting) -> set[str]:
    """Make the scores of a group, and return whose are made. What goes wrong here is left to PEFT, from now on."""
    *where, beta1, beta2 = group
    waiting = dict(parameters)
    with _or_by_peft(trust):
        plan = trust.plans.setdefault(tuple(where), Plan())
        plan.advance(_kinds(allocator), waiting, (beta1, beta2))
    return parameters.keys() - waiting.keys()


def _compare(before: list[Scores], after: list[Scores], groups: dict[Group, Waiting], trust: Trust) -> str | None:
    """Count for each group whether PEFT has made of the old scores what is made of them here, or say what differs."""
    with _or_by_peft(trust):
        for group, parameters in groups.items():
            telling = False
            for name, *new in advanced(parameters, before, group[2:]):
                pefts = [kind[name] for kind in after]
                if not all(map(_equal, new, pefts)):
                    return f"this PEFT computes those of {name} in another way"
                # Zeros are the same under any arithmetic.
                telling = telling or all(bool(kind.any()) for kind in (pefts[0], before[1][name], before[2][name]))
            trust.agreed[group] += telling
    return trust.objection


@contextmanager
def _or_by_peft(trust: Trust) -> Iterator[None]:
    """Leave scoring to PEFT from now on, where this fails."""
    try:
        yield
    except Exception as error:
        if is_of_a_signal(error):
            raise
        trust.objection = CANNOT.format(error)


def _equal(one: torch.Tensor, other: torch.Tensor) -> bool:
    """Say whether two tensors are the same in all that PEFT's next steps see; NaN equals NaN."""
    kinds = {(type(t), t.device, t.dtype, t.shape, t.stride(), t.requires_grad) for t in (one, other)}
    return len(kinds) == 1 and (torch.equal(one, other) or torch.allclose(one, other, rtol=0, atol=0, equal_nan=True))
