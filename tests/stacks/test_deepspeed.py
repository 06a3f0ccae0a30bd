"""DeepSpeed's ZeRO 1, 2 and 3, two processes: right where PEFT can be right, and named where it cannot."""

from __future__ import annotations

import importlib.util
from typing import TYPE_CHECKING, Any

import pytest
import torch
from stacks.checks import assert_left_to_peft, assert_named, assert_right, assert_said, factors, same

if TYPE_CHECKING:
    from collections.abc import Callable

    Launch = Callable[..., list[dict[str, Any]]]

pytestmark = [
    pytest.mark.skipif(
        importlib.util.find_spec("deepspeed") is None, reason="deepspeed is not installed (see the Makefile)"
    ),
    pytest.mark.parametrize("stage", ["1", "2", "3"]),
]

PLAIN = ("all used", "not gathered", "not remembered", "frozen")
"""What plain PEFT is shown: no case that leaves one process waiting for the other before the last."""
LEARNING_RATE = 1e-2


@pytest.mark.parametrize(("case", "ranked"), [("all used", 4), ("unused on both", 4), ("frozen", 3)])
def test_training(torchrun: Launch, stage: str, case: str, ranked: int) -> None:
    reports = torchrun("zero", "guard", stage)
    assert_right(reports, case, ranked)
    assert_said(reports, case, "frozen", factors("trunk.0") if case == "frozen" else set())
    assert_left_to_peft(reports, case, "DeepSpeed holds the gradients")


def test_plain_peft_fails_on_a_frozen_layer(torchrun: Launch, stage: str) -> None:
    assert_named(torchrun("zero", "plain", stage, *PLAIN), "frozen", "TypeError", "NoneType")


def test_scores_at_the_accumulation_boundary(torchrun: Launch, stage: str) -> None:
    first, second = (report["accumulation boundary"]["result"] for report in torchrun("zero", "guard", stage))
    assert len(first["scores"]) == 12
    assert same(first, second)


def refilled(result: dict[str, Any]) -> float:
    """The largest entry of E that was masked before an optimizer step, as it is after that step."""
    largest = 0.0
    for state, masked, stepped in zip(result["history"], result["masked"], result["stepped"], strict=True):
        for name, keep in (state["pattern"] or {}).items():
            pruned = ~torch.tensor(keep)
            # Between masking steps PEFT lets the rows grow again.
            if pruned.any() and not masked[name][pruned].any():
                largest = max(largest, stepped[name][pruned].abs().max().item())
    return largest


def test_masks_are_kept(torchrun: Launch, stage: str) -> None:
    guarded = torchrun("zero", "guard", stage)[0]["all used"]["result"]
    plain = assert_right(torchrun("zero", "plain", stage, *PLAIN), "all used")
    # One step of the optimizer refills a masked row by about its learning rate. In plain PEFT the step starts from the
    # value before masking, which DeepSpeed's master copy still has.
    assert 0 < refilled(guarded) < 2 * LEARNING_RATE
    assert refilled(plain) > 2 * LEARNING_RATE


def test_scores_are_those_of_plain_peft_until_something_is_masked(torchrun: Launch, stage: str) -> None:
    guarded = torchrun("zero", "guard", stage)[0]["all used"]["result"]["history"]
    plain = torchrun("zero", "plain", stage, *PLAIN)[0]["all used"]["result"]["history"]
    unmasked = [step for step, state in enumerate(plain) if state["pattern"] is None]
    assert len(unmasked) >= 3
    assert all(same(guarded[step], plain[step]) for step in unmasked)


@pytest.mark.parametrize("case", ["after step", "through accelerate"])
def test_too_late(torchrun: Launch, stage: str, case: str) -> None:
    assert_named(torchrun("zero", "guard", stage), case, "NoGradientError", "before engine.step", "step 1")


def test_in_the_middle_of_accumulation(torchrun: Launch, stage: str) -> None:
    reports = torchrun("zero", "guard", stage)
    case = "in the middle of accumulation"
    if stage == "3":
        assert same(*(report[case]["result"] for report in reports))
        assert all(score.any() for score in reports[0][case]["result"]["scores"].values())
    else:
        assert_named(reports, case, "NoGradientError", "last micro-batch")


def test_not_gathered(torchrun: Launch, stage: str) -> None:
    if stage == "3":
        assert_named(torchrun("zero", "guard", stage), "not gathered", "TrainingStackError", "GatheredParameters")
        assert_named(torchrun("zero", "plain", stage, *PLAIN), "not gathered", "RuntimeError", "size")
    else:
        assert [report["not gathered"]["error"] for report in torchrun("zero", "guard", stage)] == [None, None]


def test_configuration_not_remembered(torchrun: Launch, stage: str) -> None:
    assert_named(torchrun("zero", "guard", stage), "not remembered", "TrainingStackError", "HfDeepSpeedConfig(config)")
    assert_named(torchrun("zero", "plain", stage, *PLAIN), "not remembered", "TypeError", "NoneType")
