"""The guard's logger: its level on each process, and that broken logging stops no training."""

from __future__ import annotations

import logging
import os
import signal
import sys
import time
from typing import TYPE_CHECKING, Any

import pytest
import torch
from scenarios import FINALISING, TARGET_R, frozen
from steps import advance, kept_ranks, new_model

from peft_gradguard import log

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    import peft


@pytest.fixture
def model() -> peft.PeftModel:
    return new_model()


@pytest.mark.peft
def test_other_ranks_of_a_distributed_run_log_at_debug(
    model: peft.PeftModel, records: list[logging.LogRecord], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "2")
    frozen("trunk.0", "lora_A")(model, 0)
    advance(model, 1)
    assert [record.levelname for record in records] == ["DEBUG"]


@pytest.mark.peft
@pytest.mark.parametrize("size", [None, "", "1", "8", "many"])
def test_rank_without_a_larger_world_size_is_somebody_elses_variable(
    model: peft.PeftModel, records: list[logging.LogRecord], monkeypatch: pytest.MonkeyPatch, size: str | None
) -> None:
    monkeypatch.setenv("RANK", "8")
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    if size is not None:
        monkeypatch.setenv("WORLD_SIZE", size)
    frozen("trunk.0", "lora_A")(model, 0)
    advance(model, 1)
    assert [record.levelname for record in records] == ["WARNING"]


@pytest.mark.peft
def test_rank_of_a_process_group_without_a_launcher(
    model: peft.PeftModel, records: list[logging.LogRecord], monkeypatch: pytest.MonkeyPatch
) -> None:
    fake = pytest.importorskip("torch.testing._internal.distributed.fake_pg")

    monkeypatch.delenv("RANK", raising=False)
    torch.distributed.init_process_group("fake", store=fake.FakeStore(), rank=1, world_size=2)
    try:
        frozen("trunk.0", "lora_A")(model, 0)
        advance(model, 1)
    finally:
        torch.distributed.destroy_process_group()
    assert [record.levelname for record in records] == ["DEBUG"]


class Raises(logging.Handler):
    def emit(self, record: logging.LogRecord) -> None:
        raise OSError("disk full")


def raising_filter(record: logging.LogRecord) -> bool:
    raise ValueError("no such filter")


@pytest.fixture
def logger() -> Iterator[logging.Logger]:
    logger = logging.getLogger("peft_gradguard")
    before = list(logger.handlers), list(logger.filters), logger.level, logger.propagate, logging.getLogRecordFactory()
    yield logger
    logger.handlers, logger.filters, logger.level, logger.propagate = before[:4]
    logging.setLogRecordFactory(before[4])


def handler_that_raises(logger: logging.Logger) -> None:
    logger.addHandler(Raises())


def filter_that_raises(logger: logging.Logger) -> None:
    logger.addFilter(raising_filter)


def records_that_have_a_step(logger: logging.Logger) -> None:
    """As training frameworks put theirs on every record: logging refuses to have it set once more."""
    make = logging.getLogRecordFactory()

    def record(*args: Any, **kwargs: Any) -> logging.LogRecord:
        made = make(*args, **kwargs)
        made.step = 7
        return made

    logging.setLogRecordFactory(record)


@pytest.mark.parametrize("break_logging", [handler_that_raises, filter_that_raises, records_that_have_a_step])
def test_broken_logging_stops_no_training(
    break_logging: Callable[[logging.Logger], None],
    model: peft.PeftModel,
    logger: logging.Logger,
    capsys: pytest.CaptureFixture[str],
) -> None:
    break_logging(logger)
    frozen("trunk.0", "lora_A")(model, 0)
    advance(model, *range(1, FINALISING + 1))
    assert kept_ranks(model) == 4 * TARGET_R
    lines = capsys.readouterr().err.splitlines()
    (start,) = [number for number, line in enumerate(lines) if line.startswith("peft_gradguard: ")]
    assert "leaves 1 AdaLoRA parameter out of scoring (adapter 'default', step 1): frozen." in lines[start]
    assert lines[start + 1].startswith("  trunk.0.lora_A.default (logging failed on this: ")


def test_broken_logging_without_stderr_stops_no_training(
    model: peft.PeftModel, logger: logging.Logger, monkeypatch: pytest.MonkeyPatch
) -> None:
    handler_that_raises(logger)
    closed = open(os.devnull, "w")  # noqa: SIM115
    closed.close()
    monkeypatch.setattr(sys, "stderr", closed)
    frozen("trunk.0", "lora_A")(model, 0)
    advance(model, 1)
    assert len(model.base_model.rankallocator.exp_avg_ipt) == 11


@pytest.mark.parametrize("level", [logging.ERROR, logging.CRITICAL])
def test_disabled_logging_says_nothing(
    level: int, model: peft.PeftModel, logger: logging.Logger, capfd: pytest.CaptureFixture[str]
) -> None:
    logger.setLevel(level)
    frozen("trunk.0")(model, 0)
    advance(model, 1)
    logger.setLevel(logging.NOTSET)
    logging.disable(level)
    advance(model, 2)
    logging.disable(logging.NOTSET)
    assert "".join(capfd.readouterr()) == ""


def test_broken_logging_at_debug_stops_no_training(model: peft.PeftModel, monkeypatch: pytest.MonkeyPatch) -> None:
    class Raising(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            raise OSError("disk full")

    monkeypatch.setenv("PEFT_GRADGUARD_FUSED", "0")  # which is said at DEBUG
    handler, logger = Raising(), logging.getLogger("peft_gradguard")
    monkeypatch.setattr(logger, "level", logging.DEBUG)
    logger.manager._clear_cache()  # type: ignore[attr-defined]
    logger.addHandler(handler)
    try:
        advance(model, 1, 2)
    finally:
        logger.removeHandler(handler)
        monkeypatch.undo()
        logger.manager._clear_cache()  # type: ignore[attr-defined]
    assert len(model.base_model.rankallocator.exp_avg_ipt) == 12


def test_messages_do_not_stick_to_a_progress_bar(capsys: pytest.CaptureFixture[str]) -> None:
    tqdm = pytest.importorskip("tqdm")
    handler = logging.StreamHandler(sys.stderr)
    logging.getLogger("peft_gradguard").addHandler(handler)
    try:
        with tqdm.tqdm(total=3, mininterval=0) as bar:
            bar.update()
            log.say(logging.WARNING, "A message.")
            log.say(logging.DEBUG, "Not shown.")
    finally:
        logging.getLogger("peft_gradguard").removeHandler(handler)
    before, _, after = capsys.readouterr().err.partition("A message.\n")
    # What stands on the line then is blank, and the bar is drawn anew below.
    assert before.split("\r")[-1] == ""
    assert before.split("\r")[-2].strip() == ""
    assert "1/3" in after
    assert after.count("1/3") <= 2


def test_progress_bars_that_cannot_be_cleared_stop_no_message(
    records: list[logging.LogRecord], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "tqdm.std", None)
    log.say(logging.WARNING, "One.")
    monkeypatch.setitem(sys.modules, "tqdm.std", sys)
    log.say(logging.WARNING, "Two.")
    assert [record.getMessage() for record in records] == ["One.", "Two."]


class TimeIsUpError(Exception):
    pass


@pytest.mark.fails_in_silence
@pytest.mark.skipif(not hasattr(signal, "setitimer"), reason="no such signal here")
@pytest.mark.parametrize("kind", ["a function", "a method"])
def test_time_limit_that_ends_while_the_guard_is_at_work_is_the_programs(kind: str) -> None:
    class Limit:
        def ends(self, *_: object) -> None:
            raise TimeIsUpError

    def ends(*_: object) -> None:
        raise TimeIsUpError

    before = signal.signal(signal.SIGALRM, ends if kind == "a function" else Limit().ends)
    try:
        signal.setitimer(signal.ITIMER_REAL, 0.01)
        with pytest.raises(TimeIsUpError), log.harmless("wait"):
            time.sleep(10)
    finally:
        signal.signal(signal.SIGALRM, before)
    with log.harmless("raise the same error"):
        raise TimeIsUpError
