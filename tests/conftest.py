from __future__ import annotations

import gc
import logging
import multiprocessing
import os
import shutil
import sys
import traceback
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from unguarded import assert_unguarded, call_unguarded

try:
    from hypothesis import settings
except ImportError:
    # A bare machine (tests/gpu) may lack it; the tests that draw by chance then fail to be collected.
    settings = None

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

os.environ.pop("PEFT_GRADGUARD", None)
os.environ.setdefault("HF_HUB_OFFLINE", "1")

if settings:
    settings.register_profile("short", derandomize=True, max_examples=600, deadline=None, database=None)
    settings.register_profile("long", settings.get_profile("short"), derandomize=False, max_examples=20_000)
    settings.register_profile("quick", settings.get_profile("short"), max_examples=60)
    settings.load_profile("short")


@pytest.fixture(scope="session", autouse=True)
def guard() -> None:
    """Switch the guard on in the tests' own process."""
    import peft_gradguard

    assert peft_gradguard.is_enabled()
    # With torch before 2.4 each training has this record, which says so and no more.
    logging.getLogger("peft_gradguard").addFilter(lambda record: not lacks_what_scores_take(record))


def lacks_what_scores_take(record: logging.LogRecord) -> bool:
    """Whether this says, rightly, that torch cannot compute scores together."""
    return "this torch lacks" in record.getMessage() and not hasattr(sys.modules["torch"].Tensor, "_use_count")


@pytest.fixture(scope="session", autouse=True)
def quick_collections(guard: None) -> None:
    """Take what the tests' modules have imported (torch, transformers, PEFT) out of what each collection looks at."""
    gc.collect()
    gc.freeze()


@pytest.fixture(autouse=True)
def trainings_of_other_tests() -> Iterator[None]:
    """What is to be said of this test's trainings, once they have ended, is not said in another test."""
    yield
    ended = sys.modules.get("peft_gradguard.troubles.ended")
    if ended is not None:
        ended._endings.clear()
        ended._ended.clear()


@pytest.fixture(autouse=True)
def nothing_fails_in_silence(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """What the guard would only log at level DEBUG, because it must not stop a training, fails a test."""
    from peft_gradguard import log

    failed: list[str] = []
    say = log.say

    def note(*args: Any, exc_info: bool = False, **options: Any) -> None:
        if exc_info:
            failed.append(traceback.format_exc())
        say(*args, exc_info=exc_info, **options)

    monkeypatch.setattr(log, "say", note)
    yield
    if request.node.get_closest_marker("fails_in_silence") is None:
        assert not failed, "\n".join(failed)


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


@pytest.fixture
def history() -> Iterator[None]:
    """Keep the history of the trainings in this test."""
    import peft_gradguard
    from peft_gradguard.memory import counts

    before = counts.history_is_kept()
    peft_gradguard.keep_history()
    yield
    peft_gradguard.keep_history(before)


@pytest.fixture(scope="session")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a saved adapter: a RoBERTa of three layers, the first one frozen."""
    from scenarios import train

    folder = tmp_path_factory.mktemp("trained")
    train("frozen layer", str(folder))
    return folder


@pytest.fixture
def saved(trained: Path, tmp_path: Path) -> Path:
    """A copy of it, to be changed."""
    return Path(shutil.copytree(trained, tmp_path / "saved"))


@pytest.fixture
def two(saved: Path) -> Path:
    """A folder with the adapters "default" and "other", the same one twice."""
    other = saved.parent / "other"
    shutil.copytree(saved, other)
    return Path(shutil.move(other, saved)).parent


@pytest.fixture
def inspect(capsys: pytest.CaptureFixture[str]) -> Callable[..., tuple[int, str, str]]:
    """Run ``peft-gradguard inspect`` in this process; give its status and what it has written."""
    from peft_gradguard.cli.main import main

    def run(*arguments: object) -> tuple[int, str, str]:
        code = main(["inspect", *map(str, arguments)])
        out, err = capsys.readouterr()
        return code, out, err

    return run


@pytest.fixture(scope="session")
def torchrun(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., list[dict[str, Any]]]:
    """Run a worker script of ``support/stacks`` on two processes, once for all tests that look at its report."""
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
