"""How reports read, word for word: reports made by hand, compared with the files in ``tests/golden``.

``python tests/test_report_texts.py`` writes those files anew. Read what changed before you keep it.
"""

from __future__ import annotations

import dataclasses
import json
import os
import re
import string
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from peft_gradguard.layers import Place, places, short_labels
from peft_gradguard.reports import AdapterReport, HistoryPoint, ModuleReport, ParameterReport, Report, trained
from peft_gradguard.sections import Section, has_begun, ranges, sections, summary

from peft_gradguard import tables

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

GOLDEN = Path(__file__).parent / "golden"


def module(
    name: str,
    kept: int = 8,
    started: int = 8,
    *,
    inputs: int = 16,
    outputs: int = 32,
    parts: Mapping[str, Mapping[str, Any]] | None = None,
    every: Mapping[str, Any] | None = None,
    **facts: Any,
) -> ModuleReport:
    """A module with its three parameters; ``every``: what differs in all of them, ``parts``: in one of them."""
    shapes = {"A": (started, inputs), "B": (outputs, started), "E": (started, 1)}
    parameters = tuple(
        ParameterReport(
            **{
                "name": f"{name}.lora_{factor}.default",
                "factor": factor,
                "shape": shape,
                "trainable": True,
                "inside_modules_to_save": False,
                **(every or {}),
                **(parts or {}).get(factor, {}),
            }
        )
        for factor, shape in shapes.items()
    )
    more = {"ranked": True, "reason": None, "importance": None, **facts}
    return ModuleReport(name, started, kept, parameters=parameters, **more)


def adapter(name: str, modules: Sequence[ModuleReport], **facts: Any) -> AdapterReport:
    unranked = sum(m.rank_kept for m in modules if not m.ranked)
    budgets = {"init_budget": 64, "budget": 40, "target_budget": 16}
    more = {"step": None, "unranked_ranks": unranked, **budgets, **facts}
    return AdapterReport(adapter=name, modules=tuple(modules), **more)


def scored(steps: int, **skipped: int) -> dict[str, Any]:
    """Steps left out and then scored, ``no_gradient=3`` for 3 steps without a gradient."""
    out = sum(skipped.values())
    return {
        "steps_scored": steps,
        "steps_skipped": {REASONS.get(reason, reason): count for reason, count in skipped.items()},
        "first_step": out + 1 if steps else None,
        "last_step": out + steps if steps else None,
    }


REASONS = {"no_gradient": "no gradient", "non_finite": "non-finite gradient", "inside": "inside modules_to_save"}
FROZEN = {"trainable": False}
EXCLUDED = {"excluded": True}
UNTRAINED = {"init_budget": None, "budget": None, "target_budget": None}


def stack(layers: Sequence[int], kinds: Sequence[str], **facts: Any) -> list[ModuleReport]:
    return [module(f"layers.{layer}.{kind}", **facts) for layer in layers for kind in kinds]


def audit() -> Report:
    some = [
        module("layers.0.q", ranked=False, reason="frozen", every=FROZEN),
        module("layers.0.v", ranked=False, reason="excluded", every=EXCLUDED),
        module("layers.1.q", parts={"A": FROZEN}),
        module("layers.1.v", parts={"A": FROZEN, "B": FROZEN}),
        module("layers.2.q", inputs=64, parts={"A": EXCLUDED}),
        module("layers.2.v", outputs=24, parts={"A": {**EXCLUDED, **FROZEN}}),
        module("score", every={"shape": ()}),
        module("head", parts={"E": FROZEN}),
    ]
    bare = dataclasses.replace(module("bare"), parameters=())
    inside = {"ranked": False, "reason": "inside modules_to_save", "every": {"inside_modules_to_save": True}}
    return Report(
        (
            adapter("all of it trains", stack(range(4), "qv"), budget=None),
            adapter("in parts", some, advice=("Something to change.", "And something else.")),
            adapter(
                "folded",
                [*stack((0, 1, 3), "qv", ranked=False, reason="frozen", every=FROZEN), *stack((2,), "qv")],
            ),
            adapter("one kind", [*stack((0,), "q", ranked=False, reason="frozen", every=FROZEN), *stack((1,), "q")]),
            adapter("nothing ranked", stack((0,), "qk", ranked=False, reason="frozen", every=FROZEN), init_budget=0),
            adapter("inside", [module("q"), module("score.dense", **inside), module("score.out", **inside)]),
            adapter("numbers in the names", [*stack((0, 1), ("fc1", "fc2")), bare], budget=32),
            adapter("no modules", [], init_budget=0, budget=0, target_budget=0),
            adapter("one module", [module("q", 1, 1)], init_budget=1, budget=1, target_budget=1),
        )
    )


def training() -> Report:
    always, never = scored(20), scored(0, no_gradient=20)
    frozen = {**FROZEN, **scored(0, frozen=20)}
    under_way = [
        *(module(f"layers.{n}.q", n, importance=n / 2, every=always) for n in range(4)),
        module("layers.5.q", 8, ranked=False, reason="frozen", importance=None, every=frozen),
        module("layers.7.q", 3, importance=1.5, every=scored(15, no_gradient=5), reason="no gradient"),
        module("layers.8.q", 3, importance=1.0, every=scored(17, no_gradient=3), reason="no gradient"),
        module("layers.9.q", 3, importance=1.0, every=scored(18, no_gradient=2), parts={"E": always}),
        module("layers.0.experts.left.w", 2, importance=0.25, every=always),
        module("layers.0.experts.right.w", 5, importance=0.25, every=always),
        module("layers.1.silent", ranked=False, reason="no gradient", every=never),
        module("layers.2.silent", ranked=False, reason="no gradient", every=never),
        module("layers.1.mine", ranked=False, reason="excluded", every={**EXCLUDED, **scored(3, excluded=17)}),
        module("layers.2.mine", ranked=False, reason="excluded", every={**EXCLUDED, **scored(4, excluded=16)}),
        module("pooler.dense", 0, importance=2.0, every=always),
        module("score", 6, importance=0.0, every=always),
    ]
    first_steps = [
        module("q", every={**scored(0, no_gradient=1)}, ranked=False, reason="no gradient"),
        module("k", every={**scored(1, no_gradient=3)}, ranked=False, reason="no gradient"),
        module("v", every=scored(3), parts={"B": {**FROZEN, **scored(3)}, "E": {**FROZEN, **scored(0, frozen=3)}}),
    ]
    return Report(
        (
            adapter("under way", under_way, step=20, advice=("Mind the gap.",)),
            adapter("at the first steps", first_steps, step=4),
            adapter(
                "two of five are ranked",
                [
                    *stack((0, 1), "q", every=always),
                    *stack((2, 3, 4), "q", ranked=False, reason="no gradient", every=never),
                ],
                step=20,
            ),
        )
    )


def reasons() -> Report:
    mixture = {"no_gradient": 4, "non_finite": 2}
    several = [
        module("layers.0.q", every=scored(10, **mixture), reason="no gradient"),
        module("layers.1.q", every=scored(10, **mixture), reason="no gradient", parts={"A": scored(16)}),
        module("layers.2.q", every={**FROZEN, **scored(6, no_gradient=10)}, ranked=False, reason="no gradient"),
        module("layers.3.q", every={**FROZEN, **scored(1, frozen=15)}, ranked=False, reason="frozen"),
        module("layers.4.q", every={**FROZEN, **scored(16)}, parts={"E": {**EXCLUDED, **FROZEN}}),
        module("layers.5.q", every={**EXCLUDED, **FROZEN, **scored(8, frozen=8)}, reason="frozen"),
        module("layers.0.v", every=scored(0), ranked=False, reason="no gradient"),
        module("layers.1.v", every=scored(16), ranked=False, reason=None),
        module("layers.2.v", every=scored(16), ranked=True, reason="no gradient"),
        module("layers.3.v", every=scored(0, no_gradient=16), ranked=True, reason="inside modules_to_save"),
        module(
            "score.dense",
            every={**FROZEN, **scored(0, inside=16)},
            ranked=False,
            reason="inside modules_to_save",
        ),
        module("head", every=scored(0, non_finite=16), ranked=False, reason="non-finite gradient"),
    ]
    shares = [
        module("a", every=scored(1, no_gradient=3)),
        module("b", every=scored(0, no_gradient=1), parts={"B": scored(0), "E": scored(1)}),
        module("c", every=scored(5, no_gradient=5)),
        module("layers.0.d", parts={"A": scored(2, no_gradient=8)}),
        module("layers.1.d", parts={"A": scored(7, no_gradient=3)}),
    ]
    return Report((adapter("a mixture", several, step=16), adapter("the largest share first", shares, step=16)))


def scoring() -> Report:
    never = scored(0, no_gradient=3)
    nameless = {"steps_scored": 2}
    return Report(
        (
            adapter("always", [module("q", every=scored(7))], step=9),
            adapter("at times", [module("q", every=scored(7, no_gradient=2))], step=9),
            adapter("always and at times", [module("q", every=scored(7), parts={"E": scored(6, frozen=1)})], step=9),
            adapter("at times and never", [module("q", every=never, parts={"A": scored(1, no_gradient=2)})], step=3),
            adapter("always and never", [module("q", every=never, parts={"B": scored(3)})], step=5),
            adapter(
                "all three",
                [
                    *stack((0, 1), "q", every=scored(3)),
                    module("layers.2.q", every=scored(2, no_gradient=1), parts={"A": scored(0, frozen=3)}),
                    module("layers.3.q", every=never),
                ],
                step=5,
            ),
            adapter("never", [module("q", every=never)], step=3),
            adapter("step unknown", [module("q", every=nameless)]),
            adapter("only skipped", [module("q", parts={"A": {"steps_skipped": {"frozen": 1}}})]),
            adapter("called, and nothing counted", [module("q")], step=0),
        )
    )


def saved() -> Report:
    mixed = [
        *(module(f"layers.{n}.q", 8 - n) for n in (0, 1)),
        *(module(f"layers.{n}.q", ranked=False) for n in (2, 3, 4)),
    ]
    file: dict[str, Any] = {**UNTRAINED, "saved": True}
    return Report(
        (
            adapter("some not ranked", mixed, **file),
            adapter("all ranked", mixed[:2], **file),
            adapter("none ranked", mixed[2:], **file),
            adapter("one not ranked", mixed[1:3], **file),
            adapter("not trained here", mixed[:3], **UNTRAINED),
            adapter("not trained here, nor pruned", [module("q", every=FROZEN)], **UNTRAINED),
        )
    )


def many() -> Report:
    experts = [f"moe.experts.{expert}.w{matrix}" for expert in range(8) for matrix in (1, 2)]
    pruned = [
        module(m.name, 2 + number % 4 if "experts" in m.name else 3, every=scored(30))
        for number, m in enumerate(stack((0, 1), [*experts, "moe.gate"]))
    ]
    letters = [
        module(f"layers.0.{letter}", 4, every=scored(number, no_gradient=30 - number))
        for number, letter in enumerate(string.ascii_lowercase, 1)
    ]
    return Report(
        (
            adapter("16 kinds", stack((0, 1), experts), budget=None),
            adapter("17 kinds", stack((0, 1), [*experts, "moe.gate"]), budget=None),
            adapter("17 kinds, pruned", pruned, step=30),
            adapter("26 kinds", letters, step=30),
            adapter("elsewhere", [module(f"{letter}.dense", 2) for letter in string.ascii_lowercase], **UNTRAINED),
        )
    )


def merged() -> Report:
    frozen: dict[str, Any] = {"ranked": False, "reason": "frozen", "every": {**FROZEN, **scored(0, frozen=9)}}
    always = {"every": scored(9)}

    def numbered(count: int, *of: int) -> list[ModuleReport]:
        return [
            module(f"fc{n}", *(() if n in of else (n % 8,)), **(frozen if n in of else always)) for n in range(count)
        ]

    experts = [
        module(f"layers.{layer}.experts.{n}.w", 8 - layer, **(frozen if (layer, n) in ((0, 3), (1, 5)) else always))
        for layer in (0, 1)
        for n in range(16)
    ]
    silent = scored(4, no_gradient=5)
    return Report(
        (
            adapter("16 kinds", numbered(16, 3, 7), step=9),
            adapter("17 kinds, two frozen", [*numbered(17, 3, 7), module("head2", 4, **always)], step=9),
            adapter("17 kinds, one frozen", numbered(17, 3), step=9),
            adapter("17 kinds, all frozen", numbered(17, *range(17)), step=9),
            adapter("some frozen and all the others", [*numbered(17, 3, 7), module("head2", **frozen)], step=9),
            adapter("all frozen and all the others", [*numbered(17, *range(17)), module("head2", **frozen)], step=9),
            adapter("experts", [*experts, module("layers.0.gate", every=silent), module("score", 3, **always)], step=9),
        )
    )


LONG = (
    "transformer_block_with_a_name.grouped_query_attention.query_key_value_projection_of_the_model",
    "transformer_block_with_a_name.another_feed_forward.query_key_value_projection_of_the_model",
)


def long_names() -> Report:
    first, second = LONG
    word = "x".join(string.ascii_lowercase)
    modules = [
        *(module(f"layers.{n}.{first}", n % 9, importance=n, every=scored(30)) for n in range(30)),
        *(module(f"layers.{n}.{second}", every=scored(20 + n, no_gradient=10 - n)) for n in range(10)),
        module("a_head_with_a_rather_long_name", ranked=False, reason="frozen", every=FROZEN),
        module("b.dense", ranked=False, reason="inside modules_to_save", every=scored(0, inside=30)),
    ]
    # The words of the first line fit narrow terminals exactly, or are one letter too long for them.
    advice = (
        f"{word[:28]} {word[:29]} {word[:36]} {word[:37]} stay in one piece: words-with-hyphens-in-them.",
        "Short.",
    )
    return Report((adapter("an_adapter_with_a_name_of_many_letters", modules, step=30, advice=advice),))


def escaped() -> Report:
    modules = [
        module("layers.0.<q>", 4, importance=3.0, every=scored(5), parts={"A": scored(3, no_gradient=2)}),
        module('"k" & co', 5, importance=1.0, every=scored(5)),
    ]
    letters = [module(f"layers.0.{letter}") for letter in string.ascii_lowercase]
    advice = ("Use <this> & 'that'.", "Or that.")
    return Report(
        (adapter("<b>&", modules, step=5, advice=advice), adapter("many", letters), adapter("none", [], step=1))
    )


TEXTS = {
    "audit": (audit, 80),
    "training": (training, 80),
    "reasons": (reasons, 80),
    "scoring": (scoring, 80),
    "saved": (saved, 80),
    "many": (many, 80),
    "merged": (merged, 80),
    "training-40": (training, 40),
    "long_names-20": (long_names, 20),
    "long_names-40": (long_names, 40),
    "long_names-79": (long_names, 79),
    "long_names-200": (long_names, 200),
}
"""By the name of the file: the report, and the width of the terminal."""
PAGES = {"audit": audit, "training": training, "escaped": escaped}


@pytest.mark.parametrize("name", TEXTS)
def test_text(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    report, columns = TEXTS[name]
    monkeypatch.setenv("COLUMNS", str(columns))
    text = f"{report()}\n"
    assert text == (GOLDEN / f"{name}.txt").read_text(encoding="utf-8")
    assert max(map(len, text.splitlines())) <= max(min(columns, 80), 32)


@pytest.mark.parametrize("name", PAGES)
def test_html(name: str) -> None:
    assert f"{PAGES[name]()._repr_html_()}\n" == (GOLDEN / f"{name}.html").read_text(encoding="utf-8")


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


def test_no_adapter() -> None:
    assert str(Report(())) == "AdaLoRA: no adapter"
    assert Report(())._repr_html_() == "<p>AdaLoRA: no adapter</p>"


def test_every_golden_file_is_compared() -> None:
    assert {path.name for path in GOLDEN.iterdir()} == {*(f"{n}.txt" for n in TEXTS), *(f"{n}.html" for n in PAGES)}


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


@pytest.mark.parametrize(
    ("name", "kind", "layer"),
    [
        ("q", "q", None),
        ("", "", None),
        ("layers.12.q", "layers.*.q", 12),
        ("0.q", "*.q", 0),
        ("blocks.7", "blocks.*", 7),
        ("block.3.layer.1.q", "block.*.layer.1.q", 3),
        ("layer1.fc2.w-3", "layer1.fc2.w-3", None),
        ("layers.2b.03.q", "layers.2b.*.q", 3),
    ],
)
def test_place(name: str, kind: str, layer: int | None) -> None:
    assert places([name]) == {name: Place(kind, layer)}


PLACES: dict[str, dict[str, tuple[str, int | None]]] = {
    "a model in a Sequential": {
        "0.model.layer.7.q": ("0.model.layer.*.q", 7),
        "0.model.layer.8.q": ("0.model.layer.*.q", 8),
        "0.model.layer.8.k": ("0.model.layer.*.k", 8),
        "0.model.pooler": ("*.model.pooler", 0),
        "2.linear": ("*.linear", 2),
    },
    "experts in layers": {
        "layers.0.experts.0.w": ("layers.*.experts.0.w", 0),
        "layers.0.experts.1.w": ("layers.*.experts.1.w", 0),
        "layers.1.experts.1.w": ("layers.*.experts.1.w", 1),
    },
    "stages of blocks": {
        "layers.0.blocks.1.q": ("layers.*.blocks.1.q", 0),
        "layers.2.blocks.1.q": ("layers.*.blocks.1.q", 2),
        "layers.2.blocks.5.q": ("layers.*.blocks.5.q", 2),
    },
    "one block, of unlike layers": {
        "block.0.layer.0.q": ("block.*.layer.0.q", 0),
        "block.0.layer.1.wi": ("block.*.layer.1.wi", 0),
    },
    "ends with the number": {"trunk.0": ("trunk.*", 0), "trunk.2": ("trunk.*", 2), "head": ("head", None)},
}


@pytest.mark.parametrize("case", PLACES)
def test_places_of_several(case: str) -> None:
    assert places(PLACES[case]) == {name: Place(*expected) for name, expected in PLACES[case].items()}


@pytest.mark.parametrize(
    "labels",
    [
        {},
        {"q": "q"},
        {"layers.*.attn.q": "q", "layers.*.attn.k": "k"},
        {"layers.*.attn.dense": "attn.dense", "layers.*.mlp.dense": "mlp.dense", "layers.*.q": "q"},
        {"encoder.*.q": "encoder.*.q", "decoder.*.q": "decoder.*.q"},
        {"trunk.*": "trunk.*", "branch.*": "branch.*"},
        {"experts.0.w": "experts.0.w", "experts.1.w": "experts.1.w"},
        {"experts.0": "experts.0", "gate.1": "gate.1"},
        {"dense": "dense", "pooler.dense": "pooler.dense"},
        {"*": "*", "*.q": "q"},
        {"model.layers.*": "layers.*", "model.blocks.*": "blocks.*"},
        {"model.layers.*.q": "layers.*.q", "model.head.q": "head.q"},
        {"layers.*.#": "#"},
        {"a.b.c": "a.b.c", "x.a.b.c": "x.a.b.c", "b.c": "b.c"},
    ],
)
def test_short_labels(labels: dict[str, str]) -> None:
    assert short_labels(labels) == labels
    assert short_labels([*labels, *labels]) == labels


@pytest.mark.parametrize(
    ("label", "width", "front", "said"),
    [
        ("abcdefghijkl", 12, 1 / 3, "abcdefghijkl"),
        ("abcdefghijklm", 12, 1 / 3, "abc...hijklm"),
        ("abcdefghijklm", 12, 1 / 2, "abcd...ijklm"),
        ("abcdefghijklm", 12, 2 / 3, "abcdef...klm"),
        ("abcdefghijklm", 12, 5 / 6, "abcdefg...lm"),
        ("abcdefgh", 7, 1 / 3, "a...fgh"),
        ("abcd", 3, 1 / 3, "..."),
    ],
)
def test_shortened(label: str, width: int, front: float, said: str) -> None:
    assert tables.shortened(label, width, front) == said


def test_a_third_of_a_shortened_label_is_its_beginning() -> None:
    assert tables.shortened(string.ascii_lowercase, 15) == "abcd...stuvwxyz"


TOLD_APART: dict[str, tuple[int, dict[str, str]]] = {
    "none": (12, {}),
    "all short": (3, {"abc": "abc", "d": "d"}),
    "by the end": (12, {"the_same_name_of_1": "the...e_of_1", "the_same_name_of_2": "the...e_of_2"}),
    "by half": (12, {"abc1____________end": "abc1...__end", "abc2____________end": "abc2...__end"}),
    "by two thirds": (12, {"abcde1___________end": "abcde1...end", "abcde2___________end": "abcde2...end"}),
    "by five sixths": (12, {"abcdef1__________end": "abcdef1...nd", "abcdef2__________end": "abcdef2...nd"}),
    "by numbers": (
        12,
        {
            "left_or_so_1_and_the_end": "le..._end~1",
            "left_or_so_2_and_the_end": "le..._end~2",
            "right_side_3_and_the_end": "ri..._end~1",
            "left_or_so_4_and_the_end": "le..._end~3",
            "four": "four",
            "nine_lett": "nine_lett",
            "ten_letter": "te...tter~1",
        },
    ),
}


@pytest.mark.parametrize("case", TOLD_APART)
def test_told_apart(case: str) -> None:
    width, labels = TOLD_APART[case]
    assert tables.told_apart([*labels, *labels], width) == labels
    assert max(map(len, labels.values()), default=0) <= width


def test_columns_side_by_side_or_beneath() -> None:
    def lines(label: str, width: int) -> list[str]:
        return tables._columns(Section("", ("module", "layers", "why"), ((label, "", "frozen"),)), width)

    # Two columns of six letters, a gap before each of the three: what is left is for the first one.
    assert lines("quite_short", 29) == ["  module       layers  why", "  quite_short          frozen"]
    assert lines("quite_short", 28) == ["  module", "    layers; why", "  quite_short", "    -; frozen"]
    sixteen, more = "abcdefghijklmnop", "abcdefghijklmnopq"
    assert lines(sixteen, 34) == ["  module            layers  why", f"  {sixteen}          frozen"]
    assert lines(sixteen, 33) == ["  module", "    layers; why", f"  {sixteen}", "    -; frozen"]
    assert lines(more, 35) == ["  module             layers  why", f"  {more}          frozen"]
    assert lines(more, 34) == ["  module            layers  why", "  abcd...ijklmnopq          frozen"]
    assert lines(more, 33) == ["  module", "    layers; why", f"  {more}", "    -; frozen"]
    assert lines(more, 19) == ["  module", "    layers; why", f"  {more}", "    -; frozen"]
    assert lines(more, 18) == ["  module", "    layers; why", "  abcd...ijklmnopq", "    -; frozen"]


@pytest.mark.parametrize(
    ("indent", "room", "cut"),
    [
        ("", 31, "abcdefghi...nopqrstuvwxyzabcdef"),
        ("  ", 29, "abcdefgh...mnopqrstuvwxyzabcd"),
        ("    ", 27, "abcdefgh...mnopqrstuvwxyzab"),
    ],
)
def test_words_longer_than_a_line_are_cut(indent: str, room: int, cut: str) -> None:
    word = string.ascii_lowercase * 2
    assert tables._wrapped(word[:room], 33, indent) == indent + word[:room]
    assert tables._wrapped(word[: room + 1], 33, indent) == indent + cut


def matrix(width: int, label: str, *ranks: str) -> list[str]:
    layers = map(str, range(len(ranks)))
    return tables._matrix(Section("", ("layer", *layers), ((label, *ranks),)), width)


def test_matrix_goes_on_beneath() -> None:
    assert matrix(15, "query", *"8888") == ["  layer 0 1 2 3", "  query 8 8 8 8"]
    assert matrix(14, "query", *"8888") == ["  layer 0 1 2", "  query 8 8 8", "", "  layer 3", "  query 8"]
    assert matrix(32, "query", "2-5", "", "8") == ["  layer   0   1   2", "  query 2-5       8"]
    # At least one layer a line, however wide.
    assert matrix(32, "q", "100-200", "8" * 30, "1") == [
        "  layer" + "0".rjust(31),
        "  q    " + "100-200".rjust(31),
        "",
        "  layer" + "1".rjust(31),
        "  q     " + "8" * 30,
        "",
        "  layer" + "2".rjust(31),
        "  q    " + "1".rjust(31),
    ]


@pytest.mark.parametrize(
    ("width", "label", "said"),
    [
        (32, "twelve_lette", "twelve_lette"),
        (32, "thirteen_lett", "thi...n_lett"),
        (51, "thirteen_lett", "thi...n_lett"),
        (52, "thirteen_lett", "thirteen_lett"),
        (80, "twenty_letters_of_it", "twenty_letters_of_it"),
        (80, "twenty_one_letters_it", "twent...e_letters_it"),
    ],
)
def test_matrix_leaves_room_for_numbers(width: int, label: str, said: str) -> None:
    assert matrix(width, label, "8")[1] == f"  {said} 8"


def plain() -> Report:
    parameter = ParameterReport("q.lora_A.default", "A", (2, 3), True, False)
    skipped = ParameterReport("q.lora_B.default", "B", (), False, True, 3, {"frozen": 2}, 1, 4, True)
    several = AdapterReport(
        "default", 4, 8, 6, 4, 2, (ModuleReport("q", 2, 1, False, "frozen", 0.5, (parameter, skipped)),),
        ("Change it.",), (HistoryPoint(1, 8, 9, 2), HistoryPoint(2, 7, 8, 0)),
    )  # fmt: skip
    return Report((several, AdapterReport("other", None, None, None, None, 0, (), saved=True)))


PLAIN = {
    "adapters": [
        {
            "adapter": "default",
            "step": 4,
            "init_budget": 8,
            "budget": 6,
            "target_budget": 4,
            "unranked_ranks": 2,
            "modules": [
                {
                    "name": "q",
                    "rank_started": 2,
                    "rank_kept": 1,
                    "ranked": False,
                    "reason": "frozen",
                    "importance": 0.5,
                    "parameters": [
                        {
                            "name": "q.lora_A.default",
                            "factor": "A",
                            "shape": [2, 3],
                            "trainable": True,
                            "inside_modules_to_save": False,
                            "steps_scored": 0,
                            "steps_skipped": {},
                            "first_step": None,
                            "last_step": None,
                            "excluded": False,
                        },
                        {
                            "name": "q.lora_B.default",
                            "factor": "B",
                            "shape": [],
                            "trainable": False,
                            "inside_modules_to_save": True,
                            "steps_scored": 3,
                            "steps_skipped": {"frozen": 2},
                            "first_step": 1,
                            "last_step": 4,
                            "excluded": True,
                        },
                    ],
                }
            ],
            "advice": ["Change it."],
            "history": [
                {"step": 1, "budget": 8, "total_rank": 9, "skipped": 2},
                {"step": 2, "budget": 7, "total_rank": 8, "skipped": 0},
            ],
            "saved": False,
        },
        {
            "adapter": "other",
            "step": None,
            "init_budget": None,
            "budget": None,
            "target_budget": None,
            "unranked_ranks": 0,
            "modules": [],
            "advice": [],
            "history": [],
            "saved": True,
        },
    ]
}


def test_adapter_to_plot_is_given_by_name() -> None:
    for plot in (plain().plot, plain().plot_history):
        with pytest.raises(TypeError, match="positional argument"):
            plot(None, "default")


def test_to_dict() -> None:
    found = plain().to_dict()
    assert found == PLAIN
    assert list(found["adapters"][0]) == list(PLAIN["adapters"][0])
    assert Report(()).to_dict() == {"adapters": []}


def test_to_json() -> None:
    assert plain().to_json() == json.dumps(PLAIN)
    assert plain().to_json(indent=2) == json.dumps(PLAIN, indent=2)


def test_only_one_adapter_or_the_one_that_is_named() -> None:
    report = plain()
    first, second = report.adapters
    assert report._only("default") is first
    assert report._only("other") is second
    assert Report((second,))._only(None) is second
    assert Report((second,))._only("other") is second


@pytest.mark.parametrize(
    ("count", "name", "said"),
    [
        (2, None, "adapter=None: give one of the report's adapters, 'default', 'other'."),
        (2, "none", "adapter='none': give one of the report's adapters, 'default', 'other'."),
        (1, "other", "adapter='other': give one of the report's adapters, 'default'."),
        (0, None, "adapter=None: give one of the report's adapters, ."),
    ],
)
def test_no_such_adapter(count: int, name: str | None, said: str) -> None:
    with pytest.raises(ValueError, match=f"^{re.escape(said)}$"):
        Report(plain().adapters[:count])._only(name)


@pytest.mark.parametrize(
    "facts",
    [
        plain(),
        plain().adapters[0],
        plain().adapters[0].modules[0],
        plain().adapters[0].modules[0].parameters[0],
        sections(plain().adapters[0])[0],
    ],
    ids=lambda facts: type(facts).__name__,
)
def test_what_was_reported_cannot_be_changed(facts: Any) -> None:
    field = dataclasses.fields(facts)[0].name
    with pytest.raises(dataclasses.FrozenInstanceError):
        setattr(facts, field, None)
    assert facts == dataclasses.replace(facts)


def write() -> None:
    for name, (report, columns) in TEXTS.items():
        os.environ["COLUMNS"] = str(columns)
        (GOLDEN / f"{name}.txt").write_text(f"{report()}\n", encoding="utf-8")
    for name, page in PAGES.items():
        (GOLDEN / f"{name}.html").write_text(f"{page()._repr_html_()}\n", encoding="utf-8")


if __name__ == "__main__":
    write()
