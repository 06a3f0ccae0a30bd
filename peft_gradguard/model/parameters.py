"""What the guard knows of parameters: triplets, skip reasons, who is ranked.

Pure functions on names and parameters; nothing here needs torch or PEFT, or keeps a parameter.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal, NamedTuple

if TYPE_CHECKING:
    from collections.abc import Container, Iterable

    import torch
    from torch.distributed.tensor import DTensor

Factor = Literal["A", "B", "E"]
SkipReason = Literal["frozen", "no gradient", "non-finite gradient", "inside modules_to_save", "excluded", "warming up"]

FROZEN: SkipReason = "frozen"
NO_GRADIENT: SkipReason = "no gradient"
NON_FINITE: SkipReason = "non-finite gradient"
INSIDE_MODULES_TO_SAVE: SkipReason = "inside modules_to_save"
EXCLUDED: SkipReason = "excluded"
WARMING_UP: SkipReason = "warming up"


class AdaLoraParameter(NamedTuple):
    """One factor of one triplet: its name in the model, the parameter, the module it adapts, and which factor it is.

    Shapes (AdaLoRA paper, section 3.1; ``r`` ranks): A is ``(r, in_features)``, B ``(out_features, r)``, E ``(r, 1)``.
    """

    name: str
    parameter: torch.nn.Parameter
    module: str
    factor: Factor
    shard: DTensor | None = None
    """Where the parameter was gathered from, if it is only a copy for one allocator call (FSDP2)."""
    excluded: bool = False
    """Whether the user has excluded it (``exclusions.py``)."""
    parametrized: bool = False
    """Whether ``torch.nn.utils.parametrize`` has it in the place of the factor: PEFT scores it, but cannot rank it."""


class Triplet(NamedTuple):
    """The A, B and E of one module. Pruning rank ``i`` zeroes row ``i`` of E.

    One that is tied to another module's is None: the model names it there, and PEFT ranks by the others.
    """

    E: AdaLoraParameter
    A: AdaLoraParameter | None = None
    B: AdaLoraParameter | None = None

    @property
    def parts(self) -> list[AdaLoraParameter]:
        """What the model names of it: A, B and E."""
        return [part for part in (self.A, self.B, self.E) if part is not None]


def energies(parameters: Iterable[AdaLoraParameter]) -> list[AdaLoraParameter]:
    """Return the E among them, whose rows are the ranks."""
    return [parameter for parameter in parameters if parameter.factor == "E"]


def triplets(parameters: Iterable[AdaLoraParameter]) -> list[Triplet]:
    """Group parameters into triplets, in the order in which the model first names each module."""
    modules: dict[str, dict[Factor, AdaLoraParameter]] = {}
    for parameter in parameters:
        modules.setdefault(parameter.module, {})[parameter.factor] = parameter
    return [Triplet(**factors) for factors in modules.values() if "E" in factors and len(factors) > 1]


def whole_triplets(parameters: Iterable[AdaLoraParameter]) -> list[Triplet]:
    """Return those of which the model names all three parts."""
    return [triplet for triplet in triplets(parameters) if len(triplet.parts) == 3]


def modules_inside_modules_to_save(modules: Iterable[str]) -> set[str]:
    """Return those of the modules that lie inside a ``modules_to_save`` copy, or inside the original that it copies.

    PEFT (``ModulesToSaveWrapper``) keeps the untouched module as ``original_module`` beside the trained copies in
    ``modules_to_save``, and saves only the copies, whole.
    """
    modules = list(modules)
    inside = {module for module in modules if ".modules_to_save." in f".{module}."}
    originals = tuple(f"{module.split('modules_to_save.')[0]}original_module" for module in inside)
    if originals:
        inside.update(m for m in modules if any(m == o or m.startswith(f"{o}.") for o in originals))
    return inside


def takes_part(parameter: AdaLoraParameter, scored: Container[str]) -> bool:
    """Say whether this part of a triplet counts in ranking: trainable, scored, not excluded, and found by PEFT."""
    counts = parameter.parameter.requires_grad and not (parameter.excluded or parameter.parametrized)
    return counts and parameter.name in scored


def ranked_triplets(
    parameters: Iterable[AdaLoraParameter], scored: Container[str], warming_up: Container[str] = ()
) -> list[Triplet]:
    """Return the triplets in budget and mask: E is trainable and scored, A or B too, and not in a saved copy.

    ``warming_up``: the E that were scored too seldom until now (``Counts.warming_up``).
    """
    every = triplets(parameters)
    saved = modules_inside_modules_to_save(triplet.E.module for triplet in every)
    return [
        triplet
        for triplet in every
        if triplet.E.module not in saved
        and triplet.E.name not in warming_up
        and takes_part(triplet.E, scored)
        and any(takes_part(part, scored) for part in triplet.parts if part is not triplet.E)
    ]
