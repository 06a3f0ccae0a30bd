"""On and off, for the whole process. The wrappers ask at every call, so that nothing is wrapped or unwrapped here."""

from __future__ import annotations

import atexit
import sys
from contextlib import contextmanager
from typing import TYPE_CHECKING

from .settings import SWITCH

if TYPE_CHECKING:
    from collections.abc import Iterator

_enabled = False
_blocks: set[object] = set()
"""One entry for each ``disabled()`` block that was entered and not left; such blocks may overlap in any order."""
_times_off = 0


def switch_on() -> None:
    """Let the wrappers act from the next call on, inside of ``disabled()`` blocks too.

    ``install.enable`` also sees to it that the wrappers are there.
    """
    global _enabled
    _enabled = True
    _blocks.clear()


def disable() -> None:
    """Switch the guard off: PEFT's methods run as they are, from the next call on. Idempotent."""
    global _enabled, _times_off
    _enabled = False
    _times_off += 1


@contextmanager
def disabled() -> Iterator[None]:
    """Switch the guard off for a ``with`` block, in the whole process, and back to what it was afterwards.

    Where blocks overlap, as those of several threads do, it stays off until the last one is left.
    """
    global _times_off
    block = object()
    _blocks.add(block)
    _times_off += 1
    try:
        yield
    finally:
        _blocks.discard(block)


def is_enabled() -> bool:
    """Say whether the guard is switched on. Whether it could be applied is another matter: see the log."""
    return _enabled and not _blocks


def times_switched_off() -> int:
    """Return how often the guard was switched off in this process: in between it sees nothing."""
    return _times_off


def hint_at_exit() -> None:
    """Where the switch is off and the program ends by the very error of PEFT's, say so in one line on stderr."""
    atexit.register(_hint)


def _hint() -> None:
    # What Python sets for an exception that ended the program; it has printed the traceback by then.
    error, trace = getattr(sys, "last_value", None), getattr(sys, "last_traceback", None)
    if is_enabled() or sys.stderr is None or not isinstance(error, TypeError):
        return
    while trace is not None:
        if trace.tb_frame.f_code.co_name == "update_ipt":
            print(f"peft_gradguard is switched off ({SWITCH}=0). Switched on, it stops this error.", file=sys.stderr)
            return
        trace = trace.tb_next
