"""Patterns that exclude nothing: warned of, and advised on."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
from reported import only, parameters
from scenarios import FINALISING, INIT_R, branches, build
from steps import advance, new_model

import peft_gradguard
from peft_gradguard.model import exclusions

if TYPE_CHECKING:
    import logging
    from collections.abc import Iterator

    import peft


@pytest.fixture(autouse=True)
def _nothing_stays_excluded() -> Iterator[None]:
    yield
    assert exclusions._exclusions == []


@pytest.fixture
def model() -> peft.PeftModel:
    return new_model()


def test_pattern_that_matches_nothing_is_named_once_at_the_first_masking_step(
    model: peft.PeftModel, records: list[logging.LogRecord]
) -> None:
    with peft_gradguard.exclude("classifier", "*.branch.0.lora_E.*", "*.Trunk.*"):
        advance(model, 1, 2, 3)
        assert [record for record in records if not hasattr(record, "reason")] == []
        advance(model, *range(4, FINALISING + 1))
    warnings = [record for record in records if not hasattr(record, "reason")]
    assert [record.levelname for record in warnings] == ["WARNING"]
    assert "by 'classifier', '*.Trunk.*':" in warnings[0].getMessage()
    assert "'base_model.model.trunk.0.lora_A.default'" in warnings[0].getMessage()
    with peft_gradguard.exclude("classifier"):
        advance(build(branches()), 4)
    assert len([record for record in records if "excludes nothing by" in record.getMessage()]) == 2


def test_advice_on_exclusions(model: peft.PeftModel) -> None:
    with peft_gradguard.exclude("*.trunk.*", "*nothing*"):
        adapter = only(model)
        assert "Nothing is excluded by '*nothing*'" in adapter.advice[0]
        assert "as base_model.model.trunk.0.lora_A.default." in adapter.advice[0]
        assert [m.name for m in adapter.modules if m.reason == "excluded"] == ["trunk.0", "trunk.2"]
        assert [p.name for p in parameters(adapter).values() if p.excluded] == [
            name for name in parameters(adapter) if name.startswith("trunk.")
        ]
        assert adapter.unranked_ranks == 2 * INIT_R
    with peft_gradguard.exclude("*"):
        assert "Everything is excluded" in only(model).advice[0]
