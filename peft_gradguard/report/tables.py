"""How a report reads: in a terminal, narrow or wide, and as HTML in a notebook or a page."""

from __future__ import annotations

import shutil
import textwrap
from html import escape
from typing import TYPE_CHECKING

from .sections import moment, sections, summary

if TYPE_CHECKING:
    from collections.abc import Sequence

    from .facts import AdapterReport
    from .sections import Section

WIDEST, NARROWEST = 160, 32
USUAL = 80
"""Columns, where there is no terminal to ask."""
PROSE = 100
"""Columns that sentences take at most: longer lines are hard to read."""
GAP = 2

LINE = "1px solid rgba(128, 128, 128, 0.4)"
"""A grey that shows on white and on black. No other colour is set: all else is the notebook's or the page's."""
STYLES = {
    "div": "font-family: system-ui, sans-serif; font-size: 0.9rem; line-height: 1.5",
    "h4": "margin: 1.2em 0 0.5em; font-size: 1.15em",
    "p": "margin: 0.5em 0",
    "ul": "margin: 0.5em 0; padding-left: 1.5em",
    "table": "border-collapse: collapse; margin: 1em 0; font-size: inherit",
    "caption": "caption-side: top; padding: 0.2em 0; text-align: left; white-space: nowrap; font-weight: 600; "
    "color: inherit",
    "th": f"padding: 0.2em 1.2em 0.2em 0; text-align: left; white-space: nowrap; border-bottom: {LINE}",
    "td": f"padding: 0.2em 1.2em 0.2em 0; text-align: left; border-bottom: {LINE}",
}
"""Inline, as a notebook's or a page's own style must not be touched."""


def text(adapters: Sequence[AdapterReport]) -> str:
    """Return the report as plain text, as wide as the terminal (or ``COLUMNS``), 80 columns where there is none.

    At most 160: wider tables would be hard to follow, and more layers go beneath.
    """
    width = max(min(shutil.get_terminal_size((USUAL, 24)).columns, WIDEST), NARROWEST)
    blocks = [block for adapter in adapters for block in _adapter_text(adapter, width)]
    return "\n\n".join(blocks) if blocks else "AdaLoRA: no adapter"


def html(adapters: Sequence[AdapterReport]) -> str:
    """Return the report as a fragment of HTML, with styles of its own that fit light and dark pages."""
    lines = [line for adapter in adapters for line in _adapter_html(adapter)] or [_tag("p", "AdaLoRA: no adapter")]
    return "\n".join([f'<div style="{STYLES["div"]}">', *lines, "</div>"])


def shortened(label: str, width: int, front: float = 1 / 3) -> str:
    """Cut the middle out of a label that is too long; ``front``: the share of what stays that is its beginning."""
    if len(label) <= width:
        return label
    begin = int((width - 3) * front)
    return f"{label[:begin]}...{label[len(label) - (width - 3 - begin) :]}"


def told_apart(labels: Sequence[str], width: int) -> dict[str, str]:
    """Shorten labels so that different ones stay different, if need be by numbers at their ends."""
    different = list(dict.fromkeys(labels))
    for front in (1 / 3, 1 / 2, 2 / 3, 5 / 6):
        short = [shortened(label, width, front) for label in different]
        if len(set(short)) == len(short):
            return dict(zip(different, short, strict=True))
    number: dict[str, int] = {}
    found = {}
    for label in different:
        short_label = shortened(label, width - 3)
        number[short_label] = number.get(short_label, 0) + 1
        found[label] = f"{short_label}~{number[short_label]}" if len(label) > width - 3 else label
    return found


def _title(adapter: AdapterReport) -> str:
    return ", ".join(filter(None, [f"AdaLoRA adapter {adapter.adapter!r}", moment(adapter)]))


def _adapter_text(adapter: AdapterReport, width: int) -> list[str]:
    title = shortened(_title(adapter), width)
    facts = [_wrapped(line, width, "  ") for line in summary(adapter)]
    blocks = ["\n".join([title, "=" * len(title), *facts])]
    if adapter.advice:
        blocks.append("\n".join(["Advice", *(_wrapped(line, width, "  ", "- ") for line in adapter.advice)]))
    blocks += [_section_text(section, width) for section in sections(adapter)]
    return blocks


def _wrapped(line: str, width: int, indent: str, bullet: str = "") -> str:
    width = min(width, PROSE)
    # Names can be longer than any line.
    room = width - len(indent) - 2
    words = " ".join(shortened(word, room) for word in line.split())
    return textwrap.fill(
        words, width, initial_indent=indent + bullet, subsequent_indent=indent + "  ", break_on_hyphens=False
    )


def _section_text(section: Section, width: int) -> str:
    lines = [_wrapped(section.title, width, "")]
    by_layer = section.head[0] == "layer"
    lines += _matrix(section, width) if by_layer else _columns(section, width)
    return "\n".join([*lines, *([f"  {section.note}"] if section.note else [])])


def _columns(section: Section, width: int) -> list[str]:
    """Lay out the columns; where the first one would get too narrow, it gets a line of its own."""
    table = [section.head, *section.rows]
    widths = [max(len(row[column]) for row in table) for column in range(len(section.head))]
    rest = sum(widths[1:]) + GAP * len(widths)
    if width - rest >= min(widths[0], 16):
        widths[0] = min(widths[0], width - rest)
        labels = told_apart([row[0] for row in table], widths[0])
        return ["  " + _line((labels[row[0]], *row[1:]), widths) for row in table]
    labels = told_apart([row[0] for row in table], width - 2)
    lines = []
    for row in table:
        lines.append("  " + labels[row[0]])
        lines.append(_wrapped("; ".join(cell or "-" for cell in row[1:]), width, "    "))
    return lines


def _line(cells: Sequence[str], widths: Sequence[int]) -> str:
    return (" " * GAP).join(cell.ljust(width) for cell, width in zip(cells, widths, strict=True)).rstrip()


def _matrix(section: Section, width: int) -> list[str]:
    """Lay out numbers under numbers; layers that do not fit go beneath."""
    table = [section.head, *section.rows]
    label = min(max(len(row[0]) for row in table), max(width // 4, 12))
    cell = max(len(value) for row in table for value in row[1:]) + 1
    fit = max((width - 2 - label) // cell, 1)
    labels = told_apart([row[0] for row in table], label)
    lines = []
    for start in range(1, len(section.head), fit):
        if start > 1:
            lines.append("")
        for row in table:
            values = "".join(value.rjust(cell) for value in row[start : start + fit])
            lines.append(f"  {labels[row[0]].ljust(label)}{values}".rstrip())
    return lines


def _adapter_html(adapter: AdapterReport) -> list[str]:
    lines = [_tag("h4", escape(_title(adapter))), _tag("p", "<br>".join(map(escape, summary(adapter))))]
    if adapter.advice:
        lines.append(_tag("ul", "".join(f"<li>{escape(line)}</li>" for line in adapter.advice)))
    for section in sections(adapter):
        # A table that is wider than the page scrolls by itself.
        lines.append('<div style="overflow-x: auto">')
        lines.append(f'<table style="{STYLES["table"]}">{_tag("caption", escape(section.title))}')
        lines.append(_row_html("th", section.head))
        lines += [_row_html("td", row) for row in section.rows]
        lines.append("</table>")
        lines.append("</div>")
        if section.note:
            lines.append(_tag("p", escape(section.note)))
    return lines


def _row_html(tag: str, cells: Sequence[str]) -> str:
    return f"<tr>{''.join(_tag(tag, escape(cell)) for cell in cells)}</tr>"


def _tag(tag: str, inside: str) -> str:
    return f'<{tag} style="{STYLES[tag]}">{inside}</{tag}>'
