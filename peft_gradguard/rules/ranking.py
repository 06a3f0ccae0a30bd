"""Rules 3 to 7: which triplets take part in budget and mask, and what PEFT is shown of them."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ..model.parameters import INSIDE_MODULES_TO_SAVE, modules_inside_modules_to_save, ranked_triplets, takes_part
from ..model.pattern import budget_name, pattern_by_full_name

if TYPE_CHECKING:
    from ..model.parameters import Triplet
    from ..model.pattern import RankPattern
    from .call import AllocatorCall


def rank(call: AllocatorCall) -> list[Triplet]:
    """Settle what is ranked: show it to PEFT, and let PEFT count its budget anew where the set has changed."""
    allocator, view = call.allocator, call.view
    scored = allocator.exp_avg_ipt
    ranked = ranked_triplets(call.parameters, scored)
    inside = modules_inside_modules_to_save({parameter.module for parameter in call.parameters})
    for parameter in call.parameters if inside else ():
        if parameter.module in inside:
            call.memory.said.skip(parameter.name, INSIDE_MODULES_TO_SAVE, call.step)
    # Once PEFT has forgotten all scores (reset_ipt, at the finalising step) nothing says that the set has changed.
    if scored and sorted(budget_name(triplet) for triplet in ranked) != list(allocator.name_set):
        view.show(triplet.A for triplet in ranked)
        allocator._set_budget_scheduler(view)  # type: ignore[no-untyped-call]
    view.show(part for triplet in ranked for part in triplet if takes_part(part, scored))
    return ranked


def pattern_to_mask(call: AllocatorCall, rank_pattern: RankPattern | None) -> RankPattern:
    """Return what the pattern names of this model, by full name, and show PEFT just that (the final phase)."""
    named = dict(pattern_by_full_name(call.parameters, rank_pattern or {}, call.allocator.adapter_name))
    call.view.show(parameter for parameter in call.parameters if parameter.name in named)
    return named
