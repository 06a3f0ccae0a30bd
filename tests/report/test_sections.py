"""The sections of a report: what is folded, merged and counted."""

from __future__ import annotations

import string
from typing import TYPE_CHECKING, Any

import pytest
from made_reports import FROZEN, UNTRAINED, adapter, module, scored
from scenarios import build, classifier, frozen

import peft_gradguard
from peft_gradguard.report.sections import has_begun, ranges, sections, summary

if TYPE_CHECKING:
    from collections.abc import Sequence


def test_frozen_layers_are_folded_into_one_line() -> None:
    model = build(classifier())
    frozen("layer.0.")(model, 0)
    frozen("layer.1.")(model, 0)
    text = str(peft_gradguard.report(model))
    assert [line.split() for line in text.splitlines() if line.endswith("frozen")] == [
        ["all", "2", "kinds", "0-1", "all", "frozen"]
    ]


def test_one_rank_that_is_not_ranked_comes_on_top() -> None:
    modules = [module("q"), module("k", 1, 1, ranked=False), module("v", 0, 0, ranked=False)]
    assert "1 rank of 2 modules not ranked comes on top" in summary(adapter("one", modules))
    assert "2 ranks of 1 module not ranked come on top" in summary(
        adapter("two", [modules[0], module("k", 2, 2, ranked=False)])
    )


def test_two_kinds_that_differ_in_a_number_alone_are_merged_among_seventeen() -> None:
    for count, merged in ((3, False), (14, False), (15, True)):
        modules = [module(letter) for letter in string.ascii_lowercase[:count]] + [module("w1"), module("w2")]
        labels = {row[0] for section in sections(adapter("many", modules)) for row in section.rows}
        assert ("w*" in labels, "w1" in labels) == (merged, not merged)


@pytest.mark.parametrize(
    ("count", "groups", "kinds"),
    [
        (23, "", ""),
        (24, "", ""),
        (25, "and 1 more such group", "and 1 more kind"),
        (26, "and 2 more such groups", "and 2 more kinds"),
    ],
)
def test_more_rows_than_are_shown(count: int, groups: str, kinds: str) -> None:
    letters = string.ascii_lowercase[:count]
    parts = {letter: {"A": {**FROZEN, **scored(n, frozen=50 - n)}} for n, letter in enumerate(letters)}
    modules = [module(f"layers.0.{letter}", 4, parts=parts[letter]) for letter in letters]
    alone = [module(f"{letter}.alone", 4) for letter in letters]
    found = [*sections(adapter("in a layer", modules, step=50)), *sections(adapter("in none", alone, step=50))[1:]]
    shown = list(letters[:24])
    assert [(section.title, section.note, [row[0] for row in section.rows]) for section in found] == [
        ("Ranked, but left out of scoring in part or at times", groups, shown),
        ("By kind of module", kinds, shown),
        ("Ranks kept, by layer", kinds, shown),
        ("Ranks kept, elsewhere", kinds.replace("kind", "module"), [f"{letter}.alone" for letter in shown]),
    ]


@pytest.mark.parametrize(
    ("layers", "said"),
    [
        ((), ""),
        ((None,), ""),
        ((0,), "0"),
        ((3, None, 3), "3"),
        ((1, 0), "0-1"),
        ((0, 2), "0, 2"),
        ((9, 8, 7, 5, None, 3, 2, 1, 0, 0), "0-3, 5, 7-9"),
        ((10, 9, 11, 13, 14), "9-11, 13-14"),
    ],
)
def test_ranges(layers: Sequence[int | None], said: str) -> None:
    assert ranges(layers) == said


@pytest.mark.parametrize(
    ("begun", "facts", "every"),
    [
        (False, {}, {}),
        (False, UNTRAINED, FROZEN),
        (True, {"saved": True}, {}),
        (True, {"step": 0}, {}),
        (True, {}, {"steps_scored": 1}),
        (True, {}, {"steps_skipped": {"frozen": 1}}),
        # Pruned to what a loaded pattern kept, and cut to it.
        (False, {}, {"shape": (3, 1)}),
        (True, {}, {"shape": (4, 1)}),
        # Of a piece that does not tell.
        (True, {}, {"shape": ()}),
    ],
)
def test_has_begun(begun: bool, facts: dict[str, Any], every: dict[str, Any]) -> None:
    kept = 3 if "shape" in every else 8
    assert has_begun(adapter("default", [module("k"), module("q", kept, parts={"E": every})], **facts)) is begun
