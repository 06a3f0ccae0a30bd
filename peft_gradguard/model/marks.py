"""The marks that training stacks leave on tensors: where parameters and gradients are. Tested for here only."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch


def deepspeed_holds_gradient(parameter: torch.Tensor) -> bool:
    """Say whether DeepSpeed owns the gradient of this trainable parameter, so that ``p.grad`` is always None.

    ZeRO 1 and 2 mark such a parameter with ``_hp_mapping`` (which may itself be None on a rank, hence the test for its
    presence), ZeRO 3 with ``ds_id``. ``safe_get_full_grad`` would tell too, but it is a collective.
    """
    return hasattr(parameter, "_hp_mapping") or is_of_zero3(parameter)


def is_of_zero3(parameter: torch.Tensor) -> bool:
    """Say whether DeepSpeed's ZeRO 3 has the parameter: in pieces, but inside of ``GatheredParameters``."""
    return hasattr(parameter, "ds_id")


def is_dtensor(tensor: torch.Tensor) -> bool:
    """Say whether this is a ``DTensor``, as FSDP2 (``fully_shard``) and tensor parallelism make of parameters."""
    return hasattr(tensor, "full_tensor")


def is_flattened_by_fsdp(parameter: torch.Tensor) -> bool:
    """Say whether FSDP1 keeps this parameter in a flat one (``use_orig_params=True``)."""
    return hasattr(parameter, "_fsdp_flattened")


def whole_shape(parameter: torch.Tensor) -> tuple[int, ...]:
    """Return the whole shape, or () where only a flat piece is here. ZeRO 3 notes the whole one beside its piece."""
    shape = getattr(parameter, "ds_shape", parameter.shape)
    return tuple(shape) if len(shape) == 2 else ()
