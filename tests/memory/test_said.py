"""Each skipped name is said once, by each allocator."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
from scenarios import frozen
from steps import advance, new_model

if TYPE_CHECKING:
    import logging

    import peft

pytestmark = pytest.mark.peft


@pytest.fixture
def model() -> peft.PeftModel:
    return new_model()


def test_each_skipped_name_is_logged_once_with_its_reason(
    model: peft.PeftModel, records: list[logging.LogRecord]
) -> None:
    frozen("trunk.0", "lora_A")(model, 0)
    advance(model, 1)
    advance(model, 2, 3, branch=False)
    skips = [(name, r.reason, r.adapter, r.step, r.levelname) for r in records for name in r.parameters]
    assert len(records) == 2
    unused = [
        (f"branch.{layer}.lora_{factor}.default", "no gradient", "default", 2, "WARNING")
        for layer in (0, 2)
        for factor in "ABE"
    ]
    assert sorted(skips) == sorted([*unused, ("trunk.0.lora_A.default", "frozen", "default", 1, "WARNING")])
    assert {record.name for record in records} == {"peft_gradguard"}
    message = next(r.getMessage() for r in records if r.parameters == ["trunk.0.lora_A.default"])
    assert all(word in message for word in ("trunk.0.lora_A.default", "frozen", "'default'", "step 1"))
    assert not any(record.exc_info for record in records)


def test_another_allocator_logs_the_same_names_again(records: list[logging.LogRecord]) -> None:
    for _ in range(2):
        model = new_model()
        frozen("trunk.0", "lora_A")(model, 0)
        advance(model, 1)
    assert [record.parameters for record in records] == [["trunk.0.lora_A.default"]] * 2
