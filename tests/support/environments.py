"""Virtual environments with the built package, for tests of what happens when an interpreter starts.

Knows nothing of torch: the environments hold wrapt and a stand-in for PEFT that is only there to be imported. The
"real" one sees what is installed for the tests.
"""

from __future__ import annotations

import atexit
import functools
import glob
import json
import os
import shutil
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

REPOSITORY = Path(__file__).resolve().parents[2]
VERSIONS = ("3.10", "3.11", "3.12", "3.13", "3.14", "3.15")
CURRENT = ".".join(map(str, sys.version_info[:2]))
AUTOLOAD = "peft_gradguard/autoload"
START = "_peft_gradguard_start.py"

LOOK = """
import json, sys
ours = sorted(name for name in sys.modules if name.split(".")[0] in (
    "peft_gradguard", "_peft_gradguard_start", "wrapt", "torch", "peft"))
import peft
start = sys.modules.get("_peft_gradguard_start")
guard = sys.modules.get("peft_gradguard")
print(json.dumps({
    "at_start": ours,
    "ways": getattr(start, "ways", []),
    "waiting": len({id(finder) for finder in sys.meta_path if type(finder).__name__ == "PeftIsComing"}),
    "guarded": bool(guard and guard.is_enabled()),
    "from": getattr(guard, "__file__", None),
}))
"""
"""What a program sees that imports (a stand-in for) PEFT."""

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
"""A program that plain PEFT cannot finish. Says that it was guarded."""


@functools.cache
def folder() -> Path:
    path = tempfile.mkdtemp(prefix="peft_gradguard-tests-")
    atexit.register(shutil.rmtree, path, ignore_errors=True)
    return Path(path)


@functools.cache
def wheel() -> Path:
    return _build("-t", "wheel", "-d", folder() / "wheel")


@functools.cache
def sdist() -> Path:
    return _build("-t", "sdist", "-d", folder() / "sdist")


def _build(*options: object) -> Path:
    subprocess.run(
        [sys.executable, "-m", "hatchling", "build", *map(str, options)],
        cwd=REPOSITORY, check=True, capture_output=True,
    )  # fmt: skip
    return next(Path(str(options[-1])).iterdir())


@functools.cache
def python(version: str) -> str:
    """Return an interpreter of this version; the test that needs one which the machine has not got is skipped."""
    # Not sys.executable: in its environment the package is installed already.
    candidates = [sys._base_executable] if sys.version_info[:2] == tuple(map(int, version.split("."))) else []
    candidates += sorted(glob.glob(os.path.expanduser(f"~/.pyenv/versions/{version}.*/bin/python")))
    candidates += [found for found in [shutil.which(f"python{version}")] if found]
    for candidate in candidates:
        told = subprocess.run(
            [candidate, "-I", "-c", "import sys, venv; print('%d.%d' % sys.version_info[:2])"],
            capture_output=True, text=True,
        )  # fmt: skip
        if told.stdout.strip() == version:
            return candidate
    # Not at the top: examples/startup_cost.py comes here without pytest.
    import pytest

    pytest.skip(f"Python {version} was not found on this machine")


def pip(python: Path | str, *arguments: object) -> subprocess.CompletedProcess[str]:
    command = [
        sys.executable,
        "-m",
        "pip",
        "--python",
        str(python),
        "--disable-pip-version-check",
        *map(str, arguments),
    ]
    return subprocess.run(command, check=True, capture_output=True, text=True)


def reads_start_files(version: str) -> bool:
    """Say whether this Python reads ``.start`` files (PEP 829), and no code in a ``.pth`` file beside one."""
    return tuple(map(int, version.split("."))) >= (3, 15)


@dataclass(frozen=True)
class Environment:
    root: Path
    version: str

    @property
    def way(self) -> str:
        """Which start-up file this Python reads."""
        return ".start" if reads_start_files(self.version) else ".pth"

    @property
    def at_rest(self) -> list[str]:
        """What is imported at the start while the switch is off: a ``.start`` file can only name a function."""
        return [START.removesuffix(".py")] if reads_start_files(self.version) else []

    @property
    def scripts(self) -> Path:
        return self.root / ("Scripts" if os.name == "nt" else "bin")

    @property
    def python(self) -> Path:
        return self.scripts / "python"

    @property
    def site_packages(self) -> Path:
        return next(self.root.glob("lib/python*/site-packages"))

    def run(self, *arguments: object, **variables: str) -> subprocess.CompletedProcess[str]:
        return run(self.python, *arguments, **variables)

    def look(self, *options: str, **variables: str) -> dict[str, Any]:
        return look(self.python, *options, **variables)


def new_environment(version: str, name: str, *options: str) -> Environment:
    root = folder() / f"{name}-{version}"
    subprocess.run([python(version), "-m", "venv", "--without-pip", *options, str(root)], check=True)
    return Environment(root, version)


@functools.cache
def installed(version: str) -> Environment:
    """Return a virtual environment with the wheel installed. Tests leave it as they find it."""
    environment = new_environment(version, "installed")
    pip(environment.python, "install", "--no-deps", "--no-index", wheel())
    add_stand_ins(environment.site_packages)
    return environment


@functools.cache
def real() -> Environment:
    """Return an environment with the wheel installed, beside all that is installed for the tests."""
    environment = new_environment(CURRENT, "real")
    pip(environment.python, "install", "--no-deps", "--no-index", wheel())
    import torch

    beside = Path(torch.__file__).parent.parent
    # A plain path: the .pth files that lie there are not read.
    (environment.site_packages / "zz_beside.pth").write_text(f"{beside}\n")
    if "COVERAGE_PROCESS_START" in os.environ:
        shutil.copytree(beside / "coverage", environment.site_packages / "coverage")
        (environment.site_packages / "a_coverage.pth").write_text("import coverage; coverage.process_startup()\n")
    return environment


@functools.cache
def target(version: str) -> Path:
    """Return a folder made by ``pip install --target``, where no ``.pth`` file is read."""
    path = folder() / f"target-{version}"
    pip(python(version), "install", "--no-deps", "--no-index", "--target", path, wheel())
    add_stand_ins(path)
    return path


def add_stand_ins(site_packages: Path) -> None:
    """Put wrapt (a copy, where other versions of Python use its Python code) and a stand-in for PEFT there."""
    import wrapt

    shutil.copytree(Path(wrapt.__file__).parent, site_packages / "wrapt", ignore=shutil.ignore_patterns("__pycache__"))
    (site_packages / "peft").mkdir()
    (site_packages / "peft" / "__init__.py").write_text("")


def run(python: Path | str, *arguments: object, **variables: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [str(python), *map(str, arguments)],
        env=clean_environ(**variables), cwd=empty_folder(), capture_output=True, text=True, timeout=120,
    )  # fmt: skip


def clean_environ(**variables: str) -> dict[str, str]:
    kept = {k: v for k, v in os.environ.items() if not k.startswith(("PYTHON", "PEFT_GRADGUARD", "COV_"))}
    return {**kept, **variables}


@functools.cache
def empty_folder() -> Path:
    """Return a working directory with nothing in it that Python could import."""
    path = folder() / "empty"
    path.mkdir()
    return path


def look(python: Path | str, *options: str, **variables: str) -> dict[str, Any]:
    """Run ``LOOK`` with these options of Python and environment variables; nothing else may be printed."""
    ran = run(python, *options, "-c", LOOK, **variables)
    assert ran.returncode == 0, ran.stderr
    seen: dict[str, Any] = json.loads(ran.stdout.splitlines()[-1])
    return {**seen, "stdout": "\n".join(ran.stdout.splitlines()[:-1]), "stderr": ran.stderr}


def command(*arguments: object, **variables: str) -> subprocess.CompletedProcess[str]:
    """Run the installed command ``peft-gradguard``."""
    return run(real().scripts / "peft-gradguard", *arguments, **variables)


def write(path: Path, text: str) -> str:
    """Write a file, and return its folder."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    return str(path.parent)


def paths(*entries: object) -> str:
    """Return these as a value of PYTHONPATH."""
    return os.pathsep.join(map(str, entries))
