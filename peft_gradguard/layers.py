"""What a module's name tells: its layer, and the kind of matrix. For tables and pictures."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from collections.abc import Iterable


class Place(NamedTuple):
    """Where a module stands: ``encoder.layer.3.output.dense`` is layer 3 of kind ``encoder.layer.*.output.dense``."""

    kind: str
    """The name with the layer's number replaced by ``*``."""
    layer: int | None
    """The first number in the name, or None where there is none."""


def place(module: str) -> Place:
    """Read kind and layer off a module's name."""
    parts = module.split(".")
    for index, part in enumerate(parts):
        if part.isdecimal():
            return Place(".".join([*parts[:index], "*", *parts[index + 1 :]]), int(part))
    return Place(module, None)


def short_labels(names: Iterable[str]) -> dict[str, str]:
    """Return for each dotted name the shortest end that no other one shares, with a word at its front."""
    names = list(dict.fromkeys(names))
    labels = {}
    for name in names:
        parts = name.split(".")
        for count in range(1, len(parts) + 1):
            end = parts[-count:]
            shared = sum(other.split(".")[-count:] == end for other in names)
            if shared == 1 and end[0] != "*" and not end[0].isdecimal():
                break
        labels[name] = ".".join(end)
    return labels
