"""``AllocatorState``: a training that is stopped at any step and taken up again ends as the one never stopped."""

from __future__ import annotations

import gc
import io
import re
import subprocess
import sys
from typing import TYPE_CHECKING, Any

import accelerate
import peft
import pytest
import safetensors.torch
import torch
import torch.distributed.checkpoint as dcp
from scenarios import (
    FINALISING,
    TOTAL,
    adalora_config,
    branches,
    build,
    frozen,
    loss_of,
    sometimes,
    two_branches,
    vectors,
)

import peft_gradguard
from peft_gradguard import AllocatorState

if TYPE_CHECKING:
    import logging
    from collections.abc import Callable
    from pathlib import Path

SCENARIO = branches(batch=sometimes, prepare=frozen("trunk.2"))
STEPS = [1, 3, 4, 5, 8, 11, FINALISING - 1, FINALISING, FINALISING + 1, TOTAL - 1]
"""In warm-up, at and between masking steps, around the one that settles the ranks, and in the final phase."""


def made() -> tuple[peft.PeftModel, torch.optim.Optimizer]:
    model = build(SCENARIO)
    SCENARIO.prepare(model, 0)
    return model, torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)


def train(
    model: peft.PeftModel, optimizer: Any, first: int, last: int, after: Callable[[int], Any] | None = None
) -> None:
    model.train()
    for step in range(first, last + 1):
        loss_of(model, SCENARIO.batch(step), regularised=True).backward()
        optimizer.step()
        model.base_model.update_and_allocate(step)
        optimizer.zero_grad()
        if after is not None:
            after(step)


def trained(last: int) -> peft.PeftModel:
    model, optimizer = made()
    train(model, optimizer, 1, last)
    return model


def facts(model: peft.PeftModel) -> dict[str, Any]:
    allocator = model.base_model.rankallocator
    pattern = model.peft_config["default"].rank_pattern
    return {
        **{f"weight {name}": p.detach().clone() for name, p in model.named_parameters()},
        **{
            f"{kind} {name}": score.clone()
            for kind in ("ipt", "exp_avg_ipt", "exp_avg_unc")
            for name, score in getattr(allocator, kind).items()
        },
        "budget": torch.tensor([allocator.init_bgt, allocator.target_bgt]),
        "counted": allocator.name_set,
        "pattern": pattern,
        "counts": str(peft_gradguard.report(model)),
    }


def same(one: dict[str, Any], other: dict[str, Any]) -> bool:
    return one.keys() == other.keys() and all(
        torch.equal(value, other[name]) if isinstance(value, torch.Tensor) else value == other[name]
        for name, value in one.items()
    )


class Never:
    """The training that is never stopped, and what it saved on its way."""

    def __init__(self, adapter_only: bool) -> None:
        model, optimizer = made()
        self.saved: dict[int, bytes] = {}

        def save(step: int) -> None:
            weights = peft.get_peft_model_state_dict(model) if adapter_only else model.state_dict()
            file = io.BytesIO()
            torch.save([weights, optimizer.state_dict(), AllocatorState(model).state_dict()], file)
            self.saved[step] = file.getvalue()

        train(model, optimizer, 1, TOTAL, save)
        self.end = facts(model)


@pytest.fixture(scope="module", params=[False, True], ids=["whole", "adapter only"])
def never(request: pytest.FixtureRequest) -> tuple[Never, bool]:
    return Never(request.param), request.param


def without_skips(end: dict[str, Any]) -> dict[str, Any]:
    """What the report counts of skipped parameters begins anew."""
    return {name: value for name, value in end.items() if name != "counts"}


@pytest.mark.peft
@pytest.mark.parametrize("step", STEPS)
def test_a_loop_of_ones_own(step: int, never: tuple[Never, bool]) -> None:
    run, adapter_only = never
    weights, optimizer_state, state = torch.load(io.BytesIO(run.saved[step]), weights_only=True)
    model, optimizer = made()
    if adapter_only:
        peft.set_peft_model_state_dict(model, weights)
    else:
        model.load_state_dict(weights)
    AllocatorState(model).load_state_dict(state)
    optimizer.load_state_dict(optimizer_state)
    train(model, optimizer, step + 1, TOTAL, lambda _: adapter_only and peft.get_peft_model_state_dict(model))
    assert same(without_skips(facts(model)), without_skips(run.end))


@pytest.mark.parametrize("step", [2, 5, FINALISING + 1])
def test_accelerate(step: int, tmp_path: Path) -> None:
    def prepared() -> tuple[accelerate.Accelerator, peft.PeftModel, Any]:
        accelerator = accelerate.Accelerator(cpu=True)
        model, optimizer = accelerator.prepare(*made())
        accelerator.register_for_checkpointing(AllocatorState(model))
        return accelerator, model, optimizer

    accelerator, model, optimizer = prepared()
    train(model, optimizer, 1, step)
    accelerator.save_state(str(tmp_path / "state"))
    train(model, optimizer, step + 1, TOTAL)
    accelerator, again, optimizer = prepared()
    accelerator.load_state(str(tmp_path / "state"))
    train(again, optimizer, step + 1, TOTAL)
    assert same(without_skips(facts(again)), without_skips(facts(model)))


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("step", [2, 9, FINALISING])
def test_distributed_checkpoint(step: int, tmp_path: Path) -> None:
    model = trained(step)
    dcp.save({"allocator": AllocatorState(model)}, checkpoint_id=tmp_path)
    again, _ = made()
    dcp.load({"allocator": AllocatorState(again)}, checkpoint_id=tmp_path)
    found, expected = AllocatorState(again).state_dict(), AllocatorState(model).state_dict()
    assert all(torch.equal(found[name].nan_to_num(-1), value.nan_to_num(-1)) for name, value in expected.items())


def test_safetensors(tmp_path: Path) -> None:
    model = trained(9)
    safetensors.torch.save_file(AllocatorState(model).state_dict(), tmp_path / "state")
    again, _ = made()
    AllocatorState(again).load_state_dict(safetensors.torch.load_file(tmp_path / "state"))
    assert again.peft_config["default"].rank_pattern == model.peft_config["default"].rank_pattern


def test_names_and_shapes_are_the_same_at_each_step() -> None:
    model, optimizer = made()
    state = AllocatorState(model)
    shapes = []
    for step in range(1, TOTAL + 1):
        shapes.append({name: (tensor.shape, tensor.dtype) for name, tensor in state.state_dict().items()})
        train(model, optimizer, step, step)
    assert all(shape == shapes[0] for shape in shapes)


def test_what_a_state_looks_like_before_the_first_call() -> None:
    """What is saved must be read by every later release."""
    model, _ = made()
    state = AllocatorState(model).state_dict()
    parameters = [name for name, _ in model.base_model.model.named_parameters() if re.search(r"lora_[ABE]\.", name)]
    assert state["format"].tolist() == [1]
    assert state["0.progress"].tolist() == [-1, 0, 0, 0]
    assert state["0.counts"].tolist() == [[0, -1, -1]] * len(parameters)
    assert not state["0.scored"].any()
    kept = {name: value for name, value in state.items() if name.startswith("0.kept.")}
    assert sorted(kept) == sorted(f"0.kept.{name}" for name in parameters if ".lora_E." in name)
    assert all(value.all() for value in kept.values())


@pytest.mark.parametrize(("there", "here", "called"), [(0, 0, False), (0, 2, True), (2, 0, True), (2, 2, True)])
def test_what_the_guard_knows_of_the_calls(there: int, here: int, called: bool) -> None:
    from peft_gradguard.memory.memory import known_memory

    state, model = AllocatorState(trained(there)).state_dict(), trained(here)
    AllocatorState(model).load_state_dict(state)
    memory = known_memory(model.base_model.rankallocator)
    assert memory is not None
    assert (memory.called, memory.counts.step) == (called, there or None)
    assert (memory.loaded, memory.other_ranks) == (False, False)


@pytest.mark.parametrize("short", [True, False])
def test_the_pattern_has_the_names_that_it_had(short: bool) -> None:
    model, again = trained(9), made()[0]
    config = model.peft_config["default"]
    if short:
        config.rank_pattern = {name.replace(".default", ""): keep for name, keep in config.rank_pattern.items()}
    AllocatorState(again).load_state_dict(AllocatorState(model).state_dict())
    assert again.peft_config["default"].rank_pattern == config.rank_pattern


@pytest.mark.parametrize("ranks", [1, 20])
def test_a_pattern_of_other_lengths_is_another_trainings(ranks: int) -> None:
    model = trained(9)
    pattern = model.peft_config["default"].rank_pattern
    model.peft_config["default"].rank_pattern = {name: [False] * ranks for name in pattern}
    state = AllocatorState(model).state_dict()
    assert not state["0.named"].any()
    assert all(value.all() for name, value in state.items() if name.startswith("0.kept."))


def test_a_training_that_was_over_is_not_judged_again(said: Callable[[], list[str]]) -> None:
    state, again = AllocatorState(trained(TOTAL)).state_dict(), made()[0]
    AllocatorState(again).load_state_dict(state)
    del again
    gc.collect()
    made()
    assert not [text for text in said() if "never settled" in text]


def test_a_training_that_goes_on_by_hand_is_not_judged(records: list[logging.LogRecord]) -> None:
    first, (again, _) = trained(9), made()
    AllocatorState(again).load_state_dict(AllocatorState(first).state_dict())
    loss_of(again, vectors(10), True).backward()
    again.base_model.rankallocator.update_ipt(again.base_model.model)
    del again
    gc.collect()
    made()
    assert not [record for record in records if record.exc_info or "stopped after" in record.getMessage()]
    assert first is not None


def made_with_one_of_its_parameters() -> tuple[peft.PeftModel, str, Any]:
    model, _ = made()
    return model, *next((n, p) for n, p in model.base_model.model.named_parameters() if ".lora_B." in n)


def test_flat_pieces_are_named() -> None:
    """As FSDP1 leaves them."""
    model, name, parameter = made_with_one_of_its_parameters()
    parameter.data = parameter.data.flatten()
    with pytest.raises(ValueError, match=f"flat pieces of {name}. Do it inside of FSDP.summon_full_params"):
        AllocatorState(model).state_dict()


def test_pieces_that_know_their_whole_shape_have_no_weights_in_it() -> None:
    """As ZeRO 3 leaves them: its own checkpoints have the weights."""
    model, name, parameter = made_with_one_of_its_parameters()
    parameter.ds_shape, parameter.data = parameter.shape, torch.empty(0)
    state = AllocatorState(model).state_dict()
    assert f"0.weight.{name}" not in state
    assert state[f"0.ipt.{name}"].shape == parameter.ds_shape


def test_the_tensors_are_copies() -> None:
    model, optimizer = made()
    train(model, optimizer, 1, 8)
    state = AllocatorState(model).state_dict()
    kept = {name: tensor.clone() for name, tensor in state.items()}
    train(model, optimizer, 9, 12)
    again, _ = made()
    AllocatorState(again).load_state_dict(state)
    train(again, made()[1], 9, 10)
    assert all(torch.equal(kept[name].nan_to_num(-1), tensor.nan_to_num(-1)) for name, tensor in state.items())
    AllocatorState(again).load_state_dict(state)
    there = facts(again)
    for tensor in state.values():
        tensor.fill_(1)
    assert same(facts(again), there)


def other_adapter() -> peft.PeftModel:
    torch.manual_seed(0)
    return peft.get_peft_model(two_branches(), adalora_config(**SCENARIO.config), adapter_name="second")


def other_modules() -> peft.PeftModel:
    return peft.get_peft_model(two_branches(), adalora_config(target_modules=["trunk.0"]))


def other(**changes: Any) -> Callable[[], peft.PeftModel]:
    return lambda: peft.get_peft_model(two_branches(), adalora_config(**{**SCENARIO.config, **changes}))


def without_end() -> peft.PeftModel:
    model = other()()
    model.peft_config["default"].total_step = None
    return model


@pytest.mark.parametrize(
    ("model", "words"),
    [
        (other_adapter, "another model or adapter: only this model has '0.ipt.*second'"),
        (other_modules, "another model or adapter: only the state has"),
        (other(init_r=7), "the shape"),
        (other(init_r=4), "the shape"),
        (without_end, "total_step is 20 in the state and not set here"),
        (other(total_step=30), "total_step is 20 in the state and 30 here"),
        (other(beta1=0.5), "beta1 is 0.85 in the state and 0.5 here"),
        (other(tinit=2, deltaT=3), "tinit is 3 in the state and 2 here; deltaT is 2 in the state and 3 here"),
        (lambda: other()().double(), "is torch.float32 in it, and torch.float64 here"),
    ],
)
def test_the_state_of_another_is_refused_and_changes_nothing(model: Callable[[], peft.PeftModel], words: str) -> None:
    state = AllocatorState(trained(9)).state_dict()
    there = model()
    before = AllocatorState(there).state_dict()
    with pytest.raises(ValueError, match=words):
        AllocatorState(there).load_state_dict(state)
    after = AllocatorState(there).state_dict()
    assert all(torch.equal(before[name].nan_to_num(-1), after[name].nan_to_num(-1)) for name in before)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda state: state.update(format=torch.tensor([99])), r"has format \[99\], and this peft_gradguard knows"),
        (lambda state: state.update(format=torch.tensor([0])), r"has format \[0\], and this peft_gradguard knows"),
        (lambda state: state.pop("format"), "has no entry 'format'"),
        (lambda state: state.pop("0.budget"), "only this model has '0.budget'"),
        (lambda state: state.update(more=torch.zeros(1)), "only the state has 'more'"),
        (lambda state: state.update({"0.budget": [1, 2]}), "'0.budget' is no tensor"),
        (lambda state: state["0.progress"].__setitem__(2, 99), "does not know the order of calls 99"),
    ],
)
def test_a_state_that_is_none_is_refused(change: Callable[[dict[str, Any]], Any], words: str) -> None:
    model = trained(9)
    state = AllocatorState(model).state_dict()
    change(state)
    there, _ = made()
    before = facts(there)
    with pytest.raises(ValueError, match=words):
        AllocatorState(there).load_state_dict(state)
    assert same(facts(there), before)


def test_without_a_trainable_adapter() -> None:
    with pytest.raises(ValueError, match="no trainable AdaLoRA adapter in a TwoBranches"):
        AllocatorState(two_branches())
    frozen_model = build(SCENARIO).requires_grad_(False)
    with pytest.raises(ValueError, match="no trainable AdaLoRA adapter in a PeftModel"):
        AllocatorState(frozen_model)


@pytest.mark.peft
def test_with_the_guard_off() -> None:
    with peft_gradguard.disabled():
        one = build(branches())
        optimizer = torch.optim.AdamW([p for p in one.parameters() if p.requires_grad], lr=1e-2)
        train_whole(one, optimizer, 1, 9)
        state, weights, moments = AllocatorState(one).state_dict(), one.state_dict(), optimizer.state_dict()
        other_one = build(branches())
        other_optimizer = torch.optim.AdamW([p for p in other_one.parameters() if p.requires_grad], lr=1e-2)
        other_one.load_state_dict({name: value.clone() for name, value in weights.items()})
        AllocatorState(other_one).load_state_dict(state)
        other_optimizer.load_state_dict(moments)
        # Adam's moments are handed on, not copied.
        other_optimizer.load_state_dict(torch.load(_saved(moments), weights_only=True))
        train_whole(one, optimizer, 10, TOTAL)
        train_whole(other_one, other_optimizer, 10, TOTAL)
        assert same(without_skips(facts(one)), without_skips(facts(other_one)))


def _saved(what: Any) -> io.BytesIO:
    file = io.BytesIO()
    torch.save(what, file)
    file.seek(0)
    return file


def train_whole(model: peft.PeftModel, optimizer: Any, first: int, last: int) -> None:
    for step in range(first, last + 1):
        loss_of(model, branches().batch(step), regularised=True).backward()
        optimizer.step()
        model.base_model.update_and_allocate(step)
        optimizer.zero_grad()


@pytest.mark.peft
def test_the_warm_up_of_one_that_came_late_goes_on() -> None:
    """The branch is first used at step 9: it has the warm-up that the others had, before and after the interruption."""
    late = branches(batch=lambda step: branches().batch(step) | {"branch": step >= 9})

    def run(model: peft.PeftModel, optimizer: Any, first: int, last: int) -> None:
        for step in range(first, last + 1):
            loss_of(model, late.batch(step), regularised=True).backward()
            optimizer.step()
            model.base_model.update_and_allocate(step)
            optimizer.zero_grad()

    def start() -> tuple[peft.PeftModel, torch.optim.Optimizer]:
        model = build(late)
        return model, torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)

    one, optimizer = start()
    run(one, optimizer, 1, 9)
    weights, moments, state = torch.load(
        _saved([one.state_dict(), optimizer.state_dict(), AllocatorState(one).state_dict()]), weights_only=True
    )
    run(one, optimizer, 10, TOTAL)
    again, optimizer = start()
    again.load_state_dict(weights)
    AllocatorState(again).load_state_dict(state)
    optimizer.load_state_dict(moments)
    run(again, optimizer, 10, TOTAL)
    assert same(without_skips(facts(one)), without_skips(facts(again)))


@pytest.mark.peft
@pytest.mark.parametrize("set_to_none", [True, False])
@pytest.mark.parametrize("step", [4, 9])
def test_a_loop_that_calls_late_goes_on_late(step: int, set_to_none: bool) -> None:
    def run(model: peft.PeftModel, optimizer: Any, first: int, last: int) -> None:
        for number in range(first, last + 1):
            loss_of(model, branches().batch(number), regularised=True).backward()
            optimizer.step()
            optimizer.zero_grad(set_to_none=set_to_none)
            model.base_model.update_and_allocate(number)

    def start() -> tuple[peft.PeftModel, torch.optim.Optimizer]:
        model = build(branches())
        return model, torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)

    one, optimizer = start()
    run(one, optimizer, 1, step)
    weights, moments, state = torch.load(
        _saved([one.state_dict(), optimizer.state_dict(), AllocatorState(one).state_dict()]), weights_only=True
    )
    run(one, optimizer, step + 1, TOTAL)
    again, optimizer = start()
    again.load_state_dict(weights)
    AllocatorState(again).load_state_dict(state)
    optimizer.load_state_dict(moments)
    run(again, optimizer, step + 1, TOTAL)
    assert same(without_skips(facts(one)), without_skips(facts(again)))


def test_its_import_loads_no_torch() -> None:
    program = "from peft_gradguard import AllocatorState; import sys; assert not {'torch', 'peft'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", program], check=True)
