"""DeepSpeed's ZeRO: the documented place for the call, and the wrong ones. Arguments: the stage, then the cases."""

from __future__ import annotations

from contextlib import nullcontext
from typing import TYPE_CHECKING, Any

import deepspeed
import torch
from scenarios import TOTAL
from stacks.common import ARGUMENTS, TIMEOUT, allocator_state, batch, model_for, run
from stacks.uncompiled import leave_out_shared_memory
from transformers.integrations import HfDeepSpeedConfig

if TYPE_CHECKING:
    from collections.abc import Callable
    from contextlib import AbstractContextManager

STAGE = int(ARGUMENTS[0])
CASES = ARGUMENTS[1:]
CONFIG: dict[str, Any] = {
    "train_micro_batch_size_per_gpu": 6,
    "gradient_accumulation_steps": 1,
    "zero_optimization": {"stage": STAGE, "stage3_param_persistence_threshold": 0},
    "zero_allow_untested_optimizer": True,
}
alive: list[HfDeepSpeedConfig] = []
"""PEFT asks transformers for the configuration, which transformers remembers weakly."""


def start(*frozen: str, remembered: bool = True, **changes: Any) -> tuple[Any, Any]:
    """Return the engine and the model whose allocator is called."""
    config = {**CONFIG, **changes}
    alive[:] = [HfDeepSpeedConfig(config)] if remembered else []
    model = model_for(*frozen).base_model
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=config)
    return engine, model


def adapter(model: Any) -> list[torch.nn.Parameter]:
    return [parameter for name, parameter in model.named_parameters() if ".lora_" in name]


def whole(model: Any) -> AbstractContextManager[None]:
    if STAGE < 3:
        return nullcontext()
    return deepspeed.zero.GatheredParameters(adapter(model), modifier_rank=0)


def energies(model: Any) -> dict[str, torch.Tensor]:
    with whole(model):
        return {n: p.detach().clone() for n, p in model.model.named_parameters() if n.endswith(".lora_E.default")}


def weights(model: Any) -> dict[str, torch.Tensor]:
    with whole(model):
        return {n: p.detach().clone() for n, p in model.model.named_parameters() if ".lora_" in n}


def train(used: Callable[[int], bool] = lambda step: True, frozen: tuple[str, ...] = ()) -> dict[str, Any]:
    engine, model = start(*frozen)
    history, masked, stepped = [], [], []
    for step in range(1, TOTAL + 1):
        engine.backward(engine(**batch(step, used(step))).loss)
        with whole(model):
            model.update_and_allocate(step)
        masked.append(energies(model))
        engine.step()
        stepped.append(energies(model))
        history.append(allocator_state(model))
    return {"history": history, "weights": weights(model), "masked": masked, "stepped": stepped}


def after_step() -> None:
    engine, model = start()
    engine.backward(engine(**batch(1)).loss)
    engine.step()
    with whole(model):
        model.update_and_allocate(1)


def in_the_middle_of_accumulation() -> dict[str, Any]:
    engine, model = start(gradient_accumulation_steps=2)
    # One optimizer step first: while E is zero, as PEFT starts it, no score shows which gradients it was made of.
    for micro_batch in (1, 2, 3):
        engine.backward(engine(**batch(micro_batch)).loss)
        engine.step()
    with whole(model):
        model.update_and_allocate(1)
    return allocator_state(model)


def at_the_accumulation_boundary() -> dict[str, Any]:
    engine, model = start(gradient_accumulation_steps=2)
    engine.backward(engine(**batch(1)).loss)
    engine.step()
    engine.backward(engine(**batch(2)).loss)
    with whole(model):
        model.update_and_allocate(1)
    engine.step()
    return allocator_state(model)


def through_accelerate() -> None:
    import accelerate

    engine, model = start()
    wrapper = accelerate.utils.DeepSpeedEngineWrapper(engine)
    wrapper.backward(engine(**batch(1)).loss)
    with whole(model):
        model.update_and_allocate(1)


def not_gathered() -> None:
    engine, model = start()
    engine.backward(engine(**batch(1)).loss)
    model.update_and_allocate(1)


def not_remembered() -> None:
    # A loss from outside: under ZeRO 3 the regulariser in AdaLoraModel.forward already fails without the configuration.
    engine, model = start(remembered=False)
    inputs = batch(1)
    labels = inputs.pop("labels")
    engine.backward(torch.nn.functional.cross_entropy(engine(**inputs).logits, labels))
    with whole(model):
        model.update_and_allocate(1)


# A branch that only some processes use is not among them: ZeRO itself then waits for the others in a collective.
ALL: dict[str, Callable[[], Any]] = {
    "all used": train,
    "unused on both": lambda: train(lambda step: False),
    "frozen": lambda: train(frozen=("trunk.0",)),
    "accumulation boundary": at_the_accumulation_boundary,
    "not gathered": not_gathered,
    "not remembered": not_remembered,
    "in the middle of accumulation": in_the_middle_of_accumulation,
    "through accelerate": through_accelerate,
    "after step": after_step,
}

if __name__ == "__main__":
    leave_out_shared_memory()
    deepspeed.init_distributed("gloo", timeout=TIMEOUT)
    run({name: ALL[name] for name in CASES or ALL})
