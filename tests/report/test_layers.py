"""Names of modules: their kind and their layer, and short labels."""

from __future__ import annotations

import pytest

from peft_gradguard.report.layers import Place, places, short_labels


@pytest.mark.parametrize(
    ("name", "kind", "layer"),
    [
        ("q", "q", None),
        ("", "", None),
        ("layers.12.q", "layers.*.q", 12),
        ("h.3.c_attn", "h.*.c_attn", 3),
        ("encoder.layer.3.q", "encoder.layer.*.q", 3),
        ("visual.transformer.resblocks.3.q", "visual.transformer.resblocks.*.q", 3),
        ("decoder_layers.3.q", "decoder_layers.*.q", 3),
        ("albert_layer_groups.0.albert_layers.2.q", "albert_layer_groups.0.albert_layers.*.q", 2),
        ("block.3.layer.1.q", "block.*.layer.1.q", 3),
        ("down_blocks.2.attentions.1.q", "down_blocks.*.attentions.1.q", 2),
        ("layers.2b.03.q", "layers.2b.03.q", None),
        ("layer1.fc2.w-3", "layer1.fc2.w-3", None),
        # Parts of an nn.Sequential, and matrices in a list of them.
        ("0.q", "0.q", None),
        ("coarse_branch.2", "coarse_branch.2", None),
        ("head.1.dense", "head.1.dense", None),
        ("layers.2", "layers.2", None),
        # Experts.
        ("experts.3.w", "experts.3.w", None),
        ("expert_layers.3.w", "expert_layers.3.w", None),
        ("layers.2.experts.3.w", "layers.*.experts.3.w", 2),
        ("h", "h", None),
        ("width.3.q", "width.3.q", None),
    ],
)
def test_place(name: str, kind: str, layer: int | None) -> None:
    assert places([name]) == {name: Place(kind, layer)}


PLACES: dict[str, dict[str, tuple[str, int | None]]] = {
    "a model in a Sequential": {
        "0.model.layer.7.q": ("0.model.layer.*.q", 7),
        "0.model.layer.8.q": ("0.model.layer.*.q", 8),
        "0.model.layer.8.k": ("0.model.layer.*.k", 8),
        "0.model.pooler": ("0.model.pooler", None),
        "2.linear": ("2.linear", None),
    },
    "a model in a block": {
        "block.0.model.layers.7.q": ("block.0.model.layers.*.q", 7),
        "block.0.model.layers.8.q": ("block.0.model.layers.*.q", 8),
    },
    "experts in layers": {
        "layers.0.experts.0.w": ("layers.*.experts.0.w", 0),
        "layers.0.experts.1.w": ("layers.*.experts.1.w", 0),
        "layers.1.experts.1.w": ("layers.*.experts.1.w", 1),
    },
    "stages of blocks": {
        "layers.0.blocks.1.q": ("layers.*.blocks.1.q", 0),
        "layers.2.blocks.1.q": ("layers.*.blocks.1.q", 2),
        "layers.2.blocks.5.q": ("layers.*.blocks.5.q", 2),
    },
    "one block, of unlike layers": {
        "block.0.layer.0.q": ("block.*.layer.0.q", 0),
        "block.0.layer.1.wi": ("block.*.layer.1.wi", 0),
    },
    "a Sequential beside layers": {
        "layers.0.q": ("layers.*.q", 0),
        "trunk.0": ("trunk.0", None),
        "trunk.2": ("trunk.2", None),
        "head": ("head", None),
    },
}


@pytest.mark.parametrize("case", PLACES)
def test_places_of_several(case: str) -> None:
    assert places(PLACES[case]) == {name: Place(*expected) for name, expected in PLACES[case].items()}


@pytest.mark.parametrize(
    "labels",
    [
        {},
        {"q": "q"},
        {"layers.*.attn.q": "q", "layers.*.attn.k": "k"},
        {"layers.*.attn.dense": "attn.dense", "layers.*.mlp.dense": "mlp.dense", "layers.*.q": "q"},
        {"encoder.*.q": "encoder.*.q", "decoder.*.q": "decoder.*.q"},
        {"trunk.*": "trunk.*", "branch.*": "branch.*"},
        {"experts.0.w": "experts.0.w", "experts.1.w": "experts.1.w"},
        {"experts.0": "experts.0", "gate.1": "gate.1"},
        {"dense": "dense", "pooler.dense": "pooler.dense"},
        {"*": "*", "*.q": "q"},
        {"model.layers.*": "layers.*", "model.blocks.*": "blocks.*"},
        {"model.layers.*.q": "layers.*.q", "model.head.q": "head.q"},
        {"layers.*.#": "#"},
        {"a.b.c": "a.b.c", "x.a.b.c": "x.a.b.c", "b.c": "b.c"},
    ],
)
def test_short_labels(labels: dict[str, str]) -> None:
    assert short_labels(labels) == labels
    assert short_labels([*labels, *labels]) == labels
