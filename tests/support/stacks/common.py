"""What the worker scripts share: one process of a distributed run on the CPU, and what it reports to the test.

Run by torchrun with ``guard`` or ``plain`` and a folder; each process leaves ``<rank>.pt`` there. Every case runs
in the same two processes, so a case whose failure leaves one of them in a collective comes last, or has a launch of
its own.
"""

from __future__ import annotations

import datetime
import logging
import os
import signal
import sys
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist

if TYPE_CHECKING:
    from collections.abc import Callable

    import peft

MODE, FOLDER, *ARGUMENTS = sys.argv[1:]
GUARDED = MODE == "guard"
RANK = int(os.environ["RANK"])

# torchrun gives its workers a session of their own, so that nobody's kill reaches them for sure; this one does, even in
# the middle of a collective.
signal.alarm(int(os.environ["STACKS_TIMEOUT"]))

if GUARDED:
    import peft_gradguard  # noqa: F401

from scenarios import LINEARS, branches, build, vectors  # noqa: E402

TIMEOUT = datetime.timedelta(seconds=20)
"""For one collective, so that a process left alone in it fails instead of waiting for ever."""


class Records(logging.Handler):
    def __init__(self) -> None:
        super().__init__(logging.DEBUG)
        self.seen: list[dict[str, Any]] = []

    def emit(self, record: logging.LogRecord) -> None:
        fields = {name: getattr(record, name, None) for name in ("parameters", "reason", "adapter", "step")}
        self.seen.append({"level": record.levelname, "message": record.getMessage(), **fields})


def model_for(*frozen: str) -> peft.PeftModel:
    """The model of the scenarios, alike on every process, with the AdaLoRA parameters of some modules frozen."""
    model = build(branches(config={"target_modules": LINEARS, "init_r": 5}))
    for name, parameter in model.named_parameters():
        if ".lora_" in name and any(part in name for part in frozen) and "ranknum" not in name:
            parameter.requires_grad = False
    return model


def batch(step: int, branch: bool = True) -> dict[str, Any]:
    """Another batch on each process."""
    return vectors(100 * RANK + step, branch=branch)


def allocator_state(model: Any) -> dict[str, Any]:
    """What the ranks of a distributed run must agree on."""
    allocator = model.rankallocator
    return {
        "scores": {name: score.detach().clone() for name, score in allocator.exp_avg_ipt.items()},
        "budget": (allocator.init_bgt, allocator.target_bgt),
        "pattern": model.peft_config["default"].rank_pattern,
    }


def run(cases: dict[str, Callable[[], Any]]) -> None:
    """Run each case and write down what it gives, or what it raises, with the guard's log records."""
    torch.set_num_threads(1)
    if not dist.is_initialized():
        dist.init_process_group("gloo", timeout=TIMEOUT)
    logger = logging.getLogger("peft_gradguard")
    logger.setLevel(logging.DEBUG)
    results: dict[str, dict[str, Any]] = {}
    for name, case in cases.items():
        records = Records()
        logger.addHandler(records)
        torch.manual_seed(0)
        try:
            results[name] = {"result": case(), "error": None}
        except Exception as error:
            results[name] = {"result": None, "error": f"{type(error).__name__}: {error}"}
        logger.removeHandler(records)
        results[name]["records"] = records.seen
        torch.save(results, f"{FOLDER}/{RANK}.pt")
    sys.stdout.flush()
    # Not an orderly end: destroy_process_group can wait for a process that has failed.
    os._exit(0)
