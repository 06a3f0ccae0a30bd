"""When each trouble is looked for: four moments of an allocator's calls. Nothing that fails here stops a training."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ..log import harmless
from ..model.schedule import final_step
from .cleared import watch_for_cleared_gradients, watch_no_more
from .order import watch_the_order
from .outcome import judge_the_end_of, note_that_a_copy_goes_on, warn_in_final_phase, warn_of_lost_names, warn_of_ranks
from .pruned import warn_of_pruned_adapter
from .reach import warn_of_unreached_adapter
from .replaced import warn_of_replaced_methods
from .schedule import warn_of_schedule
from .uncalled import note_call
from .whose import warn_of_another_adapter, warn_of_its_pattern

if TYPE_CHECKING:
    from ..model.pattern import RankPattern
    from ..rules.call import AllocatorCall


def look_at_the_door(call: AllocatorCall) -> None:
    """Before anything else, at every call of any method."""
    if call.was_looked_at:
        return
    first, call.was_looked_at = not call.memory.called, True
    if first:
        # Before what has ended is judged.
        with harmless("look whether a copy trains on"):
            note_that_a_copy_goes_on(call)
    with harmless("look at an allocator"):
        note_call(call)
        if first:
            judge_the_end_of(call)
            warn_of_pruned_adapter(call)
            warn_of_schedule(call)
            warn_of_its_pattern(call)
        warn_of_replaced_methods(call)
        warn_of_another_adapter(call)


def look_after_scoring(call: AllocatorCall) -> None:
    """When PEFT has scored."""
    gradients, call.gradients = call.gradients, None
    if gradients is not None:
        with harmless("look at what a step has scored"):
            warn_of_unreached_adapter(call)
            watch_for_cleared_gradients(call, gradients)


def look_after_masking(call: AllocatorCall, result: tuple[int, RankPattern | None]) -> None:
    """When ``update_and_allocate`` is done, whether or not it has masked."""
    config = call.allocator.peft_config
    with harmless("look at what a step has left"):
        budget, pattern = result
        call.memory.seen.final_step = final_step(config)
        warn_of_ranks(call, budget, pattern)
        watch_the_order(call, pattern)
        if not call.scoring_is_due:
            watch_no_more(call)


def look_in_final_phase(call: AllocatorCall, pattern: RankPattern | None, masked: RankPattern) -> None:
    """When ``mask_using_rank_pattern`` is called. ``masked``: what of the pattern the model has."""
    with harmless("look at the final phase"):
        warn_in_final_phase(call, pattern)
        warn_of_lost_names(call, pattern, masked)
        watch_the_order(call, pattern)
