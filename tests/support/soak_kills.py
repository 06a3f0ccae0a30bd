"""Trainings that are killed (SIGKILL) at random moments and started again, in a ``Trainer`` and in a loop.

    python tests/support/soak_kills.py [KILLS]

Nothing may be lost but the steps since the last checkpoint, and the end is that of a training never killed, bit for
bit. Each life is a fork of a process that has trained nothing, so that it costs no imports. ``make soak`` runs it.
"""

from __future__ import annotations

import json
import logging
import os
import random
import signal
import sys
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import peft_gradguard  # isort: skip
import peft
import torch
import transformers
from scenarios import TwoBranches, adalora_config, frozen, sometimes
from stacks.checks import same
from trainers import Examples, training_arguments

from peft_gradguard import AllocatorState
from peft_gradguard.integrations.transformers import AdaLoraCallback

if TYPE_CHECKING:
    from collections.abc import Callable

STEPS, EVERY = 80, 2
"""How many steps a training has, and how many lie between its checkpoints."""


def adapted() -> peft.PeftModel:
    torch.manual_seed(0)
    config = adalora_config(
        target_modules=["trunk.0", "trunk.2", "branch.0"], tinit=15, tfinal=20, deltaT=3, total_step=STEPS
    )
    model = peft.get_peft_model(TwoBranches(), config)
    frozen("trunk.2")(model, 0)
    return model


def write_down(what: str) -> None:
    """Note something in a way that a kill cannot halve."""
    file = os.open("diary", os.O_WRONLY | os.O_APPEND | os.O_CREAT)
    os.write(file, f"{what}\n".encode())
    os.close(file)


class Diary(transformers.TrainerCallback):
    def on_train_begin(self, _: Any, state: Any, *__: Any, **___: Any) -> None:
        write_down(f"from {state.global_step}")

    def on_step_end(self, _: Any, state: Any, *__: Any, **___: Any) -> None:
        write_down(f"step {state.global_step}")


def is_whole(checkpoint: Path) -> bool:
    try:
        json.loads((checkpoint / "trainer_state.json").read_text())
    except (OSError, ValueError):
        return False
    return True


def trainer(model: peft.PeftModel) -> None:
    """Train on from the newest whole checkpoint."""
    whole = filter(is_whole, Path("run").glob("checkpoint-*"))
    last = max(whole, key=lambda path: int(path.name.split("-")[1]), default=None)
    arguments = training_arguments(STEPS, save_strategy="steps", save_steps=EVERY, save_total_limit=2)
    run = transformers.Trainer(model, arguments, train_dataset=Examples(), callbacks=[AdaLoraCallback(), Diary()])
    run.train(resume_from_checkpoint=last and str(last))


def loop(model: peft.PeftModel) -> None:
    """Train on from the last file, which takes the place of the one before all at once."""
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    parts = {"model": model, "optimizer": optimizer, "allocator": AllocatorState(model)}
    begin = 0
    if Path("saved").exists():
        saved = torch.load("saved", weights_only=True)
        begin = saved.pop("step")
        for name, part in parts.items():
            part.load_state_dict(saved[name])
    write_down(f"from {begin}")
    for step in range(begin + 1, STEPS + 1):
        model.base_model(**sometimes(step)).loss.backward()
        optimizer.step()
        model.base_model.update_and_allocate(step)
        optimizer.zero_grad()
        write_down(f"step {step}")
        if step % EVERY == 0:
            torch.save({"step": step, **{name: part.state_dict() for name, part in parts.items()}}, "unfinished")
            os.replace("unfinished", "saved")


def live(train: Callable[[peft.PeftModel], None], folder: Path) -> int:
    """Start a life in this folder, and return its process."""
    child = os.fork()
    if child:
        return child
    status = 1
    try:
        os.chdir(folder)
        output = os.open("output", os.O_WRONLY | os.O_APPEND | os.O_CREAT)
        os.dup2(output, 1)
        os.dup2(output, 2)
        handler = logging.Handler(logging.WARNING)
        handler.emit = lambda record: getattr(record, "reason", None) or write_down(record.getMessage())  # type: ignore[method-assign]
        logging.getLogger("peft_gradguard").addHandler(handler)
        model = adapted()
        train(model)
        end = {"weights": model.state_dict(), "state": AllocatorState(model).state_dict()}
        torch.save({**end, "pattern": str(model.peft_config["default"].rank_pattern)}, "end")
        status = 0
    finally:
        sys.stdout.flush()
        os._exit(status)


def end_of(folder: Path, process: int) -> dict[str, Any]:
    status = os.waitpid(process, 0)[1]
    assert status == 0, (folder / "output").read_text()[-3000:]
    end: dict[str, Any] = torch.load(folder / "end")
    # NaN, which stands for a number that is not there, is not equal to itself.
    return {**end, "state": {name: value.nan_to_num(-1) for name, value in end["state"].items()}}


def lives_in(folder: Path) -> int:
    """Return how many lives have come to train."""
    diary = folder / "diary"
    return diary.read_text().count("from") if diary.exists() else 0


def until_it_trains(folder: Path, lives: int) -> float:
    """Wait until so many lives have come to train, and return the time."""
    limit = time.perf_counter() + 60
    while lives_in(folder) < lives:
        assert time.perf_counter() < limit, (folder / "output").read_text()[-3000:]
        time.sleep(0.001)
    return time.perf_counter()


def assert_little_is_lost(folder: Path) -> None:
    """Each life goes on from the last checkpoint that can be there, and nothing was said."""
    done = 0
    for what, number in map(str.split, (folder / "diary").read_text().splitlines()):
        if what == "from":
            begun = int(number)
            assert done - EVERY <= begun <= done, f"{done} steps were done, and the next life begins with {begun}"
        else:
            done = int(number)
    assert done == STEPS


def run(train: Callable[[peft.PeftModel], None], kills: int, folder: Path, chance: random.Random) -> int:
    """Kill a training so many times; return how many of its lives have come to train."""
    never, killed = folder / "never", folder / "killed"
    never.mkdir()
    killed.mkdir()
    process = live(train, never)
    begin = until_it_trains(never, 1)
    expected = end_of(never, process)
    length = time.perf_counter() - begin
    for death in range(kills):
        process = live(train, killed)
        # One in five dies at its start, while it loads.
        if death % 5 != 4:
            until_it_trains(killed, lives_in(killed) + 1)
        time.sleep(chance.uniform(0, length / kills))
        os.kill(process, signal.SIGKILL)
        assert os.waitpid(process, 0)[1] == signal.SIGKILL, "it came to its end: nothing was left to kill"
    assert same(end_of(killed, live(train, killed)), expected), "it ends in another way than the one never killed"
    assert_little_is_lost(killed)
    return lives_in(killed)


def main(kills: int) -> None:
    assert peft_gradguard.is_enabled()
    seed = random.randrange(10**6)
    for train in (trainer, loop):
        with tempfile.TemporaryDirectory() as folder:
            begin = time.perf_counter()
            lives = run(train, kills, Path(folder), random.Random(seed))
            seconds = time.perf_counter() - begin
            print(f"{train.__name__}: killed {kills} times, {lives} lives trained, {seconds:.0f} s (seed {seed})")


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 20)
