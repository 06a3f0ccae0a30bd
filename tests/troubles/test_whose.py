"""Whose training it is: other adapters, other trainings' patterns, and adapters without an allocator."""

from __future__ import annotations

import copy
import gc
from typing import TYPE_CHECKING, Any

import needs
import peft
import pytest
from peft.tuners.adalora import RankAllocator
from situations import TOTAL, TwoLayers, config, make, optimizer_of, outside, train

import peft_gradguard

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    import torch

pytestmark = pytest.mark.peft

PEFT_VERSION = tuple(int(part) for part in peft.__version__.split(".")[:2])


def second_adapter(model: Any) -> None:
    model.peft_config[next(iter(model.peft_config))].inference_mode = True
    model.add_adapter("two", config())
    model.set_adapter("two")


@pytest.mark.skipif(PEFT_VERSION < (0, 6), reason="PEFT 0.5 freezes no adapter for another one")
@pytest.mark.parametrize("first", ["one", "zero"])
def test_second_adapter_is_named_and_nobody_is_told_to_train_the_first(
    said: Callable[[], list[str]], first: str
) -> None:
    model = make(first)
    train(model, loss=outside)
    second_adapter(model)
    train(model, loss=outside)
    assert len(said()) == 1
    assert f"allocator ranks adapter {first!r}, but 'two' trains" in said()[0]
    advice = [text for adapter in peft_gradguard.report(model).adapters for text in adapter.advice]
    assert advice == said()
    assert "set_adapter" not in advice[0]


@pytest.mark.skipif(PEFT_VERSION < (0, 6), reason="PEFT 0.5 freezes no adapter for another one")
def test_second_adapter_with_the_allocator_that_the_words_recommend(said: Callable[[], list[str]]) -> None:
    model = make("one")
    train(model, loss=outside)
    second_adapter(model)
    tuner = model.base_model
    tuner.trainable_adapter_name = "two"
    tuner.rankallocator = RankAllocator(tuner.model, tuner.peft_config["two"], "two")
    train(model, loss=outside)
    assert sum(sum(keep) for keep in model.peft_config["two"].rank_pattern.values()) == 4
    assert said() == []


@pytest.mark.skipif(PEFT_VERSION < (0, 6), reason="PEFT 0.5 freezes no adapter for another one")
def test_second_adapter_on_one_that_was_never_trained(said: Callable[[], list[str]]) -> None:
    model = make("one")
    second_adapter(model)
    with pytest.raises(peft_gradguard.NoGradientError, match="Adapter 'two' trains, which this allocator does not"):
        train(model, loss=outside)


def test_one_config_for_two_trainings(said: Callable[[], list[str]]) -> None:
    shared = config()
    for number in range(2):
        model = peft.get_peft_model(TwoLayers(), shared)
        report = peft_gradguard.report(model).adapters[0]
        assert sum(module.rank_kept for module in report.modules) == 8, "the ranks of this training"
        assert len(report.advice) == number
        train(model)
        assert peft_gradguard.report(model).adapters[0].advice == (), "its own pattern by now"
    assert len(said()) == 1
    assert "holds the rank_pattern of another training" in said()[0]
    assert "Make a new AdaLoraConfig" in said()[0]


@pytest.mark.parametrize("how", ["copied", "from its dictionary"])
def test_config_made_of_a_used_one(said: Callable[[], list[str]], how: str) -> None:
    used = config()
    train(peft.get_peft_model(TwoLayers(), used))
    again = copy.deepcopy(used) if how == "copied" else config(rank_pattern=used.rank_pattern)
    train(peft.get_peft_model(TwoLayers(), again), range(1, 2))
    assert ["rank_pattern of another training" in text for text in said()] == [True]


@needs.hook_after_accumulation
@pytest.mark.parametrize("init_r", [4, 5])
def test_one_config_for_two_trainings_without_calls(said: Callable[[], list[str]], init_r: int) -> None:
    shared = config()
    train(peft.get_peft_model(TwoLayers(), shared))
    shared.init_r = init_r
    train(peft.get_peft_model(TwoLayers(), shared), range(1, 5), allocate=lambda model, step: None)
    assert ["rank_pattern of another training" in text for text in said()] == [True]


@needs.hook_after_accumulation
def test_a_pattern_that_cuts_nothing_is_no_trouble(said: Callable[[], list[str]]) -> None:
    shared = config(rank_pattern={f"{name}.lora_E.default": [True] * 4 for name in ("first", "second")})
    train(peft.get_peft_model(TwoLayers(), shared), range(1, 5), allocate=lambda model, step: None)
    assert said() == []


def test_new_config_for_each_training_is_no_trouble(said: Callable[[], list[str]]) -> None:
    for _ in range(2):
        train(make())
    assert said() == []


def test_loaded_adapter_has_its_own_pattern(said: Callable[[], list[str]], tmp_path: Path) -> None:
    model = make()
    train(model)
    model.save_pretrained(tmp_path)
    loaded = peft.PeftModel.from_pretrained(TwoLayers(), tmp_path, is_trainable=True)
    train(loaded, range(1, 3))
    assert not [text for text in said() if "another training" in text]


@pytest.mark.parametrize("name", ["first", "first.lora_E", "first.lora_E.default"])
def test_pattern_as_lora_takes_it(said: Callable[[], list[str]], name: str) -> None:
    model = make(rank_pattern={name: 3})
    assert "rank_pattern of numbers, as LoRA takes it" in peft_gradguard.report(model).adapters[0].advice[0]
    train(model)
    assert ["rank_pattern of numbers" in text for text in said()] == [True]
    assert peft_gradguard.report(model).adapters[0].advice == ()


def injected() -> torch.nn.Module:
    try:
        model = peft.inject_adapter_in_model(config(), TwoLayers(), adapter_name="ada")
    except TypeError:
        pytest.skip("this PEFT cannot inject AdaLoRA (low_cpu_mem_usage)")
    for name, parameter in model.named_parameters():
        parameter.requires_grad = ".lora_" in name and "ranknum" not in name
    gc.collect()
    return model


@pytest.mark.skipif(PEFT_VERSION < (0, 6), reason="PEFT 0.5 injects no AdaLoRA")
@needs.hook_after_accumulation
def test_injected_adapter_that_trains_has_no_allocator(said: Callable[[], list[str]]) -> None:
    model = injected()
    train(model, range(1, 2), allocate=lambda model, step: None)
    assert said() == []
    train(model, range(2, 6), allocate=lambda model, step: None)
    assert len(said()) == 1
    assert "adapter 'ada' trains without a rank allocator" in said()[0]
    assert "AdaLoraModel(model, config, adapter_name)" in said()[0]
    with pytest.raises(ValueError, match="AdaLoraModel"):
        peft_gradguard.report(model)


@pytest.mark.skipif(PEFT_VERSION < (0, 6), reason="PEFT 0.5 injects no AdaLoRA")
def test_injected_adapter_that_is_only_used(said: Callable[[], list[str]]) -> None:
    model = injected()
    for step in range(5):
        outside(model, step).backward()
    assert said() == []


@needs.hook_after_accumulation
def test_adapter_whose_allocator_was_taken_away(said: Callable[[], list[str]]) -> None:
    model, beside = make(), make()
    train(beside, range(1, 3))
    optimizer = optimizer_of(model)
    train(model, optimizer=optimizer)
    del model.base_model.rankallocator
    gc.collect()
    train(model, range(TOTAL + 1, TOTAL + 5), optimizer=optimizer, loss=outside, allocate=lambda model, step: None)
    assert ["trains without a rank allocator" in text for text in said()] == [True]


@pytest.mark.parametrize("how", ["new", "copy", "subclass"])
def test_allocator_that_another_one_replaces(said: Callable[[], list[str]], how: str) -> None:
    class Own(RankAllocator):
        pass

    model = make()
    tuner = model.base_model
    kind = Own if how == "subclass" else RankAllocator
    if how == "copy":
        tuner.rankallocator = copy.deepcopy(tuner.rankallocator)
    else:
        tuner.rankallocator = kind(tuner.model, tuner.peft_config["default"], "default")
    gc.collect()
    train(model)
    assert said() == []


@pytest.mark.skipif(not hasattr(peft, "PeftMixedModel"), reason="this PEFT has no mixed models")
def test_mixed_model_has_no_allocator(said: Callable[[], list[str]]) -> None:
    model = peft.get_peft_model(TwoLayers(), config(), mixed=True)
    with pytest.raises(ValueError, match="PeftMixedModel"):
        peft_gradguard.report(model)
