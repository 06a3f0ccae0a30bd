"""What is wrapped, and when; on and off.

PEFT's methods are wrapped on the class, once, as soon as ``peft.tuners.adalora`` is imported. The wrappers then stay
and ask at every call whether the guard is on, so that switching it off leaves other people's wrappers in place.
"""

from __future__ import annotations

import importlib
import inspect
import logging
import sys
import threading
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import wrapt

from .log import say

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from types import ModuleType

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


class GuardWrapper(wrapt.FunctionWrapper):  # type: ignore[misc, type-arg, unused-ignore]
    """The guard's own wrapper, so that it can be told from anybody else's."""


_lock = threading.RLock()
_enabled = False
_times_off = 0
_registering = threading.local()


def enable() -> None:
    """Switch the guard on: now if PEFT is imported, else as soon as it is. Idempotent; imports neither PEFT nor torch.

    A PEFT whose ``RankAllocator`` does not look as expected is left untouched, and a WARNING on logger
    ``peft_gradguard`` says so.
    """
    global _enabled
    _enabled = True
    _install()


def disable() -> None:
    """Switch the guard off: PEFT's methods run as they are, from the next call on. Idempotent."""
    global _enabled, _times_off
    _enabled = False
    _times_off += 1


@contextmanager
def disabled() -> Iterator[None]:
    """Switch the guard off for a ``with`` block, in the whole process, and back to what it was afterwards."""
    global _enabled
    before = _enabled
    disable()
    try:
        yield
    finally:
        _enabled = before


def is_enabled() -> bool:
    """Say whether the guard is switched on. Whether it could be applied is another matter: see the log."""
    return _enabled


def times_switched_off() -> int:
    """Return how often the guard was switched off in this process: in between it sees nothing."""
    return _times_off


def is_guarded(method: Any) -> bool:
    """Say whether the guard's wrapper is in this chain of wrappers, at the top or beneath somebody else's."""
    while method is not None:
        # Not isinstance: a wrapt proxy answers with the class of what it wraps.
        # And what somebody else wraps may be the method bound to the class, which has the wrapper for its parent.
        if GuardWrapper in (type(method), type(getattr(method, "_self_parent", None))):
            return True
        method = getattr(method, "__wrapped__", None)
    return False


def apply_if_enabled(module: ModuleType) -> None:
    """Wrap the methods of this ``peft.tuners.adalora`` where the guard is on: the hook that ``autowrapt`` registers."""
    if is_enabled():
        _apply(module)


def _install() -> None:
    """Arrange that ``_apply`` sees the module when it is there, whoever imports it, and from whichever thread."""
    # wrapt calls the hook at once for a module that is in sys.modules, even if another thread is still executing it,
    # and old releases of wrapt hold a lock meanwhile that this other thread needs. So such a call is left unanswered,
    # and the wait for the other thread (import_module waits for the module's lock) comes after it.
    _registering.now = True
    try:
        if TARGET not in sys.modules:
            wrapt.register_post_import_hook(_apply, TARGET)
    finally:
        _registering.now = False
    if TARGET in sys.modules:
        _apply(importlib.import_module(TARGET))


def _apply(module: ModuleType) -> None:
    """Wrap the methods of this module's ``RankAllocator``, unless they are wrapped already or do not fit."""
    if getattr(_registering, "now", False):
        return
    # Whatever goes wrong here would make the import of PEFT fail.
    try:
        problem = mismatch(module)
        if problem:
            say(
                logging.WARNING,
                "peft_gradguard leaves PEFT untouched: %s. AdaLoRA runs unguarded. The guard knows PEFT 0.5 to 0.21; "
                "look for a newer peft_gradguard, or set PEFT_GRADGUARD=0 to silence this.",
                problem,
            )
            return
        # Not at the top: this import is the first that needs torch, which is there whenever PEFT is.
        from . import guard

        with _lock:
            for name in METHODS:
                _wrap(module.RankAllocator, name, getattr(guard, name))
    except Exception:
        say(logging.WARNING, "peft_gradguard could not be applied: AdaLoRA runs unguarded.", exc_info=True)


def _wrap(allocator_class: type, name: str, wrapper: Callable[..., Any]) -> None:
    if not is_guarded(vars(allocator_class).get(name)):
        wrapt.wrap_object(allocator_class, name, GuardWrapper, (wrapper,), {"enabled": is_enabled})


def mismatch(module: ModuleType) -> str | None:
    """Return in words what about this ``peft.tuners.adalora`` does not fit the guard, or None where all does."""
    allocator_class = getattr(module, "RankAllocator", None)
    if not inspect.isclass(allocator_class):
        return f"{module.__name__} has no class RankAllocator"
    for name, expected in METHODS.items():
        method = vars(allocator_class).get(name)
        if not callable(method):
            return f"RankAllocator has no method {name}"
        try:
            inspect.signature(method).bind(*expected)
        except TypeError:
            return f"RankAllocator.{name}{inspect.signature(method)} does not take ({', '.join(expected)})"
    return None
