"""One allocator call: its step, and the one walk over the model."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
from failing import OutOfMemoryError, fail_at
from scenarios import FINALISING, FIRST_MASKING, frozen
from steps import advance, backward, new_model

if TYPE_CHECKING:
    import logging

    import peft


@pytest.fixture
def model() -> peft.PeftModel:
    return new_model()


@pytest.mark.peft
def test_update_ipt_called_directly_says_that_it_knows_no_step(
    model: peft.PeftModel, records: list[logging.LogRecord]
) -> None:
    frozen("trunk.0", "lora_A")(model, 0)
    backward(model, 1)
    model.base_model.rankallocator.update_ipt(model.base_model.model)
    assert [(record.parameters, record.step) for record in records] == [(["trunk.0.lora_A.default"], None)]
    assert "step unknown" in records[0].getMessage()


@pytest.mark.peft
@pytest.mark.parametrize("step", [1, FIRST_MASKING, FINALISING])
def test_one_walk_over_the_model_serves_an_allocator_call(
    model: peft.PeftModel, step: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    advance(model, 1)
    backward(model, step)
    inner, walks = model.base_model.model, []
    walk = type(inner).named_parameters
    monkeypatch.setattr(type(inner), "named_parameters", lambda self, *a, **k: (walks.append(self), walk(self))[1])
    model.base_model.update_and_allocate(step)
    assert walks == [inner]


def test_skip_outside_a_call_after_an_error_knows_no_step(
    model: peft.PeftModel, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    backward(model, 1)
    mend = fail_at(monkeypatch, "no_grad", 0)
    with pytest.raises(OutOfMemoryError):
        model.base_model.update_and_allocate(1)
    mend()
    frozen("trunk.0", "lora_A")(model, 0)
    model.base_model.rankallocator.update_ipt(model.base_model.model)
    assert [record.step for record in caplog.records if record.name == "peft_gradguard"] == [None]
