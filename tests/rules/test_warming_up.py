"""What comes late gets the warm-up that the others had: until then it is scored, and keeps all its ranks."""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING, Any

import peft
import pytest
import torch
from torch import nn

import peft_gradguard

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

TINIT, RANK = 6, 4
SETTINGS = {"init_r": RANK, "target_r": 1, "tinit": TINIT, "tfinal": 5, "deltaT": 1, "total_step": 45}
FINALISING = 40


class Experts(nn.Module):
    def __init__(self, count: int = 3) -> None:
        super().__init__()
        self.experts = nn.ModuleList(nn.Linear(5, 5) for _ in range(count))

    def forward(self, x: torch.Tensor, use: Iterable[int]) -> torch.Tensor:
        return sum(self.experts[index](x).tanh() for index in use)  # type: ignore[return-value]


class Loop:
    def __init__(self, **more: Any) -> None:
        torch.manual_seed(0)
        self.model = peft.get_peft_model(
            Experts(), peft.AdaLoraConfig(target_modules=r"experts\.\d", **{**SETTINGS, **more})
        )
        self.optimizer = torch.optim.SGD(self.model.parameters(), lr=1e-2)
        self.inner = self.model.base_model.model
        self.allocator = self.model.base_model.rankallocator

    def backward(self, step: int, use: Iterable[int]) -> None:
        x = torch.randn(8, 5, generator=torch.Generator().manual_seed(step))
        (self.inner(x, use) - x).pow(2).sum().backward()

    def step(self, *steps: int, use: Iterable[int] = (0, 1, 2)) -> None:
        for step in steps:
            self.backward(step, use)
            self.optimizer.step()
            self.model.base_model.update_and_allocate(step)
            self.optimizer.zero_grad()

    def energy(self, index: int) -> nn.Parameter:
        found = self.inner.experts[index].lora_E["default"]
        assert isinstance(found, nn.Parameter)
        return found

    def thaw(self, index: int, trainable: bool = True) -> None:
        for factor in "ABE":
            getattr(self.inner.experts[index], f"lora_{factor}")["default"].requires_grad = trainable

    @property
    def ranked(self) -> list[int]:
        """The experts that the budget describes."""
        return [index for index in range(3) if f"experts.{index}.%s.default" in self.allocator.name_set]

    def reasons(self) -> dict[str, Any]:
        (adapter,) = peft_gradguard.report(self.model).adapters
        return {module.name: module.reason for module in adapter.modules if not module.ranked}


@pytest.mark.peft
@pytest.mark.parametrize("frozen", [True, False], ids=["frozen", "not used"])
def test_late_comer_is_ranked_after_as_many_steps_as_the_others_had(frozen: bool) -> None:
    loop = Loop()
    loop.thaw(2, trainable=not frozen)
    loop.step(*range(1, 15), use=(0, 1, 2) if frozen else (0, 1))
    assert loop.ranked == [0, 1]
    loop.thaw(2)
    for step in range(15, 15 + TINIT - 1):
        loop.step(step)
        assert loop.ranked == [0, 1]
        assert torch.count_nonzero(loop.energy(2)) == RANK
        assert loop.reasons() == {"experts.2": "warming up"}
    loop.step(15 + TINIT - 1)
    assert loop.ranked == [0, 1, 2]
    loop.step(*range(15 + TINIT, 46))
    assert loop.reasons() == {}
    pattern = loop.model.peft_config["default"].rank_pattern
    assert sum(map(sum, pattern.values())) == 3
    assert len(pattern) == 3


def test_one_that_comes_too_late_keeps_all_its_ranks_and_the_report_says_why() -> None:
    loop = Loop()
    loop.step(*range(1, FINALISING - 2), use=(0, 1))
    loop.step(*range(FINALISING - 2, 46))
    assert sorted(loop.model.peft_config["default"].rank_pattern) == [f"experts.{n}.lora_E.default" for n in (0, 1)]
    assert torch.count_nonzero(loop.energy(2)) == RANK
    assert loop.reasons() == {"experts.2": "warming up"}
    assert "warming up" in str(peft_gradguard.report(loop.model))


def test_layer_that_is_frozen_and_thawed_again_keeps_its_count() -> None:
    loop = Loop()
    loop.step(*range(1, 11))
    loop.thaw(2, trainable=False)
    loop.step(*range(11, 21))
    assert loop.ranked == [0, 1]
    loop.thaw(2)
    loop.step(21)
    assert loop.ranked == [0, 1, 2]


def test_excluded_for_the_first_steps() -> None:
    loop = Loop()
    with peft_gradguard.exclude("experts.2.*"):
        loop.step(*range(1, 11))
    loop.step(*range(11, 11 + TINIT - 1))
    assert loop.ranked == [0, 1]
    loop.step(11 + TINIT - 1)
    assert loop.ranked == [0, 1, 2]


def test_rare_calls_ask_for_no_more_than_anybody_had() -> None:
    loop = Loop(tinit=30)
    loop.step(10, 20, use=(0, 1))
    loop.step(31)
    assert loop.ranked == [0, 1]
    loop.step(32, 33, use=(2,))
    assert loop.ranked == [0, 1, 2]


def test_where_no_warm_up_is_asked_for_the_late_comer_is_ranked_at_once() -> None:
    loop = Loop(tinit=0)
    loop.step(1, 2, 3, use=(0, 1))
    loop.step(4)
    assert loop.ranked == [0, 1, 2]


def test_two_calls_in_a_step_count_once() -> None:
    loop = Loop()
    loop.step(*range(1, 15), use=(0, 1))
    for step in range(15, 15 + TINIT - 1):
        for use in ((2,), (0, 2), (2,)):
            loop.backward(step, use)
            loop.model.base_model.update_and_allocate(step)
            loop.optimizer.zero_grad()
        assert loop.ranked == [0, 1]
    loop.step(15 + TINIT - 1)
    assert loop.ranked == [0, 1, 2]
    (adapter,) = peft_gradguard.report(loop.model).adapters
    assert {p.steps_scored for p in adapter.modules[2].parameters} == {TINIT}


def test_parameters_of_one_step_are_counted_once_for_each_reason() -> None:
    loop = Loop()
    for use in ((0, 1), (1, 2), (0, 1)):
        loop.backward(1, use)
        loop.model.base_model.update_and_allocate(1)
        loop.optimizer.zero_grad()
    (adapter,) = peft_gradguard.report(loop.model).adapters
    assert [module.parameters[0].steps_scored for module in adapter.modules] == [1, 1, 1]
    skipped = [module.parameters[0].steps_skipped for module in adapter.modules]
    assert skipped == [{"no gradient": 1}, {}, {"no gradient": 1}]


def test_after_a_reset_of_all_scores_the_warm_up_begins_anew() -> None:
    loop = Loop()
    loop.step(*range(1, 11))
    loop.allocator.reset_ipt()
    loop.step(11, 12, 13, use=(0, 1))
    assert loop.ranked == [0, 1]
    loop.step(14)
    assert loop.ranked == [0, 1]
    loop.step(*range(15, 14 + TINIT))
    assert loop.ranked == [0, 1, 2]


def guard_was_off(loop: Loop) -> None:
    with peft_gradguard.disabled():
        loop.step(*range(1, 11))


def guard_was_off_in_between(loop: Loop) -> None:
    loop.step(*range(1, 6), use=(0, 1))
    loop.step(6)
    with peft_gradguard.disabled():
        loop.step(*range(7, 11))


def scores_were_restored(loop: Loop) -> None:
    other = Loop()
    other.step(*range(1, 11))
    for name in ("ipt", "exp_avg_ipt", "exp_avg_unc"):
        setattr(loop.allocator, name, copy.deepcopy(getattr(other.allocator, name)))


def other_scores_were_put_in_place_of_some(loop: Loop) -> None:
    loop.step(*range(1, 9), use=(0, 1))
    loop.step(9, 10)
    scores_were_restored(loop)


@pytest.mark.parametrize(
    "before",
    [guard_was_off, guard_was_off_in_between, scores_were_restored, other_scores_were_put_in_place_of_some],
)
def test_counts_that_nobody_knows_count_as_the_most(before: Callable[[Loop], None]) -> None:
    loop = Loop()
    before(loop)
    loop.step(11)
    assert loop.ranked == [0, 1, 2]


def test_late_comer_after_scores_were_restored_still_gets_its_warm_up() -> None:
    loop, other = Loop(), Loop()
    other.step(*range(1, 11), use=(0, 1))
    for name in ("ipt", "exp_avg_ipt", "exp_avg_unc"):
        setattr(loop.allocator, name, copy.deepcopy(getattr(other.allocator, name)))
    loop.step(*range(11, 11 + TINIT - 1))
    assert loop.ranked == [0, 1]
    loop.step(11 + TINIT - 1)
    assert loop.ranked == [0, 1, 2]


def test_report_names_the_modules_that_have_no_rank_left() -> None:
    loop = Loop(target_r=0)
    loop.step(*range(1, FINALISING), use=(0, 1))
    loop.model.peft_config["default"].rank_pattern = {
        "experts.0.lora_E.default": [False] * RANK,
        "experts.1.lora_E.default": [True] + [False] * (RANK - 1),
    }
    text = str(peft_gradguard.report(loop.model))
    section = text[text.index("No rank left") :].split("\n\n")[0].splitlines()
    assert [line.split() for line in section[1:]] == [["kind", "layers", "modules"], ["experts.0", "1"]]
