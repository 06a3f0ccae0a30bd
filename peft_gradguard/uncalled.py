"""Trainings that never call ``update_and_allocate``: nothing fails there, and no rank is ever allocated."""

from __future__ import annotations

import weakref
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch.optim.optimizer import register_optimizer_step_pre_hook

from .hooks import times_switched_off
from .skips import memory_of

if TYPE_CHECKING:
    from peft import AdaLoraConfig
    from peft.tuners.adalora import RankAllocator
    from torch.utils.hooks import RemovableHandle

    from .skips import Memory
    from .view import ModelView


class Watch(NamedTuple):
    """An allocator that was not called yet. Keeps no model."""

    memory: Memory
    config: AdaLoraConfig
    energies: list[torch.nn.Parameter]
    """Each E."""
    first: list[torch.Tensor]
    """Their values before the first optimizer step: ``r`` numbers each. What was loaded before that is no training."""
    times_off: int


_waiting: dict[int, Watch] = {}
"""By the identity of the memory."""
_handles: list[RemovableHandle] = []


def watch_for_calls(allocator: RankAllocator, view: ModelView) -> None:
    """From a new allocator on, see at its end (at the latest when the interpreter exits) whether it was ever called."""
    memory = memory_of(allocator)
    if not memory.watched:
        memory.watched = True
        energies = [p.parameter for p in view.adalora_parameters if p.factor == "E" and not p.parameter.is_meta]
        _waiting[id(memory)] = watch = Watch(memory, allocator.peft_config, energies, [], times_switched_off())
        weakref.finalize(allocator, _at_the_end, watch)
        if not _handles:
            _handles.append(register_optimizer_step_pre_hook(_note_first_values))


def note_call(memory: Memory) -> None:
    """Remember that the allocator was called, and watch for it no more."""
    memory.called = True
    if _waiting.pop(id(memory), None) and not _waiting:
        # Not one by one: another thread may be here too.
        handles, _handles[:] = _handles[:], []
        for handle in handles:
            handle.remove()


def _note_first_values(*_: object) -> None:
    for watch in list(_waiting.values()):
        if not watch.first:
            watch.first.extend(energy.detach().cpu().clone() for energy in watch.energies)


def _at_the_end(watch: Watch) -> None:
    # The hook stays where it is, as this may be called amid torch's walk through all hooks (by a garbage collection).
    _waiting.pop(id(watch.memory), None)
    # While the guard is off it sees no calls. A pattern without a call comes with an adapter that was loaded.
    if watch.memory.called or times_switched_off() != watch.times_off or watch.config.rank_pattern:
        return
    # There are no first values where no optimizer has stepped.
    now = [energy.detach().cpu() for energy in watch.energies[: len(watch.first)]]
    if any(not torch.equal(value, first) for value, first in zip(now, watch.first, strict=True)):
        watch.memory.warn_once(
            "never called",
            "AdaLoRA's adapter %r was trained, but update_and_allocate was never called, so that all ranks stayed as "
            "they started. Call model.base_model.update_and_allocate(step) after backward and before zero_grad; in a "
            "Trainer, from on_optimizer_step.",
            watch.memory.adapter,
        )
