"""Hostile use: what user code, logging and the interpreter may do around the guard, and how it holds."""

from __future__ import annotations

import copy
import functools
import gc
import json
import logging
import multiprocessing
import os
import pickle
import subprocess
import sys
import textwrap
import traceback
from typing import TYPE_CHECKING, Any

import peft
import pytest
import torch
import wrapt
from peft.tuners.adalora import RankAllocator
from scenarios import FINALISING, INIT_R, TARGET_R, TOTAL, Scenario, TwoBranches, adalora_config, branches, build, frozen, loss_of, vectors
from torch import nn

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

INNER = "base_model.model."


@pytest.fixture
def model() -> peft.PeftModel:
    return new_model()


def new_model(kind: type[RankAllocator] | None = None, scenario: Scenario | None = None) -> peft.PeftModel:
    """A model whose energies are not all zero, as PEFT starts them: with scores of 0 every rank would be pruned."""
    model = build(scenario or branches())
    if kind is not None:
        model.base_model.rankallocator = kind(model.base_model.model, model.peft_config["default"], "default")
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if ".lora_E." in name:
                parameter.normal_()
    return model


@pytest.fixture
def said(caplog: pytest.LogCaptureFixture) -> Callable[[], list[str]]:
    return lambda: [record.getMessage() for record in caplog.records if record.name == "peft_gradguard"]


def backward(model: peft.PeftModel, step: int, **batch: Any) -> None:
    model.zero_grad()
    loss_of(model, vectors(step, **batch), False).backward()


def advance(model: peft.PeftModel, *steps: int, **batch: Any) -> None:
    for step in steps:
        backward(model, step, **batch)
        model.base_model.update_and_allocate(step)


def late(model: peft.PeftModel, optimizer: torch.optim.Optimizer, *steps: int) -> None:
    for step in steps:
        loss_of(model, vectors(step), False).backward()
        optimizer.step()
        optimizer.zero_grad()
        model.base_model.update_and_allocate(step)


def kept_ranks(model: peft.PeftModel) -> int:
    return sum(map(sum, model.peft_config["default"].rank_pattern.values()))


def state_of(allocator: RankAllocator) -> dict[str, Any]:
    scores = {name: dict(getattr(allocator, name)) for name in ("ipt", "exp_avg_ipt", "exp_avg_unc")}
    return {**scores, "budget": (allocator.init_bgt, allocator.target_bgt, list(allocator.name_set))}


def same_state(one: dict[str, Any], other: dict[str, Any]) -> bool:
    """The same tensors, not only equal ones."""
    scores = ("ipt", "exp_avg_ipt", "exp_avg_unc")
    return one["budget"] == other["budget"] and all(
        one[name].keys() == other[name].keys() and all(one[name][key] is other[name][key] for key in one[name])
        for name in scores
    )


# -- Subclasses of RankAllocator


class CallsSuper(RankAllocator):
    def update_ipt(self, model: nn.Module) -> None:
        super().update_ipt(model)


class CallsSuperTwice(RankAllocator):
    def update_ipt(self, model: nn.Module) -> None:
        super().update_ipt(model)
        super().update_ipt(model)


class OwnScores(RankAllocator):
    """Scores by the gradient alone, and by PEFT's rule for what is AdaLoRA's."""

    def update_ipt(self, model: nn.Module) -> None:
        for name, parameter in model.named_parameters():
            if "lora_" in name and self.adapter_name in name:
                self.ipt[name] = self.exp_avg_ipt[name] = self.exp_avg_unc[name] = parameter.grad.abs()


class EqualByConfig(RankAllocator):
    """Like a data class: equal to others, and not hashable."""

    def __eq__(self, other: object) -> bool:
        return isinstance(other, RankAllocator)

    __hash__ = None  # type: ignore[assignment]


class EqualAndHashable(EqualByConfig):
    def __hash__(self) -> int:  # type: ignore[override]
        return 1


SUBCLASSES = [CallsSuper, CallsSuperTwice, OwnScores, EqualByConfig, EqualAndHashable]


@pytest.mark.parametrize("kind", SUBCLASSES)
def test_subclass_is_guarded_too(kind: type[RankAllocator]) -> None:
    model = new_model(kind)
    frozen("trunk.0")(model, 0)
    advance(model, *range(1, TOTAL + 1))
    assert kept_ranks(model) == 3 * TARGET_R
    assert not [name for name in model.peft_config["default"].rank_pattern if "trunk.0" in name]


@pytest.mark.parametrize("kind", SUBCLASSES)
def test_late_calls_of_a_subclass_are_rescued(
    kind: type[RankAllocator], said: Callable[[], list[str]]
) -> None:
    model = new_model(kind)
    late(model, torch.optim.SGD(model.parameters(), lr=1e-2), *range(1, TOTAL + 1))
    assert kept_ranks(model) == 4 * TARGET_R
    assert len(said()) == 1
    assert "step 1" in said()[0]


@pytest.mark.parametrize("kind", [EqualByConfig, EqualAndHashable])
def test_allocators_that_are_equal_are_still_two(
    kind: type[RankAllocator], said: Callable[[], list[str]]
) -> None:
    for _ in range(2):
        model = new_model(kind)
        frozen("trunk.0", "lora_A")(model, 0)
        advance(model, 1)
    assert len(said()) == 2


# -- Other wrappers


def by_wrapt(seen: list[str]) -> None:
    def observe(wrapped: Any, instance: Any, args: Any, kwargs: Any) -> Any:
        seen.append(wrapped.__name__)
        return wrapped(*args, **kwargs)

    wrapt.wrap_function_wrapper(RankAllocator, "update_ipt", observe)


def by_assignment(seen: list[str]) -> None:
    original = RankAllocator.update_ipt

    def update_ipt(self: RankAllocator, model: nn.Module) -> None:
        seen.append("update_ipt")
        original(self, model)

    RankAllocator.update_ipt = update_ipt


def by_functools(seen: list[str]) -> None:
    original = RankAllocator.update_ipt

    @functools.wraps(original)
    def update_ipt(*args: Any, **kwargs: Any) -> None:
        seen.append("update_ipt")
        original(*args, **kwargs)

    RankAllocator.update_ipt = update_ipt


@pytest.fixture
def put_back() -> Iterator[None]:
    original = vars(RankAllocator)["update_ipt"]
    yield
    RankAllocator.update_ipt = original


@pytest.mark.usefixtures("put_back")
@pytest.mark.parametrize("is_late", [False, True], ids=["in time", "late"])
@pytest.mark.parametrize("wrap", [by_wrapt, by_assignment, by_functools])
def test_wrapper_around_ours_sees_each_call_and_all_holds(
    wrap: Callable[[list[str]], None], is_late: bool, model: peft.PeftModel
) -> None:
    seen: list[str] = []
    wrap(seen)
    frozen("trunk.0")(model, 0)
    if is_late:
        late(model, torch.optim.SGD(model.parameters(), lr=1e-2), *range(1, TOTAL + 1))
    else:
        advance(model, *range(1, TOTAL + 1))
    assert len(seen) == FINALISING - 1
    assert kept_ranks(model) == 3 * TARGET_R


# -- named_parameters as user code makes it


def test_named_parameters_patched_on_the_model(model: peft.PeftModel) -> None:
    """A filter without arguments, as one writes it for an optimizer."""
    inner = model.base_model.model
    walk = inner.named_parameters
    inner.named_parameters = lambda: ((name, p) for name, p in walk() if "trunk.0" not in name)
    advance(model, *range(1, FINALISING + 1))
    assert kept_ranks(model) == 3 * TARGET_R
    assert not [name for name in model.peft_config["default"].rank_pattern if "trunk.0" in name]


def train_with_duplicates(doubled: str) -> tuple[Any, Any, list[Any]]:
    model = new_model()
    inner = model.base_model.model
    walk = inner.named_parameters
    inner.named_parameters = lambda: [pair for pair in walk() for _ in range(1 + (doubled in pair[0]))]
    advance(model, *range(1, FINALISING))
    allocator = model.base_model.rankallocator
    return allocator.exp_avg_ipt, model.peft_config["default"].rank_pattern, [allocator.init_bgt, allocator.target_bgt]


def tied() -> nn.Module:
    base = TwoBranches()
    base.branch[2] = base.trunk[2]
    return base


def train_tied() -> tuple[Any, Any, list[Any]]:
    """One module under two names, as in ALBERT's shared layers."""
    model = new_model(scenario=branches(base=tied))
    advance(model, *range(1, FINALISING))
    allocator = model.base_model.rankallocator
    return allocator.exp_avg_ipt, model.peft_config["default"].rank_pattern, [allocator.init_bgt, allocator.target_bgt]


@pytest.mark.parametrize(
    "training", [(train_with_duplicates, "lora_"), (train_with_duplicates, "trunk.0.lora_B"), (train_tied,)]
)
def test_parameters_met_twice_are_scored_as_plain_peft_does(
    training: tuple[Any, ...], plain: Callable[..., Any]
) -> None:
    scores, pattern, budget = training[0](*training[1:])
    plain_scores, plain_pattern, plain_budget = plain(*training)
    assert scores.keys() == plain_scores.keys()
    assert all(torch.equal(scores[name], plain_scores[name]) for name in scores)
    assert pattern == plain_pattern
    assert budget == plain_budget
