"""Trainings that never call ``update_and_allocate``: nothing fails there, and no rank is ever allocated."""

from __future__ import annotations

import weakref
from typing import TYPE_CHECKING

import torch

from ..late.optimizers import before_steps, remove
from ..switch import times_switched_off

if TYPE_CHECKING:
    from peft import AdaLoraConfig

    from ..memory.memory import Memory
    from ..rules.call import AllocatorCall


def watch_for_calls(call: AllocatorCall) -> None:
    """From a new allocator on, see at its end (at the latest when the interpreter exits) whether it was ever called.

    Until it is, each E and its values before the first optimizer step are kept, ``r`` numbers each, and no model. Not
    the values of now: what is loaded into the adapter later is no training.
    """
    memory, allocator = call.memory, call.allocator
    if not memory.watched:
        memory.watched = True
        energies = [p.parameter for p in call.parameters if p.factor == "E" and not p.parameter.is_meta]
        first: list[torch.Tensor] = []

        def note_first_values(*_: object) -> None:
            if not first:
                first.extend(energy.detach().cpu().clone() for energy in energies)

        memory.until_called.append(before_steps(note_first_values))
        weakref.finalize(allocator, _at_the_end, memory, allocator.peft_config, energies, first, times_switched_off())


def note_call(memory: Memory) -> None:
    """Remember that the allocator was called, and watch for it no more."""
    memory.called = True
    if memory.until_called:
        remove(memory.until_called)


def _at_the_end(
    memory: Memory,
    config: AdaLoraConfig,
    energies: list[torch.nn.Parameter],
    first: list[torch.Tensor],
    times_off: int,
) -> None:
    remove(memory.until_called)
    # While the guard is off it sees no calls. A pattern without a call comes with an adapter that was loaded.
    if memory.called or times_switched_off() != times_off or config.rank_pattern:
        return
    # There are no first values where no optimizer has stepped.
    now = [energy.detach().cpu() for energy in energies[: len(first)]]
    if any(not torch.equal(value, before) for value, before in zip(now, first, strict=True)):
        memory.said.warn_once(
            "never called",
            "AdaLoRA's adapter %r was trained, but update_and_allocate was never called, so that all ranks stayed as "
            "they started. Call model.base_model.update_and_allocate(step) after backward and before zero_grad; in a "
            "Trainer, from on_optimizer_step.",
            memory.adapter,
        )
