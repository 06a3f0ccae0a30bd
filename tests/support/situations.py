"""Small trainings of one layer or two, each of which has a trouble that the guard names, and what they need."""

from __future__ import annotations

import gc
from typing import TYPE_CHECKING, Any

import peft
import torch
from torch import nn
from transformers.modeling_outputs import SequenceClassifierOutput

if TYPE_CHECKING:
    from collections.abc import Callable

torch.set_num_threads(1)

TOTAL, TINIT, TFINAL = 20, 2, 4
FINAL = TOTAL - TFINAL
FOURTEEN = range(1, 15)


def config(**changes: Any) -> peft.AdaLoraConfig:
    settings: dict[str, Any] = {
        "target_modules": ["first", "second"],
        "init_r": 4,
        "target_r": 2,
        "tinit": TINIT,
        "tfinal": TFINAL,
        "deltaT": 1,
        "total_step": TOTAL,
        "lora_alpha": 16,
    }
    return peft.AdaLoraConfig(**{**settings, **changes})


class TwoLayers(nn.Module):
    """Two layers and a head; a loss with labels, to which PEFT adds its regulariser."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second, self.head = nn.Linear(6, 6), nn.Linear(6, 6), nn.Linear(6, 3)
        self.detached = False

    def forward(self, inputs: torch.Tensor, labels: torch.Tensor | None = None) -> SequenceClassifierOutput:
        hidden = self.second(torch.tanh(self.first(inputs)))
        logits = self.head(hidden.detach() if self.detached else hidden)
        loss = None if labels is None else nn.functional.cross_entropy(logits, labels)
        return SequenceClassifierOutput(loss=loss, logits=logits)


def make(adapter: str = "default", **changes: Any) -> peft.PeftModel:
    torch.manual_seed(1)
    return peft.get_peft_model(TwoLayers(), config(**changes), adapter_name=adapter)


def loss_of(model: Any, step: int) -> torch.Tensor:
    """The loss with the regulariser; not by ``model(...)``, which goes around ``AdaLoraModel.forward``."""
    inputs = torch.randn(8, 6, generator=torch.Generator().manual_seed(step))
    return getattr(model, "base_model", model)(inputs, labels=inputs[:, :3].argmax(dim=1)).loss


def outside(model: Any, step: int) -> torch.Tensor:
    """A loss without PEFT's regulariser, which is that of the first adapter."""
    return model(torch.randn(8, 6, generator=torch.Generator().manual_seed(step))).logits.square().mean()


def loss_without(model: Any, step: int, rests: str | None) -> torch.Tensor:
    """A loss of the two layers, of which one may rest."""
    hidden = torch.randn(8, 6, generator=torch.Generator().manual_seed(step))
    for name in ("first", "second"):
        if name != rests:
            hidden = getattr(model.base_model.model, name)(hidden)
    return hidden.square().mean()


def train_with_two(
    model: Any,
    steps: Any = range(1, TOTAL + 1),
    *,
    early: bool = True,
    loss: Callable[[Any, int], torch.Tensor] = loss_of,
    **zero_grad: Any,
) -> None:
    """Train with an optimizer for each layer; ``early``: the first one is cleared before the call."""
    one, other = optimizer_of(model, "first"), optimizer_of(model, "second")
    for step in steps:
        loss(model, step).backward()
        one.step()
        if early:
            one.zero_grad(**zero_grad)
        other.step()
        call(model, step)
        one.zero_grad(**zero_grad)
        other.zero_grad(**zero_grad)


def listening() -> list[Any]:
    """Who listens to the steps of optimizers."""
    from peft_gradguard.late import optimizers

    gc.collect()
    return [one for reference in optimizers._listeners if (one := reference()) is not None]


def optimizer_of(model: nn.Module, part: str = "") -> torch.optim.Optimizer:
    return torch.optim.AdamW([p for n, p in model.named_parameters() if p.requires_grad and part in n], lr=1e-2)


def call(model: Any, step: int) -> None:
    model.base_model.update_and_allocate(step)


def train(
    model: Any,
    steps: Any = range(1, TOTAL + 1),
    *,
    before: Callable[[Any, int], None] = lambda model, step: None,
    allocate: Callable[[Any, int], None] = call,
    order: str = "in time",
    optimizer: torch.optim.Optimizer | None = None,
    loss: Callable[[Any, int], torch.Tensor] = loss_of,
    **zero_grad: Any,
) -> None:
    """Train in the documented order, or call ``before`` the optimizer's step, ``inside`` of it, or ``late``."""
    optimizer = optimizer or optimizer_of(model)
    for step in steps:
        before(model, step)
        if order == "inside":

            def closure(step: int = step) -> None:
                optimizer.zero_grad(**zero_grad)
                loss(model, step).backward()
                allocate(model, step)

            optimizer.step(closure)
            continue
        loss(model, step).backward()
        if order == "before":
            allocate(model, step)
        optimizer.step()
        if order == "in time":
            allocate(model, step)
        optimizer.zero_grad(**zero_grad)
        if order == "late":
            allocate(model, step)
