"""What the guard puts on parameters: it does not pile up, and does not keep torch from swapping them."""

from __future__ import annotations

import copy
import gc
import weakref
from typing import TYPE_CHECKING, Any

import pytest
import torch
from scenarios import TOTAL, branches, build, loss_of, vectors
from steps import late

if TYPE_CHECKING:
    from collections.abc import Iterator

    import peft

pytestmark = [pytest.mark.peft]


@pytest.fixture
def swapping() -> Iterator[None]:
    """``Module.to`` and ``load_state_dict`` put new tensors in the place of the parameters' own."""
    if not hasattr(torch.__future__, "set_swap_module_params_on_conversion"):
        pytest.skip("this torch cannot swap parameters")
    torch.__future__.set_swap_module_params_on_conversion(True)
    yield
    torch.__future__.set_swap_module_params_on_conversion(False)


@pytest.mark.usefixtures("swapping")
def test_new_model_can_be_converted_where_torch_swaps_parameters() -> None:
    model = build(branches()).to(torch.float64)
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float64}


@pytest.mark.usefixtures("swapping")
def test_model_whose_calls_are_late_can_be_loaded_where_torch_swaps_parameters(
    model: peft.PeftModel, optimizer: torch.optim.Optimizer
) -> None:
    late(model, optimizer, 1, 2, 3)
    model.load_state_dict(copy.deepcopy(model.state_dict()))
    late(model, optimizer, 4)


def test_steps_whose_gradients_are_zero_now_and_then_leave_no_heap_of_hooks(
    model: peft.PeftModel, optimizer: torch.optim.Optimizer
) -> None:
    for step in range(1, TOTAL + 1):
        (loss_of(model, vectors(step), False) * (step % 2)).backward()
        optimizer.step()
        model.base_model.update_and_allocate(step)
        optimizer.zero_grad()
    # At most one for late calls, and one that sees whether the allocator is ever called.
    assert max(len(parameter._backward_hooks or ()) for parameter in model.parameters()) <= 2


class Own(torch.optim.Optimizer):
    """An optimizer that uses torch's name ``found_inf`` for something else."""

    def __init__(self, parameters: Any, found_inf: object) -> None:
        super().__init__(parameters, {})
        self.found_inf = found_inf

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    parameter.sub_(parameter.grad, alpha=0.01)


@pytest.mark.parametrize("found_inf", ["no", {}, [], len, None], ids=repr)
def test_optimizer_that_means_something_else_by_found_inf(model: peft.PeftModel, found_inf: object) -> None:
    late(model, Own(model.parameters(), found_inf), 1, 2, 3)
    assert len(model.base_model.rankallocator.ipt) == 12


def test_parameters_of_a_model_that_was_never_called_go_with_it_without_a_collection() -> None:
    gc.collect()
    gc.disable()
    try:
        model = build(branches())
        for step in (1, 2):
            loss_of(model, vectors(step), False).backward()
        energies = [weakref.ref(parameter) for name, parameter in model.named_parameters() if ".lora_E." in name]
        del model
        assert [energy() for energy in energies] == [None] * len(energies)
    finally:
        gc.enable()
