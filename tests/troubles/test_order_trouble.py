"""Calls that come before the optimizer's step, and the orders that only look like it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import needs
import pytest
import torch
from situations import TOTAL, call, listening, loss_of, loss_without, make, optimizer_of, train

import peft_gradguard

if TYPE_CHECKING:
    import logging
    from collections.abc import Callable

pytestmark = pytest.mark.peft

NAMED = "is called before the optimizer's step"


def named(said: Callable[[], list[str]]) -> list[str]:
    return [text for text in said() if NAMED in text]


@pytest.mark.parametrize("order", ["before", "inside"])
@pytest.mark.parametrize("zero_grad", [{}, {"set_to_none": False}])
def test_call_before_the_step_is_named_once(
    said: Callable[[], list[str]], order: str, zero_grad: dict[str, bool]
) -> None:
    model, before = make(), listening()
    train(model, order=order, **zero_grad)
    assert len(named(said)) == 1
    assert "after the optimizer's step and before zero_grad; in a Trainer, from on_optimizer_step" in named(said)[0]
    assert named(said)[0] in peft_gradguard.report(model).adapters[0].advice
    assert listening() == before


@pytest.mark.parametrize("order", ["in time", "late"])
@pytest.mark.parametrize("zero_grad", [{}, {"set_to_none": False}])
def test_other_orders_are_not(said: Callable[[], list[str]], order: str, zero_grad: dict[str, bool]) -> None:
    train(make(), order=order, **zero_grad)
    assert not named(said)


def test_it_listens_for_two_steps_only(said: Callable[[], list[str]]) -> None:
    model = make()
    optimizer, before = optimizer_of(model), len(listening())
    heard = []
    for step in range(1, TOTAL + 1):
        train(model, [step], optimizer=optimizer)
        heard.append(len(listening()) - before)
    assert heard == [0, 0, 1, *[0] * (TOTAL - 3)]


@needs.grad_scaler
@pytest.mark.parametrize("clip", [False, True])
def test_scaler_that_unscales_after_the_call(said: Callable[[], list[str]], clip: bool) -> None:
    model = make()
    optimizer, scaler = optimizer_of(model), torch.amp.GradScaler("cpu", init_scale=2.0**4)
    for step in range(1, 9):
        scaler.scale(loss_of(model, step)).backward()
        call(model, step)
        if clip:
            scaler.unscale_(optimizer)
            torch.nn.utils.clip_grad_norm_(model.parameters(), 0.1)
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
    assert len(named(said)) == 1


@needs.grad_scaler
@pytest.mark.parametrize("skipped", [[], [3, 4, 5], range(1, 7)])
def test_scaler_in_time(said: Callable[[], list[str]], skipped: list[int]) -> None:
    model = make()
    optimizer, scaler = optimizer_of(model), torch.amp.GradScaler("cpu", init_scale=2.0**4)
    for step in range(1, TOTAL + 1):
        scaler.scale(loss_of(model, step) * (float("inf") if step in skipped else 1.0)).backward()
        scaler.unscale_(optimizer)
        torch.nn.utils.clip_grad_norm_(model.parameters(), 0.1)
        scaler.step(optimizer)
        scaler.update()
        call(model, step)
        optimizer.zero_grad()
    assert not named(said)


@pytest.mark.parametrize("calls", ["at each micro-batch", "after the step"])
@pytest.mark.parametrize("zero_grad", [{}, {"set_to_none": False}])
def test_accumulated_gradients_in_time(said: Callable[[], list[str]], calls: str, zero_grad: dict[str, bool]) -> None:
    model = make()
    optimizer = optimizer_of(model)
    for step in range(1, TOTAL + 1):
        for batch in range(3):
            (loss_of(model, 3 * step + batch) / 3).backward()
            if batch == 2:
                optimizer.step()
            if batch == 2 or calls == "at each micro-batch":
                call(model, step)
        optimizer.zero_grad(**zero_grad)
    assert not named(said)


@pytest.mark.parametrize("zero_grad", [{}, {"set_to_none": False}])
def test_call_at_each_micro_batch_before_the_step(said: Callable[[], list[str]], zero_grad: dict[str, bool]) -> None:
    model = make()
    optimizer = optimizer_of(model)
    for step in range(1, TOTAL + 1):
        for batch in range(3):
            (loss_of(model, 3 * step + batch) / 3).backward()
            call(model, step)
        optimizer.step()
        optimizer.zero_grad(**zero_grad)
    assert len(named(said)) == 1


def test_calls_before_and_after_the_step_leave_the_mask(said: Callable[[], list[str]]) -> None:
    model = make()
    optimizer = optimizer_of(model)
    for step in range(1, TOTAL + 1):
        loss_of(model, step).backward()
        call(model, step)
        optimizer.step()
        call(model, step)
        optimizer.zero_grad()
    assert not named(said)


@pytest.mark.parametrize("kind", ["LBFGS", "SGD"])
def test_closures_in_time(said: Callable[[], list[str]], kind: str) -> None:
    model = make()
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.LBFGS(parameters, max_iter=3) if kind == "LBFGS" else torch.optim.SGD(parameters, lr=0.1)
    for step in range(1, TOTAL + 1):

        def closure(step: int = step) -> torch.Tensor:
            optimizer.zero_grad()
            loss = loss_of(model, step)
            loss.backward()
            return loss

        optimizer.step(closure)
        call(model, step)
    assert not named(said)


@pytest.mark.parametrize(("before", "times"), [(True, 1), (False, 0)])
@pytest.mark.parametrize("clip", [False, True])
@pytest.mark.parametrize("zero_grad", [{}, {"set_to_none": False}])
def test_closure_that_computes_nothing(
    said: Callable[[], list[str]], before: bool, times: int, clip: bool, zero_grad: dict[str, bool]
) -> None:
    # Lightning gives one to every step of a manual optimization.
    model = make()
    optimizer = optimizer_of(model)
    for step in range(1, TOTAL + 1):
        loss_of(model, step).backward()
        if before:
            call(model, step)
        if clip:
            torch.nn.utils.clip_grad_norm_(model.parameters(), 0.1)
        optimizer.step(lambda: None)
        if not before:
            call(model, step)
        optimizer.zero_grad(**zero_grad)
    assert len(named(said)) == times


@pytest.mark.parametrize("buffers", [False, True])
def test_gradients_written_to_after_the_step(said: Callable[[], list[str]], buffers: bool) -> None:
    # In time: somebody measures the gradients by clipping to infinity, which writes to them. They stay the same
    # tensors, as zero_grad writes zeros, or as they are copied into buffers.
    model, before = make(), listening()
    optimizer = optimizer_of(model)
    parameters = optimizer.param_groups[0]["params"]
    kept = [torch.zeros_like(parameter) for parameter in parameters]
    for step in range(1, TOTAL + 1):
        if buffers:
            found = torch.autograd.grad(loss_of(model, step), parameters)
            for parameter, buffer, gradient in zip(parameters, kept, found, strict=True):
                parameter.grad = buffer.copy_(gradient)
        else:
            loss_of(model, step).backward()
        optimizer.step()
        torch.nn.utils.clip_grad_norm_(parameters, float("inf"))
        call(model, step)
        optimizer.zero_grad(set_to_none=False)
    assert not named(said)
    assert listening() == before


@pytest.mark.parametrize("rests", ["first", "second"])
def test_layer_that_rests_where_gradients_are_written_to(said: Callable[[], list[str]], rests: str) -> None:
    model = make()
    optimizer = optimizer_of(model)
    for step in range(1, TOTAL + 1):
        loss_without(model, step, None if step % 2 else rests).backward()
        optimizer.step()
        torch.nn.utils.clip_grad_norm_(optimizer.param_groups[0]["params"], float("inf"))
        call(model, step)
        optimizer.zero_grad(set_to_none=False)
    assert not named(said)


def test_call_from_a_hook_after_the_step(said: Callable[[], list[str]]) -> None:
    model = make()
    optimizer, steps = optimizer_of(model), iter(range(1, TOTAL + 1))
    optimizer.register_step_post_hook(lambda *_: call(model, next(steps)))
    train(model, range(1, TOTAL + 1), optimizer=optimizer, allocate=lambda model, step: None)
    assert not named(said)


class Decays(torch.optim.Optimizer):
    """Lets an optimizer step, and makes all weights smaller after it; pruned ranks stay zero."""

    def __init__(self, inner: torch.optim.Optimizer) -> None:
        self.inner = inner
        super().__init__(inner.param_groups[0]["params"], {})

    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        self.inner.step(closure)
        with torch.no_grad():
            for parameter in self.inner.param_groups[0]["params"]:
                self.change(parameter)

    def change(self, parameter: torch.nn.Parameter) -> None:
        parameter.mul_(0.99)


class LooksAhead(Decays):
    """Goes on half the way from where it was, which brings pruned ranks back."""

    def __init__(self, inner: torch.optim.Optimizer) -> None:
        super().__init__(inner)
        self.slow = {p: p.detach().clone() for p in inner.param_groups[0]["params"]}

    def change(self, parameter: torch.nn.Parameter) -> None:
        parameter.copy_(self.slow[parameter].lerp_(parameter.detach(), 0.5))


@pytest.mark.parametrize(("kind", "times"), [(Decays, 0), (LooksAhead, 1)])
def test_call_within_a_step_around_the_optimizers(
    said: Callable[[], list[str]], kind: type[Decays], times: int
) -> None:
    model, now = make(), [0]
    for name, parameter in model.named_parameters():
        if ".lora_E." in name:
            torch.nn.init.constant_(parameter, 0.5)
    inner = optimizer_of(model)
    inner.register_step_post_hook(lambda *_: call(model, now[0]))

    def begin(model: Any, step: int) -> None:
        now[0] = step

    train(model, optimizer=kind(inner), before=begin, allocate=lambda model, step: None)
    assert len(named(said)) == times


def test_several_optimizers(said: Callable[[], list[str]]) -> None:
    model = make()
    optimizers = [optimizer_of(model, "first"), optimizer_of(model, "second")]
    for step in range(1, TOTAL + 1):
        loss_of(model, step).backward()
        for optimizer in optimizers:
            optimizer.step()
        call(model, step)
        for optimizer in optimizers:
            optimizer.zero_grad()
    assert not named(said)


def test_optimizer_that_writes_by_data(said: Callable[[], list[str]]) -> None:
    class ByData(torch.optim.Optimizer):
        def __init__(self, parameters: Any) -> None:
            super().__init__(parameters, {})

        def step(self, closure: Callable[[], None] | None = None) -> None:
            if closure is not None:
                closure()
            for parameter in self.param_groups[0]["params"]:
                if parameter.grad is not None:
                    parameter.data.add_(parameter.grad, alpha=-0.1)

    for order, times in (("in time", 0), ("before", 1), ("inside", 1)):
        model = make()
        train(model, order=order, optimizer=ByData([p for p in model.parameters() if p.requires_grad]))
        assert len(named(said)) - times == 0 or order == "inside"
    assert len(named(said)) == 2


def test_parameters_and_gradients_may_be_swapped(said: Callable[[], list[str]]) -> None:
    """``Module.to`` swaps both where torch is told to; it refuses tensors that somebody knows weakly."""
    future = pytest.importorskip("torch.__future__")
    if not hasattr(future, "set_swap_module_params_on_conversion"):
        pytest.skip("this torch swaps no parameters")
    before = future.get_swap_module_params_on_conversion()
    future.set_swap_module_params_on_conversion(True)
    try:
        train(make(), before=lambda model, step: model.to("cpu"), set_to_none=False)
    finally:
        future.set_swap_module_params_on_conversion(before)
    assert not named(said)


@pytest.mark.parametrize(("undecided", "times"), [(8, 1), (9, 0)])
def test_it_is_left_open_after_some_calls(said: Callable[[], list[str]], undecided: int, times: int) -> None:
    """Somebody puts another gradient in the place of each that a step has used, so that nothing can be told."""
    model = make(total_step=40)
    optimizer = optimizer_of(model)
    for step in range(1, 31):
        loss_of(model, step).backward()
        if step > undecided + 2:
            call(model, step)
        optimizer.step()
        if step <= undecided + 2:
            for parameter in optimizer.param_groups[0]["params"]:
                parameter.grad = parameter.grad.clone()
            call(model, step)
        optimizer.zero_grad()
    assert len(named(said)) == times


@pytest.mark.parametrize("order", ["in time", "late", "before"])
def test_gradients_that_torch_does_not_count_writes_of(records: list[logging.LogRecord], order: str) -> None:
    model = make()
    optimizer = optimizer_of(model)

    def by_hand(model: Any, step: int) -> torch.Tensor:
        loss = loss_of(model, step)
        found = torch.autograd.grad(loss, optimizer.param_groups[0]["params"])
        with torch.inference_mode():
            for parameter, gradient in zip(optimizer.param_groups[0]["params"], found, strict=True):
                parameter.grad = gradient.clone()
        return torch.zeros(1, requires_grad=True)

    train(model, order=order, optimizer=optimizer, loss=by_hand)
    assert not [record for record in records if record.exc_info]
