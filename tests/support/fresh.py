"""Programs in fresh interpreters that see the same packages as the tests' own process."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any

SUPPORT = Path(__file__).resolve().parent

PROLOGUE = """
import json, logging, sys, threading, multiprocessing

METHODS = ["update_ipt", "update_and_allocate", "budget_schedule", "mask_to_budget", "mask_using_rank_pattern",
           "_set_budget_scheduler"]

def wrappers():
    'How many of our wrappers each method carries.'
    from peft.tuners.adalora import RankAllocator
    counts = []
    for name in METHODS:
        count, method = 0, vars(RankAllocator)[name]
        while method is not None:
            count += type(method).__module__ == "peft_gradguard.wrapper"
            method = getattr(method, "__wrapped__", None)
        counts.append(count)
    return counts

def survives():
    'Whether an allocator step with a frozen parameter works.'
    import torch
    from peft import AdaLoraConfig
    from peft.tuners.adalora import RankAllocator
    model = torch.nn.Module()
    model.layer = torch.nn.Module()
    for factor, shape in (("A", (2, 3)), ("B", (3, 2)), ("E", (2, 1))):
        parameter = torch.nn.Parameter(torch.ones(shape), requires_grad=factor != "A")
        parameter.grad = torch.ones(shape) if factor != "A" else None
        setattr(model.layer, f"lora_{factor}", torch.nn.ParameterDict({"default": parameter}))
    config = AdaLoraConfig(init_r=2, target_r=1, tinit=1, tfinal=1, total_step=9, target_modules=["layer"])
    logging.disable()
    try:
        RankAllocator(model, config, "default").update_and_allocate(model, 1)
    except TypeError:
        return False
    finally:
        logging.disable(logging.NOTSET)
    return True

def in_fork(function, *args):
    'Run in a forked child: torch is loaded once, here, and peft anew in each child.'
    receive, send = multiprocessing.Pipe(duplex=False)
    child = multiprocessing.get_context("fork").Process(target=lambda: send.send(function(*args)))
    child.start()
    send.close()
    result = receive.recv()
    child.join()
    return result
"""


def python_path(*first: object) -> str:
    """What a child needs to see the same packages as this process, with these places before them."""
    return os.pathsep.join([*map(str, first), *filter(None, sys.path)])


def run(command: list[str], path: Path | None = None, **environ: str) -> subprocess.CompletedProcess[str]:
    """Run a command that sees the same packages as this process, with ``path`` before them."""
    environ = {**os.environ, "PYTHONPATH": python_path(*([path] if path else [])), **environ}
    found = subprocess.run(command, env=environ, capture_output=True, text=True, timeout=300)
    assert found.returncode == 0, found.stderr
    return found


def python(body: str, *options: str, path: Path | None = None, **environ: str) -> tuple[Any, str]:
    """Run a program in a fresh interpreter; return what it printed last, which is JSON, and its standard error."""
    found = run([sys.executable, *options, "-c", PROLOGUE + textwrap.dedent(body)], path, **environ)
    return json.loads(found.stdout.splitlines()[-1]), found.stderr


def write_peft(folder: Path, adalora: str) -> None:
    """Write a package ``peft`` of which only ``peft.tuners.adalora`` holds something."""
    package = folder / "peft" / "tuners"
    package.mkdir(parents=True)
    (folder / "peft" / "__init__.py").write_text("")
    (package / "__init__.py").write_text("")
    (package / "adalora.py").write_text(adalora)
