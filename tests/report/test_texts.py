"""How reports read, word for word: reports made by hand, compared with the files in ``golden/``.

``PYTHONPATH=tests/support python tests/report/test_texts.py`` writes those files anew. Read what changed before you
keep it.
"""

from __future__ import annotations

import dataclasses
import os
import string
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from made_reports import EXCLUDED, FROZEN, UNTRAINED, adapter, module, scored, stack

from peft_gradguard.report.report import Report

if TYPE_CHECKING:
    from peft_gradguard.report.facts import ModuleReport

GOLDEN = Path(__file__).parent / "golden"


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
            adapter("at the end", under_way, step=20, final_step=20, final=True, budget=16),
            adapter("ended too early", under_way, step=20, final_step=21, final=False),
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
    untold = {"trainable": None, "steps_scored": None, "steps_skipped": None, "excluded": None}
    mixed = [
        dataclasses.replace(m, parameters=tuple(dataclasses.replace(p, **untold) for p in m.parameters)) for m in mixed
    ]
    unpruned = [dataclasses.replace(m, ranked=None) for m in mixed[2:]]
    file: dict[str, Any] = {**UNTRAINED, "saved": True}
    ranked = {**file, "init_budget": 16, "target_budget": 8}
    return Report(
        (
            adapter("some not ranked", mixed, **ranked),
            adapter("all ranked", mixed[:2], **ranked),
            adapter("before the first pruning", unpruned, **file, unranked_ranks=None),
            adapter("one not ranked", mixed[1:3], **{**ranked, "init_budget": 8, "target_budget": None}),
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
    assert max(map(len, text.splitlines())) <= max(min(columns, 160), 32)


@pytest.mark.parametrize("name", PAGES)
def test_html(name: str) -> None:
    assert f"{PAGES[name]()._repr_html_()}\n" == (GOLDEN / f"{name}.html").read_text(encoding="utf-8")


def test_every_golden_file_is_compared() -> None:
    assert {path.name for path in GOLDEN.iterdir()} == {*(f"{n}.txt" for n in TEXTS), *(f"{n}.html" for n in PAGES)}


def write() -> None:
    for name, (report, columns) in TEXTS.items():
        os.environ["COLUMNS"] = str(columns)
        (GOLDEN / f"{name}.txt").write_text(f"{report()}\n", encoding="utf-8")
    for name, page in PAGES.items():
        (GOLDEN / f"{name}.html").write_text(f"{page()._repr_html_()}\n", encoding="utf-8")


if __name__ == "__main__":
    write()
