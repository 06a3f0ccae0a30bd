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
    """How many listen to the steps of optimizers; none at first."""
    from peft_gradguard.late import optimizers

    gc.collect()
    before = [listener() for listener in optimizers._listeners]
    return lambda: len([one for one in optimizers._listeners if one() is not None and one() not in before])


@pytest.fixture
def model() -> peft.PeftModel:
    return build(branches())


@pytest.fixture
def optimizer(model: peft.PeftModel) -> torch.optim.Optimizer:
    return torch.optim.AdamW(model.parameters(), lr=1e-2)
