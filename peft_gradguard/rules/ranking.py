"""Rules 3 to 7: which triplets take part in budget and mask, and what PEFT is shown of them."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ..log import harmless
from ..model.parameters import (
    INSIDE_MODULES_TO_SAVE,
    WARMING_UP,
    energies,
    modules_inside_modules_to_save,
    ranked_triplets,
    takes_part,
    triplets,
)
from ..model.pattern import budget_name, pattern_by_full_name
from ..wrapper import is_pefts

if TYPE_CHECKING:
    from collections.abc import Container

    from ..model.parameters import Triplet
    from ..model.pattern import RankPattern
    from .call import AllocatorCall


def rank(call: AllocatorCall) -> list[Triplet]:
    """Settle what is ranked: show it to PEFT, and let PEFT count its budget anew where the set has changed."""
    scored = call.scored
    if ranks_in_its_own_way(call):
        call.view.show_the_model()
        return []
    names = (energy.name for energy in energies(call.parameters))
    warming_up: set[str] = set()
    with harmless("see who came late"):
        warming_up = call.memory.counts.warming_up(names, call.allocator.peft_config.tinit or 0)
    ranked = ranked_triplets(call.parameters, scored, warming_up)
    with harmless("say what is left out"):
        _say_what_is_left_out(call, scored, warming_up)
    _count_budget(call, ranked)
    call.view.show(part for triplet in ranked for part in triplet.parts if takes_part(part, scored))
    call.ranked = ranked
    return ranked


def settled(call: AllocatorCall) -> list[Triplet]:
    """Return what is ranked, as settled in this call already, unless somebody else's code may have changed it."""
    return call.ranked if call.ranked is not None and call.is_pefts_alone else rank(call)


def ranks_in_its_own_way(call: AllocatorCall) -> bool:
    """Say whether a subclass ranks by something else than PEFT's scores, and is to see what PEFT would show it."""
    if is_pefts(call.allocator, "mask_to_budget", "_element_score"):
        return False
    scored, memory = call.scored, call.memory
    if call.usable:
        memory.fills_scores = all(parameter.name in scored for parameter in call.usable)
    return not (scored if memory.fills_scores is None else memory.fills_scores)


def _count_budget(call: AllocatorCall, ranked: list[Triplet]) -> None:
    allocator, memory = call.allocator, call.memory
    names = sorted(budget_name(triplet) for triplet in ranked)
    if is_pefts(allocator, "_set_budget_scheduler", "__init__"):
        counted = list(allocator.name_set)
    else:
        # A subclass may count in its own way, or under other names: what it has counted first was everything.
        every = sorted(budget_name(triplet) for triplet in triplets(call.parameters))
        counted = every if memory.counted is None else memory.counted
    # Once PEFT has forgotten all scores (reset_ipt, at the finalising step) nothing says that the set has changed.
    if call.scored and names != counted:
        # PEFT counts the rows of A. E has as many, where A is tied to another module's.
        instead = [t.E._replace(name=budget_name(t).replace("%s", "lora_A")) for t in ranked if t.A is None]
        call.view.show((part for triplet in ranked for part in triplet.parts), instead)
        allocator._set_budget_scheduler(call.view)  # type: ignore[no-untyped-call]
        memory.counted = names


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
