"""The pictures: what is in them, that nothing is cut off or unreadable, and that pyplot is left alone."""

from __future__ import annotations

import subprocess
import sys
from typing import TYPE_CHECKING, Any

import pytest
from matplotlib.colors import to_rgb
from matplotlib.patches import Rectangle
from matplotlib.text import Text
from pictured import HEAD, HISTORY, LONG, PICTURES, STARTED, adapter, labels, module, stack

from peft_gradguard.report import plots
from peft_gradguard.report.plots import grid_of, plot_history, plot_ranks, row_labels
from peft_gradguard.report.report import Report

if TYPE_CHECKING:
    from pathlib import Path

    from matplotlib.axes import Axes

    from peft_gradguard.report.facts import ModuleReport


@pytest.fixture(params=PICTURES)
def modules(request: pytest.FixtureRequest) -> list[ModuleReport]:
    return PICTURES[request.param]


def cells(axes: Axes) -> list[Rectangle]:
    return [patch for patch in axes.patches if isinstance(patch, Rectangle)]


def numbers(axes: Axes) -> dict[tuple[float, float], Text]:
    return {text.get_position(): text for text in axes.texts}


def luminance(colour: Any) -> float:
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in to_rgb(colour)]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def test_each_module_is_a_cell_with_its_rank(modules: list[ModuleReport]) -> None:
    axes = plot_ranks(adapter(modules))
    assert len(cells(axes)) == len(modules)
    shown = {place: text.get_text() for place, text in numbers(axes).items()}
    assert shown == {(x, y): str(m.rank_kept) for x, y, m in grid_of(modules).cells}
    assert len(shown) == len(modules)


def test_layers_go_across_and_kinds_up() -> None:
    axes = plot_ranks(adapter(PICTURES["12 modules"]))
    assert [text.get_text() for text in axes.get_xticklabels()] == list("012345")
    assert [text.get_text() for text in axes.get_yticklabels()] == ["query", "key"]
    assert list(axes.get_yticks()) == [0, 1]
    assert axes.get_ylim()[0] < axes.get_ylim()[1]
    assert numbers(axes)[4, 1].get_text() == str(PICTURES["12 modules"][9].rank_kept)


def test_numbers_stand_out_from_their_cells() -> None:
    axes = plot_ranks(adapter([module(f"layers.{kept}.q", kept) for kept in range(STARTED + 1)]))
    for cell, text in zip(cells(axes), axes.texts, strict=True):
        light, dark = sorted([luminance(cell.get_facecolor()[:3]), luminance(text.get_color())], reverse=True)
        assert (light + 0.05) / (dark + 0.05) >= 4.5
    brightness = [luminance(cell.get_facecolor()[:3]) for cell in cells(axes)]
    assert brightness == sorted(brightness)


def test_nothing_is_cut_off_and_no_words_overlap(modules: list[ModuleReport]) -> None:
    axes = plot_ranks(adapter(modules, unranked_ranks=24))
    figure = axes.figure
    figure.canvas.draw()
    renderer = figure.canvas.get_renderer()
    texts = [
        t for t in figure.findobj(Text) if t.get_text() and t.get_visible() and t.get_window_extent(renderer).width
    ]
    boxes = [text.get_window_extent(renderer) for text in texts]
    for box in boxes:
        assert box.x0 >= 0
        assert box.y0 >= 0
        assert box.x1 <= figure.bbox.width
        assert box.y1 <= figure.bbox.height
    drawn = figure.get_tightbbox(renderer)
    assert (figure.get_size_inches() - (drawn.width, drawn.height)).max() < 0.3, "room is wasted"
    for index, box in enumerate(boxes):
        for other, text in zip(boxes[:index], texts, strict=False):
            assert not box.padded(-1).overlaps(other.padded(-1)), (texts[index].get_text(), text.get_text())


def test_thousands_of_modules_make_a_picture_of_bearable_size() -> None:
    axes = plot_ranks(adapter(stack(2, tuple(f"experts.w{number}" for number in range(1000)))))
    assert max(axes.figure.get_size_inches()) < 45
    assert not axes.texts


def test_colours_are_what_matplotlib_before_3_8_knows(monkeypatch: pytest.MonkeyPatch) -> None:
    edges = []

    class Recording(Rectangle):
        def __init__(self, *arguments: Any, edgecolor: Any, **more: Any) -> None:
            edges.append(edgecolor)
            super().__init__(*arguments, edgecolor=edgecolor, **more)

    monkeypatch.setattr(plots, "Rectangle", Recording)
    plot_ranks(adapter([module("layers.0.q", 0), module("layers.1.q", STARTED)]))
    assert edges == [(1, 1, 1, 0.6), (0, 0, 0, 0.6)]


def test_what_is_not_ranked_is_hatched_by_reason() -> None:
    axes = plot_ranks(adapter(PICTURES["72 modules, several reasons"]))
    hatches: dict[Any, set[str | None]] = {}
    for cell, m in zip(cells(axes), PICTURES["72 modules, several reasons"], strict=True):
        hatches.setdefault(m.reason, set()).add(cell.get_hatch())
    assert hatches.pop(None) == {None}
    assert all(len(kinds) == 1 and None not in kinds for kinds in hatches.values())
    assert len(set.union(*hatches.values())) == 4
    reasons = ["frozen", "no gradient", "excluded", "inside modules_to_save"]
    assert labels(axes) == [f"not ranked: {reason}" for reason in reasons]


def test_no_legend_where_nothing_is_skipped() -> None:
    assert labels(plot_ranks(adapter(PICTURES["224 modules"]))) == []


def test_unranked_for_no_known_reason() -> None:
    axes = plot_ranks(adapter([module("layers.0.q"), module("layers.1.q", ranked=False)]))
    assert labels(axes) == ["not ranked"]


def test_ranked_but_skipped_at_times_is_marked_and_not_hatched() -> None:
    axes = plot_ranks(adapter([module("layers.0.q"), module("layers.1.q", reason="no gradient", ranked=True)]))
    assert [cell.get_hatch() for cell in cells(axes)] == [None, None]
    assert len(axes.patches) == 3
    assert labels(axes) == ["ranked, but skipped in some steps"]


def test_short_row_labels() -> None:
    kinds = [
        "encoder.block.*.layer.0.SelfAttention.q", "decoder.block.*.layer.0.SelfAttention.q",
        "decoder.block.*.layer.1.EncDecAttention.q", "lm_head",
    ]  # fmt: skip
    assert list(row_labels(kinds).values()) == [
        "encoder: q", "decoder: SelfAttention.q", "decoder: EncDecAttention.q", "lm_head",
    ]  # fmt: skip
    assert list(row_labels(["vit.layers.*.mlp.fc1", "trunk.*", "branch.*"]).values()) == ["fc1", "trunk", "branch"]
    assert list(row_labels(["encoder.layer.*.dense", "pooler.dense"]).values()) == ["dense", "pooler.dense"]
    assert row_labels(["trunk.*", "branch.*"]) == {"trunk.*": "trunk", "branch.*": "branch"}
    assert all(len(label) <= 44 for label in row_labels(f"layers.*.{kind}" for kind in LONG).values())


def test_png_and_svg(tmp_path: Path) -> None:
    report = Report((adapter(PICTURES["12 modules"]),))
    for name, start in (("ranks.png", b"\x89PNG"), ("ranks.SVG", b"<?xml")):
        report.plot(tmp_path / name)
        assert (tmp_path / name).read_bytes().startswith(start)
    with pytest.raises(ValueError, match=r"ranks.pdf' ends with '.pdf'.*\.png or \.svg"):
        report.plot(str(tmp_path / "ranks.pdf"))
    assert not (tmp_path / "ranks.pdf").exists()


def test_the_same_report_gives_the_same_file(tmp_path: Path) -> None:
    for name in ("a.png", "b.png"):
        plot_ranks(adapter(PICTURES["12 modules"]), tmp_path / name)
    assert (tmp_path / "a.png").read_bytes() == (tmp_path / "b.png").read_bytes()
    assert b"matplotlib" not in (tmp_path / "a.png").read_bytes()


def test_notebooks_show_the_axes() -> None:
    assert plot_ranks(adapter(PICTURES["12 modules"]))._repr_png_().startswith(b"\x89PNG")


def test_no_modules() -> None:
    with pytest.raises(ValueError, match="'default' has no AdaLoRA modules"):
        plot_ranks(adapter([]))


def test_history(tmp_path: Path) -> None:
    upper = Report((adapter(HEAD, history=HISTORY),)).plot_history(tmp_path / "history.png")
    _, lower = upper.figure.axes
    total, budget = upper.lines
    assert list(budget.get_ydata()[:20]) == [point.budget for point in HISTORY]
    assert list(total.get_ydata()[:20]) == [point.total_rank for point in HISTORY]
    assert list(lower.lines[0].get_ydata()[:20]) == [point.skipped for point in HISTORY]
    assert {line.get_drawstyle() for line in (*upper.lines, *lower.lines)} == {"steps-post"}
    assert upper.get_position().y0 > lower.get_position().y1
    upper.set_xlim(3, 5)
    assert lower.get_xlim() == (3, 5)
    assert (tmp_path / "history.png").read_bytes().startswith(b"\x89PNG")


def test_no_history() -> None:
    with pytest.raises(ValueError, match=r"call peft_gradguard\.keep_history\(\) before training"):
        plot_history(adapter(HEAD))


def test_history_of_one_step() -> None:
    upper = plot_history(adapter(HEAD, history=HISTORY[:1]))
    assert list(upper.lines[0].get_xdata()) == [1, 2]


def run(program: str) -> str:
    found = subprocess.run([sys.executable, "-c", SETTING + program], capture_output=True, text=True)
    assert found.returncode == 0, found.stderr
    return found.stdout


SETTING = """
import os, sys
os.environ["MPLBACKEND"] = "svg"
import peft_gradguard
from peft_gradguard.report.facts import *
from peft_gradguard.report.report import Report
module = ModuleReport("layers.0.q", 4, 2, True, None, None, ())
report = Report((AdapterReport("default", 1, 4, 2, 2, 0, (module,)),))
"""


def test_pyplot_is_left_alone() -> None:
    assert run("report.plot(); print('matplotlib.pyplot' in sys.modules)").strip() == "False"
    program = """
import matplotlib.pyplot as plt
mine = plt.figure()
before = dict(plt.rcParams)
report.plot()._repr_png_()
print(plt.get_fignums() == [mine.number], plt.gcf() is mine, plt.get_backend(), dict(plt.rcParams) == before)
"""
    assert run(program).split() == ["True", "True", "svg", "True"]


def test_without_matplotlib() -> None:
    program = """
sys.modules["matplotlib"] = None
try:
    report.plot()
except ImportError as error:
    print(error)
"""
    assert 'pip install "peft_gradguard[plot]"' in run(program)
