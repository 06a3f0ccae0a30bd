"""Rules 3 to 7: which triplets take part in budget and mask, and what PEFT is shown of them."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ..model.parameters import (
    INSIDE_MODULES_TO_SAVE,
    WARMING_UP,
    modules_inside_modules_to_save,
    ranked_triplets,
    takes_part,
)
from ..model.pattern import budget_name, pattern_by_full_name

if TYPE_CHECKING:
    from collections.abc import Container

    from ..model.parameters import Triplet
    from ..model.pattern import RankPattern
    from .call import AllocatorCall


def rank(call: AllocatorCall) -> list[Triplet]:
    """Settle what is ranked: show it to PEFT, and let PEFT count its budget anew where the set has changed."""
    allocator, view = call.allocator, call.view
    scored = allocator.exp_avg_ipt
    energies = (parameter.name for parameter in call.parameters if parameter.factor == "E")
    warming_up = call.memory.counts.warming_up(energies, allocator.peft_config.tinit or 0)
    ranked = ranked_triplets(call.parameters, scored, warming_up)
    _say_what_is_left_out(call, scored, warming_up)
    # Once PEFT has forgotten all scores (reset_ipt, at the finalising step) nothing says that the set has changed.
    if scored and sorted(budget_name(triplet) for triplet in ranked) != list(allocator.name_set):
        view.show(triplet.A for triplet in ranked)
        allocator._set_budget_scheduler(view)  # type: ignore[no-untyped-call]
    view.show(part for triplet in ranked for part in triplet if takes_part(part, scored))
    return ranked


def _say_what_is_left_out(call: AllocatorCall, scored: Container[str], warming_up: set[str]) -> None:
    inside = modules_inside_modules_to_save({parameter.module for parameter in call.parameters})
    but_for_that = ranked_triplets(call.parameters, scored) if warming_up else []
    late = {triplet.E.module for triplet in but_for_that if triplet.E.name in warming_up}
    for modules, reason in ((inside, INSIDE_MODULES_TO_SAVE), (late, WARMING_UP)):
        if modules:
            call.memory.said.skips({p.name: reason for p in call.parameters if p.module in modules}, call.step)


def pattern_to_mask(call: AllocatorCall, rank_pattern: RankPattern | None) -> RankPattern:
    """Return what the pattern names of this model, by full name, and show PEFT just that (the final phase)."""
    named = dict(pattern_by_full_name(call.parameters, rank_pattern or {}, call.allocator.adapter_name))
    call.view.show(parameter for parameter in call.parameters if parameter.name in named)
    return named
