"""Trainings that have ended, with their allocator or with the interpreter: what is to be said of them is said then.

Nothing is said from inside a garbage collection, which comes in the middle of anything: what has ended leaves a word,
and the next call, gradient, new allocator or exit says it.
"""

from __future__ import annotations

import atexit
import os
import weakref
from collections import deque
from typing import TYPE_CHECKING

from ..log import harmless
from ..switch import times_switched_off

if TYPE_CHECKING:
    from peft.tuners.adalora import RankAllocator

    from ..memory.memory import Memory

_endings: dict[int, list[Ending]] = {}
"""By the id of an allocator that lives, what will judge its training."""
_ended: deque[Ending] = deque()


class Ending:
    """Judges a training at its end. Keeps no model alive, but the guard's memory of the allocator."""

    def __init__(self, memory: Memory) -> None:
        self.memory = memory
        self.ended = False
        """Whether the allocator is gone."""
        self._began = _where_it_runs()

    def judge(self) -> None:
        """Say what is wrong with the training that has ended."""

    def has_seen_all(self) -> bool:
        """Say whether this is the process, and the guard was on all the time: what it did not see may have been."""
        return self._began == _where_it_runs()


def _where_it_runs() -> tuple[int, int]:
    return times_switched_off(), os.getpid()


def judge_at_the_end(allocator: RankAllocator, ending: Ending) -> None:
    """Let this judge the training when the allocator has gone, at the latest when the interpreter exits."""
    known = _endings.get(id(allocator))
    if known is None:
        known = _endings[id(allocator)] = []
        weakref.finalize(allocator, _end, id(allocator)).atexit = False
    known.append(ending)


def say_what_has_ended() -> None:
    """Judge the trainings whose allocator has gone."""
    while _ended:
        try:
            ending = _ended.popleft()
        except IndexError:
            # Another thread was quicker.
            return
        with harmless("judge a training at its end"):
            ending.judge()


def anything_has_ended() -> bool:
    """Say whether there is a training to judge."""
    return bool(_ended)


def living() -> list[Ending]:
    """Return what will judge the trainings whose allocator is still there."""
    return [ending for endings in list(_endings.values()) for ending in endings]


def not_judged() -> list[Ending]:
    """Return what will judge the trainings whose allocator is still there, or has just gone."""
    return [*living(), *_ended]


def _end(allocator_id: int) -> None:
    for ending in _endings.pop(allocator_id, ()):
        ending.ended = True
        ending.memory.let_go()
        _ended.append(ending)


def _at_exit() -> None:
    say_what_has_ended()
    for ending in living():
        with harmless("judge a training at its end"):
            ending.judge()


atexit.register(_at_exit)
