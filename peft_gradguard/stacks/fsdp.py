"""FSDP: the shards of FSDP2 are made whole for PEFT, and what FSDP1 leaves in flat pieces is named.

Every process takes the same way through these functions and enters the same collectives in the same order: what they
ask for (the shape, the class) is alike on all of them, and what differs (the size of a shard) is not asked for.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from ..errors import NoGradientError, TrainingStackError
from ..model.marks import is_flattened_by_fsdp

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch.distributed.tensor import DTensor

    from ..model.parameters import AdaLoraParameter


def gathered(parameter: AdaLoraParameter) -> AdaLoraParameter:
    """Gather a parameter that FSDP2 (``fully_shard``) or tensor parallelism has spread as a ``DTensor``.

    PEFT scores a ``DTensor`` well, but cannot mask one (``mask_to_budget`` calls ``tolist`` on it).
    """
    shard: DTensor = parameter.parameter  # type: ignore[assignment]
    with torch.no_grad():
        full = torch.nn.Parameter(shard.full_tensor().clone(), requires_grad=shard.requires_grad)
        # Where no process used it the gradient is None on all of them: FSDP2 itself reduces the rest together.
        if shard.grad is not None:
            full.grad = shard.grad.full_tensor()  # type: ignore[attr-defined]
    return parameter._replace(parameter=full, shard=shard)


def mask_shard(shard: DTensor, keep: list[bool]) -> None:
    """Zero the pruned rows of an E in the shards that it was gathered from."""
    # torch before 2.5 has it elsewhere, and no FSDP2.
    from torch.distributed.tensor import distribute_tensor

    pruned = ~torch.tensor(keep, device=shard.device).unsqueeze(1)
    with torch.no_grad():
        shard.masked_fill_(distribute_tensor(pruned, shard.device_mesh, shard.placements), 0.0)


def gradients_can_be_kept(parameters: Sequence[AdaLoraParameter]) -> bool:
    """Say whether gradients can be kept for later calls. FSDP frees them, or shows them only on request."""
    return not any(p.shard is not None or is_flattened_by_fsdp(p.parameter) for p in parameters)


def refuse_late_call(parameters: Sequence[AdaLoraParameter], at: str) -> None:
    """Raise where there is no gradient, and none can be kept for later calls."""
    if any(parameter.shard is not None for parameter in parameters):
        raise NoGradientError(
            f"None of the {len(parameters)} AdaLoRA parameters, sharded by FSDP2, has a gradient {at}: call "
            "update_and_allocate after the optimizer's step and before zero_grad (in a Trainer, from "
            "on_optimizer_step)."
        )
    if any(is_flattened_by_fsdp(parameter.parameter) for parameter in parameters):
        raise NoGradientError(
            f"None of the {len(parameters)} AdaLoRA parameters, sharded by FSDP, has a gradient {at}: call "
            "update_and_allocate inside FSDP.summon_full_params(model, with_grads=True), after the optimizer's step "
            "and before zero_grad (in a Trainer, from on_optimizer_step)."
        )


def require_whole_gradients(parameters: Sequence[AdaLoraParameter], at: str) -> None:
    """Raise where FSDP shows whole parameters but has left their gradients in flat pieces.

    A process that owns no piece sees no gradient at all, and ends in ``refuse_late_call``: so all of them stop here.
    """
    for parameter in parameters:
        gradient = parameter.parameter.grad
        if gradient is not None and gradient.dim() != parameter.parameter.dim():
            raise TrainingStackError(
                f"FSDP shows the AdaLoRA parameters whole but their gradients in pieces {at}: call update_and_allocate "
                "inside FSDP.summon_full_params(model, with_grads=True)."
            )


def refuse_flat_parameters(model: torch.nn.Module, at: str) -> None:
    """Raise where FSDP has put flat parameters in the place of the model's own, here or in a wrapper around it."""
    names = [name for name, _ in model.named_parameters()]
    if not names or any(name.endswith("_flat_param") for name in names):
        raise TrainingStackError(
            f"FSDP has replaced the AdaLoRA parameters by flat ones {at}: wrap with use_orig_params=True, and call "
            "update_and_allocate inside FSDP.summon_full_params(model, with_grads=True)."
        )


def in_pieces(parameter: AdaLoraParameter) -> TrainingStackError:
    """Return the error for a parameter of which only a flat piece is here."""
    return TrainingStackError(
        f"The AdaLoRA parameters are sharded ({parameter.name} has the shape {tuple(parameter.parameter.shape)} here): "
        "with FSDP (use_orig_params=True), call update_and_allocate inside "
        "FSDP.summon_full_params(model, with_grads=True)."
    )
