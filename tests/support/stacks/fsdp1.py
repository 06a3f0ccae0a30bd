"""FullyShardedDataParallel: inside ``summon_full_params``, outside it, and with its flat parameters shown."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from scenarios import TOTAL
from stacks.common import allocator_state, batch, model_for, run
from torch import nn
from torch.distributed.fsdp import FullyShardedDataParallel as FSDP  # noqa: N817
from torch.distributed.fsdp.wrap import ModuleWrapPolicy
from torch.nn.parallel import DistributedDataParallel

if TYPE_CHECKING:
    from collections.abc import Callable


def wrapped(model: nn.Module, nested: bool = False, use_orig_params: bool = True) -> FSDP:
    # Nested, every branch is a unit of its own, and _fsdp_wrapped_module stands in the parameters' names.
    policy = ModuleWrapPolicy({nn.Sequential}) if nested else None
    return FSDP(model, use_orig_params=use_orig_params, auto_wrap_policy=policy, device_id=torch.device("cpu"))


def step_once(fsdp: nn.Module, step: int, used: bool, factor: float = 1.0) -> None:
    # A loss from outside: in nested units the parameters are sharded again where AdaLoraModel.forward regularises them.
    inputs = batch(step, used)
    labels = inputs.pop("labels")
    (nn.functional.cross_entropy(fsdp(**inputs).logits, labels) * factor).backward()


def train(
    used: Callable[[int], bool] = lambda step: True,
    frozen: tuple[str, ...] = (),
    nested: bool = False,
    zero_steps: tuple[int, ...] = (),
) -> dict[str, Any]:
    model = model_for(*frozen).base_model
    fsdp = wrapped(model, nested)
    optimizer = torch.optim.AdamW(fsdp.parameters(), lr=1e-2)
    history = []
    for step in range(1, TOTAL + 1):
        step_once(fsdp, step, used(step), 0.0 if step in zero_steps else 1.0)
        optimizer.step()
        with FSDP.summon_full_params(fsdp, with_grads=True):
            model.update_and_allocate(step)
        optimizer.zero_grad()
        history.append(allocator_state(model))
    with FSDP.summon_full_params(fsdp):
        weights = {n: p.detach().clone() for n, p in model.model.named_parameters() if ".lora_" in n}
    return {"history": history, "weights": weights}


def train_ddp() -> dict[str, Any]:
    model = model_for().base_model
    ddp = DistributedDataParallel(model, find_unused_parameters=True)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    history = []
    for step in range(1, TOTAL + 1):
        step_once(ddp, step, True)
        optimizer.step()
        model.update_and_allocate(step)
        optimizer.zero_grad()
        history.append(allocator_state(model))
    return {"history": history, "weights": {n: p.detach() for n, p in model.model.named_parameters() if ".lora_" in n}}


def outside() -> None:
    model = model_for().base_model
    fsdp = wrapped(model)
    step_once(fsdp, 1, True)
    model.update_and_allocate(1)


def without_gradients() -> None:
    model = model_for().base_model
    fsdp = wrapped(model)
    step_once(fsdp, 1, True)
    with FSDP.summon_full_params(fsdp):
        model.update_and_allocate(1)


def after_zero_grad() -> None:
    model = model_for().base_model
    fsdp = wrapped(model)
    step_once(fsdp, 1, True)
    fsdp.zero_grad()
    with FSDP.summon_full_params(fsdp, with_grads=True):
        model.update_and_allocate(1)


def flat_parameters() -> None:
    model = model_for().base_model
    for parameter in model.parameters():
        parameter.requires_grad = parameter.is_floating_point()
    fsdp = wrapped(model, use_orig_params=False)
    step_once(fsdp, 1, True)
    model.update_and_allocate(1)


if __name__ == "__main__":
    run(
        {
            "DDP": train_ddp,
            "all used": train,
            "nested": lambda: train(nested=True),
            "unused on both": lambda: train(lambda step: False),
            "unused, nested": lambda: train(lambda step: False, nested=True),
            "frozen": lambda: train(frozen=("trunk.0",)),
            "zero loss": lambda: train(zero_steps=(1, 2, 5)),
            "outside": outside,
            "without gradients": without_gradients,
            "after zero_grad": after_zero_grad,
            "flat parameters": flat_parameters,
        }
    )
