"""Waits for ``peft.tuners.adalora`` and wraps the methods of its ``RankAllocator``, on the class, once.

The wrappers then stay and ask at every call whether the guard is on, so that switching it off leaves other people's
wrappers in place.
"""

from __future__ import annotations

import importlib
import logging
import sys
import threading
from typing import TYPE_CHECKING

import wrapt

from .log import say
from .switch import is_enabled, switch_on
from .wrapper import LOADING, METHODS, TARGET, mismatch, wrap

if TYPE_CHECKING:
    from types import ModuleType

_lock = threading.RLock()
_registering = threading.local()


def enable() -> None:
    """Switch the guard on: now if PEFT is imported, else as soon as it is. Idempotent; imports neither PEFT nor torch.

    A PEFT whose ``RankAllocator`` does not look as expected is left untouched, and a WARNING on logger
    ``peft_gradguard`` says so.
    """
    switch_on()
    _install()


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
        # Not at the top, as torch must not be loaded yet: with PEFT it is.
        from . import guard
        from .checkpoints import load
        from .late.optimizers import register

        with _lock:
            register()
            for name, arguments in METHODS.items():
                wrap(module.RankAllocator, name, getattr(guard, name), arguments)
            # PEFT 0.5 has none, and leaves requires_grad alone.
            layer = getattr(module, "AdaLoraLayer", object)
            if hasattr(layer, "enable_adapters"):
                wrap(layer, "enable_adapters", guard.enable_adapters, ("self", "enabled"))
            problem = mismatch(module, "AdaLoraModel", LOADING)
            for name, arguments in () if problem else LOADING.items():
                wrap(module.AdaLoraModel, name, getattr(load, name), arguments)
        if problem:
            say(logging.DEBUG, "peft_gradguard leaves the loading of AdaLoRA adapters to PEFT: %s.", problem)
    except Exception:
        say(logging.WARNING, "peft_gradguard could not be applied: AdaLoRA runs unguarded.", exc_info=True)
