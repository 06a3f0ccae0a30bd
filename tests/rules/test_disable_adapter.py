"""Rule 10: what was frozen before ``disable_adapter()`` is frozen after it, however adapters are disabled."""

from __future__ import annotations

import contextlib
import gc
import threading
from typing import TYPE_CHECKING, Any

import peft
import pytest
import torch
from peft.tuners.adalora import AdaLoraLayer

import peft_gradguard

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

pytestmark = pytest.mark.peft
THAWS = hasattr(AdaLoraLayer, "enable_adapters")


def new_model(frozen: str = "2.lora_") -> peft.PeftModel:
    torch.manual_seed(0)
    base = torch.nn.Sequential(torch.nn.Linear(8, 8), torch.nn.ReLU(), torch.nn.Linear(8, 8))
    config = peft.AdaLoraConfig(
        target_modules=["0", "2"], init_r=4, target_r=2, total_step=20, tinit=2, tfinal=3, deltaT=1
    )
    model = peft.get_peft_model(base, config)
    for name, parameter in model.named_parameters():
        if frozen in name:
            parameter.requires_grad_(False)
    return model


def flags(model: torch.nn.Module) -> dict[str, bool]:
    return {name: parameter.requires_grad for name, parameter in model.named_parameters() if "lora_" in name}


def plainly(model: peft.PeftModel) -> None:
    with model.disable_adapter():
        pass


def with_an_error(model: peft.PeftModel) -> None:
    with contextlib.suppress(KeyError), model.disable_adapter():
        raise KeyError


def nested(model: peft.PeftModel) -> None:
    with model.disable_adapter():
        with model.disable_adapter():
            pass
        with model.disable_adapter(), model.disable_adapter():
            pass


def by_hand(model: peft.PeftModel) -> None:
    model.base_model.disable_adapter_layers()
    model.base_model.enable_adapter_layers()


def by_hand_inside(model: peft.PeftModel) -> None:
    with model.disable_adapter():
        by_hand(model)


def disabled_twice(model: peft.PeftModel) -> None:
    model.base_model.disable_adapter_layers()
    by_hand(model)


def layer_by_layer(model: peft.PeftModel) -> None:
    layers = [module for module in model.modules() if isinstance(module, AdaLoraLayer)]
    for enabled in (False, True):
        for layer in layers:
            if THAWS:
                layer.enable_adapters(enabled=enabled)


def by_a_generator_that_is_left(model: peft.PeftModel) -> None:
    def reference() -> Iterator[int]:
        with model.disable_adapter():
            yield 1
            yield 2

    for _ in reference():
        break
    gc.collect()


def by_two_threads(model: peft.PeftModel) -> None:
    one_is_in, two_is_out = threading.Event(), threading.Event()

    def first() -> None:
        with model.disable_adapter():
            one_is_in.set()
            two_is_out.wait(60)

    thread = threading.Thread(target=first)
    thread.start()
    one_is_in.wait(60)
    plainly(model)
    two_is_out.set()
    thread.join(60)


WAYS = [
    plainly,
    with_an_error,
    nested,
    by_hand,
    by_hand_inside,
    disabled_twice,
    layer_by_layer,
    by_a_generator_that_is_left,
    by_two_threads,
]


@pytest.mark.parametrize("frozen", ["2.lora_", "2.lora_A", "lora_E", "lora_", "nothing"])
@pytest.mark.parametrize("way", WAYS)
def test_flags_are_what_they_were(way: Callable[[peft.PeftModel], None], frozen: str) -> None:
    model = new_model(frozen)
    before = flags(model)
    for _ in range(2):
        way(model)
        assert flags(model) == before


def test_inside_of_the_block_all_is_as_in_plain_peft() -> None:
    model, x = new_model(), torch.ones(1, 8)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_E" in name:
                parameter.fill_(1.0)
    adapted = model(x)
    with model.disable_adapter():
        inside, seen = flags(model), model(x)
    with peft_gradguard.disabled(), model.disable_adapter():
        assert flags(model) == inside
        assert torch.equal(model(x), seen)
    assert not torch.equal(adapted, seen)
    assert torch.equal(model(x), adapted)


@pytest.mark.skipif(not THAWS, reason="this PEFT leaves requires_grad alone")
def test_what_is_thawed_on_purpose_inside_of_the_block_stays_so() -> None:
    model = new_model()
    with model.disable_adapter():
        model.base_model.model.get_parameter("2.lora_E.default").requires_grad_(True)
    assert model.base_model.model.get_parameter("2.lora_E.default").requires_grad
    assert not model.base_model.model.get_parameter("2.lora_A.default").requires_grad


@pytest.mark.skipif(not THAWS, reason="this PEFT leaves requires_grad alone")
def test_other_adapter_activated_inside_of_the_block_is_plain_pefts() -> None:
    found = []
    for guard in (True, False):
        model = new_model()
        model.peft_config["default"].inference_mode = True
        config = peft.AdaLoraConfig(target_modules=["0", "2"], init_r=4, target_r=2, total_step=20, tinit=2, tfinal=3)
        model.add_adapter("other", config)
        with contextlib.nullcontext() if guard else peft_gradguard.disabled(), model.disable_adapter():
            model.set_adapter("other")
        found.append(flags(model))
    assert found[0] == found[1]


@pytest.mark.skipif(not THAWS, reason="this PEFT leaves requires_grad alone")
def test_switched_off_it_is_plain_pefts() -> None:
    model = new_model()
    with peft_gradguard.disabled():
        plainly(model)
    assert all(flags(model).values())
    # Off at one end of the block only: as plain PEFT, and nothing is frozen that was not.
    model = new_model("nothing")
    with peft_gradguard.disabled():
        model.base_model.disable_adapter_layers()
    model.base_model.disable_adapter_layers()
    model.base_model.enable_adapter_layers()
    assert all(flags(model).values())


def test_whoever_patches_the_method_that_is_inherited_is_heard(monkeypatch: pytest.MonkeyPatch) -> None:
    from peft.tuners.tuners_utils import BaseTunerLayer

    if not THAWS:
        pytest.skip("this PEFT has no such method")
    original, seen = BaseTunerLayer.enable_adapters, []

    def counted(self: Any, enabled: bool) -> None:
        seen.append(enabled)
        original(self, enabled)

    monkeypatch.setattr(BaseTunerLayer, "enable_adapters", counted)
    plainly(new_model())
    assert seen == [False, False, True, True]


def ranks_left(reference: bool) -> dict[str, int]:
    model = new_model()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    torch.manual_seed(3)
    for step in range(1, 21):
        x = torch.randn(4, 8)
        if reference:
            with torch.no_grad(), model.disable_adapter():
                model(x)
        model(x).pow(2).mean().backward()
        optimizer.step()
        model.base_model.update_and_allocate(step)
        optimizer.zero_grad()
    return {name: sum(kept) for name, kept in model.peft_config["default"].rank_pattern.items()}


def test_implicit_reference_model_takes_no_ranks_away() -> None:
    assert ranks_left(reference=True) == ranks_left(reference=False) == {"0.lora_E.default": 2}
