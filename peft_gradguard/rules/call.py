"""One call of an allocator's method: made once at the door (``guard.py``), and handed to everything."""

from __future__ import annotations

import threading
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from ..memory.memory import memory_of
from ..model.exclusions import mark_excluded
from ..model.view import ModelView
from ..model.walk import adalora_parameters
from ..stacks.stack import whole

if TYPE_CHECKING:
    from collections.abc import Iterator

    import torch
    from peft.tuners.adalora import RankAllocator

    from ..memory.memory import Memory
    from ..model.parameters import AdaLoraParameter


class AllocatorCall:
    """An allocator, the guard's memory of it, the model as PEFT is shown it, and the step."""

    __slots__ = ("allocator", "any_usable", "memory", "step", "view")

    def __init__(self, allocator: RankAllocator, model: torch.nn.Module, step: int | None) -> None:
        self.allocator = allocator
        self.memory: Memory = memory_of(allocator)
        self.view = model if isinstance(model, ModelView) else view_of(model, allocator.adapter_name)
        self.step = step
        """The ``global_step`` of ``update_and_allocate``; None for a method that was called by itself."""
        self.any_usable: bool | None = None
        """Whether there are usable gradients in the scoring under way; None outside of one."""

    @property
    def parameters(self) -> list[AdaLoraParameter]:
        """Every AdaLoRA parameter of the adapter, shown to PEFT or not."""
        return self.view.adalora_parameters

    @property
    def scoring_is_due(self) -> bool:
        """Whether ``RankAllocator.update_and_allocate`` scores at this step: before the finalising one."""
        config = self.allocator.peft_config
        return self.step is not None and bool(self.step < config.total_step - config.tfinal)

    @property
    def at(self) -> str:
        """Which call it is, in words."""
        return f"(adapter {self.memory.adapter!r}, step {'unknown' if self.step is None else self.step})"


_under_way: dict[tuple[int, int], AllocatorCall] = {}


@contextmanager
def under_way(call: AllocatorCall) -> Iterator[None]:
    """Let the methods that PEFT calls meanwhile, in this thread, find this call."""
    key = _key(call.allocator)
    before = _under_way.get(key)
    _under_way[key] = call
    try:
        yield
    finally:
        if before is None:
            del _under_way[key]
        else:
            _under_way[key] = before


def call_under_way(allocator: RankAllocator) -> AllocatorCall | None:
    """Return this allocator's ``update_and_allocate`` in this thread, or None outside of one."""
    return _under_way.get(_key(allocator))


def call_for(allocator: RankAllocator, model: Any) -> AllocatorCall:
    """Return the call under way if this is its model, else one of its own, as where users call a method directly."""
    call = call_under_way(allocator)
    if call is not None and model is call.view:
        return call
    return AllocatorCall(allocator, model, call.step if call is not None else None)


def view_of(model: torch.nn.Module, adapter: str) -> ModelView:
    """Walk the model once, and return it as a view that shows all AdaLoRA parameters of the adapter."""
    return ModelView(model, mark_excluded(whole(adalora_parameters(model, adapter))))


def _key(allocator: RankAllocator) -> tuple[int, int]:
    return id(allocator), threading.get_ident()
