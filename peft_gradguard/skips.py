"""What was left out, said once: the guard's memory of an allocator."""

from __future__ import annotations

import logging
import os
import sys
import weakref
from typing import TYPE_CHECKING, Any

from .counts import Counts
from .log import say

if TYPE_CHECKING:
    from peft.tuners.adalora import RankAllocator
    from torch.utils.hooks import RemovableHandle

    from .fused import Trust
    from .late import KeptGradients
    from .parameters import SkipReason
    from .view import ModelView


class Memory:
    """What the guard remembers of one allocator: what it has said, and the call under way. Keeps no model alive."""

    def __init__(self, adapter: str) -> None:
        self.adapter = adapter
        self.step: int | None = None
        """The ``global_step`` of the ``update_and_allocate`` under way; None outside one."""
        self.view: ModelView | None = None
        """The view made for the ``update_and_allocate`` under way; None outside one."""
        self.kept: KeptGradients | None = None
        """The gradients kept for calls that come after ``zero_grad``; None as long as there was no such call."""
        self.any_usable: bool | None = None
        """Whether there are usable gradients in the scoring under way; None outside one."""
        self.trust: Trust | None = None
        """How far the guard may compute PEFT's scores itself; None before the first scoring."""
        self.called = False
        """Whether the allocator was ever called."""
        self.watched = False
        """Whether it will be seen, at the allocator's end, if it was called."""
        self.until_called: list[RemovableHandle] = []
        """What watches the optimizers until the allocator is called."""
        self.counts = Counts()
        self.judged: set[str] = set()
        """The patterns of ``exclude`` that were looked at for whether they match anything."""
        self._said: set[str] = set()

    def skip(self, name: str, reason: SkipReason) -> None:
        """Log that a parameter is left out; only the first time for each name."""
        if name in self._said:
            return
        self._said.add(name)
        say(
            said_level(),
            "%s is left out of AdaLoRA's %s: %s (adapter %r, step %s). It is said once for each parameter.",
            name,
            {"inside modules_to_save": "ranking", "excluded": "scoring and ranking"}.get(reason, "scoring"),
            reason,
            self.adapter,
            "unknown" if self.step is None else self.step,
            extra={"parameter": name, "reason": reason, "adapter": self.adapter, "step": self.step},
        )

    def warn_once(self, topic: str, message: str, *args: Any) -> None:
        """Log a warning about the training as a whole; only the first time for each topic."""
        key = f"<{topic}>"
        if key not in self._said:
            self._said.add(key)
            say(said_level(), message, *args)


_memories: dict[int, Memory] = {}


def memory_of(allocator: RankAllocator) -> Memory:
    """Return the memory of this allocator; it goes away with the allocator.

    Found by identity: a subclass may be equal to others of its kind, or not hashable, as data classes are.
    """
    memory = _memories.get(id(allocator))
    if memory is None:
        memory = _memories[id(allocator)] = Memory(allocator.adapter_name)
        weakref.finalize(allocator, _memories.pop, id(allocator), None).atexit = False
    return memory


def known_memory(allocator: RankAllocator) -> Memory | None:
    """Return the memory of this allocator if there is one already."""
    return _memories.get(id(allocator))


def said_level() -> int:
    """WARNING on the first process of a distributed run and outside of one, DEBUG on the others."""
    return logging.DEBUG if distributed_rank() else logging.WARNING


def distributed_rank() -> int:
    """Return this process' rank: torch.distributed's where it is initialised, else the launcher's ``RANK``, else 0."""
    distributed = sys.modules.get("torch.distributed")
    if distributed is not None and distributed.is_available() and distributed.is_initialized():
        rank: int = distributed.get_rank()
        return rank
    rank_text = os.environ.get("RANK", "")
    return int(rank_text) if rank_text.isdecimal() else 0
