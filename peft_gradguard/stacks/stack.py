"""The front of this room: what an allocator call asks of the training stack, whichever it is."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from ..model.marks import deepspeed_holds_gradient, is_dtensor, is_of_zero3
from . import deepspeed, fsdp

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from peft.tuners.adalora import RankAllocator

    from ..model.parameters import AdaLoraParameter
    from ..model.pattern import RankPattern
    from ..model.view import ModelView


def whole(parameters: Iterable[AdaLoraParameter]) -> list[AdaLoraParameter]:
    """Return the parameters with those of FSDP2 gathered, gradient included; raise where others are not whole."""
    parameters = list(parameters)
    for parameter in parameters:
        # A, B and E are matrices in every layer type; ZeRO 3 and FSDP1 leave flat pieces, on some processes empty ones.
        # What a parametrization keeps in the place of one may have any shape.
        if parameter.parameter.dim() != 2 and not parameter.parametrized:
            raise (deepspeed if is_of_zero3(parameter.parameter) else fsdp).in_pieces(parameter)
    return [fsdp.gathered(parameter) if is_dtensor(parameter.parameter) else parameter for parameter in parameters]


def require_gradients(allocator: RankAllocator, view: ModelView, at: str) -> None:
    """Raise, on every process alike, where the stack has the gradients and PEFT will not get them."""
    deepspeed.require_gradients(allocator, view, at)
    fsdp.require_whole_gradients(view.adalora_parameters, at)


def keep_masks(parameters: Sequence[AdaLoraParameter], pattern: RankPattern) -> None:
    """Write what PEFT has just masked to where the optimizer takes its weights from, if that is not the parameter."""
    for parameter in parameters:
        if parameter.factor == "E" and parameter.name in pattern:
            if parameter.shard is not None:
                fsdp.mask_shard(parameter.shard, pattern[parameter.name])
            elif deepspeed_holds_gradient(parameter.parameter):
                deepspeed.mask_master_copy(parameter.parameter, torch.tensor(pattern[parameter.name], device="cpu"))
