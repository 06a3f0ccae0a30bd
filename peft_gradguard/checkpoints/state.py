"""Rule 20: an allocator's state, saved beside a training's checkpoint and put back. Importing this loads no torch."""

from __future__ import annotations

import weakref
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Mapping

    import torch
    from peft.tuners.adalora import AdaLoraModel


class AllocatorState:
    """What a checkpoint lacks for AdaLoRA to go on as if the training had never been stopped.

    Scores, counts, budget, rank pattern and step of the model's allocators, and A, B and E with all their ranks, as a
    saved adapter has only those that its pattern keeps. For ``accelerate.register_for_checkpointing``,
    ``torch.distributed.checkpoint``, Lightning, and ``torch.save`` in a loop of one's own. ``AdaLoraCallback`` does it
    by itself.

    ``model``: a ``PeftModel`` with an AdaLoRA adapter that trains, or what holds one (DDP, ``torch.compile``,
    accelerate, a ``Trainer``). ``ValueError`` where there is none. The model is not kept alive.
    """

    def __init__(self, model: object) -> None:
        # torch must not be loaded before it is needed.
        from ..model.tuners import tuners_that_train

        tuners = tuners_that_train(model)
        if not tuners:
            raise ValueError(
                f"AllocatorState found no trainable AdaLoRA adapter in a {type(model).__name__}: give it what "
                "get_peft_model returned for an AdaLoraConfig, or what wraps it."
            )
        self._tuners = [weakref.ref(tuner) for tuner in tuners]

    def state_dict(self) -> dict[str, torch.Tensor]:
        """Return copies, on the CPU: a flat dict of tensors, with the same names and shapes at each step.

        ``ValueError`` where FSDP1 has only flat pieces of the parameters: its scores can be saved inside of
        ``FSDP.summon_full_params(model)``.
        """
        from .snapshot import take

        return take(self._living())

    def load_state_dict(self, state_dict: Mapping[str, torch.Tensor]) -> None:
        """Put a state back, weights included. After it, or before, the checkpoint's own weights may be loaded too.

        ``ValueError`` that names the difference where it is the state of another model, adapter, schedule or format:
        then nothing is changed.
        """
        from .snapshot import put_back

        put_back(self._living(), state_dict)

    def _living(self) -> list[AdaLoraModel]:
        tuners = [tuner for reference in self._tuners if (tuner := reference()) is not None]
        if len(tuners) < len(self._tuners):
            raise ValueError("The model of this AllocatorState is gone: make a new one, for the model that trains.")
        return tuners
