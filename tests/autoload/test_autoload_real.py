"""What loads by itself guards real PEFT: in children of every kind, and beside other tools."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
from environments import CURRENT, GUARDED_STEP, command, new_environment, real

if TYPE_CHECKING:
    from pathlib import Path

LOADER = """
import sys
import torch.utils.data
class Worker(torch.utils.data.Dataset):
    def __len__(self): return 2
    def __getitem__(self, item):
        import peft
        return int("peft_gradguard" in sys.modules)
if __name__ == "__main__":
    loader = torch.utils.data.DataLoader(Worker(), num_workers=1, multiprocessing_context="spawn")
    print("workers", [int(item) for item in loader])
"""

WRAP_OTHER = """
import wrapt
def other(wrapped, instance, args, kwargs):
    calls.append(1)
    return wrapped(*args, **kwargs)
calls = []
"""


@pytest.fixture
def step(tmp_path: Path) -> Path:
    path = tmp_path / "step.py"
    path.write_text(GUARDED_STEP)
    return path


def test_variable_alone(step: Path) -> None:
    on = real().run(step, PEFT_GRADGUARD="1")
    assert on.stdout == "guarded alone\n", on.stderr
    off = real().run(step)
    assert "TypeError: unsupported operand type(s) for *: 'Parameter' and 'NoneType'" in off.stderr


def test_launcher_needs_no_pth_file(step: Path) -> None:
    """The command comes from one environment; what it runs, from another that has not got the package."""
    bare = new_environment(CURRENT, "bare-" + step.parent.name)
    (bare.site_packages / "zz_beside.pth").write_text((real().site_packages / "zz_beside.pth").read_text())
    ran = command("run", bare.python, step)
    assert ran.stdout == "guarded alone\n", ran.stderr


def test_torchrun_guards_every_worker(step: Path) -> None:
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    ran = real().run(*torchrun, step, PEFT_GRADGUARD="1", OMP_NUM_THREADS="1")
    assert sorted(ran.stdout.split("\n")) == ["", "guarded 0", "guarded 1"], ran.stderr


def test_spawned_workers_of_a_data_loader(tmp_path: Path) -> None:
    script = tmp_path / "loader.py"
    script.write_text(LOADER)
    assert real().run(script, PEFT_GRADGUARD="1").stdout == "workers [1, 1]\n"


@pytest.mark.parametrize("when", ["before", "after"])
def test_another_wrapper_around_update_ipt(step: Path, when: str) -> None:
    if when == "before":
        code = f"{WRAP_OTHER}\nimport wrapt\n"
        code += "def hook(module): wrapt.wrap_function_wrapper(module, 'RankAllocator.update_ipt', other)\n"
        # Registered before start-up's own hook is, which waits for peft itself.
        code += "wrapt.register_post_import_hook(hook, 'peft.tuners.adalora')\n"
    else:
        code = f"{WRAP_OTHER}\nimport peft.tuners.adalora as module\n"
        code += "wrapt.wrap_function_wrapper(module, 'RankAllocator.update_ipt', other)\n"
    step.write_text(f"{code}\n{GUARDED_STEP}\nassert len(calls) == 4, calls\n")
    ran = real().run(step, PEFT_GRADGUARD="1")
    assert ran.stdout == "guarded alone\n", ran.stderr
