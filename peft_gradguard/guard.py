"""The wrappers around ``RankAllocator``'s methods, and one of a layer's: a few lines each, that read like a rule.

Each calls PEFT's own method (``peft``) with a view of the model; the other arguments go on as they were given.
AdaLoRA's arithmetic is PEFT's: what ``speed/`` computes in its place has been seen, on the same allocator, to be the
same bit for bit.
"""

from __future__ import annotations

from contextlib import nullcontext
from typing import TYPE_CHECKING, Any

from .log import harmless
from .rules.call import AllocatorCall, call_for, call_under_way, under_way
from .rules.disabled import flags_of, note_disabling, undo_thawing
from .rules.history import note_step
from .rules.ranking import pattern_to_mask, rank, ranks_in_its_own_way, settled
from .rules.scoring import scoring
from .speed.fused import score
from .stacks.stack import keep_masks
from .troubles.look import look_after_masking, look_after_scoring, look_at_the_door, look_in_final_phase
from .troubles.overlap import warn_of_overlap
from .troubles.schedule import explained
from .troubles.uncalled import watch_for_calls
from .troubles.unmatched import warn_of_unmatched_patterns
from .wrapper import is_own, scores_by_gradients

if TYPE_CHECKING:
    from collections.abc import Callable

    import torch
    from peft.tuners.adalora import AdaLoraLayer, RankAllocator

    from .model.pattern import RankPattern
    from .rules.disabled import Flags


def update_and_allocate(
    peft: Callable[..., tuple[int, RankPattern | None]],
    allocator: RankAllocator,
    /,
    model: torch.nn.Module,
    global_step: int,
    *_: Any,
    **__: Any,
) -> tuple[int, RankPattern | None]:
    """Let one walk over the model serve the whole call (``RankAllocator.update_and_allocate``)."""
    call = AllocatorCall(allocator, model, global_step)
    look_at_the_door(call)
    due = call.scoring_is_due
    if not due:
        call.memory.late.stop()
    replaced = due and not is_own(allocator, "update_ipt")
    # Where user code has put its own update_ipt in place of the guarded one, it is shown what that would be shown,
    # unless it scores by something else than gradients.
    by_gradients = replaced and scores_by_gradients(allocator)
    with under_way(call):
        if not due or replaced:
            # Where nobody asks for the guard's budget_schedule or update_ipt, this is the moment to settle it.
            rank(call)
        if replaced:
            call.view.show_the_model()
        with scoring(call, beneath=False) if by_gradients else nullcontext():
            result = peft(call.view)
        # The result is what somebody else's wrapper, beneath this one, has made of it.
        with harmless("note what a step has left"):
            note_step(call, *result)
        look_after_scoring(call)
        look_after_masking(call, result)
    return result


def update_ipt(
    peft: Callable[..., None], allocator: RankAllocator, /, model: torch.nn.Module, *rest: Any, **more: Any
) -> None:
    """Score just the parameters with a usable gradient (``RankAllocator.update_ipt``); the others keep their scores.

    What is ranked is settled here, at the end of scoring, so that a subclass's own ``budget_schedule`` or
    ``update_and_allocate`` sees it.
    """
    with call_for(allocator, model) as call:
        look_at_the_door(call)
        if call.is_pefts_alone or scores_by_gradients(allocator):
            with scoring(call) as any_usable:
                if any_usable:
                    peft(call.view) if rest or more else score(call, peft)
        else:
            call.view.show_the_model()
            peft(call.view)
        look_after_scoring(call)
        rank(call)


def budget_schedule(
    peft: Callable[..., tuple[int, bool]], allocator: RankAllocator, /, *_: Any, **__: Any
) -> tuple[int, bool]:
    """Let the budget describe the ranked triplets only (``RankAllocator.budget_schedule``).

    PEFT asks for it between scoring and masking. Where somebody else's ``update_ipt`` has scored, what is ranked is
    settled here. Outside an allocator call there is no model to look at, and PEFT answers alone.
    """
    call = call_under_way(allocator)
    if call is not None:
        with harmless("look at modules_to_save"):
            warn_of_overlap(call)
        settled(call)
    return peft()


def mask_to_budget(
    peft: Callable[..., RankPattern],
    allocator: RankAllocator,
    /,
    model: torch.nn.Module,
    budget: int,
    *_: Any,
    **__: Any,
) -> RankPattern | None:
    """Mask only ranked triplets (``RankAllocator.mask_to_budget``); with none, the pattern that exists stays as it is.

    PEFT forgets all scores at its finalising step, and loops that call once per micro-batch come again with that step.
    """
    with call_for(allocator, model) as call:
        look_at_the_door(call)
        with harmless("look at what is to be masked"):
            warn_of_unmatched_patterns(call)
            warn_of_overlap(call)
        before = getattr(allocator, "init_bgt", 0)
        if settled(call) or ranks_in_its_own_way(call):
            now = getattr(allocator, "init_bgt", 0)
            if now < before and budget >= now:
                # It was asked for before the set became smaller, and may be more than all that is left.
                budget = round(budget * now / before)
            with explained(call, budget):
                pattern = peft(call.view, budget)
            keep_masks(call.parameters, pattern or {})
            return pattern
    existing: RankPattern | None = allocator.peft_config.rank_pattern
    return existing


def mask_using_rank_pattern(
    peft: Callable[..., None],
    allocator: RankAllocator,
    /,
    model: torch.nn.Module,
    rank_pattern: RankPattern | None,
    *_: Any,
    **__: Any,
) -> None:
    """In the final phase, mask only names in the pattern (``RankAllocator.mask_using_rank_pattern``)."""
    with call_for(allocator, model) as call:
        look_at_the_door(call)
        call.memory.late.stop()
        masked = pattern_to_mask(call, rank_pattern)
        if masked:
            peft(call.view, masked)
            keep_masks(call.parameters, masked)
        look_in_final_phase(call, rank_pattern, masked)


def _set_budget_scheduler(
    peft: Callable[..., None], allocator: RankAllocator, /, model: torch.nn.Module, *_: Any, **__: Any
) -> None:
    """Meet each new allocator: PEFT counts its budget for the first time (``RankAllocator._set_budget_scheduler``)."""
    peft()
    if call_under_way(allocator) is None:
        with harmless("meet a new allocator"), call_for(allocator, model) as call:
            watch_for_calls(call)


def enable_adapters(peft: Callable[..., None], layer: AdaLoraLayer, /, enabled: bool, *_: Any, **__: Any) -> None:
    """Let ``disable_adapter()`` leave ``requires_grad`` as it was before (``AdaLoraLayer.enable_adapters``)."""
    meanwhile: Flags = {}
    with harmless("look at a layer that is disabled or enabled"):
        meanwhile = flags_of(layer)
        if not enabled:
            note_disabling(layer)
    peft()
    if enabled:
        with harmless("leave frozen what was frozen"):
            undo_thawing(layer, meanwhile)
