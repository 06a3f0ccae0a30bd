"""Two optimizers, one of which is cleared before the call: what it trains is never ranked, or loses its ranks."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
import torch
from situations import FINAL, TOTAL, call, listening, loss_of, loss_without, make, optimizer_of, train, train_with_two

import peft_gradguard

if TYPE_CHECKING:
    from collections.abc import Callable

pytestmark = pytest.mark.peft

NAMED = "AdaLoRA never sees gradients that an optimizer uses"


def named(said: Callable[[], list[str]]) -> list[str]:
    return [text for text in said() if NAMED in text]


@pytest.mark.parametrize("zero_grad", [{}, {"set_to_none": False}])
@pytest.mark.parametrize("early", [True, False])
def test_first_of_two_optimizers_cleared_before_the_call(
    said: Callable[[], list[str]], zero_grad: dict[str, bool], early: bool
) -> None:
    model = make()
    train_with_two(model, early=early, **zero_grad)
    assert len(named(said)) == early
    if early:
        assert "(adapter 'default', step 3)" in named(said)[0]
        gone = "first.lora_E.default is" if zero_grad else "first.lora_A.default and 2 more are"
        assert f"those of {gone} gone before each call" in named(said)[0]
        assert "before the first zero_grad" in named(said)[0]
        assert named(said)[0] in peft_gradguard.report(model).adapters[0].advice


@pytest.mark.parametrize("rests", [range(1, 8), range(1, TOTAL + 1), range(2, TOTAL, 2)])
@pytest.mark.parametrize("zero_grad", [{}, {"set_to_none": False}])
def test_layer_that_rests_is_no_such_case(
    said: Callable[[], list[str]], rests: range, zero_grad: dict[str, bool]
) -> None:
    train(make(), loss=lambda model, step: loss_without(model, step, "first" if step in rests else None), **zero_grad)
    assert not named(said)


def test_layer_in_some_micro_batches_only(said: Callable[[], list[str]]) -> None:
    model = make()
    optimizer = optimizer_of(model)
    for step in range(1, TOTAL + 1):
        for batch in range(2):
            hidden = torch.randn(8, 6, generator=torch.Generator().manual_seed(2 * step + batch))
            if batch == 1:
                hidden = model.base_model.model.first(hidden)
            model.base_model.model.second(hidden).square().mean().backward()
            call(model, step)
            if batch == 1:
                optimizer.step()
                optimizer.zero_grad()
    assert not named(said)


def test_layer_that_no_optimizer_holds(said: Callable[[], list[str]]) -> None:
    model, before = make(), listening()
    optimizer = optimizer_of(model, "second")
    for step in range(1, TOTAL + 1):
        model.base_model.model.second(torch.randn(8, 6)).square().mean().backward()
        optimizer.step()
        call(model, step)
        optimizer.zero_grad()
    assert not named(said)
    assert sum(one not in before for one in listening()) <= 1


class ClearsByItself(torch.optim.SGD):
    """As optimizers that offload their gradients do."""

    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        super().step(closure)
        self.zero_grad()


def test_optimizer_that_clears_its_gradients_by_itself(said: Callable[[], list[str]]) -> None:
    model = make()
    one = ClearsByItself([p for n, p in model.named_parameters() if p.requires_grad and "first" in n], lr=1e-2)
    other = optimizer_of(model, "second")
    for step in range(1, TOTAL + 1):
        loss_of(model, step).backward()
        one.step()
        other.step()
        call(model, step)
        other.zero_grad()
    assert len(named(said)) == 1


def test_one_parameter_alone(said: Callable[[], list[str]]) -> None:
    model = make()
    one, other = optimizer_of(model, "first.lora_E"), optimizer_of(model)
    other.param_groups[0]["params"] = [
        p for p in other.param_groups[0]["params"] if p not in set(one.param_groups[0]["params"])
    ]
    for step in range(1, TOTAL + 1):
        loss_of(model, step).backward()
        one.step()
        one.zero_grad()
        other.step()
        call(model, step)
        other.zero_grad()
    assert ["those of first.lora_E.default is gone before each call" in text for text in named(said)] == [True]


def test_what_is_excluded_may_be_cleared(said: Callable[[], list[str]]) -> None:
    with peft_gradguard.exclude("*first*"):
        train_with_two(make())
    assert not named(said)


@pytest.mark.parametrize(("rests", "times"), [(49, 1), (50, 0)])
def test_layer_that_rests_for_long_is_watched_no_longer(said: Callable[[], list[str]], rests: int, times: int) -> None:
    model = make(total_step=100)
    train_with_two(
        model, range(1, 60), loss=lambda model, step: loss_without(model, step, "first" if step <= rests else None)
    )
    assert len(named(said)) == times


def test_calls_at_each_fifth_step_of_a_branch_that_rests(said: Callable[[], list[str]]) -> None:
    """What is used at another step, and cleared there, is gone before the call."""
    train(
        make(total_step=100),
        range(1, 60),
        loss=lambda model, step: loss_without(model, step, None if step % 5 == 2 else "first"),
        allocate=lambda model, step: None if step % 5 else call(model, step),
    )
    assert not named(said)


def test_nobody_listens_once_the_ranks_are_settled() -> None:
    model = make()
    optimizer, before = optimizer_of(model), listening()
    heard = []
    for step in range(1, TOTAL + 1):
        model.base_model.model.second(torch.randn(8, 6)).square().mean().backward()
        optimizer.step()
        call(model, step)
        optimizer.zero_grad()
        heard.append(listening() != before)
    assert heard == [step < FINAL for step in range(1, TOTAL + 1)]


def test_nobody_listens_where_e_begins_at_zero() -> None:
    """There A and B have gradients of zero at first."""
    model = make()
    optimizer, before = optimizer_of(model), listening()
    for step in (1, 2):
        model.base_model.model(torch.randn(8, 6)).logits.square().mean().backward()
        optimizer.step()
        call(model, step)
        optimizer.zero_grad()
        assert listening() == before
