"""Trainings that never call ``update_and_allocate``: one message says so, and only there."""

from __future__ import annotations

import contextlib
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

import needs
import peft
import pytest
import torch
import transformers
from fresh import SUPPORT
from peft.tuners.adalora import RankAllocator
from scenarios import LINEARS, PEFT_VERSION, TOTAL, branches, build, frozen, loss_of, vectors
from torch import multiprocessing  # noqa: F401 - teaches the pickler of processes to send tensors
from trainers import fit

import peft_gradguard

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path


of_today = pytest.mark.skipif(PEFT_VERSION < (0, 18), reason="the trainers of today need a PEFT of today")


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


@of_today
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


@of_today
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


@of_today
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


@of_today
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


@pytest.mark.peft
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


@pytest.mark.peft
@needs.hook_after_accumulation
def test_never_called_is_said_at_exit_of_what_was_trained() -> None:
    program = f"""
import sys; sys.path[:0] = {[str(SUPPORT)]!r}
import peft_gradguard, peft, torch
from scenarios import adalora_config, branches, build, loss_of, vectors
config = adalora_config(**branches().config)
untrained = build(branches())
model = peft.get_peft_model(branches().base(), config, adapter_name="trained")
optimizer = torch.optim.AdamW(model.parameters())
for step in range({TOTAL}):
    loss_of(model, vectors(step), True).backward()
    optimizer.step()
"""
    found = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    said = "adapter 'trained' was trained, but update_and_allocate was never called"
    assert (found.stderr.count(said), found.stderr.count("never called")) == (1, 1)


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


@pytest.mark.peft
@needs.hook_after_accumulation
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


@pytest.mark.peft
@needs.hook_after_accumulation
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


@pytest.mark.peft
@pytest.mark.parametrize("use", [average, reference, loaded, scored_by_hand, one_step])
def test_what_is_no_training_without_calls(
    use: Callable[[peft.PeftModel], None], records: list[logging.LogRecord]
) -> None:
    model = make()
    use(model)
    del model
    gc.collect()
    make()
    assert not never_called(records)


@pytest.mark.peft
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


@pytest.mark.peft
@needs.hook_after_accumulation
@pytest.mark.parametrize("occasion", ["a gradient", "a call"])
def test_what_has_ended_is_said_at_any_occasion(occasion: str, records: list[logging.LogRecord]) -> None:
    ended, other = make(), make()
    train(ended)
    train(other, steps=1)
    del ended
    gc.collect()
    assert not never_called(records)
    if occasion == "a gradient":
        other(torch.randn(2, 4)).pow(2).mean().backward()
    else:
        other.base_model.update_and_allocate(1)
    assert len(never_called(records)) == 1


@pytest.mark.peft
@needs.hook_after_accumulation
@pytest.mark.parametrize("ranks", [1, 2, 3])
def test_an_adapter_of_which_the_ranks_were_taken_by_hand(ranks: int, records: list[logging.LogRecord]) -> None:
    model = make()
    inputs = torch.randn(2, 4, requires_grad=True)
    model(inputs).pow(2).mean().backward()
    for name, parameter in model.named_parameters():
        for factor, shape in {"A": (ranks, 4), "B": (4, ranks), "E": (ranks, 1)}.items():
            if f".lora_{factor}." in name:
                parameter.grad, parameter.data = None, torch.ones(shape)
    model(inputs).pow(2).mean().backward()
    del model
    gc.collect()
    make()
    assert bool(never_called(records)) is (ranks == 2)


@pytest.mark.peft
@needs.hook_after_accumulation
def test_backwards_in_inference_mode(records: list[logging.LogRecord]) -> None:
    model = make()
    optimizer = optimizer_of(model)
    for _ in range(3):
        loss = model(torch.randn(2, 4)).pow(2).mean()
        with torch.inference_mode():
            loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    del model, loss, optimizer
    gc.collect()
    make()
    assert len(never_called(records)) == 1


@pytest.mark.peft
def test_a_new_allocator_for_an_adapter_that_is_frozen(records: list[logging.LogRecord]) -> None:
    model = make()
    tuner = model.base_model.requires_grad_(False)
    tuner.rankallocator = RankAllocator(tuner.model, tuner.peft_config["default"], "default")
    del model, tuner
    gc.collect()
    make()
    assert not never_called(records)


@pytest.mark.peft
@pytest.mark.parametrize("way", ["meta", "subclass"])
def test_what_cannot_be_looked_at_was_not_trained(way: str, records: list[logging.LogRecord]) -> None:
    class Subclass(torch.Tensor):
        pass

    with torch.device("meta" if way == "meta" else "cpu"):
        model = make()
    for _ in range(2 if way == "meta" else 0):
        model(torch.randn(2, 4, device="meta")).pow(2).mean().backward()
    if way == "subclass":
        for name, parameter in model.named_parameters():
            if ".lora_E." in name:
                parameter.data = parameter.data.as_subclass(Subclass)
    del model
    gc.collect()
    make()
    assert not [record for record in records if record.exc_info or "never called" in record.getMessage()]
