"""Trainings that never call ``update_and_allocate``: nothing fails there, and no rank is ever allocated.

One E of each allocator is watched while it gets gradients, until the first call. Its values change between two of them
just where an optimizer trains it: a target, an average or a reference model is not taken for a training.
"""

from __future__ import annotations

import atexit
import os
import weakref
from collections import deque
from typing import TYPE_CHECKING

import torch

from ..log import harmless
from ..switch import times_switched_off

if TYPE_CHECKING:
    from ..memory.memory import Memory
    from ..rules.call import AllocatorCall

_watches: dict[int, Watch] = {}
_ended: deque[Watch] = deque()
"""Those whose allocator has gone. Nothing is said from inside a garbage collection, which comes in the middle of
anything: the next call, gradient or exit says it."""


class Watch:
    """Whether the adapter of one allocator is trained. Keeps no model alive: ``r`` numbers, and the guard's memory.

    It holds its E until its allocator goes: ``torch.utils.swap_tensors``, which ``Module.to`` may use, refuses tensors
    that are known weakly.
    """

    # So torch.multiprocessing sends the parameter without a warning: the hook is not for the other process.
    __torch_unserializable__ = True

    def __init__(self, memory: Memory, energy: torch.nn.Parameter, loaded: bool) -> None:
        self.trained = False
        """Whether its values were seen to change between two gradients."""
        self._memory = memory
        self._loaded = loaded
        self._process = os.getpid()
        self._times_off = times_switched_off()
        self._energy: torch.nn.Parameter | None = energy
        self._first: torch.Tensor | None = None

    def __call__(self, gradient: torch.Tensor) -> None:
        """See a gradient come (the hook on E)."""
        # Whatever goes wrong here would make somebody's backward fail.
        with harmless("see whether an adapter is trained"):
            energy = self._energy
            if energy is not None and not torch.is_inference_mode_enabled():
                if self.trained or self._memory.called or self._loaded:
                    self.release()
                else:
                    self.trained = self._has_changed(energy)
            if _ended:
                say_what_has_ended()

    def release(self) -> None:
        """Look no more."""
        self._energy = self._first = None

    def judge(self) -> None:
        """Warn where the adapter was trained and the allocator never called."""
        # While the guard is off it sees no calls, and in a process forked off meanwhile it sees another training.
        if self.trained and not self._memory.called and self._watched_all_along():
            self._memory.said.warn_once(
                "never called",
                "AdaLoRA's adapter %r was trained, but update_and_allocate was never called, so that all ranks stayed "
                "as they started. Call model.base_model.update_and_allocate(step) after the optimizer's step and "
                "before zero_grad; in a Trainer, from on_optimizer_step.",
                self._memory.adapter,
            )

    def _watched_all_along(self) -> bool:
        return self._times_off == times_switched_off() and self._process == os.getpid()

    def _has_changed(self, energy: torch.nn.Parameter) -> bool:
        # Only plain tensors are looked at: to compare shards would be a collective, and to read a value while a CUDA
        # graph is recorded would break it.
        now = energy.detach()
        if type(now) is not torch.Tensor or now.is_meta or (now.is_cuda and torch.cuda.is_current_stream_capturing()):
            return False
        if self._first is None:
            self._first = now.clone()
            return False
        first = self._first
        return first.shape == now.shape and first.device == now.device and not torch.equal(first.to(now.dtype), now)


def watch_for_calls(call: AllocatorCall) -> None:
    """From a new allocator on, see at its end (at the latest when the interpreter exits) whether it was ever called."""
    memory, allocator = call.memory, call.allocator
    energies = [p.parameter for p in call.parameters if p.factor == "E" and p.parameter.requires_grad]
    if memory.watched or not energies:
        return
    # The last one: who freezes layers freezes the first ones.
    energy = energies[-1]
    memory.watched = True
    # An adapter with a pattern but without a call was loaded, and may be trained on with the ranks that it has.
    watch = Watch(memory, energy, loaded=bool(allocator.peft_config.rank_pattern))
    energy.register_hook(watch)  # type: ignore[no-untyped-call]
    _watches[id(allocator)] = watch
    weakref.finalize(allocator, _end, id(allocator), watch).atexit = False
    say_what_has_ended()


def note_call(call: AllocatorCall) -> None:
    """Remember that the allocator was called, and say what is to be said of others."""
    call.memory.called = True
    if _ended:
        say_what_has_ended()


def say_what_has_ended() -> None:
    """Judge the trainings whose allocator has gone."""
    while _ended:
        try:
            watch = _ended.popleft()
        except IndexError:
            # Another thread was quicker.
            return
        watch.judge()


def _end(allocator_id: int, watch: Watch) -> None:
    _watches.pop(allocator_id, None)
    watch.release()
    if watch.trained:
        _ended.append(watch)


def _at_exit() -> None:
    say_what_has_ended()
    for watch in list(_watches.values()):
        watch.judge()


atexit.register(_at_exit)
