"""Trainings that never call ``update_and_allocate``: nothing fails there, and no rank is ever allocated.

One E of each allocator is watched while it gets gradients, until the first call. Its values change between two of them
just where an optimizer trains it: a target, an average or a reference model is not taken for a training. Where it is
trained although its allocator has gone, there is none to call (``whose.py``).
"""

from __future__ import annotations

import weakref
from typing import TYPE_CHECKING

import torch

from ..errors import PLACE
from ..log import harmless
from ..model.gradients import can_be_read
from ..model.parameters import energies
from ..model.pattern import pattern_by_full_name
from .ended import Ending, anything_has_ended, judge_at_the_end, living, say_what_has_ended
from .whose import PATTERN, anothers_pattern, without_allocator

if TYPE_CHECKING:
    from ..memory.memory import Memory
    from ..rules.call import AllocatorCall

_orphans: dict[int, weakref.ref[Watch]] = {}
"""By the id of its E, who watches an adapter whose allocator has gone."""


class Watch(Ending):
    """Whether the adapter of one allocator is trained. Keeps no model alive: ``r`` numbers, and the guard's memory.

    It is handed its E and does not know it: to hold it would be a circle that outlives the model, and
    ``torch.utils.swap_tensors``, which ``Module.to`` may use, refuses tensors that are known weakly.
    """

    __torch_unserializable__ = "torch.multiprocessing sends the parameter without it, and without a warning"

    def __init__(self, memory: Memory, ranked: frozenset[int]) -> None:
        super().__init__(memory)
        self.ranked = ranked
        """The ids of the parameters that the allocator ranks."""
        self.cut_to: list[bool] = []
        """Which of the ranks of E are kept by the pattern that the config came with."""
        self.trained = False
        """Whether its values were seen to change between two gradients."""
        self._first: torch.Tensor | None = None
        self._done = False
        """Whether there is nothing more to find out."""
        self._orphaned = False

    def __call__(self, energy: torch.Tensor) -> None:
        """See that a gradient has come (the hook on E)."""
        # Whatever goes wrong here would make somebody's backward fail.
        with harmless("see whether an adapter is trained"):
            if self.ended and not self._orphaned:
                self._orphaned = True
                self._be_an_orphan(energy)
            if not (self._done or self.trained or (self.memory.called and not self._orphaned)):
                self.trained = self._has_changed(energy)
                if self.trained:
                    self._say_whose(energy)
            if anything_has_ended():
                say_what_has_ended()

    def judge(self) -> None:
        """Warn where the adapter was trained and the allocator never called."""
        # While the guard is off it sees no calls, and in a process forked off meanwhile it sees another training.
        if self.trained and not self.memory.called and self.has_seen_all():
            self.memory.said.warn_once(
                "never called",
                "AdaLoRA's adapter %r was trained, but update_and_allocate was never called, so that all ranks stayed "
                "as they started. Call model.base_model.update_and_allocate(step) %s.",
                self.memory.adapter,
                PLACE,
            )

    def _be_an_orphan(self, energy: torch.Tensor) -> None:
        """Begin anew: the adapter gets gradients, and its allocator is gone."""
        self._done = not self.has_seen_all()
        self.trained, self._first = False, None
        if not self._done:
            _orphans[id(energy)] = weakref.ref(self)

    def _say_whose(self, energy: torch.Tensor) -> None:
        if not self._orphaned:
            if self.memory.seen.came_with is not None and self.cut_to and len(energy) > sum(self.cut_to):
                self.memory.said.warn_once(PATTERN, "%s", anothers_pattern(self.memory.adapter))
            return
        self._done = True
        adopted = any(isinstance(other, Watch) and id(energy) in other.ranked for other in living())
        if _orphans.pop(id(energy), None) is not None and not adopted and self.has_seen_all():
            self.memory.said.warn_once("no allocator", "%s", without_allocator(self.memory.adapter))

    def _has_changed(self, energy: torch.Tensor) -> bool:
        # Only plain tensors are looked at: to compare shards would be a collective, and to read a value while a CUDA
        # graph is recorded would break it.
        now = energy.detach()
        if type(now) is not torch.Tensor or not can_be_read(now):
            return False
        if self._first is None:
            self._first = now.clone()
            return False
        first = self._first
        return first.shape == now.shape and first.device == now.device and not torch.equal(first.to(now.dtype), now)


def watch_for_calls(call: AllocatorCall) -> None:
    """From a new allocator on, see at its end (at the latest when the interpreter exits) whether it was ever called."""
    memory, allocator = call.memory, call.allocator
    if memory.watched or memory.called:
        return
    pattern = allocator.peft_config.rank_pattern or {}
    memory.seen.came_with = dict(pattern) or None
    candidates = [p for p in energies(call.parameters) if p.parameter.requires_grad]
    # To load a pruned adapter, PEFT makes new parameters of those that its pattern names: it may be trained on with the
    # ranks that it has. One with a pattern that is not loaded was given another training's config.
    named = dict(pattern_by_full_name(call.parameters, pattern, allocator.adapter_name))
    # Of the others the last one: who freezes layers freezes the first ones.
    candidates.reverse()
    watched = min(candidates, key=lambda p: (p.name not in named, all(named.get(p.name, ()))), default=None)
    # Torch before 2.1 has no such hooks.
    if watched is not None and hasattr(torch.Tensor, "register_post_accumulate_grad_hook"):
        memory.watched = True
        watch = Watch(memory, frozenset(id(p.parameter) for p in call.parameters))
        watch.cut_to = list(named.get(watched.name, ()))
        watched.parameter.register_post_accumulate_grad_hook(watch)  # type: ignore[no-untyped-call]
        judge_at_the_end(allocator, watch)
    say_what_has_ended()


def note_call(call: AllocatorCall) -> None:
    """Remember that the allocator was called, and say what is to be said of others."""
    call.memory.called = True
    call.memory.calls += 1
    for parameter in call.parameters if _orphans else ():
        # Another allocator, a copy perhaps, has come in the place of the one that is gone.
        _orphans.pop(id(parameter.parameter), None)
    if anything_has_ended():
        say_what_has_ended()
