"""How often parameters were scored and left out."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
from reported import modules, only, parameters
from scenarios import FINALISING, INIT_R, TARGET_R, branches, build, frozen, in_turn, sometimes, train
from steps import advance

import peft_gradguard

if TYPE_CHECKING:
    import peft


@pytest.fixture
def model() -> peft.PeftModel:
    return build(branches())


@pytest.mark.peft
def test_counts_of_a_whole_training() -> None:
    seen: list[peft.PeftModel] = []
    remember = in_turn(frozen("trunk.0"), lambda model, step: seen.append(model))
    train(branches(batch=sometimes, regularised=False, prepare=remember))
    adapter = only(seen[0])
    used = [step for step in range(1, FINALISING) if step % 3 == 0]
    unused = FINALISING - 1 - len(used)
    for name, found in parameters(adapter).items():
        counts = (found.steps_scored, found.steps_skipped, found.first_step, found.last_step)
        assert (
            counts
            == {
                "trunk.0": (0, {"frozen": FINALISING - 1}, None, None),
                "trunk.2": (FINALISING - 1, {}, 1, FINALISING - 1),
                "branch.": (len(used), {"no gradient": unused}, used[0], used[-1]),
            }[name[:7]]
        )
    assert adapter.step == FINALISING
    assert (adapter.init_budget, adapter.budget, adapter.target_budget) == (3 * INIT_R, 3 * TARGET_R, 3 * TARGET_R)
    assert adapter.unranked_ranks == INIT_R
    found_modules = modules(adapter)
    pattern = seen[0].peft_config["default"].rank_pattern
    for name, module in found_modules.items():
        bits = pattern.get(f"{name}.lora_E.default")
        assert module.ranked == (bits is not None) == (name != "trunk.0")
        assert module.rank_kept == (INIT_R if bits is None else sum(bits))
        assert module.rank_started == INIT_R
    assert {name: module.reason for name, module in found_modules.items()} == {
        "trunk.0": "frozen", "trunk.2": None, "branch.0": "no gradient", "branch.2": "no gradient",
    }  # fmt: skip


@pytest.mark.peft
def test_second_call_in_the_same_step_counts_once(model: peft.PeftModel) -> None:
    advance(model, 1, 1, 2, 2, 2)
    assert {p.steps_scored for p in parameters(only(model)).values()} == {2}


def test_steps_that_begin_anew_count(model: peft.PeftModel) -> None:
    advance(model, 4, 5, 1, 2)
    assert {p.steps_scored for p in parameters(only(model)).values()} == {4}


def test_calls_that_raise_are_not_counted(model: peft.PeftModel) -> None:
    frozen()(model, 0)
    with pytest.raises(peft_gradguard.NoGradientError):
        model.base_model.update_and_allocate(1)
    assert {p.steps_scored + len(p.steps_skipped) for p in parameters(only(model)).values()} == {0}
    assert only(model).step is None
