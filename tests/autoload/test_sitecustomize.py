"""Our sitecustomize and those of others, at the start of an interpreter."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
from environments import AUTOLOAD, REPOSITORY, Environment, add_stand_ins, look, paths, python, run, target, write

if TYPE_CHECKING:
    from pathlib import Path

NOISY = 'print("sitecustomize of the user:", __name__, __import__("sys").modules["sitecustomize"].__file__ == __file__)'
NOISE = "sitecustomize of the user: sitecustomize True"


def test_sitecustomize_alone(version: str) -> None:
    folder_ = target(version)
    path = paths(folder_ / AUTOLOAD, folder_)
    on = look(python(version), PEFT_GRADGUARD="1", PYTHONPATH=path)
    assert (on["guarded"], on["ways"], on["stderr"]) == (True, ["sitecustomize"], "")
    assert not {"peft_gradguard", "wrapt", "peft", "torch"} & set(on["at_start"])
    off = look(python(version), PYTHONPATH=path)
    assert (off["guarded"], off["ways"], off["stderr"]) == (False, [], "")


def test_package_that_is_not_on_the_path_is_found_near_its_sitecustomize(version: str, tmp_path: Path) -> None:
    add_stand_ins(tmp_path)
    for root in (target(version), REPOSITORY):
        seen = look(python(version), PEFT_GRADGUARD="1", PYTHONPATH=paths(root / AUTOLOAD, tmp_path))
        assert seen["guarded"]
        assert seen["from"] == str(root / "peft_gradguard" / "__init__.py")


def test_both_ways_together(environment: Environment) -> None:
    seen = environment.look(PEFT_GRADGUARD="1", PYTHONPATH=str(environment.site_packages / AUTOLOAD))
    assert (seen["guarded"], seen["ways"], seen["waiting"]) == (True, [environment.way, "sitecustomize"], 1)


@pytest.mark.parametrize("switch", ["0", "1"])
@pytest.mark.parametrize("times", [1, 2])
def test_sitecustomize_of_the_user_runs_once(version: str, tmp_path: Path, switch: str, times: int) -> None:
    users = write(tmp_path / "users" / "sitecustomize.py", NOISY)
    path = paths(*[target(version) / AUTOLOAD] * times, target(version), users)
    seen = look(python(version), PEFT_GRADGUARD=switch, PYTHONPATH=path)
    assert (seen["stdout"], seen["stderr"]) == (NOISE, "")
    assert seen["guarded"] == (switch == "1")


def test_sitecustomize_that_runs_the_others_in_its_turn(version: str, tmp_path: Path) -> None:
    # As ddtrace's: it takes its own folder off the path and imports the first that is then there, which is ours.
    chains = "import os, sys; print('first')\nhere = os.path.dirname(__file__)\n"
    chains += "at = sys.path.index(here); del sys.path[at]; del sys.modules['sitecustomize']\n"
    chains += "import sitecustomize\nsys.path.insert(at, here)\n"
    first = write(tmp_path / "first" / "sitecustomize.py", chains)
    users = write(tmp_path / "users" / "sitecustomize.py", NOISY)
    for order in ([target(version) / AUTOLOAD, first], [first, target(version) / AUTOLOAD]):
        seen = look(python(version), PEFT_GRADGUARD="1", PYTHONPATH=paths(*order, target(version), users))
        assert (seen["stdout"], seen["stderr"], seen["guarded"]) == (f"first\n{NOISE}", "", True)


def test_two_that_search_the_whole_path_do_not_call_each_other_for_ever(version: str, tmp_path: Path) -> None:
    # Unlike ddtrace's this one leaves the path alone, so that ours would find it again.
    chains = "import importlib.machinery as m, importlib.util as u, os, sys; print('first')\n"
    chains += "rest = [p for p in sys.path if p != os.path.dirname(__file__)]\n"
    chains += "s = m.PathFinder.find_spec('sitecustomize', rest); s.loader.exec_module(u.module_from_spec(s))\n"
    first = write(tmp_path / "first" / "sitecustomize.py", chains)
    users = write(tmp_path / "users" / "sitecustomize.py", "print('users')")
    seen = look(python(version), PYTHONPATH=paths(target(version) / AUTOLOAD, target(version), first, users))
    assert seen["stdout"] == "first\nusers"


@pytest.mark.parametrize(
    "broken",
    ["raise ValueError('broken')", "import no_such_module", "1 +", "raise SystemExit(3)"],
    ids=["raises", "misses a module", "is no Python", "exits"],
)
def test_broken_sitecustomize_shows_as_it_would_without_ours(version: str, tmp_path: Path, broken: str) -> None:
    users = write(tmp_path / "users" / "sitecustomize.py", broken)
    base = [python(version), "-c", "print('runs')"]
    without = run(*base, PYTHONPATH=users)
    with_ours = run(*base, PEFT_GRADGUARD="1", PYTHONPATH=paths(target(version) / AUTOLOAD, target(version), users))
    if "SystemExit" in broken:
        # Python gives up with a traceback, in which our frame shows.
        assert without.stderr.splitlines()[-1] == with_ours.stderr.splitlines()[-1] == "SystemExit: 3"
        assert without.returncode == with_ours.returncode
        return
    assert (with_ours.returncode, with_ours.stdout, with_ours.stderr) == (
        without.returncode, without.stdout, without.stderr,
    )  # fmt: skip


def test_folder_named_sitecustomize_is_passed_over(version: str, tmp_path: Path) -> None:
    (tmp_path / "a" / "sitecustomize").mkdir(parents=True)
    users = write(tmp_path / "users" / "sitecustomize.py", NOISY)
    seen = look(python(version), PYTHONPATH=paths(target(version) / AUTOLOAD, target(version), tmp_path / "a", users))
    assert seen["stdout"] == NOISE


def test_usercustomize_runs(version: str, tmp_path: Path) -> None:
    code = "import sys; print('usercustomize', '_peft_gradguard_start' in sys.modules)"
    # In a folder of its own, as the user's site-packages may not exist.
    users = write(tmp_path / "usercustomize.py", code)
    seen = look(
        python(version), PEFT_GRADGUARD="1", PYTHONPATH=paths(target(version) / AUTOLOAD, target(version), users)
    )
    assert (seen["stdout"], seen["guarded"]) == ("usercustomize True", True)
