"""What PEFT's layers say of themselves: whether they are merged or disabled, and which adapter is active and trains."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    import torch

FACTOR = re.compile(r"\.lora_[ABE]\.(.+)$")


class Layers(NamedTuple):
    """The AdaLoRA layers of an adapter through which nothing trains it, by module name."""

    merged: list[str]
    """Their forward uses the base weights, into which an adapter was merged."""
    disabled: list[str]
    active: tuple[str, ...]
    """The adapters that are active where this one is not."""


def idle_layers(model: torch.nn.Module, modules: Iterable[str], adapter: str) -> Layers:
    """Look at the layers of these names, as they are now."""
    merged, disabled, active = [], [], dict[str, None]()
    for name, layer in _layers(model, dict.fromkeys(modules)):
        if getattr(layer, "merged", False):
            merged.append(name)
        if getattr(layer, "disable_adapters", False):
            disabled.append(name)
        found = getattr(layer, "active_adapters", None) or getattr(layer, "active_adapter", None) or ()
        found = [found] if isinstance(found, str) else list(found)
        if adapter not in found:
            active.update(dict.fromkeys(found))
    return Layers(merged, disabled, tuple(active))


def adapters_that_train(model: torch.nn.Module) -> list[str]:
    """Return the names of the adapters of which any LoRA or AdaLoRA parameter is trainable."""
    found = (FACTOR.search(name) for name, parameter in model.named_parameters() if parameter.requires_grad)
    return list(dict.fromkeys(match[1] for match in found if match))


def checkpoints_without_gradient(model: torch.nn.Module) -> bool:
    """Say whether transformers checkpoints activations in torch's reentrant form, and the inputs need no gradient.

    Torch then gives no gradient to what is inside (``torch.utils.checkpoint``, ``use_reentrant=True``).
    """
    on = (module for module in model.modules() if getattr(module, "gradient_checkpointing", False) is True)
    kept = (getattr(getattr(module, "_gradient_checkpointing_func", None), "keywords", {}) for module in on)
    return any(keywords.get("use_reentrant", True) for keywords in kept) and not _inputs_need_gradient(model)


def _inputs_need_gradient(model: torch.nn.Module) -> bool:
    try:
        embeddings = model.get_input_embeddings()  # type: ignore[operator]
        # enable_input_require_grads() and PEFT's preparations put a hook there.
        return bool(embeddings._forward_hooks) or any(p.requires_grad for p in embeddings.parameters())
    except (AttributeError, NotImplementedError, TypeError):
        return False


def _layers(model: torch.nn.Module, modules: Iterable[str]) -> Iterator[tuple[str, torch.nn.Module]]:
    known = dict(model.named_modules())
    for name in modules:
        # Wrappers such as FSDP's name modules otherwise.
        if name in known:
            yield name, known[name]
