"""The walk over a model's parameters: what ``named_parameters`` yields, in half its time, and what of it is AdaLoRA's.

PEFT's models nest deeply, and torch hands every name up through one generator for each level.
"""

from __future__ import annotations

from types import MethodType
from typing import TYPE_CHECKING

import torch

from .parameters import AdaLoraParameter

if TYPE_CHECKING:
    from collections.abc import Iterable

Module = torch.nn.Module
WALKERS = ("named_parameters", "_named_members", "named_modules")


def named_parameters(model: Module) -> Iterable[tuple[str, torch.nn.Parameter]]:
    """Return what ``model.named_parameters()`` yields: in its order, each parameter once, under its first name.

    A model that walks in its own way (FSDP1 cleans the names so, and users patch this method) is asked itself.
    """
    walk = _Walk(model)
    if all(_is_torchs_own(getattr(model, name, None)) for name in WALKERS):
        walk.own(model, "")
        walk.below(model, "")
        if all(kind.named_modules is Module.named_modules for kind in walk.kinds):
            return walk.found
    return model.named_parameters()


def adalora_parameters(model: torch.nn.Module, adapter: str) -> list[AdaLoraParameter]:
    """Return the AdaLoRA parameters of ``adapter``, in the model's own order, by one walk over the model.

    The adapter's name is matched exactly. PEFT's own test (``adapter_name in name``) takes the parameters of an adapter
    ``default_eval`` for those of ``default``. What ``torch.nn.utils.parametrize`` keeps in the place of one is there
    too, as PEFT scores it.
    """
    suffixes = tuple(f".lora_{factor}.{adapter}" for factor in "ABE")
    width = len(suffixes[0])
    parametrized = f".parametrizations.{adapter}.original"
    found: list[AdaLoraParameter] = []
    for name, parameter in named_parameters(model):
        if name.endswith(suffixes):
            found.append(AdaLoraParameter(name, parameter, name[:-width], name[6 - width]))  # type: ignore[arg-type]
        elif parametrized in name:
            module, _, factor = name.rpartition(parametrized)[0].rpartition(".lora_")
            if factor in ("A", "B", "E"):
                one = AdaLoraParameter(name, parameter, module, factor, parametrized=True)  # type: ignore[arg-type]
                found.append(one)
    return found


class _Walk:
    def __init__(self, model: Module) -> None:
        self.found: list[tuple[str, torch.nn.Parameter]] = []
        self.kinds: set[type[Module]] = set()
        self._parameters: set[int] = set()
        self._modules = {model}

    def own(self, module: Module, prefix: str) -> None:
        for name, parameter in module._parameters.items():
            if parameter is not None and id(parameter) not in self._parameters:
                self._parameters.add(id(parameter))
                self.found.append((prefix + name, parameter))

    def below(self, module: Module, prefix: str) -> None:
        # Most modules are leaves, and many without a parameter (dropouts): what they do not need is left out.
        for name, child in module._modules.items():
            if child is not None:
                self.kinds.add(type(child))
                if child._parameters:
                    self.own(child, f"{prefix}{name}.")
                if child._modules and child not in self._modules:
                    self._modules.add(child)
                    self.below(child, f"{prefix}{name}.")


def _is_torchs_own(method: object) -> bool:
    """Say whether this bound method is the one that torch wrote: not overridden, not patched, not wrapped."""
    return type(method) is MethodType and method.__func__.__globals__ is vars(torch.nn.modules.module)
