"""Nothing to score: all is frozen, there is no AdaLoRA, or the loop calls at the wrong moment."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING

import pytest
import torch
from scenarios import FIRST_MASKING, SCENARIOS, build, frozen
from steps import advance, new_model, pattern

import peft_gradguard

if TYPE_CHECKING:
    import peft

pytestmark = pytest.mark.peft


@pytest.fixture
def model() -> peft.PeftModel:
    return new_model()


def test_all_frozen_in_the_middle_is_warned_of_once_and_nothing_moves(
    model: peft.PeftModel, records: list[logging.LogRecord]
) -> None:
    advance(model, *range(1, FIRST_MASKING + 1))
    scores, result = dict(model.base_model.rankallocator.exp_avg_ipt), pattern(model)
    frozen()(model, 0)
    for step in range(FIRST_MASKING + 1, FIRST_MASKING + 4):
        model.base_model.update_and_allocate(step)
    assert all(model.base_model.rankallocator.exp_avg_ipt[name] is score for name, score in scores.items())
    assert pattern(model) is result
    warnings = [record for record in records if "All 12 AdaLoRA parameters are frozen" in record.getMessage()]
    assert [record.levelno for record in warnings] == [logging.WARNING]
    assert warnings[0].getMessage().endswith("stay as they are, until some of them are trainable again.")


def test_model_without_adalora_is_named(model: peft.PeftModel) -> None:
    with pytest.raises(peft_gradguard.NoGradientError, match=r"without AdaLoRA parameters .*'\.lora_A\.default'"):
        model.base_model.rankallocator.update_and_allocate(torch.nn.Linear(2, 2), 1)


def test_everything_frozen_is_named() -> None:
    model = build(SCENARIOS["frozen layer"])
    for parameter in model.base_model.model.roberta.parameters():
        parameter.requires_grad = False
    with pytest.raises(peft_gradguard.NoGradientError, match=r"All 18 AdaLoRA parameters are frozen .*step 1"):
        model.base_model.update_and_allocate(1)


def test_error_that_a_loop_swallows_is_no_matter_of_the_next_call(model: peft.PeftModel) -> None:
    """An optimizer's step before the error is not taken for one since: the next one is left out, as on an overflow."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    factors = {name: p for name, p in model.named_parameters() if ".lora_" in name}

    def late(step: int, *, trainable: bool, steps: bool) -> None:
        for parameter in factors.values():
            parameter.requires_grad = trainable
        if trainable:
            sum((p * p).sum() for p in factors.values()).backward()
        if steps:
            optimizer.step()
        optimizer.zero_grad()
        model.base_model.update_and_allocate(step)

    late(1, trainable=True, steps=True)
    with pytest.raises(peft_gradguard.NoGradientError, match="are frozen"):
        late(2, trainable=False, steps=True)
    late(3, trainable=True, steps=False)
    late(4, trainable=True, steps=True)
    assert model.base_model.rankallocator.exp_avg_ipt


def test_call_before_the_first_backward_is_named() -> None:
    model = build(SCENARIOS["frozen layer"])
    model.base_model.update_and_allocate(1)
    with pytest.raises(peft_gradguard.NoGradientError, match=r"after the optimizer's step and before zero_grad"):
        model.base_model.update_and_allocate(2)
    assert model.base_model.rankallocator.exp_avg_ipt == {}
