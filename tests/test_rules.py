"""Single rules, looked at more closely than a whole training shows."""

from __future__ import annotations

import gc
import logging
import weakref
from typing import TYPE_CHECKING, Any

import pytest
import torch
from scenarios import (
    DELTA,
    FINALISING,
    INIT_R,
    PEFT_VERSION,
    SCENARIOS,
    TARGET_R,
    TINIT,
    TOTAL,
    branches,
    build,
    frozen,
    loss_of,
    train,
    vectors,
)

import peft_gradguard

if TYPE_CHECKING:
    import peft

pytestmark = pytest.mark.peft

FIRST_MASKING = TINIT + 1 + (TINIT + 1) % DELTA


@pytest.fixture
def model() -> peft.PeftModel:
    return new_model()


def new_model() -> peft.PeftModel:
    """A model whose energies are not all zero, as PEFT starts them, so that masks can be seen without training."""
    model = build(branches())
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if ".lora_E." in name:
                parameter.normal_()
    return model


def backward(model: peft.PeftModel, step: int, **batch: Any) -> None:
    """One step's gradients and nothing else. The loss is computed outside: an unused branch then gets none at all."""
    model.zero_grad()
    loss_of(model, vectors(step, **batch), regularised=False).backward()


def advance(model: peft.PeftModel, *steps: int, **batch: Any) -> None:
    for step in steps:
        backward(model, step, **batch)
        model.base_model.update_and_allocate(step)


def pattern(model: peft.PeftModel) -> dict[str, list[bool]] | None:
    return model.peft_config["default"].rank_pattern


def energy(model: peft.PeftModel, module: str) -> torch.nn.Parameter:
    return model.get_parameter(f"base_model.model.{module}.lora_E.default")


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


def test_mask_to_budget_called_directly_masks_only_ranked_triplets(model: peft.PeftModel) -> None:
    allocator = model.base_model.rankallocator
    advance(model, 1, branch=False)
    masked = allocator.mask_to_budget(model.base_model.model, 2 * TARGET_R)
    assert sorted(masked) == ["trunk.0.lora_E.default", "trunk.2.lora_E.default"]
    assert sum(map(sum, masked.values())) == 2 * TARGET_R


def test_arguments_may_be_given_by_name(model: peft.PeftModel) -> None:
    allocator = model.base_model.rankallocator
    backward(model, FIRST_MASKING)
    arguments = {"model": model.base_model.model, "global_step": FIRST_MASKING, "force_mask": True}
    budget, masked = allocator.update_and_allocate(**arguments)
    assert sum(map(sum, masked.values())) == budget < 4 * INIT_R


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


def test_all_frozen_in_the_middle_is_warned_of_once_and_nothing_moves(
    model: peft.PeftModel, records: list[logging.LogRecord]
) -> None:
    advance(model, *range(1, FIRST_MASKING + 1))
    scores, result = dict(model.base_model.rankallocator.exp_avg_ipt), pattern(model)
    frozen()(model, 0)
    for step in range(FIRST_MASKING + 1, FIRST_MASKING + 4):
        model.base_model.update_and_allocate(step)
    assert all(model.base_model.rankallocator.exp_avg_ipt[name] is score for name, score in scores.items())
    assert pattern(model) is result
    warnings = [record for record in records if "All 12 AdaLoRA parameters are frozen" in record.getMessage()]
    assert [record.levelno for record in warnings] == [logging.WARNING]
    assert warnings[0].getMessage().endswith("stay as they are, until some of them are trainable again.")


def test_each_skipped_name_is_logged_once_with_its_reason(
    model: peft.PeftModel, records: list[logging.LogRecord]
) -> None:
    frozen("trunk.0", "lora_A")(model, 0)
    advance(model, 1)
    advance(model, 2, 3, branch=False)
    skips = [(name, r.reason, r.adapter, r.step, r.levelname) for r in records for name in r.parameters]
    assert len(records) == 2
    unused = [
        (f"branch.{layer}.lora_{factor}.default", "no gradient", "default", 2, "WARNING")
        for layer in (0, 2)
        for factor in "ABE"
    ]
    assert sorted(skips) == sorted([*unused, ("trunk.0.lora_A.default", "frozen", "default", 1, "WARNING")])
    assert {record.name for record in records} == {"peft_gradguard"}
    message = next(r.getMessage() for r in records if r.parameters == ["trunk.0.lora_A.default"])
    assert all(word in message for word in ("trunk.0.lora_A.default", "frozen", "'default'", "step 1"))
    assert not any(record.exc_info for record in records)


def test_another_allocator_logs_the_same_names_again(records: list[logging.LogRecord]) -> None:
    for _ in range(2):
        model = new_model()
        frozen("trunk.0", "lora_A")(model, 0)
        advance(model, 1)
    assert [record.parameters for record in records] == [["trunk.0.lora_A.default"]] * 2


def test_other_ranks_of_a_distributed_run_log_at_debug(
    model: peft.PeftModel, records: list[logging.LogRecord], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RANK", "1")
    frozen("trunk.0", "lora_A")(model, 0)
    advance(model, 1)
    assert [record.levelname for record in records] == ["DEBUG"]


def test_rank_of_a_process_group_without_a_launcher(
    model: peft.PeftModel, records: list[logging.LogRecord], monkeypatch: pytest.MonkeyPatch
) -> None:
    from torch.testing._internal.distributed.fake_pg import FakeStore

    monkeypatch.delenv("RANK", raising=False)
    torch.distributed.init_process_group("fake", store=FakeStore(), rank=1, world_size=2)
    try:
        frozen("trunk.0", "lora_A")(model, 0)
        advance(model, 1)
    finally:
        torch.distributed.destroy_process_group()
    assert [record.levelname for record in records] == ["DEBUG"]


def test_update_ipt_called_directly_says_that_it_knows_no_step(
    model: peft.PeftModel, records: list[logging.LogRecord]
) -> None:
    frozen("trunk.0", "lora_A")(model, 0)
    backward(model, 1)
    model.base_model.rankallocator.update_ipt(model.base_model.model)
    assert [(record.parameters, record.step) for record in records] == [(["trunk.0.lora_A.default"], None)]
    assert "step unknown" in records[0].getMessage()


def test_guard_changes_no_flag_no_gradient_no_weight_no_config(model: peft.PeftModel) -> None:
    frozen("trunk.0")(model, 0)
    advance(model, 1)
    backward(model, 2, branch=False)
    config = dict(vars(model.peft_config["default"]))
    before = {n: (p.requires_grad, p.grad, p.detach().clone()) for n, p in model.named_parameters()}
    model.base_model.update_and_allocate(2)
    for name, parameter in model.named_parameters():
        requires_grad, grad, value = before[name]
        assert parameter.requires_grad == requires_grad
        assert parameter.grad is grad
        assert torch.equal(parameter, value)
    assert vars(model.peft_config["default"]) == config


@pytest.mark.parametrize("step", [1, FIRST_MASKING, FINALISING])
def test_one_walk_over_the_model_serves_an_allocator_call(
    model: peft.PeftModel, step: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    advance(model, 1)
    backward(model, step)
    inner, walks = model.base_model.model, []
    walk = type(inner).named_parameters
    monkeypatch.setattr(type(inner), "named_parameters", lambda self, *a, **k: (walks.append(self), walk(self))[1])
    model.base_model.update_and_allocate(step)
    assert walks == [inner]


def test_nothing_keeps_model_or_allocator_alive() -> None:
    model = new_model()
    advance(model, 1)
    advance(model, 2, branch=False)
    references = [weakref.ref(model.base_model.model), weakref.ref(model.base_model.rankallocator)]
    del model
    gc.collect()
    assert [reference() for reference in references] == [None, None]


def test_model_without_adalora_is_named(model: peft.PeftModel) -> None:
    with pytest.raises(peft_gradguard.NoGradientError, match=r"without AdaLoRA parameters .*'\.lora_A\.default'"):
        model.base_model.rankallocator.update_and_allocate(torch.nn.Linear(2, 2), 1)


def test_failed_call_leaves_no_trace(model: peft.PeftModel, records: list[logging.LogRecord]) -> None:
    requires_grad = [parameter for parameter in model.base_model.model.parameters() if parameter.requires_grad]
    frozen()(model, 0)
    with pytest.raises(peft_gradguard.NoGradientError):
        model.base_model.update_and_allocate(1)
    for parameter in requires_grad:
        parameter.requires_grad = True
    advance(model, 1)
    assert len(model.base_model.rankallocator.exp_avg_ipt) == 12
    assert records == []


def test_missed_finalising_step_is_named(records: list[logging.LogRecord]) -> None:
    outcome = train(SCENARIOS["calls that miss the finalising step"])
    messages = [record.getMessage() for record in records]
    assert len(messages) == 1
    assert f"never called with step {FINALISING} (" in messages[0]
    kept = "pattern of the last masking step stays" if outcome.patterns[FINALISING] else "no rank is pruned at all"
    assert kept in messages[0]


@pytest.mark.skipif(PEFT_VERSION >= (0, 16), reason="PEFT since 0.16 does not target modules in modules_to_save")
def test_overlap_that_cannot_be_reloaded_is_named(records: list[logging.LogRecord]) -> None:
    train(SCENARIOS["head targeted and in modules_to_save"])
    messages = [record.getMessage() for record in records if not hasattr(record, "reason")]
    assert len(messages) == 1
    assert "classifier.modules_to_save.default.dense" in messages[0]
    assert "Narrow target_modules" in messages[0]
    inside = {n for r in records if getattr(r, "reason", None) == "inside modules_to_save" for n in r.parameters}
    assert "classifier.modules_to_save.default.dense.lora_E.default" in inside


def test_switched_off_guard_lets_peft_fail_as_it_does(model: peft.PeftModel) -> None:
    frozen("trunk.0")(model, 0)
    with peft_gradguard.disabled(), pytest.raises(TypeError, match="'Parameter' and 'NoneType'"):
        advance(model, 1)
    advance(model, 1)
