"""Functions of torch that fail, as PEFT calls them."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Any

import torch
from peft.tuners.adalora import RankAllocator

if TYPE_CHECKING:
    from collections.abc import Callable

    import pytest


class OutOfMemoryError(RuntimeError):
    pass


def fail_at(monkeypatch: pytest.MonkeyPatch, name: str, after: int) -> Callable[[], None]:
    """Let a function of torch, as PEFT calls it, fail at the call after so many; gives what mends it."""
    original, calls = getattr(torch, name), []

    def failing(*args: Any, **kwargs: Any) -> Any:
        if sys._getframe(1).f_globals["__name__"] == RankAllocator.__module__:
            calls.append(name)
            if len(calls) > after:
                raise OutOfMemoryError(name)
        return original(*args, **kwargs)

    monkeypatch.setattr(torch, name, failing)
    return monkeypatch.undo
