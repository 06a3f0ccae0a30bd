"""Gradients and parameters that torch has other forms for: what plain PEFT does with them is done under the guard."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
import torch
from scenarios import TOTAL, branches, build, loss_of, vectors
from torch import nn
from torch.nn.utils import parametrize

if TYPE_CHECKING:
    import peft

pytestmark = [pytest.mark.peft]


class Half(nn.Module):
    """A parametrization: half of what is kept."""

    def forward(self, kept: torch.Tensor) -> torch.Tensor:
        return kept * 0.5


class Flat(nn.Module):
    """A parametrization: a vector is kept in the place of the matrix."""

    def __init__(self, shape: torch.Size) -> None:
        super().__init__()
        self.shape = shape

    def forward(self, kept: torch.Tensor) -> torch.Tensor:
        return kept.view(self.shape)

    def right_inverse(self, matrix: torch.Tensor) -> torch.Tensor:
        return matrix.flatten()


def parametrized(factor: str, flat: bool = False) -> peft.PeftModel:
    """Build a model in which two of the modules have a parametrized factor."""
    model = build(branches())
    for module in (model.base_model.model.trunk[0], model.base_model.model.branch[2]):
        factors = getattr(module, f"lora_{factor}")
        parametrize.register_parametrization(factors, "default", Flat(factors["default"].shape) if flat else Half())
    return model


def train_parametrized(factor: str, flat: bool) -> tuple[dict[str, torch.Tensor], Any]:
    model = parametrized(factor, flat)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for step in range(1, TOTAL + 1):
        # PEFT's regulariser needs matrices.
        loss_of(model, vectors(step), regularised=not flat).backward()
        optimizer.step()
        model.base_model.update_and_allocate(step)
        optimizer.zero_grad()
    weights = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    return weights, model.peft_config["default"].rank_pattern


@pytest.mark.parametrize("flat", [False, True], ids=["half", "flat"])
@pytest.mark.parametrize("factor", ["A", "B"])
def test_parametrized_factor_trains_as_in_plain_peft(factor: str, flat: bool, plain: Any) -> None:
    weights, pattern = train_parametrized(factor, flat)
    plain_weights, plain_pattern = plain(train_parametrized, factor, flat)
    assert pattern == plain_pattern
    assert weights.keys() == plain_weights.keys()
    assert all(torch.equal(weight, plain_weights[name]) for name, weight in weights.items())


def test_module_whose_only_trainable_matrix_is_parametrized_keeps_its_rank() -> None:
    """PEFT finds no matrix of it to rank by."""
    model = parametrized("A")
    model.base_model.model.trunk[0].lora_B["default"].requires_grad_(False)
    for step in range(1, TOTAL + 1):
        loss_of(model, vectors(step), regularised=True).backward()
        model.base_model.update_and_allocate(step)
    pattern = model.peft_config["default"].rank_pattern
    assert pattern
    assert not [name for name in pattern if ".trunk.0." in f".{name}"]


@pytest.mark.fails_in_silence
def test_error_for_sparse_gradients_is_pefts_own() -> None:
    model = build(branches())
    loss_of(model, vectors(1), False).backward()
    for parameter in model.parameters():
        if parameter.grad is not None:
            parameter.grad = parameter.grad.to_sparse()
    with pytest.raises(RuntimeError, match="sparse, dense"):
        model.base_model.update_and_allocate(1)
