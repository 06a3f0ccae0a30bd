"""What is wrapped, and by what: the six methods of ``RankAllocator``, and how the guard's wrapper is recognised."""

from __future__ import annotations

import inspect
from types import FunctionType
from typing import TYPE_CHECKING, Any

import wrapt

if TYPE_CHECKING:
    from types import ModuleType

    from peft.tuners.adalora import RankAllocator

TARGET = "peft.tuners.adalora"

METHODS: dict[str, tuple[str, ...]] = {
    "update_ipt": ("self", "model"),
    "update_and_allocate": ("self", "model", "global_step", "force_mask"),
    "budget_schedule": ("self", "step"),
    "mask_to_budget": ("self", "model", "budget"),
    "mask_using_rank_pattern": ("self", "model", "rank_pattern"),
    "_set_budget_scheduler": ("self", "model"),
}
"""The wrapped methods of ``RankAllocator`` and the arguments that they have had in every release since 0.3."""

LOADING: dict[str, tuple[str, ...]] = {
    "resize_modules_by_rank_pattern": ("self", "rank_pattern", "adapter_name"),
    "resize_state_dict_by_rank_pattern": ("self", "rank_pattern", "state_dict", "adapter_name"),
    "_load_from_state_dict": (
        "self",
        "state_dict",
        "prefix",
        "local_metadata",
        "strict",
        "missing",
        "unexpected",
        "errors",
    ),
}
"""The wrapped methods of ``AdaLoraModel``: what PEFT and torch call where an adapter is saved and loaded."""


class GuardWrapper(wrapt.FunctionWrapper):  # type: ignore[misc, type-arg, unused-ignore]
    """The guard's own wrapper, so that it can be told from anybody else's."""


def mismatch(
    module: ModuleType, class_name: str = "RankAllocator", methods: dict[str, tuple[str, ...]] = METHODS
) -> str | None:
    """Return in words what about this ``peft.tuners.adalora`` does not fit the guard, or None where all does."""
    found = getattr(module, class_name, None)
    if not inspect.isclass(found):
        return f"{module.__name__} has no class {class_name}"
    for name, expected in methods.items():
        method = inspect.getattr_static(found, name, None)
        if not callable(method):
            return f"{class_name} has no method {name}"
        try:
            inspect.signature(method).bind(*expected)
        except TypeError:
            return f"{class_name}.{name}{inspect.signature(method)} does not take ({', '.join(expected)})"
    return None


def is_guarded(method: Any) -> bool:
    """Say whether the guard's wrapper is in this chain of wrappers, at the top or beneath somebody else's."""
    while method is not None:
        # Not isinstance: a wrapt proxy answers with the class of what it wraps.
        # And what somebody else wraps may be the method bound to the class, which has the wrapper for its parent.
        if GuardWrapper in (type(method), type(getattr(method, "_self_parent", None))):
            return True
        method = getattr(method, "__wrapped__", None)
    return False


def is_own(allocator: RankAllocator, name: str) -> bool:
    """Say whether a call of this method reaches the guard first: not so for one assigned later, or overridden."""
    return is_guarded(_found_first(allocator, name))


def is_undisturbed(allocator: RankAllocator, name: str) -> bool:
    """Say whether a call of this method meets the guard and PEFT's code only: nobody else overrides or wraps it."""
    found = _found_first(allocator, name)
    wrapped = found.__wrapped__ if type(found) is GuardWrapper else None
    # What functools.wraps makes has the module's name of what it wraps, but not its globals.
    return type(wrapped) is FunctionType and str(wrapped.__globals__["__name__"]).startswith(TARGET)


def _found_first(allocator: RankAllocator, name: str) -> Any:
    """Return what attribute look-up finds, unbound: an instance's own method before those of its classes."""
    for place in (allocator, *type(allocator).__mro__):
        if name in vars(place):
            return vars(place)[name]
    return None
