"""What each step has left, where it is asked for."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
from reported import only
from scenarios import FINALISING, FIRST_MASKING, INIT_R, TARGET_R, TINIT, TOTAL, branches, build
from steps import advance

if TYPE_CHECKING:
    import peft


@pytest.fixture
def model() -> peft.PeftModel:
    return build(branches())


def test_history_is_off_unless_asked_for(model: peft.PeftModel) -> None:
    advance(model, 1, 2)
    assert only(model).history == ()


def test_history_follows_budget_and_ranks(model: peft.PeftModel, history: None) -> None:
    advance(model, *range(1, FIRST_MASKING), optimise=True, branch=False)
    advance(model, *range(FIRST_MASKING, TOTAL + 1), optimise=True)
    points = only(model).history
    assert [point.step for point in points] == list(range(1, FINALISING + 1))
    assert points[0] == (1, 2 * INIT_R, 4 * INIT_R, 6)
    # From the first masking step on the branch is scored, but keeps all its ranks until it has had its warm-up.
    warm = points[FIRST_MASKING + TINIT - 2]
    assert points[FIRST_MASKING - 1].skipped == 0
    assert points[FIRST_MASKING - 1].total_rank == points[FIRST_MASKING - 1].budget + 2 * INIT_R
    assert warm.total_rank == warm.budget < 4 * INIT_R
    assert points[-1] == (FINALISING, 4 * TARGET_R, 4 * TARGET_R, 0)
