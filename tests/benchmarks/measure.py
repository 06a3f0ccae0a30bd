"""Measure allocator steps in this process, and print what was found as JSON. ``bench.py`` starts it, afresh each time.

    python tests/benchmarks/measure.py plain|guarded times|memory

``plain`` never imports the guard. Times are CPU times of the one thread that works, in milliseconds, so that other
work on the machine counts little.
"""

from __future__ import annotations

import gc
import json
import logging
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

GUARDED = sys.argv[1] == "guarded"

begin = time.thread_time()
if GUARDED:
    import peft_gradguard

    assert peft_gradguard.is_enabled()
    logging.getLogger("peft_gradguard").setLevel(logging.CRITICAL)
GUARD_IMPORT = 1000 * (time.thread_time() - begin)

import torch
import transformers
from models import GROWTH, MASKING, ORDINARY, SHAPES, Shape, adalora_parameters, build, freeze, narrow

if TYPE_CHECKING:
    from collections.abc import Callable

    import peft

PERCENTS = (0, 50, 95)
WARM_UP = 5
"""Steps before anything is measured: one that meets the parameters, those that compare, and one more."""


def step_times(
    model: peft.PeftModel, step: int, repeat: int, before: Callable[[int], None] | None = None
) -> list[float]:
    times = []
    gc.collect()
    for number in range(repeat):
        if before:
            before(number)
        start = time.thread_time()
        model.base_model.update_and_allocate(step)
        times.append(1000 * (time.thread_time() - start))
    return times


def both_steps(
    model: peft.PeftModel, shape: Shape, before: Callable[[int], None] | None = None
) -> dict[str, list[float]]:
    step_times(model, ORDINARY, 2 * WARM_UP if before else WARM_UP, before)
    return {
        "ordinary": step_times(model, ORDINARY, shape.ordinary, before),
        "masking": step_times(model, MASKING, shape.masking, before),
    }


def resting_in_turn(model: peft.PeftModel) -> Callable[[int], None]:
    """Return what lets every other module rest at even steps, and the others at odd ones, as experts do."""
    triplets = [(index // 3, parameter) for index, parameter in enumerate(adalora_parameters(model))]
    gradients = [parameter.grad for _, parameter in triplets]

    def rest(step: int) -> None:
        for (module, parameter), gradient in zip(triplets, gradients, strict=True):
            parameter.grad = gradient if (module + step) % 2 else None

    return rest


def times() -> dict[str, dict[str, list[float]]]:
    """Return the times of each row. Plain PEFT fails where layers are frozen: it adapts only the others there."""
    found = {}
    for name, shape in SHAPES.items():
        model = build(shape)
        for percent in PERCENTS:
            layers = shape.frozen_layers(percent)
            if GUARDED:
                freeze(model, layers)
            elif layers:
                model = build(shape, without=layers)
            found[f"{name} {percent}"] = both_steps(model, shape)
        if GUARDED:
            model = build(shape)
            found[f"{name} resting"] = both_steps(model, shape, resting_in_turn(model))
    for layers in GROWTH:
        found[f"growth {layers}"] = both_steps(build(narrow(layers)), narrow(layers))
    return found


def memory() -> dict[str, float]:
    """Return in megabytes what steps need above what was there before them, on the shape with real widths."""
    model = build(SHAPES["wide"])
    found = {"parameters": sum(p.numel() * p.element_size() for p in adalora_parameters(model)) / 1e6}
    step_times(model, ORDINARY, 1)
    found["second step"] = peak_of(model, ORDINARY)
    step_times(model, ORDINARY, WARM_UP)
    found["ordinary"] = peak_of(model, ORDINARY)
    found["masking"] = peak_of(model, MASKING)
    found["whole process"] = resident("VmHWM")
    return found


def peak_of(model: peft.PeftModel, step: int) -> float:
    gc.collect()
    # Linux: the highest resident size is that of now again.
    Path("/proc/self/clear_refs").write_text("5")
    before = resident("VmRSS")
    model.base_model.update_and_allocate(step)
    return resident("VmHWM") - before


def resident(kind: str) -> float:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 / 1e6 for line in lines if line.startswith(kind))


def main() -> None:
    torch.set_num_threads(1)
    transformers.logging.set_verbosity_error()
    found: dict[str, Any] = {"times": times, "memory": memory}[sys.argv[2]]()
    loaded = [name for name in sys.modules if name.startswith("peft_gradguard")]
    assert bool(loaded) == GUARDED, loaded
    print(json.dumps({**found, "import": GUARD_IMPORT}))


if __name__ == "__main__":
    main()
