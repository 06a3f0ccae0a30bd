"""Rules 1 and 2: which parameters PEFT scores at this step."""

from __future__ import annotations

from contextlib import contextmanager
from typing import TYPE_CHECKING

from ..log import harmless
from ..model.gradients import step_gradients
from ..stacks.stack import require_gradients
from .broken_loop import nothing_to_score, say_late_and_zero

if TYPE_CHECKING:
    from collections.abc import Iterator

    from ..model.gradients import StepGradients
    from .call import AllocatorCall


@contextmanager
def scoring(call: AllocatorCall) -> Iterator[bool]:
    """Show PEFT just the parameters with a usable gradient, and give whether there are any.

    Where user code's own ``update_ipt`` calls the guarded one, it is shown by then what this would show it.
    """
    if call.any_usable is not None:
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
            nothing_to_score(call, gradients)
        call.any_usable = bool(call.usable)
        with harmless("count a scoring"):
            memory.counts.begin(gradients.reasons, call.scored)
        try:
            yield call.any_usable
        finally:
            call.any_usable = None
            with harmless("look at the scores"):
                memory.counts.look(call.scored)
        memory.scorings += bool(call.usable)
        call.gradients = gradients
        with harmless("count a scoring"):
            memory.counts.add(call.step)
            memory.seen.note_scoring(call.step, call.parameters, gradients)
    memory.late.scored(call.parameters, own=gradients.came and not gradients.lent)


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
