"""What a step has left, noted before PEFT forgets the scores."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ..memory.counts import HistoryPoint, history_is_kept
from ..model.parameters import energies
from ..model.pattern import pattern_by_full_name
from .importance import importance

if TYPE_CHECKING:
    from ..model.pattern import RankPattern
    from .call import AllocatorCall


def note_step(call: AllocatorCall, budget: int, pattern: RankPattern | None) -> None:
    """Remember what an ``update_and_allocate`` has left."""
    counts, allocator = call.memory.counts, call.allocator
    counts.step = call.step
    if pattern and call.ranked:
        # From now on the pattern in the config is this training's.
        call.memory.seen.came_with = None
    if pattern:
        call.memory.loaded = call.memory.other_ranks = False
    if not call.scoring_is_due and call.scored:
        counts.importance = importance(allocator, call.parameters)
    if history_is_kept() and call.step is not None:
        counts.history.append(HistoryPoint(call.step, budget, _total_rank(call, pattern), counts.skipped))


def _total_rank(call: AllocatorCall, pattern: RankPattern | None) -> int:
    """Count ranks by the last pattern; what it does not name has its full rank."""
    config, adapter = call.allocator.peft_config, call.allocator.adapter_name
    in_force = pattern or call.memory.seen.own_pattern(config.rank_pattern, adapter, call.parameters)
    known = dict(pattern_by_full_name(call.parameters, in_force, adapter))
    return sum(
        sum(known[energy.name]) if energy.name in known else energy.parameter.size(0)
        for energy in energies(call.parameters)
    )
