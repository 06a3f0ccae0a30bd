"""Rule 12: nothing to score. The broken training loop is named; the common one, a call after ``zero_grad``, rescued."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ..errors import PLACE, NoGradientError
from ..late.order import PATIENCE, Found, Word
from ..model.adapters import adapters_that_train, idle_layers
from ..model.parameters import EXCLUDED, FROZEN
from ..stacks.fsdp import gradients_can_be_kept, refuse_flat_parameters, refuse_late_call

if TYPE_CHECKING:
    from ..model.gradients import StepGradients
    from .call import AllocatorCall

CAUSES = (
    "Either update_and_allocate comes before backward or after zero_grad (Trainer's on_step_end), or the adapter took "
    "no part in this step (disabled, merged)."
)
REMEDY = f"Call it {PLACE}."
KEEPING = "Until then the guard keeps each step's gradients."

LATE = "The %d AdaLoRA parameters have no gradient %s, so nothing is scored. %s %s %s"
LATE_AND_ZERO = (
    "The %d AdaLoRA parameters have only gradients that are exactly zero %s, but the optimizer used others: "
    "update_and_allocate is called after zero_grad(set_to_none=False), and its first call scored nothing. %s %s"
)
ZERO = (
    "The %d AdaLoRA parameters have only gradients that are exactly zero %s, and the optimizer used these: such a step "
    "scores nothing. Does the loss depend on the adapter?"
)
ZERO_SHARDED = (
    "The %d AdaLoRA parameters, sharded by FSDP, have only gradients that are exactly zero %s: such a step scores "
    "nothing. If update_and_allocate is called after zero_grad(set_to_none=False), no step ever will. %s"
)


def nothing_to_score(call: AllocatorCall, gradients: StepGradients) -> None:
    """Name what is broken, or rescue the call; ``NoGradientError`` where that is hopeless."""
    reasons = gradients.reasons
    if not reasons:
        adapter = call.allocator.adapter_name
        refuse_flat_parameters(call.view.__wrapped__, call.at)
        raise NoGradientError(
            f"update_and_allocate was given a model without AdaLoRA parameters {call.at}: no parameter's name ends "
            f"with '.lora_A.{adapter}', '.lora_B.{adapter}' or '.lora_E.{adapter}'. Was the adapter deleted or merged "
            "and unloaded?"
        )
    if all(reason in (FROZEN, EXCLUDED) for reason in reasons.values()):
        _none_can_be_scored(call, gradients)
    elif gradients.came:
        call.memory.said.skips(reasons, call.step)
    else:
        _late_call(call, gradients)


def say_late_and_zero(call: AllocatorCall, gradients: StepGradients) -> None:
    """Say that zeros were those of ``zero_grad``, once the optimizer is seen to have used others."""
    if call.memory.late.found(Found.LENT, call.parameters, never_scored=False).word is Word.LATE_AND_ZERO:
        count = len(gradients.reasons)
        call.memory.said.warn_once("late call", LATE_AND_ZERO, count, call.at, REMEDY, KEEPING)


def _none_can_be_scored(call: AllocatorCall, gradients: StepGradients) -> None:
    reasons, said = gradients.reasons, call.memory.said
    excluded = EXCLUDED in reasons.values()
    others = adapters_that_train(call.view.__wrapped__)
    # Who excludes all that trains wants just that: its full rank. Scores are forgotten at the finalising step. Where
    # gradients are there, all was frozen since the backward, perhaps for a moment only.
    never = not (call.scored or call.memory.counts.has_scored())
    if never and not excluded and not any(p.parameter.grad is not None for p in call.parameters):
        call.memory.late.give_up()
        raise NoGradientError(
            f"All {len(reasons)} AdaLoRA parameters are frozen (requires_grad is False) and none was ever scored "
            f"{call.at}, so AdaLoRA has nothing to train. {_how_to_thaw(call, others)}, or leave out the call of "
            "update_and_allocate."
        )
    said.skips(reasons, call.step)
    if excluded or not others:
        said.warn_once(
            "all frozen",
            "All %d AdaLoRA parameters are %s %s: nothing is scored or pruned, and the scores stay as they are, until "
            "some of them %s again.",
            len(reasons),
            " or ".join(reason for reason in (EXCLUDED, FROZEN) if reason in reasons.values()),
            call.at,
            "take part" if excluded else "are trainable",
        )


def _how_to_thaw(call: AllocatorCall, others: list[str]) -> str:
    adapter = call.memory.adapter
    if others:
        return f"Adapter {others[0]!r} trains, which this allocator does not rank: give it an allocator of its own"
    if idle_layers(call.view.__wrapped__, (p.module for p in call.parameters), adapter).disabled:
        return "The adapter is disabled: call model.base_model.enable_adapter_layers()"
    return f"Set requires_grad of those that shall train (for example model.set_adapter({adapter!r}))"


def _late_call(call: AllocatorCall, gradients: StepGradients) -> None:
    """Take the call to come after ``zero_grad``: keep gradients from now on, or give up where that has not helped.

    Gradients that are all exactly zero are no proof: the loss may have given them, as one of equal rewards does. So
    that is said once the optimizer is seen to use others; where nothing can be kept, both are said.
    """
    said, at, zeroed, count = call.memory.said, call.at, gradients.zeroed, len(gradients.reasons)
    if zeroed and not gradients_can_be_kept(call.parameters):
        said.warn_once("zeros", ZERO_SHARDED, count, at, REMEDY)
        return
    refuse_late_call(call.parameters, at)
    found = (Found.LENT_ZEROS if gradients.lent else Found.ZEROS) if zeroed else Found.NOTHING
    verdict = call.memory.late.found(found, call.parameters, never_scored=not call.scored)
    if verdict.gives_up and call.memory.late.no_optimizer_steps:
        raise NoGradientError(
            f"The {count} AdaLoRA parameters have no gradient left {at}, and in the last {PATIENCE} calls no torch "
            "optimizer has stepped them: gradients that are gone after the step can be kept for late calls only where "
            "a torch.optim.Optimizer uses them. Call update_and_allocate before the gradients are cleared."
        )
    if verdict.gives_up:
        had = "only gradients that are exactly zero" if zeroed else "no gradient"
        raise NoGradientError(
            f"The {count} AdaLoRA parameters have {had} {at}, at the second call in a row, and none was ever scored. "
            f"{CAUSES} {REMEDY}"
        )
    if verdict.word is Word.ZEROS:
        said.warn_once("zeros", ZERO, count, at)
    elif verdict.word is Word.LATE:
        said.warn_once("late call", LATE, count, at, CAUSES, REMEDY, KEEPING)
