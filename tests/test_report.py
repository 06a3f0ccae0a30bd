"""What trains, what is skipped, where the ranks went: before, during and after training."""

from __future__ import annotations

import copy
import gc
import json
import logging
import types
import weakref
from typing import TYPE_CHECKING, Any

import peft
import pytest
import torch
from peft_gradguard.advice import _overlap
from peft_gradguard.skips import known_memory
from scenarios import (
    DELTA,
    FINALISING,
    INIT_R,
    LINEARS,
    PEFT_VERSION,
    SCENARIOS,
    TARGET_R,
    TFINAL,
    TINIT,
    TOTAL,
    adalora_config,
    add_inference_adapter,
    branches,
    build,
    classifier,
    every_step,
    frozen,
    in_turn,
    loss_of,
    sometimes,
    train,
    two_branches,
    vectors,
)
from torch import nn

import peft_gradguard
from peft_gradguard import counts as guard_counts
from peft_gradguard import tables

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    from peft_gradguard.reports import AdapterReport, ModuleReport, ParameterReport

FIRST_MASKING = TINIT + 1 + (TINIT + 1) % DELTA


@pytest.fixture
def history() -> Iterator[None]:
    before = guard_counts._keep_history
    peft_gradguard.keep_history()
    yield
    peft_gradguard.keep_history(before)


@pytest.fixture
def model() -> peft.PeftModel:
    return build(branches())


def only(model: object) -> AdapterReport:
    (adapter,) = peft_gradguard.report(model).adapters
    return adapter


def modules(adapter: AdapterReport) -> dict[str, ModuleReport]:
    return {module.name: module for module in adapter.modules}


def parameters(adapter: AdapterReport) -> dict[str, ParameterReport]:
    return {parameter.name: parameter for module in adapter.modules for parameter in module.parameters}


def advance(model: peft.PeftModel, *steps: int, optimise: bool = False, **batch: Any) -> None:
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2) if optimise else None
    for step in steps:
        model.zero_grad()
        loss_of(model, vectors(step, **batch), regularised=False).backward()
        if optimizer:
            optimizer.step()
        model.base_model.update_and_allocate(step)


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


@pytest.mark.parametrize("part", ["branch.0", "branch.2", "trunk.0", "trunk.2"])
def test_budget_of_what_will_be_ranked(model: peft.PeftModel, part: str) -> None:
    frozen(part)(model, 0)
    adapter = only(model)
    assert (adapter.init_budget, adapter.target_budget, adapter.unranked_ranks) == (3 * INIT_R, 3 * TARGET_R, INIT_R)


def test_calls_that_raise_are_not_counted(model: peft.PeftModel) -> None:
    frozen()(model, 0)
    with pytest.raises(peft_gradguard.NoGradientError):
        model.base_model.update_and_allocate(1)
    assert {p.steps_scored + len(p.steps_skipped) for p in parameters(only(model)).values()} == {0}
    assert only(model).step is None


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


def in_ddp(model: peft.PeftModel, folder: Path) -> Iterator[nn.Module]:
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder / 'rendezvous'}", rank=0, world_size=1)
    try:
        yield nn.parallel.DistributedDataParallel(model)
    finally:
        torch.distributed.destroy_process_group()


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


def test_report_without_the_guard_leaves_no_memory() -> None:
    with peft_gradguard.disabled():
        model = build(branches())
        advance(model, *range(1, FINALISING + 1), optimise=True)
        adapter = only(model)
        assert known_memory(model.base_model.rankallocator) is None
    assert sum(module.rank_kept for module in adapter.modules) == 4 * TARGET_R
    assert all(module.ranked for module in adapter.modules)
    assert (adapter.step, adapter.init_budget, adapter.budget) == (None, 4 * INIT_R, None)


NOT_COUNTED = "parameters scored: not counted, for the guard was off"


@pytest.mark.peft
@pytest.mark.parametrize("last", [1, FIRST_MASKING, FINALISING - 1, FINALISING, TOTAL])
def test_training_before_the_guard_was_on_is_not_counted(model: peft.PeftModel, last: int) -> None:
    with peft_gradguard.disabled():
        assert "nothing scored yet" in str(peft_gradguard.report(model))
        advance(model, *range(1, last + 1), optimise=True)
    assert parameters(only(model))["trunk.0.lora_A.default"].steps_scored == 0
    text = str(peft_gradguard.report(model))
    assert f"  budget of the 4 ranked: 24 at the start, ? now, 8 in the end\n  {NOT_COUNTED}\n" in text
    assert "ranks kept\n" in text or "ranks kept  importance\n" in text
    advance(model, last + 1, optimise=True)
    assert (NOT_COUNTED in str(peft_gradguard.report(model))) == (last + 1 >= FINALISING)


def test_nothing_keeps_the_model_alive(history: None) -> None:
    model = build(branches())
    advance(model, 1)
    advance(model, 2, branch=False)
    report = peft_gradguard.report(model)
    references = [weakref.ref(model.base_model.model), weakref.ref(model.base_model.rankallocator)]
    copied = copy.deepcopy(report)
    del model
    gc.collect()
    assert [reference() for reference in references] == [None, None]
    assert copied == report


def test_history_is_off_unless_asked_for(model: peft.PeftModel) -> None:
    advance(model, 1, 2)
    assert only(model).history == ()


def test_history_follows_budget_and_ranks(model: peft.PeftModel, history: None) -> None:
    advance(model, *range(1, FIRST_MASKING), optimise=True, branch=False)
    advance(model, *range(FIRST_MASKING, TOTAL + 1), optimise=True)
    points = only(model).history
    assert [point.step for point in points] == list(range(1, FINALISING + 1))
    assert points[0] == (1, 2 * INIT_R, 4 * INIT_R, 6)
    # From the first masking step on the branch is scored, but keeps all its ranks until it has had its warm-up.
    warm = points[FIRST_MASKING + TINIT - 2]
    assert points[FIRST_MASKING - 1].skipped == 0
    assert points[FIRST_MASKING - 1].total_rank == points[FIRST_MASKING - 1].budget + 2 * INIT_R
    assert warm.total_rank == warm.budget < 4 * INIT_R
    assert points[-1] == (FINALISING, 4 * TARGET_R, 4 * TARGET_R, 0)


ADVICE: dict[str, tuple[dict[str, Any], Callable[[peft.PeftModel, int], None] | None, str]] = {
    "nothing trainable": ({}, frozen(), "Nothing is trainable: all 12 AdaLoRA parameters are frozen"),
    "E frozen": ({}, frozen("trunk", "lora_E"), "lora_E of trunk.0 and trunk.2 is frozen while"),
    "only E": (
        {},
        in_turn(frozen("trunk.0", "lora_A"), frozen("trunk.0", "lora_B")),
        "Only lora_E of trunk.0 trains",
    ),
    "three frozen": (
        {},
        in_turn(frozen("trunk", "lora_E"), frozen("branch.0", "lora_E")),
        "lora_E of trunk.0 and 2 more is frozen while",
    ),
    "A frozen": ({}, frozen("lora_A"), "One of lora_A and lora_B of trunk.0 and 3 more is frozen"),
    "names": ({}, add_inference_adapter("default_eval"), "adapter 'default_eval' contains 'default'"),
    "names in front": ({}, add_inference_adapter("a_default"), "adapter 'a_default' contains 'default'"),
    "more ranks": ({"target_r": INIT_R + 1}, None, f"target_r={INIT_R + 1} is not below init_r={INIT_R}"),
    "ranks": ({"target_r": INIT_R}, None, f"target_r={INIT_R} is not below init_r={INIT_R}"),
}


@pytest.mark.peft
@pytest.mark.parametrize("case", ADVICE)
def test_advice(case: str) -> None:
    config, prepare, said = ADVICE[case]
    model = build(branches(config={"target_modules": LINEARS, **config}))
    if prepare:
        prepare(model, 0)
    advice = peft_gradguard.report(model).adapters[0].advice
    assert len(advice) == 1
    assert said in advice[0]


@pytest.mark.peft
@pytest.mark.parametrize("how", ["frozen", "another adapter"])
@pytest.mark.parametrize(
    ("last", "hurts"),
    [
        (0, "update_and_allocate will raise NoGradientError"),
        (1, "nothing is scored or pruned as long as they are"),
        (FINALISING - 1, "nothing is scored or pruned as long as they are"),
        (FINALISING, None),
        (TOTAL, None),
    ],
)
def test_advice_on_an_adapter_of_which_nothing_trains_any_more(
    model: peft.PeftModel, last: int, hurts: str | None, how: str
) -> None:
    if how != "frozen" and PEFT_VERSION < (0, 6):
        pytest.skip("PEFT 0.5 freezes no adapter for another one")
    advance(model, *range(1, last + 1), optimise=True)
    if how == "frozen":
        frozen()(model, 0)
    else:
        add_inference_adapter("other")(model, 0)
        model.set_adapter("other")
    adapter = peft_gradguard.report(model).adapters[0]
    assert adapter.advice == (
        (
            f"Nothing is trainable: all 12 AdaLoRA parameters are frozen, and {hurts}. model.set_adapter('default') "
            "makes them trainable.",
        )
        if hurts
        else ()
    )
    text = str(peft_gradguard.report(model))
    counted = min(last, FINALISING - 1)
    assert (f"12 at every step; last at step {counted}" in text) == (last > 0)
    # Not ranked as long as it could be, and not left out of anything.
    assert (f"frozen  0 of {counted}\n" in text) == (0 < last < FINALISING)
    assert ("frozen" in text) == (last < FINALISING)
    if "raise" in (hurts or ""):
        with pytest.raises(peft_gradguard.NoGradientError):
            model.base_model.update_and_allocate(1)
    else:
        model.base_model.update_and_allocate(last + 1)


def test_advice_on_steps_that_cannot_fit(model: peft.PeftModel) -> None:
    config = model.peft_config["default"]
    for total in (TINIT + TFINAL, TINIT + TFINAL - 1):
        config.total_step = total
        assert f"leave none of the total_step={total} steps" in only(model).advice[0]
    config.total_step = TINIT + TFINAL + 1
    assert only(model).advice == ()
    config.tinit, config.total_step = TFINAL, 2 * TFINAL
    assert f"leave none of the total_step={2 * TFINAL} steps" in only(model).advice[0]
    config.total_step = None
    assert "total_step is not set" in only(model).advice[0]


def test_budget_without_a_schedule_is_not_known(model: peft.PeftModel) -> None:
    advance(model, *range(1, TINIT + 2))
    config = model.peft_config["default"]
    for total_step, budget in ((TINIT + TFINAL, 4 * TARGET_R), (None, None)):
        config.total_step = total_step
        adapter = only(model)
        assert (adapter.init_budget, adapter.budget, adapter.target_budget) == (4 * INIT_R, budget, 4 * TARGET_R)
    assert "at the start, ? now" in str(peft_gradguard.report(model))


def test_advice_on_flat_parameters(model: peft.PeftModel, tmp_path: Path) -> None:
    from torch.distributed.fsdp import FullyShardedDataParallel

    model.requires_grad_(True)
    holding = in_ddp(model, tmp_path)
    next(holding)
    flat = FullyShardedDataParallel(model, device_id=torch.device("cpu"), use_orig_params=False)
    assert "FSDP has made flat parameters of them (wrap with use_orig_params=True)" in only(flat).advice[0]
    assert not list(holding)


IN_MODULES = "occurs in names of modules (trunk.0): PEFT mixes the two up"
IN_LORA_E = "occurs in lora_E, which is in all names of the rank pattern: PEFT mixes the two up"
A_FACTOR = "contains that of a factor (lora_A, lora_B or lora_E): PEFT replaces it there too"


@pytest.mark.peft
@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("trunk", IN_MODULES),
        ("0", IN_MODULES),
        ("r", IN_MODULES),
        ("lora", IN_LORA_E),
        ("lora_", IN_LORA_E),
        ("lo", IN_LORA_E),
        ("E", IN_LORA_E),
        ("_E", IN_LORA_E),
        ("lora_E", A_FACTOR),
        ("lora_A", A_FACTOR),
        ("my_lora_B", A_FACTOR),
        ("lora_C", None),
        ("my_lora", None),
        ("A", None),
        ("head", None),
    ],
)
def test_advice_on_names_with_which_saving_or_training_fails(name: str, said: str | None, tmp_path: Path) -> None:
    model = peft.get_peft_model(two_branches(), adalora_config(target_modules=LINEARS), adapter_name=name)
    advice = only(model).advice
    assert len(advice) == (said is not None)
    if said is None:
        advance(model, *range(1, FIRST_MASKING + 1), optimise=True)
        model.save_pretrained(str(tmp_path))
        loaded = peft.PeftModel.from_pretrained(two_branches(), str(tmp_path / name), adapter_name=name)
        assert sum(m.rank_kept for m in only(loaded).modules) == sum(m.rank_kept for m in only(model).modules)
        return
    assert advice[0].startswith(f"The adapter's name {name!r} {said}")
    assert advice[0].endswith(
        "and training fails with KeyError. Choose another name."
        if said == A_FACTOR
        else "where it tells them apart by the adapter's name, and save_pretrained fails. Choose another name."
    )
    if said == A_FACTOR:
        with pytest.raises(KeyError):
            advance(model, *range(1, FIRST_MASKING + 1), optimise=True)
        return
    advance(model, *range(1, FIRST_MASKING + 1), optimise=True)
    with pytest.raises(KeyError):
        model.save_pretrained(str(tmp_path))


def test_advice_on_exclusions(model: peft.PeftModel) -> None:
    with peft_gradguard.exclude("*.trunk.*", "*nothing*"):
        adapter = only(model)
        assert "Nothing is excluded by '*nothing*'" in adapter.advice[0]
        assert "as base_model.model.trunk.0.lora_A.default." in adapter.advice[0]
        assert [m.name for m in adapter.modules if m.reason == "excluded"] == ["trunk.0", "trunk.2"]
        assert [p.name for p in parameters(adapter).values() if p.excluded] == [
            name for name in parameters(adapter) if name.startswith("trunk.")
        ]
        assert adapter.unranked_ranks == 2 * INIT_R
    with peft_gradguard.exclude("*"):
        assert "Everything is excluded" in only(model).advice[0]


@pytest.mark.parametrize(
    ("version", "hurts"),
    [
        ("0.15.2", "PEFT 0.15.2 cannot load the saved adapter again as it was"),
        ("0.16.0", "PEFT saves them whole, so they are never pruned"),
    ],
)
@pytest.mark.parametrize(("inside", "are"), [({"b"}, "b is"), ({"b", "a"}, "a and b are")])
def test_advice_on_the_overlap_in_words(
    version: str, hurts: str, inside: set[str], are: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(peft, "__version__", version)
    assert list(_overlap(inside)) == [
        f"{are} targeted by AdaLoRA and inside modules_to_save: {hurts}. Narrow target_modules so that it leaves them "
        "out."
    ]
    assert list(_overlap(set())) == []


@pytest.mark.peft
@pytest.mark.skipif(PEFT_VERSION >= (0, 16), reason="PEFT since 0.16 does not target modules in modules_to_save")
def test_advice_on_the_overlap_with_modules_to_save() -> None:
    adapter = only(build(SCENARIOS["head targeted and in modules_to_save"]))
    assert len(adapter.advice) == 1
    assert "inside modules_to_save: PEFT" in adapter.advice[0]
    inside = {m.name for m in adapter.modules if m.reason == "inside modules_to_save" and not m.ranked}
    assert "classifier.modules_to_save.default.dense" in inside
    assert {p.name for p in parameters(adapter).values() if p.inside_modules_to_save}


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


def trained_on(
    folder: Path, target_r: int, prepare: Callable[[peft.PeftModel, int], None] | None = None
) -> tuple[nn.Module, peft.PeftModel]:
    """A base model, and the adapter of a whole training, loaded into it to be trained on."""
    train(branches(config={"target_modules": LINEARS, "target_r": target_r}), str(folder))
    torch.manual_seed(0)
    base = two_branches()
    # With the guard on it would get all its rows back.
    with peft_gradguard.disabled():
        model = peft.PeftModel.from_pretrained(copy.deepcopy(base), str(folder), is_trainable=True)
    if prepare:
        prepare(model, 0)
    return base, model


@pytest.mark.peft
@pytest.mark.parametrize(
    ("target_r", "will"),
    [
        (TARGET_R, "fail in torch.kthvalue"),
        (INIT_R // 2, "leave 0 of 12 ranks"),
        (INIT_R // 2 + 1, "leave 8 of 16 ranks"),
    ],
)
def test_advice_on_training_a_pruned_adapter_on(target_r: int, will: str, tmp_path: Path) -> None:
    base, model = trained_on(tmp_path, target_r)
    adapter, there = only(model), 4 * target_r
    (advice,) = adapter.advice
    assert advice == (
        f"This adapter has {there} ranks, but its budget begins at {4 * INIT_R}: PEFT cut it when it was loaded, without "
        f"peft_gradguard or with ignore_mismatched_sizes. update_and_allocate will {will}, and PEFT cannot load what is "
        "saved after it. Load it again with the guard on; to train just these ranks, never call update_and_allocate (no "
        "AdaLoraCallback either)."
    )
    assert (
        f"budget of the 4 ranked, which have only {there} ranks: {4 * INIT_R} at the start, {4 * INIT_R} now, {there} "
        "in the end"
    ) in " ".join(str(peft_gradguard.report(model)).split())
    if "kthvalue" in will:
        with pytest.raises(RuntimeError, match="kthvalue"):
            advance(model, *range(1, FINALISING + 1), optimise=True)
        return
    advance(model, *range(1, FINALISING + 1), optimise=True)
    assert sum(map(sum, model.peft_config["default"].rank_pattern.values())) == int(will.split()[1])
    assert ", which have only" not in str(peft_gradguard.report(model))
    model.save_pretrained(str(tmp_path))
    with pytest.raises(IndexError):
        peft.PeftModel.from_pretrained(base, str(tmp_path))


@pytest.mark.peft
def test_first_call_for_a_pruned_adapter_warns(tmp_path: Path, said: Callable[[], list[str]]) -> None:
    _, model = trained_on(tmp_path, INIT_R // 2)
    assert said() == []
    advance(model, 1, 2)
    assert said() == [
        "AdaLoRA's adapter 'default' has 12 ranks, but its budget begins at 24: PEFT cut it when it was loaded, without "
        "peft_gradguard or with ignore_mismatched_sizes. So update_and_allocate prunes too many ranks, or fails in "
        "torch.kthvalue, and PEFT cannot load what is saved after it. Load it again with the guard on; to train just "
        "these ranks, leave out the calls."
    ]


@pytest.mark.peft
def test_first_call_for_an_adapter_beside_a_pruned_one_warns_of_nothing(
    tmp_path: Path, said: Callable[[], list[str]]
) -> None:
    train(branches(config={"target_modules": LINEARS}), str(tmp_path))
    model = build(branches(config={"target_modules": LINEARS}))
    # PEFT's own substring test counts the names of both.
    model.load_adapter(str(tmp_path), "default_eval")
    model.set_adapter("default")
    advance(model, 1)
    assert not [message for message in said() if "its budget begins" in message]


@pytest.mark.peft
def test_a_pruned_adapter_that_is_trained_on_without_allocating_loads(tmp_path: Path) -> None:
    base, model = trained_on(tmp_path, TARGET_R)
    ranks = {module.name: module.rank_kept for module in only(model).modules}
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for step in range(1, 5):
        optimizer.zero_grad()
        loss_of(model, vectors(step), regularised=False).backward()
        optimizer.step()
    model.save_pretrained(str(tmp_path))
    loaded = peft.PeftModel.from_pretrained(base, str(tmp_path))
    assert {module.name: module.rank_kept for module in only(loaded).modules} == ranks
    assert torch.equal(loaded.eval()(**vectors(0)).logits, model.eval()(**vectors(0)).logits)


@pytest.mark.peft
def test_a_fresh_adapter_on_a_merged_one_is_allocated(tmp_path: Path) -> None:
    _, model = trained_on(tmp_path, TARGET_R)
    fresh = peft.get_peft_model(model.merge_and_unload(), adalora_config(target_modules=LINEARS))
    assert only(fresh).advice == ()
    advance(fresh, *range(1, TOTAL + 1), optimise=True)
    assert sum(map(sum, fresh.peft_config["default"].rank_pattern.values())) == 4 * TARGET_R


@pytest.mark.peft
@pytest.mark.parametrize(
    ("target_r", "part"), [(2, "trunk"), (2, "branch"), (2, "branch.0"), (3, "trunk"), (4, "trunk"), (4, "branch")]
)
def test_advice_on_training_a_pruned_adapter_on_with_a_part_of_it_frozen(
    target_r: int, part: str, tmp_path: Path
) -> None:
    # What is ranked is another set then, so that the guard lets PEFT count anew.
    _, model = trained_on(tmp_path, target_r, frozen(part))
    ranked = [module for module in only(model).modules if not module.name.startswith(part)]
    there, target = sum(module.rank_kept for module in ranked), target_r * len(ranked)
    will = f"leave {target} of {there} ranks" if there > target else "fail in torch.kthvalue"
    (advice,) = only(model).advice
    assert f"has {4 * target_r} ranks, but its budget begins at {4 * INIT_R}" in advice
    assert f"update_and_allocate will {will}, and" in advice
    if "leave" in will:
        advance(model, *range(1, FINALISING + 1), optimise=True)
        assert sum(map(sum, model.peft_config["default"].rank_pattern.values())) == target
    else:
        with pytest.raises(RuntimeError, match="kthvalue"):
            advance(model, *range(1, FINALISING + 1), optimise=True)


@pytest.mark.peft
def test_no_advice_on_training_an_adapter_on_that_was_not_pruned(tmp_path: Path) -> None:
    build(branches()).save_pretrained(str(tmp_path))
    model = peft.PeftModel.from_pretrained(two_branches(), str(tmp_path), is_trainable=True)
    assert only(model).advice == ()
    assert "budget of the 4 ranked: 24 at the start, 24 now, 8 in the end" in str(peft_gradguard.report(model))


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


def test_report_is_plain_data(model: peft.PeftModel) -> None:
    advance(model, 1, branch=False)
    report = peft_gradguard.report(model)
    found = report.to_dict()
    assert json.loads(report.to_json(indent=2)) == found
    branch = found["adapters"][0]["modules"][2]
    assert (branch["name"], branch["reason"]) == ("branch.0", "no gradient")
    assert branch["parameters"][0]["steps_skipped"] == {"no gradient": 1}


class Deep(nn.Module):
    """Long names, alike in the middle, and some layers."""

    def __init__(self) -> None:
        super().__init__()
        self.head_of_no_layer = nn.Linear(4, 4)
        self.layers = nn.ModuleDict(
            {
                f"{side}_of_a_model_with_names_that_do_not_fit_into_any_line_of_a_terminal": nn.ModuleList(
                    nn.ModuleDict({f"self_attention_{k}_projection_of_some_length": nn.Linear(4, 4) for k in "qv"})
                    for _ in range(30)
                )
                for side in ("left", "right")
            }
        )  # fmt: skip


@pytest.mark.parametrize("columns", [40, 80, 200])
@pytest.mark.parametrize("phase", ["audit", "excluded", "pruned"])
def test_tables_fit_the_terminal(columns: int, phase: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", str(columns))
    config = adalora_config(target_modules=r".*(projection_of_some_length|no_layer)", init_r=12)
    model = peft.get_peft_model(Deep(), config)
    if phase == "excluded":
        with peft_gradguard.exclude("*right*q_projection*", f"begin{'_of_a_long_pattern' * 5}_end"):
            text = str(peft_gradguard.report(model))
        assert "excluded" in text
        # Cut in its middle, not broken.
        assert [word for word in text.split() if word.startswith("'begin_") and word.endswith("_end':")]
    elif phase == "pruned":
        names = [name for name, _ in model.base_model.model.named_parameters() if ".lora_E." in name]
        model.peft_config["default"].rank_pattern = {name: [i % 7 == 0] * 12 for i, name in enumerate(names)}
        text = str(peft_gradguard.report(model))
        assert "Ranks kept, by layer" in text
    else:
        text = str(peft_gradguard.report(model))
    lines = text.splitlines()
    assert max(map(len, lines)) <= min(columns, 80)
    assert len(lines) < 80
    assert text.isascii()
    assert "0-29" in text
    assert "head_of_no_layer" in text


def test_frozen_layers_are_folded_into_one_line() -> None:
    model = build(classifier())
    frozen("layer.0.")(model, 0)
    frozen("layer.1.")(model, 0)
    text = str(peft_gradguard.report(model))
    assert [line.split() for line in text.splitlines() if line.endswith("frozen")] == [
        ["all", "2", "kinds", "0-1", "all", "frozen"]
    ]


def test_labels_stay_apart() -> None:
    names = [f"a_rather_long_name_{letter}_with_an_end_that_is_the_same" for letter in "abc"]
    for width in (12, 16, 30, 44):
        short = tables.told_apart(names, width)
        assert len(set(short.values())) == 3
        assert max(map(len, short.values())) <= width


def test_html_is_escaped() -> None:
    model = peft.get_peft_model(two_branches(), adalora_config(target_modules=LINEARS), adapter_name="<b>&")
    html = peft_gradguard.report(model)._repr_html_()
    assert "<b>" not in html
    assert "&lt;b&gt;&amp;" in html
    assert html.count("<table>") == html.count("</table>") > 0
