"""Who listens to optimizers: nobody in the documented order, and nobody whose model has gone."""

from __future__ import annotations

import gc
import weakref
from typing import TYPE_CHECKING, Any

import pytest
import torch
from scenarios import FINALISING, TOTAL, branches, build, frozen, loss_of, sometimes, vectors
from steps import late_step

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    import peft

pytestmark = [pytest.mark.peft]


@pytest.mark.parametrize("frozen_part", ["", "trunk.0"])
def test_loop_in_the_documented_order_listens_to_no_optimizer(
    model: peft.PeftModel, optimizer: torch.optim.Optimizer, listening: Callable[[], int], frozen_part: str
) -> None:
    if frozen_part:
        frozen(frozen_part)(model, 0)
    for step in range(1, TOTAL + 1):
        loss_of(model, sometimes(step), False).backward()
        gradient = weakref.ref(next(p.grad for p in model.parameters() if p.grad is not None))
        optimizer.step()
        model.base_model.update_and_allocate(step)
        optimizer.zero_grad()
        assert gradient() is None
        assert not listening()


class Collecting(list[Any]):
    """Parameter groups that bring a garbage collection on whoever looks at them."""

    def __iter__(self) -> Iterator[Any]:
        gc.collect()
        return super().__iter__()


@pytest.mark.parametrize("steps", [0, 1, 2])
def test_model_that_goes_away_amid_the_hooks_of_another_one(steps: int, listening: Callable[[], int]) -> None:
    gc.disable()
    try:
        gone, model = build(branches()), build(branches())
        for one, count in ((gone, steps), (model, 1)):
            optimizer = torch.optim.AdamW(one.parameters(), lr=1e-2)
            for step in range(1, count + 1):
                late_step(one, optimizer, step)
        alive = weakref.ref(gone.base_model.rankallocator)
        gone.holder = [gone]
        del gone, one
        optimizer.param_groups = Collecting(optimizer.param_groups)
        loss_of(model, vectors(2), False).backward()
        assert alive() is not None
        optimizer.step()
        assert alive() is None
        model.base_model.update_and_allocate(2)
        model.base_model.update_and_allocate(FINALISING)
        assert not listening()
    finally:
        gc.enable()
