"""Trainings that never call ``update_and_allocate``: one message says so, and only there."""

from __future__ import annotations

import contextlib
import gc
import subprocess
import sys
from typing import TYPE_CHECKING, Any

import pytest
import torch
import transformers
from fresh import SUPPORT
from scenarios import LINEARS, PEFT_VERSION, TOTAL, branches, build, frozen, loss_of, vectors
from trainers import fit

import peft_gradguard

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    import peft

pytestmark = pytest.mark.skipif(PEFT_VERSION < (0, 18), reason="the trainers of today need a PEFT of today")


class OnlyIfThereIsAPattern(transformers.TrainerCallback):
    def __init__(self, model: peft.PeftModel) -> None:
        self.model = model

    def on_optimizer_step(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if self.model.peft_config["default"].rank_pattern is not None:
            self.model.base_model.update_and_allocate(state.global_step + 1)


@pytest.fixture
def model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> peft.PeftModel:
    monkeypatch.chdir(tmp_path)
    return build(branches())


both = pytest.mark.parametrize("accumulation", [1, 2])


@both
@pytest.mark.parametrize("callbacks", [[OnlyIfThereIsAPattern], []], ids=["only if there is a pattern", "never"])
def test_never_called(
    model: peft.PeftModel, accumulation: int, callbacks: list[Any], said: Callable[[], list[str]]
) -> None:
    fit(model, accumulation, *(callback(model) for callback in callbacks))
    assert said() == []
    # What ends with the interpreter in a script ends here with the allocator.
    del model.base_model.rankallocator
    gc.collect()
    # It is said at the next occasion, not from inside the garbage collection.
    build(branches())
    assert len(said()) == 1
    assert "update_and_allocate was never called" in said()[0]


def test_never_called_where_no_rank_could_be_pruned(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, said: Callable[[], list[str]]
) -> None:
    """With E frozen AdaLoRA trains as plain LoRA does, and needs no calls."""
    monkeypatch.chdir(tmp_path)
    # With E at zero, as PEFT starts it, A and B would have gradients of zero.
    model = build(branches(config={"target_modules": LINEARS, "init_lora_weights": False}))
    frozen("lora_E")(model, 0)
    fit(model, 1)
    del model.base_model.rankallocator
    gc.collect()
    build(branches())
    assert said() == []


def test_adapter_that_was_only_loaded_was_not_trained(
    model: peft.PeftModel, tmp_path: Path, said: Callable[[], list[str]]
) -> None:
    values = {name: torch.ones_like(value) for name, value in model.state_dict().items() if "lora_E" in name}
    model.load_state_dict(values, strict=False)
    # Somebody else's training goes on meanwhile.
    other = torch.nn.Parameter(torch.ones(1))
    for _ in range(2):
        other.grad = torch.ones(1)
        torch.optim.SGD([other], 0.1).step()
    del model.base_model.rankallocator
    gc.collect()
    build(branches())
    assert said() == []


def test_trained_after_something_was_loaded(model: peft.PeftModel, said: Callable[[], list[str]]) -> None:
    model.load_state_dict({name: value.clone() for name, value in model.state_dict().items()})
    optimizer = torch.optim.AdamW(model.parameters())
    for step in (1, 2):
        loss_of(model, vectors(step), True).backward()
        optimizer.step()
    del model.base_model.rankallocator
    gc.collect()
    build(branches())
    assert ["update_and_allocate was never called" in message for message in said()] == [True]


@pytest.mark.parametrize("switch", ["disabled", "disable"])
def test_calls_made_while_the_guard_is_off_are_not_missed(
    model: peft.PeftModel, switch: str, said: Callable[[], list[str]]
) -> None:
    optimizer = torch.optim.AdamW(model.parameters())
    off: Any = peft_gradguard.disabled() if switch == "disabled" else contextlib.nullcontext(peft_gradguard.disable())
    with off:
        for step in (1, 2):
            loss_of(model, vectors(step), True).backward()
            optimizer.step()
            model.base_model.update_and_allocate(step)
            optimizer.zero_grad()
    peft_gradguard.enable()
    del model.base_model.rankallocator
    gc.collect()
    build(branches())
    assert said() == []


@pytest.mark.parametrize(("steps", "warned"), [(0, False), (TOTAL, True)])
def test_never_called_is_said_at_exit(steps: int, warned: bool) -> None:
    program = f"""
import sys; sys.path[:0] = {[str(SUPPORT)]!r}
import peft_gradguard, torch
from scenarios import branches, build, loss_of, vectors
model = build(branches())
optimizer = torch.optim.AdamW(model.parameters())
for step in range({steps}):
    loss_of(model, vectors(step), True).backward()
    optimizer.step()
"""
    found = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert ("update_and_allocate was never called" in found.stderr) == warned
