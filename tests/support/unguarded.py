"""What a worker process without the guard runs, for the fixture ``plain``."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Callable


def assert_unguarded() -> None:
    assert not [name for name in sys.modules if name.startswith("peft_gradguard")]


def call_unguarded(function: Callable[..., Any], *args: Any) -> Any:
    result = function(*args)
    assert_unguarded()
    return result
