"""What loads by itself guards real PEFT: in children of every kind, beside other tools, and as `status` says."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from typing import TYPE_CHECKING, Any

import pytest
from environments import add_stand_ins, clean_environ, empty_folder, installed, new_environment, pip, real, run, wheel

if TYPE_CHECKING:
    from pathlib import Path

GUARDED_STEP = """
import os, sys
import peft, torch
torch.set_num_threads(1)
torch.manual_seed(0)
config = peft.AdaLoraConfig(target_modules=["0", "2"], init_r=4, target_r=2, tinit=1, tfinal=1, deltaT=1, total_step=6)
model = peft.get_peft_model(torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.Tanh(), torch.nn.Linear(4, 2)), config)
for name, parameter in model.named_parameters():
    if ".2.lora_" in name:
        parameter.requires_grad = False  # plain PEFT: TypeError
net = model
if "RANK" in os.environ:
    torch.distributed.init_process_group("gloo")
    net = torch.nn.parallel.DistributedDataParallel(model)
optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], 0.1)
for step in range(1, 5):
    net(torch.randn(3, 4)).sum().backward()
    optimizer.step()
    model.base_model.update_and_allocate(step)
    optimizer.zero_grad()
allocator = model.base_model.rankallocator
assert len(allocator.exp_avg_ipt) == 3, allocator.exp_avg_ipt.keys()
# In one piece: the workers of torchrun write to one pipe.
os.write(1, f"guarded {os.environ.get('RANK', 'alone')}\\n".encode())
"""

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

CURRENT = ".".join(map(str, sys.version_info[:2]))

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


def command(*arguments: object, **variables: str) -> subprocess.CompletedProcess[str]:
    """Run the installed command ``peft-gradguard``."""
    return run(real().scripts / "peft-gradguard", *arguments, **variables)


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


# peft-gradguard status


def status(*options: object, **variables: str) -> tuple[int, dict[str, Any]]:
    ran = command("status", "--json", *options, **variables)
    assert "Traceback" not in ran.stderr + ran.stdout
    return ran.returncode, json.loads(ran.stdout)


def test_status_on() -> None:
    returncode, said = status(PEFT_GRADGUARD="1")
    assert (returncode, said["state"], said["ways_in"], said["needs_guard"]) == (0, "on", [".pth"], True)
    assert said["switch"] == {
        "value": "1", "meaning": "on", "read_from": "the environment variable PEFT_GRADGUARD",
    }  # fmt: skip
    assert said["methods"]["update_ipt"] == {"guarded": True, "others": []}
    assert list(said["versions"]) == ["python", "torch", "peft", "transformers", "wrapt", "peft_gradguard"]
    assert all(said["versions"].values())


def test_status_off() -> None:
    returncode, said = status()
    assert (returncode, said["state"], said["ways_in"], said["needs_guard"]) == (1, "off", [], True)
    assert not said["methods"]["update_ipt"]["guarded"]
    assert "PEFT_GRADGUARD is not set" in said["why"]


def test_status_names_other_wrappers_and_autoloads(tmp_path: Path) -> None:
    code = "import functools, peft.tuners.adalora as module\nallocator = module.RankAllocator\n"
    code += "def around(method):\n    return functools.wraps(method)(lambda *args: method(*args))\n"
    code += "allocator.update_ipt = around(allocator.update_ipt)\n"
    (tmp_path / "sitecustomize.py").write_text(code)
    returncode, said = status(PYTHONPATH=str(tmp_path), PEFT_GRADGUARD="on")
    assert (returncode, said["state"]) == (0, "on")
    assert said["methods"]["update_ipt"] == {"guarded": True, "others": ["sitecustomize"]}


def test_status_names_an_import_in_start_up_code(tmp_path: Path) -> None:
    (tmp_path / "sitecustomize.py").write_text("import peft_gradguard")
    ran = installed(CURRENT).run("-m", "peft_gradguard", "status", "--json", PYTHONPATH=str(tmp_path))
    assert json.loads(ran.stdout)["ways_in"] == ["import peft_gradguard in somebody's start-up code"]


def test_status_of_a_peft_that_does_not_fit(tmp_path: Path) -> None:
    odd = tmp_path / "peft" / "tuners" / "adalora"
    odd.mkdir(parents=True)
    for folder in (odd.parent.parent, odd.parent):
        (folder / "__init__.py").write_text("")
    (odd / "__init__.py").write_text("class RankAllocator:\n    def update_ipt(self): pass\n")
    returncode, said = status(PYTHONPATH=str(tmp_path), PEFT_GRADGUARD="1")
    assert (returncode, said["state"], said["needs_guard"]) == (2, "on but not applied", None)
    assert "leaves PEFT untouched" in said["why"]


@pytest.mark.parametrize("missing", ["wrapt", "peft"])
@pytest.mark.parametrize("way", ["command", "-m"])
def test_status_where_something_is_missing(missing: str, way: str, tmp_path: Path) -> None:
    environment = new_environment(CURRENT, f"{missing}-missing-{way}")
    pip(environment.python, "install", "--no-deps", "--no-index", wheel())
    if missing == "peft":
        add_stand_ins(environment.site_packages)
    start = (
        [environment.scripts / "peft-gradguard"] if way == "command" else [environment.python, "-m", "peft_gradguard"]
    )
    ran = run(*start, "status", PEFT_GRADGUARD="1")
    assert ran.returncode == 2
    assert ran.stdout.startswith("peft_gradguard is on but not applied: ")
    assert "Traceback" not in ran.stdout + ran.stderr
    assert run(*start, "status").returncode == 1


# peft-gradguard run


def test_run_gives_back_status_and_streams() -> None:
    code = "import sys; print(sys.stdin.read().upper()); print('err', file=sys.stderr); sys.exit(7)"
    ran = subprocess.run(
        [real().scripts / "peft-gradguard", "run", real().python, "-c", code],
        input="in", capture_output=True, text=True, env=clean_environ(), cwd=empty_folder(),
    )  # fmt: skip
    assert (ran.returncode, ran.stdout, ran.stderr) == (7, "IN\n", "err\n")


@pytest.mark.skipif(os.name == "nt", reason="signals of POSIX")
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_run_passes_signals(number: signal.Signals) -> None:
    code = "import signal, sys, time\n"
    code += (
        "for n in (2, 15): signal.signal(n, lambda n, f: sys.exit(100 + n))\nprint('up', flush=True); time.sleep(60)"
    )
    ran = subprocess.Popen(
        [real().scripts / "peft-gradguard", "run", real().python, "-c", code],
        stdout=subprocess.PIPE, env=clean_environ(), cwd=empty_folder(),
    )  # fmt: skip
    assert ran.stdout is not None
    assert ran.stdout.readline() == b"up\n"
    ran.send_signal(number)
    assert ran.wait(20) == 100 + number
    ran.stdout.close()


@pytest.mark.skipif(os.name == "nt", reason="signals of POSIX")
def test_run_leaves_broken_pipes_to_the_command() -> None:
    ran = subprocess.Popen(
        [real().scripts / "peft-gradguard", "run", "yes"],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=clean_environ(), cwd=empty_folder(),
    )  # fmt: skip
    assert ran.stdout is not None
    assert ran.stderr is not None
    ran.stdout.read(10)
    ran.stdout.close()
    assert ran.wait(20) == -signal.SIGPIPE
    assert ran.stderr.read() == b""
    ran.stderr.close()


def test_run_of_what_is_not_there() -> None:
    ran = command("run", "no-such-command", "--help")
    assert (ran.returncode, ran.stderr) == (127, "peft-gradguard: no-such-command: command not found\n")


def test_run_of_what_cannot_be_run(tmp_path: Path) -> None:
    (tmp_path / "data").write_text("no program")
    ran = command("run", tmp_path / "data")
    assert (ran.returncode, len(ran.stderr.splitlines())) == (126, 1)


def test_run_without_a_command() -> None:
    ran = command("run")
    assert ran.returncode == 2
    assert "the command to run is missing" in ran.stderr


def test_run_overrides_the_switch_and_keeps_the_path() -> None:
    code = "import os; print(os.environ['PEFT_GRADGUARD'], os.environ['PYTHONPATH'])"
    autoload = real().site_packages / "peft_gradguard" / "autoload"
    nested = [real().scripts / "peft-gradguard", "run", "--", real().python, "-c", code]
    ran = command("run", *nested, PEFT_GRADGUARD="0", PYTHONPATH="elsewhere")
    assert ran.stdout == f"1 {autoload}{os.pathsep}elsewhere\n"


def test_run_as_a_module() -> None:
    ran = real().run("-m", "peft_gradguard", "run", real().python, "-c", "print('runs')")
    assert ran.stdout == "runs\n"
