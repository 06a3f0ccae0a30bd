"""Targets inside modules_to_save: warned of, and advised on."""

from __future__ import annotations

from typing import TYPE_CHECKING

import peft
import pytest
from reported import only, parameters
from scenarios import PEFT_VERSION, SCENARIOS, build, train

from peft_gradguard.troubles.overlap import advice_on_overlap, cannot_reload_overlap

if TYPE_CHECKING:
    import logging


@pytest.mark.peft
@pytest.mark.skipif(PEFT_VERSION >= (0, 16), reason="PEFT since 0.16 does not target modules in modules_to_save")
def test_overlap_that_cannot_be_reloaded_is_named(records: list[logging.LogRecord]) -> None:
    train(SCENARIOS["head targeted and in modules_to_save"])
    messages = [record.getMessage() for record in records if not hasattr(record, "reason")]
    assert len(messages) == 1
    assert "classifier.modules_to_save.default.dense" in messages[0]
    assert "Narrow target_modules" in messages[0]
    inside = {n for r in records if getattr(r, "reason", None) == "inside modules_to_save" for n in r.parameters}
    assert "classifier.modules_to_save.default.dense.lora_E.default" in inside


@pytest.mark.parametrize(
    ("version", "broken"),
    [("0.5.0", True), ("0.15.2", True), ("0.16.0", False), ("0.21.2", False), ("1.0.0.dev0", False), ("odd", False)],
)
def test_releases_that_cannot_reload_an_overlap(version: str, broken: bool) -> None:
    assert cannot_reload_overlap(version) == broken


@pytest.mark.parametrize(
    ("version", "hurts"),
    [
        ("0.15.2", "PEFT 0.15.2 cannot load the saved adapter again as it was"),
        ("0.16.0", "PEFT saves them whole, so they are never pruned"),
    ],
)
@pytest.mark.parametrize(("inside", "are"), [({"b"}, "b is"), ({"b", "a"}, "a and b are")])
def test_advice_on_the_overlap_in_words(
    version: str, hurts: str, inside: set[str], are: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(peft, "__version__", version)
    assert list(advice_on_overlap(inside)) == [
        f"{are} targeted by AdaLoRA and inside modules_to_save: {hurts}. Narrow target_modules so that it leaves them "
        "out."
    ]
    assert list(advice_on_overlap(set())) == []


@pytest.mark.peft
@pytest.mark.skipif(PEFT_VERSION >= (0, 16), reason="PEFT since 0.16 does not target modules in modules_to_save")
def test_advice_on_the_overlap_with_modules_to_save() -> None:
    adapter = only(build(SCENARIOS["head targeted and in modules_to_save"]))
    assert len(adapter.advice) == 1
    assert "inside modules_to_save: PEFT" in adapter.advice[0]
    inside = {m.name for m in adapter.modules if m.reason == "inside modules_to_save" and not m.ranked}
    assert "classifier.modules_to_save.default.dense" in inside
    assert {p.name for p in parameters(adapter).values() if p.inside_modules_to_save}
