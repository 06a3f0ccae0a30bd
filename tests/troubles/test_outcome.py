"""The finalising step that no call comes with."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
from scenarios import FINALISING, SCENARIOS, train

if TYPE_CHECKING:
    import logging

pytestmark = pytest.mark.peft


def test_missed_finalising_step_is_named(records: list[logging.LogRecord]) -> None:
    outcome = train(SCENARIOS["calls that miss the finalising step"])
    messages = [record.getMessage() for record in records]
    assert len(messages) == 1
    assert f"never called with step {FINALISING} (" in messages[0]
    kept = "pattern of the last masking step stays" if outcome.patterns[FINALISING] else "no rank is pruned at all"
    assert kept in messages[0]
