"""Measure what the package adds to the start of an interpreter; prints the table of docs/autoload.md.

    python examples/startup_cost.py [RUNS]

Makes a virtual environment with the built wheel and wrapt (needs hatchling), and starts its Python RUNS times for each
row, the rows taking turns. Given is the median of the wall-clock times, in milliseconds, and the fastest.
"""

from __future__ import annotations

import os
import statistics
import subprocess
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tests" / "support"))

from environments import add_stand_ins, clean_environ, empty_folder, new_environment, pip, wheel

VERSION = ".".join(map(str, sys.version_info[:2]))
JSON = "import json, logging, argparse"


def main(runs: int) -> None:
    without = new_environment(VERSION, "cost-without")
    add_stand_ins(without.site_packages)
    having = new_environment(VERSION, "cost-installed")
    add_stand_ins(having.site_packages)
    pip(having.python, "install", "--no-deps", "--no-index", wheel())
    rows = {
        "not installed": (without.python, "pass", {}),
        "installed, variable unset": (having.python, "pass", {}),
        "installed, `PEFT_GRADGUARD=0`": (having.python, "pass", {"PEFT_GRADGUARD": "0"}),
        "installed, `PEFT_GRADGUARD=1`": (having.python, "pass", {"PEFT_GRADGUARD": "1"}),
        "not installed, `import wrapt`": (without.python, "import wrapt", {}),
        f"not installed, a program without PEFT (`{JSON}`)": (without.python, JSON, {}),
        "the same, installed, `PEFT_GRADGUARD=1`": (having.python, JSON, {"PEFT_GRADGUARD": "1"}),
    }
    times: dict[str, list[float]] = {name: [] for name in rows}
    for _ in range(runs):
        for name, (python, code, variables) in rows.items():
            times[name].append(milliseconds([str(python), "-c", code], clean_environ(**variables)))
    print(f"Python {sys.version.split()[0]}, {os.cpu_count()} CPUs, {runs} starts per row\n")
    print("| interpreter start | median ms | fastest ms |\n| --- | --- | --- |")
    for name, taken in times.items():
        print(f"| {name} | {statistics.median(taken):.1f} | {min(taken):.1f} |")


def milliseconds(command: list[str], environ: dict[str, str]) -> float:
    begin = time.perf_counter()
    subprocess.run(command, env=environ, cwd=empty_folder(), check=True)
    return 1000 * (time.perf_counter() - begin)


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 40)
