"""DistributedDataParallel with ``find_unused_parameters``: a branch that one process, or none, uses."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from scenarios import TOTAL
from stacks.common import RANK, allocator_state, batch, model_for, run
from torch.nn.parallel import DistributedDataParallel

if TYPE_CHECKING:
    from collections.abc import Callable


def train(used: Callable[[int], bool] = lambda step: True, frozen: tuple[str, ...] = ()) -> dict[str, Any]:
    model = model_for(*frozen).base_model
    ddp = DistributedDataParallel(model, find_unused_parameters=True)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    history = []
    for step in range(1, TOTAL + 1):
        ddp(**batch(step, used(step))).loss.backward()
        optimizer.step()
        model.update_and_allocate(step)
        optimizer.zero_grad()
        history.append(allocator_state(model))
    return {"history": history, "weights": {n: p.detach().clone() for n, p in model.model.named_parameters()}}


def accumulated(synchronised: bool) -> dict[str, Any]:
    """Call the allocator before or after the micro-step in which the gradients are averaged."""
    model = model_for().base_model
    ddp = DistributedDataParallel(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    # E starts as zeros: only after a first step do its gradients, and with them the batches, tell in the scores.
    ddp(**batch(1)).loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    with ddp.no_sync():
        ddp(**batch(2)).loss.backward()
    if synchronised:
        ddp(**batch(3)).loss.backward()
    model.update_and_allocate(1)
    return allocator_state(model)


if __name__ == "__main__":
    run(
        {
            "all used": train,
            "unused on one rank": lambda: train(lambda step: RANK == 0),
            "unused on one rank at a time": lambda: train(lambda step: step % 2 == RANK),
            "unused on both": lambda: train(lambda step: False),
            "unused on both in some steps": lambda: train(lambda step: step % 3 == 0),
            "frozen": lambda: train(frozen=("trunk.0",)),
            "after no_sync": lambda: accumulated(False),
            "after the synchronised step": lambda: accumulated(True),
        }
    )
