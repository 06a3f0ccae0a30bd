"""Hostile use: what user code, logging and the interpreter may do around the guard, and how it holds."""

from __future__ import annotations

import copy
import functools
import json
import multiprocessing
import os
import pickle
import subprocess
import sys
from typing import TYPE_CHECKING, Any

import peft
import pytest
import torch
import wrapt
from fresh import python_path, run
from peft.tuners.adalora import RankAllocator
from scenarios import (
    FINALISING,
    INIT_R,
    TARGET_R,
    TOTAL,
    TwoBranches,
    adalora_config,
    branches,
    frozen,
    loss_of,
    vectors,
)
from steps import advance, backward, kept_ranks, late, new_model, same_state, state_of
from torch import nn

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

INNER = "base_model.model."


@pytest.fixture
def model() -> peft.PeftModel:
    return new_model()


@pytest.fixture
def said(caplog: pytest.LogCaptureFixture) -> Callable[[], list[str]]:
    return lambda: [record.getMessage() for record in caplog.records if record.name == "peft_gradguard"]


# -- Subclasses of RankAllocator


class CallsSuper(RankAllocator):
    def update_ipt(self, model: nn.Module) -> None:
        super().update_ipt(model)


class CallsSuperTwice(RankAllocator):
    def update_ipt(self, model: nn.Module) -> None:
        super().update_ipt(model)
        super().update_ipt(model)


class OwnScores(RankAllocator):
    """Scores by the gradient alone, and by PEFT's rule for what is AdaLoRA's."""

    def update_ipt(self, model: nn.Module) -> None:
        for name, parameter in model.named_parameters():
            if "lora_" in name and self.adapter_name in name:
                self.ipt[name] = self.exp_avg_ipt[name] = self.exp_avg_unc[name] = parameter.grad.abs()


class EqualByConfig(RankAllocator):
    """Like a data class: equal to others, and not hashable."""

    def __eq__(self, other: object) -> bool:
        return isinstance(other, RankAllocator)

    __hash__ = None  # type: ignore[assignment]


class EqualAndHashable(EqualByConfig):
    def __hash__(self) -> int:  # type: ignore[override]
        return 1


SUBCLASSES = [CallsSuper, CallsSuperTwice, OwnScores, EqualByConfig, EqualAndHashable]


@pytest.mark.parametrize("kind", SUBCLASSES)
def test_subclass_is_guarded_too(kind: type[RankAllocator]) -> None:
    model = new_model(kind)
    frozen("trunk.0")(model, 0)
    advance(model, *range(1, TOTAL + 1))
    assert kept_ranks(model) == 3 * TARGET_R
    assert not [name for name in model.peft_config["default"].rank_pattern if "trunk.0" in name]


@pytest.mark.parametrize("kind", SUBCLASSES)
def test_late_calls_of_a_subclass_are_rescued(kind: type[RankAllocator], said: Callable[[], list[str]]) -> None:
    model = new_model(kind)
    late(model, torch.optim.SGD(model.parameters(), lr=1e-2), *range(1, TOTAL + 1))
    assert kept_ranks(model) == 4 * TARGET_R
    assert len(said()) == 1
    assert "step 1" in said()[0]


@pytest.mark.parametrize("kind", [EqualByConfig, EqualAndHashable])
def test_allocators_that_are_equal_are_still_two(kind: type[RankAllocator], said: Callable[[], list[str]]) -> None:
    for _ in range(2):
        model = new_model(kind)
        frozen("trunk.0", "lora_A")(model, 0)
        advance(model, 1)
    assert len(said()) == 2


# -- Other wrappers


def by_wrapt(seen: list[str]) -> None:
    def observe(wrapped: Any, instance: Any, args: Any, kwargs: Any) -> Any:
        seen.append(wrapped.__name__)
        return wrapped(*args, **kwargs)

    wrapt.wrap_function_wrapper(RankAllocator, "update_ipt", observe)


def by_assignment(seen: list[str]) -> None:
    original = RankAllocator.update_ipt

    def update_ipt(self: RankAllocator, model: nn.Module) -> None:
        seen.append("update_ipt")
        original(self, model)

    RankAllocator.update_ipt = update_ipt


def by_functools(seen: list[str]) -> None:
    original = RankAllocator.update_ipt

    @functools.wraps(original)
    def update_ipt(*args: Any, **kwargs: Any) -> None:
        seen.append("update_ipt")
        original(*args, **kwargs)

    RankAllocator.update_ipt = update_ipt


@pytest.fixture
def put_back() -> Iterator[None]:
    original = vars(RankAllocator)["update_ipt"]
    yield
    RankAllocator.update_ipt = original


@pytest.mark.usefixtures("put_back")
@pytest.mark.parametrize("is_late", [False, True], ids=["in time", "late"])
@pytest.mark.parametrize("wrap", [by_wrapt, by_assignment, by_functools])
def test_wrapper_around_ours_sees_each_call_and_all_holds(
    wrap: Callable[[list[str]], None], is_late: bool, model: peft.PeftModel
) -> None:
    seen: list[str] = []
    wrap(seen)
    frozen("trunk.0")(model, 0)
    if is_late:
        late(model, torch.optim.SGD(model.parameters(), lr=1e-2), *range(1, TOTAL + 1))
    else:
        advance(model, *range(1, TOTAL + 1))
    assert len(seen) == FINALISING - 1
    assert kept_ranks(model) == 3 * TARGET_R


# -- named_parameters as user code makes it


def test_named_parameters_patched_on_the_model(model: peft.PeftModel) -> None:
    """A filter without arguments, as one writes it for an optimizer."""
    inner = model.base_model.model
    walk = inner.named_parameters
    inner.named_parameters = lambda: ((name, p) for name, p in walk() if "trunk.0" not in name)
    advance(model, *range(1, FINALISING + 1))
    assert kept_ranks(model) == 3 * TARGET_R
    assert not [name for name in model.peft_config["default"].rank_pattern if "trunk.0" in name]


def train_with_duplicates(doubled: str) -> tuple[Any, Any, list[Any]]:
    model = new_model()
    inner = model.base_model.model
    walk = inner.named_parameters
    inner.named_parameters = lambda: [pair for pair in walk() for _ in range(1 + (doubled in pair[0]))]
    advance(model, *range(1, FINALISING))
    allocator = model.base_model.rankallocator
    return allocator.exp_avg_ipt, model.peft_config["default"].rank_pattern, [allocator.init_bgt, allocator.target_bgt]


def tied() -> nn.Module:
    base = TwoBranches()
    base.branch[2] = base.trunk[2]
    return base


def train_tied() -> tuple[Any, Any, list[Any]]:
    """One module under two names, as in ALBERT's shared layers."""
    model = new_model(scenario=branches(base=tied))
    advance(model, *range(1, FINALISING))
    allocator = model.base_model.rankallocator
    return allocator.exp_avg_ipt, model.peft_config["default"].rank_pattern, [allocator.init_bgt, allocator.target_bgt]


def train_with_one_shared(factor: str) -> tuple[Any, Any, list[Any]]:
    """All layers share one A, or one B."""
    model = new_model()
    trunk, branch = model.base_model.model.trunk, model.base_model.model.branch
    for layer in (trunk[2], branch[0], branch[2]):
        own, first = getattr(layer, factor)["default"], getattr(trunk[0], factor)["default"]
        if own.shape == first.shape:
            getattr(layer, factor)["default"] = first
    advance(model, *range(1, FINALISING))
    allocator = model.base_model.rankallocator
    return allocator.exp_avg_ipt, model.peft_config["default"].rank_pattern, [allocator.init_bgt, allocator.target_bgt]


@pytest.mark.parametrize(
    "training",
    [
        (train_with_duplicates, "lora_"),
        (train_with_duplicates, "trunk.0.lora_B"),
        (train_tied,),
        (train_with_one_shared, "lora_A"),
        (train_with_one_shared, "lora_B"),
    ],
)
def test_parameters_met_twice_are_scored_as_plain_peft_does(
    training: tuple[Any, ...], plain: Callable[..., Any]
) -> None:
    scores, pattern, budget = training[0](*training[1:])
    plain_scores, plain_pattern, plain_budget = plain(*training)
    assert scores.keys() == plain_scores.keys()
    assert all(torch.equal(scores[name], plain_scores[name]) for name in scores)
    assert pattern == plain_pattern
    assert budget == plain_budget


def test_shared_factor_beside_a_frozen_layer(model: peft.PeftModel) -> None:
    """PEFT finds it under the name of the other module, and ranks by the others; so the budget counts its ranks."""
    trunk, branch = model.base_model.model.trunk, model.base_model.model.branch
    branch[2].lora_A["default"] = trunk[2].lora_A["default"]
    frozen("trunk.0")(model, 0)
    advance(model, *range(1, TOTAL + 1))
    assert model.base_model.rankallocator.init_bgt == 3 * INIT_R
    assert kept_ranks(model) == 3 * TARGET_R
    assert not branch[2].lora_E["default"].all()


def test_layers_added_and_removed_in_training(model: peft.PeftModel) -> None:
    inner = model.base_model.model
    removed = inner.branch
    inner.branch = nn.Identity()
    advance(model, *range(1, 5))
    assert model.base_model.rankallocator.init_bgt == 2 * INIT_R
    inner.branch = removed
    advance(model, *range(5, 9))
    assert model.base_model.rankallocator.init_bgt == 4 * INIT_R
    inner.branch = nn.Identity()
    advance(model, *range(9, TOTAL + 1))
    assert kept_ranks(model) == 2 * TARGET_R


def test_parameters_replaced_under_kept_gradients_of_another_shape(model: peft.PeftModel) -> None:
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-2)
    late(model, optimizer, 1, 2)
    loss_of(model, vectors(3), False).backward()
    optimizer.step()
    optimizer.zero_grad()
    layer = model.base_model.model.trunk[0]
    layer.lora_A["default"] = nn.Parameter(layer.lora_A["default"][:2].detach().clone())
    layer.lora_B["default"] = nn.Parameter(layer.lora_B["default"][:, :2].detach().clone())
    layer.lora_E["default"] = nn.Parameter(layer.lora_E["default"][:2].detach().clone())
    before = dict(model.base_model.rankallocator.exp_avg_ipt)
    model.base_model.update_and_allocate(3)
    for name, score in model.base_model.rankallocator.exp_avg_ipt.items():
        assert (score is before[name]) == name.startswith("trunk.0."), name


# -- Allocators copied, pickled, and in other processes


def step_of(model: peft.PeftModel, step: int) -> tuple[dict[str, torch.Tensor], Any]:
    advance(model, step)
    return dict(model.base_model.rankallocator.exp_avg_ipt), model.peft_config["default"].rank_pattern


def copied(model: peft.PeftModel) -> peft.PeftModel:
    return copy.deepcopy(model)


def pickled(model: peft.PeftModel) -> peft.PeftModel:
    copied: peft.PeftModel = pickle.loads(pickle.dumps(model))
    return copied


@pytest.mark.parametrize("transfer", [copied, pickled])
@pytest.mark.parametrize("is_late", [False, True], ids=["in time", "late"])
@pytest.mark.filterwarnings("error")
def test_copied_allocator_goes_on_by_itself(
    transfer: Callable[[peft.PeftModel], peft.PeftModel], is_late: bool, model: peft.PeftModel
) -> None:
    frozen("trunk.0")(model, 0)
    if is_late:
        late(model, torch.optim.SGD(model.parameters(), lr=1e-2), 1, 2, 3)
    else:
        advance(model, 1, 2, 3)
    other = transfer(model)
    before = state_of(model.base_model.rankallocator)
    scores, pattern = step_of(other, 4)
    assert same_state(before, state_of(model.base_model.rankallocator))
    own_scores, own_pattern = step_of(model, 4)
    assert own_pattern == pattern
    assert pattern
    assert own_scores.keys() == scores.keys()
    assert all(torch.equal(own_scores[name], scores[name]) for name in scores)


def step_in_worker(model: peft.PeftModel, guarded: bool) -> Any:
    if guarded:
        import peft_gradguard

        assert peft_gradguard.is_enabled()
    scores, pattern = step_of(model, 4)
    return {name: score.tolist() for name, score in scores.items()}, pattern


def test_allocator_goes_on_in_another_process(model: peft.PeftModel) -> None:
    frozen("trunk.0")(model, 0)
    advance(model, 1, 2, 3)
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        # A copy, because torch lets processes share the memory of what they send to each other.
        elsewhere = pool.apply(step_in_worker, (copy.deepcopy(model), True))
    assert elsewhere == step_in_worker(model, True)


def test_pickled_healthy_allocator_goes_on_without_the_guard(model: peft.PeftModel, plain: Callable[..., Any]) -> None:
    advance(model, 1, 2, 3)
    assert plain(step_in_worker, copy.deepcopy(model), False) == step_in_worker(model, True)


# -- Modes and devices


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode, torch.enable_grad])
@pytest.mark.parametrize("is_late", [False, True], ids=["in time", "late"])
def test_calls_under_a_mode_of_torch(mode: Any, is_late: bool, model: peft.PeftModel) -> None:
    frozen("trunk.0")(model, 0)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-2)
    for step in range(1, TOTAL + 1):
        loss_of(model, vectors(step), False).backward()
        optimizer.step()
        if is_late:
            optimizer.zero_grad()
        with mode():
            model.base_model.update_and_allocate(step)
        optimizer.zero_grad()
    assert kept_ranks(model) == 3 * TARGET_R
    assert all(parameter.grad is None for parameter in model.parameters())


def on_meta(model: peft.PeftModel) -> peft.PeftModel:
    model.to("meta")
    for name, parameter in model.named_parameters():
        if ".lora_" in name:
            parameter.grad = torch.empty_like(parameter)
    return model


def score_on_meta() -> list[str]:
    """Warm-up, which has no need of values, and the first masking step, which PEFT cannot do on the meta device."""
    model = on_meta(new_model())
    model.base_model.update_and_allocate(1)
    scores = model.base_model.rankallocator.exp_avg_ipt
    try:
        model.base_model.update_and_allocate(4)
    except RuntimeError as error:
        return [*scores, str(error)]
    return [*scores, "no error"]


def test_meta_device_is_as_in_plain_peft(plain: Callable[..., Any]) -> None:
    found = score_on_meta()
    assert len(found) == 13
    assert "meta tensors" in found[-1]
    assert found == plain(score_on_meta)


def test_offloaded_layers_are_left_out(model: peft.PeftModel) -> None:
    """On the meta device without gradients, as accelerate leaves them between two forwards."""
    model.base_model.model.branch.to("meta")
    for step in range(1, TOTAL + 1):
        backward(model, step, branch=False)
        model.base_model.update_and_allocate(step)
    assert kept_ranks(model) == 2 * TARGET_R


# -- Names


class OddNames(nn.Module):
    def __init__(self, *names: str) -> None:
        super().__init__()
        self.layers = nn.ModuleDict({name: nn.Linear(4, 4) for name in names})

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        for layer in self.layers.values():
            inputs = layer(inputs)
        return inputs


def odd_model(*names: str, adapter: str = "default") -> peft.PeftModel:
    torch.manual_seed(0)
    config = adalora_config(target_modules=list(names))
    model = peft.get_peft_model(OddNames(*names), config, adapter_name=adapter)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if ".lora_E." in name:
                parameter.normal_()
    return model


def train_odd(model: peft.PeftModel, last: int = TOTAL) -> None:
    for step in range(1, last + 1):
        model.zero_grad()
        model(torch.randn(3, 4, generator=torch.Generator().manual_seed(step))).square().sum().backward()
        model.base_model.update_and_allocate(step)


@pytest.mark.parametrize("adapter", ["default", "übung", "アダプター", "a b", "{}", "lora", "[0]"])
def test_unicode_and_odd_names(adapter: str, said: Callable[[], list[str]], tmp_path: Any) -> None:
    names = ["schicht_ä", "層", "a b", "{0}", "__class__x"]
    model = odd_model(*names, adapter=adapter)
    model.get_parameter(f"{INNER}layers.層.lora_E.{adapter}").requires_grad = False
    train_odd(model)
    pattern = model.peft_config[adapter].rank_pattern
    assert sum(map(sum, pattern.values())) == 4 * TARGET_R
    assert [f"layers.層.lora_E.{adapter}" in message for message in said()] == [True]


def percent_error() -> str:
    try:
        train_odd(odd_model("50%", "other"))
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return "no error"


def test_percent_in_a_name_is_scored_and_logged(said: Callable[[], list[str]], plain: Callable[..., Any]) -> None:
    model = odd_model("50%", "100%s")
    model.get_parameter(f"{INNER}layers.50%.lora_A.default").requires_grad = False
    train_odd(model, last=3)
    assert len(model.base_model.rankallocator.exp_avg_ipt) == 5
    assert [message.splitlines()[1:] for message in said()] == [["  layers.50%.lora_A.default"]]
    # Masking formats names (``name_m % "lora_E"``), so that plain PEFT fails there too.
    assert percent_error() == plain(percent_error) != "no error"


def test_dots_in_adapter_names_are_not_possible() -> None:
    with pytest.raises(KeyError, match=r'contain "\."'):
        odd_model("a", adapter="v1.0")


# -- The interpreter's own options


TRAINING = """
import json, logging, sys, warnings
import torch, peft
warnings.simplefilter('error')
import peft_gradguard
from scenarios import TOTAL, branches, build, frozen, loss_of, vectors

logging.basicConfig(stream=sys.stdout)
model = build(branches())
frozen("trunk.0")(model, 0)
optimizer = torch.optim.SGD(model.parameters(), lr=1e-2)
for step in range(1, TOTAL + 1):
    loss_of(model, vectors(step), False).backward()
    optimizer.step()
    optimizer.zero_grad()
    model.base_model.update_and_allocate(step)
pattern = model.peft_config["default"].rank_pattern
print(json.dumps([sum(map(sum, pattern.values())), len(pattern)]))
"""


def test_options_of_the_interpreter() -> None:
    # Python's development mode, but for its slow allocator, and every warning an error, also one of an open file.
    environ = {**os.environ, "PYTHONPATH": python_path(), "PYTHONMALLOC": "pymalloc"}
    found = subprocess.run(
        [sys.executable, "-O", "-X", "dev", "-c", TRAINING], env=environ, capture_output=True, text=True
    )
    assert found.returncode == 0, found.stderr
    assert json.loads(found.stdout.splitlines()[-1]) == [3 * TARGET_R, 3]
    assert found.stdout.count("WARNING:peft_gradguard:") == 2
    assert "peft_gradguard" not in found.stderr


RETURNS_NOTHING = """
import peft, torch
from peft.tuners.adalora import RankAllocator

original = getattr(RankAllocator, NAME)


def method(self, *args, **kwargs):
    original(self, *args, **kwargs)


setattr(RankAllocator, NAME, method)
import peft_gradguard
from situations import make, train

def call(model, step):
    model.base_model.rankallocator.update_and_allocate(model, step)


train(make(), range(1, 16), allocate=call)
print(len(peft_gradguard.report(make()).adapters))
"""


@pytest.mark.parametrize("name", ["update_and_allocate", "mask_to_budget"])
def test_wrappers_beneath_the_guard_that_return_nothing(name: str) -> None:
    program = RETURNS_NOTHING.replace("NAME", repr(name))
    assert run([sys.executable, "-c", program]).stdout == "1\n"
