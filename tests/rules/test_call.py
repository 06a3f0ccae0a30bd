"""One allocator call: its step, and the one walk over the model."""

from __future__ import annotations

import fractions
import json
from typing import TYPE_CHECKING

import numpy
import pytest
import torch
from failing import OutOfMemoryError, fail_at
from peft.tuners.adalora import RankAllocator
from scenarios import FINALISING, FIRST_MASKING, frozen
from steps import advance, backward, new_model

import peft_gradguard

if TYPE_CHECKING:
    import logging
    from collections.abc import Iterator

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


def counted_in_place(last: int) -> Iterator[torch.Tensor]:
    step = torch.zeros((), dtype=torch.long)
    for _ in range(last):
        step += 1
        yield step


STEPS = {
    "NumPy": lambda last: numpy.arange(1, last + 1),
    "NumPy, in a box": lambda last: map(numpy.array, range(1, last + 1)),
    "tensors": lambda last: torch.arange(1, last + 1),
    "one tensor, in place": counted_in_place,
    "floats": lambda last: map(float, range(1, last + 1)),
    "whole tensors of floats": lambda last: torch.arange(1.0, last + 1),
    "fractions": lambda last: map(fractions.Fraction, range(1, last + 1)),
}


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("kind", STEPS)
def test_steps_of_any_type_are_counted_and_written(kind: str, model: peft.PeftModel) -> None:
    peft_gradguard.keep_history()
    try:
        for number, step in enumerate(STEPS[kind](FINALISING), start=1):
            backward(model, number)
            model.base_model.update_and_allocate(step)
    finally:
        peft_gradguard.keep_history(False)
    report = peft_gradguard.report(model)
    adapter = json.loads(report.to_json())["adapters"][0]
    assert str(report)
    assert adapter["step"] == FINALISING
    assert [point[0] if isinstance(point, list) else point["step"] for point in adapter["history"]] == [
        *range(1, FINALISING + 1)
    ]
    parameters = [p for module in report.adapters[0].modules for p in module.parameters]
    assert {(p.steps_scored, p.first_step, p.last_step) for p in parameters} == {(FINALISING - 1, 1, FINALISING - 1)}
    assert all(type(p.last_step) is int for p in parameters)


def test_peft_gets_the_step_as_it_was_given(model: peft.PeftModel) -> None:
    seen = []

    class Sees(RankAllocator):
        def budget_schedule(self, step: object) -> tuple[int, bool]:
            seen.append(step)
            return super().budget_schedule(step)

    model.base_model.rankallocator.__class__ = Sees
    step = torch.tensor(2)
    backward(model, 1)
    model.base_model.update_and_allocate(step)
    assert seen[0] is step


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
