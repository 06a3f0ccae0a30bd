"""Which parameters PEFT scores at this step; where there are none, the broken training loop is named or rescued."""

from __future__ import annotations

from contextlib import contextmanager
from typing import TYPE_CHECKING

from .errors import NoGradientError
from .gradients import magnitudes, step_gradients
from .late import CAUSES, KEEPING, LATE, LATE_AND_ZERO, REMEDY, ZERO, ZERO_SHARDED, KeptGradients
from .parameters import EXCLUDED, FROZEN, NON_FINITE
from .shards import gradients_can_be_kept, refuse_flat_parameters, refuse_late_call, require_whole_gradients
from .skips import memory_of
from .zero import require_gradients

if TYPE_CHECKING:
    from collections.abc import Iterator

    from peft.tuners.adalora import RankAllocator

    from .gradients import StepGradients
    from .parameters import SkipReason
    from .skips import Memory
    from .view import ModelView


def scoring_is_due(allocator: RankAllocator, step: int) -> bool:
    """Say whether ``RankAllocator.update_and_allocate`` scores at this step: before the finalising one."""
    config = allocator.peft_config
    return bool(step < config.total_step - config.tfinal)


@contextmanager
def scoring(allocator: RankAllocator, view: ModelView) -> Iterator[bool]:
    """Show PEFT just the parameters with a usable gradient, and give whether there are any.

    Where user code's own ``update_ipt`` calls the guarded one, it is shown by then what this would show it.
    """
    memory = memory_of(allocator)
    if memory.any_usable is not None:
        yield memory.any_usable
        return
    parameters = view.adalora_parameters
    require_gradients(allocator, view, _at(memory))
    require_whole_gradients(parameters, _at(memory))
    with _gradients_to_score(allocator, memory, view) as gradients:
        usable = [parameter for parameter in parameters if gradients.reasons[parameter.name] is None]
        if usable:
            _log_skips(memory, gradients.reasons)
        else:
            _nothing_to_score(allocator, memory, view, gradients)
        view.show(usable)
        memory.any_usable = bool(usable)
        try:
            yield memory.any_usable
        finally:
            memory.any_usable = None
        memory.counts.add(memory.step, gradients.reasons)
    if memory.kept:
        memory.kept.watch(parameters, backward=not allocator.exp_avg_ipt)


def stop_keeping_gradients(allocator: RankAllocator) -> None:
    """Let go of what was kept for late calls: from the finalising step on nothing is scored."""
    memory = memory_of(allocator)
    if memory.kept:
        memory.kept.close()
        memory.kept = None


@contextmanager
def _gradients_to_score(allocator: RankAllocator, memory: Memory, view: ModelView) -> Iterator[StepGradients]:
    """Give this step's gradients; where none has come, those that the optimizer used last, if they were kept."""
    gradients, kept = step_gradients(view.adalora_parameters), memory.kept
    if kept is None:
        yield gradients
    elif _any_has_come(gradients, view):
        if kept.call_in_time():
            stop_keeping_gradients(allocator)
        yield gradients
    else:
        with kept.lent(view.adalora_parameters) as any_lent:
            if any_lent:
                gradients = step_gradients(view.adalora_parameters)
            if kept.suspicion and _any_has_come(gradients, view):
                kept.suspicion = False
                memory.warn_once("late call", LATE_AND_ZERO, len(gradients.reasons), _at(memory), REMEDY, KEEPING)
            yield gradients


def _any_has_come(gradients: StepGradients, view: ModelView) -> bool:
    reasons = gradients.reasons.values()
    return None in reasons or NON_FINITE in reasons or (EXCLUDED in reasons and _excluded_have_gradients(view))


def _at(memory: Memory) -> str:
    return f"(adapter {memory.adapter!r}, step {'unknown' if memory.step is None else memory.step})"


def _log_skips(memory: Memory, reasons: dict[str, SkipReason | None]) -> None:
    for name, reason in reasons.items():
        if reason is not None:
            memory.skip(name, reason)


def _nothing_to_score(allocator: RankAllocator, memory: Memory, view: ModelView, gradients: StepGradients) -> None:
    reasons = gradients.reasons
    at = _at(memory)
    if not reasons:
        refuse_flat_parameters(view.__wrapped__, at)
        raise NoGradientError(
            f"update_and_allocate was given a model without AdaLoRA parameters {at}: no parameter's name ends with "
            f"'.lora_A.{allocator.adapter_name}', '.lora_B.{allocator.adapter_name}' or "
            f"'.lora_E.{allocator.adapter_name}'. Was the adapter deleted or merged and unloaded?"
        )
    if all(reason in (FROZEN, EXCLUDED) for reason in reasons.values()):
        _none_can_be_scored(allocator, memory, reasons, at)
    elif _any_has_come(gradients, view):
        _log_skips(memory, reasons)
    else:
        _late_call(allocator, memory, view, gradients, at)


def _excluded_have_gradients(view: ModelView) -> bool:
    """Say whether the user's exclusions are why there is nothing to score, and not a call that comes too late."""
    gradients = [p.parameter.grad for p in view.adalora_parameters if p.excluded and p.parameter.grad is not None]
    return any(magnitudes(gradients))


def _none_can_be_scored(
    allocator: RankAllocator, memory: Memory, reasons: dict[str, SkipReason | None], at: str
) -> None:
    excluded = EXCLUDED in reasons.values()
    # Who excludes all that trains wants just that: its full rank.
    if not allocator.exp_avg_ipt and not excluded:
        raise NoGradientError(
            f"All {len(reasons)} AdaLoRA parameters are frozen (requires_grad is False) and none was ever scored {at}, "
            f"so AdaLoRA has nothing to train. Set requires_grad of those that shall train (for example "
            f"model.set_adapter({allocator.adapter_name!r})), or leave out the call of update_and_allocate."
        )
    _log_skips(memory, reasons)
    memory.warn_once(
        "all frozen",
        "All %d AdaLoRA parameters are %s %s: nothing is scored or pruned, and the scores stay as they are, until "
        "some of them %s again.",
        len(reasons),
        " or ".join(reason for reason in (EXCLUDED, FROZEN) if reason in reasons.values()),
        at,
        "take part" if excluded else "are trainable",
    )


def _late_call(allocator: RankAllocator, memory: Memory, view: ModelView, gradients: StepGradients, at: str) -> None:
    """Take the call to come after ``zero_grad``: keep gradients from now on, or give up where that has not helped.

    Gradients that are all exactly zero are no proof: the loss may have given them, as one of equal rewards does. So
    that is said once the optimizer is seen to use others; where nothing can be kept, both are said.
    """
    kept, zeroed, count = memory.kept, gradients.zeroed, len(gradients.reasons)
    if zeroed and not gradients_can_be_kept(view.adalora_parameters):
        memory.warn_once("zeros", ZERO_SHARDED, count, at, REMEDY)
        return
    refuse_late_call(view.adalora_parameters, at)
    if kept is None:
        kept = memory.kept = KeptGradients(view.adalora_parameters, suspicion=zeroed)
    elif zeroed and kept.copies and kept.lending:
        memory.warn_once("zeros", ZERO, count, at)
    elif not (allocator.exp_avg_ipt or kept.step_was_left_out() or (zeroed and not kept.copies)):
        found = "only gradients that are exactly zero" if zeroed else "no gradient"
        raise NoGradientError(
            f"The {count} AdaLoRA parameters have {found} {at}, at the second call in a row, and none was ever scored. "
            f"{CAUSES} {REMEDY}"
        )
    if not zeroed:
        kept.suspicion = False
        memory.warn_once("late call", LATE, count, at, CAUSES, REMEDY, KEEPING)
    kept.copies |= zeroed
