"""DeepSpeed's ZeRO, as of DeepSpeed 0.19: whether it still holds this step's gradients, and its master copy of E.

Only marks that DeepSpeed leaves on the parameters are read, never ``safe_get_full_grad``: that is a collective, and
once the gradients are gone it raises on the processes that own a piece and leaves the others waiting.
"""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Any

import torch

from ..errors import NoGradientError, TrainingStackError
from ..model.marks import deepspeed_holds_gradient, is_of_zero3

if TYPE_CHECKING:
    from peft.tuners.adalora import RankAllocator

    from ..model.parameters import AdaLoraParameter
    from ..model.view import ModelView


def require_gradients(allocator: RankAllocator, view: ModelView, at: str) -> None:
    """Raise, on every process alike, where DeepSpeed owns the gradients and PEFT will not get them."""
    owned = [
        parameter.parameter
        for parameter in view.adalora_parameters
        if parameter.parameter.requires_grad and deepspeed_holds_gradient(parameter.parameter)
    ]
    if not owned:
        return
    if not _holds_gradients(_gradients_of(owned, view)):
        raise NoGradientError(
            f"DeepSpeed holds no gradient {at}: call update_and_allocate after the engine.backward of the last "
            "micro-batch and before engine.step, which frees the gradients; accelerate's (and so Trainer's) backward "
            "calls engine.step by itself, so there every later call comes too late."
        )
    if not peft_asks_deepspeed(allocator):
        raise TrainingStackError(
            f"DeepSpeed owns the gradients, but PEFT looks for them in p.grad {at}, because no HfDeepSpeedConfig is "
            "alive: make one of the engine's configuration (transformers.integrations.HfDeepSpeedConfig(config)) and "
            "keep it in a variable for as long as you train."
        )


def in_pieces(parameter: AdaLoraParameter) -> TrainingStackError:
    """Return the error for a parameter that ZeRO 3 has partitioned."""
    return TrainingStackError(
        f"DeepSpeed's ZeRO 3 has partitioned the AdaLoRA parameters ({parameter.name} has the shape "
        f"{tuple(parameter.parameter.shape)} here): call update_and_allocate, between engine.backward and engine.step, "
        "inside deepspeed.zero.GatheredParameters([p for n, p in model.named_parameters() if 'lora_' in n], "
        "modifier_rank=0)."
    )


def mask_master_copy(parameter: torch.nn.Parameter, keep: torch.Tensor) -> None:
    """Zero the pruned rows of E in DeepSpeed's fp32 master copy, from which ``engine.step`` writes the parameter anew.

    Each process zeroes the rows that it owns; there is no collective. The rows kept stay as precise as they were, which
    ``safe_set_full_fp32_param`` with the (perhaps half precision) parameter would not do; under ZeRO 3 that function
    also fails where the ranks do not divide evenly among the processes.
    """
    if is_of_zero3(parameter):
        _mask_zero3(parameter, keep)
        return
    mapping: Any = parameter._hp_mapping  # type: ignore[attr-defined]
    if mapping is not None:
        address = mapping.lp_fragment_address
        _mask_fragment(mapping.hp_fragment, keep[address.start : address.start + address.numel])


def _mask_zero3(parameter: Any, keep: torch.Tensor) -> None:
    # DeepSpeed may be missing.
    from deepspeed.utils import (  # type: ignore[import-not-found, import-untyped, unused-ignore]
        safe_get_local_fp32_param,
        safe_set_local_fp32_param,
    )

    fragment = safe_get_local_fp32_param(parameter)
    # ZeRO 3 keeps no master copy of what is frozen.
    if fragment is not None:
        start = fragment.numel() * torch.distributed.get_rank(parameter.ds_process_group)
        # The last pieces are padded, so that this may be shorter than the fragment, or empty.
        owned = keep[start : start + fragment.numel()]
        _mask_fragment(fragment[: owned.numel()], owned)
        safe_set_local_fp32_param(parameter, fragment)


def _mask_fragment(fragment: torch.Tensor, keep: torch.Tensor) -> None:
    with torch.no_grad():
        fragment.masked_fill_(~keep.to(fragment.device), 0.0)


def _gradients_of(owned: list[torch.nn.Parameter], view: ModelView) -> dict[int, Any] | None:
    """Return DeepSpeed's gradients by parameter group, or None where nothing leads to them.

    ZeRO 1 and 2 name them only on those parameters of which this process owns a piece: perhaps on none of the
    adapter's. With the optimizer offloaded they are kept elsewhere, and stay there after the step.
    """
    for parameters in (owned, view.parameters()):
        for parameter in parameters:
            mapping = getattr(parameter, "_hp_mapping", None)
            if mapping is not None:
                return None if mapping.use_offload else mapping.gradient_dict
            optimizer = getattr(parameter, "_z3_optimizer", None)
            if optimizer is not None:
                return None if optimizer.offload_optimizer else optimizer.averaged_gradients
    return None


def _holds_gradients(gradients: dict[int, Any] | None) -> bool:
    """Say whether this is between ``engine.backward`` and ``engine.step``; True where it cannot be told.

    The backward of the last micro-batch fills the groups (under ZeRO 3 every backward does), and the step empties all
    of them, on all processes alike.
    """
    return gradients is None or any(group is not None for group in gradients.values())


def peft_asks_deepspeed(allocator: RankAllocator) -> bool:
    """Ask what PEFT's ``update_ipt`` asks; releases that know nothing of DeepSpeed have no such function."""
    for kind in type(allocator).__mro__:
        deepspeed_config = getattr(sys.modules.get(kind.__module__), "deepspeed_config", None)
        if deepspeed_config is not None:
            return deepspeed_config() is not None
    return False
