"""Rule 10: what was frozen before ``disable_adapter()`` is frozen after it.

PEFT disables a layer by freezing all of its adapters, and enables it by thawing the active ones, whatever they were
before (``BaseTunerLayer.enable_adapters``). Whoever disables adapters comes by there: ``PeftModel.disable_adapter``,
mixed models, transformers' own methods, and ``disable_adapter_layers`` called by hand.
"""

from __future__ import annotations

import weakref
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    from collections.abc import Iterator

    import torch
    from peft.tuners.adalora import AdaLoraLayer

    Flags = dict[tuple[str, str], bool]
    """``requires_grad`` by factor and adapter."""


class Before(NamedTuple):
    """What a layer was like before it was disabled."""

    flags: Flags
    active: list[str]
    times: int
    """How often it was disabled and not yet enabled: blocks nest, and older PEFT enables at the end of each."""


_before: weakref.WeakKeyDictionary[AdaLoraLayer, Before] = weakref.WeakKeyDictionary()


def note_disabling(layer: AdaLoraLayer) -> None:
    """Remember what ``requires_grad`` is, before PEFT disables this layer."""
    before = _before.get(layer)
    if not layer.disable_adapters:
        _before[layer] = Before(flags_of(layer), _active(layer), before.times + 1 if before else 1)
    elif before is not None:
        _before[layer] = before._replace(times=before.times + 1)


def undo_thawing(layer: AdaLoraLayer, meanwhile: Flags) -> None:
    """After PEFT has enabled this layer, set ``requires_grad`` to what it was before it was disabled.

    ``meanwhile``: what it was just before PEFT has enabled it. What was True in a disabled layer was set on purpose.
    """
    before = _before.get(layer)
    if before is None:
        return
    if before.times > 1:
        _before[layer] = before._replace(times=before.times - 1)
    else:
        del _before[layer]
    # Who has activated another adapter meanwhile has asked for just what PEFT makes of it.
    if before.active == _active(layer):
        for key, parameter in _parameters(layer):
            was = before.flags.get(key, parameter.requires_grad) or meanwhile.get(key, False)
            if parameter.requires_grad != was:
                parameter.requires_grad_(was)


def flags_of(layer: AdaLoraLayer) -> Flags:
    """Return what ``requires_grad`` is now, by factor and adapter."""
    return {key: parameter.requires_grad for key, parameter in _parameters(layer)}


def _parameters(layer: AdaLoraLayer) -> Iterator[tuple[tuple[str, str], torch.nn.Parameter]]:
    for factor in ("lora_A", "lora_B", "lora_E"):
        for adapter, parameter in getattr(layer, factor).items():
            yield (factor, adapter), parameter


def _active(layer: AdaLoraLayer) -> list[Any]:
    return list(layer.active_adapters)
