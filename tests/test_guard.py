"""The wrapped methods: how they may be called, and that nothing else is changed."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
import torch
from guarding import guard_instead
from scenarios import FIRST_MASKING, INIT_R, TARGET_R, frozen
from steps import advance, backward, new_model
from torch import nn

if TYPE_CHECKING:
    import peft
    from peft.tuners.adalora import RankAllocator


@pytest.fixture
def model() -> peft.PeftModel:
    return new_model()


@pytest.mark.peft
def test_mask_to_budget_called_directly_masks_only_ranked_triplets(model: peft.PeftModel) -> None:
    allocator = model.base_model.rankallocator
    advance(model, 1, branch=False)
    masked = allocator.mask_to_budget(model.base_model.model, 2 * TARGET_R)
    assert sorted(masked) == ["trunk.0.lora_E.default", "trunk.2.lora_E.default"]
    assert sum(map(sum, masked.values())) == 2 * TARGET_R


@pytest.mark.peft
def test_arguments_may_be_given_by_name(model: peft.PeftModel) -> None:
    allocator = model.base_model.rankallocator
    backward(model, FIRST_MASKING)
    arguments = {"model": model.base_model.model, "global_step": FIRST_MASKING, "force_mask": True}
    budget, masked = allocator.update_and_allocate(**arguments)
    assert sum(map(sum, masked.values())) == budget < 4 * INIT_R


@pytest.mark.peft
def test_guard_changes_no_flag_no_gradient_no_weight_no_config(model: peft.PeftModel) -> None:
    frozen("trunk.0")(model, 0)
    advance(model, 1)
    backward(model, 2, branch=False)
    config = dict(vars(model.peft_config["default"]))
    before = {n: (p.requires_grad, p.grad, p.detach().clone()) for n, p in model.named_parameters()}
    model.base_model.update_and_allocate(2)
    for name, parameter in model.named_parameters():
        requires_grad, grad, value = before[name]
        assert parameter.requires_grad == requires_grad
        assert parameter.grad is grad
        assert torch.equal(parameter, value)
    assert vars(model.peft_config["default"]) == config


@pytest.mark.parametrize(("rest", "more"), [(("a",), {}), ((), {"mode": "b"}), (("a",), {"mode": "b"})])
def test_arguments_that_the_guard_does_not_know_reach_update_ipt(
    model: peft.PeftModel, monkeypatch: pytest.MonkeyPatch, rest: tuple[str, ...], more: dict[str, str]
) -> None:
    given = []

    def update_ipt(self: RankAllocator, model: nn.Module, *rest: Any, **more: Any) -> None:
        given.append((rest, more))

    guard_instead(monkeypatch, update_ipt)
    backward(model, 1)
    model.base_model.rankallocator.update_ipt(model.base_model.model, *rest, **more)
    assert given == [(rest, more)]
