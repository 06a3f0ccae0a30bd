"""What a report says: plain data classes, of a model (``audit.py``) or of a saved adapter (``saved.py``).

Holds no tensor and no model. How a report reads is in ``tables.py``, how it looks in ``plots.py``.
"""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    import os
    from collections.abc import Iterable

    from matplotlib.axes import Axes

    from .parameters import Factor, SkipReason


@dataclass(frozen=True)
class ParameterReport:
    """One factor of one triplet."""

    name: str
    """Its full name in the model (in the saved file, for a saved adapter)."""
    factor: Factor
    shape: tuple[int, ...]
    """A is (r, in_features), B (out_features, r), E (r, 1); empty where only a flat piece is at hand (FSDP)."""
    trainable: bool
    inside_modules_to_save: bool
    steps_scored: int = 0
    steps_skipped: dict[SkipReason, int] = dataclasses.field(default_factory=dict)
    """How many steps it was left out of, by reason; reasons that never occurred are absent."""
    first_step: int | None = None
    """The first step at which it was scored, or None."""
    last_step: int | None = None
    """The last step at which it was scored, or None."""
    excluded: bool = False
    """Whether the user has excluded it (``peft_gradguard.exclude``)."""


@dataclass(frozen=True)
class ModuleReport:
    """One triplet: the module that it adapts, and what became of its ranks."""

    name: str
    """The module's full name, without the factor and the adapter."""
    rank_started: int
    """How many ranks the module was given (``init_r``, or its entry in a pattern loaded with it)."""
    rank_kept: int
    """How many of them are not pruned."""
    ranked: bool
    """Whether it takes part in the budget."""
    reason: SkipReason | None
    """Why it is not ranked, or why parts of it are skipped most often; None where nothing was ever skipped."""
    importance: float | None
    """The sum of the smoothed importance of its triplets (AdaLoRA paper, section 3.2), or None where not scored.

    After the finalising step, at which PEFT forgets the scores, what it was then.
    """
    parameters: tuple[ParameterReport, ...]

    @property
    def rows(self) -> int:
        """How many rows its E has: fewer than ``rank_started`` where PEFT has cut them to a loaded pattern."""
        return next((p.shape[0] for p in self.parameters if p.factor == "E" and p.shape), self.rank_started)


def trained(modules: Iterable[ModuleReport]) -> bool:
    """Say whether scores or pruned ranks tell of a training, whether or not the guard was on to count its steps."""
    return any(m.importance is not None or (m.ranked and m.rank_kept < m.rows) for m in modules)


class HistoryPoint(NamedTuple):
    """What one allocator step left. Four numbers, so that a history costs next to nothing."""

    step: int
    budget: int
    """How many ranks PEFT allows to the ranked triplets at this step."""
    total_rank: int
    """How many ranks all triplets together still have, ranked or not."""
    skipped: int
    """How many AdaLoRA parameters were left out of scoring."""


@dataclass(frozen=True)
class AdapterReport:
    """One adapter."""

    adapter: str
    step: int | None
    """The last ``global_step`` that its allocator was called with; None before training, or where unknown.

    PEFT does not tell it the steps after the finalising one (``total_step - tfinal``).
    """
    init_budget: int | None
    """Ranks of the ranked triplets at the start (``RankAllocator.init_bgt``)."""
    budget: int | None
    """Ranks that the ranked triplets may keep now (``RankAllocator.budget_schedule``), or None where not known."""
    target_budget: int | None
    """Ranks that they keep in the end (``RankAllocator.target_bgt``)."""
    unranked_ranks: int
    """Ranks that are not under the budget, because their triplets are not ranked."""
    modules: tuple[ModuleReport, ...]
    """In the model's order."""
    advice: tuple[str, ...] = ()
    """Where the structure will hurt, and what to change; one sentence or two each."""
    history: tuple[HistoryPoint, ...] = ()
    """One point an allocator step up to the finalising one, where asked for (``peft_gradguard.keep_history``)."""
    saved: bool = False
    """Whether it was read from a saved adapter, which tells ranks and shapes, and not what was trained or when."""


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
        """Return the report as a table of at most 80 columns."""
        from .tables import text

        return text(self)

    def _repr_html_(self) -> str:
        from .tables import html

        return html(self)

    def plot(self, path: str | os.PathLike[str] | None = None, *, adapter: str | None = None) -> Axes:
        """Draw the ranks kept, layers across and kinds of matrix up, and return the ``Axes``.

        Needs the extra ``plot`` (matplotlib). ``path``: write it there too, as PNG or SVG by the file's ending.
        ``adapter`` may be left out where there is only one. This is figure 3 of the AdaLoRA paper.
        """
        from .plots import plot_ranks

        return plot_ranks(self._only(adapter), path)

    def plot_history(self, path: str | os.PathLike[str] | None = None, *, adapter: str | None = None) -> Axes:
        """Draw budget and total rank over the steps, skipped parameters beneath, and return the upper ``Axes``.

        A ``ValueError`` says how to ask for a history where there is none.
        """
        from .plots import plot_history

        return plot_history(self._only(adapter), path)

    def _only(self, adapter: str | None) -> AdapterReport:
        names = [known.adapter for known in self.adapters]
        if adapter is None and len(names) == 1:
            return self.adapters[0]
        if adapter not in names:
            raise ValueError(f"adapter={adapter!r}: give one of the report's adapters, {', '.join(map(repr, names))}.")
        return self.adapters[names.index(adapter)]
