"""The AdaLoRA models in a model, or in what holds one."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from .walk import adalora_parameters

if TYPE_CHECKING:
    from collections.abc import Iterator

    from peft.tuners.adalora import AdaLoraModel

HOLDERS = ("module", "_orig_mod", "model", "base_model")
"""Where objects that are no modules themselves keep their model: trainers, engines, compiled functions."""


def tuners_in(holder: object, depth: int = 0) -> Iterator[AdaLoraModel]:
    """Yield the AdaLoRA models in a model, or in what holds one; the same one may come more than once."""
    # Not at the top: PEFT must not be loaded before somebody asks for its models.
    from peft.tuners.adalora import AdaLoraModel

    if isinstance(holder, torch.nn.Module):
        yield from (module for module in holder.modules() if isinstance(module, AdaLoraModel))
    elif depth < 5:
        for name in HOLDERS:
            inner = getattr(holder, name, None)
            if inner is not None:
                yield from tuners_in(inner, depth + 1)


def tuners_that_train(holder: object) -> list[AdaLoraModel]:
    """Return those whose allocator's adapter has anything to train: a frozen copy, as a teacher is, has not."""
    # Not hasattr: an AdaLoraModel hands what it has not got on to the model inside, which may be another one.
    return [t for t in dict.fromkeys(tuners_in(holder)) if "rankallocator" in vars(t) and _trains(t)]


def _trains(tuner: AdaLoraModel) -> bool:
    parameters = adalora_parameters(tuner.model, tuner.rankallocator.adapter_name)
    # Where FSDP has put flat parameters in the place of all, the first call tells what to do.
    return not parameters or any(parameter.parameter.requires_grad for parameter in parameters)
