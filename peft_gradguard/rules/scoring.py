"""Rules 1 and 2: which parameters PEFT scores at this step."""

from __future__ import annotations

from contextlib import contextmanager
from typing import TYPE_CHECKING

from ..errors import NoGradientError
from ..log import harmless
from ..model.gradients import step_gradients
from ..stacks.stack import require_gradients
from ..wrapper import cannot_do_without_gradients
from .broken_loop import nothing_to_score, say_late_and_zero

if TYPE_CHECKING:
    from collections.abc import Iterator

    from ..model.gradients import StepGradients
    from .call import AllocatorCall


@contextmanager
def scoring(call: AllocatorCall, beneath: bool = True) -> Iterator[bool]:
    """Show PEFT just the parameters with a usable gradient, and give whether there are any.

    Where user code's own ``update_ipt`` calls the guarded one, it is shown by then what this would show it.
    ``beneath``: whether what the guard wraps scores, and not user code in its place, which may pass over what has no
    gradient.
    """
    if call.any_usable is not None:
        if call.nothing_to_score is not None and cannot_do_without_gradients(call.allocator):
            raise call.nothing_to_score
        call.view.show(call.usable)
        yield call.any_usable
        return
    require_gradients(call.allocator, call.view, call.at)
    memory = call.memory
    with _gradients_to_score(call) as gradients:
        call.usable = [parameter for parameter in call.parameters if gradients.reasons[parameter.name] is None]
        call.view.show(call.usable)
        if call.usable:
            with harmless("say what is left out"):
                memory.said.skips(gradients.reasons, call.step)
        else:
            _nothing_to_score(call, gradients, beneath)
        call.any_usable = bool(call.usable)
        with harmless("count a scoring"):
            memory.counts.begin(gradients.reasons, call.scored)
        try:
            yield call.any_usable
        finally:
            call.any_usable = call.nothing_to_score = None
            with harmless("look at the scores"):
                memory.counts.look(call.scored)
        memory.scorings += bool(call.usable)
        call.gradients = gradients
        with harmless("count a scoring"):
            memory.counts.add(call.step)
            memory.seen.note_scoring(call.step, call.parameters, gradients)
    memory.late.scored(call.parameters, own=gradients.came and not gradients.lent)


def _nothing_to_score(call: AllocatorCall, gradients: StepGradients, beneath: bool) -> None:
    """Name what is broken, by an error where PEFT's own code would fail: somebody else's may train on."""
    try:
        nothing_to_score(call, gradients)
    except NoGradientError as error:
        if beneath and cannot_do_without_gradients(call.allocator):
            raise
        call.nothing_to_score = error
        call.memory.said.warn_once("nothing to score", "%s", error)


@contextmanager
def _gradients_to_score(call: AllocatorCall) -> Iterator[StepGradients]:
    """Give this step's gradients; where none has come, those that the optimizer used last, if they were kept."""
    gradients, late = step_gradients(call.parameters), call.memory.late
    if gradients.came:
        late.in_time()
        yield gradients
        return
    with late.lent(call.parameters) as any_lent:
        if any_lent:
            gradients = step_gradients(call.parameters)._replace(lent=True)
            if gradients.came:
                say_late_and_zero(call, gradients)
        yield gradients
