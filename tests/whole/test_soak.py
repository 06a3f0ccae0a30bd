"""The long run of ``make soak``, made short."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from needs import optimizer_step_event
from soak import Lives, run_lifetimes, run_steps
from soak_alarms import Plan, alarms

# Not imported: it needs a newer transformers than these tests may have.
SOAK_KILLS = Path(__file__).parents[1] / "support" / "soak_kills.py"


def test_memory_stays_flat_and_each_name_is_logged_once() -> None:
    figures = run_steps(steps=800, warm=200)
    warm, end = figures.objects
    assert abs(end - warm) < 20
    warm, end = figures.traced
    # A hundred bytes a step. Other threads of the process (pytest-xdist's) come and go with some ten thousand.
    assert end - warm < 60_000
    assert figures.lines == figures.skipped == 12
    assert figures.other_lines == 1


def test_models_go_with_their_last_reference() -> None:
    assert run_lifetimes(10) == Lives(at_once=10)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("number", range(50))
def test_nothing_is_said_of_a_healthy_training(number: int) -> None:
    assert alarms(number) == [], Plan(number)


@optimizer_step_event
@pytest.mark.skipif(sys.platform == "win32", reason="there is neither fork nor SIGKILL")
def test_killed_at_random_moments() -> None:
    # By itself: its lives are forks, and this process has threads.
    command = [sys.executable, "-W", "ignore", SOAK_KILLS, "3"]
    ran = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert ran.returncode == 0, ran.stderr
    assert ran.stdout.count("killed 3 times") == 2
