"""Names and flags alone: what needs no model."""

from __future__ import annotations

import pytest
import torch
from peft_gradguard.gradients import skip_reason, step_gradients
from peft_gradguard.overlap import cannot_reload_overlap
from peft_gradguard.parameters import adalora_parameters, modules_inside_modules_to_save


class Named(torch.nn.Module):
    """A module with parameters of just these names."""

    def __init__(self, *names: str) -> None:
        super().__init__()
        self.names = names

    def named_parameters(self):
        return [(name, torch.nn.Parameter(torch.zeros(1))) for name in self.names]


def test_adapter_name_is_matched_exactly() -> None:
    model = Named(
        "q.lora_A.default", "q.lora_A.default_eval", "q.lora_A.my.default", "q.lora_A.default.weight",
        "lora_default.bias", "q.ranknum.default", "q.lora_magnitude_vector.default", "q.lora_E.default",
    )  # fmt: skip
    found = [(p.name, p.module, p.factor) for p in adalora_parameters(model, "default")]
    assert found == [("q.lora_A.default", "q", "A"), ("q.lora_E.default", "q", "E")]


def test_adapter_name_may_hold_dots() -> None:
    assert [p.module for p in adalora_parameters(Named("a.q.lora_B.v1.2"), "v1.2")] == ["a.q"]


def test_copies_and_their_original_are_inside_modules_to_save() -> None:
    inside = {"head.modules_to_save.default.dense", "head.original_module.dense", "modules_to_save.default.q"}
    outside = {"body.original_module.q", "head.dense", "my_modules_to_save.default.q", "original_module2.q"}
    assert modules_inside_modules_to_save(inside | outside) == inside


@pytest.mark.parametrize(
    ("mark", "reason"), [(None, "no gradient"), ("_hp_mapping", None), ("ds_id", None)], ids=["plain", "ZeRO 1/2", "3"]
)
def test_gradient_that_deepspeed_holds_is_not_missing(mark: str | None, reason: str | None) -> None:
    parameter = torch.nn.Parameter(torch.zeros(1))
    if mark:
        setattr(parameter, mark, None)  # On a rank without its share DeepSpeed leaves None there.
    assert skip_reason(parameter) == reason
    parameter.requires_grad = False
    assert skip_reason(parameter) == "frozen"


def test_zeros_beside_gradients_that_cannot_be_looked_at_prove_nothing() -> None:
    zeros, held = adalora_parameters(Named("q.lora_A.default", "q.lora_E.default"), "default")
    zeros.parameter.grad = torch.zeros(1)
    assert step_gradients([zeros]) == ({"q.lora_A.default": "no gradient"}, True)
    held.parameter.ds_id = 1
    assert step_gradients([zeros, held]) == ({"q.lora_A.default": None, "q.lora_E.default": None}, False)


@pytest.mark.parametrize(
    ("version", "broken"),
    [("0.5.0", True), ("0.15.2", True), ("0.16.0", False), ("0.21.2", False), ("1.0.0.dev0", False), ("odd", False)],
)
def test_releases_that_cannot_reload_an_overlap(version: str, broken: bool) -> None:
    assert cannot_reload_overlap(version) == broken
