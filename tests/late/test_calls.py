"""Calls of update_and_allocate that come after zero_grad: rescued bit for bit, and a broken loop named."""

from __future__ import annotations

import contextlib
import logging
from typing import TYPE_CHECKING, Any

import needs
import pytest
import torch
import transformers
from accelerate import Accelerator
from scenarios import FINALISING, PEFT_VERSION, TOTAL, Outcome, branches, build, frozen, logits, loss_of, vectors
from steps import late_step
from trainers import Examples, training_arguments

import peft_gradguard

if TYPE_CHECKING:
    from collections.abc import Callable

    import peft

pytestmark = [pytest.mark.peft]


Loop = "Callable[[str, int], tuple[peft.PeftModel, Outcome]]"


def messages(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [record.getMessage() for record in caplog.records if record.name == "peft_gradguard"]


class Recorder:
    """Calls ``update_and_allocate`` and notes what it leaves; in the reference run it leaves out the first call."""

    def __init__(self, model: peft.PeftModel, leave_out: int = 0) -> None:
        self.model, self.leave_out, self.outcome = model, leave_out, Outcome()

    def __call__(self, step: int) -> None:
        if step > self.leave_out:
            self.model.base_model.update_and_allocate(step)
        allocator = self.model.base_model.rankallocator
        self.outcome.patterns.append(self.model.peft_config["default"].rank_pattern)
        self.outcome.budgets.append((0, allocator.init_bgt, allocator.target_bgt))
        self.outcome.scores.append({name: score.clone() for name, score in allocator.exp_avg_ipt.items()})

    def finished(self) -> Outcome:
        self.outcome.weights = {n: p.detach().clone() for n, p in self.model.named_parameters()}
        return self.outcome


def by_hand(call_at: str, accumulation: int, set_to_none: bool = True) -> Outcome:
    model = build(branches())
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    call = Recorder(model, leave_out=0 if call_at == "after zero_grad" else 1)
    for step in range(1, TOTAL + 1):
        for micro in range(accumulation):
            (loss_of(model, vectors(100 * step + micro), False) / accumulation).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 0.5)
        optimizer.step()
        if call_at == "before zero_grad":
            call(step)
        optimizer.zero_grad(set_to_none=set_to_none)
        if call_at == "after zero_grad":
            call(step)
    return call.finished()


def by_hand_writing_zeros(call_at: str, accumulation: int) -> Outcome:
    return by_hand(call_at, accumulation, set_to_none=False)


def by_accelerate(call_at: str, accumulation: int) -> Outcome:
    accelerator = Accelerator(cpu=True, gradient_accumulation_steps=accumulation)
    model = build(branches())
    call = Recorder(model, leave_out=0 if call_at == "after zero_grad" else 1)
    wrapped, optimizer = accelerator.prepare(model, torch.optim.AdamW(model.parameters(), lr=1e-2))
    step = 1
    for micro in range(TOTAL * accumulation):
        with accelerator.accumulate(wrapped):
            accelerator.backward(loss_of(wrapped, vectors(micro), False))
            if accelerator.sync_gradients:
                accelerator.clip_grad_norm_(wrapped.parameters(), 0.5)
            optimizer.step()
            if accelerator.sync_gradients and call_at == "before zero_grad":
                call(step)
            optimizer.zero_grad(set_to_none=True)
            if accelerator.sync_gradients and call_at == "after zero_grad":
                call(step)
            step += accelerator.sync_gradients
    return call.finished()


class Allocate(transformers.TrainerCallback):
    def __init__(self, call: Recorder, call_at: str) -> None:
        self.call, self.call_at = call, call_at

    def on_optimizer_step(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if self.call_at == "before zero_grad":
            # Trainer counts the step only afterwards.
            self.call(state.global_step + 1)

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if self.call_at == "after zero_grad":
            self.call(state.global_step)


def by_trainer(call_at: str, accumulation: int) -> Outcome:
    model = build(branches())
    call = Recorder(model, leave_out=0 if call_at == "after zero_grad" else 1)
    arguments = training_arguments(TOTAL, accumulation, max_grad_norm=0.5)
    transformers.Trainer(model, arguments, train_dataset=Examples(), callbacks=[Allocate(call, call_at)]).train()
    return call.finished()


@pytest.mark.parametrize("accumulation", [1, 4])
@pytest.mark.parametrize(
    "loop",
    [by_hand, by_hand_writing_zeros, by_accelerate, pytest.param(by_trainer, marks=needs.optimizer_step_event)],
)
def test_late_calls_give_what_calls_in_time_give(
    loop: Callable[..., Outcome],
    accumulation: int,
    tmp_path: Any,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.chdir(tmp_path)
    in_time = loop("before zero_grad", accumulation)
    assert messages(caplog) == []
    late = loop("after zero_grad", accumulation)
    assert late.patterns == in_time.patterns
    assert late.patterns[-1]
    assert late.budgets == in_time.budgets
    for mine, theirs in zip(late.scores, in_time.scores, strict=True):
        assert mine.keys() == theirs.keys()
        assert all(torch.equal(mine[name], theirs[name]) for name in mine)
    assert all(torch.equal(weight, in_time.weights[name]) for name, weight in late.weights.items())
    said = messages(caplog)
    assert len(said) == 1
    # Zeros at the first call may as well come from the loss: what the optimizer uses shows it at the second.
    assert f"step {2 if loop is by_hand_writing_zeros else 1})" in said[0]
    assert "before zero_grad; in a Trainer, from on_optimizer_step" in said[0]


def test_unused_branch_keeps_its_scores_in_a_late_loop(model: peft.PeftModel, optimizer: torch.optim.Optimizer) -> None:
    late_step(model, optimizer, 1)
    late_step(model, optimizer, 2)
    before = dict(model.base_model.rankallocator.exp_avg_ipt)
    assert len(before) == 12
    late_step(model, optimizer, 3, branch=False)
    for name, score in model.base_model.rankallocator.exp_avg_ipt.items():
        assert (score is before[name]) == name.startswith("branch."), name


@pytest.mark.parametrize("set_to_none", [True, False])
def test_optimizer_that_never_has_the_adapter_is_named_after_some_calls(
    model: peft.PeftModel, set_to_none: bool
) -> None:
    """Until then it might be a GradScaler that leaves out the steps of the adapter's optimizer."""
    other = torch.optim.AdamW([torch.nn.Parameter(torch.ones(1))], lr=1e-2)
    named = r"have no gradient left \(adapter 'default', step 1\), and in the last 50 calls no torch optimizer"
    for call in range(1, 52):
        loss_of(model, vectors(call), False).backward()
        other.step()
        model.zero_grad(set_to_none=set_to_none)
        with pytest.raises(peft_gradguard.NoGradientError, match=named) if call == 51 else contextlib.nullcontext():
            model.base_model.update_and_allocate(1)


def test_adapter_that_never_takes_part_is_named_at_the_second_call(
    model: peft.PeftModel, optimizer: torch.optim.Optimizer
) -> None:
    model.base_model.model.head.requires_grad_(True)
    model.merge_adapter()
    late_step(model, optimizer, 1)
    with pytest.raises(peft_gradguard.NoGradientError, match=r"second call in a row.*took no part in this step"):
        late_step(model, optimizer, 2)


@pytest.mark.skipif(PEFT_VERSION < (0, 6), reason="PEFT 0.5 cannot unmerge")
def test_adapter_that_rests_for_some_steps_is_warned_of_once(
    model: peft.PeftModel, optimizer: torch.optim.Optimizer, caplog: pytest.LogCaptureFixture
) -> None:
    model.base_model.model.head.requires_grad_(True)
    for step in range(1, TOTAL + 1):
        rests = step in (3, 4)
        if rests:
            model.merge_adapter()
        loss_of(model, vectors(step), False).backward()
        if rests:
            model.unmerge_adapter()
        optimizer.step()
        scores = dict(model.base_model.rankallocator.exp_avg_ipt)
        model.base_model.update_and_allocate(step)
        if rests:
            assert all(model.base_model.rankallocator.exp_avg_ipt[name] is score for name, score in scores.items())
        optimizer.zero_grad()
    assert len(messages(caplog)) == 1
    assert "step 3" in messages(caplog)[0]


@needs.grad_scaler
def test_steps_that_a_grad_scaler_leaves_out_do_not_stop_a_late_loop(
    model: peft.PeftModel, optimizer: torch.optim.Optimizer
) -> None:
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**120, backoff_factor=2.0**-4)
    left_out = 0
    for step in range(1, 11):
        scaler.scale(loss_of(model, vectors(step), False) * 1e5).backward()
        before = scaler.get_scale()
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
        left_out += scaler.get_scale() < before
        model.base_model.update_and_allocate(step)
    assert left_out >= 2
    assert len(model.base_model.rankallocator.exp_avg_ipt) == 12


# Gradients that are zero because the loss is


def step_in_time(
    model: peft.PeftModel, optimizer: torch.optim.Optimizer, step: int, factor: float, order: str = "after the step"
) -> None:
    """One step whose gradients are ``factor`` times what they were; the call is where PEFT can use them."""
    (loss_of(model, vectors(step), False) * factor).backward()
    if order == "before the step":
        model.base_model.update_and_allocate(step)
    optimizer.step()
    if order == "after the step":
        model.base_model.update_and_allocate(step)
    optimizer.zero_grad()


@pytest.mark.parametrize("zero_steps", [{1}, {1, 2, 3}, {5}, {2, 5, 6, 9}, {1, 8}])
@pytest.mark.parametrize("order", ["after the step", "before the step"])
def test_steps_whose_loss_gives_zeros_only_score_nothing(
    model: peft.PeftModel,
    optimizer: torch.optim.Optimizer,
    zero_steps: set[int],
    order: str,
    listening: Callable[[], int],
    caplog: pytest.LogCaptureFixture,
) -> None:
    scores: dict[str, torch.Tensor] = {}
    for step in range(1, FINALISING):
        step_in_time(model, optimizer, step, 0.0 if step in zero_steps else 1.0, order)
        now = model.base_model.rankallocator.exp_avg_ipt
        assert all((now[name] is score) == (step in zero_steps) for name, score in scores.items())
        scores = dict(now)
        assert bool(listening()) == (step in zero_steps)
    in_a_row = [step for step in sorted(zero_steps) if step - 1 in zero_steps]
    zeros = [text for text in messages(caplog) if "exactly zero" in text]
    assert len(zeros) == bool(in_a_row)
    if in_a_row:
        assert f"exactly zero (adapter 'default', step {in_a_row[0]}), and the optimizer used these" in zeros[0]


@pytest.mark.parametrize("accumulation", [2, 3])
def test_late_call_after_micro_batches_in_time_is_found_among_zeros(
    model: peft.PeftModel, optimizer: torch.optim.Optimizer, accumulation: int, caplog: pytest.LogCaptureFixture
) -> None:
    allocator = model.base_model.rankallocator
    for step in (1, 2):
        for micro in range(1, accumulation + 1):
            loss_of(model, vectors(10 * step + micro), False).backward()
            if micro == accumulation:
                optimizer.step()
                optimizer.zero_grad(set_to_none=False)
            before = dict(allocator.ipt)
            model.base_model.update_and_allocate(step)
            if (step, micro) == (1, accumulation):
                assert all(allocator.ipt[name] is ipt for name, ipt in before.items())
    assert all(allocator.ipt[name] is not ipt for name, ipt in before.items())
    assert ["but the optimizer used others" in message for message in messages(caplog)] == [True]


def test_switching_from_missing_to_zeroed_gradients_is_rescued(
    model: peft.PeftModel, optimizer: torch.optim.Optimizer
) -> None:
    model.base_model.update_and_allocate(1)
    for step in range(2, TOTAL + 1):
        loss_of(model, vectors(step), False).backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=False)
        model.base_model.update_and_allocate(step)
    pattern = model.peft_config["default"].rank_pattern
    assert sum(map(sum, pattern.values())) == model.base_model.rankallocator.target_bgt


def test_frozen_parameters_stay_out_of_a_late_loop(model: peft.PeftModel, optimizer: torch.optim.Optimizer) -> None:
    frozen("trunk.0")(model, 0)
    for step in (1, 2, 3):
        late_step(model, optimizer, step)
    assert not [name for name in model.base_model.rankallocator.exp_avg_ipt if name.startswith("trunk.0")]
    assert len(model.base_model.rankallocator.exp_avg_ipt) == 9
    assert logits(model, branches()).isfinite().all()
    assert logging.getLogger("peft_gradguard").handlers == []


@pytest.mark.parametrize("first", [1, 20])
def test_zeros_that_the_loss_gives_are_no_late_call(
    model: peft.PeftModel, caplog: pytest.LogCaptureFixture, first: int
) -> None:
    """With an optimizer that is none of torch's, and calls in time."""
    for step in range(1, 80):
        # As with rewards that are all equal.
        (loss_of(model, vectors(step), False) * (0.0 if first <= step < first + 55 else 1.0)).backward()
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.grad is not None:
                    parameter -= 0.01 * parameter.grad
        model.base_model.update_and_allocate(1)
        model.zero_grad(set_to_none=False)
    assert len(messages(caplog)) <= 1


@pytest.mark.parametrize("broken", ["all frozen", "before backward"])
def test_the_error_is_one_that_loops_already_pass_over(model: peft.PeftModel, broken: str) -> None:
    if broken == "all frozen":
        model.requires_grad_(False)
    else:
        model.base_model.update_and_allocate(1)
    with pytest.raises(TypeError):
        model.base_model.update_and_allocate(2)
