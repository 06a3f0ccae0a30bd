"""How often each parameter was scored or left out, and, on request, what each step left. Holds names and numbers."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from ..model.parameters import SkipReason

_keep_history = False


def keep_history(on: bool = True) -> None:
    """From now on, keep for each allocator step what ``report(model).plot_history()`` draws: four numbers a step.

    For all trainings in this process; off unless asked for. ``keep_history(False)`` stops it; what was kept stays with
    the allocator.
    """
    global _keep_history
    _keep_history = on


def history_is_kept() -> bool:
    """Say whether ``keep_history`` asks for what each step has left."""
    return _keep_history


class HistoryPoint(NamedTuple):
    """What one allocator step left. Four numbers, so that a history costs next to nothing."""

    step: int
    budget: int
    """How many ranks PEFT allows to the ranked triplets at this step."""
    total_rank: int
    """How many ranks all triplets together still have, ranked or not."""
    skipped: int
    """How many AdaLoRA parameters were left out of scoring."""


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
