"""Methods that somebody assigns in place of the guarded ones: it trains right, and one message says so."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
import torch
import transformers
from peft.tuners.adalora import AdaLoraModel, RankAllocator
from scenarios import FINALISING, PEFT_VERSION, TARGET_R, branches, build, vectors
from trainers import Callback, assert_adapted, fit

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    import peft

pytestmark = pytest.mark.skipif(PEFT_VERSION < (0, 18), reason="the trainers of today need a PEFT of today")


@pytest.fixture
def model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> peft.PeftModel:
    monkeypatch.chdir(tmp_path)
    return build(branches())


both = pytest.mark.parametrize("accumulation", [1, 2])


@both
@pytest.mark.parametrize("extra_zero_grad", [False, True], ids=["", "and zero_grad elsewhere"])
def test_zero_grad_wrapped_and_methods_assigned(
    model: peft.PeftModel,
    accumulation: int,
    extra_zero_grad: bool,
    said: Callable[[], list[str]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    mask, forward = RankAllocator.mask_to_budget.__wrapped__, AdaLoraModel.forward
    monkeypatch.setattr(RankAllocator, "mask_to_budget", lambda self, model, budget: mask(self, model, budget))
    monkeypatch.setattr(AdaLoraModel, "forward", lambda self, *args, **kwargs: forward(self, *args, **kwargs))
    zero_grad, calls = model.zero_grad, []

    def call_first(*args: Any, **kwargs: Any) -> None:
        calls.append(1)
        # Trainer asks for zeroed gradients once before the first step, too.
        step = trainer_state.global_step + 1
        if len(calls) > 1:
            model.base_model.update_and_allocate(step)
        zero_grad(*args, **kwargs)

    class State(transformers.TrainerCallback):
        def on_step_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            nonlocal trainer_state
            trainer_state = state
            if extra_zero_grad and state.global_step == 3:
                model.zero_grad()

    trainer_state: Any = transformers.TrainerState()
    monkeypatch.setattr(model, "zero_grad", call_first)
    fit(model, accumulation, State())
    assert_adapted(model)
    assert "RankAllocator.mask_to_budget was assigned" in said()[0]
    assert len(said()) == 1 + extra_zero_grad


def zeros_where_there_is_no_gradient(self: RankAllocator, model: Any) -> None:
    for name, parameter in model.named_parameters():
        if "lora_" in name and self.adapter_name in name:
            for scores in (self.ipt, self.exp_avg_ipt, self.exp_avg_unc):
                scores.setdefault(name, torch.zeros_like(parameter))
            with torch.no_grad():
                gradient = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
                self.ipt[name] = (parameter * gradient).abs().detach()
                self.exp_avg_ipt[name] = self.beta1 * self.exp_avg_ipt[name] + (1 - self.beta1) * self.ipt[name]
                change = (self.ipt[name] - self.exp_avg_ipt[name]).abs()
                self.exp_avg_unc[name] = self.beta2 * self.exp_avg_unc[name] + (1 - self.beta2) * change


@both
@pytest.mark.parametrize("event", ["on_optimizer_step", "on_step_end"])
def test_update_ipt_assigned(
    model: peft.PeftModel, accumulation: int, event: str, said: Callable[[], list[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(RankAllocator, "update_ipt", zeros_where_there_is_no_gradient)
    fit(model, accumulation, Callback(model, event, ahead=event == "on_optimizer_step"))
    assert_adapted(model)
    assert "RankAllocator.update_ipt was assigned" in said()[0]
    assert len(said()) == 1 + (event == "on_step_end")


def test_method_assigned_to_one_allocator(model: peft.PeftModel, said: Callable[[], list[str]]) -> None:
    allocator = model.base_model.rankallocator
    allocator.update_ipt = zeros_where_there_is_no_gradient.__get__(allocator)
    fit(model, 1, Callback(model, "on_optimizer_step", ahead=1))
    assert_adapted(model)
    assert ["RankAllocator.update_ipt was assigned" in message for message in said()] == [True]


def test_finalising_step_needs_no_gradient_with_a_method_assigned_either(
    model: peft.PeftModel, said: Callable[[], list[str]]
) -> None:
    allocator = model.base_model.rankallocator
    allocator.update_ipt = zeros_where_there_is_no_gradient.__get__(allocator)
    for step in range(1, FINALISING + 1):
        model.base_model(**vectors(step)).loss.backward()
        if step == FINALISING:
            model.zero_grad()
        model.base_model.update_and_allocate(step)
    assert ["RankAllocator.update_ipt was assigned" in message for message in said()] == [True]
    assert sum(map(sum, model.peft_config["default"].rank_pattern.values())) == 4 * TARGET_R


@pytest.mark.parametrize("calls_super", [False, True])
def test_subclass_that_overrides_update_ipt(
    model: peft.PeftModel, calls_super: bool, said: Callable[[], list[str]]
) -> None:
    class Mine(RankAllocator):
        def update_ipt(self, model: Any) -> None:
            if calls_super:
                super().update_ipt(model)
            else:
                zeros_where_there_is_no_gradient(self, model)

    config = model.peft_config["default"]
    model.base_model.rankallocator = Mine(model.base_model.model, config, "default")
    fit(model, 1, Callback(model, "on_optimizer_step", ahead=1))
    assert_adapted(model)
    assert said() == []
