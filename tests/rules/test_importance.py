"""The importance of a module is what PEFT ranks by."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
from reported import modules, only
from scenarios import FINALISING, FIRST_MASKING, branches, build
from steps import advance

if TYPE_CHECKING:
    import peft


@pytest.fixture
def model() -> peft.PeftModel:
    return build(branches())


def test_importance_is_what_peft_ranks_by_and_stays_after_the_finalising_step(model: peft.PeftModel) -> None:
    advance(model, *range(1, FIRST_MASKING), optimise=True)
    allocator = model.base_model.rankallocator
    for name, module in modules(only(model)).items():
        full = {factor: f"{name}.lora_{factor}.default" for factor in "ABE"}
        score = {factor: allocator.exp_avg_ipt[full[factor]] * allocator.exp_avg_unc[full[factor]] for factor in "ABE"}
        expected = (score["E"].view(-1) + score["A"].mean(dim=1) + score["B"].mean(dim=0)).sum()
        assert module.importance == pytest.approx(expected.item(), rel=1e-5)
    advance(model, *range(FIRST_MASKING, FINALISING), optimise=True)
    before = {name: module.importance for name, module in modules(only(model)).items()}
    advance(model, FINALISING)
    assert {name: module.importance for name, module in modules(only(model)).items()} == before
