"""What a module's name tells: its layer, and the kind of matrix. For tables and pictures alike.

Models number many things: layers, experts, branches, the parts of an ``nn.Sequential``. Only the first are layers.
"""

from __future__ import annotations

import re
from collections import Counter
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from collections.abc import Iterable

LISTS_OF_LAYERS = re.compile(r"(?!.*expert).*(?:layer|block|blk)s?|h", re.IGNORECASE)
"""What models call their lists of layers. ``h`` is GPT-2's; nearly all of transformers' are covered."""


class Place(NamedTuple):
    """Where a module stands: ``encoder.layer.3.output.dense`` is layer 3 of kind ``encoder.layer.*.output.dense``."""

    kind: str
    """The name with the layer's number replaced by ``*``; the whole name where there is no layer."""
    layer: int | None
    """The number in the name that counts layers, or None where there is none."""


def places(modules: Iterable[str]) -> dict[str, Place]:
    """Read kind and layer off the names of a model's modules.

    A number counts layers where it follows the name of a list of layers, and something follows the number: in
    ``layers.0.experts.3.w`` that is the 0, in ``branch.2`` and ``layers.2`` (a matrix in a list of them) there is none.
    Of several such numbers it is the first by which modules differ that are named alike up to and after it. In
    ``block.0.model.layers.7.q`` that is 7, if the 0 is all of the model. Where there is none, it is the first one.
    """
    split = {module: module.split(".") for module in modules}
    numbers: dict[tuple[tuple[str, ...], tuple[str, ...]], set[str]] = {}
    for parts in split.values():
        for index in _layer_numbers(parts):
            numbers.setdefault((tuple(parts[:index]), tuple(parts[index + 1 :])), set()).add(parts[index])
    counted = {front for (front, _), found in numbers.items() if len(found) > 1}
    return {module: _place(parts, counted) for module, parts in split.items()}


def _place(parts: list[str], counted: set[tuple[str, ...]]) -> Place:
    numbers = _layer_numbers(parts)
    if not numbers:
        return Place(".".join(parts), None)
    index = next((index for index in numbers if tuple(parts[:index]) in counted), numbers[0])
    return Place(".".join([*parts[:index], "*", *parts[index + 1 :]]), int(parts[index]))


def _layer_numbers(parts: list[str]) -> list[int]:
    return [
        index
        for index in range(1, len(parts) - 1)
        if parts[index].isdecimal() and LISTS_OF_LAYERS.fullmatch(parts[index - 1])
    ]


def short_labels(names: Iterable[str]) -> dict[str, str]:
    """Return for each dotted name the shortest end that no other one shares, with a word at its front."""
    split = {name: name.split(".") for name in names}
    ends = Counter(tuple(parts[-count:]) for parts in split.values() for count in range(1, len(parts) + 1))
    labels = {}
    for name, parts in split.items():
        for count in range(1, len(parts) + 1):
            end = parts[-count:]
            if ends[tuple(end)] == 1 and end[0] != "*" and not end[0].isdecimal():
                break
        labels[name] = ".".join(end)
    return labels
