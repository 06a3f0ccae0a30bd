"""The walk over a model's parameters: what ``named_parameters`` yields, in half its time.

PEFT's models nest deeply, and torch hands every name up through one generator for each level.
"""

from __future__ import annotations

from types import MethodType
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from collections.abc import Iterable

Module = torch.nn.Module
WALKERS = ("named_parameters", "_named_members", "named_modules")


def named_parameters(model: Module) -> Iterable[tuple[str, torch.nn.Parameter]]:
    """Return what ``model.named_parameters()`` yields, in its order, each parameter and module once.

    A model that walks in its own way (FSDP1 cleans the names so, and users patch this method) is asked itself.
    """
    if not all(_is_torchs_own(getattr(model, name, None)) for name in WALKERS):
        return model.named_parameters()
    found: list[tuple[str, torch.nn.Parameter]] = []
    modules: set[Module] = set()
    parameters: set[int] = set()
    ahead = [("", model)]
    while ahead:
        prefix, module = ahead.pop()
        if module in modules:
            continue
        modules.add(module)
        for name, parameter in module._parameters.items():
            if parameter is not None and id(parameter) not in parameters:
                parameters.add(id(parameter))
                found.append((prefix + name, parameter))
        if module._modules:
            for name, child in reversed(module._modules.items()):
                if child is not None:
                    ahead.append((f"{prefix}{name}.", child))
    kinds: set[type[Module]] = set(map(type, modules))
    return found if all(kind.named_modules is Module.named_modules for kind in kinds) else model.named_parameters()


def _is_torchs_own(method: object) -> bool:
    """Say whether this bound method is the one that torch wrote: not overridden, not patched, not wrapped."""
    return type(method) is MethodType and method.__func__.__globals__ is vars(torch.nn.modules.module)
