"""From the tensors of a pruned adapter to those of one that lives: each kept rank back in its row. Pure."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from ..model.marks import is_dtensor
from ..model.pattern import pattern_by_full_name

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

    from ..model.parameters import AdaLoraParameter, Triplet
    from ..model.pattern import RankPattern

STD = 0.02
"""The spread of A and B in a new adapter (``AdaLoraLayer.reset_lora_parameters``)."""


class SavedTriplet:
    """The tensors that a state holds for one triplet. Cut: A ``(kept, in)``, B ``(out, kept)``, E ``(kept, 1)``."""

    def __init__(self, triplet: Triplet, tensors: Mapping[str, torch.Tensor]) -> None:
        self.triplet = triplet
        self.A, self.B, self.E = (tensors[part.name] for part in triplet.parts)
        self.rows = len(triplet.E.parameter)
        """How many ranks the triplet has in the model."""
        self.kept = len(self.E)
        """How many ranks the state has."""

    @property
    def is_whole(self) -> bool:
        """Whether the state has as many ranks as the model."""
        return self.kept == self.rows

    @property
    def can_be_put_back(self) -> bool:
        """Whether nothing but ranks is missing, and all is here to put them into."""
        live, saved = [part.parameter for part in self.triplet.parts], (self.A, self.B, self.E)
        if any(tensor.dim() != 2 or is_dtensor(tensor) for tensor in (*live, *saved)):
            return False
        shapes = (self.kept, live[0].shape[1]), (live[1].shape[0], self.kept), (self.kept, 1)
        return self.kept <= self.rows and all(map(_has_shape, saved, shapes))


def saved_triplets(every: Sequence[Triplet], state: Mapping[str, object], prefix: str) -> list[SavedTriplet]:
    """Return what the state holds of these triplets; ``prefix``: what its keys have before the parameters' names."""
    tensors = {
        part.name: found
        for triplet in every
        for part in triplet.parts
        if isinstance(found := state.get(prefix + part.name), torch.Tensor)
    }
    return [SavedTriplet(triplet, tensors) for triplet in every if all(part.name in tensors for part in triplet.parts)]


def keeps_of(saved: Sequence[SavedTriplet], pattern: RankPattern, adapter: str) -> dict[str, list[bool]] | None:
    """Return which rows the state's ranks stand for, by the name of E; None where the pattern is another state's."""
    energies = [triplet.triplet.E for triplet in saved]
    named = dict(pattern_by_full_name(energies, pattern, adapter))
    keeps: dict[str, list[bool]] = {}
    for triplet in saved:
        name = triplet.triplet.E.name
        keep = [bool(bit) for bit in named.get(name, [True] * triplet.rows)]
        if len(keep) != triplet.rows or (sum(keep) != triplet.kept and not triplet.is_whole):
            return None
        keeps[name] = keep
    return keeps


def expanded(
    saved: Iterable[SavedTriplet], keeps: Mapping[str, list[bool]], *, untouched: bool
) -> dict[str, torch.Tensor]:
    """Return whole tensors by parameter name. Rows without a saved rank get what a new adapter has there.

    That is an E of zero, so that the adapter does what it did when it was saved, and an A and a B that let the rank
    come back: those of the model where it is ``untouched`` by training, else new ones.
    """
    # A generator of its own: the same rows on every process, and the program's random numbers go on as they would.
    random = torch.Generator("cpu").manual_seed(0)
    whole: dict[str, torch.Tensor] = {}
    for triplet in saved:
        if triplet.is_whole:
            continue
        A, B, E = triplet.triplet.parts
        keep = torch.tensor(keeps[E.name], dtype=torch.bool, device="cpu")
        whole[A.name] = _filled(_start(A, triplet.A, untouched, random), triplet.A, keep)
        whole[B.name] = _filled(_start(B, triplet.B, untouched, random).T, triplet.B.T, keep).T.contiguous()
        whole[E.name] = _filled(torch.zeros_like(_start(E, triplet.E, untouched, random)), triplet.E, keep)
    return whole


def _has_shape(tensor: torch.Tensor, shape: tuple[int, int]) -> bool:
    return tuple(tensor.shape) == shape


def _start(parameter: AdaLoraParameter, saved: torch.Tensor, untouched: bool, random: torch.Generator) -> torch.Tensor:
    live = parameter.parameter.detach()
    # An adapter made with low_cpu_mem_usage has no values yet. One that has diverged has useless ones: 0 * NaN is NaN.
    if untouched and not live.is_meta and live.isfinite().all():
        return live.clone()
    like = saved if live.is_meta else live
    values = torch.empty(live.shape, dtype=torch.float32, device="cpu").normal_(0.0, STD, generator=random)
    return values.to(device=like.device, dtype=like.dtype)


def _filled(start: torch.Tensor, ranks: torch.Tensor, keep: torch.Tensor) -> torch.Tensor:
    start[keep.to(start.device)] = ranks.detach().to(device=start.device, dtype=start.dtype)
    return start
