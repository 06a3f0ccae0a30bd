"""What the finalising step leaves, and what a training leaves that ends before it."""

from __future__ import annotations

import copy
import gc
from typing import TYPE_CHECKING, Any

import needs
import pytest
import torch
from scenarios import FINALISING, SCENARIOS
from scenarios import train as train_scenario
from situations import FINAL, TOTAL, make, optimizer_of, outside, train

import peft_gradguard

if TYPE_CHECKING:
    import logging
    from collections.abc import Callable
    from pathlib import Path

pytestmark = pytest.mark.peft


def only(said: Callable[[], list[str]], model: Any = None) -> str:
    """The one thing that was said; of a model that is still there, the report says it too."""
    (text,) = said()
    if model is not None:
        assert text in peft_gradguard.report(model).adapters[0].advice
    return text


def begin_with_an_energy_of_zero(model: Any) -> None:
    if any(p.any() for n, p in model.named_parameters() if ".lora_E." in n):
        pytest.skip("this PEFT does not begin with an E of zero")


def cast_adapter(model: Any, kind: torch.dtype) -> None:
    for name, parameter in model.named_parameters():
        if ".lora_" in name and "ranknum" not in name:
            parameter.data = parameter.data.to(kind)


def train_the_head_alone(steps: Any = range(1, TOTAL + 1), **changes: Any) -> None:
    model = make(**changes)
    begin_with_an_energy_of_zero(model)
    head = model.base_model.model.head.requires_grad_(True)
    train(
        model,
        steps,
        optimizer=torch.optim.AdamW(head.parameters(), lr=1e-2),
        loss=outside,
    )


def test_missed_finalising_step_is_named(records: list[logging.LogRecord]) -> None:
    outcome = train_scenario(SCENARIOS["calls that miss the finalising step"])
    messages = [record.getMessage() for record in records if record.levelname == "WARNING"]
    assert len(messages) == 1
    assert f"never called with step {FINALISING} (" in messages[0]
    kept = "ranks of the last masking step stay" if outcome.patterns[FINALISING] else "no rank is pruned at all"
    assert kept in messages[0]


def test_steps_beyond_the_end_from_the_first_call_on(said: Callable[[], list[str]]) -> None:
    model = make()
    train(model, range(64, 64 * 12, 64))
    assert f"with a step beyond {FINAL} (total_step - tfinal)" in only(said, model)
    assert "not of samples or micro-batches" in only(said)


def test_first_call_at_the_finalising_step(said: Callable[[], list[str]]) -> None:
    model = make()
    train(model, range(FINAL, TOTAL))
    assert "Nothing was ever scored, as this is the first call" in only(said, model)


@pytest.mark.parametrize(
    ("size", "why"),
    [
        (float("inf"), "No gradient was ever finite: the loss has overflowed or was NaN at every step before it."),
        (0.0, "Nothing was ever scored: no call before it has found a gradient."),
    ],
)
def test_every_step_before_the_finalising_one_was_lost(said: Callable[[], list[str]], size: float, why: str) -> None:
    model = make()
    optimizer = optimizer_of(model)
    for step in range(1, TOTAL + 1):
        (model(torch.ones(2, 6)).logits.sum() * size).backward()
        if size:
            # As a GradScaler does.
            optimizer.zero_grad(set_to_none=False)
            for parameter in optimizer.param_groups[0]["params"]:
                parameter.grad = torch.full_like(parameter, size)
        else:
            optimizer.step()
        model.base_model.update_and_allocate(step)
        optimizer.zero_grad()
    texts = [text for text in said() if "nothing to rank" in text]
    assert len(texts) == 1
    assert why in texts[0]


@pytest.mark.parametrize(("every", "stays"), [(3, True), (15, True), (17, False)])
def test_steps_that_jump_over_the_finalising_one(said: Callable[[], list[str]], every: int, stays: bool) -> None:
    model = make(tinit=0, deltaT=1) if every != 17 else make(tinit=0, deltaT=4)
    train(model, range(every if every != 17 else 15, 4 * TOTAL, every if every != 17 else 2 * 2))
    text = only(said, model)
    assert f"never called with step {FINAL} (total_step - tfinal)" in text
    assert "The last call before it was step 15." in text
    assert ("The ranks of the last masking step stay" in text) == stays
    assert ("So no rank is pruned at all" in text) != stays
    del model
    gc.collect()
    make()
    assert said() == [text], "it is said once what went wrong"


def test_calls_that_come_with_the_finalising_step_twice_are_no_trouble(said: Callable[[], list[str]]) -> None:
    def twice(model: Any, step: int) -> None:
        model.base_model.update_and_allocate(step)
        model.base_model.update_and_allocate(step)

    train(make(), allocate=twice)
    assert said() == []


@pytest.mark.parametrize(
    ("kind", "size"), [pytest.param(torch.float16, 1e-6, marks=needs.kthvalue_in_half), (torch.bfloat16, 1e-30)]
)
def test_half_precision_is_named_where_it_loses_all_scores(
    said: Callable[[], list[str]], kind: torch.dtype, size: float
) -> None:
    model = make()
    cast_adapter(model, kind)

    def gradients(model: Any, step: int) -> torch.Tensor:
        # Small ones, as of a long sequence.
        return sum((size * p).sum() for n, p in model.named_parameters() if ".lora_" in n and p.requires_grad)

    train(model, loss=gradients, optimizer=torch.optim.SGD(model.parameters(), lr=1e-4))
    text = said()[0]
    name = str(kind).removeprefix("torch.")
    assert f"adapters in {name} underflow to zero or become equal" in text
    assert "autocast_adapter_dtype=True" in text


def test_adapter_that_no_optimizer_holds(said: Callable[[], list[str]]) -> None:
    train_the_head_alone()
    texts = said()
    assert any("All scores of lora_E are zero, as if the adapter did not train" in text for text in texts)
    assert any("keeps 0 ranks where its budget allows" in text for text in texts)


@pytest.mark.parametrize("lost", [(), (2, 3)])
@pytest.mark.parametrize("kind", [torch.float32, torch.bfloat16])
def test_warm_up_that_begins_with_a_learning_rate_of_zero(
    said: Callable[[], list[str]], lost: tuple[int, ...], kind: torch.dtype
) -> None:
    model = make(tinit=0)
    begin_with_an_energy_of_zero(model)
    cast_adapter(model, kind)
    optimizer = optimizer_of(model)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: min(1.0, step / 4))
    for step in range(1, FINAL):
        model(torch.randn(8, 6, generator=torch.Generator().manual_seed(step))).logits.square().mean().backward()
        if step in lost:
            # As where a GradScaler leaves out a step that has overflowed.
            for parameter in optimizer.param_groups[0]["params"]:
                parameter.grad.fill_(float("inf"))
        else:
            optimizer.step()
        schedule.step()
        model.base_model.update_and_allocate(step)
        if step == 1:
            pattern = model.peft_config["default"].rank_pattern
            assert not any(map(any, pattern.values()))
        optimizer.zero_grad()
    assert said() == []
    if kind == torch.float32:
        assert sum(map(sum, model.peft_config["default"].rank_pattern.values())) > 0


@pytest.mark.parametrize(("steps", "times"), [((3,), 0), ((3, 3), 0), ((3, 4), 1), ((3, FINAL), 1)])
def test_adapter_that_does_not_train_is_named_at_the_second_masking_step(
    said: Callable[[], list[str]], steps: tuple[int, ...], times: int
) -> None:
    train_the_head_alone((1, 2, *steps))
    assert len([text for text in said() if "All scores of lora_E are zero" in text]) == times


def test_nothing_to_rank_at_the_finalising_step(said: Callable[[], list[str]]) -> None:
    model = make()
    for name, parameter in model.named_parameters():
        if ".lora_E." in name:
            parameter.requires_grad = False
    train(model)
    assert f"nothing to rank at step {FINAL}" in only(said, model)
    assert "No lora_E is trainable." in only(said)
    assert "so no rank is pruned" in only(said)


def test_what_the_user_has_excluded_is_no_trouble(said: Callable[[], list[str]]) -> None:
    with peft_gradguard.exclude("*"):
        train(make())
    assert not [text for text in said() if "nothing to rank" in text]


@pytest.mark.parametrize(("steps", "times"), [(4, 0), (5, 1), (FINAL - 1, 1), (FINAL, 0), (TOTAL, 0)])
def test_training_that_ends_before_its_ranks_are_settled(said: Callable[[], list[str]], steps: int, times: int) -> None:
    model = make()
    train(model, range(1, steps + 1))
    assert said() == []
    del model
    gc.collect()
    assert said() == [], "nothing is said from inside a garbage collection"
    make()
    early = [text for text in said() if "never settled" in text]
    assert len(early) == times
    assert all(f"stopped after step {steps}, but they are settled at step {FINAL}" in text for text in early)


class Moment(float):
    """A step that can be reckoned with, and is no number of a step."""

    def __int__(self) -> int:
        raise RuntimeError("a moment is no number")

    __index__ = __int__


def test_steps_that_are_no_numbers_are_not_judged(said: Callable[[], list[str]]) -> None:
    model = make()
    train(model, range(1, 10), allocate=lambda model, step: model.base_model.update_and_allocate(Moment(step)))
    del model
    gc.collect()
    make()
    assert said() == []


def test_training_of_which_the_guard_has_not_seen_all_is_not_judged(said: Callable[[], list[str]]) -> None:
    model = make()
    train(model, range(1, 10))
    with peft_gradguard.disabled():
        train(model, range(10, TOTAL + 1))
    del model
    gc.collect()
    make()
    assert said() == []


@pytest.mark.parametrize("kept", [True, False])
@pytest.mark.parametrize("last", [FINAL - 1, TOTAL])
def test_training_that_goes_on_in_a_copy_is_judged_by_the_copy(
    said: Callable[[], list[str]], kept: bool, last: int
) -> None:
    original = make()
    train(original, range(1, 8))
    copied = copy.deepcopy(original)
    if not kept:
        del original
        gc.collect()
    train(copied, range(8, last + 1))
    del copied
    if kept:
        del original
    gc.collect()
    make()
    early = [text for text in said() if "never settled" in text]
    assert len(early) == (last < FINAL)
    assert all(f"stopped after step {last}," in text for text in early)


def test_training_that_goes_on_beside_its_copy_is_judged_too(said: Callable[[], list[str]]) -> None:
    original = make()
    optimizer = optimizer_of(original)
    train(original, range(1, 8), optimizer=optimizer)
    copied = copy.deepcopy(original)
    train(copied, range(8, TOTAL + 1))
    train(original, range(8, 10), optimizer=optimizer)
    del original, copied, optimizer
    gc.collect()
    make()
    early = [text for text in said() if "never settled" in text]
    assert ["stopped after step 9," in text for text in early] == [True]


def test_copy_that_does_not_train_ends_nothing(said: Callable[[], list[str]]) -> None:
    original = make()
    train(original, range(1, 8))
    copied = copy.deepcopy(original)
    copied.eval()
    del original
    gc.collect()
    make()
    assert len([text for text in said() if "never settled" in text]) == 1
    assert copied is not None


def test_steps_that_begin_anew_are_judged_anew(said: Callable[[], list[str]]) -> None:
    model = make()
    train(model)
    train(model)
    assert said() == []


def test_memory_goes_with_the_model(said: Callable[[], list[str]]) -> None:
    import weakref

    model = make()
    optimizer = optimizer_of(model)
    train(model, range(1, 8), optimizer=optimizer, order="late")
    energy = weakref.ref(next(p for n, p in model.named_parameters() if "lora_E" in n))
    del model, optimizer
    gc.collect()
    assert energy() is None


@pytest.mark.parametrize("wrapped", [True, False])
def test_pattern_with_names_that_the_model_has_no_more(said: Callable[[], list[str]], wrapped: bool) -> None:
    model = make(target_modules=["first", "second", "head"])
    train(model, range(1, FINAL + 1))
    if wrapped:
        model.base_model.model.first = torch.nn.Sequential(model.base_model.model.first)
    train(model, range(FINAL + 1, TOTAL + 1))
    assert ["pruned ranks come back" in words for words in said()] == [True] * wrapped
    assert all("of the 3 modules in its rank pattern, 1 are not in the model" in words for words in said())


@pytest.mark.parametrize("target_r", [0, 1])
def test_few_ranks_or_none_may_be_asked_for(said: Callable[[], list[str]], target_r: int) -> None:
    model = make(target_modules=["first"], init_r=2, target_r=target_r)
    train(model)
    assert sum(map(sum, model.peft_config["default"].rank_pattern.values())) == target_r
    assert said() == []


@pytest.mark.parametrize(
    ("score", "words"),
    [(1.0, "ends with 1 ranks where its budget allows 4"), (float("nan"), "ends with 8 ranks where its budget")],
)
def test_other_ranks_than_asked_for(said: Callable[[], list[str]], score: float, words: str) -> None:
    model = make()
    train(model, range(1, FINAL))
    allocator = model.base_model.rankallocator
    for kind in (allocator.exp_avg_ipt, allocator.exp_avg_unc):
        for name in kind:
            kind[name] = torch.full_like(kind[name], score)
            if "first.lora_E" in name:
                kind[name][0] *= 2
    train(model, [FINAL])
    assert words in only(said, model)


def test_the_only_rank_is_lost(said: Callable[[], list[str]]) -> None:
    train_the_head_alone(range(1, FINAL), target_modules=["first"], init_r=2, target_r=1)
    assert ["keeps 0 ranks where its budget allows 1" in text for text in said()] == [True]


def test_what_an_earlier_step_has_pruned_may_come_back(said: Callable[[], list[str]]) -> None:
    model = make()
    begin_with_an_energy_of_zero(model)
    optimizer = optimizer_of(model)

    def begin(model: Any, step: int) -> None:
        optimizer.param_groups[0]["lr"] = 0.0 if step < 6 else 1e-2

    train(model, range(1, FINAL), optimizer=optimizer, before=begin, loss=outside)
    assert ["All scores of lora_E are zero" in text for text in said()] == [True]
    assert len(peft_gradguard.report(model).adapters[0].advice) == 1
    train(model, range(FINAL, TOTAL + 1), optimizer=optimizer, loss=outside)
    assert peft_gradguard.report(model).adapters[0].advice == ()
    assert len(said()) == 1


def test_no_energy_ever_had_a_gradient(said: Callable[[], list[str]]) -> None:
    def regulariser(model: Any, step: int) -> torch.Tensor:
        return sum(p.square().sum() for n, p in model.named_parameters() if "lora_A" in n or "lora_B" in n)

    model = make()
    train(model, loss=regulariser)
    assert ["No lora_E ever had a gradient." in text for text in said() if "nothing to rank" in text] == [True]


@pytest.mark.parametrize(
    ("excluded", "why"), [("*lora_E*", "No lora_E is trainable."), ("*lora_[AB]*", "No module has")]
)
def test_one_kind_of_factor_excluded(said: Callable[[], list[str]], excluded: str, why: str) -> None:
    with peft_gradguard.exclude(excluded):
        train(make())
    assert [why in text for text in said() if "nothing to rank" in text] == [True]


def test_factors_that_are_not_trained_beside_energies_that_are(said: Callable[[], list[str]]) -> None:
    model = make()
    for name, parameter in model.named_parameters():
        if ".lora_A." in name or ".lora_B." in name:
            parameter.requires_grad = False
    train(model)
    texts = [text for text in said() if "nothing to rank" in text]
    assert ["No module has scores for lora_E and for lora_A or lora_B." in text for text in texts] == [True]


@pytest.mark.parametrize(
    "beside",
    [
        {"adapter": "another"},
        {"adapter": "second"},
        {"target_modules": ["first"]},
        {"target_modules": ["first", "second", "head"]},
    ],
)
def test_a_training_beside_one_that_goes_on_in_a_copy(said: Callable[[], list[str]], beside: dict[str, Any]) -> None:
    other, original = make(**beside), make()
    train(other, range(1, 8))
    train(original, range(1, 8))
    train(copy.deepcopy(original), range(8, TOTAL + 1))
    del other, original
    gc.collect()
    make()
    early = [text for text in said() if "never settled" in text]
    assert [f"(adapter {beside.get('adapter', 'default')!r})" in text for text in early] == [True]


def test_only_the_final_phase_of_a_pruned_adapter(said: Callable[[], list[str]], tmp_path: Path) -> None:
    import peft
    from situations import TwoLayers

    first = make()
    train(first)
    first.save_pretrained(str(tmp_path))
    model = peft.PeftModel.from_pretrained(TwoLayers(), str(tmp_path), is_trainable=True)
    train(model, range(FINAL + 1, TOTAL + 1))
    assert said() == []
