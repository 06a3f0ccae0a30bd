"""The names that PEFT gives triplets: in ``rank_pattern``, and in the budget (``RankAllocator.name_set``)."""

from __future__ import annotations

from typing import TYPE_CHECKING

from .parameters import energies

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from .parameters import AdaLoraParameter, Triplet

RankPattern = dict[str, list[bool]]
"""Per name of an E, which of its ranks are kept (``RankAllocator.mask_to_budget``)."""


def budget_name(triplet: Triplet) -> str:
    """Return the triplet's name in ``RankAllocator.name_set``, as PEFT's ``_set_budget_scheduler`` makes it."""
    # Not by the name of A, which torch.nn.utils.parametrize changes.
    module, factor = triplet.E.module, len(".lora_E")
    return f"{module}.lora_A{triplet.E.name[len(module) + factor :]}".replace("lora_A", "%s")


def is_uncut(parameters: Sequence[AdaLoraParameter], rank_pattern: RankPattern, adapter: str) -> bool:
    """Say whether an E has all the rows that the pattern takes some of: to load an adapter, PEFT cuts them off."""
    rows = {p.name: p.parameter.shape[0] for p in energies(parameters) if p.parameter.dim() == 2}
    named = pattern_by_full_name(parameters, rank_pattern, adapter)
    return any(rows.get(name) == len(keep) and not all(keep) for name, keep in named)


def pattern_by_full_name(
    parameters: Sequence[AdaLoraParameter], rank_pattern: RankPattern, adapter: str
) -> Iterator[tuple[str, list[bool]]]:
    """Yield the pattern's entries under the parameters' full names, for the E parameters that it names.

    ``save_pretrained`` cuts the adapter's name out of the names in the pattern. PEFT tells the two forms apart by
    looking for the adapter's name anywhere in the first one, which goes wrong where a module is named like the adapter.
    """
    for energy in energies(parameters):
        for key in (energy.name, energy.name.replace(f".{adapter}", "")):
            # A number is LoRA's way to give ranks, which AdaLoRA does not read.
            if not isinstance(rank_pattern.get(key, 0), int):
                yield energy.name, rank_pattern[key]
                break
