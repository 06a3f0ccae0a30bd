"""What a report says: plain data classes, of a model (``audit.py``) or of a saved adapter (``saved.py``).

They hold no tensor and no model. None stands for what is not known: a file does not tell what was trained or when.
How a report reads is in ``sections.py`` and ``tables.py``, how it looks in ``plots.py``.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterable

    from ..memory.counts import HistoryPoint
    from ..model.parameters import Factor, SkipReason


@dataclass(frozen=True)
class ParameterReport:
    """One factor of one triplet."""

    name: str
    """Its full name in the model (in the saved file, for a saved adapter)."""
    factor: Factor
    shape: tuple[int, ...]
    """A is (r, in_features), B (out_features, r), E (r, 1); empty where only a flat piece is at hand (FSDP)."""
    trainable: bool | None
    """Whether its ``requires_grad`` is True; None for a saved adapter."""
    inside_modules_to_save: bool
    steps_scored: int | None = 0
    """How many steps it was scored in while the guard was on; None for a saved adapter."""
    steps_skipped: dict[SkipReason, int] | None = dataclasses.field(default_factory=dict)
    """How many steps it was left out of, by reason; reasons that never occurred are absent. None: as above."""
    first_step: int | None = None
    """The first step at which it was scored, or None."""
    last_step: int | None = None
    """The last step at which it was scored, or None."""
    excluded: bool | None = False
    """Whether the user has excluded it (``peft_gradguard.exclude``); None for a saved adapter."""


@dataclass(frozen=True)
class ModuleReport:
    """One triplet: the module that it adapts, and what became of its ranks."""

    name: str
    """The module's full name, without the factor and the adapter."""
    rank_started: int
    """How many ranks the module was given (``init_r``, or its entry in a pattern loaded with it)."""
    rank_kept: int
    """How many of them are not pruned."""
    ranked: bool | None
    """Whether it takes part in the budget; None for an adapter that was saved before its first pruning."""
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
    unranked_ranks: int | None
    """Ranks that are not under the budget, because their triplets are not ranked; None where that is not known."""
    modules: tuple[ModuleReport, ...]
    """In the model's order."""
    advice: tuple[str, ...] = ()
    """Where the structure will hurt, and what to change; one sentence or two each."""
    history: tuple[HistoryPoint, ...] = ()
    """One point an allocator step up to the finalising one, where asked for (``peft_gradguard.keep_history``)."""
    saved: bool = False
    """Whether it was read from a saved adapter, which tells ranks and shapes, and not what was trained or when."""
    final_step: int | None = None
    """The step at which AdaLoRA settles the ranks for good (``total_step - tfinal``), or None where not known."""
    final: bool | None = None
    """Whether that has happened, so that the ranks change no more; None before training, or where not known."""
