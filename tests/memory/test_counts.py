"""How often parameters were scored and left out: by steps, cheap in runs, taken up by a training that goes on."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import pytest
import torch
from reported import modules, only, parameters
from scenarios import FINALISING, INIT_R, TARGET_R, branches, build, frozen, in_turn, sometimes, train
from steps import advance

import peft_gradguard
from peft_gradguard.memory.counts import Counts

if TYPE_CHECKING:
    import peft


@pytest.fixture
def model() -> peft.PeftModel:
    return build(branches())


@pytest.mark.peft
def test_counts_of_a_whole_training() -> None:
    seen: list[peft.PeftModel] = []
    remember = in_turn(frozen("trunk.0"), lambda model, step: seen.append(model))
    train(branches(batch=sometimes, regularised=False, prepare=remember))
    adapter = only(seen[0])
    used = [step for step in range(1, FINALISING) if step % 3 == 0]
    unused = FINALISING - 1 - len(used)
    for name, found in parameters(adapter).items():
        counts = (found.steps_scored, found.steps_skipped, found.first_step, found.last_step)
        assert (
            counts
            == {
                "trunk.0": (0, {"frozen": FINALISING - 1}, None, None),
                "trunk.2": (FINALISING - 1, {}, 1, FINALISING - 1),
                "branch.": (len(used), {"no gradient": unused}, used[0], used[-1]),
            }[name[:7]]
        )
    assert adapter.step == FINALISING
    assert (adapter.init_budget, adapter.budget, adapter.target_budget) == (3 * INIT_R, 3 * TARGET_R, 3 * TARGET_R)
    assert adapter.unranked_ranks == INIT_R
    found_modules = modules(adapter)
    pattern = seen[0].peft_config["default"].rank_pattern
    for name, module in found_modules.items():
        bits = pattern.get(f"{name}.lora_E.default")
        assert module.ranked == (bits is not None) == (name != "trunk.0")
        assert module.rank_kept == (INIT_R if bits is None else sum(bits))
        assert module.rank_started == INIT_R
    assert {name: module.reason for name, module in found_modules.items()} == {
        "trunk.0": "frozen", "trunk.2": None, "branch.0": "no gradient", "branch.2": "no gradient",
    }  # fmt: skip


@pytest.mark.peft
def test_second_call_in_the_same_step_counts_once(model: peft.PeftModel) -> None:
    advance(model, 1, 1, 2, 2, 2)
    assert {p.steps_scored for p in parameters(only(model)).values()} == {2}


def test_steps_that_begin_anew_count(model: peft.PeftModel) -> None:
    advance(model, 4, 5, 1, 2)
    assert {p.steps_scored for p in parameters(only(model)).values()} == {4}


def test_calls_that_raise_are_not_counted(model: peft.PeftModel) -> None:
    frozen()(model, 0)
    with pytest.raises(peft_gradguard.NoGradientError):
        model.base_model.update_and_allocate(1)
    assert {p.steps_scored + len(p.steps_skipped) for p in parameters(only(model)).values()} == {0}
    assert only(model).step is None


A, B = "a.lora_E.default", "b.lora_E.default"


class Allocator:
    """Scores as PEFT fills them: a new tensor for each that is scored."""

    def __init__(self) -> None:
        self.counts = Counts()
        self.scores: dict[str, torch.Tensor] = {}

    def score(self, step: int | None, *names: str) -> None:
        self.counts.begin({name: None if name in names else "no gradient" for name in (A, B)}, self.scores)
        self.scores.update({name: torch.zeros(1) for name in names})
        self.counts.look(self.scores)
        self.counts.add(step)

    def warming_up(self, tinit: int = 3) -> set[str]:
        return self.counts.warming_up((A, B), tinit)


def test_looking_at_the_counts_changes_nothing() -> None:
    looked_at, left_alone = Allocator(), Allocator()
    for step, names in ((1, (A,)), (2, (A,)), (2, (A, B)), (3, (A, B)), (3, (A, B)), (None, (B,)), (None, (B,))):
        for allocator in (looked_at, left_alone):
            allocator.score(step, *names)
        looked_at.warming_up()
        looked_at.counts.of_each()
        looked_at.counts.scored_of([A])
    assert looked_at.counts.of_each() == left_alone.counts.of_each()
    assert looked_at.counts.scored_of([A, B, "c"]) == left_alone.counts.scored_of([A, B]) == {A: 3, B: 4}


def test_what_a_run_leaves_out_falls_behind_within_it() -> None:
    allocator = Allocator()
    allocator.score(1, A, B)
    assert allocator.warming_up() == set()
    allocator.score(2, A)
    assert allocator.warming_up() == {B}
    for step, late in ((3, set()), (4, {A}), (5, {A})):
        allocator.score(step, B)
        assert allocator.warming_up() == late
    assert allocator.warming_up(tinit=2) == set()


def test_scoring_that_failed_is_no_sign_of_somebody_else() -> None:
    allocator = Allocator()
    for step in (1, 2, 3):
        allocator.score(step, A)
    allocator.counts.begin({A: None, B: None}, allocator.scores)
    allocator.scores.update({A: torch.zeros(1), B: torch.zeros(1)})
    allocator.counts.look(allocator.scores)
    allocator.score(4, A, B)
    assert allocator.counts.scored_of([A, B]) == {A: 4, B: 1}
    assert allocator.warming_up() == {B}


def test_scores_of_another_kind_are_no_hindrance() -> None:
    allocator = Allocator()
    allocator.score(1, A)
    allocator.scores[A] = 0.5  # type: ignore[assignment]
    allocator.counts.begin({A: None, B: None}, allocator.scores)
    allocator.counts.look(allocator.scores)
    allocator.counts.add(2)
    assert allocator.counts.scored_of([A]) == {A: math.inf}


def test_training_that_goes_on_takes_the_counts_up() -> None:
    before, after = Allocator(), Allocator()
    before.score(1, A)
    before.score(2, A, B)
    after.scores = {name: score.clone() for name, score in before.scores.items()}
    after.counts.take_up(before.counts.of_each(), before.counts.scored_of([A, B]), after.scores)
    for allocator in (before, after):
        allocator.score(3, A, B)
        assert allocator.warming_up() == {B}
        allocator.score(4, A, B)
        assert allocator.warming_up() == set()
    assert after.counts.of_each() == before.counts.of_each()
    assert after.counts.scored_of([A, B]) == before.counts.scored_of([A, B])
