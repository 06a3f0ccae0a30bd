"""Trainings that never call ``update_and_allocate``: nothing fails there, and no rank is ever allocated."""

from __future__ import annotations

import weakref
from typing import TYPE_CHECKING

from .skips import memory_of

if TYPE_CHECKING:
    import torch
    from peft.tuners.adalora import RankAllocator

    from .skips import Memory
    from .view import ModelView

# An optimizer changes a parameter in place, which counts its version up. Loading, initialising and moving take a few.
TRAINED_VERSIONS = 10


def watch_for_calls(allocator: RankAllocator, view: ModelView) -> None:
    """From a new allocator on, see at its end (at the latest when the interpreter exits) whether it was ever called.

    Keeps each E, ``r`` numbers, and no model.
    """
    memory = memory_of(allocator)
    if not memory.watched:
        memory.watched = True
        energies = [(p.parameter, p.parameter._version) for p in view.adalora_parameters if p.factor == "E"]
        weakref.finalize(allocator, _name_missing_calls, memory, energies)


def _name_missing_calls(memory: Memory, energies: list[tuple[torch.nn.Parameter, int]]) -> None:
    trained = any(energy._version - version >= TRAINED_VERSIONS for energy, version in energies)
    if trained and not memory.called:
        memory.warn_once(
            "never called",
            "AdaLoRA's adapter %r was trained, but update_and_allocate was never called, so that all ranks stayed as "
            "they started. Call model.base_model.update_and_allocate(step) after backward and before zero_grad; in a "
            "Trainer, from on_optimizer_step.",
            memory.adapter,
        )
