"""How often each parameter was scored or left out, and, on request, what each step left. Holds names and numbers."""

from __future__ import annotations

import contextlib
import dataclasses
import math
import weakref
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

from ..model.parameters import NO_GRADIENT

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    import torch

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

    Steps are counted, not calls: loops that call once per micro-batch score twice in a step, and ``tinit`` is a number
    of steps. Calls whose step is not known count each.
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
        self._behind: dict[str, float] = {}
        """Per parameter that has scores, how many scorings they are made of; ``inf`` where nobody knows."""
        self._reasons: dict[str, SkipReason | None] = {}
        self._run = 0
        self._first: int | None = None
        self._last: int | None = None
        self._in_step: list[dict[str, SkipReason | None]] = []
        """The reasons of the scorings that were counted in the last step."""
        self._in_first: list[dict[str, SkipReason | None]] = []
        """Those that were counted in the first step of the run, before it."""
        self._entries = 0
        """How many parameters had scores after the last scoring."""
        self._witness: tuple[str, weakref.ref[torch.Tensor]] | None = None
        """The scores of one parameter, as the last scoring left them."""
        self._warm_from: int | None = None
        """The ``tinit`` by which nothing is warming up, and will not be as long as the run goes on."""

    def begin(self, reasons: dict[str, SkipReason | None], scores: Mapping[str, torch.Tensor]) -> None:
        """Before a scoring, take note of why each parameter is left out, or None, and of the scores that are there.

        Where they are not as the last scoring has left them, somebody else has filled them (they were restored, or the
        guard was off), or reset them: then the counts are as unknown as the scores.
        """
        disturbed = len(scores) != self._entries
        if self._witness is not None and not disturbed:
            name, score = self._witness
            disturbed = scores.get(name) is not score()
        if disturbed or reasons != self._reasons:
            self._end_run()
            self._reasons = dict(reasons)
            self.skipped = sum(reason is not None for reason in reasons.values())
            self._warm_from = None
        if disturbed:
            self._behind = dict.fromkeys(scores, math.inf)
            self.look(scores)

    def look(self, scores: Mapping[str, torch.Tensor]) -> None:
        """Take note of the scores that a scoring has left, be it a failed one."""
        self._entries = len(scores)
        name = next((name for name, reason in self._reasons.items() if reason is None and name in scores), None)
        if name is not None:
            # PEFT puts a new tensor in the place of one that it updates. Other code may keep its scores in other forms.
            with contextlib.suppress(TypeError):
                self._witness = name, weakref.ref(scores[name])
        elif not scores:
            self._witness = None

    def add(self, step: int | None) -> None:
        """Count the scoring that has begun."""
        if step is None or step != self._last:
            self._in_step = []
        elif self._reasons in self._in_step:
            return
        if not self._run:
            self._first, self._in_first = step, list(self._in_step)
        self._in_step.append(self._reasons)
        self._run += 1
        self._last = step

    def of_each(self) -> dict[str, Count]:
        """Return the counts so far, by parameter."""
        self._end_run()
        return self._counts

    def has_scored(self) -> bool:
        """Say whether anything was ever scored."""
        return any(count.scored for count in self.of_each().values())

    def scored_of(self, names: Iterable[str]) -> dict[str, float]:
        """Return how many scorings the scores of each are made of, ``inf`` where nobody knows; without those of none.

        Other than ``Count.scored``, it begins anew where scores are reset (``RankAllocator.reset_ipt``).
        """
        self._end_run()
        return {name: self._behind[name] for name in names if name in self._behind}

    def take_up(
        self, counts: Mapping[str, Count], behind: Mapping[str, float], scores: Mapping[str, torch.Tensor]
    ) -> None:
        """Go on from the ``of_each`` and ``scored_of`` of a training before, whose scores were put back."""
        self._run, self._warm_from, self._witness = 0, None, None
        self._reasons, self._in_step = {}, []
        self._counts = {name: dataclasses.replace(count, skipped=dict(count.skipped)) for name, count in counts.items()}
        self._behind, self._entries = dict(behind), len(scores)

    def warming_up(self, energies: Iterable[str], tinit: int) -> set[str]:
        """Return those of these E that were scored fewer than ``tinit`` times, and seldomer than the others (rule 3).

        One that has no count has not come late: somebody else gave it its scores.
        """
        if self._warm_from == tinit:
            return set()
        names = list(energies)
        scored = self.scored_of(names)
        enough = min(tinit, max(scored.values(), default=0))
        cold = {name for name, often in scored.items() if often < enough}
        # What this run scores catches up with the others or goes ahead with them; what it leaves out falls behind.
        left_out = (often for name, often in scored.items() if self._reasons.get(name, NO_GRADIENT) is not None)
        self._warm_from = tinit if not cold and all(often >= tinit for often in left_out) else None
        return cold

    def _end_run(self) -> None:
        if self._run:
            for name, reason in self._reasons.items():
                times = self._run
                if self._in_first and any(others.get(name, "") == reason for others in self._in_first):
                    times -= 1
                if not times:
                    continue
                count = self._counts.setdefault(name, Count())
                if reason is None:
                    count.scored += times
                    count.first = self._first if count.first is None else count.first
                    count.last = self._last
                    self._behind[name] = self._behind.get(name, 0) + times
                else:
                    count.skipped[reason] = count.skipped.get(reason, 0) + times
            self._run, self._in_first = 0, []
