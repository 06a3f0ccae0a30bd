"""A model with frozen layers is allocated as the same model without them; a healthy one as without the guard."""

from __future__ import annotations

import logging
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import pytest
import torch
from scenarios import ATTENTION, Outcome, Scenario, branches, build, classifier, frozen, in_turn, sequences, t5, train

if TYPE_CHECKING:
    from collections.abc import Callable

    import peft

pytestmark = pytest.mark.peft

FROZEN_LAYER = "layer.1."
Weights = dict[str, torch.Tensor]


def adapter_weights(model: peft.PeftModel) -> Weights:
    return {name: parameter.detach().clone() for name, parameter in model.named_parameters() if ".lora_" in name}


def without_contribution(model: peft.PeftModel, step: int) -> None:
    """Let the frozen layer's adapters add nothing: x + 0 is x, bit for bit."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if FROZEN_LAYER in name and "lora_E" in name:
                parameter.zero_()


def frozen_layer() -> Scenario:
    return classifier(prepare=in_turn(frozen(FROZEN_LAYER), without_contribution), regularised=False)


def without_layer(initial: Weights) -> Scenario:
    """The same model under a ``target_modules`` that leaves the layer out, from the same initial weights."""

    def load(model: peft.PeftModel, step: int) -> None:
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if ".lora_" in name:
                    parameter.copy_(initial[name])

    targets = [f"layer.{layer}.attention.self.{name}" for layer in (0, 2) for name in ATTENTION]
    return replace(
        frozen_layer(), config={"target_modules": targets, "task_type": "SEQ_CLS"}, prepare=load, plain_error=None
    )


def train_without_layer(initial: Weights) -> Outcome:
    return train(without_layer(initial))


HEALTHY = {
    "classifier": classifier(),
    "outside loss": branches(regularised=False),
    "encoder-decoder": Scenario(base=t5, config={"target_modules": ["q", "v"]}, batch=sequences),
}


def train_healthy(name: str) -> Outcome:
    return train(HEALTHY[name])


def assert_same_training(one: Outcome, other: Outcome) -> None:
    assert one.budgets == other.budgets
    assert one.patterns == other.patterns
    assert one.losses == other.losses
    for mine, theirs in zip(one.scores, other.scores, strict=True):
        assert mine.keys() == theirs.keys()
        assert all(torch.equal(mine[name], theirs[name]) for name in mine)


def test_frozen_layer_is_allocated_as_if_it_were_not_there(plain: Callable[..., Any]) -> None:
    initial = adapter_weights(build(frozen_layer()))
    guarded = train(frozen_layer())
    narrow = plain(train_without_layer, initial)
    assert_same_training(guarded, narrow)
    shared = {name for name in narrow.weights if ".lora_" in name}
    assert len(shared) == 12
    assert all(torch.equal(guarded.weights[name], narrow.weights[name]) for name in shared)


def test_excluded_layer_is_allocated_as_if_it_were_not_there(plain: Callable[..., Any]) -> None:
    import peft_gradguard

    # It trains on, and must add nothing to what the others see.
    scenario = classifier(prepare=without_contribution, before_step=without_contribution, regularised=False)
    initial = adapter_weights(build(scenario))
    with peft_gradguard.exclude(f"*.{FROZEN_LAYER}*"):
        excluded = train(scenario)
    narrow = plain(train_without_layer, initial)
    assert_same_training(excluded, narrow)
    shared = {name for name in narrow.weights if ".lora_" in name}
    assert len(shared) == 12
    assert all(torch.equal(excluded.weights[name], narrow.weights[name]) for name in shared)


@pytest.mark.parametrize("name", HEALTHY)
def test_healthy_model_trains_bit_for_bit_as_without_the_guard(
    name: str, plain: Callable[..., Any], caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.DEBUG, logger="peft_gradguard"):
        guarded = train_healthy(name)
    unguarded = plain(train_healthy, name)
    assert_same_training(guarded, unguarded)
    assert guarded.weights.keys() == unguarded.weights.keys()
    assert all(torch.equal(weight, unguarded.weights[name]) for name, weight in guarded.weights.items())
    assert [record for record in caplog.records if record.name.startswith("peft_gradguard")] == []
