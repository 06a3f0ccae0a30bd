"""Subclasses of ``RankAllocator``, and calls as other people's code makes them: as in plain PEFT."""

from __future__ import annotations

import copy
import functools
import pickle
import types
import unittest.mock
from typing import TYPE_CHECKING, Any

import peft
import pytest
import torch
from peft.tuners.adalora import RankAllocator

import peft_gradguard

if TYPE_CHECKING:
    from collections.abc import Callable

pytestmark = pytest.mark.peft

TOTAL, TFINAL = 30, 5


def new_model(kind: type[RankAllocator] = RankAllocator, frozen: tuple[str, ...] = ()) -> peft.PeftModel:
    torch.manual_seed(0)
    base = torch.nn.Sequential(*[torch.nn.Linear(8, 8) for _ in range(4)])
    modules = ["0", "1", "2", "3"]
    config = peft.AdaLoraConfig(
        target_modules=modules, init_r=4, target_r=2, total_step=TOTAL, tinit=2, tfinal=TFINAL, deltaT=1
    )
    model = peft.get_peft_model(base, config)
    for name, parameter in model.named_parameters():
        if "lora_" in name and any(f".{module}." in name for module in frozen):
            parameter.requires_grad_(False)
    inner = model.base_model
    inner.rankallocator = kind(inner.model, model.peft_config["default"], "default")
    return model


def train(model: peft.PeftModel, late: bool = False) -> dict[str, Any]:
    """What is left: budgets, weights, kept ranks."""
    allocator, seen = model.base_model.rankallocator, []
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    torch.manual_seed(1)
    for step in range(1, TOTAL + 1):
        model(torch.randn(4, 8)).pow(2).mean().backward()
        optimizer.step()
        if late:
            optimizer.zero_grad()
        model.base_model.update_and_allocate(step)
        optimizer.zero_grad()
        seen.append((getattr(allocator, "init_bgt", None), getattr(allocator, "target_bgt", None)))
    pattern = model.peft_config["default"].rank_pattern or {}
    weights = {name: p.detach().clone() for name, p in model.named_parameters()}
    return {"budgets": seen, "pattern": pattern, "weights": weights}


def same(one: dict[str, Any], other: dict[str, Any]) -> bool:
    weights = zip(one["weights"].values(), other["weights"].values(), strict=True)
    rest = all(one[key] == other[key] for key in ("budgets", "pattern"))
    return rest and all(torch.equal(a, b) for a, b in weights)


# -- The budget is settled when scoring ends


class OwnUpdateAndAllocate(RankAllocator):
    def update_and_allocate(self, model: Any, global_step: int, force_mask: bool = False) -> Any:
        if global_step < self.peft_config.total_step - self.peft_config.tfinal:
            self.update_ipt(model)
        budget, mask = self.budget_schedule(global_step)
        return budget, self.mask_to_budget(model, budget) if mask or force_mask else None


class OwnSchedule(RankAllocator):
    """PEFT's own schedule, written out."""

    def budget_schedule(self, step: int) -> tuple[int, bool]:
        config = self.peft_config
        if step <= config.tinit:
            return self.init_bgt, False
        if step > config.total_step - config.tfinal:
            return self.target_bgt, True
        left = 1 - (step - config.tinit) / (config.total_step - config.tfinal - config.tinit)
        return int((self.init_bgt - self.target_bgt) * left**3 + self.target_bgt), step % config.deltaT == 0


class OwnScoringAndSchedule(OwnSchedule):
    def update_ipt(self, model: Any) -> None:
        for name, parameter in model.named_parameters():
            if "lora_" in name and self.adapter_name in name:
                if name not in self.ipt:
                    for scores in (self.ipt, self.exp_avg_ipt, self.exp_avg_unc):
                        scores[name] = torch.zeros_like(parameter)
                with torch.no_grad():
                    self.ipt[name] = (parameter * parameter.grad).abs().detach()
                    self.exp_avg_ipt[name] = self.beta1 * self.exp_avg_ipt[name] + (1 - self.beta1) * self.ipt[name]
                    change = (self.ipt[name] - self.exp_avg_ipt[name]).abs()
                    self.exp_avg_unc[name] = self.beta2 * self.exp_avg_unc[name] + (1 - self.beta2) * change


class CallsSuper(RankAllocator):
    def update_ipt(self, model: Any) -> None:
        super().update_ipt(model)


@pytest.mark.parametrize("kind", [OwnUpdateAndAllocate, OwnSchedule, OwnScoringAndSchedule, CallsSuper])
def test_frozen_layers_leave_the_budget_of_a_subclass_too(kind: type[RankAllocator]) -> None:
    expected, got = train(new_model(frozen=("2", "3"))), train(new_model(kind, frozen=("2", "3")))
    assert got["pattern"] == expected["pattern"]
    assert sum(map(sum, got["pattern"].values())) == 2 * 2
    assert got["budgets"][-1] == (2 * 4, 2 * 2)


def scored_by_hand(model: peft.PeftModel) -> tuple[Any, torch.nn.Module]:
    """Score one backward, and return the allocator and what its methods are called with."""
    allocator, inner = model.base_model.rankallocator, model.base_model.model
    for name, parameter in model.named_parameters():
        if "lora_E" in name:
            torch.nn.init.normal_(parameter)
    model(torch.randn(4, 8)).pow(2).mean().backward()
    allocator.update_ipt(inner)
    return allocator, inner


def test_methods_called_one_after_the_other_by_hand() -> None:
    allocator, inner = scored_by_hand(new_model(frozen=("0",)))
    assert (allocator.init_bgt, allocator.target_bgt, len(allocator.name_set)) == (12, 6, 3)
    assert allocator.budget_schedule(TOTAL)[0] == 6
    assert sum(map(sum, allocator.mask_to_budget(inner, 6).values())) == 6


# -- Allocators that rank in their own way


class Magnitude(RankAllocator):
    """Prune the smallest singular values; no scores, no gradients."""

    def update_ipt(self, model: Any) -> None:
        pass

    def mask_to_budget(self, model: Any, budget: int) -> Any:
        energies = {n: p for n, p in model.named_parameters() if f"lora_E.{self.adapter_name}" in n}
        every = torch.cat([p.detach().abs().view(-1) for p in energies.values()])
        threshold = torch.kthvalue(every, self.init_bgt - budget)[0].item() if self.init_bgt > budget else -1.0
        with torch.no_grad():
            for energy in energies.values():
                energy.masked_fill_(energy.abs() <= threshold, 0.0)
        return {n: (p.abs() > threshold).view(-1).tolist() for n, p in energies.items()}


class KeepsOtherAttributes(Magnitude):
    def reset_ipt(self) -> None:
        self.scores: dict[str, Any] = {}

    def _set_budget_scheduler(self, model: Any) -> None:
        self.init_bgt, self.target_bgt = 4 * 4, 4 * 2


class ScoresUnderAnotherName(RankAllocator):
    """PEFT masks, by scores that are kept elsewhere."""

    def reset_ipt(self) -> None:
        super().reset_ipt()
        self.values: dict[str, torch.Tensor] = {}

    def update_ipt(self, model: Any) -> None:
        for name, parameter in model.named_parameters():
            if "lora_" in name and self.adapter_name in name:
                self.values[name] = parameter.detach().abs()

    def _element_score(self, n: str) -> torch.Tensor:
        return self.values[n]


class LooksAtBaseWeights(Magnitude):
    """Weighs a module by what it adapts."""

    def mask_to_budget(self, model: Any, budget: int) -> Any:
        weights = dict(model.named_parameters())
        with torch.no_grad():
            pattern = {}
            for name, energy in weights.items():
                if "lora_E" in name:
                    base = weights.get(name.replace("lora_E.default", "base_layer.weight"))
                    base = weights[name.replace("lora_E.default", "weight")] if base is None else base
                    keep = energy.abs() * base.norm() > energy.abs().mean() * base.norm()
                    energy.masked_fill_(~keep, 0.0)
                    pattern[name] = keep.view(-1).tolist()
        return pattern


class CountsItsOwnWay(RankAllocator):
    """A budget of its own, which nobody may count anew while all is as it was."""

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self.name_set = [f"mine: {name}" for name in self.name_set]
        self.target_bgt += 3


@pytest.mark.parametrize("late", [False, True], ids=["in time", "late"])
@pytest.mark.parametrize("frozen", [(), ("1",)], ids=["healthy", "one layer frozen"])
@pytest.mark.parametrize("kind", [Magnitude, KeepsOtherAttributes, ScoresUnderAnotherName, LooksAtBaseWeights])
def test_own_ranking_without_gradients_is_as_in_plain_peft(
    kind: type[RankAllocator], frozen: tuple[str, ...], late: bool
) -> None:
    with peft_gradguard.disabled():
        expected = train(new_model(kind, frozen), late)
    assert same(train(new_model(kind, frozen), late), expected)


@pytest.mark.parametrize("kind", [CountsItsOwnWay, OwnUpdateAndAllocate, OwnSchedule, OwnScoringAndSchedule])
def test_healthy_training_of_a_subclass_is_as_in_plain_peft(kind: type[RankAllocator]) -> None:
    with peft_gradguard.disabled():
        expected = train(new_model(kind))
    assert same(train(new_model(kind)), expected)


# -- Ways to call a method


def scored(way: Callable[[RankAllocator, Any], Any]) -> dict[str, torch.Tensor]:
    """The scores after one call, with a layer frozen that plain PEFT fails on."""
    model = new_model(frozen=("1",))
    torch.manual_seed(2)
    model(torch.randn(4, 8)).pow(2).mean().backward()
    allocator = model.base_model.rankallocator
    way(allocator, model.base_model.model)
    return allocator.exp_avg_ipt


RAW = vars(RankAllocator)["update_ipt"]
WAYS: dict[str, Callable[[RankAllocator, Any], Any]] = {
    "raw": lambda a, m: RAW(a, m),
    "raw, all by name": lambda a, m: RAW(self=a, model=m),
    "raw, model by name": lambda a, m: RAW(a, model=m),
    "class": lambda a, m: RankAllocator.update_ipt(a, m),
    "class, all by name": lambda a, m: RankAllocator.update_ipt(self=a, model=m),
    "class of the object": lambda a, m: type(a).update_ipt(a, model=m),
    "by name": lambda a, m: a.update_ipt(model=m),
    "partial of the class's": lambda a, m: functools.partial(RankAllocator.update_ipt, a)(m),
    "partial of the bound": lambda a, m: functools.partial(a.update_ipt, model=m)(),
    "bound by hand": lambda a, m: RAW.__get__(a)(m),
    "bound with its class": lambda a, m: RAW.__get__(a, type(a))(m),
    "a method made by hand": lambda a, m: types.MethodType(RAW, a)(m),
    "super": lambda a, m: super(Sub, sub(a)).update_ipt(m),
    "copied": lambda a, m: copy.deepcopy(RAW)(a, m),
    "pickled": lambda a, m: pickle.loads(pickle.dumps(RAW))(a, m),
    "function of the bound": lambda a, m: a.update_ipt.__func__(a, m),
}


class Sub(RankAllocator):
    pass


def sub(allocator: RankAllocator) -> RankAllocator:
    allocator.__class__ = Sub
    return allocator


@pytest.mark.parametrize("way", WAYS)
def test_every_way_to_call_a_method_is_guarded(way: str) -> None:
    scores, expected = scored(WAYS[way]), scored(lambda a, m: a.update_ipt(m))
    assert scores.keys() == expected.keys()
    assert len(scores) == 9
    assert all(torch.equal(scores[name], expected[name]) for name in scores)


def test_bound_method_is_copied_and_pickled_with_its_allocator() -> None:
    model = new_model()
    allocator = model.base_model.rankallocator
    for again in (copy.deepcopy(allocator.update_ipt), pickle.loads(pickle.dumps(allocator.update_ipt))):
        assert type(again.__self__) is RankAllocator
        assert again.__self__ is not allocator


@pytest.mark.parametrize(
    "call",
    [
        lambda a, m: a.update_ipt(),
        lambda a, m: a.update_ipt(m, m),
        lambda a, m: a.update_ipt(m, modell=m),
        lambda a, m: a.update_ipt(m, model=m),
        lambda a, m: a.update_and_allocate(m),
        lambda a, m: RankAllocator.update_ipt(),
        lambda a, m: RankAllocator.update_ipt(model=m),
        lambda a, m: vars(RankAllocator)["mask_to_budget"](a, m),
        lambda a, m: a.budget_schedule("three"),
    ],
)
def test_wrong_arguments_give_the_error_of_plain_peft(call: Callable[[Any, Any], Any]) -> None:
    model = new_model()
    found = []
    for guard in (True, False):
        (peft_gradguard.enable if guard else peft_gradguard.disable)()
        try:
            with pytest.raises(TypeError) as error:
                call(model.base_model.rankallocator, model.base_model.model)
        finally:
            peft_gradguard.enable()
        found.append(str(error.value))
    assert found[0] == found[1]


def test_function_put_around_the_raw_attribute() -> None:
    original = vars(RankAllocator)["update_and_allocate"]

    def mine(self: Any, model: Any, global_step: int, force_mask: bool = False) -> Any:
        return original(self, model, global_step, force_mask)

    RankAllocator.update_and_allocate = mine
    try:
        got = train(new_model(frozen=("3",)))
    finally:
        RankAllocator.update_and_allocate = original
    assert same(got, train(new_model(frozen=("3",))))


def test_what_is_no_allocator_goes_by_the_guard() -> None:
    class Stand:
        peft_config, init_bgt, target_bgt = new_model().peft_config["default"], 10, 4

    assert RankAllocator.budget_schedule(Stand, 1) == (10, False)


class Observes(RankAllocator):
    seen: list[Any]

    def update_and_allocate(self, *args: Any, **kwargs: Any) -> Any:
        self.seen = [len(args), sorted(kwargs)]
        return super().update_and_allocate(*args, **kwargs)


def test_arguments_by_name_stay_arguments_by_name() -> None:
    model = new_model(Observes)
    model(torch.randn(4, 8)).pow(2).mean().backward()
    allocator, inner = model.base_model.rankallocator, model.base_model.model
    allocator.update_and_allocate(model=inner, global_step=1, force_mask=False)
    assert allocator.seen == [0, ["force_mask", "global_step", "model"]]


# -- What stands in the place of update_ipt cannot always be looked into


def assign_a_partial(model: peft.PeftModel) -> None:
    allocator = model.base_model.rankallocator
    allocator.update_ipt = functools.partial(RankAllocator.update_ipt, allocator)


def assign_a_mock(model: peft.PeftModel) -> None:
    allocator = model.base_model.rankallocator
    allocator.update_ipt = unittest.mock.Mock(wraps=allocator.update_ipt)


def assign_an_object(model: peft.PeftModel) -> None:
    class Calls:
        def __init__(self, inner: Any) -> None:
            self.inner = inner

        def __call__(self, model: Any) -> None:
            self.inner(model)

    allocator = model.base_model.rankallocator
    allocator.update_ipt = Calls(allocator.update_ipt)


def assign_own_code_in_an_object(model: peft.PeftModel) -> None:
    allocator = model.base_model.rankallocator
    allocator.update_ipt = functools.partial(OwnScoringAndSchedule.update_ipt, allocator)


@pytest.mark.parametrize("late", [False, True], ids=["in time", "late"])
@pytest.mark.parametrize("assign", [assign_a_partial, assign_a_mock, assign_an_object, assign_own_code_in_an_object])
def test_callables_in_the_place_of_a_method(assign: Callable[[peft.PeftModel], None], late: bool) -> None:
    model = new_model(frozen=("1",))
    assign(model)
    got, expected = train(model, late), train(new_model(frozen=("1",)), late)
    assert got["pattern"] == expected["pattern"]
    assert sum(map(sum, got["pattern"].values())) == 3 * 2


@pytest.mark.parametrize("frozen_between", [(), ("0",), ("0", "1", "2")])
def test_layers_frozen_between_the_budget_and_the_mask(frozen_between: tuple[str, ...]) -> None:
    allocator, inner = scored_by_hand(new_model())
    budget, _ = allocator.budget_schedule(TOTAL)
    for name, parameter in inner.named_parameters():
        if name.startswith(tuple(f"{module}.lora_" for module in frozen_between)):
            parameter.requires_grad_(False)
    pattern = allocator.mask_to_budget(inner, budget)
    left = 4 - len(frozen_between)
    assert sum(map(sum, pattern.values())) == (budget if budget < 4 * left else 2 * left)
