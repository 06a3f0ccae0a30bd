"""What the finalising step leaves, or would have left."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from ..model.pattern import RankPattern
    from ..rules.call import AllocatorCall


def warn_of_missed_finalising_step(call: AllocatorCall, rank_pattern: RankPattern | None) -> None:
    """Warn where the final phase begins without its first step: PEFT forgets all scores there, and here are some."""
    if call.scored:
        config = call.allocator.peft_config
        call.memory.said.warn_once(
            "finalising step missed",
            "update_and_allocate was never called with step %d (total_step - tfinal), at which AdaLoRA settles the "
            "final ranks (adapter %r). %s Call it at every optimizer step.",
            config.total_step - config.tfinal,
            call.allocator.adapter_name,
            "The pattern of the last masking step stays in force." if rank_pattern else "So no rank is pruned at all.",
        )
