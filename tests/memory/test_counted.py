"""The counts of scorings: by steps, cheap in runs, and taken up again by a training that goes on."""

from __future__ import annotations

import math

import torch

from peft_gradguard.memory.counts import Counts

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
