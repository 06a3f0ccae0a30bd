"""Two processes, stopped and taken up again from the stack's own checkpoint: they end as if never stopped."""

from __future__ import annotations

import importlib.util
from typing import TYPE_CHECKING, Any

import pytest
from scenarios import FINALISING, TOTAL
from stacks.checks import LEFT_TO_PEFT, assert_named, same

if TYPE_CHECKING:
    from collections.abc import Callable

    Launch = Callable[..., list[dict[str, Any]]]

STACKS = {"ddp": "torch", "trainer": "torch", "fsdp1": "torch", "fsdp2": "torch", "zero1": "zero", "zero2": "zero"}
"""With those that share a launch."""


def launched(torchrun: Launch, stack: str) -> list[dict[str, Any]]:
    if STACKS[stack] == "zero" and importlib.util.find_spec("deepspeed") is None:
        pytest.skip("deepspeed is not installed (see the Makefile)")
    return torchrun("resumed", "guard", *(name for name in STACKS if STACKS[name] == STACKS[stack]))


@pytest.mark.parametrize("stop", [2, 9, FINALISING + 1])
@pytest.mark.parametrize("stack", STACKS)
def test_every_step_after_is_as_if_never_stopped(torchrun: Launch, stack: str, stop: int) -> None:
    for report in launched(torchrun, stack):
        never, resumed = report[f"{stack} 0"], report[f"{stack} {stop}"]
        assert (never["error"], resumed["error"]) == (None, None)
        assert len(resumed["result"]) == TOTAL - stop
        assert same(resumed["result"], never["result"][stop:])
        assert any(step["scores"] for step in never["result"])
        said = [r["message"] for r in resumed["records"] if not r["reason"] and LEFT_TO_PEFT not in r["message"]]
        assert said == []


def test_in_flat_pieces_it_is_refused(torchrun: Launch) -> None:
    assert_named(launched(torchrun, "fsdp1"), "outside", "ValueError", "inside of FSDP.summon_full_params(model)")
