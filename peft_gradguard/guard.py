"""The wrappers around ``RankAllocator``'s methods: one function per method, each a few lines that read like its rule.

Each calls PEFT's own method with a view of the model. AdaLoRA's arithmetic is PEFT's alone.
"""

from __future__ import annotations

from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from .errors import NoGradientError
from .overlap import warn_of_overlap
from .parameters import (
    FROZEN,
    INSIDE_MODULES_TO_SAVE,
    modules_inside_modules_to_save,
    ranked_triplets,
    skip_reason,
    takes_part,
)
from .skips import memory_of
from .view import ModelView

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    import torch
    from peft.tuners.adalora import RankAllocator

    from .parameters import AdaLoraParameter, SkipReason, Triplet

    RankPattern = dict[str, list[bool]]
    Arguments = tuple[Any, ...]
    Keywords = dict[str, Any]


def update_and_allocate(
    wrapped: Callable[..., tuple[int, RankPattern | None]], allocator: RankAllocator, args: Arguments, kwargs: Keywords
) -> tuple[int, RankPattern | None]:
    """Let one walk over the model serve the whole call (``RankAllocator.update_and_allocate``)."""

    def guarded(model: torch.nn.Module, global_step: int, force_mask: bool = False) -> tuple[int, RankPattern | None]:
        with _call(allocator, model, global_step) as view:
            return wrapped(view, global_step, force_mask)

    return guarded(*args, **kwargs)


def update_ipt(wrapped: Callable[..., None], allocator: RankAllocator, args: Arguments, kwargs: Keywords) -> None:
    """Score just the parameters with a usable gradient (``RankAllocator.update_ipt``); the others keep their scores."""

    def guarded(model: torch.nn.Module) -> None:
        view = _view(allocator, model)
        reasons = {parameter.name: skip_reason(parameter.parameter) for parameter in view.adalora_parameters}
        usable = [parameter for parameter in view.adalora_parameters if reasons[parameter.name] is None]
        if not usable:
            _nothing_to_score(allocator, reasons)
            return
        _log_skips(allocator, reasons)
        view.show(usable)
        wrapped(view)

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
        _rank(allocator, view)
    return wrapped(*args, **kwargs)


def mask_to_budget(
    wrapped: Callable[..., RankPattern], allocator: RankAllocator, args: Arguments, kwargs: Keywords
) -> RankPattern | None:
    """Mask only ranked triplets (``RankAllocator.mask_to_budget``); with none, the pattern that exists stays as it is.

    PEFT forgets all scores at its finalising step, and loops that call once per micro-batch come again with that step.
    """

    def guarded(model: torch.nn.Module, budget: int) -> RankPattern | None:
        view = _view(allocator, model)
        if _rank(allocator, view):
            return wrapped(view, budget)
        existing: RankPattern | None = allocator.peft_config.rank_pattern
        return existing

    return guarded(*args, **kwargs)


def mask_using_rank_pattern(
    wrapped: Callable[..., None], allocator: RankAllocator, args: Arguments, kwargs: Keywords
) -> None:
    """In the final phase, mask only names in the pattern (``RankAllocator.mask_using_rank_pattern``)."""

    def guarded(model: torch.nn.Module, rank_pattern: RankPattern | None) -> None:
        _name_missed_finalising_step(allocator, rank_pattern)
        view = _view(allocator, model)
        masked = dict(_pattern_by_full_name(view.adalora_parameters, rank_pattern or {}, allocator.adapter_name))
        if masked:
            view.show(parameter for parameter in view.adalora_parameters if parameter.name in masked)
            wrapped(view, masked)

    guarded(*args, **kwargs)


@contextmanager
def _call(allocator: RankAllocator, model: torch.nn.Module, step: int) -> Iterator[ModelView]:
    """Remember view and step for the methods that PEFT calls from ``update_and_allocate``, and only so long."""
    memory = memory_of(allocator)
    view = _view(allocator, model)
    before = memory.view, memory.step
    memory.view, memory.step = view, step
    try:
        yield view
    finally:
        memory.view, memory.step = before


def _view(allocator: RankAllocator, model: torch.nn.Module) -> ModelView:
    return model if isinstance(model, ModelView) else ModelView(model, allocator.adapter_name)


def _rank(allocator: RankAllocator, view: ModelView) -> list[Triplet]:
    """Settle what is ranked: show it to PEFT, and let PEFT count its budget anew where the set has changed."""
    scored = allocator.exp_avg_ipt
    ranked = ranked_triplets(view.adalora_parameters, scored)
    _log_modules_to_save(allocator, view)
    # Once PEFT has forgotten all scores (reset_ipt, at the finalising step) nothing says that the set has changed.
    if scored and sorted(_budget_name(triplet) for triplet in ranked) != list(allocator.name_set):
        view.show(triplet.A for triplet in ranked)
        allocator._set_budget_scheduler(view)  # type: ignore[no-untyped-call]
    view.show(part for triplet in ranked for part in triplet if takes_part(part, scored))
    return ranked


def _budget_name(triplet: Triplet) -> str:
    """Return the triplet's name in ``RankAllocator.name_set``, as PEFT's ``_set_budget_scheduler`` makes it."""
    return triplet.A.name.replace("lora_A", "%s")


def _log_skips(allocator: RankAllocator, reasons: dict[str, SkipReason | None]) -> None:
    memory = memory_of(allocator)
    for name, reason in reasons.items():
        if reason is not None:
            memory.skip(name, reason)


def _log_modules_to_save(allocator: RankAllocator, view: ModelView) -> None:
    inside = modules_inside_modules_to_save({parameter.module for parameter in view.adalora_parameters})
    if inside:
        memory = memory_of(allocator)
        warn_of_overlap(memory, inside)
        for parameter in view.adalora_parameters:
            if parameter.module in inside:
                memory.skip(parameter.name, INSIDE_MODULES_TO_SAVE)


def _nothing_to_score(allocator: RankAllocator, reasons: dict[str, SkipReason | None]) -> None:
    """Name the broken training loop: raise ``NoGradientError``, or warn where only the scoring stands still."""
    memory = memory_of(allocator)
    at = f"(adapter {allocator.adapter_name!r}, step {'unknown' if memory.step is None else memory.step})"
    if not reasons:
        raise NoGradientError(
            f"update_and_allocate was given a model without AdaLoRA parameters {at}: no parameter's name ends with "
            f"'.lora_A.{allocator.adapter_name}', '.lora_B.{allocator.adapter_name}' or "
            f"'.lora_E.{allocator.adapter_name}'. Was the adapter deleted or merged and unloaded?"
        )
    if all(reason == FROZEN for reason in reasons.values()):
        if not allocator.exp_avg_ipt:
            raise NoGradientError(
                f"All {len(reasons)} AdaLoRA parameters are frozen (requires_grad is False) and none was ever scored "
                f"{at}, so AdaLoRA has nothing to train. Set requires_grad of those that shall train (for example "
                f"model.set_adapter({allocator.adapter_name!r})), or leave out the call of update_and_allocate."
            )
        _log_skips(allocator, reasons)
        memory.warn_once(
            "all frozen",
            "All %d AdaLoRA parameters are frozen %s: nothing is scored or pruned, and the scores stay as they are, "
            "until some of them are trainable again.",
            len(reasons),
            at,
        )
        return
    raise NoGradientError(
        f"None of the {len(reasons)} AdaLoRA parameters has a gradient {at}. Either update_and_allocate was called "
        "before backward or after zero_grad (as from Trainer's on_step_end), or the adapter took no part in this step "
        "(disabled, merged, or another adapter active). Call it after backward and before zero_grad; in a Trainer, "
        "from on_optimizer_step."
    )


def _name_missed_finalising_step(allocator: RankAllocator, rank_pattern: RankPattern | None) -> None:
    """Warn where the final phase begins without its first step: PEFT forgets all scores there, and here are some."""
    if allocator.exp_avg_ipt:
        config = allocator.peft_config
        memory_of(allocator).warn_once(
            "finalising step missed",
            "update_and_allocate was never called with step %d (total_step - tfinal), at which AdaLoRA settles the "
            "final ranks (adapter %r). %s Call it at every optimizer step.",
            config.total_step - config.tfinal,
            allocator.adapter_name,
            "The pattern of the last masking step stays in force." if rank_pattern else "So no rank is pruned at all.",
        )


def _pattern_by_full_name(
    parameters: list[AdaLoraParameter], rank_pattern: RankPattern, adapter: str
) -> Iterator[tuple[str, list[bool]]]:
    """Yield the pattern's entries under the parameters' full names, for the E parameters that it names.

    ``save_pretrained`` cuts the adapter's name out of the names in the pattern. PEFT tells the two forms apart by
    looking for the adapter's name anywhere in the first one, which goes wrong where a module is named like the adapter.
    """
    for parameter in parameters:
        for key in (parameter.name, parameter.name.replace(f".{adapter}", "")):
            if parameter.factor == "E" and key in rank_pattern:
                yield parameter.name, rank_pattern[key]
                break
