"""The model as PEFT's method shall see it."""

from __future__ import annotations

import copy
import operator
from typing import TYPE_CHECKING, Any

import wrapt

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    import torch

    from .parameters import AdaLoraParameter


class ModelView(wrapt.ObjectProxy):  # type: ignore[misc, type-arg, unused-ignore]
    """A model whose ``named_parameters()`` leaves out the AdaLoRA parameters that are not shown.

    ``parameters`` are walked once, before the view is made. PEFT's own code looks at nothing else, so that it is shown
    only these, as often as it likes. Where somebody else's code may look, ``adapter`` is given: then the model's other
    parameters are there too, in the model's order.

    Everything else is the model's own. The view is called, copied and pickled as the model, and after the allocator
    call that it was made for, should somebody have kept it, it hides nothing any more.
    """

    def __init__(self, model: torch.nn.Module, parameters: list[AdaLoraParameter], adapter: str | None = None) -> None:
        super().__init__(model)
        self._self_parameters = parameters
        self._self_shown: list[AdaLoraParameter] | None = parameters
        self._self_adapter = adapter

    @property
    def adalora_parameters(self) -> list[AdaLoraParameter]:
        """Every AdaLoRA parameter of the adapter, shown or not."""
        parameters: list[AdaLoraParameter] = self._self_parameters
        return parameters

    @property
    def shown(self) -> list[AdaLoraParameter]:
        """The AdaLoRA parameters that ``named_parameters()`` yields."""
        return self._self_parameters if self._self_shown is None else self._self_shown

    def show(self, parameters: Iterable[AdaLoraParameter], besides: Iterable[AdaLoraParameter] = ()) -> None:
        """Let ``named_parameters()`` yield these from now on, and ``besides`` what the model has not."""
        names = {parameter.name for parameter in parameters}
        self._self_shown = [parameter for parameter in self._self_parameters if parameter.name in names]
        self._self_shown += besides

    def show_the_model(self) -> None:
        """Let ``named_parameters()`` yield just what the model's own does."""
        self._self_shown = None

    def release(self) -> None:
        """Be the model from now on, and hold nothing else."""
        self._self_shown, self._self_parameters = None, []

    def named_parameters(self, *args: Any, **kwargs: Any) -> Iterator[tuple[str, torch.nn.Parameter]]:
        """Yield ``(name, parameter)`` as ``torch.nn.Module.named_parameters`` does, but for those not shown."""
        if self._self_shown is None:
            return self.__wrapped__.named_parameters(*args, **kwargs)  # type: ignore[no-any-return]
        if self._self_adapter is not None:
            return self._all_but_hidden(self._self_adapter, *args, **kwargs)
        prefix = (args[0] if args else kwargs.get("prefix")) or ""
        dotted = f"{prefix}." if prefix else ""
        return ((dotted + parameter.name, parameter.parameter) for parameter in self._self_shown)

    def _all_but_hidden(self, adapter: str, *args: Any, **kwargs: Any) -> Iterator[tuple[str, torch.nn.Parameter]]:
        # By identity: names have a prefix, and with remove_duplicate=False there are several. A gathered copy stands in
        # for the shard that the model has.
        shown = {id(p.parameter if p.shard is None else p.shard): p.parameter for p in self.shown}
        for name, parameter in self.__wrapped__.named_parameters(*args, **kwargs):
            if id(parameter) in shown:
                yield name, shown[id(parameter)]
            # What PEFT's own tests of names would take is hidden: they mix up adapters whose names contain each other.
            elif not ("lora_" in name and adapter in name):
                yield name, parameter

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Call the model."""
        return self.__wrapped__(*args, **kwargs)

    def __repr__(self) -> str:
        return repr(self.__wrapped__)

    def __copy__(self) -> Any:
        return copy.copy(self.__wrapped__)

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        return copy.deepcopy(self.__wrapped__, memo)

    def __reduce_ex__(self, protocol: Any) -> Any:
        # Read back as the model itself, also where the guard is not installed, and once where it is pickled beside it.
        return operator.getitem, ((self.__wrapped__,), 0)
