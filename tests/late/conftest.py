from __future__ import annotations

import gc
from typing import TYPE_CHECKING

import pytest
import torch
from scenarios import branches, build

if TYPE_CHECKING:
    from collections.abc import Callable

    import peft


@pytest.fixture
def listening() -> Callable[[], int]:
    """How many keep the gradients of optimizers; none at first."""
    from peft_gradguard.late import kept, optimizers

    gc.collect()
    before = [listener() for listener in optimizers._listeners]
    found = lambda: [listener() for listener in optimizers._listeners]  # noqa: E731
    return lambda: len([one for one in found() if isinstance(one, kept.KeptGradients) and one not in before])


@pytest.fixture
def model() -> peft.PeftModel:
    return build(branches())


@pytest.fixture
def optimizer(model: peft.PeftModel) -> torch.optim.Optimizer:
    return torch.optim.AdamW(model.parameters(), lr=1e-2)
