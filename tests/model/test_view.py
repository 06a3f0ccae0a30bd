"""The model that somebody else's code is shown: it can be used, kept, copied and pickled as the model itself."""

from __future__ import annotations

import copy
import io
import pickle
from typing import TYPE_CHECKING, Any

import peft
import pytest
import torch
from peft.tuners.adalora import RankAllocator

if TYPE_CHECKING:
    from collections.abc import Callable

pytestmark = pytest.mark.peft


def new_model(kind: type[RankAllocator] = RankAllocator, frozen: str = "nothing") -> peft.PeftModel:
    torch.manual_seed(0)
    base = torch.nn.Sequential(torch.nn.Linear(8, 8), torch.nn.ReLU(), torch.nn.Linear(8, 8))
    config = peft.AdaLoraConfig(target_modules=["0", "2"], init_r=4, target_r=2, total_step=20, tinit=2, tfinal=3)
    model = peft.get_peft_model(base, config)
    for name, parameter in model.named_parameters():
        if "lora_" in name and frozen in name:
            parameter.requires_grad_(False)
    inner = model.base_model
    inner.rankallocator = kind(inner.model, model.peft_config["default"], "default")
    return model


def train(model: peft.PeftModel, steps: int = 4) -> None:
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    for step in range(1, steps + 1):
        model(torch.randn(4, 8)).pow(2).mean().backward()
        optimizer.step()
        model.base_model.update_and_allocate(step)
        optimizer.zero_grad()


def while_scoring(look: Callable[[Any], Any], frozen: str = "nothing") -> tuple[Any, peft.PeftModel]:
    """What a subclass's own ``update_ipt`` sees of the model that it is given."""
    seen: list[Any] = []

    class Looks(RankAllocator):
        def update_ipt(self, model: Any) -> None:
            seen.append(look(model))
            super().update_ipt(model)

    model = new_model(Looks, frozen)
    train(model, 1)
    return seen[0], model


@pytest.mark.parametrize(
    "arguments",
    [{}, {"recurse": False}, {"prefix": "here"}, {"prefix": "here", "recurse": True, "remove_duplicate": False}],
)
def test_all_parameters_are_there_in_a_healthy_training(arguments: dict[str, Any]) -> None:
    seen, model = while_scoring(lambda m: list(m.named_parameters(**arguments)))
    own = list(model.base_model.model.named_parameters(**arguments))
    assert [name for name, _ in seen] == [name for name, _ in own]
    assert all(one is other for (_, one), (_, other) in zip(seen, own, strict=True))


def test_only_adalora_parameters_without_a_gradient_are_hidden() -> None:
    seen, model = while_scoring(lambda m: [name for name, _ in m.named_parameters()], frozen="2.lora_")
    own = [name for name, _ in model.base_model.model.named_parameters()]
    assert seen == [name for name in own if not name.startswith("2.lora_")]


LOOKS: dict[str, Callable[[Any], Any]] = {
    "call": lambda m: m(torch.ones(1, 8)).shape,
    "class": lambda m: (isinstance(m, torch.nn.Sequential), m.__class__, callable(m)),
    "repr": lambda m: (repr(m), str(m), f"{m}"),
    "state": lambda m: list(m.state_dict()),
    "modules": lambda m: [name for name, _ in m.named_modules()],
    "count": lambda m: sum(p.numel() for p in m.parameters()),
    "vector": lambda m: torch.nn.utils.parameters_to_vector(m.parameters()).shape,
    "items": lambda m: (len(m), [type(child) for child in m], type(m[0])),
    "device": lambda m: next(m.parameters()).device,
    "lookup": lambda m: m.get_parameter("0.lora_E.default").shape,
    "copy": lambda m: type(copy.copy(m)),
    "deepcopy": lambda m: type(copy.deepcopy(m)),
    "pickle": lambda m: type(pickle.loads(pickle.dumps(m))),
    "functional": lambda m: torch.func.functional_call(m, dict(m.named_parameters()), torch.ones(1, 8)).shape,
    "attribute": lambda m: (hasattr(m, "training"), m.training, hasattr(m, "nonsense")),
}


@pytest.mark.parametrize("look", LOOKS)
def test_what_is_asked_of_it_is_answered_as_by_the_model(look: str) -> None:
    seen, model = while_scoring(LOOKS[look])
    assert seen == LOOKS[look](model.base_model.model)


class Keeps(RankAllocator):
    def update_ipt(self, model: Any) -> None:
        self.model = model
        super().update_ipt(model)


def test_kept_by_an_allocator_it_is_the_model_from_then_on() -> None:
    model = new_model(Keeps, frozen="2.lora_")
    train(model, 10)
    kept, inner = model.base_model.rankallocator.model, model.base_model.model
    assert kept == inner
    assert hash(kept) == hash(inner)
    assert [name for name, _ in kept.named_parameters()] == [name for name, _ in inner.named_parameters()]
    # Used for a call of one's own, it is walked anew.
    with torch.no_grad():
        inner.get_parameter("0.lora_E.default").grad = torch.ones(4, 1)
    model.base_model.rankallocator.update_ipt(kept)


def test_copies_and_pickles_of_the_whole_share_what_was_shared() -> None:
    model = new_model(Keeps)
    train(model)
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert type(twin.base_model.rankallocator.model) is torch.nn.Sequential
        assert twin.base_model.rankallocator.model is twin.base_model.model
        assert twin.base_model.model is not model.base_model.model
        train(twin)
    torch.save(vars(model.base_model.rankallocator), io.BytesIO())


def test_pickle_of_a_kept_one_is_read_without_the_guard(plain: Callable[..., Any]) -> None:
    model = new_model()
    kept: list[Any] = []

    class Hands(RankAllocator):
        def mask_to_budget(self, model: Any, budget: int) -> Any:
            kept.append(model)
            return super().mask_to_budget(model, budget)

    model.base_model.rankallocator.__class__ = Hands
    train(model, 12)
    assert kept
    assert plain(type, pickle.loads(pickle.dumps(kept[0]))) is torch.nn.Sequential
    assert plain(is_a_sequential, pickle.dumps(kept[0]))


def is_a_sequential(pickled: bytes) -> bool:
    return type(pickle.loads(pickled)) is torch.nn.Sequential
