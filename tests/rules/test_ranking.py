"""Rules 3 to 7: who is ranked, what the budget describes, what is masked."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
import torch
from scenarios import FINALISING, INIT_R, TARGET_R, TOTAL, frozen
from steps import advance, energy, new_model, pattern

if TYPE_CHECKING:
    import peft

pytestmark = pytest.mark.peft


@pytest.fixture
def model() -> peft.PeftModel:
    return new_model()


def test_budget_follows_the_ranked_set(model: peft.PeftModel) -> None:
    allocator = model.base_model.rankallocator
    advance(model, 1, branch=False)
    assert (allocator.init_bgt, allocator.target_bgt) == (2 * INIT_R, 2 * TARGET_R)
    assert list(allocator.name_set) == ["trunk.0.%s.default", "trunk.2.%s.default"]
    advance(model, 2, 3)
    # The branch is warming up: it has missed a step of tinit.
    assert allocator.init_bgt == 2 * INIT_R
    advance(model, 4)
    assert (allocator.init_bgt, allocator.target_bgt) == (4 * INIT_R, 4 * TARGET_R)
    frozen("trunk.0")(model, 4)
    advance(model, 5)
    assert (allocator.init_bgt, allocator.target_bgt) == (3 * INIT_R, 3 * TARGET_R)


def test_budget_set_by_hand_stays_while_the_ranked_set_does(model: peft.PeftModel) -> None:
    allocator = model.base_model.rankallocator
    allocator.target_bgt = 9
    advance(model, *range(1, FINALISING + 1))
    assert sum(map(sum, pattern(model).values())) == 9


def test_masking_leaves_frozen_energies_alone(model: peft.PeftModel) -> None:
    frozen("trunk.0")(model, 0)
    before = energy(model, "trunk.0").clone()
    advance(model, *range(1, TOTAL + 1))
    assert torch.equal(energy(model, "trunk.0"), before)
    assert not energy(model, "trunk.2").all()


@pytest.mark.parametrize("empty", [None, {}])
def test_final_phase_without_a_pattern_masks_nothing(model: peft.PeftModel, empty: dict | None) -> None:
    model.peft_config["default"].rank_pattern = empty
    model.base_model.update_and_allocate(FINALISING + 1)
    assert energy(model, "trunk.0").all()
    assert pattern(model) == empty


@pytest.mark.parametrize("cut", [False, True], ids=["full names", "names as save_pretrained cuts them"])
def test_final_phase_masks_just_the_names_in_the_pattern(model: peft.PeftModel, cut: bool) -> None:
    name = "trunk.0.lora_E" if cut else "trunk.0.lora_E.default"
    model.peft_config["default"].rank_pattern = {name: [True, False] * (INIT_R // 2)}
    model.base_model.update_and_allocate(FINALISING + 1)
    assert (energy(model, "trunk.0") == 0).view(-1).tolist() == [False, True] * (INIT_R // 2)
    assert all(energy(model, module).all() for module in ("trunk.2", "branch.0", "branch.2"))


def test_second_call_with_the_finalising_step_keeps_the_result(model: peft.PeftModel) -> None:
    advance(model, *range(1, FINALISING + 1))
    result, weights = pattern(model), energy(model, "trunk.0").clone()
    allocator = model.base_model.rankallocator
    budget = allocator.init_bgt, allocator.target_bgt
    advance(model, FINALISING)
    assert pattern(model) is result
    assert (allocator.init_bgt, allocator.target_bgt) == budget
    assert torch.equal(energy(model, "trunk.0"), weights)
