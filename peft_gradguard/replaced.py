"""User code that puts its own methods in place of ``RankAllocator``'s, and so around the guard."""

from __future__ import annotations

from types import FunctionType
from typing import TYPE_CHECKING, Any

from .hooks import METHODS, TARGET, GuardWrapper, is_guarded
from .skips import memory_of

if TYPE_CHECKING:
    from peft.tuners.adalora import RankAllocator


def is_own(allocator: RankAllocator, name: str) -> bool:
    """Say whether a call of this method reaches the guard first: not so for one assigned later, or overridden."""
    return is_guarded(_found_first(allocator, name))


def is_undisturbed(allocator: RankAllocator, name: str) -> bool:
    """Say whether a call of this method meets the guard and PEFT's code only: nobody else overrides or wraps it."""
    found = _found_first(allocator, name)
    wrapped = found.__wrapped__ if type(found) is GuardWrapper else None
    # What functools.wraps makes has the module's name of what it wraps, but not its globals.
    return type(wrapped) is FunctionType and str(wrapped.__globals__["__name__"]).startswith(TARGET)


def name_replaced_methods(allocator: RankAllocator) -> None:
    """Warn once per allocator of methods assigned over the guarded ones; a subclass may override what it likes."""
    import peft.tuners.adalora

    places: list[dict[str, Any]] = [vars(allocator), dict(vars(peft.tuners.adalora.RankAllocator))]
    replaced = [name for name in METHODS for place in places if name in place and not is_guarded(place[name])]
    if replaced:
        memory_of(allocator).warn_once(
            "replaced",
            "%s was assigned after peft_gradguard was applied and runs without the guard (adapter %r); the rest of the "
            "guard holds. Where it is meant to work around missing gradients, it can go.",
            ", ".join(f"RankAllocator.{name}" for name in replaced),
            allocator.adapter_name,
        )


def _found_first(allocator: RankAllocator, name: str) -> Any:
    """Return what attribute look-up finds, unbound: an instance's own method before those of its classes."""
    for place in (allocator, *type(allocator).__mro__):
        if name in vars(place):
            return vars(place)[name]
    return None
