"""Gradients kept for late calls: which, how long, and never those of another step."""

from __future__ import annotations

import gc
import weakref
from typing import TYPE_CHECKING

import pytest
import torch
from scenarios import FINALISING, TOTAL, branches, build, loss_of, vectors
from steps import late_step

if TYPE_CHECKING:
    from collections.abc import Callable

    import peft

pytestmark = [pytest.mark.peft]


def test_kept_gradients_go_when_used_and_at_the_finalising_step(
    model: peft.PeftModel, optimizer: torch.optim.Optimizer, listening: Callable[[], int]
) -> None:
    for step in range(1, TOTAL + 1):
        loss_of(model, vectors(step), False).backward()
        gradient = weakref.ref(next(p.grad for n, p in model.named_parameters() if "lora_A" in n))
        optimizer.step()
        optimizer.zero_grad()
        assert (gradient() is not None) == (1 < step <= FINALISING)
        model.base_model.update_and_allocate(step)
        assert gradient() is None
        assert bool(listening()) == (step < FINALISING)
        assert all(parameter.grad is None for parameter in model.parameters())


def test_model_that_goes_away_leaves_nothing_behind(listening: Callable[[], int]) -> None:
    model = build(branches())
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for step in (1, 2, 3):
        late_step(model, optimizer, step)
    loss_of(model, vectors(4), False).backward()
    optimizer.step()
    assert listening() == 1
    references = [weakref.ref(model.base_model.model), weakref.ref(model.base_model.rankallocator)]
    del model, optimizer
    gc.collect()
    assert [reference() for reference in references] == [None, None]
    assert not listening()


def test_gradients_of_a_step_without_a_call_are_not_used_at_a_later_one(
    model: peft.PeftModel, optimizer: torch.optim.Optimizer
) -> None:
    late_step(model, optimizer, 1)
    late_step(model, optimizer, 2)
    loss_of(model, vectors(3), False).backward()
    optimizer.step()
    optimizer.zero_grad()
    before = dict(model.base_model.rankallocator.exp_avg_ipt)
    late_step(model, optimizer, 4, branch=False)
    for name, score in model.base_model.rankallocator.exp_avg_ipt.items():
        assert (score is before[name]) == name.startswith("branch."), name


def test_steps_of_another_optimizer_do_not_touch_kept_gradients(
    model: peft.PeftModel, optimizer: torch.optim.Optimizer
) -> None:
    other = torch.optim.AdamW([torch.nn.Parameter(torch.ones(1))], lr=1e-2)
    late_step(model, optimizer, 1)
    loss_of(model, vectors(2), False).backward()
    optimizer.step()
    optimizer.zero_grad()
    other.step()
    model.base_model.update_and_allocate(2)
    assert len(model.base_model.rankallocator.exp_avg_ipt) == 12


@pytest.mark.parametrize("rests", ["without gradients", "with zeros"])
@pytest.mark.parametrize("order", ["before the step", "closure"])
def test_gradients_of_the_step_before_are_never_used_instead_of_those_that_are_there(
    model: peft.PeftModel, optimizer: torch.optim.Optimizer, order: str, rests: str
) -> None:
    allocator, base = model.base_model.rankallocator, model.base_model.model
    for step in range(1, FINALISING):

        def backward(step: int = step) -> torch.Tensor:
            optimizer.zero_grad()
            loss = loss_of(model, vectors(step), False)
            if step != 3:
                loss.backward()
            elif rests == "with zeros":
                (loss * 0.0).backward()
            return loss

        if order == "closure":
            optimizer.step(backward)
        else:
            backward()
        before = {name: p.detach().clone() for name, p in base.named_parameters() if ".lora_" in name}
        gradients = {name: p.grad for name, p in base.named_parameters() if ".lora_" in name}
        model.base_model.update_and_allocate(step)
        if step != 3:
            assert all(
                torch.equal(ipt, (before[name] * gradients[name]).abs()) for name, ipt in allocator.ipt.items()
            ), step
        if order != "closure":
            optimizer.step()
    assert len(allocator.ipt) == 12


def test_late_loop_whose_closure_zeroes_at_its_end_is_rescued(
    model: peft.PeftModel, optimizer: torch.optim.Optimizer
) -> None:
    for step in (1, 2):

        def backward(step: int = step) -> torch.Tensor:
            loss = loss_of(model, vectors(step), False)
            loss.backward()
            return loss

        optimizer.step(closure=backward)
        gradients = {name: p.grad for name, p in model.base_model.model.named_parameters() if ".lora_" in name}
        optimizer.zero_grad()
        model.base_model.update_and_allocate(step)
    parameters = dict(model.base_model.model.named_parameters())
    assert len(model.base_model.rankallocator.ipt) == 12
    for name, ipt in model.base_model.rankallocator.ipt.items():
        assert torch.equal(ipt, (parameters[name] * gradients[name]).abs())
