"""What trains, what is skipped, where the ranks went: before, during and after training."""

from __future__ import annotations

import copy
import logging
import types
from typing import TYPE_CHECKING, Any

import peft
import pytest
import torch
from reported import in_ddp, modules, only, parameters
from scenarios import (
    FINALISING,
    FIRST_MASKING,
    INIT_R,
    TARGET_R,
    TFINAL,
    TINIT,
    TOTAL,
    add_inference_adapter,
    branches,
    build,
    every_step,
    frozen,
    train,
    two_branches,
    vectors,
)
from steps import advance
from torch import nn

import peft_gradguard

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path


@pytest.fixture
def model() -> peft.PeftModel:
    return build(branches())


@pytest.mark.peft
def test_audit_before_the_first_step(model: peft.PeftModel) -> None:
    frozen("trunk.0")(model, 0)
    frozen("trunk.2", "lora_B")(model, 0)
    adapter = only(model)
    assert (adapter.adapter, adapter.step, adapter.history) == ("default", None, ())
    assert (adapter.init_budget, adapter.budget, adapter.target_budget) == (3 * INIT_R, 3 * INIT_R, 3 * TARGET_R)
    assert adapter.unranked_ranks == INIT_R
    assert {m.name: (m.ranked, m.reason, m.rank_kept, m.rank_started) for m in adapter.modules} == {
        "trunk.0": (False, "frozen", INIT_R, INIT_R),
        **dict.fromkeys(("trunk.2", "branch.0", "branch.2"), (True, None, INIT_R, INIT_R)),
    }
    part = parameters(adapter)["trunk.2.lora_B.default"]
    assert (part.shape, part.factor, part.trainable) == ((8, INIT_R), "B", False)
    assert parameters(adapter)["branch.0.lora_A.default"].shape == (INIT_R, 8)
    assert parameters(adapter)["branch.0.lora_E.default"].trainable
    assert [advice for advice in adapter.advice if "trunk.2 is frozen" in advice]


@pytest.mark.parametrize("part", ["branch.0", "branch.2", "trunk.0", "trunk.2"])
def test_budget_of_what_will_be_ranked(model: peft.PeftModel, part: str) -> None:
    frozen(part)(model, 0)
    adapter = only(model)
    assert (adapter.init_budget, adapter.target_budget, adapter.unranked_ranks) == (3 * INIT_R, 3 * TARGET_R, INIT_R)


def in_compile(model: peft.PeftModel, folder: Path) -> Iterator[nn.Module]:
    yield torch.compile(model, backend="eager")  # type: ignore[misc]


def in_accelerate(model: peft.PeftModel, folder: Path) -> Iterator[nn.Module]:
    accelerate = pytest.importorskip("accelerate")
    yield accelerate.Accelerator(cpu=True).prepare(model)


def in_trainer(model: peft.PeftModel, folder: Path) -> Iterator[object]:
    yield types.SimpleNamespace(model=types.SimpleNamespace(module=model))


def in_nothing(model: peft.PeftModel, folder: Path) -> Iterator[nn.Module]:
    yield model


def as_tuner(model: peft.PeftModel, folder: Path) -> Iterator[nn.Module]:
    yield model.base_model


@pytest.mark.parametrize("wrap", [in_ddp, in_compile, in_accelerate, in_trainer, in_nothing, as_tuner])
def test_whoever_holds_the_model(model: peft.PeftModel, wrap: Callable[..., Iterator[Any]], tmp_path: Path) -> None:
    holding = wrap(model, tmp_path)
    holder = next(holding)
    forward = holder if isinstance(holder, nn.Module) else model
    for step in (1, 2, 3, 4):
        batch = vectors(step)
        nn.functional.cross_entropy(forward(inputs=batch["inputs"]).logits, batch["labels"]).backward()
        model.base_model.update_and_allocate(step)
        model.zero_grad()
    adapter = only(holder)
    assert adapter.step == 4
    assert {p.steps_scored for p in parameters(adapter).values()} == {4}
    assert not list(holding)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (lambda: nn.Linear(2, 2), "given a Linear, in which there is no AdaLoRA model: give it what get_peft_model"),
        (lambda: None, "given a NoneType, in which there is no AdaLoRA model"),
        (lambda: build(branches()).base_model.model, "with AdaLoRA layers but without the AdaLoraModel around them"),
        (
            lambda: peft.get_peft_model(two_branches(), peft.LoraConfig(target_modules=["head"])),
            "given a PeftModel, in which there is no AdaLoRA model",
        ),
    ],
    ids=["plain", "none", "inside", "LoRA"],
)
def test_model_without_adalora_is_refused(wrong: Callable[[], object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        peft_gradguard.report(wrong())


def test_holder_that_holds_itself_is_refused() -> None:
    holder = types.SimpleNamespace()
    holder.model = holder.module = holder
    with pytest.raises(ValueError, match="given a SimpleNamespace, in which there is no AdaLoRA model"):
        peft_gradguard.report(holder)


def test_holders_may_be_five_deep(model: peft.PeftModel) -> None:
    holder: object = model
    for name in ("module", "_orig_mod", "model", "base_model", "model"):
        holder = types.SimpleNamespace(**{name: holder})
    assert only(holder) == only(model)
    with pytest.raises(ValueError, match="given a SimpleNamespace, in which there is no AdaLoRA model"):
        peft_gradguard.report(types.SimpleNamespace(model=holder))


def reporting(model: peft.PeftModel, step: int) -> None:
    every_step(model, step)
    report = peft_gradguard.report(model)
    assert str(report)
    assert report._repr_html_()
    assert report.to_json()


@pytest.mark.peft
def test_training_is_bit_for_bit_the_same_and_silent_with_reports_in_it(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.DEBUG, logger="peft_gradguard"):
        looked_at, alone = train(branches(allocate=reporting)), train(branches())
    assert (looked_at.budgets, looked_at.patterns) == (alone.budgets, alone.patterns)
    assert looked_at.losses == alone.losses
    assert all(torch.equal(weight, alone.weights[name]) for name, weight in looked_at.weights.items())
    assert [record for record in caplog.records if record.name == "peft_gradguard"] == []


def test_report_changes_nothing(model: peft.PeftModel) -> None:
    allocator = model.base_model.rankallocator
    advance(model, 1, 2)

    def state() -> list[Any]:
        config = copy.deepcopy(vars(model.peft_config["default"]))
        scores = {name: id(score) for name, score in allocator.exp_avg_ipt.items()}
        flags = [(n, p.requires_grad, p._version, id(p.grad)) for n, p in model.named_parameters()]
        rest = {key: value for key, value in vars(allocator).items() if key in ("init_bgt", "target_bgt", "name_set")}
        return [config, scores, flags, copy.deepcopy(rest), list(vars(allocator))]

    frozen("branch")(model, 0)
    before = state()
    peft_gradguard.report(model)
    assert state() == before


NOT_COUNTED = "how often parameters were scored is not known: the guard was off"


@pytest.mark.peft
@pytest.mark.parametrize("last", [1, FIRST_MASKING, FINALISING - 1, FINALISING, TOTAL])
def test_training_before_the_guard_was_on_is_not_counted(model: peft.PeftModel, last: int) -> None:
    with peft_gradguard.disabled():
        assert "no parameter was scored yet" in str(peft_gradguard.report(model))
        advance(model, *range(1, last + 1), optimise=True)
    assert parameters(only(model))["trunk.0.lora_A.default"].steps_scored == 0
    text = str(peft_gradguard.report(model))
    known = "4 modules share a budget of 24 ranks at the start, 8 in the end (how many now is not known)"
    assert f"{known} {NOT_COUNTED} " in " ".join(text.split())
    assert "ranks kept\n" in text or "ranks kept  importance\n" in text
    advance(model, last + 1, optimise=True)
    assert (NOT_COUNTED in str(peft_gradguard.report(model))) == (last + 1 >= FINALISING)


def test_budget_without_a_schedule_is_not_known(model: peft.PeftModel) -> None:
    advance(model, *range(1, TINIT + 2))
    config = model.peft_config["default"]
    for total_step, budget in ((TINIT + TFINAL, 4 * TARGET_R), (None, None)):
        config.total_step = total_step
        adapter = only(model)
        assert (adapter.init_budget, adapter.budget, adapter.target_budget) == (4 * INIT_R, budget, 4 * TARGET_R)
    assert "(how many now is not known)" in " ".join(str(peft_gradguard.report(model)).split())


@pytest.mark.peft
@pytest.mark.parametrize("name", ["other", "another"])
def test_several_adapters_of_which_one_trains(name: str) -> None:
    model = build(branches())
    advance(model, 1, 2)
    add_inference_adapter(name)(model, 0)
    report = peft_gradguard.report(model)
    trained, other = report.adapters
    assert (trained.adapter, other.adapter) == ("default", name)
    assert {p.steps_scored for p in parameters(trained).values()} == {2}
    assert {p.steps_scored for p in parameters(other).values()} == {0}
    assert (other.init_budget, other.budget, other.target_budget, other.advice) == (None, None, None, ())
    assert {m.reason for m in other.modules} == {"frozen"}
    assert "not trained here" in str(report)


@pytest.mark.peft
def test_adapter_that_was_loaded_tells_its_ranks(tmp_path: Path) -> None:
    scenario = branches()
    train(scenario, str(tmp_path))
    torch.manual_seed(0)
    loaded = only(peft.PeftModel.from_pretrained(two_branches(), str(tmp_path)))
    assert sum(module.rank_kept for module in loaded.modules) == 4 * TARGET_R
    assert {module.rank_started for module in loaded.modules} == {INIT_R}
    assert all(module.ranked for module in loaded.modules)


@pytest.mark.peft
def test_adapter_that_was_loaded_to_train_on_tells_what_was_ranked(tmp_path: Path) -> None:
    train(branches(prepare=frozen("trunk.0")), str(tmp_path))
    loaded = peft.PeftModel.from_pretrained(two_branches(), str(tmp_path), is_trainable=True)
    assert {m.name for m in only(loaded).modules if m.ranked} == {"trunk.2", "branch.0", "branch.2"}
    assert {m.reason for m in only(loaded).modules} == {None}


@pytest.mark.peft
def test_ranks_without_a_pattern_are_the_rows_of_e_that_are_not_zero(model: peft.PeftModel) -> None:
    trunk = model.base_model.model.trunk
    trunk[0].lora_E["default"].data = torch.tensor([[1.0], [0.0], [-2.0], [0.0], [0.0], [1e-30]])
    trunk[2].lora_E["default"].data.zero_()
    found = modules(only(model))
    assert (found["trunk.0"].rank_kept, found["trunk.0"].rank_started) == (3, INIT_R)
    # As PEFT starts, or before the first step of the optimizer: nothing is pruned.
    assert (found["trunk.2"].rank_kept, found["trunk.2"].rank_started) == (INIT_R, INIT_R)


@pytest.mark.peft
@pytest.mark.parametrize(("frozen_steps", "most_often"), [(2, "no gradient"), (5, "frozen")])
def test_reason_of_a_module_is_the_one_that_came_most_often(
    model: peft.PeftModel, frozen_steps: int, most_often: str
) -> None:
    branch = [parameter for name, parameter in model.named_parameters() if ".branch." in name and ".lora_" in name]
    for step in range(1, 8):
        for parameter in branch:
            parameter.requires_grad_(step > frozen_steps)
        advance(model, step, branch=False)
    adapter = only(model)
    assert {m.name: m.reason for m in adapter.modules if m.reason} == dict.fromkeys(
        ["branch.0", "branch.2"], most_often
    )
    assert parameters(adapter)["branch.0.lora_A.default"].steps_skipped == {
        "frozen": frozen_steps, "no gradient": 7 - frozen_steps
    }  # fmt: skip


@pytest.mark.parametrize("noted", [True, False], ids=["ZeRO 3", "FSDP"])
def test_pieces_of_parameters_are_reported_as_far_as_known(model: peft.PeftModel, noted: bool) -> None:
    advance(model, *range(1, FIRST_MASKING + 1), optimise=True)
    frozen("trunk.0")(model, 0)
    model.peft_config["default"].rank_pattern.pop("trunk.0.lora_E.default")
    shapes = {}
    for name, parameter in model.named_parameters():
        if ".lora_" in name:
            shapes[name.removeprefix("base_model.model.")] = tuple(parameter.shape)
            if noted:
                parameter.ds_shape = parameter.shape
            parameter.data = torch.empty(0)
    adapter = only(model)
    assert {n: p.shape for n, p in parameters(adapter).items()} == (shapes if noted else dict.fromkeys(shapes, ()))
    assert modules(adapter)["trunk.0"].rank_kept == INIT_R
    assert sum(m.rank_kept for m in adapter.modules if m.ranked) == sum(
        sum(bits) for bits in model.peft_config["default"].rank_pattern.values()
    )
    assert str(peft_gradguard.report(model))


def test_values_that_are_not_there_are_not_asked_for(model: peft.PeftModel) -> None:
    advance(model, 1, 2)
    # As a DTensor, of which this process has a part.
    model.base_model.rankallocator.exp_avg_ipt["trunk.0.lora_E.default"].full_tensor = None
    found = modules(only(model))
    assert found["trunk.0"].importance is None
    assert found["trunk.2"].importance is not None
    model.base_model.model.to("meta")
    model.base_model.rankallocator.reset_ipt()
    assert {module.rank_kept for module in only(model).modules} == {INIT_R}
