"""The installed command: ``status`` says what is so, and ``run`` gives way to what it runs."""

from __future__ import annotations

import json
import os
import signal
import subprocess
from typing import TYPE_CHECKING, Any

import pytest
from environments import (
    CURRENT,
    add_stand_ins,
    clean_environ,
    command,
    empty_folder,
    installed,
    new_environment,
    pip,
    real,
    run,
    wheel,
)

if TYPE_CHECKING:
    from pathlib import Path


# peft-gradguard status


def status(*options: object, **variables: str) -> tuple[int, dict[str, Any]]:
    ran = command("status", "--json", *options, **variables)
    assert "Traceback" not in ran.stderr + ran.stdout
    return ran.returncode, json.loads(ran.stdout)


def test_status_on() -> None:
    returncode, said = status(PEFT_GRADGUARD="1")
    assert (returncode, said["state"], said["ways_in"], said["needs_guard"]) == (0, "on", [real().way], True)
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
