"""Gradients that an optimizer uses and no call ever sees, as where one of two optimizers is cleared before the call."""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING

from ..errors import are, some_of
from ..late.optimizers import StepListener, listen
from ..model.gradients import can_be_read, magnitudes
from ..model.parameters import NO_GRADIENT

if TYPE_CHECKING:
    import torch

    from ..model.gradients import StepGradients
    from ..model.parameters import AdaLoraParameter
    from ..rules.call import AllocatorCall

TOPIC = "cleared"
CALLS = 50
"""After so many calls it is taken for granted that these parameters rest."""
TWICE = 2


class _Steps(StepListener):
    """Which parameters optimizers step with a gradient between two calls."""

    def __init__(self, parameters: list[torch.nn.Parameter]) -> None:
        super().__init__()
        self.calls = 0
        self.used: set[int] = set()
        """The ids of parameters that had a gradient in their last step since the last call."""
        self.unseen: Counter[str] = Counter()
        """How often that was so, and the call saw none."""
        self.watch(parameters)

    def before_step(self, optimizer: torch.optim.Optimizer, held: list[torch.nn.Parameter], has_closure: bool) -> None:
        """See which gradients the step has; a closure makes others. Those of earlier steps were cleared in time."""
        self.used.difference_update(map(id, held))
        if not has_closure:
            self._look(held)

    def after_step(self, optimizer: torch.optim.Optimizer, held: list[torch.nn.Parameter], has_closure: bool) -> None:
        """See which gradients the step has left."""
        self._look(held)

    def _look(self, held: list[torch.nn.Parameter]) -> None:
        there = [p for p in held if id(p) not in self.used and p.grad is not None and can_be_read(p.grad)]
        sizes = magnitudes([p.grad for p in there if p.grad is not None])
        for parameter, size in zip(there, sizes or (), strict=sizes is not None):
            if size:
                self.used.add(id(parameter))


def watch_for_cleared_gradients(call: AllocatorCall, gradients: StepGradients) -> None:
    """After a scoring that found no gradient of some parameters, see whether an optimizer has them, and warn once."""
    seen = call.memory.seen
    steps = seen.listeners.get(TOPIC)
    if (steps is None and TOPIC in seen.listeners) or not gradients.came or gradients.lent:
        return
    waiting = [p for p in call.parameters if _was_never_seen(call, p, gradients)]
    if not isinstance(steps, _Steps):
        if waiting:
            steps = seen.listeners[TOPIC] = _Steps([p.parameter for p in waiting])
            listen(steps)
        return
    steps.unseen.update(p.name for p in waiting if id(p.parameter) in steps.used)
    steps.calls += 1
    steps.used = set()
    found = [name for name, times in steps.unseen.items() if times >= TWICE]
    if found:
        _say(call, found)
    if found or not waiting or steps.calls >= CALLS:
        seen.close(TOPIC)


def watch_no_more(call: AllocatorCall) -> None:
    """Listen to no step any more; from the finalising step on nothing is scored."""
    if call.memory.seen.listeners.get(TOPIC) is not None:
        call.memory.seen.close(TOPIC)


def _was_never_seen(call: AllocatorCall, parameter: AdaLoraParameter, gradients: StepGradients) -> bool:
    """Say whether it may be scored, and neither this call nor one before has seen a gradient of it that is not zero."""
    name = parameter.name
    if parameter.shard is not None:
        return False
    if gradients.reasons[name] == NO_GRADIENT:
        return name not in call.scored
    # Those of A and B may well be zero, as long as E is.
    return name in gradients.zeros and parameter.factor == "E" and not bool(call.scored[name].any())


def _say(call: AllocatorCall, names: list[str]) -> None:
    words = call.memory.seen.troubles[TOPIC] = (
        f"AdaLoRA never sees gradients that an optimizer uses {call.at}: those of {some_of(names)} {are(names)} gone "
        "before each call, so their modules are not ranked by what they learn. With several optimizers, call "
        "update_and_allocate after the last one's step, and before the first zero_grad."
    )
    call.memory.said.warn_once(TOPIC, "%s", words)
