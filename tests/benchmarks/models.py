"""Models to measure allocator steps on: real structures, the base weights without memory (on torch's meta device).

An allocator step looks at AdaLoRA's parameters and their gradients only, so no forward and no backward is run.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import TYPE_CHECKING

import peft
import torch
import transformers
from torch import nn

if TYPE_CHECKING:
    from collections.abc import Callable

ORDINARY, MASKING = 101, 110
"""Two steps between warm-up and the final phase: one that scores, and one that masks as well."""


def bert() -> nn.Module:
    return transformers.BertForSequenceClassification(transformers.BertConfig(vocab_size=100))


def llama(layers: int, hidden: int, intermediate: int) -> nn.Module:
    config = transformers.LlamaConfig(
        vocab_size=100, hidden_size=hidden, intermediate_size=intermediate, num_hidden_layers=layers,
        num_attention_heads=32, num_key_value_heads=8,
    )  # fmt: skip
    return transformers.LlamaForCausalLM(config)


BERT_LINEARS = r"(query|key|value|output\.dense|intermediate\.dense)"
LLAMA_LINEARS = r"(q_proj|k_proj|v_proj|o_proj|gate_proj|up_proj|down_proj)"


@dataclass(frozen=True)
class Shape:
    """What is measured, and how often in each process."""

    title: str
    base: Callable[[], nn.Module]
    layers: int
    targets: str
    """The end of the targeted modules' names, a regular expression."""
    ordinary: int
    masking: int

    def frozen_layers(self, percent: int) -> int:
        return min(round(self.layers * percent / 100), self.layers - 1)


def narrow(layers: int, title: str = "", ordinary: int = 15, masking: int = 8) -> Shape:
    title = title or f"{layers} narrow layers, {7 * layers} modules"
    return Shape(title, lambda: llama(layers, 64, 96), layers, LLAMA_LINEARS, ordinary, masking)


SHAPES = {
    "bert": Shape("BERT-base, 72 modules", bert, 12, BERT_LINEARS, 25, 12),
    "llama": narrow(32, "Llama-8B, narrow, 224 modules"),
    "wide": Shape("Llama-8B, real widths, 224 modules", lambda: llama(32, 4096, 14336), 32, LLAMA_LINEARS, 7, 5),
    "many": narrow(286, "286 narrow layers, 2002 modules", 5, 3),
}
GROWTH = (4, 16, 64)
"""Further numbers of narrow layers."""


def build(shape: Shape, without: int = 0) -> peft.PeftModel:
    """Adapt all layers but the first ``without``, every parameter with a gradient."""
    adapted = "|".join(str(layer) for layer in range(without, shape.layers))
    config = peft.AdaLoraConfig(
        init_r=12, target_r=8, tinit=50, tfinal=50, deltaT=10, total_step=1000,
        target_modules=rf".*layers?\.({adapted})\..*{shape.targets}",
    )  # fmt: skip
    with torch.device("meta"):
        model = peft.get_peft_model(shape.base(), config)
    torch.manual_seed(0)
    for dictionary in model.modules():
        if isinstance(dictionary, nn.ParameterDict):
            for adapter, parameter in dictionary.items():
                values = torch.randn(parameter.shape, device="cpu")
                dictionary[adapter] = nn.Parameter(values, requires_grad=parameter.requires_grad)
    for parameter in adalora_parameters(model):
        parameter.grad = torch.randn_like(parameter)
    return model


def adalora_parameters(model: nn.Module) -> list[nn.Parameter]:
    return [p for name, p in model.named_parameters() if re.search(r"\.lora_[ABE]\.default$", name)]


def freeze(model: nn.Module, layers: int) -> None:
    """Freeze the adapters of the first layers."""
    for name, parameter in model.named_parameters():
        layer = re.search(r"layers?\.(\d+)\..*lora_[ABE]\.", name)
        if layer and int(layer[1]) < layers:
            parameter.requires_grad_(False)
            parameter.grad = None
