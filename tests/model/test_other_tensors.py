"""Gradients and parameters that torch has other forms for: what plain PEFT does with them is done under the guard."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from scenarios import TOTAL, branches, build, loss_of, vectors
from torch import nn
from torch.nn.utils import parametrize

pytestmark = [pytest.mark.peft]


class Half(nn.Module):
    """A parametrization: half of what is kept."""

    def forward(self, kept: torch.Tensor) -> torch.Tensor:
        return kept * 0.5


def train_parametrized(factor: str) -> tuple[dict[str, torch.Tensor], Any]:
    model = build(branches())
    for module in (model.base_model.model.trunk[0], model.base_model.model.branch[2]):
        parametrize.register_parametrization(getattr(module, f"lora_{factor}"), "default", Half())
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for step in range(1, TOTAL + 1):
        loss_of(model, vectors(step), regularised=True).backward()
        optimizer.step()
        model.base_model.update_and_allocate(step)
        optimizer.zero_grad()
    weights = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    return weights, model.peft_config["default"].rank_pattern


@pytest.mark.parametrize("factor", ["A", "B"])
def test_parametrized_factor_trains_as_in_plain_peft(factor: str, plain: Any) -> None:
    weights, pattern = train_parametrized(factor)
    plain_weights, plain_pattern = plain(train_parametrized, factor)
    assert pattern == plain_pattern
    assert weights.keys() == plain_weights.keys()
    assert all(torch.equal(weight, plain_weights[name]) for name, weight in weights.items())


def test_error_for_sparse_gradients_is_pefts_own() -> None:
    model = build(branches())
    loss_of(model, vectors(1), False).backward()
    for parameter in model.parameters():
        if parameter.grad is not None:
            parameter.grad = parameter.grad.to_sparse()
    with pytest.raises(RuntimeError, match="sparse, dense"):
        model.base_model.update_and_allocate(1)
