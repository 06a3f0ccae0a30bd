"""How important AdaLoRA takes a module to be: what PEFT's ``mask_to_budget`` ranks by, summed over its ranks."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch

from ..model.marks import is_dtensor
from ..model.parameters import takes_part, triplets
from .call import scores_of

if TYPE_CHECKING:
    from collections.abc import Iterable

    from peft.tuners.adalora import RankAllocator

    from ..model.parameters import AdaLoraParameter, Triplet


def importance(allocator: RankAllocator, parameters: Iterable[AdaLoraParameter]) -> dict[str, float]:
    """Return the importance of each module whose E, and A or B, take part (AdaLoRA paper, section 3.2)."""
    found = {triplet.E.module: _of_triplet(allocator, triplet) for triplet in triplets(parameters)}
    return {module: value for module, value in found.items() if value is not None and math.isfinite(value)}


def _of_triplet(allocator: RankAllocator, triplet: Triplet) -> float | None:
    scored = scores_of(allocator)
    # Without the guard PEFT's scores may be shards (FSDP2): to sum those would be a collective.
    parts = {p.factor: p.name for p in triplet.parts if takes_part(p, scored) and not is_dtensor(scored[p.name])}
    means = []
    if "A" in parts:
        means.append(allocator._element_score(parts["A"]).mean(dim=1, keepdim=True))  # type: ignore[no-untyped-call]
    if "B" in parts:
        means.append(allocator._element_score(parts["B"]).mean(dim=0).view(-1, 1))  # type: ignore[no-untyped-call]
    if "E" not in parts or not means:
        return None
    energies = allocator._element_score(parts["E"])  # type: ignore[no-untyped-call]
    combined = allocator._combine_ipt(energies, torch.cat(means, dim=1))  # type: ignore[no-untyped-call]
    return float(combined.float().sum())
