"""What happens when an interpreter starts in which the package is installed: each way in, on and off, on each Python.

These tests need no torch. What is guarded in the end is another matter: test_autoload_real.py.
"""

from __future__ import annotations

import os
import shutil
from typing import TYPE_CHECKING

import pytest
from environments import (
    AUTOLOAD,
    CURRENT,
    START,
    Environment,
    add_stand_ins,
    installed,
    look,
    new_environment,
    paths,
    pip,
    python,
    reads_start_files,
    run,
    target,
    wheel,
    write,
)

from peft_gradguard.settings import OFF, ON, SWITCH

if TYPE_CHECKING:
    from pathlib import Path


# The .pth file, and from Python 3.15 on the .start file


@pytest.mark.parametrize("value", [None, "", " ", *OFF, "OFF", " False "])
def test_off_does_nothing(environment: Environment, value: str | None) -> None:
    seen = environment.look(**({} if value is None else {"PEFT_GRADGUARD": value}))
    assert seen["at_start"] == environment.at_rest
    assert not seen["guarded"]
    assert seen["stderr"] == ""


@pytest.mark.parametrize("value", [*ON, "TRUE", " On "])
def test_on_waits_for_peft_alone(environment: Environment, value: str) -> None:
    seen = environment.look(PEFT_GRADGUARD=value)
    assert seen["at_start"] == ["_peft_gradguard_start"]
    assert seen["guarded"]
    assert seen["ways"] == [environment.way]
    assert seen["stderr"] == ""


def test_pth_that_runs_twice_waits_once() -> None:
    environment = new_environment(CURRENT, "over-system", "--system-site-packages")
    pip(environment.python, "install", "--no-deps", "--no-index", "--ignore-installed", wheel())
    add_stand_ins(environment.site_packages)
    write(environment.site_packages / "count.pth", "import sys; sys.pth_runs = getattr(sys, 'pth_runs', 0) + 1\n")
    # Python 3.15 collects what is to be run, and runs it once.
    runs = 1 if reads_start_files(CURRENT) else 2
    assert environment.run("-c", "import sys; print(sys.pth_runs)").stdout == f"{runs}\n"
    seen = environment.look(PEFT_GRADGUARD="1")
    assert (seen["waiting"], seen["ways"], seen["guarded"]) == (1, [environment.way], True)


@pytest.mark.parametrize("option", ["-I", "-E", "-s"])
def test_options_that_leave_site_packages(environment: Environment, option: str) -> None:
    assert environment.look(option, PEFT_GRADGUARD="1")["guarded"]
    assert environment.look(option)["at_start"] == environment.at_rest


def test_without_site_nothing_happens(environment: Environment) -> None:
    seen = environment.look("-S", PEFT_GRADGUARD="1", PYTHONPATH=str(environment.site_packages))
    assert (seen["at_start"], seen["guarded"], seen["stderr"]) == ([], False, "")


def test_value_that_is_not_understood(environment: Environment) -> None:
    seen = environment.look(PEFT_GRADGUARD="perhaps")
    assert not seen["guarded"]
    warnings = [line for line in seen["stderr"].splitlines() if "RuntimeWarning" in line]
    assert len(warnings) == 1
    # The line of the .pth file, which Python runs as a string; for a .start file, what calls the function.
    assert warnings[0].startswith({".pth": "<string>:", ".start": "<frozen site>:"}[environment.way])
    assert "'perhaps'" in warnings[0]
    assert all(word in warnings[0] for word in (*ON, *OFF))


def test_value_that_is_not_understood_is_said_once(environment: Environment) -> None:
    ran = environment.run(
        "-c", "import peft_gradguard; print(peft_gradguard.is_enabled())", PEFT_GRADGUARD="perhaps"
    )  # fmt: skip
    assert ran.stdout == "True\n"
    assert ran.stderr.count("RuntimeWarning") == 1


def test_warnings_as_errors(environment: Environment) -> None:
    ran = environment.run("-W", "error", "-c", "print('runs')", PEFT_GRADGUARD="perhaps")
    assert (ran.returncode, ran.stdout) == (0, "runs\n")
    assert len(ran.stderr.splitlines()) == 1
    assert ran.stderr.startswith("peft_gradguard: PEFT_GRADGUARD='perhaps' is not understood")


@pytest.mark.parametrize("flushes_only", [False, True])
def test_a_warning_that_cannot_be_shown_stops_nothing(version: str, tmp_path: Path, flushes_only: bool) -> None:
    ours = str(target(version) / AUTOLOAD / "sitecustomize.py")
    users = write(
        tmp_path / "sitecustomize.py",
        f"""import runpy, sys, types, warnings
warnings.showwarning = None
if {flushes_only}:
    sys.stderr = types.SimpleNamespace(flush=lambda: None)
runpy.run_path({ours!r})""",
    )
    ran = run(
        python(version), "-c", "print('runs')", PEFT_GRADGUARD="perhaps", PYTHONPATH=paths(users, target(version))
    )
    assert (ran.returncode, ran.stdout) == (0, "runs\n")
    said = "peft_gradguard: PEFT_GRADGUARD='perhaps' is not understood" in ran.stderr
    assert said is not flushes_only


def test_peft_that_somebody_elses_start_up_code_has_imported(version: str, tmp_path: Path) -> None:
    ours = str(target(version) / AUTOLOAD / "sitecustomize.py")
    users = write(tmp_path / "sitecustomize.py", f"import peft, runpy; runpy.run_path({ours!r})")
    assert look(python(version), PEFT_GRADGUARD="1", PYTHONPATH=paths(users, target(version)))["guarded"]


def test_start_file_names_a_function_that_is_there(version: str) -> None:
    # Python 3.15 resolves the entry point so.
    (line,) = [
        line
        for line in (installed(version).site_packages / "peft_gradguard.start").read_text().splitlines()
        if not line.startswith("#")
    ]
    code = f"import pkgutil, sys; pkgutil.resolve_name({line!r})(); import peft; print('peft_gradguard' in sys.modules)"
    environment = installed(version)
    assert environment.run("-c", code).stdout == "False\n"
    assert environment.run("-S", "-c", f"import sys; sys.path.append({str(environment.site_packages)!r}); {code}",
                           PEFT_GRADGUARD="1").stdout == "True\n"  # fmt: skip


def test_one_line_in_a_sitecustomize_of_ones_own(environment: Environment, tmp_path: Path) -> None:
    users = write(tmp_path / "sitecustomize.py", "import peft_gradguard")
    assert environment.look(PYTHONPATH=users)["guarded"]
    assert not environment.look(PYTHONPATH=users, PEFT_GRADGUARD="0")["guarded"]


# Whatever goes wrong, the program runs


@pytest.mark.parametrize("damage", ["wrapt is missing", "wrapt is broken", "wrapt is too old", "package", "start"])
@pytest.mark.parametrize("way", [".pth", "sitecustomize"])
def test_damage_gives_one_line(damage: str, way: str, version: str, tmp_path: Path) -> None:
    site = tmp_path / "site"
    shutil.copytree(target(version), site, ignore=shutil.ignore_patterns("__pycache__"))
    if damage.startswith("wrapt"):
        shutil.rmtree(site / "wrapt")
    if damage == "wrapt is missing":
        # Said so, as the base interpreter may have one of its own.
        write(site / "wrapt.py", "raise ModuleNotFoundError(\"No module named 'wrapt'\", name='wrapt')")
    if damage == "wrapt is broken":
        write(site / "wrapt.py", "raise OSError('broken\\nin two lines')")
    if damage == "wrapt is too old":
        write(site / "wrapt.py", "__version__ = '0.9'")
    if damage == "package":
        (site / "peft_gradguard" / "install.py").unlink()
    if damage == "start":
        (site / "_peft_gradguard_start.py").unlink()
    users = write(tmp_path / "users" / "sitecustomize.py", "print('users')")
    path = paths(site / AUTOLOAD, site, users) if way == "sitecustomize" else str(site)
    # site.addsitedir reads .pth files as Python does at its start.
    begin = f"import site; site.addsitedir({str(site)!r})\n" if way == ".pth" else ""
    # As transformers asks whether PEFT is there.
    begin += "import importlib.util; importlib.util.find_spec('peft')\n"
    ran = run(python(version), "-c", f"{begin}import peft; print('runs')", PEFT_GRADGUARD="1", PYTHONPATH=path)
    assert ran.returncode == 0
    assert ran.stdout == ("users\nruns\n" if way == "sitecustomize" else "runs\n")
    if (damage, way) == ("start", ".pth") and reads_start_files(version):
        # There is no line of ours that could say it.
        assert ran.stderr.endswith(f"ModuleNotFoundError: No module named {START.removesuffix('.py')!r}\n")
        return
    (line,) = ran.stderr.splitlines()
    assert line.startswith("peft_gradguard: ")
    assert line.endswith(
        {
            "wrapt is missing": "unguarded (ModuleNotFoundError: No module named 'wrapt')",
            "wrapt is broken": "unguarded (OSError: broken)",
            "start": f"there is no {site / AUTOLOAD / START} and no {site / AUTOLOAD}/../../{START}')"
            if way == "sitecustomize"
            else f'No module named {START.removesuffix(".py")!r}")',
        }.get(damage, ")")
    )


def test_pass_is_never_stopped_by_damage(version: str, tmp_path: Path) -> None:
    write(tmp_path / "_peft_gradguard_start.py", "raise RuntimeError")
    ran = installed(version).run("-c", "pass", PEFT_GRADGUARD="1", PYTHONPATH=str(tmp_path))
    assert ran.returncode == 0
    if reads_start_files(version):
        assert ran.stderr.startswith(f"Error resolving entry point {START.removesuffix('.py')}:start from ")
        assert ran.stderr.endswith("RuntimeError\n")
        return
    # One for each time that Python runs the .pth file: twice, in a virtual environment.
    assert ran.stderr.splitlines() == ["peft_gradguard: cannot start by itself: RuntimeError()"] * 2


# Children


CHILDREN = {
    "subprocess": "import subprocess, sys; subprocess.run([sys.executable, '-c', CODE], check=True)",
    **{
        method: f"import multiprocessing as m; p = m.get_context({method!r}).Process(target=exec, args=(CODE,)); "
        "p.start(); p.join()"
        for method in ("spawn", "fork", "forkserver")
    },
}


@pytest.mark.parametrize("way", CHILDREN)
def test_children_are_guarded(environment: Environment, way: str, tmp_path: Path) -> None:
    if os.name == "nt" and way.startswith("fork"):
        pytest.skip("this system has no fork")
    code = "import peft, sys; print('peft_gradguard' in sys.modules)"
    script = tmp_path / "script.py"
    script.write_text(f"CODE = {code!r}\nif __name__ == '__main__':\n    {CHILDREN[way]}\n")
    assert environment.run(script, PEFT_GRADGUARD="1").stdout == "True\n"
    assert environment.run(script).stdout == "False\n"


def test_words_are_the_same_everywhere(version: str) -> None:
    code = "import _peft_gradguard_start as s; print((s.SWITCH, s.ON, s.OFF))"
    assert installed(version).run("-c", code).stdout.strip() == str((SWITCH, ON, OFF))
