"""The errors that the guard raises, and words that messages share."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Sequence

PLACE = "after the optimizer's step and before zero_grad; in a Trainer, from on_optimizer_step"
"""Where a training loop calls ``update_and_allocate``, for every message that says so."""


def some_of(names: Sequence[str]) -> str:
    """Name one or two, and say how many more there are."""
    return " and ".join(names) if len(names) <= 2 else f"{names[0]} and {len(names) - 1} more"


def are(names: Sequence[str]) -> str:
    """Return the verb that follows them."""
    return "are" if names[1:] else "is"


class NoGradientError(RuntimeError, TypeError):
    """No AdaLoRA parameter of the adapter has a gradient, so that nothing can be scored.

    Raised out of ``RankAllocator.update_and_allocate`` (and so out of ``AdaLoraModel.update_and_allocate``) instead of
    PEFT's ``TypeError: unsupported operand type(s) for *: 'Parameter' and 'NoneType'``. The message says which case it
    is and what to change in the training loop. Nothing was scored, pruned or changed by the call that raised it. It is
    a ``TypeError`` too, so that a loop which goes on after PEFT's goes on as it did.
    """


class TrainingStackError(RuntimeError):
    """DeepSpeed or FSDP keeps the AdaLoRA parameters or their gradients where PEFT cannot use them.

    Raised out of the same calls as ``NoGradientError``, on every process alike, before PEFT fails on one of them while
    the others wait for it in a collective. The message names the way that works.
    """


class ScheduleError(ValueError, RuntimeError):
    """AdaLoRA's schedule or budget asks for more than can be pruned, or for nothing.

    Raised out of the same calls, from the ``RuntimeError`` (kthvalue: selected number k out of range) with which PEFT
    fails there; it is one itself, so that code which expects that one goes on as it did.
    """
