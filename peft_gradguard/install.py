"""Waits for ``peft.tuners.adalora`` and wraps the methods of its ``RankAllocator``, on the class, once.

The wrappers then stay and ask at every call whether the guard is on, so that switching it off leaves other people's
wrappers in place.

Other tools have import hooks too, and put them first (typeguard, jaxtyping): what they find, no other finder is asked
for. So there are nets below: any other import, any folder that Python looks into for the first time, and whoever asks
``is_enabled`` or for a report.
"""

from __future__ import annotations

import importlib
import importlib.util
import logging
import sys
import threading
from typing import TYPE_CHECKING, Any, NoReturn

import wrapt

from . import switch
from .log import say
from .switch import disable, disabled, switch_on, times_switched_off
from .wrapper import LOADING, METHODS, TARGET, GuardWrapper, is_guarded, mismatch, wrap

if TYPE_CHECKING:
    from collections.abc import Sequence
    from importlib.machinery import ModuleSpec
    from types import ModuleType

__all__ = [
    "METHODS",
    "TARGET",
    "GuardWrapper",
    "apply_if_enabled",
    "disable",
    "disabled",
    "enable",
    "is_enabled",
    "is_guarded",
    "mismatch",
    "times_switched_off",
]

WHERE_ITS_CLASSES_ARE = (TARGET, f"{TARGET}.layer")
MOST_TIMES_FIRST = 20
"""How often the finder is put first again; two tools that both want to be first would never end."""

_lock = threading.RLock()
_in_this_thread = threading.local()
_examined: tuple[ModuleType, Any] | None = None
"""The ``peft.tuners.adalora`` that was wrapped or left untouched last, and its ``RankAllocator``."""


def enable() -> None:
    """Switch the guard on: now if PEFT is imported, else as soon as it is. Idempotent; imports neither PEFT nor torch.

    A PEFT whose ``RankAllocator`` does not look as expected is left untouched, and a WARNING on logger
    ``peft_gradguard`` says so.
    """
    switch_on()
    _finder.begin()
    module = sys.modules.get(TARGET)
    if module is not None and not _is_lazy(module):
        # Where another thread is still executing it, this waits for the module's lock.
        importlib.import_module(TARGET)
    apply_if_missed()


def is_enabled() -> bool:
    """Say whether the guard is switched on. A PEFT that was imported meanwhile, unseen, is wrapped by then."""
    apply_if_missed()
    return switch.is_enabled()


def apply_if_enabled(module: ModuleType) -> None:
    """Wrap the methods of this ``peft.tuners.adalora`` where the guard is on: the hook that ``autowrapt`` registers."""
    if _finder.begun:
        _apply(module)


def apply_if_missed() -> None:
    """Wrap a PEFT that was found by somebody else's finder; costs next to nothing where there is none."""
    module = sys.modules.get(TARGET)
    if module is None or not _finder.begun or getattr(_in_this_thread, "applying", False):
        return
    if _is_lazy(module):
        _wait_for_lazy(module)
        return
    if _examined is not None and _examined[0] is module and _examined[1] is vars(module).get("RankAllocator"):
        return
    # What is half executed comes by again. In this thread, the guard's own import may be under way too.
    guard = sys.modules.get(f"{__package__}.guard")
    if not any(getattr(getattr(m, "__spec__", None), "_initializing", False) for m in (module, guard)):
        _apply(module)


class PeftFinder:
    """Finds PEFT's AdaLoRA by the other finders, and has it wrapped as soon as it is executed, a reload included.

    It stays in ``sys.meta_path``, and so do its repetitions: to remove one while another thread goes through the list
    would make that thread skip a finder.
    """

    begun = False
    replaced = False
    """Whether a package that was imported anew has brought another one."""

    def begin(self) -> None:
        """Take a place before all others. Idempotent."""
        self.begun = True
        with _lock:
            for finder in sys.meta_path:
                if type(finder) is not PeftFinder and _has_our_name(type(finder)):
                    finder.replaced = True  # type: ignore[attr-defined]
            if self not in sys.meta_path:
                sys.meta_path.insert(0, self)
            if self.see_folder not in sys.path_hooks:
                sys.path_hooks.insert(0, self.see_folder)

    def find_spec(
        self, name: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        """Find PEFT's modules; see all others go by."""
        if self.replaced:
            return None
        under_way = vars(_in_this_thread).setdefault("finding", set())
        if name not in WHERE_ITS_CLASSES_ARE or name in under_way:
            self.look()
            return None
        under_way.add(name)
        try:
            spec = self._find_by_others(name, path, target)
        finally:
            under_way.discard(name)
        # A loader of the old kind has load_module alone: that module is met at the next import.
        if spec is not None and hasattr(spec.loader, "exec_module"):
            spec.loader = WatchedLoader(spec.loader)  # type: ignore[assignment, unused-ignore]
        return spec

    def see_folder(self, folder: str) -> NoReturn:
        """Look, and leave the folder to the other hooks: finders that stand first ask for folders too."""
        if not self.replaced:
            self.look()
        raise ImportError(folder)

    def look(self) -> None:
        """See to it that PEFT, if it is there, is wrapped, and if it is not, is not missed."""
        try:
            # While another thread executes this package, its enable() is yet to come. To import more of the package
            # here, amid an import of PEFT, would wait for it, and it may wait for this import.
            if not getattr(getattr(sys.modules.get(__package__), "__spec__", None), "_initializing", False):
                apply_if_missed()
            meta_path = sys.meta_path
            if _examined is None and meta_path[0] is not self and meta_path.count(self) < MOST_TIMES_FIRST:
                meta_path.insert(0, self)
        except Exception:
            # Whatever goes wrong here would make somebody's import fail.
            say(logging.DEBUG, "peft_gradguard could not look for PEFT.", exc_info=True)

    def _find_by_others(self, name: str, path: Any, target: Any) -> ModuleSpec | None:
        for finder in list(sys.meta_path):
            find_spec = None if finder is self else getattr(finder, "find_spec", None)
            spec: ModuleSpec | None = find_spec(name, path, target) if find_spec is not None else None
            if spec is not None:
                return spec
        return None


class WatchedLoader(wrapt.ObjectProxy):  # type: ignore[misc, type-arg, unused-ignore]
    """Somebody's loader, which tells when it has executed the module, and is found in the module as if alone."""

    def exec_module(self, module: ModuleType) -> None:
        """Execute the module, and wrap what is in it."""
        loader, spec = self.__wrapped__, object.__getattribute__(module, "__spec__")
        if spec.loader is self:
            spec.loader = loader
        if vars(module).get("__loader__") is self:
            module.__loader__ = loader
        loader.exec_module(module)
        if _is_lazy(module) and isinstance(loader, importlib.util.LazyLoader):
            _wait_for_lazy(module)
        else:
            _apply(module)


_finder = PeftFinder()


def _is_lazy(module: ModuleType) -> bool:
    """Say whether this module is executed when something in it is first asked for (``importlib.util.LazyLoader``)."""
    return type(module).__getattribute__ is not type(sys).__getattribute__


def _wait_for_lazy(module: ModuleType) -> None:
    spec = object.__getattribute__(module, "__spec__")
    if type(spec.loader) is not WatchedLoader:
        spec.loader = WatchedLoader(spec.loader)


def _has_our_name(kind: type) -> bool:
    return (kind.__module__, kind.__qualname__) == (PeftFinder.__module__, PeftFinder.__qualname__)


def _apply(module: ModuleType) -> None:
    """Wrap the methods of this module's ``RankAllocator``, unless they are wrapped already or do not fit."""
    global _examined
    # Whatever goes wrong here would make the import of PEFT fail.
    try:
        if module.__name__ == TARGET:
            _examined = module, vars(module).get("RankAllocator")
        problem = mismatch(module)
        if problem and module.__name__ == TARGET:
            say(
                logging.WARNING,
                "peft_gradguard leaves PEFT untouched: %s. AdaLoRA runs unguarded. The guard knows PEFT 0.5 to 0.21; "
                "look for a newer peft_gradguard, or set PEFT_GRADGUARD=0 to silence this.",
                problem,
            )
        if problem:
            return
        _in_this_thread.applying = True
        try:
            # Not at the top, as torch must not be loaded yet: with PEFT it is.
            from . import guard
            from .checkpoints import load
            from .late.optimizers import register
            from .stacks.dynamo import keep_compilers_out
        finally:
            _in_this_thread.applying = False
        with _lock:
            register()
            keep_compilers_out()
            for name, arguments in METHODS.items():
                wrap(module.RankAllocator, name, getattr(guard, name), arguments)
            # PEFT 0.5 has none, and leaves requires_grad alone.
            layer = getattr(module, "AdaLoraLayer", object)
            if hasattr(layer, "enable_adapters"):
                wrap(layer, "enable_adapters", guard.enable_adapters, ("self", "enabled"))
            # The module of the layers alone has no such class.
            problem = mismatch(module, "AdaLoraModel", LOADING) if module.__name__ == TARGET else None
            for name, arguments in LOADING.items() if module.__name__ == TARGET and not problem else ():
                wrap(module.AdaLoraModel, name, getattr(load, name), arguments)
        if problem:
            say(logging.DEBUG, "peft_gradguard leaves the loading of AdaLoRA adapters to PEFT: %s.", problem)
    except Exception:
        say(logging.WARNING, "peft_gradguard could not be applied: AdaLoRA runs unguarded.", exc_info=True)


# What 0.1.0 called this module. To import it, or to name it in an entry point, works as before.
sys.modules[f"{__package__}.hooks"] = sys.modules[__name__]
