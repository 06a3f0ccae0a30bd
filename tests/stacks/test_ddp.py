"""DistributedDataParallel, two processes: both come to the same skips, scores, ranks and weights."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
from stacks.checks import assert_named, assert_right, assert_said, factors, same

if TYPE_CHECKING:
    from collections.abc import Callable

    Launch = Callable[..., list[dict[str, Any]]]

BRANCH = factors("branch.0", "branch.2", of="E")
"""The loss carries AdaLoRA's regulariser, which reaches every A and B."""


@pytest.mark.parametrize("mode", ["guard", "plain"])
@pytest.mark.parametrize("case", ["all used", "unused on one rank", "unused on one rank at a time"])
def test_used_on_some_rank_is_scored_on_all(torchrun: Launch, mode: str, case: str) -> None:
    reports = torchrun("ddp", mode)
    assert_right(reports, case)
    assert_said(reports, case, "", set())
    assert same(reports[0][case]["result"], torchrun("ddp", "guard")[0][case]["result"])


@pytest.mark.parametrize(
    ("case", "reason", "names", "ranked"),
    [
        ("unused on both", "no gradient", BRANCH, 2),
        ("unused on both in some steps", "no gradient", BRANCH, 4),
        ("frozen", "frozen", factors("trunk.0"), 3),
    ],
)
def test_skips_agree(torchrun: Launch, case: str, reason: str, names: set[str], ranked: int) -> None:
    reports = torchrun("ddp", "guard")
    assert_right(reports, case, ranked)
    assert_said(reports, case, reason, names)
    assert_named(torchrun("ddp", "plain"), case, "TypeError", "NoneType")


@pytest.mark.parametrize("mode", ["guard", "plain"])
def test_ranks_drift_apart_after_no_sync(torchrun: Launch, mode: str) -> None:
    reports = torchrun("ddp", mode)
    drifted = [report["after no_sync"]["result"]["scores"] for report in reports]
    agreed = [report["after the synchronised step"]["result"]["scores"] for report in reports]
    assert not same(*drifted)
    assert same(*agreed)
