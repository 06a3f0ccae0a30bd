"""Many names in few lines, as a shell writes them: ``layers.{0..15}.{q,v}_proj`` stands for 32 names."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterable

    Alternatives = tuple[str, ...]
    """What may stand at one place of a name."""

# Brace expansion leaves numbers with leading zeros at their width, and numbers beyond 64 bits alone.
NUMBER = re.compile(r"0|[1-9][0-9]{0,14}")
SPECIAL = re.compile(r"[^\w.:/@%+-]")
"""What a shell may take for more than itself; among it braces, commas and backslashes."""


def fold(names: Iterable[str]) -> list[str]:
    """Return brace expressions that a shell expands to exactly these names, each once.

    Names are taken apart at their dots. Those that differ at one place only become one, for each place in turn, the
    last one first. So every expression stands for all combinations of what is in its braces.
    """
    folded: dict[tuple[Alternatives, ...], None] = {
        tuple((part,) for part in name.split(".")): None for name in dict.fromkeys(names)
    }
    for place in reversed(range(max(map(len, folded), default=0))):
        alike: dict[tuple[tuple[Alternatives, ...], tuple[Alternatives, ...] | None], list[str]] = {}
        for parts in folded:
            # One that is too short for this place stays as it is.
            key = (parts[:place], parts[place + 1 :] if place < len(parts) else None)
            alike.setdefault(key, []).extend(parts[place] if place < len(parts) else ())
        folded = {
            (*front, tuple(sorted(found, key=_natural)), *back) if back is not None else front: None
            for (front, back), found in alike.items()
        }
    return [".".join(map(_braced, parts)) for parts in folded]


def _natural(text: str) -> tuple[int, int, str]:
    return (0, int(text), text) if NUMBER.fullmatch(text) else (1, 0, text)


def _braced(alternatives: Alternatives) -> str:
    """Return one place of an expression, such as ``lora_{A,B,E}``, ``{0..15}`` or ``expert_{{0..3},7}``."""
    if len(alternatives) == 1:
        return _escaped(alternatives[0])
    shared = _shared_front(alternatives)
    items = _runs(text[len(shared) :] for text in alternatives)
    inside = ",".join(items)
    return _escaped(shared) + (inside if len(items) == 1 else f"{{{inside}}}")


def _shared_front(alternatives: Alternatives) -> str:
    """Return what all begin with: whole words (up to a ``_``), or all that stands before a number."""
    first, last = min(alternatives), max(alternatives)
    shared = first[: next((i for i, pair in enumerate(zip(first, last, strict=False)) if len({*pair}) > 1), len(first))]
    stem = re.sub(r"[0-9]+$", "", shared)
    if all(NUMBER.fullmatch(text[len(stem) :]) for text in alternatives):
        return stem
    return shared[: shared.rfind("_") + 1]


def _runs(alternatives: Iterable[str]) -> list[str]:
    """Return the alternatives with three and more numbers in a row as one."""
    items: list[str] = []
    run: list[int] = []
    for text in [*sorted(alternatives, key=_natural), None]:
        number = int(text) if text is not None and NUMBER.fullmatch(text) else None
        if run and (number is None or number != run[-1] + 1):
            items += [f"{{{run[0]}..{run[-1]}}}"] if len(run) > 2 else map(str, run)
            run = []
        if number is not None:
            run.append(number)
        elif text is not None:
            items.append(_escaped(text))
    return items


def _escaped(text: str) -> str:
    return SPECIAL.sub(lambda found: _quoted(found[0]), text)


def _quoted(character: str) -> str:
    # A backslash before the end of a line would make the shell forget both.
    return f"\\{character}" if character.isprintable() else f"$'\\U{ord(character):08x}'"
