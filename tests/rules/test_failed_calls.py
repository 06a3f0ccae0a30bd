"""A call that fails before PEFT has scored changes nothing, and can be made again."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
from scenarios import frozen
from steps import advance, new_model

import peft_gradguard

if TYPE_CHECKING:
    import logging

    import peft


@pytest.fixture
def model() -> peft.PeftModel:
    return new_model()


@pytest.mark.peft
def test_failed_call_leaves_no_trace(model: peft.PeftModel, records: list[logging.LogRecord]) -> None:
    requires_grad = [parameter for parameter in model.base_model.model.parameters() if parameter.requires_grad]
    frozen()(model, 0)
    with pytest.raises(peft_gradguard.NoGradientError):
        model.base_model.update_and_allocate(1)
    for parameter in requires_grad:
        parameter.requires_grad = True
    advance(model, 1)
    assert len(model.base_model.rankallocator.exp_avg_ipt) == 12
    assert records == []
