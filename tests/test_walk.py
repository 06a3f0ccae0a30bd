"""The guard's walk over a model yields what torch's own ``named_parameters`` yields."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from peft_gradguard.walk import named_parameters
from scenarios import SCENARIOS, build
from torch import nn


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
