"""Scores computed for all parameters at once: PEFT's own bit for bit, and left to PEFT wherever that is in doubt."""

from __future__ import annotations

import copy
import inspect
import logging
import sys
import textwrap
from contextlib import contextmanager
from functools import wraps
from typing import TYPE_CHECKING, Any

import peft
import pytest
import torch
from guarding import guard_instead
from needs import SCORES_TOGETHER
from peft.tuners.adalora import RankAllocator
from scenarios import (
    FINALISING,
    PEFT_VERSION,
    SCENARIOS,
    Scenario,
    adalora_config,
    branches,
    build,
    classifier,
    every_step,
    loss_of,
    sequences,
    t5,
    train,
    vectors,
)
from torch import nn

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

# This module is imported by the worker without the guard as well: no import of the guard at the top.

today = pytest.mark.skipif(PEFT_VERSION < (0, 20), reason="once, on a PEFT of today, is enough")
KINDS = ("ipt", "exp_avg_ipt", "exp_avg_unc")
STEPS = 12
State = dict[str, list[tuple[str, torch.Tensor]]]


def state_of(allocator: RankAllocator) -> State:
    """All that an allocator keeps of scores, with the order of the names."""
    return {kind: [(name, t.clone()) for name, t in getattr(allocator, kind).items()] for kind in KINDS}


def assert_same(ours: list[State], theirs: list[State]) -> None:
    assert len(ours) == len(theirs) > 0
    for one, other in zip(ours, theirs, strict=True):
        for kind in KINDS:
            assert [name for name, _ in one[kind]] == [name for name, _ in other[kind]]
            for (_, mine), (_, pefts) in zip(one[kind], other[kind], strict=True):
                assert (mine.dtype, mine.shape, mine.stride()) == (pefts.dtype, pefts.shape, pefts.stride())
                assert torch.equal(mine, pefts)
                assert type(mine) is torch.Tensor
                assert not mine.requires_grad


@contextmanager
def calls_of(function: Any) -> Iterator[list[str]]:
    """Note each time that this function runs, whoever calls it."""
    calls: list[str] = []
    before = sys.getprofile()

    def note(frame: Any, event: str, _: Any) -> None:
        if event == "call" and frame.f_code is function.__code__:
            calls.append(frame.f_code.co_name)

    sys.setprofile(note)
    try:
        yield calls
    finally:
        sys.setprofile(before)


def pefts_update_ipt() -> Any:
    return inspect.unwrap(RankAllocator.update_ipt)


# Whole trainings.

TRAININGS = {
    "classifier": classifier(),
    "outside loss": branches(regularised=False),
    "encoder-decoder": Scenario(base=t5, config={"target_modules": ["q", "v"]}, batch=sequences),
}


def train_noting_states(scenario: Scenario | str) -> tuple[list[State], Any]:
    if isinstance(scenario, str):
        scenario = {**SCENARIOS, **TRAININGS, **MORE}[scenario]
    states: list[State] = []

    def allocate(model: peft.PeftModel, step: int) -> None:
        scenario.allocate(model, step)
        states.append(state_of(model.base_model.rankallocator))

    settings = {**vars(scenario), "allocate": allocate}
    return states, train(Scenario(**settings))


@pytest.mark.peft
@pytest.mark.parametrize("name", TRAININGS)
def test_training_is_that_of_plain_peft(name: str, plain: Callable[..., Any]) -> None:
    with calls_of(pefts_update_ipt()) as calls:
        states, outcome = train_noting_states(name)
    theirs, plain_outcome = plain(train_noting_states, name)
    assert_same(states, theirs)
    assert outcome.patterns == plain_outcome.patterns
    assert all(torch.equal(weight, plain_outcome.weights[name]) for name, weight in outcome.weights.items())
    # The first step, three that are compared; A and B have nothing but zeros in the first steps.
    assert not SCORES_TOGETHER or 4 <= len(calls) <= 6 < FINALISING - 1
    assert all(not kind for kind in states[FINALISING - 1].values())


def after_zero_grad(model: peft.PeftModel, step: int) -> None:
    model.zero_grad()
    every_step(model, step)


def overflowed(model: peft.PeftModel, step: int) -> None:
    for name, parameter in model.named_parameters():
        if (step == 8 and ".lora_" in name and parameter.grad is not None) or (step == 10 and "trunk.0.lora_A" in name):
            parameter.grad.view(-1)[:1] = float("inf")
    every_step(model, step)


MORE = {
    "late calls": branches(allocate=after_zero_grad, regularised=False),
    "overflows": branches(allocate=overflowed, regularised=False),
}


@today
@pytest.mark.parametrize("name", [*SCENARIOS, *MORE])
def test_skipping_is_that_of_peft_s_own_scoring(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    with calls_of(pefts_update_ipt()) as few:
        together, outcome = train_noting_states(name)
    monkeypatch.setenv("PEFT_GRADGUARD_FUSED", "0")
    with calls_of(pefts_update_ipt()) as many:
        apart, other = train_noting_states(name)
    assert_same(together, apart)
    assert outcome.patterns == other.patterns
    assert all(torch.equal(weight, other.weights[name]) for name, weight in outcome.weights.items())
    # Three calls in all, in the training that hardly calls.
    assert len(few) < len(many) or len(many) < 4


# Single steps, with gradients made up.


class Mixed(nn.Module):
    """Layers of several sizes, one of them larger than what is computed together."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([nn.Linear(8, 5), nn.Linear(50_000, 3), nn.Linear(7, 9), nn.Linear(3, 4)])
        self.halves = nn.ModuleList([nn.Linear(8, 5), nn.Linear(6, 7)])


def mixed_model() -> peft.PeftModel:
    torch.manual_seed(0)
    targets = ["layers.0", "layers.1", "layers.2", "layers.3", "halves.0", "halves.1"]
    model = peft.get_peft_model(Mixed(), adalora_config(target_modules=targets, beta1=0.85, beta2=0.7))
    for parameter in model.parameters():
        parameter.data.normal_()
    return model


def give_gradients(model: nn.Module, step: int) -> None:
    torch.manual_seed(step)
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            gradient = torch.randn(parameter.shape[::-1]).t() if "layers.2" in name else torch.randn(parameter.shape)
            parameter.grad = gradient.to(parameter.dtype)


def adapters(model: nn.Module, part: str, dtype: torch.dtype) -> None:
    for name, parameter in model.named_parameters():
        if part in name and ".lora_" in name:
            parameter.grad = None
            parameter.data = parameter.data.to(dtype)


def nothing(model: peft.PeftModel) -> None:
    pass


def mixed_types(model: peft.PeftModel) -> None:
    adapters(model, "halves.0", torch.bfloat16)
    adapters(model, "halves.1", torch.float16)
    adapters(model, "layers.0", torch.float64)


def one_of_its_type(model: peft.PeftModel) -> None:
    adapters(model, "layers.1.lora_E", torch.float64)


def to_half(model: peft.PeftModel) -> None:
    adapters(model, "", torch.bfloat16)


def to_double(model: peft.PeftModel) -> None:
    adapters(model, "layers.0", torch.float64)


def other_betas(model: peft.PeftModel) -> None:
    model.base_model.rankallocator.beta1 = 0.3
    model.base_model.rankallocator.beta2 = 0.95


def weights_of_nan(model: peft.PeftModel) -> None:
    model.base_model.model.layers[0].lora_A["default"].data[0, 0] = float("nan")


CHANGES: dict[str, tuple[int, Callable[[peft.PeftModel], None], int]] = {
    # Before which step what changes, and how often PEFT's own code is expected to score.
    "one type": (1, nothing, 4),
    "mixed types": (1, mixed_types, 4),
    "one of its type": (1, one_of_its_type, 4),
    "half precision later": (7, to_half, 4 + STEPS - 6),
    "double precision later": (7, to_double, 4 + 1 + 3),
    "other betas later": (7, other_betas, 4 + 3),
    "NaN in a weight": (1, weights_of_nan, 4),
}


def steps(change: str) -> list[State]:
    when, do, _ = CHANGES[change]
    model = mixed_model()
    allocator, states = model.base_model.rankallocator, []
    for step in range(1, STEPS + 1):
        if step == when:
            do(model)
        give_gradients(model, step)
        allocator.update_ipt(model.base_model.model)
        if change == "NaN in a weight":
            # NaN is not equal to itself.
            states.append({kind: [(n, t.nan_to_num(-1.0)) for n, t in s] for kind, s in state_of(allocator).items()})
        else:
            states.append(state_of(allocator))
    return states


@pytest.mark.peft
@pytest.mark.parametrize("change", CHANGES)
def test_scores_are_those_of_plain_peft(change: str, plain: Callable[..., Any]) -> None:
    with calls_of(pefts_update_ipt()) as calls:
        states = steps(change)
    assert_same(states, plain(steps, change))
    assert len(calls) == (CHANGES[change][2] if SCORES_TOGETHER else STEPS)


def ready(model: peft.PeftModel | None = None) -> tuple[peft.PeftModel, RankAllocator]:
    """A model whose scores are computed together from now on."""
    model = model or mixed_model()
    allocator = model.base_model.rankallocator
    for step in range(1, 5):
        give_gradients(model, step)
        allocator.update_ipt(model.base_model.model)
    with calls_of(pefts_update_ipt()) as calls:
        allocator.update_ipt(model.base_model.model)
    assert calls == []
    return model, allocator


@today
def test_scores_are_new_tensors_of_their_own() -> None:
    model, allocator = ready()
    held = {kind: dict(getattr(allocator, kind)) for kind in KINDS}
    values = state_of(allocator)
    allocator.update_ipt(model.base_model.model)
    for kind in KINDS:
        assert all(torch.equal(held[kind][name], value) for name, value in values[kind])
    tensors = [tensor for kind in KINDS for tensor in getattr(allocator, kind).values()]
    assert len({tensor.untyped_storage().data_ptr() for tensor in tensors}) == len(tensors)
    assert all(tensor.untyped_storage().nbytes() == tensor.numel() * 4 for tensor in tensors)
    assert all(tensor.is_leaf and tensor._base is None for tensor in tensors)


@today
def test_nothing_is_put_on_the_allocator_and_a_copy_is_compared_anew(plain: Callable[..., Any]) -> None:
    model, allocator = ready()
    assert list(vars(allocator)) == plain(names_on_an_allocator)
    twin = copy.deepcopy(allocator)
    with calls_of(pefts_update_ipt()) as calls:
        for _ in range(6):
            twin.update_ipt(model.base_model.model)
    assert len(calls) == 3


def names_on_an_allocator() -> list[str]:
    return list(vars(mixed_model().base_model.rankallocator))


@today
def test_zeros_prove_nothing() -> None:
    model = mixed_model()
    for parameter in model.parameters():
        parameter.data.zero_()
    with calls_of(pefts_update_ipt()) as calls:
        for step in range(1, 8):
            give_gradients(model, step)
            model.base_model.rankallocator.update_ipt(model.base_model.model)
    assert len(calls) == 7


# Left to PEFT.


def other_arithmetic(old: str, new: str) -> Any:
    """PEFT's own update_ipt with a change in its text, as another release might have it."""
    source = textwrap.dedent(inspect.getsource(pefts_update_ipt()))
    assert old in source
    made: dict[str, Any] = {}
    exec(source.replace(old, new), vars(sys.modules[RankAllocator.__module__]), made)
    return made["update_ipt"]


CHANGED = {
    "the other beta": ("self.beta2 * self.exp_avg_unc[n]", "self.beta1 * self.exp_avg_unc[n]"),
    "another rounding": ("(p * p.grad).abs()", "(p * p.grad * 3 / 3).abs()"),
    "another layout": ("(p * p.grad).abs()", "(p * p.grad).abs().t().contiguous().t()"),
    "in place": (
        "self.exp_avg_ipt[n] = self.beta1 * self.exp_avg_ipt[n] +",
        "self.exp_avg_ipt[n] = self.exp_avg_ipt[n].mul_(self.beta1) +",
    ),
    "another order": (
        "# Sensitivity smoothing",
        "if 'lora_E' in n: self.exp_avg_unc[n] = self.exp_avg_unc.pop(n)",
    ),
    "names in front": ("self.ipt[n] =", "self.exp_avg_ipt.setdefault('all', p.detach()); self.ipt[n] ="),
    "names in between": ("self.ipt[n] =", "self.exp_avg_unc['zero'] = p.detach(); self.ipt[n] ="),
}


def steps_changed(name: str) -> list[State]:
    """Steps under the changed PEFT, in a process without the guard."""
    own = RankAllocator.update_ipt
    RankAllocator.update_ipt = other_arithmetic(*CHANGED[name])
    try:
        return steps("one type")
    finally:
        RankAllocator.update_ipt = own


@pytest.mark.peft
@pytest.mark.parametrize("name", CHANGED)
def test_peft_that_scores_otherwise_is_left_to_it(
    name: str, plain: Callable[..., Any], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    changed = other_arithmetic(*CHANGED[name])
    guard_instead(monkeypatch, changed)
    with caplog.at_level(logging.DEBUG, logger="peft_gradguard"), calls_of(changed) as calls:
        states = steps("one type")
    assert len(calls) == STEPS
    theirs = plain(steps_changed, name)
    if name.startswith("names"):
        assert [list(map(len, state.values())) for state in states] == [
            list(map(len, state.values())) for state in theirs
        ]
    else:
        assert_same(states, theirs)
    (said,) = [record for record in caplog.records if "scores are left to" in record.message]
    assert said.levelno == logging.DEBUG
    assert "left to PEFT's own code: its update_ipt is not that of a PEFT release" in said.message


@today
@pytest.mark.parametrize("name", ["the other beta", "another rounding", "another layout", "in place"])
def test_a_text_that_is_known_is_compared_all_the_same(
    name: str, plain: Callable[..., Any], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """What the text says is not all: torch, or what it is given, may make something else of it."""
    from peft_gradguard.speed import fused

    changed = other_arithmetic(*CHANGED[name])
    guard_instead(monkeypatch, changed)
    monkeypatch.setattr(fused, "is_known", lambda function: True)
    with caplog.at_level(logging.DEBUG, logger="peft_gradguard"), calls_of(changed) as calls:
        states = steps("one type")
    assert len(calls) == STEPS
    assert_same(states, plain(steps_changed, name))
    (said,) = [record for record in caplog.records if "scores are left to" in record.message]
    assert "left to PEFT's own code: this PEFT" in said.message


class Overriding(RankAllocator):
    def update_ipt(self, model: nn.Module) -> None:
        super().update_ipt(model)


class Inheriting(RankAllocator):
    pass


def wrapped_above(monkeypatch: pytest.MonkeyPatch, allocator: RankAllocator) -> None:
    inner = RankAllocator.update_ipt
    monkeypatch.setattr(RankAllocator, "update_ipt", wraps(inner)(lambda self, model: inner(self, model)))


def wrapped_beneath(monkeypatch: pytest.MonkeyPatch, allocator: RankAllocator) -> None:
    inner = pefts_update_ipt()
    theirs = wraps(inner)(lambda self, model: inner(self, model))
    guard_instead(monkeypatch, theirs)


def put_on_the_instance(monkeypatch: pytest.MonkeyPatch, allocator: RankAllocator) -> None:
    inner = allocator.update_ipt
    allocator.update_ipt = lambda model: inner(model)


def overridden(monkeypatch: pytest.MonkeyPatch, allocator: RankAllocator) -> None:
    allocator.__class__ = Overriding


def switched_off(monkeypatch: pytest.MonkeyPatch, allocator: RankAllocator) -> None:
    monkeypatch.setenv("PEFT_GRADGUARD_FUSED", "off")


DISTURBED = [wrapped_above, wrapped_beneath, put_on_the_instance, overridden, switched_off]


@today
@pytest.mark.parametrize("disturb", DISTURBED)
def test_peft_scores_where_other_code_is_in_the_way(
    disturb: Callable[..., None], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    model = mixed_model()
    allocator = model.base_model.rankallocator
    disturb(monkeypatch, allocator)
    with (
        caplog.at_level(logging.DEBUG, logger="peft_gradguard"),
        calls_of(pefts_update_ipt()) as calls,
    ):
        for step in range(1, STEPS + 1):
            give_gradients(model, step)
            allocator.update_ipt(model.base_model.model)
    assert len(calls) == STEPS
    (said,) = [record for record in caplog.records if "scores are left to" in record.message]
    assert said.levelno == logging.DEBUG
    assert ("PEFT_GRADGUARD_FUSED" if disturb is switched_off else "other code") in said.message


@today
def test_wrapper_that_comes_later_ends_it(monkeypatch: pytest.MonkeyPatch) -> None:
    model, allocator = ready()
    wrapped_above(monkeypatch, allocator)
    with calls_of(pefts_update_ipt()) as calls:
        allocator.update_ipt(model.base_model.model)
    monkeypatch.undo()
    with calls_of(pefts_update_ipt()) as more:
        allocator.update_ipt(model.base_model.model)
    assert len(calls) == len(more) == 1


@today
def test_subclass_that_overrides_nothing_of_it_is_fine() -> None:
    model = mixed_model()
    model.base_model.rankallocator.__class__ = Inheriting
    ready(model)


class Tagged(torch.Tensor):
    pass


def tag(allocator: RankAllocator, name: str, parameter: torch.nn.Parameter) -> None:
    parameter.grad = parameter.grad.as_subclass(Tagged)


def shrink_average(allocator: RankAllocator, name: str, parameter: torch.nn.Parameter) -> None:
    allocator.exp_avg_ipt[name] = allocator.exp_avg_ipt[name][:1].clone()


def widen_average(allocator: RankAllocator, name: str, parameter: torch.nn.Parameter) -> None:
    allocator.exp_avg_ipt[name] = allocator.exp_avg_ipt[name].double()


def forget_score(allocator: RankAllocator, name: str, parameter: torch.nn.Parameter) -> None:
    del allocator.ipt[name]


@today
@pytest.mark.parametrize("change", [tag, shrink_average, widen_average, forget_score])
def test_tensors_of_other_kinds_are_left_to_peft(change: Callable[..., None]) -> None:
    model, allocator = ready()
    parameter = model.base_model.model.layers[0].lora_A["default"]
    change(allocator, "layers.0.lora_A.default", parameter)
    with calls_of(pefts_update_ipt()) as calls:
        allocator.update_ipt(model.base_model.model)
    assert len(calls) == 1


@today
@pytest.mark.parametrize("value", ["1", " TRUE ", "", None])
def test_switch_on(value: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    if value is None:
        monkeypatch.delenv("PEFT_GRADGUARD_FUSED", raising=False)
    else:
        monkeypatch.setenv("PEFT_GRADGUARD_FUSED", value)
    ready()


@today
def test_nonsense_in_the_switch_is_named_and_ignored(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PEFT_GRADGUARD_FUSED", "fast")
    named = r"PEFT_GRADGUARD_FUSED='fast'.*1, true, yes, on.*0, false, no, off"
    with pytest.warns(RuntimeWarning, match=named) as said:
        ready()
    # Where the variable is asked for, which -W can name.
    assert said[0].filename.endswith("fused.py")


@today
def test_only_what_is_new_brings_peft_back_for_a_step() -> None:
    """A parameter thawed later: PEFT makes its first scores, and the next step is made together again."""
    model = build(branches())
    allocator = model.base_model.rankallocator
    late = model.base_model.model.trunk[0].lora_A["default"]
    late.requires_grad = False
    by_peft = []
    for step in range(1, 12):
        late.requires_grad = step >= 9
        model.zero_grad()
        for parameter in model.parameters():
            parameter.data.add_(0.01)
        loss_of(model, vectors(step), False).backward()
        with calls_of(pefts_update_ipt()) as calls:
            model.base_model.update_and_allocate(step)
        by_peft.append(len(calls))
    assert by_peft == [1, 1, 1, 1, 0, 0, 0, 0, 1, 0, 0]
    assert next(reversed(allocator.ipt)) == "trunk.0.lora_A.default"
