"""Rules 1 and 2: who is scored."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
from steps import advance, new_model

if TYPE_CHECKING:
    import peft

pytestmark = pytest.mark.peft


@pytest.fixture
def model() -> peft.PeftModel:
    return new_model()


def test_skipped_parameter_keeps_its_scores(model: peft.PeftModel) -> None:
    allocator = model.base_model.rankallocator
    advance(model, 1)
    state = (allocator.ipt, allocator.exp_avg_ipt, allocator.exp_avg_unc)
    before = [dict(scores) for scores in state]
    advance(model, 2, branch=False)
    for old, new in zip(before, state, strict=True):
        for name in old:
            untouched = new[name] is old[name]
            assert untouched == name.startswith("branch."), name


def test_parameter_that_never_had_a_gradient_gets_no_scores(model: peft.PeftModel) -> None:
    advance(model, 1, 2, branch=False)
    allocator = model.base_model.rankallocator
    for scores in (allocator.ipt, allocator.exp_avg_ipt, allocator.exp_avg_unc):
        assert scores
        assert not [name for name in scores if name.startswith("branch.")]
