"""Where the time of a guarded allocator step goes, in microseconds a parameter. Prints a table for docs/performance.md.

    python tests/benchmarks/parts.py [SHAPE ...]

Each part is a function of the guard, timed where its caller finds it, without the parts inside of it: medians over some
steps of the CPU time of the one thread that works. What is in no part is "the rest": PEFT's own code, and the guard's
between the parts.
"""

from __future__ import annotations

import functools
import gc
import logging
import statistics
import sys
import time
from importlib import import_module
from typing import TYPE_CHECKING, Any

import torch
import transformers
from bench import table
from models import MASKING, ORDINARY, SHAPES, adalora_parameters, build

import peft_gradguard

if TYPE_CHECKING:
    from collections.abc import Callable

PARTS = {
    "the walk over the model": ["rules.call:adalora_parameters"],
    "whole parameters, exclusions": ["rules.call:whole", "rules.call:mark_excluded", "rules.scoring:require_gradients"],
    "judging gradients: NaN, inf, zeros": ["rules.scoring:step_gradients"],
    "counting, what was skipped or late": [
        "memory.said:Said.skips",
        "memory.counts:Counts.begin",
        "memory.counts:Counts.look",
        "memory.counts:Counts.add",
        "memory.seen:Seen.note_scoring",
        "late.calls:LateCalls.scored",
        "guard:note_step",
    ],
    "what can be computed together": ["speed.fused:_objection", "speed.fused:_groups"],
    "the plan and its check": ["speed.flat:Plan.advance", "speed.flat:_Run.windows"],
    "the arithmetic": ["speed.flat:_advance", "speed.flat:_advance_some"],
    "what is ranked": ["guard:rank", "guard:settled"],
    "what PEFT is shown": ["model.view:ModelView.show", "model.view:ModelView.release"],
    "looking for troubles": [
        "guard:look_at_the_door",
        "guard:look_after_scoring",
        "guard:look_after_masking",
        "guard:warn_of_overlap",
        "guard:warn_of_unmatched_patterns",
        "guard:keep_masks",
    ],
}
REST = "the rest"


class Stopwatch:
    """The time spent in each part, without that of the parts inside of it."""

    def __init__(self) -> None:
        self.spent = dict.fromkeys([*PARTS, REST], 0.0)
        self._parts: list[str] = []
        self._since = 0.0

    def _turn(self) -> None:
        now = time.thread_time()
        if self._parts:
            self.spent[self._parts[-1]] += now - self._since
        self._since = now

    def run(self, part: str, function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        self._turn()
        self._parts.append(part)
        try:
            return function(*args, **kwargs)
        finally:
            self._turn()
            self._parts.pop()

    def watch(self, part: str, place: str) -> None:
        module, _, path = place.partition(":")
        owner: Any = import_module(f"peft_gradguard.{module}")
        *classes, name = path.split(".")
        for each in classes:
            owner = getattr(owner, each)
        function = getattr(owner, name)

        @functools.wraps(function)
        def timed(*args: Any, **kwargs: Any) -> Any:
            return self.run(part, function, *args, **kwargs)

        setattr(owner, name, timed)


def measure(stopwatch: Stopwatch, model: Any, step: int, repeat: int) -> dict[str, float]:
    """Return milliseconds by part."""
    steps = []
    for _ in range(repeat):
        gc.collect()
        stopwatch.spent = dict.fromkeys(stopwatch.spent, 0.0)
        stopwatch.run(REST, model.base_model.update_and_allocate, step)
        steps.append(stopwatch.spent)
    return {part: 1000 * statistics.median(step[part] for step in steps) for part in steps[0]}


def main(names: list[str]) -> None:
    torch.set_num_threads(1)
    transformers.logging.set_verbosity_error()
    logging.getLogger("peft_gradguard").setLevel(logging.CRITICAL)
    assert peft_gradguard.is_enabled()
    stopwatch = Stopwatch()
    for part, places in PARTS.items():
        for place in places:
            stopwatch.watch(part, place)
    columns: dict[str, dict[str, float]] = {}
    for name in names:
        shape = SHAPES[name]
        model = build(shape)
        count = len(adalora_parameters(model))
        for _ in range(6):
            model.base_model.update_and_allocate(ORDINARY)
        for title, step, repeat in (("ordinary", ORDINARY, shape.ordinary), ("masking", MASKING, shape.masking)):
            found = measure(stopwatch, model, step, repeat)
            columns[f"{name}, {title}"] = {part: 1000 * spent / count for part, spent in found.items()}
    rows = [[part, *(f"{column[part]:.2f}" for column in columns.values())] for part in [*PARTS, REST]]
    rows.append(["together", *(f"{sum(column.values()):.2f}" for column in columns.values())])
    print(table(["microseconds a parameter", *columns], rows))


if __name__ == "__main__":
    main(sys.argv[1:] or list(SHAPES))
