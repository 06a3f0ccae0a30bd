"""The model as PEFT's method shall see it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import wrapt

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    import torch

    from .parameters import AdaLoraParameter


class ModelView(wrapt.ObjectProxy):  # type: ignore[misc, type-arg, unused-ignore]
    """A model whose ``named_parameters()`` yields only the AdaLoRA parameters that are shown, in the model's order.

    ``parameters`` are walked once, before the view is made; PEFT may then walk the view as often as it likes.
    Everything else is the model's own. A view lives no longer than the allocator call that it was made for.
    """

    def __init__(self, model: torch.nn.Module, parameters: list[AdaLoraParameter]) -> None:
        super().__init__(model)
        self._self_parameters = parameters
        self._self_shown = parameters

    @property
    def adalora_parameters(self) -> list[AdaLoraParameter]:
        """Every AdaLoRA parameter of the adapter, shown or not."""
        parameters: list[AdaLoraParameter] = self._self_parameters
        return parameters

    @property
    def shown(self) -> list[AdaLoraParameter]:
        """The AdaLoRA parameters that ``named_parameters()`` yields."""
        parameters: list[AdaLoraParameter] = self._self_shown
        return parameters

    def show(self, parameters: Iterable[AdaLoraParameter]) -> None:
        """Let ``named_parameters()`` yield these from now on."""
        names = {parameter.name for parameter in parameters}
        self._self_shown = [parameter for parameter in self._self_parameters if parameter.name in names]

    def named_parameters(self, prefix: str = "", *_: Any, **__: Any) -> Iterator[tuple[str, torch.nn.Parameter]]:
        """Yield ``(name, parameter)`` as ``torch.nn.Module.named_parameters`` does, for the parameters shown."""
        dotted = f"{prefix}." if prefix else ""
        return ((dotted + parameter.name, parameter.parameter) for parameter in self._self_shown)
