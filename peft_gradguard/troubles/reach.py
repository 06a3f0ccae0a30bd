"""A loss that does not reach the adapter: it trains on nothing but AdaLoRA's own orthogonal regulariser."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ..errors import are, some_of
from ..model.adapters import checkpoints_without_gradient, idle_layers

if TYPE_CHECKING:
    from ..rules.call import AllocatorCall

IN_A_ROW = 3
"""So many scoring steps without a gradient of any E are no accident."""
TOPIC = "reach"


def warn_of_unreached_adapter(call: AllocatorCall) -> None:
    """Warn where no E has had a gradient for some steps, but an A or B; once more where that comes back."""
    seen, said = call.memory.seen, call.memory.said
    if seen.unreached < IN_A_ROW:
        if not seen.unreached and seen.troubles.pop(TOPIC, None) is not None:
            seen.came_back = True
        return
    if TOPIC not in seen.troubles:
        words = seen.troubles[TOPIC] = (
            f"AdaLoRA's regulariser alone trains adapter {call.memory.adapter!r}; the loss does not reach it. In the "
            f"last {IN_A_ROW} scoring steps (up to step {call.step}) no lora_E got a gradient. {_cause(call)}"
        )
        said.warn_once(f"{TOPIC}, again: {seen.came_back}", "%s", words)


def _cause(call: AllocatorCall) -> str:
    model, adapter = call.view.__wrapped__, call.memory.adapter
    layers = idle_layers(model, (parameter.module for parameter in call.parameters), adapter)
    if layers.merged:
        return (
            f"{some_of(layers.merged)} {are(layers.merged)} merged into the base weights, where no adapter trains: "
            "call model.unmerge_adapter()."
        )
    if layers.disabled:
        return "The adapter is disabled: call model.base_model.enable_adapter_layers()."
    if layers.active:
        other, *_ = layers.active
        return (
            f"The active adapter is {other!r}, which this allocator does not rank: PEFT makes one, for the "
            "first adapter."
        )
    if checkpoints_without_gradient(model):
        return (
            "Gradient checkpointing is reentrant here, and the inputs need no gradient: call "
            "model.enable_input_require_grads(), or give gradient_checkpointing_kwargs={'use_reentrant': False}."
        )
    return (
        "Likely causes: torch.no_grad() or disable_adapter() around the model, a detached output, reentrant "
        "checkpointing. If these layers are unused on purpose, nothing is wrong."
    )
