"""torch.compile of what comes by the guard: a step with its allocator call, and blocks with the adapter disabled."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
import torch
from needs import dynamo
from situations import TOTAL, loss_of, make, optimizer_of

if TYPE_CHECKING:
    from collections.abc import Callable

    import peft

pytestmark = [pytest.mark.peft, pytest.mark.filterwarnings("ignore")]


def calls_the_model(model: peft.PeftModel, optimizer: torch.optim.Optimizer, step: int) -> None:
    loss_of(model, step).backward()
    optimizer.step()
    model.base_model.update_and_allocate(step)
    optimizer.zero_grad()


def has_a_reference(model: peft.PeftModel, optimizer: torch.optim.Optimizer, step: int) -> None:
    """As DPO has, whose reference is the model without its adapter."""
    with torch.no_grad(), model.disable_adapter():
        reference = loss_of(model, step)
    (loss_of(model, step) - 0.1 * reference).backward()
    optimizer.step()


def train_compiled(whole: bool) -> Any:
    torch.manual_seed(0)
    torch._dynamo.reset()
    model = make()
    optimizer = optimizer_of(model)
    step_of = torch.compile(calls_the_model if whole else has_a_reference, backend="eager")
    for step in range(1, TOTAL + 1):
        step_of(model, optimizer, step)
        if not whole:
            model.base_model.update_and_allocate(step)
            optimizer.zero_grad()
    weights = {name: parameter.tolist() for name, parameter in model.named_parameters() if ".lora_" in name}
    return weights, model.peft_config["default"].rank_pattern


@dynamo
@pytest.mark.parametrize("whole", [True, False])
def test_compiled_steps_train_as_in_plain_peft(whole: bool, plain: Callable[..., Any]) -> None:
    found = train_compiled(whole)
    assert found[1]
    assert found == plain(train_compiled, whole)
