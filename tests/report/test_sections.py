"""The sections of a report: what is folded, merged and counted."""

from __future__ import annotations

import string
from typing import TYPE_CHECKING, Any

import pytest
from made_reports import FROZEN, UNTRAINED, adapter, module, scored, stack
from scenarios import build, classifier, frozen

import peft_gradguard
from peft_gradguard.report.report import Report
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


def budget(*ranked: bool | None, **facts: Any) -> str:
    """The sentence about a budget of 8 ranks, 4 in the end, of modules that are ranked or not."""
    modules = [module(f"m{n}", ranked=each) for n, each in enumerate(ranked)]
    found = adapter("default", modules, **{"init_budget": 8, "budget": 8, "target_budget": 4, **facts})
    return next(line for line in summary(found) if "budget" in line or "no module" in line)


def test_budget_in_a_sentence() -> None:
    assert budget(True, True, False) == "2 modules share a budget of 8 ranks, 4 in the end; 1 other keeps its 8"
    assert budget(True, False, False) == "1 module has a budget of 8 ranks, 4 in the end; 2 others keep their 16"
    assert budget(True, init_budget=1, budget=1, target_budget=1) == "1 module has a budget of 1 rank, 1 in the end"
    assert budget(True, True, budget=6) == "2 modules share a budget of 8 ranks at the start, 6 now, 4 in the end"
    assert budget(True, True, budget=4) == "2 modules share a budget of 4 ranks, 8 at the start"
    assert budget(True, budget=None) == (
        "1 module has a budget of 8 ranks at the start, 4 in the end (how many now is not known)"
    )
    assert budget(True, budget=None, saved=True) == "1 module has a budget of 8 ranks at the start, 4 in the end"
    assert budget(True, budget=None, saved=True, target_budget=None) == "1 module has a budget of 8 ranks at the start"
    assert budget(False, False) == "no module is ranked, so no rank is pruned"


def test_modules_without_ranks_are_no_others() -> None:
    modules = [module("q"), module("k", 0, 0, ranked=False)]
    assert "keep" not in " ".join(summary(adapter("default", modules)))


@pytest.mark.parametrize(
    ("step", "final_step", "final", "title", "said"),
    [
        (20, 20, True, ", ranks final since step 20", ""),
        (21, 20, True, ", ranks final since step 20", ""),
        (19, 20, False, ", step 19", "settles them at step 20 (total_step - tfinal), and the last step it saw is 19"),
        # The guard may have been off when they were settled.
        (19, 20, None, ", step 19", ""),
        (19, None, None, ", step 19", ""),
        (None, 20, None, "", ""),
    ],
)
def test_ranks_are_final_or_not(
    step: int | None, final_step: int | None, final: bool | None, title: str, said: str
) -> None:
    modules = [module("q", every=scored(9))]
    found = adapter("default", modules, step=step, final_step=final_step, final=final)
    assert str(Report((found,))).partition("\n")[0] == f"AdaLoRA adapter 'default'{title}"
    lines = [line for line in summary(found) if "not final" in line]
    assert [said in line for line in lines] == [True] * bool(said)


def test_modules_that_ended_with_no_rank_are_named() -> None:
    modules = [*stack((0, 1, 2, 4), "q", kept=0), *stack((0, 1), "k"), module("head", 0)]
    for facts, title in (
        ({"step": 9, "final_step": 9, "final": True}, "Ended with no rank"),
        ({"step": 8, "final_step": 9, "final": False}, "No rank left"),
        ({"step": 8}, "No rank left"),
        ({"saved": True}, "Ended with no rank"),
        (UNTRAINED, "Ended with no rank"),
    ):
        (section,) = [s for s in sections(adapter("default", modules, **facts)) if "no rank" in s.title.lower()]
        assert section.title == f"{title}: these are as in the base model"
        assert section.rows == (("q", "0-2, 4", "4"), ("head", "", "1"))
    assert not [s for s in sections(adapter("default", stack((0,), "q"))) if "no rank" in s.title.lower()]


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
        ("Ranked, but some parts are not always scored", groups, shown),
        ("By kind of module", kinds, shown),
        ("Ranks kept, by layer", kinds, shown),
        ("Ranks kept, outside of layers", kinds.replace("kind", "module"), [f"{letter}.alone" for letter in shown]),
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
