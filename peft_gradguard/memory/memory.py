"""The guard's memory of an allocator: what it has said, counted and learnt. It goes away with the allocator."""

from __future__ import annotations

import weakref
from typing import TYPE_CHECKING

from ..late.calls import LateCalls
from .counts import Counts
from .said import Said
from .seen import Seen
from .trust import Trust

if TYPE_CHECKING:
    from peft.tuners.adalora import RankAllocator

    from ..model.pattern import RankPattern


class Memory:
    """What the guard remembers of one allocator. Keeps no model alive, and no tensor but gradients for late calls."""

    def __init__(self, adapter: str) -> None:
        self.adapter = adapter
        self.said = Said(adapter)
        self.counts = Counts()
        self.late = LateCalls()
        self.seen = Seen()
        self.trust = Trust()
        self.called = False
        """Whether the allocator was ever called."""
        self.calls = 0
        """How many calls of its methods the guard has seen; those that PEFT makes inside of another count too."""
        self.scorings = 0
        """How many of them have scored anything."""
        self.loaded = False
        """Whether tensors were loaded into the adapter since its ranks were allocated last (``checkpoints/``)."""
        self.other_ranks = False
        """Whether they have brought other ranks with them."""
        self.cut: list[RankPattern] = []
        """The last patterns that saved tensors were cut by."""
        self.watched = False
        """Whether it will be seen, at the allocator's end, if it was called."""
        self.counted: list[str] | None = None
        """The triplets for which the budget of a subclass that counts in its own way was last counted anew."""
        self.fills_scores: bool | None = None
        """Whether the last scoring has filled PEFT's scores: a subclass may keep others. None where not known."""

    def let_go(self) -> None:
        """Keep no gradient, and listen to no optimizer any more: the allocator is gone. Its training may be judged."""
        self.late = LateCalls()
        self.seen.listeners = {}


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
