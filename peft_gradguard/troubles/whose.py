"""Whose training it is: an allocator for another adapter than the one that trains, for none, or with another's pattern.

PEFT makes one allocator, for the first trainable adapter, and only inside of an ``AdaLoraModel``. It writes the ranks
that it has settled into the config object that the user gave (``AdaLoraModel.update_and_allocate``).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from ..model.adapters import adapters_that_train

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from ..memory.seen import Seen
    from ..model.parameters import AdaLoraParameter
    from ..rules.call import AllocatorCall

PATTERN = "strange pattern"


def warn_of_another_adapter(call: AllocatorCall) -> None:
    """Warn where another adapter trains, and this allocator's does not."""
    if not any(parameter.parameter.requires_grad for parameter in call.parameters):
        words = another_trains(call.memory.adapter, adapters_that_train(call.view.__wrapped__))
        if words is not None:
            call.memory.said.warn_once("another adapter", "%s", words)


def warn_of_its_pattern(call: AllocatorCall) -> None:
    """Warn of a ``rank_pattern`` that was in the config when the allocator was made, and is not this training's."""
    for words in strange_pattern(call.memory.seen, call.allocator.peft_config, call.memory.adapter, call.parameters):
        call.memory.said.warn_once(PATTERN, "%s", words)


def another_trains(adapter: str, training: Sequence[str]) -> str | None:
    """Return what to say of an allocator whose adapter does not train while others do."""
    others = [name for name in training if name != adapter]
    if not others or adapter in training:
        return None
    other, *_ = others
    return (
        f"AdaLoRA's allocator ranks adapter {adapter!r}, but {other!r} trains, and keeps all its ranks: PEFT "
        f"makes one allocator, for the first adapter. Give {other!r} its own, with tuner = model.base_model: "
        f"tuner.trainable_adapter_name = {other!r}; tuner.rankallocator = "
        f"RankAllocator(tuner.model, tuner.peft_config[{other!r}], {other!r})."
    )


def without_allocator(adapter: str) -> str:
    """Return what to say of an adapter that trains, and that no allocator ranks."""
    return (
        f"AdaLoRA's adapter {adapter!r} trains without a rank allocator, as LoRA of fixed rank: no rank is pruned. "
        "inject_adapter_in_model, add_adapter and mixed models (PeftMixedModel) make none. Use get_peft_model(model, "
        "config), or keep the AdaLoraModel(model, config, adapter_name), and call its update_and_allocate at each step."
    )


def without_model(kind: str) -> str:
    """Return what to say of a model of this class, in which there are AdaLoRA layers, but no ``AdaLoraModel``."""
    return (
        f"a {kind} with AdaLoRA layers but without the AdaLoraModel around them, which holds the rank allocator: give "
        "it the PeftModel (or what wraps it). inject_adapter_in_model, add_adapter and mixed models (PeftMixedModel) "
        "make none, and allocate no ranks: use get_peft_model(model, config), or AdaLoraModel(model, config, "
        "adapter_name)."
    )


def strange_pattern(seen: Seen, config: Any, adapter: str, parameters: Sequence[AdaLoraParameter]) -> Iterator[str]:
    """Say what is strange about the ``rank_pattern`` of this adapter's config, if anything."""
    pattern = config.rank_pattern or {}
    if any(isinstance(ranks, int) for ranks in pattern.values()):
        yield (
            f"AdaLoRA's adapter {adapter!r} has a rank_pattern of numbers, as LoRA takes it. AdaLoRA does not take "
            "one: every module starts with init_r ranks, and save_pretrained fails before the first masking step. "
            "Leave rank_pattern out of the AdaLoraConfig; init_r, target_r and target_modules decide on the ranks."
        )
    elif not seen.own_pattern(pattern, adapter, parameters) and pattern:
        yield anothers_pattern(adapter)


def anothers_pattern(adapter: str) -> str:
    """Return what to say of an adapter whose config object has been through another training."""
    return (
        f"AdaLoRA's adapter {adapter!r} was made with a config that holds the rank_pattern of another training: "
        "PEFT writes it into the config object. Until the first masking step, whatever is saved is cut to those "
        "ranks. Make a new AdaLoraConfig for each training, or set config.rank_pattern = None before "
        "get_peft_model."
    )
