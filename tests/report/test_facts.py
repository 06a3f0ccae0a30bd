"""What a report holds."""

from __future__ import annotations

from typing import Any

import pytest
from made_reports import module

from peft_gradguard.report.facts import trained


@pytest.mark.parametrize(
    ("tells", "facts"),
    [
        (False, {}),
        (True, {"importance": 0.0}),
        (True, {"kept": 7}),
        (False, {"kept": 7, "ranked": False}),
        (True, {"importance": 0.5, "ranked": False}),
    ],
)
def test_scores_and_pruned_ranks_tell_of_a_training(tells: bool, facts: dict[str, Any]) -> None:
    assert trained([module("k"), module("q", **facts)]) is tells
