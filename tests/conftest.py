from __future__ import annotations

import logging
import multiprocessing
import os
import sys
from concurrent.futures import ProcessPoolExecutor
from typing import TYPE_CHECKING, Any

import pytest
from hypothesis import settings

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

os.environ.pop("PEFT_GRADGUARD", None)
os.environ.setdefault("HF_HUB_OFFLINE", "1")

settings.register_profile("short", derandomize=True, max_examples=600, deadline=None, database=None)
settings.register_profile("long", settings.get_profile("short"), derandomize=False, max_examples=20_000)
settings.register_profile("quick", settings.get_profile("short"), max_examples=60)
settings.load_profile("short")


def assert_unguarded() -> None:
    assert not [name for name in sys.modules if name.startswith("peft_gradguard")]


def call_unguarded(function: Callable[..., Any], *args: Any) -> Any:
    result = function(*args)
    assert_unguarded()
    return result


@pytest.fixture(scope="session", autouse=True)
def guard() -> None:
    """Switch the guard on in the tests' own process. Not at the top: the worker process imports this file too."""
    import peft_gradguard

    assert peft_gradguard.is_enabled()


@pytest.fixture(autouse=True)
def others_are_quiet() -> Iterator[None]:
    """What is to be said at the end of a test's trainings is not said in other tests, in which they may end."""
    yield
    from peft_gradguard.troubles import ended

    for ending in [*ended.living(), *ended._ended]:
        ending.judge = lambda: None


@pytest.fixture
def records() -> Iterator[list[logging.LogRecord]]:
    """What the guard has logged in this test, at any level."""
    found: list[logging.LogRecord] = []
    handler, logger = logging.Handler(), logging.getLogger("peft_gradguard")
    handler.emit = found.append  # type: ignore[method-assign]
    logger.addHandler(handler)
    logger.setLevel(logging.DEBUG)
    yield found
    logger.setLevel(logging.NOTSET)
    logger.removeHandler(handler)


@pytest.fixture
def said(caplog: pytest.LogCaptureFixture) -> Callable[[], list[str]]:
    """What the guard has said of the training as a whole, skipped names left out."""
    return lambda: [
        record.getMessage()
        for record in caplog.records
        if record.name == "peft_gradguard" and not hasattr(record, "reason")
    ]


@pytest.fixture(scope="session")
def plain() -> Iterator[Callable[..., Any]]:
    """Call a function in a process that never imports the guard: ``plain(function, *args)``."""
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, mp_context=context, initializer=assert_unguarded) as pool:
        yield lambda function, *args: pool.submit(call_unguarded, function, *args).result()


@pytest.fixture(scope="session")
def torchrun(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., list[dict[str, Any]]]:
    """Run a worker script of ``tests/stacks`` on two processes, once for all tests that look at its report."""
    reports: dict[tuple[str, ...], list[dict[str, Any]] | AssertionError] = {}

    def get(script: str, mode: str, *arguments: str) -> list[dict[str, Any]]:
        from stacks.launch import torchrun

        key = (script, mode, *arguments)
        if key not in reports:
            try:
                reports[key] = torchrun(script, mode, tmp_path_factory.mktemp(script), *arguments)
            except AssertionError as error:
                reports[key] = error
        report = reports[key]
        if isinstance(report, AssertionError):
            raise report
        return report

    return get
