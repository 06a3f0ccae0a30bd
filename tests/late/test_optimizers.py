"""The two hooks on optimizers, never removed and harmless; and who listens: nobody in the documented order."""

from __future__ import annotations

import gc
import subprocess
import sys
import threading
import weakref
from typing import TYPE_CHECKING, Any

import peft
import pytest
import torch
from scenarios import FINALISING, TOTAL, branches, build, frozen, loss_of, sometimes, vectors
from steps import late_step
from torch.optim import optimizer as torchs

from peft_gradguard.late.optimizers import StepListener, listen, listen_no_more

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator


@pytest.mark.peft
@pytest.mark.parametrize("frozen_part", ["", "trunk.0"])
def test_loop_in_the_documented_order_listens_to_no_optimizer(
    model: peft.PeftModel, optimizer: torch.optim.Optimizer, listening: Callable[[], int], frozen_part: str
) -> None:
    if frozen_part:
        frozen(frozen_part)(model, 0)
    for step in range(1, TOTAL + 1):
        loss_of(model, sometimes(step), False).backward()
        gradient = weakref.ref(next(p.grad for p in model.parameters() if p.grad is not None))
        optimizer.step()
        model.base_model.update_and_allocate(step)
        optimizer.zero_grad()
        assert gradient() is None
        assert not listening()


class Collecting(list[Any]):
    """Parameter groups that bring a garbage collection on whoever looks at them."""

    def __iter__(self) -> Iterator[Any]:
        gc.collect()
        return super().__iter__()


@pytest.mark.peft
@pytest.mark.parametrize("steps", [0, 1, 2])
def test_model_that_goes_away_amid_the_hooks_of_another_one(steps: int, listening: Callable[[], int]) -> None:
    gc.disable()
    try:
        gone, model = build(branches()), build(branches())
        for one, count in ((gone, steps), (model, 1)):
            optimizer = torch.optim.AdamW(one.parameters(), lr=1e-2)
            for step in range(1, count + 1):
                late_step(one, optimizer, step)
        alive = weakref.ref(gone.base_model.rankallocator)
        gone.holder = [gone]
        del gone, one
        optimizer.param_groups = Collecting(optimizer.param_groups)
        loss_of(model, vectors(2), False).backward()
        assert alive() is not None
        optimizer.step()
        assert alive() is None
        model.base_model.update_and_allocate(2)
        model.base_model.update_and_allocate(FINALISING)
        assert not listening()
    finally:
        gc.enable()


def make(modules: int = 2) -> peft.PeftModel:
    base = torch.nn.Sequential(*(torch.nn.Linear(4, 4) for _ in range(modules)))
    names = [str(index) for index in range(modules)]
    config = peft.AdaLoraConfig(target_modules=names, init_r=2, target_r=1, tinit=2, tfinal=2, total_step=50)
    return peft.get_peft_model(base, config)


def hooks() -> tuple[list[Any], list[Any]]:
    return list(torchs._global_optimizer_pre_hooks.values()), list(torchs._global_optimizer_post_hooks.values())


class Listener(StepListener):
    def __init__(self) -> None:
        super().__init__()
        self.heard: list[str] = []

    def before_step(self, optimizer: Any, held: Any, has_closure: bool) -> None:
        self.heard.append(f"before {len(held)}{' with a closure' if has_closure else ''}")

    def after_step(self, optimizer: Any, held: Any, has_closure: bool) -> None:
        self.heard.append(f"after {len(held)}")


def test_importing_peft_registers_one_hook_of_each_kind() -> None:
    code = """
import peft_gradguard, torch
from torch.optim import optimizer as torchs
both = torchs._global_optimizer_pre_hooks, torchs._global_optimizer_post_hooks
assert [len(hooks) for hooks in both] == [0, 0]
import peft
from peft.tuners.adalora import RankAllocator
assert [len(hooks) for hooks in both] == [1, 1]
peft_gradguard.enable(); peft_gradguard.disable(); peft_gradguard.enable()
assert [len(hooks) for hooks in both] == [1, 1]
"""
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.parametrize("to_none", [True, False])
def test_hooks_do_not_come_or_go_in_a_training(to_none: bool) -> None:
    before = hooks()
    for _ in range(2):
        model = make()
        optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
        for step in range(1, 5):
            model(torch.randn(2, 4)).pow(2).mean().backward()
            optimizer.step()
            optimizer.zero_grad(set_to_none=to_none)
            model.base_model.update_and_allocate(step)
            assert hooks() == before
        del model, optimizer
        gc.collect()
    assert hooks() == before


def test_a_listener_hears_of_steps_on_its_parameters_only() -> None:
    mine, others = torch.nn.Linear(2, 2), torch.nn.Linear(2, 2)
    listener = Listener()
    listener.watch(mine.parameters())
    listen(listener)
    both = torch.optim.SGD([*mine.parameters(), *others.parameters()], lr=0.1)
    both.step()
    torch.optim.SGD(others.parameters(), lr=0.1).step()
    torch.optim.SGD([mine.weight], lr=0.1).step(lambda: 0.0)
    listen_no_more(listener)
    both.step()
    assert listener.heard == ["before 2", "after 2", "before 1 with a closure", "after 1"]


@pytest.mark.fails_in_silence
def test_an_error_in_a_listener_stops_no_step() -> None:
    class Broken(Listener):
        def before_step(self, *_: Any) -> None:
            raise KeyError("broken")

    listener = Broken()
    layer = torch.nn.Linear(2, 2)
    listener.watch(layer.parameters())
    listen(listener)
    layer(torch.ones(2)).sum().backward()
    before = layer.weight.detach().clone()
    torch.optim.SGD(layer.parameters(), lr=0.1).step()
    listen_no_more(listener)
    assert not torch.equal(layer.weight, before)


def test_threads_train_in_time_and_late_beside_each_other() -> None:
    errors: list[BaseException] = []

    def train(number: int) -> None:
        try:
            for trial in range(12):
                model = make(6)
                optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=1e-3)
                for step in range(1, 5):
                    model(torch.randn(2, 4)).pow(2).mean().backward()
                    optimizer.step()
                    if (number + trial) % 2:
                        optimizer.zero_grad(set_to_none=False)
                    model.base_model.update_and_allocate(step)
                    optimizer.zero_grad()
        except BaseException as error:
            errors.append(error)

    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        threads = [threading.Thread(target=train, args=(number,)) for number in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    finally:
        sys.setswitchinterval(interval)
    assert not errors


def test_models_that_go_away_in_the_middle_of_somebody_elses_step() -> None:
    """A hook of the user's sets off a garbage collection, which takes models away that were never called."""
    handle = torchs.register_optimizer_step_pre_hook(lambda *_: gc.collect() and None)
    try:
        layer = torch.nn.Linear(2, 2)
        optimizer = torch.optim.SGD(layer.parameters(), lr=0.1)
        for _ in range(10):
            trial = make()
            trial.itself = trial
            del trial
            layer(torch.ones(2)).sum().backward()
            optimizer.step()
    finally:
        handle.remove()
