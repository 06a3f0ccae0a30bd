"""How often each parameter was scored or left out, and, on request, what each step left. Holds names and numbers."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import TYPE_CHECKING

from .reports import HistoryPoint

if TYPE_CHECKING:
    from peft.tuners.adalora import RankAllocator

    from .parameters import SkipReason
    from .ranking import RankPattern
    from .view import ModelView

_keep_history = False


def keep_history(on: bool = True) -> None:
    """From now on, keep for each allocator step what ``report(model).plot_history()`` draws: four numbers a step.

    For all trainings in this process; off unless asked for. ``keep_history(False)`` stops it; what was kept stays with
    the allocator.
    """
    global _keep_history
    _keep_history = on


@dataclass
class Count:
    """How often one parameter was scored, and left out for each reason."""

    scored: int = 0
    skipped: dict[SkipReason, int] = dataclasses.field(default_factory=dict)
    first: int | None = None
    """The first step at which it was scored, where the steps are known."""
    last: int | None = None
    """The last one."""


class Counts:
    """The counts of one allocator.

    A healthy training finds the same reasons at every step, so that a step only makes a run of them longer. What a run
    means for each parameter is worked out where it ends, or where somebody asks.
    """

    def __init__(self) -> None:
        self.step: int | None = None
        """The step of the last ``update_and_allocate`` that went well."""
        self.skipped = 0
        """How many parameters the last scoring left out."""
        self.importance: dict[str, float] = {}
        """Per module, its importance at the finalising step, after which PEFT forgets all scores."""
        self.history: list[HistoryPoint] = []
        self._counts: dict[str, Count] = {}
        self._reasons: dict[str, SkipReason | None] = {}
        self._run = 0
        self._first: int | None = None
        self._last: int | None = None

    def add(self, step: int | None, reasons: dict[str, SkipReason | None]) -> None:
        """Count one scoring: per parameter, why it was left out, or None. A second one in the same step counts once."""
        if reasons != self._reasons:
            self._end_run()
            self._reasons = dict(reasons)
            self.skipped = sum(reason is not None for reason in reasons.values())
        elif step is not None and step == self._last:
            return
        if not self._run:
            self._first = step
        self._run += 1
        self._last = step

    def of_each(self) -> dict[str, Count]:
        """Return the counts so far, by parameter."""
        self._end_run()
        return self._counts

    def _end_run(self) -> None:
        if self._run:
            for name, reason in self._reasons.items():
                count = self._counts.setdefault(name, Count())
                if reason is None:
                    count.scored += self._run
                    count.first = self._first if count.first is None else count.first
                    count.last = self._last
                else:
                    count.skipped[reason] = count.skipped.get(reason, 0) + self._run
            self._run = 0


def note_step(
    allocator: RankAllocator, view: ModelView, step: int, finalising: bool, budget: int, pattern: RankPattern | None
) -> None:
    """Remember what an ``update_and_allocate`` has left, before PEFT forgets the scores."""
    from .skips import memory_of

    counts = memory_of(allocator).counts
    counts.step = step
    if finalising and allocator.exp_avg_ipt:
        from .importance import importance

        counts.importance = importance(allocator, view.adalora_parameters)
    if _keep_history:
        counts.history.append(HistoryPoint(step, budget, _total_rank(allocator, view, pattern), counts.skipped))


def _total_rank(allocator: RankAllocator, view: ModelView, pattern: RankPattern | None) -> int:
    """Count ranks by the last pattern; what it does not name has its full rank."""
    from .ranking import pattern_by_full_name

    parameters, adapter = view.adalora_parameters, allocator.adapter_name
    known = dict(pattern_by_full_name(parameters, pattern or allocator.peft_config.rank_pattern or {}, adapter))
    return sum(
        sum(known[parameter.name]) if parameter.name in known else parameter.parameter.size(0)
        for parameter in parameters
        if parameter.factor == "E"
    )
