"""The wrappers around ``RankAllocator``'s methods: one function per method, each a few lines that read like its rule.

Each calls PEFT's own method (``peft``) with a view of the model, and hands on arguments that it does not know.
AdaLoRA's arithmetic is PEFT's: what ``speed/`` computes in its place has been seen, on the same allocator, to be the
same bit for bit.
"""

from __future__ import annotations

from contextlib import nullcontext
from typing import TYPE_CHECKING, Any

from .rules.call import AllocatorCall, call_for, call_under_way, under_way
from .rules.history import note_step
from .rules.ranking import pattern_to_mask, rank
from .rules.scoring import scoring
from .speed.fused import score
from .stacks.stack import keep_masks
from .troubles.outcome import warn_of_missed_finalising_step
from .troubles.overlap import warn_of_overlap
from .troubles.pruned import warn_of_pruned_adapter
from .troubles.replaced import warn_of_replaced_methods
from .troubles.uncalled import note_call, watch_for_calls
from .troubles.unmatched import warn_of_unmatched_patterns
from .wrapper import is_own

if TYPE_CHECKING:
    from collections.abc import Callable

    import torch
    from peft.tuners.adalora import RankAllocator

    from .model.pattern import RankPattern


def update_and_allocate(
    peft: Callable[..., tuple[int, RankPattern | None]],
    allocator: RankAllocator,
    /,
    model: torch.nn.Module,
    global_step: int,
    *rest: Any,
    **more: Any,
) -> tuple[int, RankPattern | None]:
    """Let one walk over the model serve the whole call (``RankAllocator.update_and_allocate``)."""
    call = AllocatorCall(allocator, model, global_step)
    warn_of_replaced_methods(call)
    if not call.memory.called:
        warn_of_pruned_adapter(call)
    note_call(call)
    due = call.scoring_is_due
    if not due:
        call.memory.late.stop()
    # Where user code has put its own update_ipt in place of the guarded one, it is shown what that would be shown.
    replaced = due and not is_own(allocator, "update_ipt")
    with under_way(call), scoring(call) if replaced else nullcontext():
        budget, pattern = peft(call.view, global_step, *rest, **more)
    note_step(call, not due, budget, pattern)
    return budget, pattern


def update_ipt(
    peft: Callable[..., None], allocator: RankAllocator, /, model: torch.nn.Module, *rest: Any, **more: Any
) -> None:
    """Score just the parameters with a usable gradient (``RankAllocator.update_ipt``); the others keep their scores."""
    call = call_for(allocator, model)
    note_call(call)
    with scoring(call) as any_usable:
        if any_usable:
            peft(call.view, *rest, **more) if rest or more else score(call, peft)


def budget_schedule(
    peft: Callable[..., tuple[int, bool]], allocator: RankAllocator, /, *args: Any, **more: Any
) -> tuple[int, bool]:
    """Let the budget describe the ranked triplets only (``RankAllocator.budget_schedule``).

    PEFT asks for the budget after scoring and before masking, whoever scores: the moment to settle what is ranked.
    Outside an allocator call there is no model to look at, and PEFT answers alone.
    """
    call = call_under_way(allocator)
    if call is not None:
        warn_of_overlap(call)
        rank(call)
    return peft(*args, **more)


def mask_to_budget(
    peft: Callable[..., RankPattern],
    allocator: RankAllocator,
    /,
    model: torch.nn.Module,
    budget: int,
    *rest: Any,
    **more: Any,
) -> RankPattern | None:
    """Mask only ranked triplets (``RankAllocator.mask_to_budget``); with none, the pattern that exists stays as it is.

    PEFT forgets all scores at its finalising step, and loops that call once per micro-batch come again with that step.
    """
    call = call_for(allocator, model)
    note_call(call)
    warn_of_unmatched_patterns(call)
    warn_of_overlap(call)
    if rank(call):
        pattern = peft(call.view, budget, *rest, **more)
        keep_masks(call.parameters, pattern)
        return pattern
    existing: RankPattern | None = allocator.peft_config.rank_pattern
    return existing


def mask_using_rank_pattern(
    peft: Callable[..., None],
    allocator: RankAllocator,
    /,
    model: torch.nn.Module,
    rank_pattern: RankPattern | None,
    *rest: Any,
    **more: Any,
) -> None:
    """In the final phase, mask only names in the pattern (``RankAllocator.mask_using_rank_pattern``)."""
    call = call_for(allocator, model)
    note_call(call)
    call.memory.late.stop()
    warn_of_missed_finalising_step(call, rank_pattern)
    masked = pattern_to_mask(call, rank_pattern)
    if masked:
        peft(call.view, masked, *rest, **more)
        keep_masks(call.parameters, masked)


def _set_budget_scheduler(
    peft: Callable[..., None], allocator: RankAllocator, /, model: torch.nn.Module, *rest: Any, **more: Any
) -> None:
    """Meet each new allocator: PEFT counts its budget for the first time (``RankAllocator._set_budget_scheduler``)."""
    peft(model, *rest, **more)
    watch_for_calls(call_for(allocator, model))
