"""Calls of update_and_allocate that come after zero_grad: rescued bit for bit, and a broken loop named."""

from __future__ import annotations

import contextlib
import gc
import logging
import weakref
from typing import TYPE_CHECKING, Any

import pytest
import torch
import transformers
from accelerate import Accelerator
from scenarios import (
    FINALISING,
    PEFT_VERSION,
    TOTAL,
    Outcome,
    branches,
    build,
    frozen,
    logits,
    loss_of,
    sometimes,
    vectors,
)
from torch.optim import optimizer as torch_optimizer
from trainers import Examples, training_arguments

import peft_gradguard

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    import peft

pytestmark = [pytest.mark.peft]

Loop = "Callable[[str, int], tuple[peft.PeftModel, Outcome]]"


@pytest.fixture(autouse=True)
def hooks() -> Iterator[dict[int, Any]]:
    """The global optimizer hooks, none at first."""
    hooks = torch_optimizer._global_optimizer_pre_hooks
    gc.collect()
    hooks.clear()
    yield hooks
    hooks.clear()


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
            optimizer.zero_grad()
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
@pytest.mark.parametrize("loop", [by_hand, by_hand_writing_zeros, by_accelerate, by_trainer])
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


def late_step(model: peft.PeftModel, optimizer: torch.optim.Optimizer, step: int, **batch: Any) -> None:
    loss_of(model, vectors(step, **batch), False).backward()
    optimizer.step()
    optimizer.zero_grad()
    model.base_model.update_and_allocate(step)


@pytest.fixture
def model() -> peft.PeftModel:
    return build(branches())


@pytest.fixture
def optimizer(model: peft.PeftModel) -> torch.optim.Optimizer:
    return torch.optim.AdamW(model.parameters(), lr=1e-2)


@pytest.mark.parametrize("frozen_part", ["", "trunk.0"])
def test_loop_in_the_documented_order_registers_no_hook(
    model: peft.PeftModel, optimizer: torch.optim.Optimizer, hooks: dict[int, Any], frozen_part: str
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
        assert not hooks


def test_kept_gradients_go_when_used_and_at_the_finalising_step(
    model: peft.PeftModel, optimizer: torch.optim.Optimizer, hooks: dict[int, Any]
) -> None:
    for step in range(1, TOTAL + 1):
        loss_of(model, vectors(step), False).backward()
        gradient = weakref.ref(next(p.grad for n, p in model.named_parameters() if "lora_A" in n))
        optimizer.step()
        optimizer.zero_grad()
        assert (gradient() is not None) == (1 < step <= FINALISING)
        model.base_model.update_and_allocate(step)
        assert gradient() is None
        assert bool(hooks) == (step < FINALISING)
        assert all(parameter.grad is None for parameter in model.parameters())


def test_backward_is_watched_only_until_something_is_scored(
    model: peft.PeftModel, optimizer: torch.optim.Optimizer
) -> None:
    energy = model.get_parameter("base_model.model.trunk.0.lora_E.default")
    late_step(model, optimizer, 1)
    assert energy._backward_hooks
    late_step(model, optimizer, 2)
    assert not energy._backward_hooks


def test_model_that_goes_away_leaves_nothing_behind(hooks: dict[int, Any]) -> None:
    model = build(branches())
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for step in (1, 2, 3):
        late_step(model, optimizer, step)
    loss_of(model, vectors(4), False).backward()
    optimizer.step()
    assert hooks
    references = [weakref.ref(model.base_model.model), weakref.ref(model.base_model.rankallocator)]
    del model, optimizer
    gc.collect()
    assert [reference() for reference in references] == [None, None]
    assert not hooks


class Collecting(list[Any]):
    """Parameter groups that bring a garbage collection on whoever looks at them."""

    def __iter__(self) -> Iterator[Any]:
        gc.collect()
        return super().__iter__()


@pytest.mark.parametrize("steps", [0, 1, 2])
def test_model_that_goes_away_amid_the_hooks_of_another_one(steps: int, hooks: dict[int, Any]) -> None:
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
        # Those that could not go meanwhile have gone with the next ones.
        model.base_model.update_and_allocate(FINALISING)
        assert not hooks
    finally:
        gc.enable()


def test_unused_branch_keeps_its_scores_in_a_late_loop(model: peft.PeftModel, optimizer: torch.optim.Optimizer) -> None:
    late_step(model, optimizer, 1)
    late_step(model, optimizer, 2)
    before = dict(model.base_model.rankallocator.exp_avg_ipt)
    assert len(before) == 12
    late_step(model, optimizer, 3, branch=False)
    for name, score in model.base_model.rankallocator.exp_avg_ipt.items():
        assert (score is before[name]) == name.startswith("branch."), name


def test_gradients_of_a_step_without_a_call_are_not_used_at_a_later_one(
    model: peft.PeftModel, optimizer: torch.optim.Optimizer
) -> None:
    late_step(model, optimizer, 1)
    late_step(model, optimizer, 2)
    loss_of(model, vectors(3), False).backward()
    optimizer.step()
    optimizer.zero_grad()
    before = dict(model.base_model.rankallocator.exp_avg_ipt)
    late_step(model, optimizer, 4, branch=False)
    for name, score in model.base_model.rankallocator.exp_avg_ipt.items():
        assert (score is before[name]) == name.startswith("branch."), name


def test_steps_of_another_optimizer_do_not_touch_kept_gradients(
    model: peft.PeftModel, optimizer: torch.optim.Optimizer
) -> None:
    other = torch.optim.AdamW([torch.nn.Parameter(torch.ones(1))], lr=1e-2)
    late_step(model, optimizer, 1)
    loss_of(model, vectors(2), False).backward()
    optimizer.step()
    optimizer.zero_grad()
    other.step()
    model.base_model.update_and_allocate(2)
    assert len(model.base_model.rankallocator.exp_avg_ipt) == 12


@pytest.mark.parametrize(
    ("set_to_none", "found"), [(True, "no gradient"), (False, "only gradients that are exactly zero")]
)
def test_optimizer_that_never_has_the_adapter_is_named_at_the_second_call(
    model: peft.PeftModel, set_to_none: bool, found: str
) -> None:
    other = torch.optim.AdamW([torch.nn.Parameter(torch.ones(1))], lr=1e-2)
    named = rf"^The 12 AdaLoRA parameters have {found} \(adapter 'default', step 2\), at the second call in a row"
    for step in (1, 2):
        loss_of(model, vectors(step), False).backward()
        other.step()
        model.zero_grad(set_to_none=set_to_none)
        with pytest.raises(peft_gradguard.NoGradientError, match=named) if step == 2 else contextlib.nullcontext():
            model.base_model.update_and_allocate(step)


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
    hooks: dict[int, Any],
    caplog: pytest.LogCaptureFixture,
) -> None:
    scores: dict[str, torch.Tensor] = {}
    for step in range(1, FINALISING):
        step_in_time(model, optimizer, step, 0.0 if step in zero_steps else 1.0, order)
        now = model.base_model.rankallocator.exp_avg_ipt
        assert all((now[name] is score) == (step in zero_steps) for name, score in scores.items())
        scores = dict(now)
        assert bool(hooks) == (step in zero_steps)
    in_a_row = [step for step in sorted(zero_steps) if step - 1 in zero_steps]
    assert len(messages(caplog)) == bool(in_a_row)
    if in_a_row:
        assert f"exactly zero (adapter 'default', step {in_a_row[0]}), and the optimizer used these" in caplog.text


@pytest.mark.parametrize("rests", ["without gradients", "with zeros"])
@pytest.mark.parametrize("order", ["before the step", "closure"])
def test_gradients_of_the_step_before_are_never_used_instead_of_those_that_are_there(
    model: peft.PeftModel, optimizer: torch.optim.Optimizer, order: str, rests: str
) -> None:
    allocator, base = model.base_model.rankallocator, model.base_model.model
    for step in range(1, FINALISING):

        def backward(step: int = step) -> torch.Tensor:
            optimizer.zero_grad()
            loss = loss_of(model, vectors(step), False)
            if step != 3:
                loss.backward()
            elif rests == "with zeros":
                (loss * 0.0).backward()
            return loss

        if order == "closure":
            optimizer.step(backward)
        else:
            backward()
        before = {name: p.detach().clone() for name, p in base.named_parameters() if ".lora_" in name}
        gradients = {name: p.grad for name, p in base.named_parameters() if ".lora_" in name}
        model.base_model.update_and_allocate(step)
        if step != 3:
            assert all(
                torch.equal(ipt, (before[name] * gradients[name]).abs()) for name, ipt in allocator.ipt.items()
            ), step
        if order != "closure":
            optimizer.step()
    assert len(allocator.ipt) == 12


def test_late_loop_whose_closure_zeroes_at_its_end_is_rescued(
    model: peft.PeftModel, optimizer: torch.optim.Optimizer
) -> None:
    for step in (1, 2):

        def backward(step: int = step) -> torch.Tensor:
            loss = loss_of(model, vectors(step), False)
            loss.backward()
            return loss

        optimizer.step(closure=backward)
        gradients = {name: p.grad for name, p in model.base_model.model.named_parameters() if ".lora_" in name}
        optimizer.zero_grad()
        model.base_model.update_and_allocate(step)
    parameters = dict(model.base_model.model.named_parameters())
    assert len(model.base_model.rankallocator.ipt) == 12
    for name, ipt in model.base_model.rankallocator.ipt.items():
        assert torch.equal(ipt, (parameters[name] * gradients[name]).abs())


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
