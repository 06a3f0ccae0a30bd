"""Reports made by hand, for the tests that draw them."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from peft_gradguard.memory.counts import HistoryPoint
from peft_gradguard.report.facts import AdapterReport, ModuleReport

if TYPE_CHECKING:
    from matplotlib.axes import Axes

STARTED = 12
BERT = ("attention.self.query", "attention.self.key", "attention.self.value", "attention.output.dense",
        "intermediate.dense", "output.dense")  # fmt: skip
LLAMA = (*(f"self_attn.{x}_proj" for x in "qkvo"), "mlp.gate_proj", "mlp.up_proj", "mlp.down_proj")


def module(name: str, kept: int = 5, reason: Any = None, ranked: bool | None = None) -> ModuleReport:
    ranked = reason is None if ranked is None else ranked
    return ModuleReport(name, STARTED, kept if ranked else STARTED, ranked, reason, None, ())


def adapter(modules: list[ModuleReport], **more: Any) -> AdapterReport:
    facts = {"step": 400, "init_budget": 96, "budget": 40, "target_budget": 32, "unranked_ranks": 0, **more}
    return AdapterReport(adapter="default", modules=tuple(modules), **facts)


def stack(layers: int, kinds: tuple[str, ...], front: str = "model.layers", reason: Any = None) -> list[ModuleReport]:
    names = [f"{front}.{layer}.{kind}" for layer in range(layers) for kind in kinds]
    return [module(name, index % (STARTED + 1), reason) for index, name in enumerate(names)]


HEAD = [module("pooler.dense"), module("classifier.out_proj", reason="inside modules_to_save")]
LONG = ("transformer_block_with_a_name.grouped_query_attention.query_key_value_projection_of_the_model",
        "transformer_block_with_a_name.another_feed_forward.query_key_value_projection_of_the_model")  # fmt: skip
PICTURES = {
    "12 modules": stack(6, BERT[:2]),
    "72 modules, several reasons": [
        *stack(10, BERT[:5]),
        *stack(2, BERT, "model.frozen", "frozen"),
        *stack(1, BERT, "model.silent", "no gradient"),
        *stack(1, BERT[:4], "model.mine", "excluded"),
        *HEAD,
    ],
    "224 modules": stack(32, LLAMA),
    "long names": stack(4, LONG),
    "all skipped": stack(12, BERT, reason="frozen"),
    "no layer's number": [module("q"), module("score.dense", 0), module("score.out_proj")],
    "encoder and decoder": [
        *stack(6, ("layer.0.SelfAttention.q", "layer.1.DenseReluDense.wi"), "encoder.block"),
        *stack(6, ("layer.0.SelfAttention.q", "layer.1.EncDecAttention.q"), "decoder.block"),
    ],
    "32 experts": stack(4, tuple(f"moe.experts.{expert}.w{w}" for expert in range(32) for w in (1, 2))),
    "one module": [module("model.layers.0.q", 128)],
}


def labels(axes: Axes) -> list[str]:
    legend = axes.get_legend()
    return [text.get_text() for text in legend.get_texts()] if legend else []


HISTORY = tuple(HistoryPoint(step, 96 - step, 100 - step, 12 * (step % 3 == 0)) for step in range(1, 21))
