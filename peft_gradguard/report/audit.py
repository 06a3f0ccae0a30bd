"""From a model to its report. Looks, and changes nothing; enters no collective, so one process may ask alone."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from ..memory.counts import Count, Counts
from ..memory.memory import known_memory
from ..memory.seen import Seen
from ..model.adapters import adapters_that_train
from ..model.exclusions import mark_excluded
from ..model.marks import is_dtensor, whole_shape
from ..model.parameters import (
    EXCLUDED,
    FROZEN,
    INSIDE_MODULES_TO_SAVE,
    NO_GRADIENT,
    WARMING_UP,
    energies,
    modules_inside_modules_to_save,
    ranked_triplets,
)
from ..model.pattern import pattern_by_full_name
from ..model.schedule import final_step
from ..model.tuners import tuners_in
from ..model.walk import adalora_parameters
from ..rules.importance import importance
from ..troubles.whose import without_model
from .advice import Look, advice
from .facts import AdapterReport, ModuleReport, ParameterReport, trained
from .report import Report

if TYPE_CHECKING:
    from peft import AdaLoraConfig
    from peft.tuners.adalora import AdaLoraModel

    from ..model.parameters import AdaLoraParameter, SkipReason


def build(model: object) -> Report:
    """Return the report of all AdaLoRA adapters in ``model``; see ``peft_gradguard.report``."""
    tuners = list(dict.fromkeys(tuners_in(model)))
    if not tuners:
        raise ValueError(_nothing_found(model))
    return Report(tuple(_adapter(tuner, name) for tuner in tuners for name in tuner.peft_config))


def _nothing_found(model: object) -> str:
    if isinstance(model, torch.nn.Module) and any(hasattr(module, "lora_E") for module in model.modules()):
        return f"AdaLoRA's report was given {without_model(type(model).__name__)}"
    return (
        f"report() was given a {type(model).__name__}, in which there is no AdaLoRA model: give it what get_peft_model "
        "returned for an AdaLoraConfig, or what wraps it (DDP, torch.compile, accelerate, DeepSpeed)."
    )


def _look(tuner: AdaLoraModel, adapter: str) -> Look:
    allocator = vars(tuner).get("rankallocator")
    if allocator is not None and allocator.adapter_name != adapter:
        allocator = None
    memory = known_memory(allocator) if allocator is not None else None
    config: Any = tuner.peft_config[adapter]
    parameters = adalora_parameters(tuner.model, adapter)
    if allocator is not None:
        parameters = mark_excluded(parameters)
    counts = memory.counts if memory else Counts()
    seen = memory.seen if memory else Seen()
    pattern = seen.own_pattern(config.rank_pattern, adapter, parameters)
    return Look(
        adapter,
        tuple(tuner.peft_config),
        config,
        allocator,
        counts,
        bool(memory and memory.called),
        bool(memory and memory.other_ranks),
        parameters,
        {
            name: module.r[adapter]
            for name, module in tuner.model.named_modules()
            if hasattr(module, "lora_E") and adapter in getattr(module, "r", {})
        },
        dict(pattern_by_full_name(parameters, pattern, adapter)),
        modules_inside_modules_to_save({parameter.module for parameter in parameters}),
        "rankallocator" not in vars(tuner),
        [name for name in adapters_that_train(tuner.model) if _is_for_training(tuner, name)],
        seen,
        counts.warming_up((p.name for p in energies(parameters)), config.tinit or 0),
    )


def _is_for_training(tuner: AdaLoraModel, adapter: str) -> bool:
    """Say whether somebody wants this adapter trained: one for inference is trainable too while it is active."""
    config: Any = tuner.peft_config.get(adapter)
    return config is not None and not config.inference_mode


def _adapter(tuner: AdaLoraModel, adapter: str) -> AdapterReport:
    look = _look(tuner, adapter)
    ranked = _ranked(look)
    counts = look.counts.of_each()
    important = importance(look.allocator, look.parameters) if look.allocator is not None else {}
    important = important or look.counts.importance
    factors: dict[str, list[AdaLoraParameter]] = {}
    for parameter in look.parameters:
        factors.setdefault(parameter.module, []).append(parameter)
    modules = tuple(
        _module(look, name, parts, name in ranked, important.get(name), counts) for name, parts in factors.items()
    )
    init, now, target = _budget(look, modules)
    return AdapterReport(
        adapter=adapter,
        step=look.counts.step,
        init_budget=init,
        budget=now,
        target_budget=target,
        unranked_ranks=sum(module.rank_kept for module in modules if not module.ranked),
        modules=modules,
        advice=advice(look, modules),
        history=tuple(look.counts.history),
        final_step=_final_step(look),
        final=_final(look),
    )


def _final_step(look: Look) -> int | None:
    return None if look.allocator is None or look.config.total_step is None else final_step(look.config)


def _final(look: Look) -> bool | None:
    step, final = look.counts.step, _final_step(look)
    if step is None or final is None or look.allocator is None:
        return None
    if step >= final:
        # The best checkpoint may be one of an earlier step (load_best_model_at_end).
        return None if look.other_ranks else True
    # PEFT forgets the scores when it settles the ranks, and the guard may have been off then; or they were never kept.
    forgotten = not look.allocator.exp_avg_ipt and any(count.scored for count in look.counts.of_each().values())
    return None if forgotten else False


def _ranked(look: Look) -> set[str]:
    """Return the modules in the budget; before training, those that will be if all that trains gets gradients."""
    scored: Any = look.allocator.exp_avg_ipt if look.allocator is not None else {}
    ranked = {triplet.E.module for triplet in ranked_triplets(look.parameters, scored, look.warming_up)}
    # Without the guard a call fails at the first parameter without a gradient, and leaves scores for a few.
    if ranked or (scored and look.called):
        return ranked
    if look.called or look.pattern or look.allocator is None:
        # PEFT has forgotten the scores at its finalising step, or the adapter was loaded.
        return {parameter.module for parameter in look.parameters if parameter.name in look.pattern}
    names = {parameter.name for parameter in look.parameters}
    return {triplet.E.module for triplet in ranked_triplets(look.parameters, names)}


def _module(
    look: Look,
    name: str,
    parts: list[AdaLoraParameter],
    ranked: bool,
    important: float | None,
    counts: dict[str, Count],
) -> ModuleReport:
    started, kept = _ranks(look, name, parts)
    return ModuleReport(
        name=name,
        rank_started=started,
        rank_kept=kept,
        ranked=ranked,
        reason=_reason(look, name, parts, ranked, counts),
        importance=important,
        parameters=tuple(_parameter(look, part, counts.get(part.name, Count())) for part in parts),
    )


def _parameter(look: Look, parameter: AdaLoraParameter, count: Count) -> ParameterReport:
    return ParameterReport(
        name=parameter.name,
        factor=parameter.factor,
        shape=whole_shape(parameter.parameter),
        trainable=parameter.parameter.requires_grad,
        inside_modules_to_save=parameter.module in look.inside,
        steps_scored=count.scored,
        steps_skipped=dict(count.skipped),
        first_step=count.first,
        last_step=count.last,
        excluded=parameter.excluded,
    )


def _ranks(look: Look, module: str, parts: list[AdaLoraParameter]) -> tuple[int, int]:
    """Return how many ranks the module started with, and keeps: by the pattern, or else by the rows of E.

    By the pattern first, because rows that are pruned come back between two masking steps, with the optimizer's next.
    """
    for part in parts:
        if part.name in look.pattern:
            return len(look.pattern[part.name]), sum(look.pattern[part.name])
    started = look.layer_ranks.get(module, 0)
    for energy in (part.parameter for part in energies(parts)):
        if whole_shape(energy):
            started = whole_shape(energy)[0]
        # A shard (FSDP2), a piece (ZeRO 3, FSDP1) or a stand-in without values does not tell.
        if energy.dim() == 2 and not is_dtensor(energy) and not energy.is_meta:
            kept = int(torch.count_nonzero(energy.detach().any(dim=1)))
            # All rows of E are zero before the first optimizer step.
            return started, kept or started
    return started, started


def _reason(
    look: Look, module: str, parts: list[AdaLoraParameter], ranked: bool, counts: dict[str, Count]
) -> SkipReason | None:
    if not ranked:
        if module in look.inside:
            return INSIDE_MODULES_TO_SAVE
        for reason, holds in (
            (EXCLUDED, [part.factor for part in parts if part.excluded]),
            (FROZEN, [part.factor for part in parts if part.excluded or not part.parameter.requires_grad]),
        ):
            if "E" in holds or {"A", "B"} <= set(holds):
                return reason
        if any(part.name in look.warming_up for part in parts):
            return WARMING_UP
    often: dict[SkipReason, int] = {}
    for part in parts:
        for reason, steps in counts.get(part.name, Count()).skipped.items():
            often[reason] = often.get(reason, 0) + steps
    if often:
        return max(often, key=lambda reason: often[reason])
    return NO_GRADIENT if look.called and not ranked else None


def _budget(look: Look, modules: tuple[ModuleReport, ...]) -> tuple[int | None, int | None, int | None]:
    """Return the budget at the start, now and in the end; before PEFT has counted the ranked triplets, as it will."""
    allocator = look.allocator
    if allocator is None:
        return None, None, None
    ranked = [module for module in modules if module.ranked]
    names = sorted(f"{module.name}.%s.{look.adapter}" for module in ranked)
    if names == list(allocator.name_set):
        init, target = allocator.init_bgt, allocator.target_bgt
    else:
        init = sum(module.rows for module in ranked)
        target = look.config.target_r * len(ranked)
    step = look.counts.step
    if step is not None:
        return init, _scheduled(look.config, step, init, target), target
    # The steps of a training without the guard are not known.
    return init, None if trained(modules) else init, target


def _scheduled(config: AdaLoraConfig, step: int, init: int, target: int) -> int | None:
    """Ask PEFT's ``RankAllocator.budget_schedule`` for the budget of this step."""
    from types import SimpleNamespace

    from peft.tuners.adalora import RankAllocator

    # The method as PEFT wrote it, on a stand-in for the allocator: the guard's wrapper would begin a memory of it.
    schedule: Any = RankAllocator.budget_schedule
    while hasattr(schedule, "__wrapped__"):
        schedule = schedule.__wrapped__
    try:
        return int(schedule(SimpleNamespace(peft_config=config, init_bgt=init, target_bgt=target), step)[0])
    except TypeError:
        # total_step is not set: advice.py says so.
        return None
