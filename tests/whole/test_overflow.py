"""Steps with NaN or inf in gradients: left out where they occur, instead of poisoning scores for good."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Any

import needs
import pytest
import torch
from scenarios import FINALISING, TARGET_R, TOTAL, Outcome, branches, build, loss_of, train, vectors

if TYPE_CHECKING:
    from collections.abc import Callable

    import peft

pytestmark = pytest.mark.peft


EARLY, MIDDLE, MASKING = 1, 7, 8
POISON = {"inf": float("inf"), "nan": float("nan"), "-inf": float("-inf")}


def poison(model: peft.PeftModel, value: float, part: str = "", one: bool = False) -> None:
    for name, parameter in model.named_parameters():
        if parameter.grad is not None and ".lora_" in name and part in name:
            parameter.grad.view(-1)[: 1 if one else None] = value


def overflow_at(step: int, part: str = "", value: float = float("inf")) -> Any:
    """A training in which the gradients of one step overflow after the optimizer step, so that weights stay finite."""

    def allocate(model: peft.PeftModel, now: int) -> None:
        if now == step:
            poison(model, value, part)
        model.base_model.update_and_allocate(now)

    return branches(allocate=allocate, regularised=False)


def train_overflow(step: int, part: str) -> Outcome:
    return train(overflow_at(step, part))


@pytest.mark.parametrize("step", [EARLY, MIDDLE, MASKING])
@pytest.mark.parametrize("part", ["", "trunk"], ids=["all gradients", "some gradients"])
def test_overflow_step_leaves_no_damage(step: int, part: str, plain: Callable[..., Any]) -> None:
    outcome = train_overflow(step, part)
    for scores in outcome.scores:
        assert all(score.isfinite().all() for score in scores.values())
    assert sum(map(sum, outcome.patterns[-1].values())) == TARGET_R * 4
    spoilt = plain(train_overflow, step, part)
    assert not all(score.isfinite().all() for score in spoilt.scores[step].values())
    assert sum(map(sum, spoilt.patterns[-1].values())) > TARGET_R * 4


@pytest.mark.parametrize("value", POISON.values(), ids=POISON)
@pytest.mark.parametrize("factor", ["lora_A", "lora_B", "lora_E"])
def test_just_the_poisoned_parameter_is_skipped(value: float, factor: str) -> None:
    model = build(branches())
    allocator = model.base_model.rankallocator
    for step in (1, 2):
        loss_of(model, vectors(step), False).backward()
        before = dict(allocator.exp_avg_ipt)
        if step == 2:
            poison(model, value, f"trunk.0.{factor}", one=True)
        model.base_model.update_and_allocate(step)
    kept = [name for name, score in allocator.exp_avg_ipt.items() if score is before[name]]
    assert kept == [f"trunk.0.{factor}.default"]


def test_overflow_of_everything_is_no_late_call(caplog: pytest.LogCaptureFixture) -> None:
    model = build(branches())
    for step in (1, 2, 3):
        model.zero_grad()
        loss_of(model, vectors(step), False).backward()
        poison(model, float("nan"))
        model.base_model.update_and_allocate(step)
    assert model.base_model.rankallocator.exp_avg_ipt == {}
    said = [record for record in caplog.records if record.name == "peft_gradguard"]
    assert {(record.reason, record.step, record.levelno) for record in said} == {
        ("non-finite gradient", 1, logging.WARNING)
    }
    assert [len(record.parameters) for record in said] == [12]


@pytest.mark.parametrize("factor", ["A", "B", "E"])
def test_clipping_by_a_norm_that_has_overflowed_leaves_the_step_out(factor: str) -> None:
    model = build(branches())
    allocator = model.base_model.rankallocator
    for step in (1, 2, 3):
        model.zero_grad()
        loss_of(model, vectors(step), False).backward()
        before = dict(allocator.exp_avg_ipt)
        if step == 2:
            poison(model, float("inf"), f"trunk.0.lora_{factor}", one=True)
        # The norm is inf: what was finite becomes 0, and what was not, NaN.
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        model.base_model.update_and_allocate(step)
        kept = [name for name, score in allocator.exp_avg_ipt.items() if score is before.get(name)]
        assert len(kept) == (12 if step == 2 else 0)


@needs.grad_scaler
def test_clipping_after_an_overflow_outside_adalora_is_no_late_call(caplog: pytest.LogCaptureFixture) -> None:
    model = build(branches())
    head = model.base_model.model.head.weight
    head.requires_grad_(True)
    scaler, optimizer = torch.amp.GradScaler("cpu", init_scale=2.0), torch.optim.AdamW(model.parameters(), lr=1e-3)
    for step in range(1, 8):
        scaler.scale(loss_of(model, vectors(step), False)).backward()
        overflows = step in (1, 2, 3, 5)
        if overflows:
            head.grad.view(-1)[0] = float("inf")
        scaler.unscale_(optimizer)
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        scaler.step(optimizer)
        before = dict(model.base_model.rankallocator.exp_avg_ipt)
        model.base_model.update_and_allocate(step)
        scaler.update()
        optimizer.zero_grad()
        scores = model.base_model.rankallocator.exp_avg_ipt
        assert [name for name in scores if scores[name] is before.get(name)] == list(before) * overflows
    assert len(scores) == 12
    assert [record for record in caplog.records if record.name == "peft_gradguard"] == []


@needs.grad_scaler
def test_run_under_a_grad_scaler_in_half_precision() -> None:
    model = build(branches())
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    # float16 overflows at 65504: the scaler starts too high, as it does by default, and comes down.
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**24)
    overflows = 0
    for step in range(1, TOTAL + 1):
        with torch.autocast("cpu", dtype=torch.float16):
            loss = loss_of(model, vectors(step), False)
        scaler.scale(loss).backward()
        scaler.unscale_(optimizer)
        overflows += not all(p.grad.isfinite().all() for p in model.parameters() if p.grad is not None)
        scaler.step(optimizer)
        model.base_model.update_and_allocate(step)
        scaler.update()
        optimizer.zero_grad()
        assert all(score.isfinite().all() for score in model.base_model.rankallocator.exp_avg_ipt.values())
    assert 1 <= overflows < FINALISING
    pattern = model.peft_config["default"].rank_pattern
    assert sum(map(sum, pattern.values())) == TARGET_R * 4
