"""Where the structure of a model will hurt AdaLoRA, and what to change. Before training, the audit."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

from ..errors import some_of
from ..model.parameters import whole_triplets
from ..troubles.overlap import advice_on_overlap
from ..troubles.pruned import advice_on_pruned_adapter
from ..troubles.schedule import wrong_schedule
from ..troubles.unmatched import advice_on_exclusions
from ..troubles.whose import another_trains, strange_pattern, without_allocator
from .facts import trained

if TYPE_CHECKING:
    from collections.abc import Iterator

    from peft import AdaLoraConfig
    from peft.tuners.adalora import RankAllocator

    from ..memory.counts import Counts
    from ..memory.seen import Seen
    from ..model.parameters import AdaLoraParameter, Triplet
    from .facts import ModuleReport


class Look(NamedTuple):
    """What was found of one adapter."""

    adapter: str
    adapters: tuple[str, ...]
    """The names of all adapters of the model."""
    config: AdaLoraConfig
    allocator: RankAllocator | None
    counts: Counts
    called: bool
    """Whether the guard saw an allocator call."""
    other_ranks: bool
    """Whether other ranks were loaded since they were allocated last."""
    parameters: list[AdaLoraParameter]
    layer_ranks: dict[str, int]
    """Per module, how many ranks PEFT says that it has; for parameters of which only a piece is here."""
    pattern: dict[str, list[bool]]
    inside: set[str]
    """Modules inside ``modules_to_save``."""
    alone: bool
    """Whether the model has no allocator at all."""
    training: list[str]
    """The names of the adapters that have trainable parameters."""
    seen: Seen
    warming_up: set[str]
    """The E that were scored too seldom until now (``Counts.warming_up``)."""


def advice(look: Look, modules: tuple[ModuleReport, ...]) -> tuple[str, ...]:
    """Return what to change about this adapter; nothing for one that is only used (it has no allocator)."""
    if look.allocator is None:
        # Where the model has an allocator, it is said of the adapter that this one ranks.
        return (without_allocator(look.adapter),) if look.alone and look.adapter in look.training else ()
    parameters = look.parameters
    # PEFT forgets the scores at the finalising step: after it nothing is left that could still be scored.
    scored = bool(look.allocator.exp_avg_ipt)
    over = trained(modules) and not scored
    rows = {f"{module.name}.%s.{look.adapter}": module.rows for module in modules}
    return (
        *_missing(look.adapter, parameters),
        *advice_on_overlap(look.inside),
        *_names(look.adapter, look.adapters, [p.module for p in parameters if p.module not in look.inside]),
        *(() if over and not another_trains(look.adapter, look.training) else _nothing_trainable(look, scored)),
        *_partly_frozen(parameters),
        *(words for _, words in wrong_schedule(look.config)),
        *strange_pattern(look.seen, look.config, look.adapter, parameters),
        *look.seen.troubles.values(),
        *(() if over else advice_on_pruned_adapter(look.allocator, parameters, rows)),
        *advice_on_exclusions(parameters),
    )


def _missing(adapter: str, parameters: list[AdaLoraParameter]) -> Iterator[str]:
    if not parameters:
        yield (
            f"No parameter's name ends with .lora_A.{adapter}, .lora_B.{adapter} or .lora_E.{adapter}: nothing is "
            "adapted, or FSDP has made flat parameters of them (wrap with use_orig_params=True)."
        )


def _names(adapter: str, adapters: tuple[str, ...], modules: list[str]) -> Iterator[str]:
    longer = [other for other in adapters if other != adapter and adapter in other]
    if longer:
        yield (
            f"The name of adapter {some_of(list(map(repr, longer)))} contains {adapter!r}: PEFT takes the parameters "
            "of the one for those of the other, in its regulariser and when it saves. Choose names of which none "
            "contains another."
        )
    alike = [module for module in modules if adapter in module]
    if modules and any(f"lora_{factor}" in adapter for factor in "ABE"):
        yield (
            f"The adapter's name {adapter!r} contains that of a factor (lora_A, lora_B or lora_E): PEFT replaces it "
            "there too (RankAllocator.mask_to_budget), and training fails with KeyError. Choose another name."
        )
    elif alike or (modules and adapter in "lora_E"):
        # PEFT cuts the adapter's name out of "<module>.lora_E.<adapter>", and looks whether it is still in there.
        where = f"names of modules ({alike[0]})" if alike else "lora_E, which is in all names of the rank pattern"
        yield (
            f"The adapter's name {adapter!r} occurs in {where}: PEFT mixes the two up where it tells them apart by the "
            "adapter's name, and save_pretrained fails. Choose another name."
        )


def _nothing_trainable(look: Look, scored: bool) -> Iterator[str]:
    adapter, parameters = look.adapter, look.parameters
    words = another_trains(adapter, look.training)
    if words is not None:
        yield words
    elif parameters and not any(parameter.parameter.requires_grad for parameter in parameters):
        hurts = (
            "nothing is scored or pruned as long as they are"
            if scored
            else "update_and_allocate will raise NoGradientError"
        )
        yield (
            f"Nothing is trainable: all {len(parameters)} AdaLoRA parameters are frozen, and {hurts}. "
            f"model.set_adapter({adapter!r}) makes them trainable."
        )


def _partly_frozen(parameters: list[AdaLoraParameter]) -> Iterator[str]:
    by_factors: dict[str, list[str]] = {}
    for triplet in whole_triplets(parameters):
        by_factors.setdefault(_trains(triplet), []).append(triplet.E.module)
    pinned = [module for factors in ("A", "B", "AB") for module in by_factors.get(factors, [])]
    if pinned:
        yield (
            f"lora_E of {some_of(pinned)} is frozen while lora_A or lora_B trains: the module is never ranked, and "
            "keeps its full rank. Freeze the whole triplet, or none of it."
        )
    if "E" in by_factors:
        yield (
            f"Only lora_E of {some_of(by_factors['E'])} trains: the module is never ranked, and keeps its full rank. "
            "Let lora_A or lora_B train too, or freeze the whole triplet."
        )
    half = by_factors.get("AE", []) + by_factors.get("BE", [])
    if half:
        yield (
            f"One of lora_A and lora_B of {some_of(half)} is frozen: the other one and lora_E alone decide which ranks "
            "are pruned. Freeze the whole triplet or none of it, unless that is meant."
        )


def _trains(triplet: Triplet) -> str:
    """Return the factors that train, such as ``"AE"``."""
    return "".join(part.factor for part in triplet.parts if part.parameter.requires_grad)
