"""Schedules that leave nothing to prune, and the error in the place of torch.kthvalue's."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
from situations import FINAL, TFINAL, TOTAL, make, train

import peft_gradguard

if TYPE_CHECKING:
    from collections.abc import Callable

pytestmark = pytest.mark.peft


def set_up(**settings: Any) -> Any:
    """An adapter whose schedule is changed afterwards: newer releases refuse some when the config is made."""
    model = make()
    for name, value in settings.items():
        setattr(model.peft_config["default"], name, value)
    return model


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"target_r": 4}, "target_r=4 is not below init_r=4"),
        ({"target_r": 5}, "target_r=5 is not below init_r=4"),
        ({"target_r": 3}, None),
        ({"tinit": FINAL}, f"tinit={FINAL} and tfinal={TFINAL} leave none of the total_step={TOTAL} steps"),
        ({"tinit": FINAL - 1}, f"no masking step between tinit={FINAL - 1} and it"),
        ({"tinit": FINAL - 2}, None),
        ({"deltaT": FINAL}, f"deltaT={FINAL} leaves no masking step between tinit=2 and it"),
        ({"deltaT": FINAL - 1}, None),
        ({"deltaT": 5, "tinit": 15}, "deltaT=5 leaves no masking step between tinit=15"),
        ({"deltaT": 5, "tinit": 14}, None),
        ({"deltaT": 0}, None),
    ],
)
def test_schedule_is_named_at_the_first_call_and_in_the_audit(
    said: Callable[[], list[str]], settings: dict[str, int], words: str | None
) -> None:
    model = set_up(**settings)
    advice = peft_gradguard.report(model).adapters[0].advice
    assert said() == []
    train(model, range(1, 3))
    assert said() == list(advice)
    assert len(advice) == (words is not None)
    assert words is None or words in advice[0]


def test_missing_total_step_is_advised() -> None:
    assert "total_step is not set" in peft_gradguard.report(set_up(total_step=None)).adapters[0].advice[0]


@pytest.mark.parametrize(
    ("settings", "numbers"),
    [
        ({"target_r": 4}, ["target_r=4", "init_r=4"]),
        ({"target_r": 5}, ["target_r=5", "init_r=4"]),
        ({"tinit": FINAL}, [f"tinit={FINAL}", f"total_step - tfinal = {FINAL}"]),
        ({"tinit": FINAL + 1}, [f"tinit={FINAL + 1}", f"total_step - tfinal = {FINAL}"]),
    ],
)
def test_error_of_kthvalue_is_explained(settings: dict[str, int], numbers: list[str]) -> None:
    model = set_up(**settings)
    model.base_model.rankallocator._set_budget_scheduler(model.base_model.model)
    with pytest.raises(ValueError, match="AdaLoRA cannot prune") as raised:
        train(model)
    assert isinstance(raised.value, RuntimeError), "as PEFT's own"
    assert "kthvalue" in str(raised.value.__cause__)
    assert all(number in str(raised.value) for number in numbers)


@pytest.mark.parametrize(
    ("init", "words"),
    [
        (17, r"cannot prune 9 of 8 ranks .* its budget began at 17 ranks, and is 8 now"),
        (2, r"cannot prune 0 of 8 ranks .* its budget began at 2 ranks, and is 2 now"),
    ],
)
def test_budget_that_was_counted_before_the_ranks_were_cut(init: int, words: str) -> None:
    model = make()
    model.base_model.rankallocator.init_bgt = init
    with pytest.raises(ValueError, match=f"AdaLoRA {words}"):
        train(model)


@pytest.mark.parametrize("step", [3, FINAL])
def test_other_errors_stay_what_they_are(monkeypatch: pytest.MonkeyPatch, step: int) -> None:
    import torch

    def fails(*_: Any, **__: Any) -> None:
        raise RuntimeError("out of memory")

    # All ranks are to be pruned at the last masking step.
    model = make(target_r=0)
    train(model, range(1, step))
    monkeypatch.setattr(torch, "kthvalue", fails)
    with pytest.raises(RuntimeError, match="out of memory") as raised:
        train(model, [step])
    assert type(raised.value) is RuntimeError
