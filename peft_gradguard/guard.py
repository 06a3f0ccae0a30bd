"""The wrappers around ``RankAllocator``'s methods: one function per method, each a few lines that read like its rule.

Each calls PEFT's own method with a view of the model, and hands on arguments that it does not know. AdaLoRA's
arithmetic is PEFT's: what ``fused.py`` computes in its place has been seen, on the same allocator, to be the same bit
for bit.
"""

from __future__ import annotations

from contextlib import contextmanager, nullcontext
from typing import TYPE_CHECKING, Any

from .counts import note_step
from .exclusions import warn_of_unmatched
from .fused import score
from .ranking import name_missed_finalising_step, name_pruned_adapter, pattern_by_full_name, rank
from .replaced import is_own, name_replaced_methods
from .scoring import scoring, scoring_is_due, stop_keeping_gradients
from .shards import keep_masks
from .skips import memory_of
from .uncalled import note_call, watch_for_calls
from .undo import undone_on_error
from .view import ModelView

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    import torch
    from peft.tuners.adalora import RankAllocator

    from .ranking import RankPattern

    Arguments = tuple[Any, ...]
    Keywords = dict[str, Any]


def update_and_allocate(
    wrapped: Callable[..., tuple[int, RankPattern | None]], allocator: RankAllocator, args: Arguments, kwargs: Keywords
) -> tuple[int, RankPattern | None]:
    """Let one walk over the model serve the whole call (``RankAllocator.update_and_allocate``)."""

    def guarded(model: torch.nn.Module, global_step: int, *rest: Any, **more: Any) -> tuple[int, RankPattern | None]:
        name_replaced_methods(allocator)
        due = scoring_is_due(allocator, global_step)
        if not due:
            stop_keeping_gradients(allocator)
        # Where user code has put its own update_ipt in place of the guarded one, it is shown what that would be shown.
        replaced = due and not is_own(allocator, "update_ipt")
        with _call(allocator, model, global_step) as view, scoring(allocator, view) if replaced else nullcontext():
            budget, pattern = wrapped(view, global_step, *rest, **more)
        note_step(allocator, view, global_step, not due, budget, pattern)
        return budget, pattern

    return guarded(*args, **kwargs)


def update_ipt(wrapped: Callable[..., None], allocator: RankAllocator, args: Arguments, kwargs: Keywords) -> None:
    """Score just the parameters with a usable gradient (``RankAllocator.update_ipt``); the others keep their scores."""

    def guarded(model: torch.nn.Module, *rest: Any, **more: Any) -> None:
        view = _view(allocator, model)
        with scoring(allocator, view) as any_usable:
            if any_usable:
                wrapped(view, *rest, **more) if rest or more else score(allocator, view, wrapped)

    guarded(*args, **kwargs)


def budget_schedule(
    wrapped: Callable[..., tuple[int, bool]], allocator: RankAllocator, args: Arguments, kwargs: Keywords
) -> tuple[int, bool]:
    """Let the budget describe the ranked triplets only (``RankAllocator.budget_schedule``).

    PEFT asks for the budget after scoring and before masking, whoever scores: the moment to settle what is ranked.
    Outside an allocator call there is no model to look at, and PEFT answers alone.
    """
    view = memory_of(allocator).view
    if view is not None:
        rank(allocator, view)
    return wrapped(*args, **kwargs)


def mask_to_budget(
    wrapped: Callable[..., RankPattern], allocator: RankAllocator, args: Arguments, kwargs: Keywords
) -> RankPattern | None:
    """Mask only ranked triplets (``RankAllocator.mask_to_budget``); with none, the pattern that exists stays as it is.

    PEFT forgets all scores at its finalising step, and loops that call once per micro-batch come again with that step.
    """

    def guarded(model: torch.nn.Module, budget: int, *rest: Any, **more: Any) -> RankPattern | None:
        view = _view(allocator, model)
        warn_of_unmatched(memory_of(allocator), view.adalora_parameters)
        if rank(allocator, view):
            pattern = wrapped(view, budget, *rest, **more)
            keep_masks(view, pattern)
            return pattern
        existing: RankPattern | None = allocator.peft_config.rank_pattern
        return existing

    return guarded(*args, **kwargs)


def mask_using_rank_pattern(
    wrapped: Callable[..., None], allocator: RankAllocator, args: Arguments, kwargs: Keywords
) -> None:
    """In the final phase, mask only names in the pattern (``RankAllocator.mask_using_rank_pattern``)."""

    def guarded(model: torch.nn.Module, rank_pattern: RankPattern | None, *rest: Any, **more: Any) -> None:
        note_call(memory_of(allocator))
        stop_keeping_gradients(allocator)
        name_missed_finalising_step(allocator, rank_pattern)
        view = _view(allocator, model)
        masked = dict(pattern_by_full_name(view.adalora_parameters, rank_pattern or {}, allocator.adapter_name))
        if masked:
            view.show(parameter for parameter in view.adalora_parameters if parameter.name in masked)
            wrapped(view, masked, *rest, **more)
            keep_masks(view, masked)

    guarded(*args, **kwargs)


def _set_budget_scheduler(
    wrapped: Callable[..., None], allocator: RankAllocator, args: Arguments, kwargs: Keywords
) -> None:
    """Meet each new allocator: PEFT counts its budget for the first time (``RankAllocator._set_budget_scheduler``)."""

    def guarded(model: torch.nn.Module, *rest: Any, **more: Any) -> None:
        wrapped(model, *rest, **more)
        watch_for_calls(allocator, _view(allocator, model))

    guarded(*args, **kwargs)


@contextmanager
def _call(allocator: RankAllocator, model: torch.nn.Module, step: int) -> Iterator[ModelView]:
    """Remember view and step for the methods that PEFT calls from ``update_and_allocate``, and only so long."""
    memory = memory_of(allocator)
    first = not memory.called
    note_call(memory)
    view = _view(allocator, model)
    if first:
        name_pruned_adapter(allocator, view)
    before = memory.view, memory.step
    memory.view, memory.step = view, step
    try:
        with undone_on_error(allocator):
            yield view
    finally:
        memory.view, memory.step = before


def _view(allocator: RankAllocator, model: torch.nn.Module) -> ModelView:
    return model if isinstance(model, ModelView) else ModelView(model, allocator.adapter_name)
