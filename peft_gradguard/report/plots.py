"""How a report looks: the ranks as a picture, layers across and kinds of matrix up, and the history over the steps.

Figures are made without pyplot, so that nobody's current figure, style or backend changes.
"""

from __future__ import annotations

import math
import os
from io import BytesIO
from itertools import takewhile
from typing import TYPE_CHECKING, Any, NamedTuple, cast

from .layers import places, short_labels
from .sections import moment, others, sharing

try:
    from matplotlib import colormaps, rc_context
    from matplotlib.axes import Axes
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.cm import ScalarMappable
    from matplotlib.colors import Normalize, to_rgba
    from matplotlib.figure import Figure
    from matplotlib.lines import Line2D
    from matplotlib.patches import Patch, Polygon, Rectangle
    from matplotlib.ticker import MaxNLocator
    from matplotlib.transforms import ScaledTranslation
except ImportError as error:
    raise ImportError('Pictures need matplotlib: pip install "peft_gradguard[plot]"') from error

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping, Sequence

    from matplotlib.artist import Artist

    from ..model.parameters import SkipReason
    from .facts import AdapterReport, ModuleReport

ENDINGS = (".png", ".svg")

COLOURS = colormaps["cividis"]
"""From dark blue to yellow, made to look alike with and without colour blindness; its lightness rises evenly."""

HATCHES = {"frozen": "////", "no gradient": "....", "excluded": "xxxx", "inside modules_to_save": "\\\\\\\\"}
OTHER_HATCHES = ("++++", "oo", "----", "||||")

CELL = 0.34, 0.26
"""Width and height of a cell, in inches: three digits fit."""
LARGEST = 40.0
"""Inches of width or height that all cells together may take. More cells get smaller, and then lose their numbers."""
SMALLEST_NUMBER = 4.0
"""Points; numbers that would be smaller are left out."""
HALF = 0.48
"""Of a cell, in cells: a thin line stays between two of them."""
GAP = 0.5
"""Room between groups of rows or columns, in cells."""
MARGIN = 0.1
"""Inches around everything."""
DPI = 120
LONGEST_LABEL = 44
"""Characters of a row's label; longer ones lose their middle."""


class Grid(NamedTuple):
    """Where each module is drawn."""

    columns: dict[int | None, float]
    """Where each layer is, from left to right; None, for modules without a layer's number, comes last."""
    rows: dict[str, float]
    """Where each kind of matrix (``layers.Place.kind``) is, from below up."""
    cells: list[tuple[float, float, ModuleReport]]


class PictureAxes(Axes):
    """Axes that a notebook shows as their figure, with or without pyplot's inline backend."""

    def _repr_png_(self) -> bytes:
        picture = BytesIO()
        _write(cast("Figure", self.figure), picture, ".png")
        return picture.getvalue()


def plot_ranks(adapter: AdapterReport, path: str | os.PathLike[str] | None = None) -> Axes:
    """Draw the ranks kept as figure 3 of the AdaLoRA paper does, and return the ``Axes``.

    Colour and number of a cell are the ranks that the module keeps. Modules that are not ranked are hatched, by reason.
    ``path``: write the picture there too, as PNG or SVG by the file's ending; another ending is a ``ValueError``.
    """
    ending = _ending(path)
    if not adapter.modules:
        raise ValueError(f"There is nothing to draw: adapter {adapter.adapter!r} has no AdaLoRA modules.")
    grid = grid_of(adapter.modules)
    across, up = max(grid.columns.values()) + 1, max(grid.rows.values()) + 1
    width, height = min(CELL[0], LARGEST / across), min(CELL[1], LARGEST / up)
    figure = _figure()
    axes = _axes(figure, 0, 0, width * across, height * up)
    norm = Normalize(0, max(1, *(module.rank_started for module in adapter.modules)))
    digits = len(str(max(module.rank_kept for module in adapter.modules)))
    size = min(8.0, 72 * 0.6 * height, 72 * width / (0.65 * (digits + 1)))
    hatches = _hatches(adapter.modules)
    for x, y, module in grid.cells:
        _draw_cell(axes, x, y, module, COLOURS(norm(module.rank_kept)), hatches, size)
    _label_grid(axes, grid, width, height)
    _draw_scale(figure, norm, width * across, height * up)
    _draw_legend(axes, adapter.modules, hatches)
    axes.set_title(_title(adapter), loc="left", size=9)
    return _finish(figure, axes, path, ending)


def plot_history(adapter: AdapterReport, path: str | os.PathLike[str] | None = None) -> Axes:
    """Draw budget and total rank over the steps, skipped parameters beneath, and return the upper ``Axes``.

    ``path``: as in ``plot_ranks``. Without a history: a ``ValueError``.
    """
    ending = _ending(path)
    if not adapter.history:
        raise ValueError(
            f"There is no history of adapter {adapter.adapter!r} to draw: call peft_gradguard.keep_history() before "
            "training starts, and report(model) after it, in the same process."
        )
    # The last step lasts as long as the others.
    last = adapter.history[-1]
    steps, budget, total, skipped = zip(*adapter.history, last._replace(step=last.step + 1), strict=True)
    figure = _figure()
    upper = _axes(figure, 0, 1.55, 6, 2.4)
    lower = _axes(figure, 0, 0, 6, 1.2, sharex=upper)
    upper.step(steps, total, where="post", color="C0", label="all ranks that are left")
    upper.step(steps, budget, where="post", color="C1", label="budget of the ranked modules")
    upper.set_ylabel("ranks")
    upper.tick_params(labelbottom=False)
    upper.set_title(f"adapter {adapter.adapter!r}", loc="left", size=9)
    upper.legend(frameon=False, fontsize=8, loc="best")
    lower.step(steps, skipped, where="post", color="C0", linewidth=1)
    lower.set_ylabel("skipped\nparameters")
    lower.set_xlabel("step")
    for axes, highest in ((upper, max(total + budget)), (lower, max(skipped))):
        axes.set_ylim(0, 1.1 * max(1, highest))
        axes.yaxis.set_major_locator(MaxNLocator("auto", integer=True))
        axes.spines[["top", "right"]].set_visible(False)
    upper.set_xlim(steps[0], steps[-1])
    upper.xaxis.set_major_locator(MaxNLocator("auto", integer=True))
    figure.align_ylabels([upper, lower])
    return _finish(figure, upper, path, ending)


def grid_of(modules: Sequence[ModuleReport]) -> Grid:
    """Give each module its place: a column a layer, a row a kind, with a gap where the rows of another stack begin."""
    found = places(module.name for module in modules)
    layers: list[int | None] = [*sorted({p.layer for p in found.values() if p.layer is not None})]
    columns: dict[int | None, float] = {layer: float(index) for index, layer in enumerate(layers)}
    if any(p.layer is None for p in found.values()):
        columns[None] = len(layers) + (GAP if layers else 0.0)
    kinds = list(dict.fromkeys(p.kind for p in found.values()))
    rows: dict[str, float] = {}
    for stack in dict.fromkeys(map(_stack, kinds)):
        gap = GAP if rows else 0.0
        for kind in (kind for kind in kinds if _stack(kind) == stack):
            rows[kind] = max(rows.values(), default=-1.0) + 1 + gap
            gap = 0.0
    return Grid(columns, rows, [(columns[found[m.name].layer], rows[found[m.name].kind], m) for m in modules])


def row_labels(kinds: Iterable[str]) -> dict[str, str]:
    """Return a short label for each kind of matrix, with its stack in front where several have matrices named alike.

    ``encoder.block.*.layer.0.SelfAttention.q`` is ``encoder: q`` beside a decoder, else ``q``, or ``SelfAttention.q``
    where another attention has a ``q`` too.
    """
    stacks: dict[str, dict[str, str]] = {}
    for kind in kinds:
        stack = _stack(kind)
        stacks.setdefault(stack, {})[kind] = kind[len(stack) :].removeprefix(".*").removeprefix(".")
    names = _without_common_parts([stack for stack in stacks if stack])
    ends = [end for stack in names for end in {rest.rpartition(".")[2] for rest in stacks[stack].values() if rest}]
    alike = len(ends) > len(set(ends))
    labels = {}
    for stack, rests in stacks.items():
        # What stands in no layer must not be taken for what does.
        others = [] if stack else [rest for more in stacks.values() for rest in more.values()]
        short = short_labels([*rests.values(), *others])
        for kind, rest in rests.items():
            front = names.get(stack, "") if alike or not rest else ""
            labels[kind] = _shortened(": ".join(filter(None, [front, short[rest]])))
    return labels


def _stack(kind: str) -> str:
    """Return what stands before the layer's number, as ``encoder.block``; nothing for a kind without one."""
    return kind.partition(".*")[0] if ".*" in kind else ""


def _without_common_parts(names: list[str]) -> dict[str, str]:
    """Return each dotted name without the parts that all of them begin or end with."""
    parts = [name.split(".") for name in names]
    # From the front, and then, turned round, from the back.
    for _ in range(2):
        # At least one part of each name stays.
        together = zip(*(p[:-1] for p in parts), strict=False)
        common = len(list(takewhile(lambda column: len(set(column)) == 1, together)))
        parts = [p[common:][::-1] for p in parts]
    return {name: ".".join(p) for name, p in zip(names, parts, strict=True)}


def _shortened(label: str) -> str:
    half = LONGEST_LABEL // 2
    return label if len(label) <= LONGEST_LABEL else f"{label[: half - 1]}…{label[-half:]}"


def _hatches(modules: Iterable[ModuleReport]) -> dict[SkipReason | None, str]:
    """Return a hatch for each reason that keeps modules from being ranked, the known ones first."""
    reasons = {module.reason for module in modules if module.ranked is False}
    known = [reason for reason in HATCHES if reason in reasons]
    unknown = sorted(reasons.difference(known), key=str)
    return {
        reason: HATCHES.get(str(reason)) or OTHER_HATCHES[unknown.index(reason) % len(OTHER_HATCHES)]
        for reason in known + unknown
    }


def _draw_cell(
    axes: Axes,
    x: float,
    y: float,
    module: ModuleReport,
    colour: tuple[float, float, float, float],
    hatches: dict[SkipReason | None, str],
    size: float,
) -> None:
    ink = _ink(colour)
    # Not (ink, 0.6): matplotlib before 3.8 does not know a colour by such a pair.
    faint = to_rgba(ink, 0.6)
    hatch = hatches[module.reason] if module.ranked is False else None
    left, bottom, right, top = x - HALF, y - HALF, x + HALF, y + HALF
    axes.add_patch(
        Rectangle((left, bottom), 2 * HALF, 2 * HALF, facecolor=colour, edgecolor=faint, hatch=hatch, linewidth=0)
    )
    if module.ranked and module.reason:
        corner = [(right - 0.25, top), (right, top), (right, top - 0.33)]
        axes.add_patch(Polygon(corner, color=ink, linewidth=0))
    if size >= SMALLEST_NUMBER:
        # The hatch must not run through the number.
        box = {"facecolor": colour, "edgecolor": "none", "pad": 0.7} if hatch else None
        axes.text(x, y, str(module.rank_kept), color=ink, size=size, ha="center", va="center_baseline", bbox=box)


def _ink(colour: tuple[float, float, float, float]) -> str:
    """Return black or white, whichever stands out more from the colour (by its relative luminance, WCAG 2)."""
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in colour[:3]]
    return "black" if 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2] > 0.179 else "white"


def _label_grid(axes: Axes, grid: Grid, width: float, height: float) -> None:
    axes.set_xlim(-0.5, max(grid.columns.values()) + 0.5)
    axes.set_ylim(-0.5, max(grid.rows.values()) + 0.5)
    axes.spines[:].set_visible(False)
    axes.tick_params(length=0, labelsize=8)
    labels = {layer: "none" if layer is None else str(layer) for layer in grid.columns}
    if list(grid.columns) == [None]:
        labels = {None: ""}
    else:
        axes.set_xlabel("layer", size=8)
    _ticks(axes.set_xticks, grid.columns, labels, every=math.ceil(0.22 / width))
    _ticks(axes.set_yticks, grid.rows, row_labels(grid.rows), every=math.ceil(0.12 / height))


def _ticks(set_ticks: Callable[..., Any], places: Mapping[Any, float], labels: Mapping[Any, str], every: int) -> None:
    shown = list(places)[::every]
    set_ticks([places[key] for key in shown], [labels[key] for key in shown])


def _draw_scale(figure: Figure, norm: Normalize, width: float, height: float) -> None:
    """Put the colours' scale right of the cells, as high as they are within reason."""
    high = min(2.0, max(0.6, height))
    axes = _axes(figure, width + 0.15, height - high, 0.1, high)
    bar = figure.colorbar(ScalarMappable(norm, COLOURS), cax=axes, ticks=MaxNLocator(4, integer=True))
    bar.outline.set_visible(False)
    axes.tick_params(labelsize=8, length=2)


def _draw_legend(axes: Axes, modules: Iterable[ModuleReport], hatches: dict[SkipReason | None, str]) -> None:
    colour = axes.xaxis.label.get_color()
    entries: dict[str, Artist] = {
        f"not ranked: {reason}" if reason else "not ranked": Patch(facecolor="none", edgecolor=colour, hatch=hatch)
        for reason, hatch in hatches.items()
    }
    if any(module.ranked and module.reason for module in modules):
        entries["ranked, but skipped in some steps"] = Line2D([], [], color=colour, marker="^", linestyle="none")
    if entries:
        below = axes.transAxes + ScaledTranslation(0, -0.42, axes.figure.dpi_scale_trans)
        axes.legend(
            entries.values(), entries, loc="upper left", bbox_to_anchor=(0, 0), bbox_transform=below, frameon=False,
            fontsize=8, borderpad=0, borderaxespad=0, handleheight=1.3,
        )  # fmt: skip


def _title(adapter: AdapterReport) -> str:
    kept = sum(module.rank_kept for module in adapter.modules)
    started = sum(module.rank_started for module in adapter.modules)
    share = sharing(adapter) if adapter.budget is not None else ""
    return "\n".join(
        filter(
            None,
            [
                f"adapter {adapter.adapter!r}: {kept} of {started} ranks kept",
                moment(adapter),
                share and f"{share} {adapter.budget}",
                share and others(adapter),
            ],
        )
    )


def _figure() -> Figure:
    """Return a figure of one inch square, so that places in it are inches; ``_finish`` gives it its size."""
    return Figure((1, 1), dpi=DPI)


def _axes(figure: Figure, left: float, bottom: float, width: float, height: float, **more: Any) -> Axes:
    """Add axes at this place, in inches."""
    return figure.add_axes((left, bottom, width, height), axes_class=PictureAxes, **more)


def _finish(figure: Figure, axes: Axes, path: str | os.PathLike[str] | None, ending: str) -> Axes:
    """Fit the figure around what is drawn, so that long names have the room they need, and write it."""
    renderer = FigureCanvasAgg(figure).get_renderer()  # type: ignore[no-untyped-call]
    drawn = figure.get_tightbbox(renderer).padded(MARGIN)
    for each in figure.axes:
        box = each.get_position()
        each.set_position(
            (
                (box.x0 - drawn.x0) / drawn.width,
                (box.y0 - drawn.y0) / drawn.height,
                box.width / drawn.width,
                box.height / drawn.height,
            )
        )
    figure.set_size_inches(drawn.width, drawn.height)
    if path is not None:
        _write(figure, path, ending)
    return axes


def _write(figure: Figure, target: Any, ending: str) -> None:
    # What is drawn alike shall be written alike, byte for byte; matplotlib would add its version, the date and, to the
    # names inside of an SVG file, random numbers.
    metadata = {"Software": None} if ending == ".png" else {"Date": None, "Creator": None}
    with rc_context({"svg.hashsalt": "peft_gradguard"}):
        figure.savefig(target, format=ending[1:], metadata=metadata)


def _ending(path: str | os.PathLike[str] | None) -> str:
    if path is None:
        return ""
    ending = os.path.splitext(os.fspath(path))[1].lower()
    if ending not in ENDINGS:
        raise ValueError(f"{os.fspath(path)!r} ends with {ending!r}: a picture is written as .png or .svg.")
    return ending
