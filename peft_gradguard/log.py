"""The guard's one logger, and the assurance that what user code has put behind it stops no training."""

from __future__ import annotations

import contextlib
import logging
import os
import signal
import sys
import traceback
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Iterator

logger = logging.getLogger("peft_gradguard")


def say(level: int, message: str, *args: Any, extra: dict[str, Any] | None = None, exc_info: bool = False) -> None:
    """Log; where a handler, filter or record factory raises, write the message and that error to stderr instead."""
    cleared = _progress_bars_cleared(level)
    try:
        logger.log(level, message, *args, extra=extra, exc_info=exc_info)
    except Exception as error:
        # The program may have closed its stderr too: then the message is lost.
        with contextlib.suppress(Exception):
            print(f"peft_gradguard: {message % args} (logging failed on this: {error!r})", file=sys.stderr)
    finally:
        with contextlib.suppress(Exception):
            cleared.close()


def _progress_bars_cleared(level: int) -> contextlib.ExitStack:
    """Take tqdm's bars off the terminal for the moment, so that a message does not begin at the end of one."""
    cleared = contextlib.ExitStack()
    tqdm = sys.modules.get("tqdm.std")
    with contextlib.suppress(Exception):
        if tqdm is not None and logger.isEnabledFor(level):
            # Without tqdm's lock: another thread or process may hold it for long.
            cleared.enter_context(tqdm.tqdm.external_write_mode(sys.stderr, nolock=True))
    return cleared


@contextlib.contextmanager
def harmless(what: str) -> Iterator[None]:
    """Let nothing that fails in this block, which is there for comfort, come through to the program."""
    try:
        yield
    except Exception as error:
        if is_of_a_signal(error):
            raise
        say(logging.DEBUG, "peft_gradguard could not %s.", what, exc_info=True)


def is_of_a_signal(error: BaseException) -> bool:
    """Say whether a signal's handler has raised this, such as a time limit: it is the program's, and only came here."""
    handlers = map(signal.getsignal, signal.valid_signals())
    codes = {getattr(getattr(handler, "__func__", handler), "__code__", None) for handler in handlers} - {None}
    return any(frame.f_code in codes for frame, _ in traceback.walk_tb(error.__traceback__))


def said_level() -> int:
    """WARNING on the first process of a distributed run and outside of one, DEBUG on the others."""
    return logging.DEBUG if distributed_rank() else logging.WARNING


def distributed_rank() -> int:
    """Return this process' rank: torch.distributed's where it is initialised, else the launcher's ``RANK``, else 0.

    A launcher sets ``WORLD_SIZE`` too, above it. Any other ``RANK`` may be anything, such as the rank of an adapter.
    """
    distributed = sys.modules.get("torch.distributed")
    if distributed is not None and distributed.is_available() and distributed.is_initialized():
        rank: int = distributed.get_rank()
        return rank
    given, size = (os.environ.get(name, "") for name in ("RANK", "WORLD_SIZE"))
    return int(given) if given.isdecimal() and size.isdecimal() and int(given) < int(size) else 0
