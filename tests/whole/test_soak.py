"""The long run of ``make soak``, made short."""

from __future__ import annotations

from soak import Lives, run_lifetimes, run_steps


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
