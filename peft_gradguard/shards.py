"""Parameters of which each process holds only a part: made whole for PEFT, or named where that cannot be.

Every process takes the same way through these functions and enters the same collectives in the same order: what they
ask for (the shape, the class) is alike on all of them, and what differs (the size of a shard) is not asked for.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from .errors import NoGradientError, TrainingStackError
from .parameters import deepspeed_holds_gradient
from .zero import mask_master_copy

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from torch.distributed.tensor import DTensor

    from .parameters import AdaLoraParameter
    from .view import ModelView


def whole(parameters: Iterable[AdaLoraParameter]) -> list[AdaLoraParameter]:
    """Return the parameters with those of FSDP2 gathered, gradient included; raise where others are not whole."""
    parameters = list(parameters)
    for parameter in parameters:
        # A, B and E are matrices in every layer type; ZeRO 3 and FSDP1 leave flat pieces, on some processes empty ones.
        if parameter.parameter.dim() != 2:
            raise TrainingStackError(_in_pieces(parameter))
    return [_gathered(parameter) if _is_dtensor(parameter.parameter) else parameter for parameter in parameters]


def keep_masks(view: ModelView, pattern: dict[str, list[bool]]) -> None:
    """Write what PEFT has just masked to where the optimizer takes its weights from, if that is not the parameter."""
    for parameter in view.adalora_parameters:
        if parameter.factor == "E" and parameter.name in pattern:
            if parameter.shard is not None:
                _mask_shard(parameter.shard, pattern[parameter.name])
            elif deepspeed_holds_gradient(parameter.parameter):
                mask_master_copy(parameter.parameter, torch.tensor(pattern[parameter.name]))


def gradients_can_be_kept(parameters: Sequence[AdaLoraParameter]) -> bool:
    """Say whether gradients can be kept for later calls. FSDP frees them, or shows them only on request."""
    return not any(p.shard is not None or hasattr(p.parameter, "_fsdp_flattened") for p in parameters)


def refuse_late_call(parameters: Sequence[AdaLoraParameter], at: str) -> None:
    """Raise where there is no gradient, and none can be kept for later calls."""
    if any(parameter.shard is not None for parameter in parameters):
        raise NoGradientError(
            f"None of the {len(parameters)} AdaLoRA parameters, sharded by FSDP2, has a gradient {at}: call "
            "update_and_allocate after backward and before zero_grad (in a Trainer, from on_optimizer_step)."
        )
    if any(hasattr(parameter.parameter, "_fsdp_flattened") for parameter in parameters):
        raise NoGradientError(
            f"None of the {len(parameters)} AdaLoRA parameters, sharded by FSDP, has a gradient {at}: call "
            "update_and_allocate inside FSDP.summon_full_params(model, with_grads=True), after backward and before "
            "zero_grad (in a Trainer, from on_optimizer_step)."
        )


def require_whole_gradients(parameters: Sequence[AdaLoraParameter], at: str) -> None:
    """Raise where FSDP shows whole parameters but has left their gradients in flat pieces.

    A process that owns no piece sees no gradient at all, and ends in ``refuse_late_call``: so all of them stop here.
    """
    for parameter in parameters:
        gradient = parameter.parameter.grad
        if gradient is not None and gradient.dim() != 2:
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


def _in_pieces(parameter: AdaLoraParameter) -> str:
    shape = tuple(parameter.parameter.shape)
    if hasattr(parameter.parameter, "ds_id"):
        return (
            f"DeepSpeed's ZeRO 3 has partitioned the AdaLoRA parameters ({parameter.name} has the shape {shape} here): "
            "call update_and_allocate, between engine.backward and engine.step, inside "
            "deepspeed.zero.GatheredParameters([p for n, p in model.named_parameters() if 'lora_' in n], "
            "modifier_rank=0)."
        )
    return (
        f"The AdaLoRA parameters are sharded ({parameter.name} has the shape {shape} here): with FSDP "
        "(use_orig_params=True), call update_and_allocate inside FSDP.summon_full_params(model, with_grads=True)."
    )


def _is_dtensor(parameter: torch.Tensor) -> bool:
    return hasattr(parameter, "full_tensor")


def _gathered(parameter: AdaLoraParameter) -> AdaLoraParameter:
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


def _mask_shard(shard: DTensor, keep: list[bool]) -> None:
    from torch.distributed.tensor import distribute_tensor

    pruned = ~torch.tensor(keep, device=shard.device).unsqueeze(1)
    with torch.no_grad():
        shard.masked_fill_(distribute_tensor(pruned, shard.device_mesh, shard.placements), 0.0)
