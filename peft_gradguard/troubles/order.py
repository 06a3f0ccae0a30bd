"""Calls that come before the optimizer's step, which then writes over the mask.

Seen around the first masking steps, by one E: such a step uses the gradient that the call has seen (or the call comes
from inside of it, as from the closure that a framework gives it), and the next call sees another one. A call in time
sees the gradient that the last step has left. Where gradients stay the same tensors and are written to, backwards are
watched for too: after a call in time one comes before the next step.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import torch

from ..errors import PLACE
from ..late.optimizers import StepListener, listen
from ..late.order import Order
from ..log import harmless
from ..model.gradients import can_be_read
from ..model.marks import deepspeed_holds_gradient
from ..model.parameters import energies
from ..model.pattern import pattern_by_full_name

if TYPE_CHECKING:
    from ..model.pattern import RankPattern
    from ..rules.call import AllocatorCall

TOPIC = "order"
CALLS = 8
"""So many calls may pass before it is left open."""


class _Gradient(NamedTuple):
    """A gradient, and how often torch had written to it.

    Not known weakly: ``torch.utils.swap_tensors``, which ``Module.to`` may use, refuses such tensors.
    """

    tensor: torch.Tensor
    version: int

    def is_as_it_was(self, gradient: torch.Tensor | None) -> bool:
        """Say whether this is the gradient, and nobody has written to it since."""
        return self.tensor is gradient and self.version == gradient._version


class _Steps(StepListener):
    """What the steps of optimizers do between two calls, to one E and with its gradient."""

    def __init__(self) -> None:
        super().__init__()
        self.calls = 0
        self.left: _Gradient | None = None
        """The gradient as the last step has left it."""

    def begin(self, energy: torch.nn.Parameter) -> None:
        """From this call on, follow what happens to this E."""
        self.calls += 1
        self.uses_what_was_seen = False
        """Whether a step since the last call has used the gradient which that call has seen."""
        self.left = None
        self.backward_came = False
        """Whether a backward has reached E since the last call, where that is seen."""
        self._seen = _gradient_of(energy)
        self._zero = energy.detach() == 0
        """The ranks that are pruned."""
        self._began_with: _Gradient | None = None
        """The gradient with which the step under way began."""
        self._is_inside = True
        """Whether the call came from inside of the step under way."""
        self.watch([energy])

    def after_backward(self, parameter_id: int, gradient: torch.Tensor) -> None:
        """Note that one has come; hooks stay on an E that was followed before."""
        self.backward_came |= parameter_id in self._watched

    def follows(self, energy: torch.nn.Parameter) -> bool:
        """Say whether this is the E that is followed."""
        return self._is_watched(energy)

    def before_step(self, optimizer: torch.optim.Optimizer, held: list[torch.nn.Parameter], has_closure: bool) -> None:
        """See whether the step begins with the gradient that the call has seen; a closure may make others."""
        energy, *_ = held
        self._is_inside, self._began_with = False, _gradient_of(energy)
        if not has_closure:
            self._look(energy)

    def after_step(self, optimizer: torch.optim.Optimizer, held: list[torch.nn.Parameter], has_closure: bool) -> None:
        """See what the step has left. One that had begun before the call may have written over its mask."""
        energy, *_ = held
        if has_closure and self._began_with is not None and self._began_with.is_as_it_was(energy.grad):
            # The closure has made no other: Lightning gives every step one, be it to do nothing.
            self._look(energy)
        if self._is_inside:
            self.uses_what_was_seen |= bool(energy.detach()[self._zero].any())
        self.left = _gradient_of(energy)

    def _look(self, energy: torch.nn.Parameter) -> None:
        """See whether the step uses what the call has seen; the same tensor may have other values."""
        if self._seen is None or self._seen.tensor is not energy.grad:
            return
        if id(energy) in self._hooked:
            # Zeros are what zero_grad has left to a layer that rests.
            self.uses_what_was_seen |= not self.backward_came and bool(energy.grad.any())
        else:
            self.uses_what_was_seen |= self._seen.is_as_it_was(energy.grad)


def watch_the_order(call: AllocatorCall, pattern: RankPattern | None) -> None:
    """After a call that masks, find out whether the calls come before the optimizer's step, and warn once."""
    seen = call.memory.seen
    steps = seen.listeners.get(TOPIC)
    if steps is None and TOPIC in seen.listeners:
        return
    if steps is None and (not pattern or all(map(all, pattern.values()))):
        # Nothing is pruned yet.
        return
    plain = [p for p in energies(call.parameters) if p.shard is None and _is_plain(p.parameter)]
    if not plain or call.memory.late.order is not Order.IN_TIME:
        seen.close(TOPIC)
        return
    if not isinstance(steps, _Steps):
        steps = seen.listeners[TOPIC] = _Steps()
        listen(steps)
    named = dict(pattern_by_full_name(plain, pattern or {}, call.memory.adapter))
    energy = min(plain, key=lambda p: (not steps.follows(p.parameter), all(named.get(p.name, ())))).parameter
    if steps.left is not None and steps.follows(energy):
        in_time = steps.left.is_as_it_was(energy.grad)
        before = steps.uses_what_was_seen and not in_time
        if before or in_time or steps.calls >= CALLS:
            seen.close(TOPIC)
            if before:
                _say(call)
            return
        # The tensor may have been written to since: by a clipping, or by another backward.
        with harmless("see the backwards of a parameter"):
            steps.see_backwards(energy)
    steps.begin(energy)


def _say(call: AllocatorCall) -> None:
    words = call.memory.seen.troubles[TOPIC] = (
        f"AdaLoRA's update_and_allocate is called before the optimizer's step {call.at}. The step writes over the "
        "mask: pruned ranks come back in memory, but not in what is saved, and the two give different results. "
        f"Call it {PLACE}."
    )
    call.memory.said.warn_once(TOPIC, "%s", words)


def _is_plain(parameter: torch.nn.Parameter) -> bool:
    """Say whether this is a parameter whose own gradient an optimizer steps, and whose values may be looked at."""
    gradient = parameter.grad
    return (
        parameter.requires_grad
        and gradient is not None
        and not gradient.is_inference()
        and not deepspeed_holds_gradient(parameter)
        and type(parameter.detach()) is torch.Tensor
        and can_be_read(parameter)
    )


def _gradient_of(energy: torch.nn.Parameter) -> _Gradient | None:
    gradient = energy.grad
    if gradient is None or gradient.is_inference():
        return None
    return _Gradient(gradient, gradient._version)
