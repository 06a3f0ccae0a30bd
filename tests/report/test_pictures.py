"""How the pictures look, pixel by pixel: hand-made reports are drawn and compared with the images in ``pictures/``.

After a change that is meant to be seen, ``PYTHONPATH=tests/support python tests/report/test_pictures.py`` draws the
images anew; look at each of them.
"""

from __future__ import annotations

import sys
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import matplotlib
import matplotlib.style
import pytest
from matplotlib import ft2font
from matplotlib.testing.compare import compare_images
from pictured import BERT, HEAD, HISTORY, LLAMA, LONG, PICTURES, adapter, labels, module, stack
from PIL import Image

from peft_gradguard.memory.counts import HistoryPoint
from peft_gradguard.report import plots
from peft_gradguard.report.plots import grid_of, plot_history, plot_ranks, row_labels

if TYPE_CHECKING:
    from collections.abc import Iterator

    from peft_gradguard.report.facts import AdapterReport, ModuleReport

DRAWN_WITH = "3.11"
"""The version of matplotlib that drew the images; another one may set its text a pixel aside."""
TOLERANCE = 0.02
"""Of the 255 steps of a pixel's brightness, the root of the mean square. One changed digit of a number is more."""
IMAGES = Path(__file__).parent / "pictures"


def started(modules: list[ModuleReport], ranks: int) -> list[ModuleReport]:
    """Return modules that started with so many ranks, and kept all of them where they are not ranked."""
    return [replace(m, rank_started=ranks, rank_kept=m.rank_kept if m.ranked else ranks) for m in modules]


REASONS = ("frozen", "no gradient", "excluded", "non-finite gradient", "worn out", "no gradient")

RANKS: dict[str, AdapterReport] = {
    # Every hatch, some for reasons that have none of their own, the marked corner on dark and on bright cells, and
    # modules without a layer.
    "reasons": adapter(
        [
            *(module(f"model.layers.{layer}.k", reason=reason) for layer, reason in enumerate(REASONS)),
            module("model.layers.6.k", ranked=False),
            module("model.layers.0.q", 1, "no gradient", ranked=True),
            module("model.layers.1.q", 11, "no gradient", ranked=True),
            module("model.layers.2.q"),
            *HEAD,
        ],
        unranked_ranks=96,
    ),
    "one_module": adapter(started([module("q", 128)], 128), step=None, budget=None, unranked_ranks=7),
    "all_skipped": adapter(stack(4, BERT[:5], reason="frozen"), budget=0, unranked_ranks=240),
    # So many layers that the cells get narrower, lose their numbers, as one has five digits, and only every second
    # layer is named.
    "many_layers": adapter(
        started([*(module(f"layers.{n}.q", 700 * (n % 13)) for n in range(188)), module("head", 10_000)], 10_000),
        step=None,
    ),
    "experts": adapter(stack(2, tuple(f"moe.experts.{expert}.w1" for expert in range(10)))),
    "encoder_and_decoder": adapter(
        [*PICTURES["encoder and decoder"], *stack(3, (LLAMA[0],), "vision.tower.layers"), module("lm_head")],
        budget=None,
    ),
    # Ranks of four digits make smaller numbers.
    "long_names": adapter(
        started([module(m.name, 200 * index) for index, m in enumerate(stack(3, LONG))], 1000), step=0
    ),
}

HISTORIES: dict[str, AdapterReport] = {
    "history": adapter(HEAD, history=HISTORY),
    "history_of_one_step": adapter(HEAD, history=(HistoryPoint(7, 3, 5, 0),)),
}


@contextmanager
def plain_style() -> Iterator[None]:
    """Draw with matplotlib's own settings, whatever the user's file of settings says."""
    with matplotlib.style.context("default"):
        yield


def draw(name: str, folder: Path) -> Path:
    path = folder / f"{name}.png"
    with plain_style():
        if name in RANKS:
            plot_ranks(RANKS[name], path)
        else:
            plot_history(HISTORIES[name], path)
    return path


@pytest.mark.parametrize("name", [*RANKS, *HISTORIES])
def test_pictures_look_as_before(name: str, tmp_path: Path) -> None:
    version = ".".join(matplotlib.__version__.split(".")[:2])
    if version != DRAWN_WITH:
        pytest.skip(f"the images are drawn by matplotlib {DRAWN_WITH}, and matplotlib {version} may set text otherwise")
    if ft2font.__freetype_build_type__ != "local":
        pytest.skip("this matplotlib uses the system's FreeType, which may set text otherwise")
    difference = compare_images(str(IMAGES / f"{name}.png"), str(draw(name, tmp_path)), tol=TOLERANCE)
    assert difference is None, difference


@pytest.mark.parametrize(
    ("dark", "bright"),
    [
        # The luminance passes 0.179 between the two.
        ((0.92698, 0, 0), (0.92708, 0, 0)),
        ((0, 0.53732, 0), (0, 0.53742, 0)),
        ((0.92138, 0.04, 0.04), (0.92148, 0.04, 0.04)),
        ((0.04, 0.53611, 0.04), (0.04, 0.53621, 0.04)),
        ((0.5, 0.32397, 1), (0.5, 0.32407, 1)),
        ((0.2, 0.42, 0.96485), (0.2, 0.42, 0.96535)),
        ((0.78009, 0.3, 0.3), (0.78019, 0.3, 0.3)),
        ((0.05, 0.53578, 0.05), (0.05, 0.53588, 0.05)),
        ((0.91986, 0.05, 0.05), (0.91996, 0.05, 0.05)),
        ((0, 0.4355, 0.95584), (0, 0.4355, 0.95634)),
        ((0.46011, 0.46011, 0.46011), (0.46021, 0.46021, 0.46021)),
    ],
)
def test_ink_changes_where_black_starts_to_stand_out_more(dark: Any, bright: Any) -> None:
    assert plots._ink((*dark, 1.0)) == "white"
    assert plots._ink((*bright, 1.0)) == "black"


def test_hundreds_of_rows_get_lower() -> None:
    axes = plot_ranks(adapter(stack(1, tuple(f"w{number}" for number in range(400)))))
    box = axes.get_window_extent()
    assert (box.width / 120, box.height / 120) == pytest.approx((0.34, 40))
    assert len(axes.texts) == 400
    assert [text.get_size() for text in axes.texts] == pytest.approx([72 * 0.6 * 40 / 400] * 400)
    assert [label.get_text() for label in axes.get_yticklabels()] == [f"w{number}" for number in range(0, 400, 2)]


def test_numbers_of_exactly_the_smallest_size_are_written(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plots, "SMALLEST_NUMBER", 8.0)
    assert [text.get_size() for text in plot_ranks(adapter(HEAD)).texts] == [8.0, 8.0]


@pytest.mark.parametrize(("ranks", "top"), [(0, 1), (1, 1), (2, 2)])
def test_scale_reaches_from_none_to_the_most_ranks_but_has_a_length(ranks: int, top: int) -> None:
    axes = plot_ranks(adapter(started([module("layers.0.q", 0), module("layers.1.q", 0)], ranks)))
    _, scale = axes.figure.axes
    assert scale.get_ylim() == (0, top)
    assert all(tick.is_integer() for tick in scale.get_yticks())


def test_columns_are_one_apart_and_the_one_without_a_layer_stands_aside() -> None:
    names = ["layers.7.q", "head", "layers.2.k", "layers.11.q", "x.layers.2.q"]
    grid = grid_of([module(name) for name in names])
    assert list(grid.columns.items()) == [(2, 0), (7, 1), (11, 2), (None, 3.5)]
    assert list(grid.rows.items()) == [("layers.*.q", 0), ("layers.*.k", 1), ("head", 2.5), ("x.layers.*.q", 4)]
    assert [(x, y, m.name) for x, y, m in grid.cells] == [
        (1, 0, "layers.7.q"), (3.5, 2.5, "head"), (0, 1, "layers.2.k"), (2, 0, "layers.11.q"), (0, 4, "x.layers.2.q"),
    ]  # fmt: skip
    assert grid_of([module("q"), module("k")]).columns == {None: 0}


def test_rows_of_one_stack_stay_together() -> None:
    grid = grid_of([module(name) for name in ("a.h.0.q", "b.h.0.q", "a.h.0.k", "b.h.1.k")])
    assert list(grid.rows.items()) == [("a.h.*.q", 0), ("a.h.*.k", 1), ("b.h.*.q", 2.5), ("b.h.*.k", 3.5)]


def test_row_labels_name_the_stack_where_it_tells_something() -> None:
    assert row_labels(["model.text.layers.*.q", "model.image.layers.*.q"]) == {
        "model.text.layers.*.q": "text: q",
        "model.image.layers.*.q": "image: q",
    }
    assert list(row_labels(["text.layers.*.q", "image.layers.*.k", "head"]).values()) == ["q", "k", "head"]
    # An end that only one stack has twice is no reason for the stacks' names.
    assert list(row_labels(["a.*.x.q", "a.*.y.q", "b.*.k"]).values()) == ["x.q", "y.q", "k"]
    # What stands alone has no stack whose name could help.
    assert list(row_labels(["a.*.q", "b.*.q", "q"]).values()) == ["a: q", "b: q", "q"]
    assert list(row_labels(["a.*", "b.*.q", "b.*.k"]).values()) == ["a", "q", "k"]


@pytest.mark.parametrize(
    ("names", "shown"),
    [
        ([], []),
        (["a.b.c"], ["c"]),
        (["a", "a.b"], ["a", "a.b"]),
        (["x.a.y", "x.b.y"], ["a", "b"]),
        (["x.x.a.y.y", "x.x.b.y.y"], ["a", "b"]),
        (["x.a", "y.a"], ["x", "y"]),
        (["a.x", "a.y", "b.x"], ["a.x", "a.y", "b.x"]),
        (["b.x", "a.x", "a.y"], ["b.x", "a.x", "a.y"]),
        (["a.b.z", "b.a.z", "a.z"], ["a.b", "b.a", "a"]),
    ],
)
def test_parts_that_all_stacks_share_are_left_out(names: list[str], shown: list[str]) -> None:
    assert plots._without_common_parts(names) == dict(zip(names, shown, strict=True))


def test_labels_lose_their_middle_from_the_45th_character() -> None:
    letters = "".join(chr(ord("a") + n % 26) for n in range(45))
    assert plots._shortened(letters[:44]) == letters[:44]
    assert plots._shortened(letters) == f"{letters[:21]}\N{HORIZONTAL ELLIPSIS}{letters[-22:]}"


def test_hatches_of_the_known_reasons_come_first() -> None:
    reasons: list[Any] = ["worn out", None, "excluded", "bent", "frozen"]
    modules = [*(module("q", reason=reason, ranked=False) for reason in reasons), module("q", reason="no gradient")]
    modules.append(module("q", reason="not seen", ranked=True))
    assert list(plots._hatches(modules).items()) == [
        ("frozen", "////"), ("no gradient", "...."), ("excluded", "xxxx"), (None, "++++"), ("bent", "oo"),
        ("worn out", "----"),
    ]  # fmt: skip
    five = [module("q", reason=reason, ranked=False) for reason in ("a", "b", "c", "d", "e")]
    assert list(plots._hatches(five).values()) == ["++++", "oo", "----", "||||", "++++"]


def test_cells_and_marked_corners_are_where_they_belong() -> None:
    marked = [module(f"layers.{n}.{kind}", reason="no gradient", ranked=True) for n in range(3) for kind in "qkv"]
    patches = plot_ranks(adapter(marked)).patches
    for (x, y, _), cell, corner in zip(grid_of(marked).cells, patches[::2], patches[1::2], strict=True):
        assert cell.get_extents().width == pytest.approx(0.96 * 0.34 * 120)
        assert cell.get_xy() == pytest.approx((x - 0.48, y - 0.48))
        expected = [x + 0.23, y + 0.48, x + 0.48, y + 0.48, x + 0.48, y + 0.15]
        assert [*corner.get_xy()[:3].flat] == pytest.approx(expected)


def test_title() -> None:
    modules = [module("a", 2), module("b", 3)]
    one = [module("a", 2), module("b", reason="frozen")]
    final = {"final_step": 320, "final": True}
    for drawn, facts, lines in (
        (modules, {}, ["5 of 24 ranks kept", "step 400", "2 modules share a budget of 40"]),
        (modules, final, ["5 of 24 ranks kept", "ranks final since step 320", "2 modules share a budget of 40"]),
        (modules, {"step": None}, ["5 of 24 ranks kept", "2 modules share a budget of 40"]),
        (modules, {"budget": None}, ["5 of 24 ranks kept", "step 400"]),
        (
            one,
            {"step": 0, "budget": 0, "unranked_ranks": 12},
            ["14 of 24 ranks kept", "step 0", "1 module has a budget of 0", "1 other keeps its 12"],
        ),
        (one[1:], {"unranked_ranks": 12}, ["12 of 12 ranks kept", "step 400"]),
        (one, {"step": None, "budget": None, "unranked_ranks": 12}, ["14 of 24 ranks kept"]),
    ):
        assert plots._title(adapter(drawn, **facts)) == "\n".join(["adapter 'default': " + lines[0], *lines[1:]])


def test_what_is_in_no_layer_is_named_as_what_it_is() -> None:
    names = ["layers.0.q", "layers.1.q", "branch.0", "branch.2", "experts.0.w", "experts.1.w"]
    axes = plot_ranks(adapter([module(name) for name in names]))
    assert [text.get_text() for text in axes.get_xticklabels()] == ["0", "1", "none"]
    assert axes.get_xlabel() == "layer"
    assert [text.get_text() for text in axes.get_yticklabels()] == ["q", *names[2:]]
    assert [x for x, _, _ in grid_of([module(name) for name in names]).cells] == [0, 1, 2.5, 2.5, 2.5, 2.5]


def test_no_word_of_layers_where_there_are_none() -> None:
    axes = plot_ranks(adapter([module("trunk.0"), module("trunk.2")]))
    assert [text.get_text() for text in axes.get_xticklabels()] == [""]
    assert axes.get_xlabel() == ""


def test_a_file_that_does_not_tell_what_is_ranked_gives_no_hatch() -> None:
    axes = plot_ranks(adapter([replace(module("layers.0.q"), ranked=None)]))
    assert [patch.get_hatch() for patch in axes.patches] == [None]
    assert labels(axes) == []


def test_legend_of_both_kinds() -> None:
    axes = plot_ranks(adapter([module("a", reason="frozen"), module("b", reason="no gradient", ranked=True)]))
    assert labels(axes) == ["not ranked: frozen", "ranked, but skipped in some steps"]


def test_endings(tmp_path: Path) -> None:
    history = adapter(HEAD, history=HISTORY)
    for draw_it in (plot_ranks, plot_history):
        for name, ending in (("a.jpg", ".jpg"), ("png", ""), ("a.png.gz", ".gz"), (".svg", "")):
            path = tmp_path / name
            with pytest.raises(ValueError, match=f"^{str(path)!r} ends with '{ending}': a picture is written as .png"):
                draw_it(history, path)
            assert not path.exists()
        draw_it(history, str(tmp_path / "a.b.PnG"))
        assert (tmp_path / "a.b.PnG").read_bytes().startswith(b"\x89PNG")


def test_files_are_the_same_twice_and_tell_no_date_and_no_version(tmp_path: Path) -> None:
    for name in ("a.svg", "b.svg", "a.png", "b.png"):
        plot_ranks(RANKS["reasons"], tmp_path / name)
    for ending in (".svg", ".png"):
        first, second = ((tmp_path / f"{name}{ending}").read_bytes() for name in "ab")
        assert first == second
        assert b"date" not in first.lower()
        assert b"Matplotlib v" not in first
    assert b"Software" not in first


if __name__ == "__main__":
    IMAGES.mkdir(exist_ok=True)
    for each in [*RANKS, *HISTORIES]:
        path = draw(each, IMAGES)
        with Image.open(path) as picture:
            picture.convert("RGB").save(path, optimize=True)
        print(f"{path}: {path.stat().st_size / 1000:.0f} kB")
    sys.exit()
