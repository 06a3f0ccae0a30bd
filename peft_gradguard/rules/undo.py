"""An allocator call that fails leaves the allocator as it was, so that it can be made again."""

from __future__ import annotations

import copy
from contextlib import contextmanager
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator

    from .call import AllocatorCall

STATE = ("exp_avg_ipt", "exp_avg_unc", "init_bgt", "target_bgt", "name_set")
"""What PEFT writes to in ``RankAllocator.update_and_allocate``. Its scores are replaced, never written into."""


@contextmanager
def undone_on_error(call: AllocatorCall) -> Iterator[None]:
    """Give the allocator its averages, budget and kept gradients back where the block fails, or is interrupted.

    PEFT scores one parameter after the other. Half a step scored, and that half scored again by a second try, would
    weigh some parameters more than others. Weights that PEFT has masked by then stay masked.

    Meanwhile the last step's averages stay in memory beside the new ones: two lists of the size of the AdaLoRA
    parameters. The single step's importance is not kept, since PEFT computes it anew before it reads it; only its keys
    matter, by which PEFT tells a parameter that it has never met.
    """
    allocator = call.allocator
    before = {name: copy.copy(vars(allocator)[name]) for name in STATE if name in vars(allocator)}
    met = set(allocator.ipt)
    try:
        with call.memory.late.undone_on_error():
            yield
    except BaseException:
        vars(allocator).update(before)
        allocator.ipt = {name: importance for name, importance in allocator.ipt.items() if name in met}
        raise
