"""The steps of every torch optimizer, handed to whoever listens: one pre- and one post-step hook, never removed.

Torch walks through these hooks as they are, and fails where one comes or goes meanwhile: by another thread, or by a
garbage collection amid the walk. So both are registered once, where PEFT is patched, and who listens stands in a tuple
of our own. Without a listener a hook costs a fraction of a microsecond.
"""

from __future__ import annotations

import threading
import weakref
from typing import TYPE_CHECKING, Any

import torch
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook

from ..log import harmless

if TYPE_CHECKING:
    from collections.abc import Iterable

# A step that torch.compile traces is left alone: who listens would become a reason to compile it anew. Older torch has
# no such function.
_is_compiling = getattr(getattr(torch, "compiler", None), "is_compiling", bool)

_lock = threading.RLock()
_registered = False
_listeners: tuple[weakref.ref[StepListener], ...] = ()


class StepListener:
    """Hears of the steps of optimizers that hold some of its parameters. Known weakly.

    It knows its parameters by id alone. One may refer to its model, as by a hook of the user's, which it would keep
    alive; and ``torch.utils.swap_tensors``, which ``Module.to`` may use, refuses those that are known weakly.
    """

    def __init__(self) -> None:
        self._watched: frozenset[int] = frozenset()
        self._hooked: weakref.WeakValueDictionary[int, _Backward] = weakref.WeakValueDictionary()
        """By the id of a parameter whose backwards are seen, the hook on it, which goes away with it."""

    def watch(self, parameters: Iterable[torch.nn.Parameter]) -> None:
        """From now on hear of the steps on these parameters."""
        self._watched = frozenset(map(id, parameters))

    def held_by(self, optimizer: torch.optim.Optimizer) -> list[torch.nn.Parameter]:
        """Return those of its parameters that the optimizer holds."""
        watched = self._watched
        return [p for group in optimizer.param_groups for p in group["params"] if id(p) in watched]

    def _is_watched(self, parameter: torch.nn.Parameter) -> bool:
        return id(parameter) in self._watched

    def before_step(self, optimizer: torch.optim.Optimizer, held: list[torch.nn.Parameter], has_closure: bool) -> None:
        """Hear that an optimizer will step these parameters; a closure computes the gradients within the step."""

    def after_step(self, optimizer: torch.optim.Optimizer, held: list[torch.nn.Parameter], has_closure: bool) -> None:
        """Hear that an optimizer has stepped these parameters. Where steps call others, the inner one comes first."""

    def see_backwards(self, parameter: torch.nn.Parameter) -> None:
        """From now on hear of the backwards that reach it. The hook stays: to take it out might disturb torch."""
        if id(parameter) not in self._hooked:
            hook = _Backward(self, parameter)
            parameter.register_hook(hook)  # type: ignore[no-untyped-call]
            self._hooked[id(parameter)] = hook

    def after_backward(self, parameter_id: int, gradient: torch.Tensor) -> None:
        """Hear that a backward has reached a parameter, where that is seen, and what it brings."""


class _Backward:
    """A hook on a parameter: a backward has come. Knows its listener weakly, and does nothing once it is gone."""

    __torch_unserializable__ = "torch.multiprocessing sends the parameter without it, and without a warning"

    def __init__(self, listener: StepListener, parameter: torch.nn.Parameter) -> None:
        self._listener = weakref.ref(listener)
        self._id = id(parameter)

    def __call__(self, gradient: torch.Tensor) -> None:
        listener = self._listener()
        if listener is not None:
            listener.after_backward(self._id, gradient)


def register() -> None:
    """Register the two hooks; once in a process, before anything is trained."""
    global _registered
    with _lock:
        if not _registered:
            _registered = True
            register_optimizer_step_pre_hook(_before)
            register_optimizer_step_post_hook(_after)


def listen(listener: StepListener) -> None:
    """Hand the steps on to this listener, until it is gone or asks no more."""
    global _listeners
    with _lock:
        _listeners = (*(known for known in _listeners if known() is not None), weakref.ref(listener))


def listen_no_more(listener: StepListener) -> None:
    """Hand nothing on to this listener any more."""
    global _listeners
    with _lock:
        _listeners = tuple(known for known in _listeners if known() not in (None, listener))


def _before(optimizer: torch.optim.Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    if not _is_compiling() and _listeners:
        _tell("before_step", optimizer, args, kwargs)


def _after(optimizer: torch.optim.Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    if not _is_compiling() and _listeners:
        _tell("after_step", optimizer, args, kwargs)


def _tell(event: str, optimizer: torch.optim.Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    has_closure = (args[1] if len(args) > 1 else kwargs.get("closure")) is not None
    for reference in _listeners:
        # Whatever goes wrong here would make somebody's optimizer.step fail.
        with harmless("follow an optimizer's step"):
            listener = reference()
            held = listener.held_by(optimizer) if listener is not None else []
            if held:
                getattr(listener, event)(optimizer, held, has_closure)
