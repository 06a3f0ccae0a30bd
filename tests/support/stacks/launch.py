"""Start a worker script on two processes with torchrun, and never wait for it for ever."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch

SUPPORT = Path(__file__).resolve().parent.parent
ROOT = SUPPORT.parent.parent
RANKS = 2


def torchrun(script: str, mode: str, folder: Path, *arguments: str, timeout: int = 120) -> list[dict[str, Any]]:
    """Return what each rank reports: per case ``result``, ``error`` and ``records``."""
    paths = [str(SUPPORT), str(ROOT), os.environ.get("PYTHONPATH", "")]
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(filter(None, paths)),
        "DS_ACCELERATOR": "cpu",
        "OMP_NUM_THREADS": "1",
        "HF_HUB_OFFLINE": "1",
        "STACKS_TIMEOUT": str(timeout),
    }
    environment.pop("PEFT_GRADGUARD", None)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(RANKS)]
    with (folder / "log").open("w") as log:
        process = subprocess.Popen(
            [*command, "--module", f"stacks.{script}", mode, str(folder), *arguments],
            env=environment, stdout=log, stderr=subprocess.STDOUT, start_new_session=True,
        )  # fmt: skip
        try:
            code = process.wait(timeout + 30)
        except subprocess.TimeoutExpired:
            code = None
        finally:
            # The session's leader may be gone while its children are not.
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
    files = [folder / f"{rank}.pt" for rank in range(RANKS)]
    if code != 0 or not all(file.exists() for file in files):
        raise AssertionError(f"{script} {mode} ended with {code}:\n{(folder / 'log').read_text()[-4000:]}")
    return [torch.load(file, weights_only=False) for file in files]
