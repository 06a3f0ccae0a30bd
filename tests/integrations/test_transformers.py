"""``AdaLoraCallback`` in a real ``Trainer``: it adapts as a hand-written loop does, and says what it does."""

from __future__ import annotations

import gc
import re
import subprocess
import sys
import weakref
from typing import TYPE_CHECKING, Any

import pytest
import torch
import transformers
from adalora_callback import AdaLoraCallback
from scenarios import (
    FINALISING,
    INIT_R,
    PEFT_VERSION,
    TARGET_R,
    TFINAL,
    TINIT,
    TOTAL,
    adalora_config,
    add_inference_adapter,
    branches,
    build,
    frozen,
    loss_of,
    two_branches,
    vectors,
)
from trainers import Examples, training_arguments

import peft_gradguard

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    import peft

KEYS = {"adalora/budget", "adalora/total_rank", "adalora/skipped"}


def trainer(model: torch.nn.Module, *callbacks: Any, steps: int = TOTAL, **arguments: Any) -> transformers.Trainer:
    return transformers.Trainer(
        model,
        training_arguments(steps, **{"logging_steps": 1, **arguments}),
        train_dataset=Examples(),
        callbacks=list(callbacks),
    )


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def model() -> peft.PeftModel:
    return build(branches())


class ByHand(transformers.TrainerCallback):
    """What the guard's documentation tells those to write who have no ``AdaLoraCallback``."""

    def __init__(self, model: peft.PeftModel, event: str = "on_optimizer_step", ahead: int = 1) -> None:
        def act(args: Any, state: Any, control: Any, **_: Any) -> None:
            model.base_model.update_and_allocate(state.global_step + ahead)

        setattr(self, event, act)


def logged(run: transformers.Trainer) -> dict[int, dict[str, float]]:
    return {row["step"]: row for row in run.state.log_history if "loss" in row}


def weights(model: peft.PeftModel) -> dict[str, torch.Tensor]:
    return {name: parameter.detach().clone() for name, parameter in model.named_parameters()}


@pytest.mark.peft
@pytest.mark.parametrize("accumulation", [1, 2])
def test_adapts_as_by_hand(accumulation: int, said: Callable[[], list[str]]) -> None:
    found = []
    for callback in (lambda model: AdaLoraCallback(), ByHand):
        model = build(branches())
        frozen("trunk.0")(model, 0)
        trainer(model, callback(model), accumulation=accumulation).train()
        found.append((model.peft_config["default"].rank_pattern, weights(model)))
    (pattern, ours), (expected, theirs) = found
    assert pattern == expected
    assert sum(map(sum, pattern.values())) == 3 * TARGET_R
    assert all(torch.equal(value, theirs[name]) for name, value in ours.items())
    assert said() == []


@pytest.mark.peft
@pytest.mark.parametrize("unset", [None, 0, -1])
def test_total_step_is_set_where_it_is_unset(
    model: peft.PeftModel, unset: int | None, said: Callable[[], list[str]]
) -> None:
    model.peft_config["default"].total_step = unset
    trainer(model, AdaLoraCallback(), steps=TOTAL + 4).train()
    assert model.peft_config["default"].total_step == TOTAL + 4
    assert sum(map(sum, model.peft_config["default"].rank_pattern.values())) == 4 * TARGET_R
    assert said() == []


def test_total_step_from_epochs(model: peft.PeftModel) -> None:
    model.peft_config["default"].total_step = None
    run = trainer(model, AdaLoraCallback(), steps=-1, num_train_epochs=2, accumulation=2)
    run.train()
    assert model.peft_config["default"].total_step == run.state.max_steps == run.state.global_step


@pytest.mark.skipif(PEFT_VERSION > (0, 14), reason="PEFT of today wants total_step in the configuration")
@pytest.mark.peft
def test_configuration_without_total_step() -> None:
    import peft

    model = peft.get_peft_model(two_branches(), adalora_config(target_modules=["trunk.0"], total_step=None))
    trainer(model, AdaLoraCallback()).train()
    assert model.peft_config["default"].total_step == TOTAL


def test_total_step_is_set_anew_for_a_second_run(model: peft.PeftModel, said: Callable[[], list[str]]) -> None:
    model.peft_config["default"].total_step = None
    callback = AdaLoraCallback()
    for steps in (TOTAL, TOTAL + 3):
        trainer(model, callback, steps=steps).train()
        assert model.peft_config["default"].total_step == steps
    assert said() == []


@pytest.mark.parametrize(
    ("steps", "end"),
    [
        (TOTAL + 5, f"steps: the final ranks are settled at step {FINALISING}"),
        (FINALISING, f"steps: the final ranks are settled at step {FINALISING}"),
        (FINALISING - 1, f"steps: the run ends before .* settled at step {FINALISING}"),
        (TOTAL - 8, f"steps: the run ends before .* settled at step {FINALISING}"),
    ],
)
def test_total_step_of_the_user_stays(
    model: peft.PeftModel, steps: int, end: str, said: Callable[[], list[str]]
) -> None:
    trainer(model, AdaLoraCallback(), steps=steps).train()
    assert model.peft_config["default"].total_step == TOTAL
    (message,) = said()
    assert f"is {TOTAL}, but this run has {steps} optimizer steps" in message
    assert re.search(end, message)


def test_settling_step_of_another_total_step(model: peft.PeftModel, said: Callable[[], list[str]]) -> None:
    model.peft_config["default"].total_step = TOTAL - 1
    trainer(model, AdaLoraCallback()).train()
    assert [f"settled at step {TOTAL - 1 - TFINAL} (" in message for message in said()] == [True]


def test_total_step_of_one_is_one(model: peft.PeftModel) -> None:
    model.peft_config["default"].total_step = 1
    with pytest.raises(ValueError, match="take up all of total_step=1"):
        trainer(model, AdaLoraCallback()).train()


@pytest.mark.parametrize("steps", [TINIT + TFINAL, TINIT + TFINAL - 1])
def test_too_short_a_run_is_named_before_its_first_step(model: peft.PeftModel, steps: int) -> None:
    model.peft_config["default"].total_step = None
    run = trainer(model, AdaLoraCallback(), steps=steps)
    with pytest.raises(ValueError, match=f"tinit={TINIT} and tfinal={TFINAL} take up all of total_step={steps}"):
        run.train()
    assert run.state.global_step == 0


def test_one_step_of_room_is_enough(model: peft.PeftModel) -> None:
    model.peft_config["default"].total_step = None
    trainer(model, AdaLoraCallback(), steps=TINIT + TFINAL + 1).train()
    assert sum(map(sum, model.peft_config["default"].rank_pattern.values())) == 4 * TARGET_R


def test_room_is_counted_from_both_ends(model: peft.PeftModel) -> None:
    config = model.peft_config["default"]
    config.total_step, config.tinit = None, TFINAL
    with pytest.raises(ValueError, match=f"tinit={TFINAL} and tfinal={TFINAL} take up all of total_step={2 * TFINAL}"):
        trainer(model, AdaLoraCallback(), steps=2 * TFINAL).train()


def inference(model: peft.PeftModel) -> peft.PeftModel:
    import peft

    model.save_pretrained("saved")
    return peft.PeftModel.from_pretrained(two_branches(), "saved")


@pytest.mark.parametrize("kind", ["no adapter", "for inference only"])
def test_model_without_a_trainable_adapter(model: peft.PeftModel, kind: str) -> None:
    other = inference(model) if kind == "for inference only" else two_branches()
    other.requires_grad_(True)
    with pytest.raises(ValueError, match=r"no trainable AdaLoRA adapter in .* a (Two|Peft)"):
        trainer(other, AdaLoraCallback()).train()


def test_ranks_and_skips_are_logged(model: peft.PeftModel) -> None:
    frozen("trunk.0")(model, 0)
    run = trainer(model, AdaLoraCallback())
    run.train()
    rows = logged(run)
    assert all(rows[step].keys() >= KEYS for step in range(1, TOTAL + 1))
    assert {row["adalora/skipped"] for row in rows.values()} == {3}
    budgets = [row["adalora/budget"] for row in rows.values()]
    assert budgets == sorted(budgets, reverse=True)
    assert (budgets[0], budgets[-1]) == (3 * INIT_R, 3 * TARGET_R)
    assert (rows[1]["adalora/total_rank"], rows[TOTAL]["adalora/total_rank"]) == (4 * INIT_R, INIT_R + 3 * TARGET_R)
    assert not [row for row in run.state.log_history if "loss" not in row and KEYS & row.keys()]


@pytest.mark.parametrize("name", ["other", "another"])
def test_only_the_adapter_that_trains_is_logged(model: peft.PeftModel, name: str) -> None:
    add_inference_adapter(name)(model, 0)
    run = trainer(model, AdaLoraCallback())
    run.train()
    assert logged(run)[1]["adalora/total_rank"] == 4 * INIT_R
    assert logged(run)[TOTAL]["adalora/budget"] == 4 * TARGET_R


def test_tensorboard_shows_them(model: peft.PeftModel, folder: Path) -> None:
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    # Where the event file goes has changed between releases of transformers.
    run = trainer(model, AdaLoraCallback(), report_to=["tensorboard"], logging_steps=5)
    run.train()
    (file,) = folder.rglob("events.out.tfevents.*")
    events = EventAccumulator(str(file))
    events.Reload()
    for key in KEYS:
        points = events.Scalars(f"train/{key}")
        assert [point.step for point in points] == [5, 10, 15, 20]
        assert [point.value for point in points] == [logged(run)[step][key] for step in (5, 10, 15, 20)]


def test_other_callbacks_see_them_and_keep_their_order(model: peft.PeftModel) -> None:
    calls: list[tuple[str, str]] = []

    def watcher(name: str) -> transformers.TrainerCallback:
        class Watcher(transformers.TrainerCallback):
            def on_train_begin(self, *_: Any, **__: Any) -> None:
                calls.append((name, "begin"))

            def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **_: Any) -> None:
                assert "loss" not in logs or logs.keys() >= KEYS
                calls.append((name, "log"))

        Watcher.__name__ = name
        return Watcher()

    trainer(model, watcher("before"), AdaLoraCallback(), watcher("after"), logging_steps=TOTAL).train()
    expected = [(name, event) for event in ("begin", "log", "log") for name in ("before", "after")]
    assert calls == expected


class PerMicroBatch(transformers.Trainer):
    def training_step(self, model: Any, *args: Any, **kwargs: Any) -> torch.Tensor:
        loss = super().training_step(model, *args, **kwargs)
        model.base_model.update_and_allocate(self.state.global_step + 1)
        return loss


def test_another_caller_is_left_to_it(said: Callable[[], list[str]]) -> None:
    found = []
    for both in (True, False):
        model = build(branches())
        trainer(model, ByHand(model), *([AdaLoraCallback()] if both else [])).train()
        found.append(model)
    # Ours runs first in any case, so the first step is scored twice before the other one is seen.
    assert len(said()) == 1
    assert "leaves update_and_allocate to something else that calls it in this training too (step 2)" in said()[0]
    for one in found:
        assert sum(map(sum, one.peft_config["default"].rank_pattern.values())) == 4 * TARGET_R


def test_a_trainer_that_calls_by_itself_is_left_to_it(said: Callable[[], list[str]]) -> None:
    found = []
    for callbacks in ([AdaLoraCallback()], []):
        model = build(branches())
        run = trainer(model)
        run.__class__ = PerMicroBatch
        for callback in callbacks:
            run.add_callback(callback)
        run.train()
        found.append(weights(model))
    assert all(torch.equal(value, found[1][name]) for name, value in found[0].items())
    assert sum("in this training too (step 1)" in message for message in said()) == 1


def test_a_late_caller_beside_it_does_no_harm(said: Callable[[], list[str]]) -> None:
    found = []
    for late in (True, False):
        model = build(branches())
        trainer(model, AdaLoraCallback(), *([ByHand(model, "on_step_end", 0)] if late else [])).train()
        found.append(weights(model))
    assert all(torch.equal(value, found[1][name]) for name, value in found[0].items())
    assert ["from on_optimizer_step" in message for message in said()] == [True]


def test_resumed_from_a_checkpoint(said: Callable[[], list[str]]) -> None:
    steps = 2
    first = build(branches())
    trainer(first, AdaLoraCallback(), save_strategy="steps", save_steps=steps).train()
    model = build(branches())
    run = trainer(model, AdaLoraCallback())
    run.train(resume_from_checkpoint=f"run/checkpoint-{steps}")
    assert run.state.global_step == TOTAL
    assert sum(map(sum, model.peft_config["default"].rank_pattern.values())) == 4 * TARGET_R
    assert said() == []


def best_of(model: peft.PeftModel, best: int, **arguments: Any) -> transformers.Trainer:
    """A ``Trainer`` that saves every second step, and takes the checkpoint of this one for the best."""
    evaluated = iter(range(2, TOTAL + 1, 2))
    every_second = {"save_strategy": "steps", "save_steps": 2, "eval_strategy": "steps", "eval_steps": 2}
    return transformers.Trainer(
        model,
        training_arguments(
            TOTAL, metric_for_best_model="badness", greater_is_better=False, **every_second, **arguments
        ),
        train_dataset=Examples(),
        eval_dataset=torch.utils.data.Subset(Examples(), range(8)),
        compute_metrics=lambda predicted: {"badness": float(next(evaluated) != best)},
        callbacks=[AdaLoraCallback()],
    )


def test_the_best_checkpoint_loads_into_a_fresh_model(model: peft.PeftModel, said: Callable[[], list[str]]) -> None:
    import peft

    run = best_of(model, FINALISING // 2)
    run.train()
    loaded = peft.PeftModel.from_pretrained(two_branches(), run.state.best_model_checkpoint)
    ranks = [sum(bits) for bits in loaded.peft_config["default"].rank_pattern.values()]
    assert 4 * TARGET_R < sum(ranks) < 4 * INIT_R
    assert said() == []


def test_works_with_the_guard_switched_off() -> None:
    with peft_gradguard.disabled():
        model = build(branches())
        run = trainer(model, AdaLoraCallback())
        run.train()
    assert sum(map(sum, model.peft_config["default"].rank_pattern.values())) == 4 * TARGET_R
    assert KEYS & logged(run)[TOTAL].keys() == {"adalora/total_rank"}
    assert logged(run)[TOTAL]["adalora/total_rank"] == 4 * TARGET_R


class Holder(transformers.TrainerCallback):
    """A callback of somebody's that holds others and hands the events on."""

    def __init__(self, held: transformers.TrainerCallback) -> None:
        for event in ("on_train_begin", "on_optimizer_step", "on_log", "on_train_end"):
            setattr(self, event, getattr(held, event))


def test_inside_another_callback(model: peft.PeftModel) -> None:
    watched: list[dict[str, float]] = []

    class Watcher(transformers.TrainerCallback):
        def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **_: Any) -> None:
            watched.append(dict(logs))

    run = trainer(model, Watcher(), Holder(AdaLoraCallback()))
    run.train()
    assert sum(map(sum, model.peft_config["default"].rank_pattern.values())) == 4 * TARGET_R
    assert all(row.keys() >= KEYS for row in logged(run).values())
    # It cannot come first, so those before it do not see what it adds.
    assert not [row for row in watched if KEYS & row.keys()]


def test_events_of_a_loop_that_is_no_trainer(model: peft.PeftModel, said: Callable[[], list[str]]) -> None:
    callback, optimizer = AdaLoraCallback(), torch.optim.AdamW(model.parameters(), lr=1e-2)
    events = training_arguments(TOTAL), transformers.TrainerState(max_steps=TOTAL), transformers.TrainerControl()
    callback.on_train_begin(*events, model=model)
    for step in range(TOTAL):
        loss_of(model, vectors(step), regularised=False).backward()
        optimizer.step()
        callback.on_optimizer_step(*events)
        optimizer.zero_grad()
        events[1].global_step += 1
        logs: dict[str, float] = {"loss": 1.0}
        callback.on_log(*events, logs=logs)
        assert logs.keys() == {"loss", *KEYS}
        events[1].log_history.append({"loss": 1.0, "step": step})
    assert not [row for row in events[1].log_history if KEYS & row.keys()]
    evaluated = {"eval_loss": 1.0}
    callback.on_log(*events, logs=evaluated)
    callback.on_log(*events, logs=None)
    callback.on_train_end(*events)
    callback.on_log(*events, logs={"loss": 1.0})
    assert evaluated == {"eval_loss": 1.0}
    assert sum(map(sum, model.peft_config["default"].rank_pattern.values())) == 4 * TARGET_R
    assert said() == []


def test_transformers_without_the_event() -> None:
    program = """
import transformers
del transformers.TrainerCallback.on_optimizer_step
import peft_gradguard.integrations.transformers
"""
    ran = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    version = transformers.__version__
    assert f"on_optimizer_step, which transformers {version} has not: install transformers 4.44 or newer" in ran.stderr


def test_keeps_no_model_alive() -> None:
    model = build(branches())
    callback = AdaLoraCallback()
    trainer(model, callback, steps=TOTAL).train()
    alive = weakref.ref(model.base_model)
    del model
    gc.collect()
    assert alive() is None
