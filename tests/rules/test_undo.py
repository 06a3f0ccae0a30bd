"""A call that fails leaves the allocator as it was."""

from __future__ import annotations

import traceback
from typing import TYPE_CHECKING

import pytest
import torch
from failing import OutOfMemoryError, fail_at
from scenarios import frozen, loss_of, vectors
from steps import advance, late, new_model, same_state, state_of

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


@pytest.mark.parametrize("is_late", [False, True], ids=["in time", "late"])
@pytest.mark.parametrize(("function", "after"), [("no_grad", 2), ("no_grad", 11), ("kthvalue", 0), ("cat", 2)])
def test_error_inside_peft_leaves_all_as_it_was(
    function: str, after: int, is_late: bool, model: peft.PeftModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    reference = new_model()
    for each in (model, reference):
        optimizer = torch.optim.SGD(each.parameters(), lr=1e-2)
        frozen("branch.0")(each, 0)
        late(each, optimizer, 1, 2, 3)
        each.base_model.model.get_parameter("branch.0.lora_E.default").requires_grad = True
        each.base_model.model.get_parameter("branch.0.lora_A.default").requires_grad = True
        loss_of(each, vectors(4), False).backward()
        optimizer.step()
        if is_late:
            optimizer.zero_grad()
    allocator = model.base_model.rankallocator
    before = state_of(allocator)
    flags = [(parameter.grad, parameter.requires_grad, parameter._version) for parameter in model.parameters()]
    mend = fail_at(monkeypatch, function, after)
    with pytest.raises(OutOfMemoryError, match=function) as caught:
        model.base_model.update_and_allocate(4)
    mend()
    frames = [frame.name for frame in traceback.extract_tb(caught.value.__traceback__)]
    assert frames[-1] == "failing"
    assert frames[-2] in ("update_ipt", "mask_to_budget")
    assert same_state(before, state_of(allocator))
    after_error = [(parameter.grad, parameter.requires_grad, parameter._version) for parameter in model.parameters()]
    assert all(x[0] is y[0] and x[1:] == y[1:] for x, y in zip(flags, after_error, strict=True))
    # Made again, the call does what it would have done.
    model.base_model.update_and_allocate(4)
    reference.base_model.update_and_allocate(4)
    scores, expected = allocator.exp_avg_ipt, reference.base_model.rankallocator.exp_avg_ipt
    assert scores.keys() == expected.keys()
    assert len(scores) == 11
    assert all(torch.equal(scores[name], expected[name]) for name in scores)
    pattern = model.peft_config["default"].rank_pattern
    assert pattern == reference.peft_config["default"].rank_pattern
    assert len(pattern) == 4
