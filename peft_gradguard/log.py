"""The guard's one logger, and the assurance that what user code has put behind it stops no training."""

from __future__ import annotations

import contextlib
import logging
import os
import sys
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Iterator

logger = logging.getLogger("peft_gradguard")


def say(level: int, message: str, *args: Any, extra: dict[str, Any] | None = None, exc_info: bool = False) -> None:
    """Log; where a handler, filter or record factory raises, write the message and that error to stderr instead."""
    try:
        logger.log(level, message, *args, extra=extra, exc_info=exc_info)
    except Exception as error:
        # The program may have closed its stderr too: then the message is lost.
        with contextlib.suppress(Exception):
            print(f"peft_gradguard: {message % args} (logging failed on this: {error!r})", file=sys.stderr)


@contextlib.contextmanager
def harmless(what: str) -> Iterator[None]:
    """Let nothing that fails in this block, which is there for comfort, come through to the program."""
    try:
        yield
    except Exception:
        say(logging.DEBUG, "peft_gradguard could not %s.", what, exc_info=True)


def said_level() -> int:
    """WARNING on the first process of a distributed run and outside of one, DEBUG on the others."""
    return logging.DEBUG if distributed_rank() else logging.WARNING


def distributed_rank() -> int:
    """Return this process' rank: torch.distributed's where it is initialised, else the launcher's ``RANK``, else 0.

    A launcher sets ``WORLD_SIZE`` too. ``RANK`` alone may be anything, such as the rank of an adapter.
    """
    distributed = sys.modules.get("torch.distributed")
    if distributed is not None and distributed.is_available() and distributed.is_initialized():
        rank: int = distributed.get_rank()
        return rank
    given, size = (os.environ.get(name, "") for name in ("RANK", "WORLD_SIZE"))
    return int(given) if given.isdecimal() and size.isdecimal() else 0
