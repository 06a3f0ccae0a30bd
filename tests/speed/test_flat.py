"""Scores that lie flat and are made in place: PEFT's bit for bit, whatever happens to them between two steps."""

from __future__ import annotations

import copy
import gc
import hashlib
import io
import logging
import os
import pickle
import subprocess
import sys
import threading
import weakref
from textwrap import dedent
from typing import TYPE_CHECKING, Any

import peft
import pytest
import torch
from scenarios import PEFT_VERSION, adalora_config
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

if TYPE_CHECKING:
    from collections.abc import Callable

    from peft.tuners.adalora import RankAllocator

# This module is imported by the worker without the guard as well: no import of the guard at the top.

today = pytest.mark.skipif(PEFT_VERSION < (0, 20), reason="once, on a PEFT of today, is enough")
KINDS = ("ipt", "exp_avg_ipt", "exp_avg_unc")
STEPS = 50
WARM = 6
"""Steps after which scores are made in place."""
DTYPES = {
    "float32": [torch.float32],
    "bfloat16": [torch.bfloat16],
    "float16": [torch.float16],
    "float64": [torch.float64],
    "mixed": [torch.float32, torch.bfloat16, torch.float16, torch.float64],
}


class Layers(nn.Module):
    """Some small layers, one with more numbers than are worked on at once, and two alike."""

    def __init__(self) -> None:
        super().__init__()
        sizes = [(8, 16), (16, 300), (300, 5), (5, 40_000), (7, 9), (7, 9)]
        self.layers = nn.ModuleList([nn.Linear(*size) for size in sizes])


def new_model(dtypes: str = "float32") -> peft.PeftModel:
    torch.manual_seed(0)
    config = adalora_config(target_modules=[f"layers.{i}" for i in range(6)], total_step=200, beta1=0.85, beta2=0.7)
    model = peft.get_peft_model(Layers(), config)
    for index, (_, parameter) in enumerate(adapters(model)):
        parameter.data = torch.randn(parameter.shape).to(DTYPES[dtypes][index % len(DTYPES[dtypes])])
    return model


def adapters(model: nn.Module) -> list[tuple[str, nn.Parameter]]:
    return [(name, p) for name, p in model.named_parameters() if ".lora_" in name and p.requires_grad]


def give_gradients(model: nn.Module, step: int, resting: float = 0.0) -> None:
    """Made-up gradients; some parameters rest, others at each step."""
    torch.manual_seed(step)
    for _, parameter in adapters(model):
        gradient = torch.randn(parameter.shape).to(parameter.dtype)
        parameter.grad = None if torch.rand(()).item() < resting else gradient


class Used:
    """What plain PEFT is shown where some parameters rest: it cannot stand them."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model

    def named_parameters(self) -> Any:
        return ((name, p) for name, p in self.model.named_parameters() if p.grad is not None)


def score(model: peft.PeftModel, guarded: bool, resting: float = 0.0) -> None:
    tuner = model.base_model
    tuner.rankallocator.update_ipt(tuner.model if guarded or not resting else Used(tuner.model))


def digest(allocator: RankAllocator) -> str:
    """All three scores, with their names, in order."""
    found = hashlib.sha256()
    for kind in KINDS:
        for name, tensor in getattr(allocator, kind).items():
            assert type(tensor) is torch.Tensor
            found.update(f"{kind} {name} {tensor.dtype} {tuple(tensor.shape)} {tensor.stride()}".encode())
            found.update(tensor.contiguous().view(torch.uint8).numpy().tobytes())
    return found.hexdigest()


def train(dtypes: str, resting: float, guarded: bool) -> list[str]:
    model, found = new_model(dtypes), []
    for step in range(1, STEPS + 1):
        give_gradients(model, step, resting)
        score(model, guarded, resting)
        found.append(digest(model.base_model.rankallocator))
    return found


@pytest.mark.peft
@pytest.mark.parametrize("resting", [0.0, 0.4], ids=["all", "others rest at each step"])
@pytest.mark.parametrize("dtypes", DTYPES)
def test_fifty_steps_are_pefts(dtypes: str, resting: float, plain: Callable[..., Any]) -> None:
    assert train(dtypes, resting, True) == plain(train, dtypes, resting, False)


def allocate(dtypes: str) -> list[str]:
    """Whole allocator steps: scores, masks, and the final ranks."""
    model, found = new_model(dtypes), []
    for step in range(1, 200):
        give_gradients(model, step)
        model.base_model.update_and_allocate(step)
        if step % 10 == 0:
            found.append(digest(model.base_model.rankallocator))
            found += [str(p.detach().float().sum().item()) for _, p in adapters(model)]
    return [*found, str(model.peft_config["default"].rank_pattern)]


@pytest.mark.peft
@pytest.mark.parametrize("dtypes", ["float32", "mixed"])
def test_whole_trainings_are_pefts(dtypes: str, plain: Callable[..., Any]) -> None:
    assert allocate(dtypes) == plain(allocate, dtypes)


# -- What happens in the middle


def allocator_of(model: peft.PeftModel) -> RankAllocator:
    return model.base_model.rankallocator


def layers_of(model: peft.PeftModel) -> Any:
    return model.base_model.model.layers


def replaced(model: peft.PeftModel) -> None:
    for layer in layers_of(model)[:3]:
        layer.lora_A["default"] = nn.Parameter(layer.lora_A["default"].detach() * 2)


def memory_replaced(model: peft.PeftModel) -> None:
    for _, parameter in adapters(model):
        parameter.data = parameter.data.clone()


def cast(model: peft.PeftModel) -> None:
    for _, parameter in adapters(layers_of(model)[1]):
        parameter.data = parameter.data.to(torch.bfloat16)


def cast_both(model: peft.PeftModel) -> None:
    """The scores as well, as a whole model that is cast with its allocator."""
    for _, parameter in adapters(model):
        parameter.data = parameter.data.double()
    for kind in KINDS:
        setattr(allocator_of(model), kind, {n: t.double() for n, t in getattr(allocator_of(model), kind).items()})


def transposed(model: peft.PeftModel) -> None:
    weight = layers_of(model)[4].lora_A["default"]
    weight.data = weight.data.t().contiguous().t()


def deep_copied(model: peft.PeftModel) -> peft.PeftModel:
    return copy.deepcopy(model)


def allocator_deep_copied(model: peft.PeftModel) -> None:
    model.base_model.rankallocator = copy.deepcopy(allocator_of(model))


def saved_and_loaded(model: peft.PeftModel) -> peft.PeftModel:
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


def pickled(model: peft.PeftModel) -> None:
    model.base_model.rankallocator = pickle.loads(pickle.dumps(allocator_of(model)))


def state_saved(model: peft.PeftModel) -> None:
    file = io.BytesIO()
    torch.save({kind: getattr(allocator_of(model), kind) for kind in KINDS}, file)
    file.seek(0)
    for kind, scores in torch.load(file).items():
        setattr(allocator_of(model), kind, scores)


def reset(model: peft.PeftModel) -> None:
    allocator_of(model).reset_ipt()


def last_scores_forgotten(model: peft.PeftModel) -> None:
    allocator_of(model).ipt = {}


def one_forgotten(model: peft.PeftModel) -> None:
    for kind in KINDS:
        del getattr(allocator_of(model), kind)["layers.2.lora_B.default"]


def scaled(model: peft.PeftModel) -> None:
    for kind in KINDS:
        setattr(allocator_of(model), kind, {n: t * 2 for n, t in getattr(allocator_of(model), kind).items()})


def changed_in_place(model: peft.PeftModel) -> None:
    allocator_of(model).exp_avg_ipt["layers.0.lora_A.default"].zero_()
    allocator_of(model).exp_avg_unc["layers.1.lora_E.default"].mul_(3)


def one_cloned(model: peft.PeftModel) -> None:
    scores = allocator_of(model).exp_avg_unc
    scores["layers.1.lora_B.default"] = scores["layers.1.lora_B.default"].clone()


def exchanged(model: peft.PeftModel) -> None:
    scores = allocator_of(model).exp_avg_ipt
    one, other = "layers.4.lora_A.default", "layers.5.lora_A.default"
    scores[one], scores[other] = scores[other], scores[one]


def one_for_two(model: peft.PeftModel) -> None:
    scores = allocator_of(model).exp_avg_ipt
    scores["layers.4.lora_A.default"] = scores["layers.5.lora_A.default"]


def one_for_two_kinds(model: peft.PeftModel) -> None:
    allocator = allocator_of(model)
    allocator.exp_avg_unc["layers.0.lora_A.default"] = allocator.exp_avg_ipt["layers.0.lora_A.default"]


def memory_exchanged(model: peft.PeftModel) -> None:
    score = allocator_of(model).exp_avg_ipt["layers.0.lora_A.default"]
    score.data = score.data + 1


def memory_exchanged_between_two(model: peft.PeftModel) -> None:
    scores = allocator_of(model).exp_avg_ipt
    one, other = scores["layers.4.lora_A.default"], scores["layers.5.lora_A.default"]
    one.data, other.data = other.data, one.data


def of_another_size(model: peft.PeftModel) -> None:
    """PEFT goes on with one rank where there were several: torch adds one row to all."""
    for layer in layers_of(model)[:2]:
        layer.lora_A["default"] = nn.Parameter(layer.lora_A["default"].detach()[:1].clone())


def memory_shared(model: peft.PeftModel) -> None:
    for kind in KINDS:
        getattr(allocator_of(model), kind)["layers.1.lora_A.default"].share_memory_()


def all_memory_shared(model: peft.PeftModel) -> None:
    for score in tensors_of(allocator_of(model)):
        score.share_memory_()


def transposed_in_place(model: peft.PeftModel) -> None:
    for kind in KINDS:
        score = getattr(allocator_of(model), kind)["layers.1.lora_A.default"]
        score.copy_(score.clone().t_().reshape(score.shape)).t_().t_()
        score.set_(score.clone().t().contiguous().t())


def expanded(model: peft.PeftModel) -> None:
    scores = allocator_of(model).exp_avg_ipt
    scores["layers.1.lora_A.default"] = scores["layers.1.lora_A.default"][:1].expand(6, -1)


def needing_gradients(model: peft.PeftModel) -> None:
    allocator_of(model).exp_avg_ipt["layers.1.lora_A.default"].requires_grad_()


def dictionaries_exchanged(model: peft.PeftModel) -> None:
    allocator = allocator_of(model)
    for kind in KINDS:
        setattr(allocator, kind, dict(reversed(getattr(allocator, kind).items())))


def other_betas(model: peft.PeftModel) -> None:
    allocator_of(model).beta1 = 0.3


def beta_as_a_tensor(model: peft.PeftModel) -> None:
    allocator_of(model).beta2 = torch.tensor(0.5)


def in_inference_mode(model: peft.PeftModel) -> None:
    with torch.inference_mode():
        score(model, guarded=True)


HAPPENINGS = {
    function.__name__: function
    for function in (
        replaced, memory_replaced, cast, cast_both, transposed, deep_copied, allocator_deep_copied, saved_and_loaded,
        pickled, state_saved, reset, last_scores_forgotten, one_forgotten, scaled, changed_in_place, one_cloned,
        exchanged, one_for_two, one_for_two_kinds, memory_exchanged, memory_exchanged_between_two,
        of_another_size, memory_shared, all_memory_shared, transposed_in_place, expanded, needing_gradients,
        dictionaries_exchanged, other_betas, beta_as_a_tensor, in_inference_mode,
    )
}  # fmt: skip


def train_through(happening: str) -> list[str]:
    model, found = new_model(), []
    for step in range(1, 25):
        give_gradients(model, step)
        if step in (9, 10, 17):
            model = HAPPENINGS[happening](model) or model
            give_gradients(model, step)
        score(model, guarded=True)
        found.append(digest(allocator_of(model)))
    return found


@pytest.mark.peft
@pytest.mark.parametrize("happening", HAPPENINGS)
def test_what_happens_in_the_middle_changes_nothing(happening: str, plain: Callable[..., Any]) -> None:
    assert train_through(happening) == plain(train_through, happening)


def put_back(by_reference: bool) -> list[str]:
    """A training that goes back to the scores of an earlier step, twice."""
    model, found, kept = new_model(), [], {}
    allocator = allocator_of(model)
    for step in range(1, 25):
        give_gradients(model, step)
        score(model, guarded=True)
        if step == 8:
            kept = {
                kind: {n: t if by_reference else t.clone() for n, t in getattr(allocator, kind).items()}
                for kind in KINDS
            }
        if step in (12, 18):
            for kind in KINDS:
                setattr(allocator, kind, dict(kept[kind]))
        found.append(digest(allocator))
    return found


@pytest.mark.peft
@pytest.mark.parametrize("by_reference", [True, False], ids=["references", "clones"])
def test_scores_are_put_back(by_reference: bool, plain: Callable[..., Any]) -> None:
    assert put_back(by_reference) == plain(put_back, by_reference)


def in_turn() -> list[str]:
    models, found = [new_model(), new_model("mixed"), new_model()], []
    for step in range(1, 16):
        for model in models:
            give_gradients(model, step)
            score(model, guarded=True)
            found.append(digest(allocator_of(model)))
    return found


@today
def test_several_allocators_in_turn(plain: Callable[..., Any]) -> None:
    assert in_turn() == plain(in_turn)


@today
def test_an_adapter_beside_it_is_left_alone(plain: Callable[..., Any]) -> None:
    assert beside_another() == plain(beside_another)


def beside_another() -> list[str]:
    model, found = new_model(), []
    for step in range(1, 16):
        if step == 8:
            model.add_adapter("default_other", adalora_config(target_modules=["layers.0"], inference_mode=True))
        give_gradients(model, step)
        scored = [name for name, p in adapters(model) if name.endswith(".default")]
        assert len(scored) == 18
        tuner = model.base_model
        tuner.rankallocator.update_ipt(Named(tuner.model))
        found.append(digest(allocator_of(model)))
    return found


class Named(nn.Module):
    """Without the other adapter, whose name PEFT's substring test would take for ours."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        object.__setattr__(self, "inner", model)

    def named_parameters(self, *_: Any, **__: Any) -> Any:
        return ((n, p) for n, p in self.inner.named_parameters() if n.endswith(".default") and p.grad is not None)


@today
def test_threads_have_their_own() -> None:
    expected = {name: train(name, 0.0, True) for name in ("float32", "float16")}
    found: dict[str, list[str]] = {}
    gradients = threading.Lock()

    def work(dtypes: str) -> None:
        model, digests = new_models[dtypes], []
        for step in range(1, STEPS + 1):
            with gradients:  # torch has one seed for all threads
                give_gradients(model, step)
            score(model, guarded=True)
            digests.append(digest(allocator_of(model)))
        found[dtypes] = digests

    new_models = {name: new_model(name) for name in expected}
    threads = [threading.Thread(target=work, args=(name,)) for name in expected]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == expected


# -- What others hold


def warm_model() -> peft.PeftModel:
    model = new_model()
    for step in range(1, WARM + 1):
        give_gradients(model, step)
        score(model, guarded=True)
    return model


def tensors_of(allocator: RankAllocator) -> list[torch.Tensor]:
    return [tensor for kind in KINDS for tensor in getattr(allocator, kind).values()]


def places_of(allocator: RankAllocator) -> list[int]:
    return [tensor.data_ptr() for tensor in tensors_of(allocator)]


@today
def test_what_nobody_holds_is_made_in_place() -> None:
    model = warm_model()
    allocator, places = allocator_of(model), places_of(allocator_of(model))
    for step in range(WARM + 1, WARM + 5):
        # Half of the parameters rest at half of the steps.
        give_gradients(model, step, resting=0.5 * (step % 2))
        score(model, guarded=True)
        assert places_of(allocator) == places


HOLDERS: dict[str, Callable[[torch.Tensor], Any]] = {
    "a reference": lambda tensor: tensor,
    "a list": lambda tensor: [tensor],
    "detached": lambda tensor: tensor.detach(),
    "data": lambda tensor: tensor.data,
    "a view": lambda tensor: tensor.view(-1),
    "its storage": lambda tensor: tensor.untyped_storage(),
    "its typed storage": lambda tensor: tensor.storage(),
    "a row": lambda tensor: tensor[0],
    "numpy": lambda tensor: tensor.numpy(),
    "on the CPU already": lambda tensor: tensor.cpu(),
    "dlpack": lambda tensor: torch.from_dlpack(tensor),
    "a view of its memory": lambda tensor: torch.empty(0).set_(tensor.untyped_storage()),
    "a memoryview": lambda tensor: memoryview(tensor.numpy()),
}


def values(held: Any) -> torch.Tensor:
    held = held[0] if isinstance(held, list) else held
    return held.clone() if isinstance(held, torch.Tensor) else torch.tensor(held.tolist())


@today
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", HOLDERS)
def test_what_somebody_holds_stays_as_it_is(name: str, kind: str) -> None:
    model, reference = warm_model(), warm_model()
    scores = getattr(allocator_of(model), kind)
    held = HOLDERS[name](scores["layers.1.lora_A.default"])
    before = values(held)
    for step in range(WARM + 1, WARM + 4):
        for each in (model, reference):
            give_gradients(each, step)
            score(each, guarded=True)
        assert torch.equal(values(held), before)
        assert digest(allocator_of(model)) == digest(allocator_of(reference))


@today
def test_what_somebody_holds_stays_as_it_is_where_others_rest() -> None:
    model = warm_model()
    held = {kind: dict(getattr(allocator_of(model), kind)) for kind in KINDS}
    before = copy.deepcopy(held)
    for step in range(WARM + 1, WARM + 4):
        give_gradients(model, step, resting=0.4)
        score(model, guarded=True)
    assert all(torch.equal(t, before[kind][n]) for kind in KINDS for n, t in held[kind].items())
    given = [p for _, p in adapters(model) if p.grad is not None]
    assert 0 < len(given) < len(adapters(model))


@today
def test_who_holds_every_step_sees_every_step() -> None:
    """As an own moving average of the scores does: last step's beside this one's."""
    model, history = warm_model(), []
    for step in range(WARM + 1, WARM + 8):
        give_gradients(model, step)
        score(model, guarded=True)
        scores = allocator_of(model).exp_avg_ipt
        history.append(({n: t.numpy() for n, t in scores.items()}, {n: t.clone() for n, t in scores.items()}))
    for arrays, clones in history:
        assert all(torch.equal(torch.from_numpy(array), clones[n]) for n, array in arrays.items())


@today
def test_memory_that_a_score_has_left_stays_as_it_is() -> None:
    """As where scores are moved by ``data``, and what was there is kept."""
    import peft_gradguard

    model, reference = warm_model(), warm_model()
    kept = [tensor.data for tensor in tensors_of(allocator_of(model))]
    before = copy.deepcopy(kept)
    for each in (model, reference):
        for tensor in tensors_of(allocator_of(each)):
            tensor.data = tensor.data * 2
    for step in range(WARM + 1, WARM + 4):
        for each in (model, reference):
            give_gradients(each, step)
        score(model, guarded=True)
        with peft_gradguard.disabled():
            score(reference, guarded=False)
        assert all(map(torch.equal, kept, before))
        assert digest(allocator_of(model)) == digest(allocator_of(reference))


@today
def test_a_backward_through_a_score_is_that_of_its_step() -> None:
    """torch itself holds what a graph needs, and would refuse to go back through what has changed."""
    model = warm_model()
    score_then = allocator_of(model).exp_avg_ipt["layers.0.lora_A.default"].clone()
    weight = torch.ones_like(score_then, requires_grad=True)
    loss = (allocator_of(model).exp_avg_ipt["layers.0.lora_A.default"] * weight).sum()
    give_gradients(model, WARM + 1)
    score(model, guarded=True)
    loss.backward()
    assert torch.equal(weight.grad, score_then)


@today
def test_a_copy_of_the_allocator_has_its_own_memory() -> None:
    model = warm_model()
    allocator = allocator_of(model)
    for twin in (copy.deepcopy(allocator), pickle.loads(pickle.dumps(allocator))):
        before, own = digest(twin), digest(allocator)
        assert not {*places_of(twin)} & {*places_of(allocator)}
        for tensor in tensors_of(twin):
            tensor.fill_(7)
        assert digest(allocator) == own
        give_gradients(model, WARM + 1)
        twin.update_ipt(model.base_model.model)
        assert digest(allocator) == own
        assert digest(twin) != before


@today
def test_scores_are_saved_as_small_as_pefts(plain: Callable[..., Any]) -> None:
    assert sizes() == plain(sizes)


def sizes() -> list[int]:
    from safetensors.torch import save

    scores = {**allocator_of(warm_model()).exp_avg_ipt}
    file = io.BytesIO()
    torch.save(scores["layers.0.lora_E.default"], file)
    nbytes = [tensor.untyped_storage().nbytes() for tensor in scores.values()]
    return [len(pickle.dumps(scores)), len(save(scores)), file.getbuffer().nbytes, *nbytes]


# -- What is left behind


@today
def test_no_memory_is_kept_once_peft_has_forgotten_it() -> None:
    model = warm_model()
    dead = [weakref.ref(tensor) for tensor in tensors_of(allocator_of(model))]
    storages = [tensor.untyped_storage()._weak_ref() for tensor in tensors_of(allocator_of(model))]
    allocator_of(model).reset_ipt()
    gc.collect()
    assert all(reference() is None for reference in dead)
    assert all(torch.UntypedStorage._expired(storage) for storage in storages)


@today
def test_who_keeps_the_scores_of_e_keeps_few_others(monkeypatch: pytest.MonkeyPatch) -> None:
    """As for a plot of the ranks' scores: each keeps the memory of its run."""
    from peft_gradguard.speed import flat

    original, laid = flat._laid_out, []

    def laid_out(*arguments: Any) -> list[torch.Tensor]:
        flats = original(*arguments)
        laid.extend((flat._weakly(tensor), tensor.numel()) for tensor in flats)
        return flats

    monkeypatch.setattr(flat, "_laid_out", laid_out)
    torch.manual_seed(0)
    base = nn.Sequential(*(nn.Linear(1000, 1000) for _ in range(20)))
    model = peft.get_peft_model(base, adalora_config(target_modules=[str(index) for index in range(20)]))
    history = []
    for step in range(1, WARM + 6):
        give_gradients(model, step)
        score(model, guarded=True)
        if step > WARM:
            history.append({n: t for n, t in allocator_of(model).exp_avg_ipt.items() if ".lora_E." in n})
    allocator_of(model).reset_ipt()
    kept = sum(numbers for memory, numbers in laid if not torch.UntypedStorage._expired(memory.cdata))
    assert 0 < kept <= flat.OFTEN * flat.CHUNK
    assert len(history) == 5


@today
def test_an_allocator_keeps_no_parameter_alive() -> None:
    model = warm_model()
    allocator, parameter = allocator_of(model), weakref.ref(adapters(model)[0][1])
    del model
    gc.collect()
    assert parameter() is None
    assert len(tensors_of(allocator)) == 54


class Live(TorchDispatchMode):
    """Count the bytes of the tensors alive: those given, and those made since."""

    def __init__(self, tensors: list[torch.Tensor]) -> None:
        super().__init__()
        self.now = self.peak = 0
        for tensor in tensors:
            self.count(tensor)
        self.first = self.now

    def count(self, tensor: torch.Tensor) -> None:
        size = tensor.numel() * tensor.element_size()
        self.now += size
        self.peak = max(self.peak, self.now)
        weakref.finalize(tensor, self.forget, size)

    def forget(self, size: int) -> None:
        self.now -= size

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = function(*args, **(kwargs or {}))
        # What returns a part of what it was given, or wrote to it, makes nothing new.
        if all(returned.alias_info is None for returned in function._schema.returns):
            for tensor in result if isinstance(result, (list, tuple)) else [result]:
                if isinstance(tensor, torch.Tensor):
                    self.count(tensor)
        return result


def peaks(steps: int) -> list[int]:
    """What each step needs above what was there, in bytes; layers as large as those of real models."""
    torch.manual_seed(0)
    base = nn.Sequential(*(nn.Linear(12_000, 64) for _ in range(4)))
    model = peft.get_peft_model(base, adalora_config(target_modules=[*"0123"], init_r=12))
    found = []
    for step in range(1, steps + 1):
        give_gradients(model, step)
        gc.collect()
        with Live(tensors_of(model.base_model.rankallocator)) as live:
            model.base_model.rankallocator.update_ipt(model.base_model.model)
        found.append(live.peak - live.first)
    return found


@today
def test_a_step_needs_no_more_memory_than_pefts(plain: Callable[..., Any]) -> None:
    needs, plains = peaks(8), plain(peaks, 8)
    assert max(needs[WARM:]) <= plains[-1]
    # While PEFT and the guard both score, the averages of the step before are kept.
    everything = 4 * 4 * 12 * (12_000 + 64 + 1)
    assert max(needs[1:4]) <= plains[-1] + 2 * everything + 5 * 2**20


# -- Where something goes wrong


@today
@pytest.mark.parametrize("after", [0, 1, 2, 3])
def test_what_cannot_be_made_together_is_left_to_peft(
    after: int, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """The memory that it takes may not be there. What was made before stays, and PEFT makes the others."""
    from peft_gradguard.speed import flat

    model, reference = warm_model(), warm_model()
    original, calls = flat._flatten, []

    def failing(tensors: Any) -> Any:
        calls.append(tensors)
        if len(calls) > after:
            raise RuntimeError("out of memory")
        return original(tensors)

    for each in (model, reference):
        give_gradients(each, WARM + 1)
    score(reference, guarded=True)
    with monkeypatch.context() as patch, caplog.at_level(logging.DEBUG, logger="peft_gradguard"):
        patch.setattr(flat, "_flatten", failing)
        score(model, guarded=True)
    assert len(calls) == after + 1
    assert digest(allocator_of(model)) == digest(allocator_of(reference))
    said = [record.getMessage() for record in caplog.records if "left to PEFT's own code" in record.getMessage()]
    assert len(said) == 1
    give_gradients(model, WARM + 2)
    give_gradients(reference, WARM + 2)
    score(model, guarded=True)
    score(reference, guarded=True)
    assert digest(allocator_of(model)) == digest(allocator_of(reference))


@today
def test_parameters_that_have_grown_spoil_no_other_scores() -> None:
    """PEFT itself fails there. The others are as before, or those of this step."""
    model, reference = warm_model(), warm_model()
    layers_of(model)[0].lora_A["default"] = nn.Parameter(torch.randn(9, 8))
    for each in (model, reference):
        give_gradients(each, WARM + 1)
    for (_, parameter), (_, same) in zip(adapters(model)[1:], adapters(reference)[1:], strict=True):
        parameter.grad = same.grad.clone()
    before = [tensor.clone() for tensor in tensors_of(allocator_of(model))]
    with pytest.raises(RuntimeError, match="must match"):
        score(model, guarded=True)
    score(reference, guarded=True)
    every = zip(tensors_of(allocator_of(model)), before, tensors_of(allocator_of(reference)), strict=True)
    found = [torch.equal(now, then) or torch.equal(now, later) for now, then, later in every]
    assert found == [False] + [True] * 53


@today
def test_pieces_of_a_run(monkeypatch: pytest.MonkeyPatch, plain: Callable[..., Any]) -> None:
    from peft_gradguard.speed import flat

    monkeypatch.setattr(flat, "CPU_CHUNK", 20)
    assert train("float32", 0.0, True) == plain(train, "float32", 0.0, False)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="forks")
@today
def test_small_parameters_need_no_threads_of_torch() -> None:
    """A forked process hangs in them where its parent has used them. PEFT's scores of such parameters need none."""
    program = f"""
        import os, signal, sys
        sys.path[:0] = {[os.path.dirname(__file__), *filter(None, sys.path)]!r}
        import peft_gradguard, torch
        from torch import nn
        from test_flat import *

        torch.set_num_threads(2)
        torch.ones(1 << 20).mul_(2)
        layers = Layers()
        layers.layers = nn.ModuleList([nn.Linear(1500, 20) for _ in range(12)])
        model = peft.get_peft_model(layers, adalora_config(target_modules=[f"layers.{{i}}" for i in range(12)]))
        child = os.fork()
        if not child:
            signal.alarm(60)
            for step in range(1, 8):
                for _, parameter in adapters(model):
                    parameter.grad = torch.full_like(parameter, step)
                score(model, guarded=True)
            os._exit(0)
        print(os.waitpid(child, 0)[1])
    """
    done = subprocess.run([sys.executable, "-c", dedent(program)], capture_output=True, text=True, check=False)
    assert done.stdout == "0\n", done.stderr


@today
def test_torch_without_what_it_takes(monkeypatch: pytest.MonkeyPatch, plain: Callable[..., Any]) -> None:
    from peft_gradguard.speed import flat

    monkeypatch.setattr(flat, "_storage_use_count", None)
    assert train("float32", 0.0, True) == plain(train, "float32", 0.0, False)


@today
def test_runs_of_parameters_stay_below_their_size(monkeypatch: pytest.MonkeyPatch) -> None:
    from peft_gradguard.speed import flat

    monkeypatch.setattr(flat, "CHUNK", 6)
    sizes = {str(index): size for index, size in enumerate((3, 3, 1, 7, 0, 1, 4, 5, 12, 1))}
    parameters = {name: nn.Parameter(torch.empty(size)) for name, size in sizes.items()}
    scores = {name: torch.empty(size) for name, size in sizes.items()}
    runs = [[sizes[name] for name in run] for run in flat._runs_of(parameters, [scores] * 3)]
    assert runs == [[1, 1, 1, 3], [3], [4], [5], [7], [12]]
