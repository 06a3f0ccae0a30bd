"""Rule 20: an allocator's state, saved beside a training's checkpoint and put back. Importing this loads no torch."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Mapping

    import torch


class AllocatorState:
    """What a checkpoint lacks for AdaLoRA to go on as if the training had never been stopped.

    Scores, counts, budget, rank pattern and step of the model's allocators, and A, B and E with all their ranks, as a
    saved adapter has only those that its pattern keeps. For ``accelerate.register_for_checkpointing``,
    ``torch.distributed.checkpoint``, Lightning, and ``torch.save`` in a loop of one's own. ``AdaLoraCallback`` does it
    by itself.

    ``model``: a ``PeftModel`` with an AdaLoRA adapter that trains, or what holds one (DDP, ``torch.compile``,
    accelerate, a ``Trainer``); it is held on to, as by an optimizer. ``ValueError`` where there is none.
    """

    def __init__(self, model: object) -> None:
        # torch must not be loaded before it is needed.
        from ..model.tuners import tuners_that_train

        self._tuners = tuners_that_train(model)
        if not self._tuners:
            raise ValueError(
                f"AllocatorState found no trainable AdaLoRA adapter in a {type(model).__name__}: give it what "
                "get_peft_model returned for an AdaLoraConfig, or what wraps it."
            )

    def state_dict(self) -> dict[str, torch.Tensor]:
        """Return copies, on the CPU: a flat dict of tensors, with the same names and shapes at each step.

        ``ValueError`` where FSDP1 has only flat pieces of the parameters: its scores can be saved inside of
        ``FSDP.summon_full_params(model)``.
        """
        from .snapshot import take

        return take(self._tuners)

    def load_state_dict(self, state_dict: Mapping[str, torch.Tensor]) -> None:
        """Put a state back, weights included: last, after the checkpoint's own weights.

        ``ValueError`` that names the difference where it is the state of another model, adapter, schedule or format:
        then nothing is changed.
        """
        from .snapshot import put_back

        put_back(self._tuners, state_dict)
