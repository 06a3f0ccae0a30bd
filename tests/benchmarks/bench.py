"""What an allocator step costs with the guard, beside plain PEFT; prints the tables of the README. ``make bench``.

    python tests/benchmarks/bench.py [ROUNDS]

Every measurement is made in a process of its own: plain PEFT, the guard that calls PEFT's scoring
(``PEFT_GRADGUARD_FUSED=0``) and the guard as it is take turns, so that whatever else the machine does meets all alike.
Given are the median over the rounds of the medians in each process, the median of the ratios within each round, and in
brackets the ratio of the fastest steps. On a machine that is busy with other work there are fewer rounds.

Plain PEFT fails where layers are frozen. There, ratios are those to plain PEFT with no layer frozen, and the last
column is plain PEFT on a model in which only the other layers have adapters.
"""

from __future__ import annotations

import json
import os
import platform
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import peft
import torch

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent.parent
sys.path.insert(0, str(ROOT / "examples"))

import startup_cost
from models import GROWTH, SHAPES

WAYS = {"plain": ("plain", "1"), "calls PEFT": ("guarded", "0"), "guard": ("guarded", "1")}
PERCENTS = (0, 50, 95)
STARTS = 20
LONG_ENOUGH = 300.0
"""Seconds after which no further round begins."""


def measure(way: str, what: str) -> dict[str, Any]:
    """Run ``measure.py`` in a fresh process, on one thread."""
    mode, fused = WAYS[way]
    environ = {name: value for name, value in os.environ.items() if not name.startswith("PEFT_GRADGUARD")}
    environ |= {
        "PYTHONPATH": str(ROOT),
        "PEFT_GRADGUARD_FUSED": fused,
        "PYTHONWARNINGS": "ignore",
        "OMP_NUM_THREADS": "1",
        "HF_HUB_OFFLINE": "1",
    }
    if what == "memory":
        # So that freed memory goes back at once, and does not hide what is asked for later.
        environ |= {"MALLOC_MMAP_THRESHOLD_": "65536"}
    command = [sys.executable, str(HERE / "measure.py"), mode, what]
    found = subprocess.run(command, env=environ, capture_output=True, text=True, check=False)
    if found.returncode:
        raise SystemExit(f"measure.py {mode} {what} failed:\n{found.stderr[-3000:]}")
    result: dict[str, Any] = json.loads(found.stdout.splitlines()[-1])
    return result


class Times:
    """Milliseconds by way, row and step, one list of them for each round."""

    def __init__(self, rounds: list[dict[str, dict[str, Any]]]) -> None:
        self.rounds = rounds

    def milliseconds(self, way: str, row: str, step: str) -> float:
        return statistics.median(statistics.median(one[way][row][step]) for one in self.rounds)

    def ratio(self, way: str, row: str, step: str, to: str) -> float:
        return statistics.median(
            statistics.median(one[way][row][step]) / statistics.median(one["plain"][to][step]) for one in self.rounds
        )

    def ratio_of_fastest(self, way: str, row: str, step: str, to: str) -> float:
        fastest = [min(min(one[w][r][step]) for one in self.rounds) for w, r in ((way, row), ("plain", to))]
        return fastest[0] / fastest[1]


def table(heads: list[str], rows: list[list[str]]) -> str:
    lines = [heads, ["---"] + ["--:"] * (len(heads) - 1), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def step_rows(times: Times) -> list[list[str]]:
    rows = []
    for name, shape in SHAPES.items():
        for percent in PERCENTS:
            frozen = f"{shape.frozen_layers(percent)} of {shape.layers}" if percent else "none"
            for step in ("ordinary", "masking"):
                row, whole = f"{name} {percent}", f"{name} 0"
                cells = [f"{shape.title}; frozen: {frozen}; {step}", f"{times.milliseconds('plain', whole, step):.1f}"]
                for way in ("calls PEFT", "guard"):
                    cells.append(f"{times.milliseconds(way, row, step):.1f}")
                    fastest = times.ratio_of_fastest(way, row, step, whole)
                    cells.append(f"**{times.ratio(way, row, step, whole):.2f}** ({fastest:.2f})")
                rows.append([*cells, f"{times.milliseconds('plain', row, step):.1f}" if percent else ""])
    return rows


def resting_rows(times: Times) -> list[list[str]]:
    """Beside plain PEFT on a model that adapts as many modules as a step uses: with a module that rests it fails."""
    return [
        [
            f"{shape.title}; {step}",
            f"{times.milliseconds('plain', f'{name} 50', step):.1f}",
            f"{times.milliseconds('guard', f'{name} resting', step):.1f}",
            f"**{times.ratio('guard', f'{name} resting', step, f'{name} 50'):.2f}**",
        ]
        for name, shape in SHAPES.items()
        for step in ("ordinary", "masking")
    ]


def growth_rows(times: Times) -> list[list[str]]:
    sizes = sorted(
        [(layers, f"growth {layers}") for layers in GROWTH]
        + [(SHAPES[name].layers, f"{name} 0") for name in ("llama", "many")]
    )
    return [
        [
            f"{7 * layers}",
            *(
                f"{1000 * times.milliseconds(way, row, step) / (7 * layers):.0f}"
                for step in ("ordinary", "masking")
                for way in WAYS
            ),
        ]
        for layers, row in sizes
    ]


def memory_rows(found: dict[str, dict[str, float]]) -> list[list[str]]:
    rows = {
        "the second step (the guard compares)": "second step",
        "an ordinary step": "ordinary",
        "a masking step": "masking",
        "the whole process at its peak": "whole process",
    }
    return [[title, *(f"{found[way][key]:.0f}" for way in WAYS)] for title, key in rows.items()]


def main(rounds: int) -> None:
    begin = time.perf_counter()
    found: list[dict[str, dict[str, Any]]] = []
    while len(found) < rounds and (not found or time.perf_counter() - begin < LONG_ENOUGH):
        found.append({way: measure(way, "times") for way in WAYS})
        print(f"round {len(found)} of {rounds}, {time.perf_counter() - begin:.0f} s", file=sys.stderr, flush=True)
    times = Times(found)
    print(
        f"PEFT {peft.__version__}, torch {torch.__version__}, Python {platform.python_version()}, one thread of "
        f"{os.cpu_count()} CPUs, {len(found)} rounds of fresh processes; CPU time in ms\n"
    )
    heads = ["allocator step", "plain", "calls PEFT", "ratio", "guard", "ratio", "plain, others only"]
    print(table(heads, step_rows(times)))
    print(
        "\nHalf of the modules rest at each step, the others at the next; plain PEFT adapts half of the layers only:\n"
    )
    print(table(["allocator step", "plain", "guard", "ratio"], resting_rows(times)))
    print("\nMicroseconds for each module:\n")
    heads = ["modules", *(f"{step}, {way}" for step in ("ordinary", "masking") for way in WAYS)]
    print(table(heads, growth_rows(times)))
    if sys.platform == "linux":
        memory = {way: measure(way, "memory") for way in WAYS}
        size = memory["plain"]["parameters"]
        print(f"\nMemory on top of what was there, in MB, where the AdaLoRA parameters take {size:.0f} MB:\n")
        print(table(["during", *WAYS], memory_rows(memory)))
    imports = statistics.median(one["guard"]["import"] for one in found)
    print(f"\n`import peft_gradguard` takes {imports:.0f} ms, most of it for wrapt. Starts of an interpreter:\n")
    startup_cost.main(STARTS)
    print(f"{time.perf_counter() - begin:.0f} s in all", file=sys.stderr)


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 3)
