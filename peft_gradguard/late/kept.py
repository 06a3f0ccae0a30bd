"""The gradients that optimizers have used, kept for calls that come after ``zero_grad``."""

from __future__ import annotations

from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, NamedTuple

import torch

from ..log import harmless
from ..model.gradients import is_captured
from .optimizers import StepListener, listen, listen_no_more

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from ..model.parameters import AdaLoraParameter


class Kept(NamedTuple):
    """One gradient as an optimizer has used it, and what its parameter was then."""

    gradient: torch.Tensor
    source: torch.Tensor
    """The parameter's own gradient then, of which this may be a copy."""
    version: int | None
    """How often torch had written to it; None where torch does not count (``inference_mode``)."""
    layout: tuple[Any, ...]
    """Data type, device and shape of the parameter."""


class KeptGradients(StepListener):
    """The gradients that optimizers used last on an allocator's parameters, and no call has scored yet.

    As they are after the step, where they are still there: a step may clip or unscale them, or put others in their
    place. Kept by reference, because ``zero_grad`` only lets go of them; as copies where it writes zeros into them.

    There is one for each allocator, and it begins and closes as the order of the calls asks for it: its hooks on
    parameters stay. It dies with the allocator, and refers to no model.
    """

    def __init__(self) -> None:
        super().__init__()
        self.listens = False
        """Whether it has begun and is not closed."""
        self._forget()

    def _forget(self) -> None:
        self.copies = False
        """Whether to keep copies, because ``zero_grad`` writes zeros."""
        self.stepped = False
        """Whether an optimizer that holds these parameters has stepped since the last call."""
        self._backward_came = False
        """Whether a backward has come since the last call."""
        self._brought_more = False
        """Whether one of these was seen to bring more than zeros."""
        self._fresh: set[int] = set()
        """The parameters that a backward has reached since their gradients were last scored."""
        self._backward_is_seen = False
        """Whether any backward was ever seen: user code may write gradients by itself."""
        self._scored: dict[int, torch.Tensor] = {}
        """The gradients that the last call has scored, and the optimizer may use after it."""
        self._stale: set[int] = set()
        """The parameters whose gradient in the step under way was scored already."""
        self._kept: dict[int, Kept] = {}

    def begin(self, parameters: Sequence[AdaLoraParameter]) -> None:
        """Keep the gradients of these parameters from now on."""
        self.listens = True
        self.follow(parameters)
        # A call that has scored nothing begins: what it has found, zeros, the next step may still use.
        self._fresh.update(id(p.parameter) for p in parameters if p.parameter.grad is not None)
        listen(self)

    def follow(self, parameters: Sequence[AdaLoraParameter]) -> None:
        """From now on keep the gradients of these parameters."""
        self.watch(parameter.parameter for parameter in parameters)
        for parameter in (p.parameter for p in parameters):
            if parameter.requires_grad:
                # Torch refuses some; then gradients are told from each other by their identity.
                with harmless("see the gradients of a parameter come"):
                    self.see_backwards(parameter)

    def step_was_left_out(self) -> bool:
        """Say whether, since the last call, gradients came but no optimizer used them: a ``GradScaler``'s overflow."""
        return self._backward_came and not self.stepped

    def zeros_come_from_the_loss(self) -> bool:
        """Say whether the zeros that a call has found are what a backward has brought, and not ``zero_grad``'s."""
        return self._backward_came and not self._brought_more

    def start_anew(self, scored: Sequence[AdaLoraParameter]) -> None:
        """After a call: let go of what is kept, and of what has happened; ``scored``: whose own gradients it scored."""
        self._kept = {}
        if scored:
            self._fresh = set()
        self._backward_came = self._brought_more = self.stepped = False
        gradients = ((p.parameter, p.parameter.grad) for p in scored if not self._backward_is_seen)
        self._scored = {id(p): gradient for p, gradient in gradients if gradient is not None}

    @contextmanager
    def lent(self, parameters: Sequence[AdaLoraParameter]) -> Iterator[bool]:
        """Give the parameters their kept gradients for the block, and give whether there were any.

        Not to one that has changed its data type, device or shape since: the gradient does not fit it any more.
        """
        lent: list[tuple[torch.nn.Parameter, torch.Tensor | None]] = []
        try:
            for parameter in (p.parameter for p in parameters):
                kept = self._kept.get(id(parameter))
                if kept is not None and self._is_watched(parameter) and kept.layout == _layout(parameter):
                    lent.append((parameter, parameter.grad))
                    parameter.grad = kept.gradient
            yield bool(lent)
        finally:
            for owner, gradient in lent:
                owner.grad = gradient

    def close(self) -> None:
        """Keep nothing any more. The hooks on parameters stay, and do nothing: to take them out might disturb torch."""
        self.listens = False
        self.watch(())
        self._forget()
        listen_no_more(self)

    def before_step(self, optimizer: torch.optim.Optimizer, held: list[torch.nn.Parameter], has_closure: bool) -> None:
        """Keep what the step will use; what earlier steps have used is of no interest any more."""
        for parameter in held:
            self._kept.pop(id(parameter), None)
            self._stale.discard(id(parameter))
            if not has_closure and parameter.grad is not None:
                if self._is_unscored(parameter):
                    self._keep(parameter)
                else:
                    self._stale.add(id(parameter))

    def after_step(self, optimizer: torch.optim.Optimizer, held: list[torch.nn.Parameter], has_closure: bool) -> None:
        """Keep what the step has made of its gradients."""
        if _overflow_left_it_out(optimizer):
            for parameter in held:
                self._kept.pop(id(parameter), None)
            return
        self.stepped = True
        for parameter in held:
            if parameter.grad is not None and id(parameter) not in self._stale:
                self._keep(parameter)

    def _is_unscored(self, parameter: torch.nn.Parameter) -> bool:
        """Say whether no call has scored the gradient that this parameter has."""
        if self._backward_is_seen and id(parameter) in self._hooked:
            return id(parameter) in self._fresh
        return self._scored.get(id(parameter)) is not parameter.grad

    def _keep(self, parameter: torch.nn.Parameter) -> None:
        gradient, before = parameter.grad, self._kept.get(id(parameter))
        assert gradient is not None
        source, version = gradient, None if gradient.is_inference() else gradient._version
        if self.copies:
            # A step may clear its gradients by itself; then what it had before is what it used.
            if before and before.source is gradient and (before.version == version or not gradient.any()):
                return
            gradient = gradient.detach().clone()
        self._kept[id(parameter)] = Kept(gradient, source, version, _layout(parameter))

    def after_backward(self, parameter_id: int, gradient: torch.Tensor) -> None:
        """Note whose gradient is new."""
        if self.listens:
            self._backward_is_seen = self._backward_came = True
            self._fresh.add(parameter_id)
            # Where no call has found zeros, nobody asks.
            self._brought_more = self._brought_more or not self.copies or _is_more_than_zeros(gradient)


def _overflow_left_it_out(optimizer: torch.optim.Optimizer) -> bool:
    """Say whether a fused optimizer was told of a ``GradScaler``'s overflow, and has left the step out by itself."""
    found_inf = getattr(optimizer, "found_inf", None)
    # Other optimizers may use the name for something else.
    return isinstance(found_inf, torch.Tensor | float | int) and bool(torch.as_tensor(found_inf).any())


def _is_more_than_zeros(gradient: torch.Tensor) -> bool:
    if not is_captured(gradient):
        with harmless("see whether a gradient is zero"):
            return bool(gradient.any())
    return True


def _layout(parameter: torch.nn.Parameter) -> tuple[Any, ...]:
    return parameter.dtype, parameter.device, parameter.shape
