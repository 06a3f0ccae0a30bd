"""Rule 19: a pruned adapter loads into one that lives. The wrappers around three methods of ``AdaLoraModel``.

PEFT loads every adapter through ``set_peft_model_state_dict``, which cuts the model to the pattern in its configuration
(``resize_modules_by_rank_pattern``) and then calls ``load_state_dict``. An adapter that lives stays whole instead, and
the tensors are put back into their rows. Which these are, the pattern beside the saved tensors says: ``load_adapter``
does not look at it where the adapter is there already, as it is for ``from_pretrained`` and in a ``Trainer``.
"""

from __future__ import annotations

import json
import os
import sys
from typing import TYPE_CHECKING, Any

import torch

from ..log import harmless, said_level, say
from ..memory.memory import known_memory
from ..model.parameters import energies, whole_triplets
from ..model.pattern import pattern_by_full_name
from ..model.walk import adalora_parameters
from ..rules.call import memory_for
from .expand import expanded, keeps_of, saved_triplets

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from peft.tuners.adalora import AdaLoraModel, RankAllocator

    from ..memory.memory import Memory
    from ..model.pattern import RankPattern
    from .expand import SavedTriplet

PEFT_PREFIX = "base_model.model."
CONFIG = "adapter_config.json"
REMEMBERED = 64
"""How many patterns are remembered for tensors that a program took out of the model, and may put back."""


def resize_modules_by_rank_pattern(
    peft: Callable[..., None], tuner: AdaLoraModel, /, rank_pattern: RankPattern, adapter_name: str
) -> None:
    """Leave an adapter that lives whole where PEFT would cut it only to load tensors that are cut."""
    with harmless("see whether an AdaLoRA adapter stays whole"):
        if _stays_whole(tuner, rank_pattern, adapter_name):
            return
    peft()


def _load_from_state_dict(
    peft: Callable[..., None], tuner: AdaLoraModel, /, state_dict: dict[str, Any], prefix: str, *_: Any, **__: Any
) -> None:
    """Put cut tensors back into their rows, in torch's own copy of the state, before torch hands it to the layers."""
    allocator = vars(tuner).get("rankallocator")
    if allocator is not None and allocator.adapter_name in tuner.peft_config:
        with harmless("put the ranks of a pruned AdaLoRA adapter back into their rows"):
            _put_back(tuner, allocator, state_dict, f"{prefix}model.")
    peft()


def resize_state_dict_by_rank_pattern(
    peft: Callable[..., dict[str, Any]],
    tuner: AdaLoraModel,
    /,
    rank_pattern: RankPattern,
    state_dict: dict[str, Any],
    adapter_name: str,
) -> dict[str, Any]:
    """Save no pattern that does not describe the adapter any more, as it was trained on since it was loaded.

    What PEFT cuts by a pattern that still holds can be put back: the pattern is remembered.
    """
    allocator = _living(tuner, adapter_name)
    memory = known_memory(allocator) if allocator is not None else None
    if memory is None:
        return peft()
    with harmless("see whether a rank_pattern is outdated"):
        if memory.loaded and _cuts_what_is_used(tuner, rank_pattern, state_dict, adapter_name):
            config: Any = tuner.peft_config[adapter_name]
            config.rank_pattern = None
            return state_dict
    with harmless("remember a rank_pattern"):
        if rank_pattern not in memory.cut:
            memory.cut.append(rank_pattern)
            del memory.cut[:-REMEMBERED]
    return peft()


def _living(tuner: AdaLoraModel, adapter: str) -> RankAllocator | None:
    """Return the allocator of this adapter; one that was loaded for inference, or added later, has none."""
    allocator: RankAllocator | None = vars(tuner).get("rankallocator")
    return allocator if allocator is not None and allocator.adapter_name == adapter else None


def _stays_whole(tuner: AdaLoraModel, rank_pattern: RankPattern, adapter: str) -> bool:
    if _living(tuner, adapter) is None:
        return False
    asked = _frame_of("set_peft_model_state_dict", "model", tuner)
    # A user's own call wants it cut. And tensors of other sizes, if they are to be ignored, are taken away before ours.
    if asked is None or asked.get("ignore_mismatched_sizes"):
        return False
    ranked = energies(adalora_parameters(tuner.model, adapter))
    named = dict(pattern_by_full_name(ranked, rank_pattern, adapter))
    # Where PEFT has cut it before, without the guard, it refuses other ranks before it has written any.
    return all(len(named[p.name]) == len(p.parameter) for p in ranked if p.name in named)


def _put_back(tuner: AdaLoraModel, allocator: RankAllocator, state: dict[str, Any], prefix: str) -> None:
    adapter = allocator.adapter_name
    saved = saved_triplets(whole_triplets(adalora_parameters(tuner.model, adapter)), state, prefix)
    if not saved or not all(triplet.is_whole or triplet.can_be_put_back for triplet in saved):
        return
    memory = memory_for(allocator)
    config: Any = tuner.peft_config[adapter]
    for pattern in _patterns(tuner, memory, config.rank_pattern, saved):
        keeps = keeps_of(saved, pattern or {}, adapter)
        if keeps is not None:
            break
    else:
        return
    whole = all(triplet.is_whole for triplet in saved)
    if not whole or pattern != config.rank_pattern:
        tensors = expanded(saved, keeps, untouched=not memory.called)
        state.update({prefix + name: tensor for name, tensor in tensors.items()})
        memory.other_ranks = memory.other_ranks or pattern != config.rank_pattern
        config.rank_pattern = pattern
        # It is no other training's.
        memory.seen.came_with = None
    # Put into an adapter with a pattern, tensors that are whole may be of a time before it.
    if not whole or (config.rank_pattern and _frame_of("set_peft_model_state_dict", "model", tuner)):
        memory.loaded = True


def _patterns(
    tuner: AdaLoraModel, memory: Memory, current: RankPattern | None, saved: list[SavedTriplet]
) -> Iterator[RankPattern | None]:
    """Yield the patterns that may tell the rows of these tensors, the likeliest first."""
    loading = _frame_of("load_adapter", "self", tuner)
    if loading is not None:
        known, pattern = _pattern_beside(loading)
        if known:
            yield pattern
            return
    yield current
    yield from reversed(memory.cut)
    # Tensors that all have the same number of ranks are rather those of another adapter, with another init_r.
    if len({triplet.kept for triplet in saved}) > 1:
        say(
            said_level(),
            "AdaLoRA's adapter %r was loaded from tensors that were cut to a rank_pattern which peft_gradguard does "
            "not know: their ranks take the first rows, and count as those of an adapter with this init_r. Load a "
            "folder that save_pretrained has written (load_adapter, from_pretrained), or set the rank_pattern first.",
            memory.adapter,
        )
        yield {
            triplet.triplet.E.name: [row < triplet.kept for row in range(triplet.rows)]
            for triplet in saved
            if not triplet.is_whole
        }


def _pattern_beside(loading: dict[str, Any]) -> tuple[bool, RankPattern | None]:
    """Return whether the configuration that was saved with the tensors can be read, and its pattern."""
    try:
        where, options = os.fspath(loading["model_id"]), loading.get("hf_hub_download_kwargs") or {}
        path = os.path.join(where, options.get("subfolder") or "", CONFIG)
        if not os.path.isdir(where):
            # Not at the top: nothing else here needs it.
            from huggingface_hub import hf_hub_download

            path = hf_hub_download(where, CONFIG, **options)
        with open(path, encoding="utf-8") as file:
            return True, json.load(file).get("rank_pattern")
    except Exception:
        return False, None


def _cuts_what_is_used(
    tuner: AdaLoraModel, rank_pattern: RankPattern, state_dict: dict[str, Any], adapter: str
) -> bool:
    """Say whether a row that the pattern cuts has an E that is not zero."""
    for name, keep in pattern_by_full_name(adalora_parameters(tuner.model, adapter), rank_pattern, adapter):
        energy = state_dict[PEFT_PREFIX + name]
        if energy[torch.tensor(keep, device=energy.device).logical_not()].any():
            return True
    return False


def _frame_of(function: str, argument: str, tuner: AdaLoraModel) -> dict[str, Any] | None:
    """Return the local variables of PEFT's function that is loading into this model, or None.

    PEFT hands the methods that it calls nothing of what it loads, and programs hold these functions by name.
    """
    frame = sys._getframe()
    while frame is not None:
        if frame.f_code.co_name == function and frame.f_globals.get("__name__", "").startswith("peft."):
            given = frame.f_locals.get(argument)
            if given is tuner or getattr(given, "base_model", None) is tuner:
                return frame.f_locals
        frame = frame.f_back  # type: ignore[assignment]
    return None
