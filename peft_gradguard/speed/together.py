"""The arithmetic of PEFT's ``update_ipt``, for hundreds of parameters together instead of one after the other.

PEFT starts a dozen small tensor operations for each parameter. ``torch._foreach_*`` starts each of them for a list.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from collections.abc import Iterator

    from ..model.parameters import AdaLoraParameter

    Scores = dict[str, torch.Tensor]

CHUNK = 1 << 18
"""The numbers that are computed together: a megabyte of float32, so that what is at work stays in the cache."""


def new_scores(
    parameters: list[AdaLoraParameter], averages: Scores, uncertainties: Scores, betas: tuple[float, float]
) -> Iterator[tuple[str, torch.Tensor, torch.Tensor, torch.Tensor]]:
    """Yield each name with its new ``ipt``, ``exp_avg_ipt`` and ``exp_avg_unc`` (AdaLoRA paper, equations 8 to 10).

    All tensors are of one device and data type. Each product and each sum is made by itself, as PEFT does: a fused
    multiply-add (``alpha=``, ``addcmul``, ``lerp``) rounds otherwise. In-place only where nobody else has the tensor.
    """
    beta1, rest1, beta2, rest2 = _factors(betas, parameters[0].parameter)
    for chunk in _chunks(parameters):
        names = [parameter.name for parameter in chunk]
        gradients = [parameter.parameter.grad for parameter in chunk]
        with torch.no_grad():
            ipt = torch._foreach_mul([parameter.parameter for parameter in chunk], gradients)  # type: ignore[arg-type]
            torch._foreach_abs_(ipt)
            average = torch._foreach_mul([averages[name] for name in names], beta1)
            torch._foreach_add_(average, torch._foreach_mul(ipt, rest1))
            distance = torch._foreach_sub(ipt, average)
            torch._foreach_abs_(distance)
            torch._foreach_mul_(distance, rest2)
            uncertainty = torch._foreach_mul([uncertainties[name] for name in names], beta2)
            torch._foreach_add_(uncertainty, distance)
        yield from zip(names, ipt, average, uncertainty, strict=True)


def _factors(betas: tuple[float, float], like: torch.Tensor) -> list[Any]:
    """Return the four factors; on the CPU as tensors: torch multiplies a list by one of its type in half the time.

    Half precision is multiplied in single precision, by the factor as it is there. A GPU does so with numbers too, and
    would have to wait for tensors.
    """
    beta1, beta2 = betas
    factors = [beta1, 1 - beta1, beta2, 1 - beta2]
    if like.device.type != "cpu":
        return factors
    wide = torch.promote_types(like.dtype, torch.float32)
    return [torch.tensor(factor, dtype=wide, device="cpu") for factor in factors]  # whatever the default device


def _chunks(parameters: list[AdaLoraParameter]) -> Iterator[list[AdaLoraParameter]]:
    """Cut into runs of at most ``CHUNK`` numbers, or of one parameter."""
    chunk: list[AdaLoraParameter] = []
    size = 0
    for parameter in parameters:
        size += parameter.parameter.numel()
        if chunk and size > CHUNK:
            yield chunk
            chunk, size = [], parameter.parameter.numel()
        chunk.append(parameter)
    yield chunk
