from __future__ import annotations

import gc
from typing import TYPE_CHECKING, Any

import pytest
import torch
from scenarios import branches, build
from torch.optim import optimizer as torch_optimizer

if TYPE_CHECKING:
    from collections.abc import Iterator

    import peft


@pytest.fixture(autouse=True)
def hooks() -> Iterator[dict[int, Any]]:
    """The global optimizer hooks, none at first."""
    hooks = torch_optimizer._global_optimizer_pre_hooks
    gc.collect()
    hooks.clear()
    yield hooks
    hooks.clear()


@pytest.fixture
def model() -> peft.PeftModel:
    return build(branches())


@pytest.fixture
def optimizer(model: peft.PeftModel) -> torch.optim.Optimizer:
    return torch.optim.AdamW(model.parameters(), lr=1e-2)
