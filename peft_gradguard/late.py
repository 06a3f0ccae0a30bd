"""Calls that come after ``zero_grad``: from the first one on, keep each optimizer step's gradients for the allocator.

A loop in the documented order never gets here: no hook is registered, and no gradient is kept.
"""

from __future__ import annotations

import weakref
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from .optimizers import after_steps, before_steps, remove

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    import torch

    from .parameters import AdaLoraParameter

CAUSES = (
    "Either update_and_allocate is called before backward or after zero_grad (as from Trainer's on_step_end), or the "
    "adapter took no part in this step (disabled, merged, or another adapter active)."
)
REMEDY = "Call it after backward and before zero_grad; in a Trainer, from on_optimizer_step."
KEEPING = "peft_gradguard keeps each optimizer step's gradients until update_and_allocate has used them."

LATE = "The %d AdaLoRA parameters have no gradient %s, so this step scores nothing. %s %s From now on %s"
LATE_AND_ZERO = (
    "The %d AdaLoRA parameters have only gradients that are exactly zero %s, but the optimizer used others: "
    "update_and_allocate is called after zero_grad(set_to_none=False), and its first call scored nothing. %s From now "
    "on %s"
)
ZERO = (
    "The %d AdaLoRA parameters have only gradients that are exactly zero %s, and the optimizer used these: such a step "
    "scores nothing. Does the loss depend on the adapter?"
)
ZERO_SHARDED = (
    "The %d AdaLoRA parameters, sharded by FSDP, have only gradients that are exactly zero %s: such a step scores "
    "nothing. If update_and_allocate is called after zero_grad(set_to_none=False), no step ever will. %s"
)


class KeptGradients:
    """The gradients that the optimizer used last and the allocator has not used yet.

    Kept by reference: ``zero_grad`` only lets go of them. Only where it writes zeros into them (``set_to_none=False``)
    are copies kept. The optimizer's hook knows this object weakly, and this object the parameters.
    """

    def __init__(self, parameters: Iterable[AdaLoraParameter], suspicion: bool) -> None:
        self.suspicion = suspicion
        """Whether only gradients of zero have been seen: after ``zero_grad``, or from a loss that gave just these."""
        self.copies = False
        """Whether to keep copies, because ``zero_grad`` writes zeros."""
        self.lending = False
        """Whether the last call was lent any."""
        self._parameters: dict[str, weakref.ref[torch.nn.Parameter]] = {}
        self._kept: dict[str, torch.Tensor] = {}
        self._backward_seen = False
        self._step_seen = False
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
        return self._backward_seen and not self._step_seen

    def call_in_time(self) -> bool:
        """Let go of what is kept, as gradients are there at this call; say whether the suspicion has proved wrong.

        So it has where the optimizer has stepped since the last call: that step's gradients are still there. Where it
        has not, as at a call for each micro-batch, the late call may be yet to come.
        """
        stepped, self._kept = self._step_seen, {}
        self._backward_seen = self._step_seen = False
        self.copies &= not stepped
        return stepped and self.suspicion

    @contextmanager
    def lent(self, parameters: Iterable[AdaLoraParameter]) -> Iterator[bool]:
        """Give the parameters their kept gradients back for one allocator call, and let go of them afterwards.

        Gives whether there were any. For all parameters or none: one of this step's gradients beside those of the last
        would mix two steps.
        """
        lent: list[tuple[torch.nn.Parameter, torch.Tensor | None]] = []
        kept, self._kept = self._kept, {}
        for parameter in parameters:
            watched = self._parameters.get(parameter.name)
            # Not where another parameter, perhaps of another shape, has taken the name since.
            if parameter.name in kept and watched is not None and watched() is parameter.parameter:
                lent.append((parameter.parameter, parameter.parameter.grad))
                parameter.parameter.grad = kept[parameter.name]
        self.lending = bool(lent)
        try:
            yield self.lending
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
        remove(self._handles)
        remove(self._backward_handles)

    def _keep(self, optimizer: torch.optim.Optimizer) -> None:
        self._step_seen = True
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
