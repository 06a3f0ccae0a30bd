"""Calls that come after ``zero_grad``: from the first one on, keep each optimizer step's gradients for the allocator.

A loop in the documented order never gets here: no hook is registered, and no gradient is kept.
"""

from __future__ import annotations

import weakref
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from torch.optim.optimizer import register_optimizer_step_pre_hook

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    import torch

    from .parameters import AdaLoraParameter

CAUSES = (
    "Either update_and_allocate is called before backward or after zero_grad (as from Trainer's on_step_end), or the "
    "adapter took no part in this step (disabled, merged, or another adapter active). Call it after backward and "
    "before zero_grad; in a Trainer, from on_optimizer_step."
)


class KeptGradients:
    """The gradients that the optimizer used last and the allocator has not used yet.

    Kept by reference: ``zero_grad`` only lets go of them. Only where it writes zeros into them (``set_to_none=False``)
    are copies kept. The optimizer's hook knows this object weakly, and this object the parameters.
    """

    def __init__(self, parameters: Iterable[AdaLoraParameter]) -> None:
        self.copies = False
        """Whether to keep copies, because ``zero_grad`` writes zeros."""
        self._parameters: dict[str, weakref.ref[torch.nn.Parameter]] = {}
        self._kept: dict[str, torch.Tensor] = {}
        self._backward_seen = False
        self._step_seen = False
        this = weakref.ref(self)
        self._handles: list[Any] = [register_optimizer_step_pre_hook(lambda *args: _before_step(this, args[0]))]
        self._backward_handles: list[Any] = [
            parameter.parameter.register_hook(lambda _: _in_backward(this))  # type: ignore[no-untyped-call]
            for parameter in parameters
            if parameter.parameter.requires_grad
        ]
        weakref.finalize(self, _remove, self._handles)
        weakref.finalize(self, _remove, self._backward_handles)

    def watch(self, parameters: Iterable[AdaLoraParameter], backward: bool) -> None:
        """Keep these parameters' gradients from now on; ``backward``: see whether any come at all."""
        self._parameters = {parameter.name: weakref.ref(parameter.parameter) for parameter in parameters}
        if not backward:
            _remove(self._backward_handles)

    def step_was_left_out(self) -> bool:
        """Say whether, since the last call, gradients came but no optimizer used them: a ``GradScaler``'s overflow."""
        return self._backward_seen and not self._step_seen

    @contextmanager
    def lent(self, parameters: Iterable[AdaLoraParameter]) -> Iterator[None]:
        """Give the parameters their kept gradients back for one allocator call, and let go of them afterwards."""
        lent: list[tuple[torch.nn.Parameter, torch.Tensor | None]] = []
        kept, self._kept = self._kept, {}
        for parameter in parameters:
            watched = self._parameters.get(parameter.name)
            # Not where another parameter, perhaps of another shape, has taken the name since.
            if parameter.name in kept and watched is not None and watched() is parameter.parameter:
                lent.append((parameter.parameter, parameter.parameter.grad))
                parameter.parameter.grad = kept[parameter.name]
        try:
            yield
        finally:
            self._backward_seen = self._step_seen = False
            for owner, gradient in lent:
                owner.grad = gradient

    @contextmanager
    def undone_on_error(self) -> Iterator[None]:
        """Keep what was kept where the allocator call fails, because it may be made again."""
        kept = self._kept
        try:
            yield
        except BaseException:
            self._kept = kept
            raise

    def close(self) -> None:
        """Keep nothing any more."""
        self._kept.clear()
        _remove(self._handles)
        _remove(self._backward_handles)

    def _keep(self, optimizer: torch.optim.Optimizer) -> None:
        self._step_seen = True
        stepped = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
        for name, reference in self._parameters.items():
            parameter = reference()
            if parameter is not None and id(parameter) in stepped:
                self._kept.pop(name, None)
                if parameter.grad is not None:
                    self._kept[name] = parameter.grad.clone() if self.copies else parameter.grad


def _before_step(this: weakref.ref[KeptGradients], optimizer: torch.optim.Optimizer) -> None:
    kept = this()
    if kept is not None:
        kept._keep(optimizer)


def _in_backward(this: weakref.ref[KeptGradients]) -> None:
    kept = this()
    if kept is not None:
        kept._backward_seen = True


def _remove(handles: list[Any]) -> None:
    while handles:
        handles.pop().remove()
