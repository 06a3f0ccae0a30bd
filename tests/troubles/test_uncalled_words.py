"""Trainings that never call ``update_and_allocate``, and what is none of them."""

from __future__ import annotations

import copy
import gc
import io
import logging
import logging.handlers
import pickle
import queue
import subprocess
import sys
import warnings
from multiprocessing.reduction import ForkingPickler
from typing import TYPE_CHECKING, Any

import peft
import pytest
import torch
from torch import multiprocessing  # noqa: F401 - teaches the pickler of processes to send tensors

if TYPE_CHECKING:
    from collections.abc import Callable

pytestmark = pytest.mark.peft


def make() -> peft.PeftModel:
    base = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.Linear(4, 4))
    config = peft.AdaLoraConfig(target_modules=["0", "1"], init_r=2, target_r=1, tinit=2, tfinal=2, total_step=50)
    return peft.get_peft_model(base, config)


def optimizer_of(model: peft.PeftModel) -> torch.optim.Optimizer:
    return torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)


def train(model: peft.PeftModel, steps: int = 3, call: Callable[[int], None] = lambda _: None) -> None:
    optimizer = optimizer_of(model)
    for step in range(1, steps + 1):
        model(torch.randn(2, 4)).pow(2).mean().backward()
        optimizer.step()
        call(step)
        optimizer.zero_grad()


def never_called(records: list[logging.LogRecord]) -> list[str]:
    return [r.getMessage() for r in records if "never called" in r.getMessage()]


def test_training_without_calls_is_said_once_at_the_next_occasion(records: list[logging.LogRecord]) -> None:
    model = make()
    train(model)
    assert not never_called(records)
    del model
    gc.collect()
    train(make(), steps=1)
    gc.collect()
    said = never_called(records)
    assert len(said) == 1
    assert "adapter 'default' was trained, but update_and_allocate was never called" in said[0]
    assert "after the optimizer's step and before zero_grad" in said[0]


def test_training_without_calls_is_said_when_the_interpreter_exits() -> None:
    code = """
import peft_gradguard, torch, peft
base = torch.nn.Sequential(torch.nn.Linear(4, 4))
model = peft.get_peft_model(base, peft.AdaLoraConfig(target_modules=["0"], init_r=2, target_r=1, total_step=50))
optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
for _ in range(3):
    model(torch.randn(2, 4)).pow(2).mean().backward(); optimizer.step(); optimizer.zero_grad()
"""
    ran = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    assert ran.stderr.count("update_and_allocate was never called") == 1


def test_nothing_is_said_from_inside_a_garbage_collection(records: list[logging.LogRecord]) -> None:
    """A handler that sets one off while it holds a lock of its own would wait for itself for ever."""

    class Collecting(queue.Queue):  # type: ignore[type-arg]
        def _put(self, item: Any) -> None:
            gc.collect()
            super()._put(item)

    model = make()
    train(model)
    model.itself = model
    del model
    logger, handler = logging.getLogger("of the application"), logging.handlers.QueueHandler(Collecting())
    logging.getLogger().addHandler(handler)
    try:
        logger.warning("hello")
    finally:
        logging.getLogger().removeHandler(handler)
    assert not never_called(records)
    make()
    assert len(never_called(records)) == 1


def average(model: peft.PeftModel) -> None:
    other = make()
    optimizer = optimizer_of(model)
    for step in range(1, 5):
        model(torch.randn(2, 4)).pow(2).mean().backward()
        optimizer.step()
        model.base_model.update_and_allocate(step)
        optimizer.zero_grad()
        with torch.no_grad():
            for one, of_model in zip(other.parameters(), model.parameters(), strict=True):
                one.lerp_(of_model, 0.5)


def reference(model: peft.PeftModel) -> None:
    """Gradients flow through it, and no optimizer has it."""
    inputs = torch.randn(2, 4, requires_grad=True)
    optimizer = torch.optim.SGD([inputs], lr=0.1)
    for _ in range(4):
        model(inputs).pow(2).mean().backward()
        optimizer.step()


def loaded(model: peft.PeftModel) -> None:
    other = make()
    train(other, call=other.base_model.update_and_allocate)
    model.load_state_dict(other.state_dict())
    with torch.no_grad():
        model(torch.randn(2, 4))


def scored_by_hand(model: peft.PeftModel) -> None:
    train(model, call=lambda _: model.base_model.rankallocator.update_ipt(model.base_model.model))


def one_step(model: peft.PeftModel) -> None:
    train(model, steps=1)


def guard_off(model: peft.PeftModel) -> None:
    import peft_gradguard

    with peft_gradguard.disabled():
        train(model, call=model.base_model.update_and_allocate)


@pytest.mark.parametrize("use", [average, reference, loaded, scored_by_hand, one_step, guard_off])
def test_what_is_no_training_without_calls(
    use: Callable[[peft.PeftModel], None], records: list[logging.LogRecord]
) -> None:
    model = make()
    use(model)
    del model
    gc.collect()
    make()
    assert not never_called(records)


def test_a_watched_model_is_copied_and_pickled_without_a_warning() -> None:
    model = make()
    train(model, steps=2)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        copy.deepcopy(model)
        pickle.dumps(model)
        pickle.dumps(dict(model.named_parameters()))
        # What a process that is spawned is sent.
        ForkingPickler(io.BytesIO()).dump(list(model.parameters()))
