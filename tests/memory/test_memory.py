"""What the guard remembers of an allocator keeps nothing alive."""

from __future__ import annotations

import copy
import gc
import weakref

import pytest
from reported import only
from scenarios import FINALISING, INIT_R, TARGET_R, branches, build
from situations import make, optimizer_of, outside, train
from steps import advance, new_model

import peft_gradguard
from peft_gradguard.memory.memory import known_memory


@pytest.mark.peft
def test_nothing_keeps_model_or_allocator_alive() -> None:
    model = new_model()
    advance(model, 1)
    advance(model, 2, branch=False)
    references = [weakref.ref(model.base_model.model), weakref.ref(model.base_model.rankallocator)]
    del model
    gc.collect()
    assert [reference() for reference in references] == [None, None]


@pytest.mark.peft
@pytest.mark.parametrize("way", ["in time", "late", "before", "one rests"])
@pytest.mark.parametrize("set_to_none", [True, False])
@pytest.mark.parametrize("mark", ["attribute", "hook"])
def test_parameters_that_know_their_model_let_it_go(way: str, set_to_none: bool, mark: str) -> None:
    model = make()
    for parameter in model.parameters():
        if mark == "attribute":
            parameter.model = model
        elif parameter.requires_grad:
            parameter.register_hook(lambda gradient, model=model: None)
    optimizer = optimizer_of(model)
    if way == "one rests":
        model.base_model.model.first.forward = lambda inputs: inputs
    train(
        model,
        range(1, 8),
        order="in time" if way == "one rests" else way,
        optimizer=optimizer,
        loss=outside,
        set_to_none=set_to_none,
    )
    gone = weakref.ref(model)
    del model, optimizer, parameter
    gc.collect()
    assert gone() is None


def test_report_without_the_guard_leaves_no_memory() -> None:
    with peft_gradguard.disabled():
        model = build(branches())
        advance(model, *range(1, FINALISING + 1), optimise=True)
        adapter = only(model)
        assert known_memory(model.base_model.rankallocator) is None
    assert sum(module.rank_kept for module in adapter.modules) == 4 * TARGET_R
    assert all(module.ranked for module in adapter.modules)
    assert (adapter.step, adapter.init_budget, adapter.budget) == (None, 4 * INIT_R, None)


def test_nothing_keeps_the_model_alive(history: None) -> None:
    model = build(branches())
    advance(model, 1)
    advance(model, 2, branch=False)
    report = peft_gradguard.report(model)
    references = [weakref.ref(model.base_model.model), weakref.ref(model.base_model.rankallocator)]
    copied = copy.deepcopy(report)
    del model
    gc.collect()
    assert [reference() for reference in references] == [None, None]
    assert copied == report
