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
    """The number in the name that counts layers, or None where there is none."""


def places(modules: Iterable[str]) -> dict[str, Place]:
    """Read kind and layer off the names of a model's modules.

    The layer is the first number by which modules differ that are named alike up to and after it. In
    ``0.auto_model.layer.7.q`` that is 7, for the 0 is all of the model. Where there is none, it is the first number.
    """
    split = {module: module.split(".") for module in modules}
    numbers: dict[tuple[tuple[str, ...], tuple[str, ...]], set[str]] = {}
    for parts in split.values():
        for index in _numeric(parts):
            numbers.setdefault((tuple(parts[:index]), tuple(parts[index + 1 :])), set()).add(parts[index])
    counted = {front for (front, _), found in numbers.items() if len(found) > 1}
    return {module: _place(parts, counted) for module, parts in split.items()}


def _place(parts: list[str], counted: set[tuple[str, ...]]) -> Place:
    numeric = _numeric(parts)
    if not numeric:
        return Place(".".join(parts), None)
    index = next((index for index in numeric if tuple(parts[:index]) in counted), numeric[0])
    return Place(".".join([*parts[:index], "*", *parts[index + 1 :]]), int(parts[index]))


def _numeric(parts: list[str]) -> list[int]:
    return [index for index, part in enumerate(parts) if part.isdecimal()]


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
