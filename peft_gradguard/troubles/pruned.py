"""A pruned adapter that PEFT has cut, and that is trained on: its budget was counted before.

With the guard on an adapter that lives stays whole (``checkpoints/load.py``). PEFT cuts it where the guard was off, or
where ``ignore_mismatched_sizes`` was asked for.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from ..model.parameters import ranked_triplets, triplets
from ..model.pattern import budget_name

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from peft.tuners.adalora import RankAllocator

    from ..model.parameters import AdaLoraParameter
    from ..rules.call import AllocatorCall


def ranks_cut(allocator: RankAllocator, rows: Mapping[str, int]) -> int | None:
    """Return how many ranks are there where PEFT has counted more, or None. ``rows``: those of E, by budget name."""
    counted, budget = (vars(allocator).get(name) for name in ("name_set", "init_bgt"))
    # A subclass may keep its budget elsewhere. Other names are those of other adapters (PEFT's substring test), or of
    # modules that FSDP has wrapped since.
    if counted is None or budget is None or not rows.keys() >= set(counted):
        return None
    there = sum(rows[name] for name in counted)
    return there if there < budget else None


def warn_of_pruned_adapter(call: AllocatorCall) -> None:
    """Warn where fewer ranks are there than PEFT has counted."""
    there = ranks_cut(call.allocator, {budget_name(t): len(t.E.parameter) for t in triplets(call.parameters)})
    if there is not None:
        call.memory.said.warn_once(
            "pruned",
            "AdaLoRA's adapter %r has %d ranks, but its budget begins at %d: PEFT cut it when it was loaded, without "
            "peft_gradguard or with ignore_mismatched_sizes. So update_and_allocate prunes too many ranks, or fails in "
            "torch.kthvalue, and PEFT cannot load what is saved after it. Load it again with the guard on; to train "
            "just these ranks, leave out the calls.",
            call.allocator.adapter_name,
            there,
            call.allocator.init_bgt,
        )


def advice_on_pruned_adapter(
    allocator: RankAllocator, parameters: list[AdaLoraParameter], rows: Mapping[str, int]
) -> Iterator[str]:
    """Advise on an adapter that was loaded pruned. ``rows``: the rows of each E, by budget name."""
    there = ranks_cut(allocator, rows)
    if there is None:
        return
    ranks, init, target = there, allocator.init_bgt, allocator.target_bgt
    ranked = sorted(map(budget_name, ranked_triplets(parameters, {p.name for p in parameters})))
    if ranked != list(allocator.name_set):
        # Then the guard lets PEFT count anew.
        ranks = init = sum(rows[name] for name in ranked)
        target = allocator.peft_config.target_r * len(ranked)
    pruned = init - target
    will = f"leave {ranks - pruned} of {ranks} ranks" if 0 < pruned <= ranks else "fail in torch.kthvalue"
    yield (
        f"This adapter has {there} ranks, but its budget begins at {allocator.init_bgt}: PEFT cut it when it was "
        "loaded, without peft_gradguard or with ignore_mismatched_sizes. "
        f"update_and_allocate will {will}, and PEFT cannot load what is saved after it. Load it again with the guard "
        "on; to train just these ranks, never call update_and_allocate (no AdaLoraCallback either)."
    )
