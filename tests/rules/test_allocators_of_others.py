"""Subclasses whose code names odd things, and calls at odd moments: no error that plain PEFT does not raise."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import TYPE_CHECKING, Any
from unittest import mock

import pytest
import torch
from fresh import python
from peft.tuners.adalora import RankAllocator
from scenarios import FINALISING, branches, build, loss_of, vectors
from steps import advance, backward, new_model

import peft_gradguard

if TYPE_CHECKING:
    from collections.abc import Callable

pytestmark = [pytest.mark.peft]


class Proxy:
    """Stands for something that is not there yet, and says so to whoever looks at it."""

    def __getattr__(self, name: str) -> Any:
        raise RuntimeError("there is no request")


request = Proxy()


def scores_by_weight(allocator: RankAllocator, model: Any) -> None:
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            for kind in (allocator.ipt, allocator.exp_avg_ipt, allocator.exp_avg_unc):
                kind[name] = parameter.detach().abs()


class NamesForEver(RankAllocator):
    def update_ipt(self, model: Any) -> None:
        if self.adapter_name == "never":
            mock.call(model)
        ANY_CALL  # noqa: B018
        scores_by_weight(self, model)


ANY_CALL = mock.call


class NamesProxy(RankAllocator):
    def update_ipt(self, model: Any) -> None:
        request  # noqa: B018
        scores_by_weight(self, model)


def _with_an_empty_cell() -> type[RankAllocator]:
    gone = 1

    class NamesNothing(RankAllocator):
        def update_ipt(self, model: Any) -> None:
            if self.adapter_name == "never":
                print(gone)  # noqa: F821
            scores_by_weight(self, model)

    del gone
    return NamesNothing


@pytest.mark.parametrize("kind", [NamesForEver, NamesProxy, _with_an_empty_cell()], ids=lambda kind: kind.__name__)
def test_subclass_whose_code_names_something_odd(kind: type[RankAllocator]) -> None:
    model = new_model(kind)
    advance(model, *range(1, FINALISING + 1))
    assert model.peft_config["default"].rank_pattern


def test_all_is_frozen_for_the_moment_of_the_call(said: Callable[[], list[str]]) -> None:
    model = build(branches())
    loss_of(model, vectors(1), False).backward()
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    for parameter in trainable:
        parameter.requires_grad_(False)
    model.base_model.update_and_allocate(1)
    assert ["are frozen" in message for message in said()] == [True]


def test_pattern_is_masked_by_hand_without_a_schedule() -> None:
    model = new_model()
    advance(model, *range(1, FINALISING))
    config = model.peft_config["default"]
    config.total_step = None
    energies = {name: value for name, value in model.named_parameters() if ".lora_E." in name}
    for energy in energies.values():
        torch.nn.init.ones_(energy)
    model.base_model.rankallocator.mask_using_rank_pattern(model.base_model.model, config.rank_pattern)
    kept = {name: energy.flatten().bool().tolist() for name, energy in energies.items()}
    assert kept == {f"base_model.model.{name}": keep for name, keep in config.rank_pattern.items()}


class Moment(float):
    """A step that can be compared and counted with, and is no index."""

    def __index__(self) -> int:
        raise RuntimeError("a moment is no index")


def test_step_of_a_type_of_the_users_own() -> None:
    model = new_model()
    for step in range(1, FINALISING + 1):
        backward(model, step)
        model.base_model.update_and_allocate(Moment(step))
    assert model.peft_config["default"].rank_pattern


# -- The mend that people pass on


def passes_over(allocator: RankAllocator, model: Any) -> None:
    """PEFT's method, without what has no gradient."""
    for name, parameter in model.named_parameters():
        if "lora_" in name and allocator.adapter_name in name and parameter.grad is not None:
            if name not in allocator.ipt:
                for kind in (allocator.ipt, allocator.exp_avg_ipt, allocator.exp_avg_unc):
                    kind[name] = torch.zeros_like(parameter)
            with torch.no_grad():
                ipt = allocator.ipt[name] = (parameter * parameter.grad).abs().detach()
                average = allocator.beta1 * allocator.exp_avg_ipt[name] + (1 - allocator.beta1) * ipt
                uncertainty = (ipt - average).abs()
                rest = (1 - allocator.beta2) * uncertainty
                allocator.exp_avg_ipt[name] = average
                allocator.exp_avg_unc[name] = allocator.beta2 * allocator.exp_avg_unc[name] + rest


class Mended(RankAllocator):
    def update_ipt(self, model: Any) -> None:
        passes_over(self, model)


class FailsAsPeft(RankAllocator):
    def update_ipt(self, model: Any) -> None:
        super().update_ipt(model)


def train_in_stages(mended: str, frozen: bool, guarded: bool) -> Any:
    """The head first, then the adapter; the allocator is called at every step."""
    if mended == "class":
        RankAllocator.update_ipt = passes_over
    if guarded:
        peft_gradguard.enable()
    assert peft_gradguard.is_enabled() is guarded
    model = new_model(Mended if mended == "subclass" else None)
    if mended == "instance":
        allocator = model.base_model.rankallocator
        allocator.update_ipt = functools.partial(passes_over, allocator)
    adapter = [parameter for name, parameter in model.named_parameters() if ".lora_" in name]
    for step in range(1, FINALISING + 1):
        for parameter in adapter:
            parameter.requires_grad_(step > 3 or not frozen)
        if step > 3:
            backward(model, step)
        model.base_model.update_and_allocate(step)
        model.zero_grad()
    return model.peft_config["default"].rank_pattern


@pytest.mark.parametrize("frozen", [True, False])
@pytest.mark.parametrize("mended", ["class", "instance", "subclass"])
def test_mended_method_trains_in_stages(mended: str, frozen: bool) -> None:
    program = "from test_allocators_of_others import *; print(json.dumps(train_in_stages({!r}, {!r}, {!r})))"
    plain, guarded = (
        # The guard is off until the class is mended.
        python(program.format(mended, frozen, on), path=Path(__file__).parent, PEFT_GRADGUARD="0")[0]
        for on in (False, True)
    )
    assert not all(map(all, plain.values()))
    assert guarded == plain


def test_subclass_that_asks_pefts_method_fails_as_that_would() -> None:
    model = new_model(FailsAsPeft)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(".lora_" not in name)
    with pytest.raises(peft_gradguard.NoGradientError, match="All 12 AdaLoRA parameters are frozen"):
        model.base_model.update_and_allocate(1)
