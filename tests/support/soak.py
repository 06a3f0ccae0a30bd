"""Long runs: memory stays flat, each name is logged once, and no model outlives its last reference.

``make soak`` runs 50,000 allocator steps and 200 lifetimes of models, and prints the figures.
"""

from __future__ import annotations

import gc
import logging
import sys
import tracemalloc
import weakref
from dataclasses import dataclass, field
from pathlib import Path

import peft
import torch
from torch import nn

STEPS, WARM, LIFETIMES = 50_000, 5_000, 200
LAYERS = 4


def new_model(total: int) -> peft.PeftModel:
    torch.manual_seed(0)
    base = nn.ModuleDict({f"layer{number}": nn.Linear(3, 3) for number in range(LAYERS)})
    config = peft.AdaLoraConfig(
        target_modules=list(base), init_r=2, target_r=1, tinit=2, tfinal=2, total_step=total, deltaT=3
    )
    return peft.get_peft_model(base, config)


def parameters_of(model: peft.PeftModel) -> dict[str, nn.Parameter]:
    return {name: p for name, p in model.base_model.model.named_parameters() if name.endswith(".default")}


class Loop:
    """Steps in which other parameters are frozen, without gradient, or with NaN in it, each time.

    Every second hundred of calls comes late. There is no backward: gradients are set by hand, so that the allocator's
    steps are what costs.
    """

    def __init__(self, model: peft.PeftModel) -> None:
        self.model = model
        self.parameters = {n: p for n, p in parameters_of(model).items() if ".lora_" in n}
        self.optimizer = torch.optim.SGD(self.parameters.values(), lr=0.0)
        self.random = torch.Generator().manual_seed(0)
        self.skipped: set[str] = set()

    def step(self, number: int, late: bool) -> None:
        kinds = torch.randint(0, 8, (len(self.parameters),), generator=self.random).tolist()
        for (name, parameter), kind in zip(self.parameters.items(), kinds, strict=True):
            parameter.requires_grad = kind != 1
            parameter.grad = torch.ones_like(parameter) if kind > 1 else None
            if kind == 2:
                parameter.grad[0, 0] = float("nan")
            if kind <= 2:
                self.skipped.add(name)
        with torch.no_grad():
            # SGD of zero times NaN is NaN: the optimizer's hooks are wanted here, not its arithmetic.
            before = [parameter.clone() for parameter in self.parameters.values()]
            self.optimizer.step()
            for parameter, value in zip(self.parameters.values(), before, strict=True):
                parameter.copy_(value)
        if late:
            self.optimizer.zero_grad()
        self.model.base_model.update_and_allocate(number)
        self.optimizer.zero_grad()


class Lines(logging.Handler):
    """Counts what is logged, and keeps nothing of it."""

    def __init__(self) -> None:
        super().__init__()
        self.names = self.others = 0

    def emit(self, record: logging.LogRecord) -> None:
        if hasattr(record, "parameters"):
            self.names += len(record.parameters)
        else:
            self.others += 1


@dataclass
class Figures:
    rss: list[int] = field(default_factory=list)
    """Bytes of memory in use, warm and at the end; empty where the system does not tell."""
    traced: list[int] = field(default_factory=list)
    """Bytes of Python's own memory, likewise."""
    objects: list[int] = field(default_factory=list)
    """Python objects that the garbage collector knows, likewise."""
    skipped: int = 0
    """How many names were ever skipped."""
    lines: int = 0
    """How many names the log has given as skipped, one counted each time that it is given."""
    other_lines: int = 0


def resident() -> list[int]:
    statm = Path("/proc/self/statm")
    return [int(statm.read_text().split()[1]) * 4096] if statm.exists() else []


def run_steps(steps: int, warm: int) -> Figures:
    """Run one training of so many steps, and look at memory after the first ``warm`` ones and at the end."""
    figures, lines = Figures(), Lines()
    logger = logging.getLogger("peft_gradguard")
    logger.addHandler(lines)
    propagate, logger.propagate = logger.propagate, False
    tracemalloc.start()
    try:
        loop = Loop(new_model(steps + 10))
        for number in range(1, steps + 1):
            loop.step(number, late=number // 100 % 2 == 1)
            if number in (warm, steps):
                gc.collect()
                figures.rss += resident()
                figures.traced.append(tracemalloc.get_traced_memory()[0])
                figures.objects.append(len(gc.get_objects()))
    finally:
        tracemalloc.stop()
        logger.removeHandler(lines)
        logger.propagate = propagate
    figures.skipped, figures.lines, figures.other_lines = len(loop.skipped), lines.names, lines.others
    return figures


@dataclass
class Lives:
    at_once: int = 0
    """Models that went with their last reference."""
    collected: int = 0
    """Models that went with the next garbage collection: they are part of a cycle."""
    alive: int = 0


def one_life(steps: int = 6) -> list[weakref.ref[object]]:
    """Train a model for some steps, half of the calls late, and let go of it in the middle of the training."""
    loop = Loop(new_model(steps + 4))
    for number in range(1, steps + 1):
        loop.step(number, late=number > 3)
    return [weakref.ref(loop.model.base_model.model), weakref.ref(loop.model.base_model.rankallocator)]


def run_lifetimes(count: int) -> Lives:
    """Train so many models one after the other, with the garbage collector off, and see when they go."""
    lives = Lives()
    logger = logging.getLogger("peft_gradguard")
    disabled, logger.disabled = logger.disabled, True
    gc.collect()
    gc.disable()
    try:
        for _ in range(count):
            references = one_life()
            if not any(reference() for reference in references):
                lives.at_once += 1
                continue
            gc.collect()
            lives.alive += any(reference() is not None for reference in references)
            lives.collected += all(reference() is None for reference in references)
    finally:
        gc.enable()
        logger.disabled = disabled
    return lives


def main() -> None:
    import peft_gradguard

    assert peft_gradguard.is_enabled()
    torch.set_num_threads(1)
    figures = run_steps(STEPS, WARM)
    for name, values, unit in (
        ("resident memory", figures.rss, 2**20),
        ("Python's memory", figures.traced, 2**20),
        ("objects", figures.objects, 1),
    ):
        if values:
            warm, end = (value / unit for value in values)
            print(f"{name:16} {warm:12,.2f} after {WARM:,} steps, {end:12,.2f} after {STEPS:,}")
    print(f"names skipped {figures.skipped}, names in the log {figures.lines}, other lines {figures.other_lines}")
    lives = run_lifetimes(LIFETIMES)
    print(f"{LIFETIMES} models: {lives.at_once} went at once, {lives.collected} when collected, {lives.alive} alive")


if __name__ == "__main__":
    sys.exit(main())
