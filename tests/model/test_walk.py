"""The guard's walk over a model yields what torch's own ``named_parameters`` yields, and finds AdaLoRA's in it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from named import Named
from scenarios import SCENARIOS, build
from torch import nn

from peft_gradguard.model.walk import adalora_parameters, named_parameters


def test_adapter_name_is_matched_exactly() -> None:
    model = Named(
        "q.lora_A.default", "q.lora_A.default_eval", "q.lora_A.my.default", "q.lora_A.default.weight",
        "lora_default.bias", "q.ranknum.default", "q.lora_magnitude_vector.default", "q.lora_E.default",
    )  # fmt: skip
    found = [(p.name, p.module, p.factor) for p in adalora_parameters(model, "default")]
    assert found == [("q.lora_A.default", "q", "A"), ("q.lora_E.default", "q", "E")]


def test_adapter_name_may_hold_dots() -> None:
    assert [p.module for p in adalora_parameters(Named("a.q.lora_B.v1.2"), "v1.2")] == ["a.q"]


def assert_walks_alike(model: nn.Module) -> None:
    ours, torchs = list(named_parameters(model)), list(model.named_parameters())
    assert [name for name, _ in ours] == [name for name, _ in torchs]
    assert all(mine is theirs for (_, mine), (_, theirs) in zip(ours, torchs, strict=True))


@pytest.mark.parametrize(
    "name", ["frozen layer", "LayerDrop", "unrouted expert", "head targeted and in modules_to_save"]
)
def test_walk_over_peft_models(name: str) -> None:
    assert_walks_alike(build(SCENARIOS[name]))


def test_shared_missing_and_circular_modules() -> None:
    block = nn.Sequential(nn.Linear(2, 3), nn.ReLU(), nn.Linear(3, 2))
    model = nn.Module()
    model.own = nn.Parameter(torch.zeros(1))
    model.register_parameter("none", None)
    model.register_module("missing", None)
    model.first, model.leaf, model.second, model.same_leaf = block, nn.Linear(2, 2), block, block[0]
    model.tied = nn.Linear(2, 3)
    model.tied.weight = block[0].weight
    model.again = model.own
    block.append(nn.Linear(1, 1))
    block._modules["around"] = model
    assert_walks_alike(model)
    assert len(list(named_parameters(model))) == 10


def test_scripted_module() -> None:
    assert_walks_alike(torch.jit.script(nn.Sequential(nn.Linear(2, 2), nn.Sequential(nn.Linear(2, 2)))))


class Renaming(nn.Linear):
    def named_parameters(self, *args: Any, **kwargs: Any) -> Any:
        return ((f"renamed.{name}", parameter) for name, parameter in super().named_parameters(*args, **kwargs))


class Hiding(nn.Sequential):
    def named_modules(self, *args: Any, **kwargs: Any) -> Any:
        yield kwargs.get("prefix", args[1] if len(args) > 1 else ""), self


def test_models_that_walk_in_their_own_way() -> None:
    assert_walks_alike(Renaming(2, 2))
    assert_walks_alike(Hiding(nn.Linear(2, 2)))
    assert_walks_alike(nn.Sequential(nn.Linear(2, 2), Hiding(nn.Linear(2, 2))))
    assert len(list(named_parameters(nn.Sequential(nn.Linear(2, 2), Hiding(nn.Linear(2, 2)))))) == 2


@pytest.mark.parametrize("place", [nn.Module, "instance"])
def test_patched_walk_is_used(place: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    model = nn.Linear(2, 2)
    target = model if place == "instance" else place
    monkeypatch.setattr(target, "named_parameters", lambda *args, **kwargs: iter([("patched", model.bias)]))
    assert [name for name, _ in named_parameters(model)] == ["patched"]
