"""What ``peft_gradguard.report`` returns: which parameters train and are scored, which are left out and why, the ranks.

What a report promises:

- It is plain data, a picture of one moment: no tensor and no model in it, and nothing in it changes later.
- Asking for it changes nothing and needs no other process.
- What it cannot know is None, and is said in words: steps are counted only while the guard is on, and a saved adapter
  does not tell what was trained.
- It reads as text in terminals from 32 to 160 columns, as HTML in light and dark pages, as JSON for programs, and as
  pictures where matplotlib is installed.
"""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from .tables import html, text

if TYPE_CHECKING:
    import os

    from matplotlib.axes import Axes

    from .facts import AdapterReport


@dataclass(frozen=True)
class Report:
    """What trains, what is skipped, where the ranks went. ``print`` it, or see ``to_dict``, ``to_json``, ``plot``."""

    adapters: tuple[AdapterReport, ...]

    def to_dict(self) -> dict[str, Any]:
        """Return the report as dictionaries, lists, strings and numbers."""
        return json.loads(self.to_json())  # type: ignore[no-any-return]

    def to_json(self, indent: int | None = None) -> str:
        """Return the report as a JSON object."""
        adapters = [
            {**dataclasses.asdict(adapter), "history": [point._asdict() for point in adapter.history]}
            for adapter in self.adapters
        ]
        return json.dumps({"adapters": adapters}, indent=indent)

    def __str__(self) -> str:
        """Return the report as tables, as wide as the terminal (at most 160 columns; 80 where there is none)."""
        return text(self.adapters)

    def _repr_html_(self) -> str:
        return html(self.adapters)

    def plot(self, path: str | os.PathLike[str] | None = None, *, adapter: str | None = None) -> Axes:
        """Draw the ranks kept, layers across and kinds of matrix up, and return the ``Axes``.

        What is in no layer, such as the experts of a model without layers, stands in a column of its own.

        Needs the extra ``plot`` (matplotlib). ``path``: write it there too, as PNG or SVG by the file's ending.
        ``adapter`` may be left out where there is only one. This is figure 3 of the AdaLoRA paper.
        """
        # matplotlib may be missing.
        from .plots import plot_ranks

        return plot_ranks(self._only(adapter), path)

    def plot_history(self, path: str | os.PathLike[str] | None = None, *, adapter: str | None = None) -> Axes:
        """Draw budget and total rank over the steps, skipped parameters beneath, and return the upper ``Axes``.

        A ``ValueError`` says how to ask for a history where there is none.
        """
        # matplotlib may be missing.
        from .plots import plot_history

        return plot_history(self._only(adapter), path)

    def _only(self, adapter: str | None) -> AdapterReport:
        names = [known.adapter for known in self.adapters]
        if adapter is None and len(names) == 1:
            return self.adapters[0]
        if adapter not in names:
            raise ValueError(f"adapter={adapter!r}: give one of the report's adapters, {', '.join(map(repr, names))}.")
        return self.adapters[names.index(adapter)]
