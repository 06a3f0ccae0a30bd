"""The gradients that the optimizer used last, kept for calls that come after ``zero_grad``."""

from __future__ import annotations

import weakref
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from .optimizers import after_steps, before_steps, remove

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    import torch

    from ..model.parameters import AdaLoraParameter


class KeptGradients:
    """The gradients that the optimizer used last and the allocator has not used yet.

    Kept by reference: ``zero_grad`` only lets go of them. Only where it writes zeros into them (``set_to_none=False``)
    are copies kept. The optimizer's hook knows this object weakly, and this object the parameters.
    """

    def __init__(self, parameters: Iterable[AdaLoraParameter]) -> None:
        self.copies = False
        """Whether to keep copies, because ``zero_grad`` writes zeros."""
        self.stepped = False
        """Whether an optimizer has stepped since the last call."""
        self._backward_seen = False
        self._parameters: dict[str, weakref.ref[torch.nn.Parameter]] = {}
        self._kept: dict[str, torch.Tensor] = {}
        this = weakref.ref(self)
        self._handles: list[Any] = [
            before_steps(lambda *step: _in_step(this, step, before=True)),
            after_steps(lambda *step: _in_step(this, step, before=False)),
        ]
        self._backward_handles: list[Any] = [
            parameter.parameter.register_hook(lambda _: _in_backward(this))  # type: ignore[no-untyped-call]
            for parameter in parameters
            if parameter.parameter.requires_grad
        ]
        weakref.finalize(self, remove, self._handles)
        weakref.finalize(self, remove, self._backward_handles)

    def watch(self, parameters: Iterable[AdaLoraParameter], backward: bool) -> None:
        """Keep these parameters' gradients from now on; ``backward``: see whether any come at all."""
        self._parameters = {parameter.name: weakref.ref(parameter.parameter) for parameter in parameters}
        if not backward:
            remove(self._backward_handles)

    def step_was_left_out(self) -> bool:
        """Say whether, since the last call, gradients came but no optimizer used them: a ``GradScaler``'s overflow."""
        return self._backward_seen and not self.stepped

    def forget(self) -> None:
        """Let go of what is kept, and of what has happened since the last call."""
        self._kept = {}
        self._backward_seen = self.stepped = False

    @contextmanager
    def lent(self, parameters: Iterable[AdaLoraParameter]) -> Iterator[bool]:
        """Give the parameters their kept gradients back for one allocator call, and let go of them afterwards.

        Gives whether there were any. For all parameters or none: one of this step's gradients beside those of the last
        would mix two steps.
        """
        lent: list[tuple[torch.nn.Parameter, torch.Tensor | None]] = []
        for parameter in parameters:
            watched = self._parameters.get(parameter.name)
            # Not where another parameter, perhaps of another shape, has taken the name since.
            if parameter.name in self._kept and watched is not None and watched() is parameter.parameter:
                lent.append((parameter.parameter, parameter.parameter.grad))
                parameter.parameter.grad = self._kept[parameter.name]
        self._kept = {}
        try:
            yield bool(lent)
        finally:
            self._backward_seen = self.stepped = False
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
        remove(self._handles)
        remove(self._backward_handles)

    def _keep(self, optimizer: torch.optim.Optimizer) -> None:
        self.stepped = True
        stepped = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
        for name, reference in self._parameters.items():
            parameter = reference()
            if parameter is not None and id(parameter) in stepped:
                self._kept.pop(name, None)
                if parameter.grad is not None:
                    self._kept[name] = parameter.grad.clone() if self.copies else parameter.grad


def _in_step(this: weakref.ref[KeptGradients], step: tuple[Any, ...], before: bool) -> None:
    kept, (optimizer, args, kwargs) = this(), step
    # A closure computes the gradients within the step: those of before belong to another step, those of after are used.
    closure = args[1] if len(args) > 1 else kwargs.get("closure")
    if kept is not None and before == (closure is None):
        kept._keep(optimizer)


def _in_backward(this: weakref.ref[KeptGradients]) -> None:
    kept = this()
    if kept is not None:
        kept._backward_seen = True
