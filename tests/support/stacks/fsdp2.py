"""FSDP2 (``fully_shard``): the parameters and their gradients are ``DTensor``s wherever the allocator is called."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from scenarios import TOTAL
from stacks.common import allocator_state, batch, model_for, run
from stacks.fsdp1 import step_once, train_ddp
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

if TYPE_CHECKING:
    from collections.abc import Callable


def sharded(model: Any, nested: bool, reshard: bool = True) -> Any:
    mesh = init_device_mesh("cpu", (2,))
    if nested:
        for branch in (model.model.trunk, model.model.branch):
            fully_shard(branch, mesh=mesh, reshard_after_forward=reshard)
    fully_shard(model, mesh=mesh)
    return model


def full(model: Any) -> dict[str, torch.Tensor]:
    return {n: p.full_tensor().detach() for n, p in model.model.named_parameters() if ".lora_" in n}


def train(
    used: Callable[[int], bool] = lambda step: True,
    frozen: tuple[str, ...] = (),
    nested: bool = False,
    regularised: bool = False,
    reshard: bool = True,
    zero_steps: tuple[int, ...] = (),
) -> dict[str, Any]:
    model = sharded(model_for(*frozen).base_model, nested, reshard)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    history = []
    for step in range(1, TOTAL + 1):
        if regularised:
            model(**batch(step, used(step))).loss.backward()
        else:
            step_once(model, step, used(step), 0.0 if step in zero_steps else 1.0)
        optimizer.step()
        model.update_and_allocate(step)
        optimizer.zero_grad()
        history.append(allocator_state(model))
    return {"history": history, "weights": full(model)}


def after_zero_grad() -> None:
    model = sharded(model_for().base_model, False)
    step_once(model, 1, True)
    model.zero_grad()
    model.update_and_allocate(1)


if __name__ == "__main__":
    run(
        {
            "DDP": train_ddp,
            "all used": train,
            "nested": lambda: train(nested=True),
            "regularised": lambda: train(regularised=True),
            "regularised, nested": lambda: train(nested=True, regularised=True),
            "regularised, nested, not resharded": lambda: train(nested=True, regularised=True, reshard=False),
            "frozen": lambda: train(frozen=("trunk.0",)),
            "zero loss": lambda: train(zero_steps=(1, 2, 5)),
            "after zero_grad": after_zero_grad,
            "unused on both": lambda: train(lambda step: False),
        }
    )
