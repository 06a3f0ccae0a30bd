"""Whose calls ``AdaLoraCallback`` makes, whose ``total_step`` it sets, and what it lets go of."""

from __future__ import annotations

import copy
import gc
import pickle
import threading
import weakref
from typing import TYPE_CHECKING, Any

import peft
import pytest
import torch
import transformers
from adalora_callback import AdaLoraCallback
from torch import nn

import peft_gradguard

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

STEPS, TINIT, TFINAL = 12, 2, 3


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(4, 6), nn.Linear(6, 4)

    def forward(self, x: torch.Tensor, labels: Any = None) -> dict[str, torch.Tensor]:
        return {"loss": (self.b(torch.tanh(self.a(x))) - 1).pow(2).mean()}


class Points(torch.utils.data.Dataset[dict[str, Any]]):
    def __len__(self) -> int:
        return 400

    def __getitem__(self, index: int) -> dict[str, Any]:
        return {"x": torch.randn(4, generator=torch.Generator().manual_seed(index)), "labels": 0}


def configuration(total: int | None = STEPS) -> peft.AdaLoraConfig:
    config = peft.AdaLoraConfig(
        target_modules=["a", "b"], init_r=4, target_r=2, total_step=total or STEPS, tinit=TINIT, tfinal=TFINAL
    )
    config.total_step = total
    return config


def adapted(config: peft.AdaLoraConfig | None = None) -> peft.PeftModel:
    torch.manual_seed(0)
    return peft.get_peft_model(Net(), config or configuration())


def trainer(model: nn.Module, *callbacks: Any, steps: int = STEPS, folder: str = "run") -> transformers.Trainer:
    arguments = transformers.TrainingArguments(
        output_dir=folder, max_steps=steps, per_device_train_batch_size=2, use_cpu=True, report_to=[],
        disable_tqdm=True, save_strategy="no", learning_rate=1e-2, dataloader_pin_memory=False, logging_steps=100,
    )  # fmt: skip
    return transformers.Trainer(model, arguments, train_dataset=Points(), callbacks=list(callbacks))


def trained(*callbacks: Any) -> peft.PeftModel:
    model = adapted()
    trainer(model, *callbacks).train()
    return model


def same(one: nn.Module, other: nn.Module) -> bool:
    return all(map(torch.equal, one.state_dict().values(), other.state_dict().values()))


def ranks(model: peft.PeftModel) -> int:
    pattern = model.peft_config["default"].rank_pattern
    return sum(map(sum, pattern.values())) if pattern else 0


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def on(event: str, act: Callable[[Any, Any], None]) -> transformers.TrainerCallback:
    """A callback of the user's: ``act(state, model)`` at this event."""
    callback = transformers.TrainerCallback()
    setattr(callback, event, lambda args, state, control, model=None, **_: act(state, model))
    return callback


class BesideAnother(nn.Module):
    """A model that trains, and a copy of it that gives targets."""

    def __init__(self, frozen: bool) -> None:
        super().__init__()
        self.student = adapted()
        self.teacher = copy.deepcopy(self.student)
        if frozen:
            self.teacher.requires_grad_(False)

    def forward(self, x: torch.Tensor, labels: Any = None) -> dict[str, torch.Tensor]:
        with torch.no_grad():
            target = self.teacher(x)["loss"]
        return {"loss": (self.student(x)["loss"] - target - 1).pow(2)}


@pytest.mark.peft
@pytest.mark.parametrize("frozen", [True, False])
def test_a_copy_that_does_not_train_is_never_called(frozen: bool, said: Callable[[], list[str]]) -> None:
    model = BesideAnother(frozen)
    before = copy.deepcopy(model.teacher)
    trainer(model, AdaLoraCallback()).train()
    assert ranks(model.student) == 4
    assert same(model.teacher, before)
    assert not model.teacher.base_model.rankallocator.ipt
    assert said() == []


@pytest.mark.peft
@pytest.mark.parametrize("change", ["reset", "copied", "restored", "emptied and filled"])
def test_scores_that_somebody_changes_are_no_calls(change: str, said: Callable[[], list[str]]) -> None:
    names = ("ipt", "exp_avg_ipt", "exp_avg_unc")

    def act(state: Any, model: Any) -> None:
        allocator = model.base_model.rankallocator
        kept = {name: {key: value.clone() for key, value in getattr(allocator, name).items()} for name in names}
        if state.global_step == 5 and change == "reset":
            allocator.reset_ipt()
        elif change == "emptied and filled":
            allocator.reset_ipt()
            for name in names:
                getattr(allocator, name).update(kept[name])
        elif change == "copied" or (change == "restored" and state.global_step == 0):
            for name in names:
                setattr(allocator, name, kept[name])

    event = "on_train_begin" if change == "restored" else "on_step_end"
    model = trained(AdaLoraCallback(), on(event, act))
    assert ranks(model) == 4
    assert said() == []
    if change != "reset":
        assert same(model, trained(AdaLoraCallback()))


def test_the_same_callback_twice_calls_once(said: Callable[[], list[str]]) -> None:
    callback = AdaLoraCallback()
    assert same(trained(callback, callback), trained(AdaLoraCallback()))
    assert said() == []


def test_two_of_them_score_once_but_for_the_first_step(said: Callable[[], list[str]]) -> None:
    assert ranks(trained(AdaLoraCallback(), AdaLoraCallback())) == 4
    assert len(said()) == 1


@pytest.mark.parametrize("step", [3, 8, 9])
def test_one_call_by_hand_takes_the_others_from_nobody(step: int) -> None:
    """Step 9 is the one that settles the final ranks."""

    def act(state: Any, model: Any) -> None:
        if state.global_step + 1 == step:
            model.base_model.update_and_allocate(step)

    model = trained(AdaLoraCallback(), on("on_optimizer_step", act))
    assert ranks(model) == 4
    assert not model.base_model.rankallocator.ipt


def test_a_call_by_hand_between_the_steps_is_nobodys(said: Callable[[], list[str]]) -> None:
    def act(state: Any, model: Any) -> None:
        if state.global_step == 5:
            model.base_model.update_and_allocate(5)

    model = trained(AdaLoraCallback(), on("on_step_begin", act))
    assert same(model, trained(AdaLoraCallback()))
    assert not [message for message in said() if "AdaLoraCallback leaves" in message]


def test_with_the_guard_off_for_a_while(said: Callable[[], list[str]]) -> None:
    def act(state: Any, model: Any) -> None:
        if state.global_step == 4:
            peft_gradguard.disable()
        if state.global_step == 7:
            peft_gradguard.enable()

    try:
        model = trained(AdaLoraCallback(), on("on_step_end", act))
    finally:
        peft_gradguard.enable()
    assert same(model, trained(AdaLoraCallback()))
    assert said() == []


@pytest.mark.peft
def test_total_step_of_the_user_stays_when_it_is_what_the_callback_once_set() -> None:
    callback = AdaLoraCallback()
    config = configuration(None)
    trainer(adapted(config), callback, steps=STEPS).train()
    assert config.total_step == STEPS
    other = configuration(STEPS)
    trainer(adapted(other), callback, steps=STEPS + 6).train()
    assert other.total_step == STEPS
    config.total_step = STEPS
    trainer(adapted(config), callback, steps=STEPS + 6).train()
    assert config.total_step == STEPS


@pytest.mark.peft
@pytest.mark.parametrize("again", [True, False])
def test_folds_with_one_configuration(again: bool, said: Callable[[], list[str]]) -> None:
    """What no user has set is set anew, by this callback or by another one, for a copy of the configuration too."""
    config, callback = configuration(None), AdaLoraCallback()
    for steps in (STEPS, STEPS + 4, STEPS + 2):
        config.rank_pattern = None
        trainer(adapted(config), callback if again else AdaLoraCallback(), steps=steps).train()
        assert config.total_step == steps
        config = copy.deepcopy(config)
    assert said() == []


def test_total_step_that_was_set_is_saved_as_a_plain_number() -> None:
    model = adapted(configuration(None))
    trainer(model, AdaLoraCallback()).train()
    model.save_pretrained("saved")
    assert type(peft.PeftConfig.from_pretrained("saved").total_step) is int
    assert type(pickle.loads(pickle.dumps(model.peft_config["default"])).total_step) is int
    assert repr(model.peft_config["default"].total_step) == str(STEPS)


def test_a_training_that_fails_leaves_no_model_behind() -> None:
    def fail(state: Any, model: Any) -> None:
        if state.global_step == 4:
            raise RuntimeError("stopped")

    callback = AdaLoraCallback()
    model = adapted()
    with pytest.raises(RuntimeError, match="stopped"):
        trainer(model, callback, on("on_step_end", fail)).train()
    alive = weakref.ref(model.base_model.model)
    del model
    gc.collect()
    assert alive() is None
    assert ranks(trained(callback)) == 4


@pytest.mark.parametrize("duplicate", [copy.copy, copy.deepcopy, lambda callback: pickle.loads(pickle.dumps(callback))])
def test_copies_and_pickles_in_the_middle_of_a_training(duplicate: Callable[[Any], Any]) -> None:
    callback, copies = AdaLoraCallback(), []
    model = trained(callback, on("on_step_end", lambda state, model: copies.append(duplicate(callback))))
    assert same(model, trained(copies[4]))


def test_one_callback_in_two_trainers_at_once(said: Callable[[], list[str]]) -> None:
    callback = AdaLoraCallback()
    models = [adapted(), adapted()]
    turn = threading.Barrier(2, timeout=60)

    def wait(state: Any, model: Any) -> None:
        turn.wait()

    runs = [trainer(model, callback, on("on_step_begin", wait), folder=str(n)) for n, model in enumerate(models)]
    threads = [threading.Thread(target=run.train) for run in runs]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [ranks(model) for model in models] == [4, 4]
    assert said() == []


def test_another_trainer_inside_of_a_step() -> None:
    """As where a student's training evaluates by fine-tuning another model, with the same callback."""
    callback = AdaLoraCallback()

    def act(state: Any, model: Any) -> None:
        if state.global_step == 5:
            trainer(adapted(), callback, folder="inner").train()

    assert same(trained(callback, on("on_step_end", act)), trained(AdaLoraCallback()))
