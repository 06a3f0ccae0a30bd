"""A loss that does not reach the adapter: named after three steps in a row, with the cause that can be seen."""

from __future__ import annotations

from functools import partial
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import peft
import pytest
import torch
from situations import TOTAL, TwoLayers, config, loss_of, make, optimizer_of, train

import peft_gradguard

if TYPE_CHECKING:
    from collections.abc import Callable

pytestmark = pytest.mark.peft

PEFT_VERSION = tuple(int(part) for part in peft.__version__.split(".")[:2])
NAMED = "the loss does not reach it"


def detached(model: Any, step: int, steps: range) -> None:
    model.base_model.model.detached = step in steps


def named(said: Callable[[], list[str]]) -> list[str]:
    return [text for text in said() if NAMED in text]


def test_detached_output_is_named_at_the_third_step(said: Callable[[], list[str]]) -> None:
    model = make()
    model.base_model.model.detached = True
    train(model, range(1, 3))
    assert not named(said)
    train(model, range(3, 9))
    assert len(named(said)) == 1
    assert "adapter 'default'" in named(said)[0]
    assert "(up to step 3)" in named(said)[0]
    assert "a detached output" in named(said)[0]
    assert peft_gradguard.report(model).adapters[0].advice == (named(said)[0],)


@pytest.mark.parametrize(("rests", "times"), [(2, 0), (3, 1)])
def test_two_steps_in_a_row_are_no_trouble(said: Callable[[], list[str]], rests: int, times: int) -> None:
    train(make(), before=partial(detached, steps=range(6, 6 + rests)))
    assert len(named(said)) == times


def test_one_layer_that_is_reached_is_enough(said: Callable[[], list[str]]) -> None:
    model = make()
    train(model, loss=lambda model, step: _first_rests(model, step))
    assert not named(said)


def _first_rests(model: Any, step: int) -> torch.Tensor:
    """The first layer is left out of the loss, and gets the regulariser's gradient only."""
    inputs = torch.randn(8, 6, generator=torch.Generator().manual_seed(step))
    with torch.no_grad():
        hidden = torch.tanh(model.base_model.model.first(inputs))
    second = model.base_model.model.second(hidden)
    regulariser = sum(p.square().sum() for n, p in model.named_parameters() if "lora_A" in n or "lora_B" in n)
    return second.square().mean() + 1e-3 * regulariser


def test_it_is_said_again_once_where_it_comes_back(said: Callable[[], list[str]]) -> None:
    model = make(total_step=60)
    for begin in (3, 10, 20):
        train(model, range(begin, begin + 7), before=partial(detached, steps=range(begin, begin + 4)))
    assert len(named(said)) == 2
    assert peft_gradguard.report(model).adapters[0].advice == ()


@pytest.mark.parametrize("zero_grad", [{}, {"set_to_none": False}])
def test_merged_layers_are_named(said: Callable[[], list[str]], zero_grad: dict[str, Any]) -> None:
    model = make()
    optimizer = optimizer_of(model)
    train(model, range(1, 4), optimizer=optimizer, **zero_grad)
    model.merge_adapter()
    train(model, range(4, 9), optimizer=optimizer, **zero_grad)
    assert len(named(said)) == 1
    assert "first and second are merged into the base weights" in named(said)[0]
    assert "unmerge_adapter()" in named(said)[0]


def test_disabled_adapter_whose_parameters_were_thawed_is_named(said: Callable[[], list[str]]) -> None:
    model = make()
    model.base_model.disable_adapter_layers()
    for name, parameter in model.named_parameters():
        parameter.requires_grad = ".lora_" in name
    train(model, range(1, 6))
    assert len(named(said)) == 1
    assert "The adapter is disabled: call model.base_model.enable_adapter_layers()." in named(said)[0]


@pytest.mark.skipif(PEFT_VERSION < (0, 6), reason="PEFT 0.5 freezes no disabled adapter")
def test_disabled_adapter_is_named_at_once() -> None:
    model = make()
    optimizer = optimizer_of(model)
    model.base_model.disable_adapter_layers()
    model.base_model.model.head.requires_grad_(True)
    with pytest.raises(peft_gradguard.NoGradientError, match=r"The adapter is disabled: .*enable_adapter_layers"):
        train(model, range(1, 2), optimizer=optimizer)


class Checkpointed(TwoLayers):
    """As transformers marks its models whose activations are checkpointed."""

    def __init__(self, reentrant: bool, hook: bool) -> None:
        super().__init__()
        self.detached = not hook
        self.embeddings = torch.nn.Linear(1, 1)
        self.gradient_checkpointing = True
        self._gradient_checkpointing_func = SimpleNamespace(keywords={"use_reentrant": reentrant})
        if hook:
            self.embeddings.register_forward_hook(lambda *_: None)

    def get_input_embeddings(self) -> torch.nn.Module:
        return self.embeddings


@pytest.mark.parametrize(("reentrant", "hook", "seen"), [(True, False, True), (False, False, False)])
def test_reentrant_checkpoints_are_named_with_both_remedies(
    said: Callable[[], list[str]], reentrant: bool, hook: bool, seen: bool
) -> None:
    model = peft.get_peft_model(Checkpointed(reentrant, hook), config())
    model.base_model.model.embeddings._forward_hooks.clear()
    for parameter in model.base_model.model.embeddings.parameters():
        parameter.requires_grad = False
    train(model, range(1, 5))
    assert ("enable_input_require_grads()" in named(said)[0]) == seen
    assert ("{'use_reentrant': False}" in named(said)[0]) == seen


def test_another_active_adapter_is_named(said: Callable[[], list[str]]) -> None:
    model = make("one")
    model.add_adapter("two", config(inference_mode=True))
    model.set_adapter("two")
    for name, parameter in model.named_parameters():
        parameter.requires_grad = name.endswith((".one", ".two")) and ".lora_" in name
    train(model, range(1, 5))
    assert len(named(said)) == 1
    assert "The active adapter is 'two', which this allocator does not rank" in named(said)[0]


def test_a_healthy_training_says_nothing(said: Callable[[], list[str]]) -> None:
    model = make()
    train(model)
    assert said() == []
    assert loss_of(model, TOTAL).isfinite()


@pytest.mark.skipif(PEFT_VERSION < (0, 7), reason="merges layer by layer in this test")
def test_one_merged_layer_is_named(said: Callable[[], list[str]]) -> None:
    model = make(target_modules=["second"])
    model.merge_adapter()
    train(model, range(1, 5))
    assert ["second is merged into the base weights" in text for text in named(said)] == [True]
