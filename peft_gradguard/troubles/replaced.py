"""User code that puts its own methods in place of ``RankAllocator``'s, and so around the guard."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from ..wrapper import METHODS, TARGET, leads_to_guard

if TYPE_CHECKING:
    from ..rules.call import AllocatorCall


def warn_of_replaced_methods(call: AllocatorCall) -> None:
    """Warn once per allocator of methods assigned over the guarded ones; a subclass may override what it likes.

    Not of ones that call what they have replaced.
    """
    pefts = [kind for kind in type(call.allocator).__mro__ if kind.__module__.startswith(TARGET)]
    places: list[dict[str, Any]] = [vars(call.allocator), *(dict(vars(kind)) for kind in pefts)]
    found = {name: [place[name] for place in places if name in place] for name in METHODS}
    # This very call has come by the guard.
    del found["update_and_allocate"]
    replaced = [name for name, methods in found.items() if not all(map(leads_to_guard, methods))]
    if replaced:
        call.memory.said.warn_once(
            "replaced",
            "%s was assigned after peft_gradguard was applied and runs without the guard (adapter %r); the rest of the "
            "guard works on. If it is there to work around missing gradients, remove it.",
            ", ".join(f"RankAllocator.{name}" for name in replaced),
            call.allocator.adapter_name,
        )
