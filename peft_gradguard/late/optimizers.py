"""Hooks on the steps of every optimizer, which may go at any moment.

Torch walks through these hooks as they are, and fails where one is removed meanwhile. But the garbage collection that
takes an allocator away, and with it what watches the optimizer for it, may well come inside of such a hook.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook

if TYPE_CHECKING:
    from collections.abc import Callable

    import torch
    from torch.utils.hooks import RemovableHandle

    Hook = Callable[[torch.optim.Optimizer, tuple[Any, ...], dict[str, Any]], None]

_running = 0
_to_go: list[RemovableHandle] = []


def before_steps(hook: Hook) -> RemovableHandle:
    """Call this before each step of each optimizer, with what the step is called with."""
    return register_optimizer_step_pre_hook(_counted(hook))


def after_steps(hook: Hook) -> RemovableHandle:
    """Call this after each step of each optimizer, with what the step was called with."""
    return register_optimizer_step_post_hook(_counted(hook))


def remove(handles: list[Any]) -> None:
    """Empty this list of handles and remove their hooks: now, or with the next ones where a hook is running."""
    _to_go.extend(handles)
    handles.clear()
    while _to_go and not _running:
        _to_go.pop().remove()


def _counted(hook: Hook) -> Hook:
    def counted(optimizer: torch.optim.Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        global _running
        _running += 1
        try:
            hook(optimizer, args, kwargs)
        finally:
            _running -= 1

    return counted
