"""Which triplets take part in budget and mask, and what PEFT is shown of them."""

from __future__ import annotations

from typing import TYPE_CHECKING

from .overlap import warn_of_overlap
from .parameters import INSIDE_MODULES_TO_SAVE, modules_inside_modules_to_save, ranked_triplets, takes_part, triplets
from .skips import memory_of

if TYPE_CHECKING:
    from collections.abc import Iterator

    from peft.tuners.adalora import RankAllocator

    from .parameters import AdaLoraParameter, Triplet
    from .view import ModelView

    RankPattern = dict[str, list[bool]]


def rank(allocator: RankAllocator, view: ModelView) -> list[Triplet]:
    """Settle what is ranked: show it to PEFT, and let PEFT count its budget anew where the set has changed."""
    scored = allocator.exp_avg_ipt
    ranked = ranked_triplets(view.adalora_parameters, scored)
    _log_modules_to_save(allocator, view)
    # Once PEFT has forgotten all scores (reset_ipt, at the finalising step) nothing says that the set has changed.
    if scored and sorted(budget_name(triplet) for triplet in ranked) != list(allocator.name_set):
        view.show(triplet.A for triplet in ranked)
        allocator._set_budget_scheduler(view)  # type: ignore[no-untyped-call]
    view.show(part for triplet in ranked for part in triplet if takes_part(part, scored))
    return ranked


def budget_name(triplet: Triplet) -> str:
    """Return the triplet's name in ``RankAllocator.name_set``, as PEFT's ``_set_budget_scheduler`` makes it."""
    return triplet.A.name.replace("lora_A", "%s")


def _log_modules_to_save(allocator: RankAllocator, view: ModelView) -> None:
    inside = modules_inside_modules_to_save({parameter.module for parameter in view.adalora_parameters})
    if inside:
        memory = memory_of(allocator)
        warn_of_overlap(memory, inside)
        for parameter in view.adalora_parameters:
            if parameter.module in inside:
                memory.skip(parameter.name, INSIDE_MODULES_TO_SAVE)


def name_pruned_adapter(allocator: RankAllocator, view: ModelView) -> None:
    """Warn where fewer ranks are there than PEFT has counted: it counts before it cuts an adapter that it loads."""
    there = {budget_name(triplet): len(triplet.E.parameter) for triplet in triplets(view.adalora_parameters)}
    ranks = sum(there.values())
    # Other names are those of other adapters (PEFT's substring test), or of modules that FSDP has wrapped since.
    if there.keys() == set(allocator.name_set) and ranks < allocator.init_bgt:
        memory_of(allocator).warn_once(
            "pruned",
            "AdaLoRA's adapter %r was loaded with %d ranks, but its budget begins at %d, as PEFT counted it before it "
            "cut the tensors. So update_and_allocate prunes too many ranks, or fails in torch.kthvalue, and PEFT "
            "cannot load what is saved after it. To train these ranks on, leave out the calls; to allocate ranks anew, "
            "train a fresh adapter.",
            allocator.adapter_name,
            ranks,
            allocator.init_bgt,
        )


def name_missed_finalising_step(allocator: RankAllocator, rank_pattern: RankPattern | None) -> None:
    """Warn where the final phase begins without its first step: PEFT forgets all scores there, and here are some."""
    if allocator.exp_avg_ipt:
        config = allocator.peft_config
        memory_of(allocator).warn_once(
            "finalising step missed",
            "update_and_allocate was never called with step %d (total_step - tfinal), at which AdaLoRA settles the "
            "final ranks (adapter %r). %s Call it at every optimizer step.",
            config.total_step - config.tfinal,
            allocator.adapter_name,
            "The pattern of the last masking step stays in force." if rank_pattern else "So no rank is pruned at all.",
        )


def pattern_by_full_name(
    parameters: list[AdaLoraParameter], rank_pattern: RankPattern, adapter: str
) -> Iterator[tuple[str, list[bool]]]:
    """Yield the pattern's entries under the parameters' full names, for the E parameters that it names.

    ``save_pretrained`` cuts the adapter's name out of the names in the pattern. PEFT tells the two forms apart by
    looking for the adapter's name anywhere in the first one, which goes wrong where a module is named like the adapter.
    """
    for parameter in parameters:
        for key in (parameter.name, parameter.name.replace(f".{adapter}", "")):
            if parameter.factor == "E" and key in rank_pattern:
                yield parameter.name, rank_pattern[key]
                break
