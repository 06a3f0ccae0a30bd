"""Reduced precision, compilation, checkpointing and quantised or convolutional layers: right with something to skip."""

from __future__ import annotations

import contextlib
import copy
from typing import TYPE_CHECKING, Any

import peft
import pytest
import torch
import transformers
from scenarios import (
    ATTENTION,
    PEFT_VERSION,
    TARGET_R,
    TOTAL,
    adalora_config,
    branches,
    build,
    frozen,
    opt,
    roberta,
    sequences,
    sometimes,
    tokens,
)
from torch import nn

if TYPE_CHECKING:
    from collections.abc import Callable

pytestmark = pytest.mark.skipif(PEFT_VERSION < (0, 20), reason="once, on a PEFT of today, is enough")


def fit(
    model: nn.Module,
    peft_model: peft.PeftModel,
    batch: Callable[[int], dict[str, Any]],
    autocast: contextlib.AbstractContextManager[Any] | None = None,
) -> dict[str, list[bool]]:
    """Train by calling ``model``, which may be a compiled form of ``peft_model``."""
    optimizer = torch.optim.AdamW([p for p in peft_model.parameters() if p.requires_grad], lr=1e-2)
    for step in range(1, TOTAL + 1):
        with copy.copy(autocast) if autocast else contextlib.nullcontext():
            inputs = batch(step)
            labels = inputs.pop("labels")
            output = model(**inputs).logits.float()
            loss = nn.functional.cross_entropy(output.reshape(-1, output.shape[-1]), labels.reshape(-1))
        loss.backward()
        optimizer.step()
        peft_model.base_model.update_and_allocate(step)
        optimizer.zero_grad()
    pattern = peft_model.peft_config["default"].rank_pattern
    assert sum(map(sum, pattern.values())) == TARGET_R * len(pattern)
    return pattern


def classifier() -> peft.PeftModel:
    torch.manual_seed(0)
    model = peft.get_peft_model(roberta(), adalora_config(target_modules=ATTENTION, task_type="SEQ_CLS"))
    frozen("layer.0.")(model, 0)
    return model


def assert_without_first_layer(pattern: dict[str, list[bool]]) -> None:
    assert len(pattern) == 4
    assert not [name for name in pattern if "layer.0." in name]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_parameters_in_another_precision(dtype: torch.dtype) -> None:
    model = classifier().to(dtype)
    assert_without_first_layer(fit(model, model, tokens))
    assert {score.dtype for score in model.base_model.rankallocator.ipt.values()} <= {dtype}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast(dtype: torch.dtype) -> None:
    model = classifier()
    assert_without_first_layer(fit(model, model, tokens, torch.autocast("cpu", dtype=dtype)))


@pytest.mark.parametrize("reentrant", [True, False])
def test_gradient_checkpointing(reentrant: bool) -> None:
    model = classifier()
    model.get_base_model().gradient_checkpointing_enable({"use_reentrant": reentrant})
    model.get_base_model().enable_input_require_grads()
    model.train()
    assert_without_first_layer(fit(model, model, tokens))


def test_compiled_model() -> None:
    model = build(branches())
    frozen("trunk.0")(model, 0)
    compiled = torch.compile(model, backend="aot_eager")
    pattern = fit(compiled, model, sometimes)
    assert sorted(name.split(".lora_E")[0] for name in pattern) == ["branch.0", "branch.2", "trunk.2"]


def test_compiled_inner_model() -> None:
    model = build(branches())
    frozen("trunk.0")(model, 0)
    model.base_model.model = torch.compile(model.base_model.model, backend="aot_eager")
    pattern = fit(model.base_model, model, sometimes)
    assert len(pattern) == 3


class Convolutions(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(1, 8, 3), nn.Conv2d(8, 8, 3)
        self.head = nn.Linear(8, 3)

    def forward(self, pixels: torch.Tensor) -> Any:
        hidden = self.second(torch.tanh(self.first(pixels))).mean(dim=(2, 3))
        return transformers.modeling_outputs.SequenceClassifierOutput(logits=self.head(hidden))


def images(step: int) -> dict[str, Any]:
    pixels = torch.randn(6, 1, 8, 8, generator=torch.Generator().manual_seed(step))
    return {"pixels": pixels, "labels": (pixels.mean(dim=(1, 2, 3)) > 0).long()}


def test_convolutions() -> None:
    torch.manual_seed(0)
    model = peft.get_peft_model(Convolutions(), adalora_config(target_modules=["first", "second"]))
    frozen("first")(model, 0)
    assert list(fit(model, model, images)) == ["second.lora_E.default"]


@pytest.mark.parametrize("bits", [8, 4])
def test_quantised_base(bits: int) -> None:
    pytest.importorskip("bitsandbytes")
    torch.manual_seed(0)
    # Where the processor computes in bf16, bitsandbytes packs 4 bit weights in blocks of 64.
    base = opt(hidden=64)
    folder_config = transformers.BitsAndBytesConfig(load_in_8bit=bits == 8, load_in_4bit=bits == 4)
    base = quantised(base, folder_config)
    model = peft.get_peft_model(base, adalora_config(target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM"))
    assert {type(m).__name__ for m in model.modules() if type(m).__name__.startswith("SVDLinear")} == {
        f"SVDLinear{'8bitLt' if bits == 8 else '4bit'}"
    }
    frozen("layers.0.")(model, 0)
    pattern = fit(model, model, sequences)
    assert len(pattern) == 6


def quantised(model: nn.Module, config: transformers.BitsAndBytesConfig) -> nn.Module:
    """Save and load again under bitsandbytes, as one does with a hub's model."""
    import tempfile

    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        try:
            return transformers.AutoModelForCausalLM.from_pretrained(
                folder, quantization_config=config, device_map="cpu", dtype=torch.float32
            )
        except (ImportError, RuntimeError, ValueError) as error:
            pytest.skip(f"bitsandbytes does not run here: {error}")
