"""Other code in the place of PEFT's, with the guard around it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from peft.tuners.adalora import RankAllocator

if TYPE_CHECKING:
    from collections.abc import Callable

    import pytest


def guard_instead(monkeypatch: pytest.MonkeyPatch, update_ipt: Callable[..., Any]) -> None:
    """Put this in the place of PEFT's ``update_ipt``, and let the guard wrap it as it wraps PEFT's."""
    # Not at the top: the worker process that imports this module must stay without the guard.
    from peft_gradguard import guard
    from peft_gradguard.wrapper import METHODS, wrap

    monkeypatch.setattr(RankAllocator, "update_ipt", update_ipt)
    wrap(RankAllocator, "update_ipt", guard.update_ipt, METHODS["update_ipt"])
