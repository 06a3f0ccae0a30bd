"""Single allocator steps, made by hand, and what is left by them. Knows nothing of the guard."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from scenarios import branches, build, loss_of, vectors

if TYPE_CHECKING:
    import peft
    from peft.tuners.adalora import RankAllocator
    from scenarios import Scenario


def new_model(kind: type[RankAllocator] | None = None, scenario: Scenario | None = None) -> peft.PeftModel:
    """A model whose energies are not all zero, as PEFT starts them, so that masks can be seen without training."""
    model = build(scenario or branches())
    if kind is not None:
        model.base_model.rankallocator = kind(model.base_model.model, model.peft_config["default"], "default")
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if ".lora_E." in name:
                parameter.normal_()
    return model


def backward(model: peft.PeftModel, step: int, **batch: Any) -> None:
    """One step's gradients and nothing else. The loss is computed outside: an unused branch then gets none at all."""
    model.zero_grad()
    loss_of(model, vectors(step, **batch), regularised=False).backward()


def advance(model: peft.PeftModel, *steps: int, optimise: bool = False, **batch: Any) -> None:
    """Allocator steps with the gradients there; the weights stay as they are unless they are to be optimised."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2) if optimise else None
    for step in steps:
        backward(model, step, **batch)
        if optimizer:
            optimizer.step()
        model.base_model.update_and_allocate(step)


def late_step(model: peft.PeftModel, optimizer: torch.optim.Optimizer, step: int, **batch: Any) -> None:
    """A step of a loop that calls after ``zero_grad``."""
    loss_of(model, vectors(step, **batch), regularised=False).backward()
    optimizer.step()
    optimizer.zero_grad()
    model.base_model.update_and_allocate(step)


def late(model: peft.PeftModel, optimizer: torch.optim.Optimizer, *steps: int) -> None:
    for step in steps:
        late_step(model, optimizer, step)


def pattern(model: peft.PeftModel) -> dict[str, list[bool]] | None:
    return model.peft_config["default"].rank_pattern


def kept_ranks(model: peft.PeftModel) -> int:
    return sum(map(sum, model.peft_config["default"].rank_pattern.values()))


def energy(model: peft.PeftModel, module: str) -> torch.nn.Parameter:
    return model.get_parameter(f"base_model.model.{module}.lora_E.default")


def state_of(allocator: RankAllocator) -> dict[str, Any]:
    scores = {name: dict(getattr(allocator, name)) for name in ("ipt", "exp_avg_ipt", "exp_avg_unc")}
    return {**scores, "budget": (allocator.init_bgt, allocator.target_bgt, list(allocator.name_set))}


def same_state(one: dict[str, Any], other: dict[str, Any]) -> bool:
    """The same tensors, not only equal ones; of ``ipt``, which PEFT computes anew before reading it, the same names."""
    return (
        one["budget"] == other["budget"]
        and one["ipt"].keys() == other["ipt"].keys()
        and all(
            one[name].keys() == other[name].keys() and all(one[name][key] is other[name][key] for key in one[name])
            for name in ("exp_avg_ipt", "exp_avg_unc")
        )
    )
