"""Trainings that never call ``update_and_allocate``: nothing fails there, and no rank is ever allocated."""

from __future__ import annotations

import weakref
from typing import TYPE_CHECKING

import torch

from .skips import memory_of

if TYPE_CHECKING:
    from peft import AdaLoraConfig
    from peft.tuners.adalora import RankAllocator

    from .skips import Memory
    from .view import ModelView


def watch_for_calls(allocator: RankAllocator, view: ModelView) -> None:
    """From a new allocator on, see at its end (at the latest when the interpreter exits) whether it was ever called.

    Keeps each E and its first values, ``r`` numbers each, and no model.
    """
    memory = memory_of(allocator)
    if not memory.watched:
        memory.watched = True
        energies = [p.parameter for p in view.adalora_parameters if p.factor == "E" and not p.parameter.is_meta]
        first = [energy.detach().cpu().clone() for energy in energies]
        weakref.finalize(allocator, _name_missing_calls, memory, allocator.peft_config, energies, first)


def _name_missing_calls(
    memory: Memory, config: AdaLoraConfig, energies: list[torch.nn.Parameter], first: list[torch.Tensor]
) -> None:
    # A pattern without a call comes with an adapter that was loaded.
    if memory.called or config.rank_pattern:
        return
    if any(not torch.equal(energy.detach().cpu(), value) for energy, value in zip(energies, first, strict=True)):
        memory.warn_once(
            "never called",
            "AdaLoRA's adapter %r was trained, but update_and_allocate was never called, so that all ranks stayed as "
            "they started. Call model.base_model.update_and_allocate(step) after backward and before zero_grad; in a "
            "Trainer, from on_optimizer_step.",
            memory.adapter,
        )
