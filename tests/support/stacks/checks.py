"""What must hold for every training on several processes."""

from __future__ import annotations

from typing import Any

import torch
from scenarios import INIT_R, TARGET_R

INIT = INIT_R - 1
"""The initial rank of the workers' model: odd, so that it does not divide evenly among two processes."""


def same(one: Any, other: Any) -> bool:
    """Say whether two nests of containers and tensors are equal bit for bit."""
    if isinstance(one, torch.Tensor):
        return torch.equal(one, other)
    if isinstance(one, dict):
        return list(one) == list(other) and all(same(one[key], other[key]) for key in one)
    if isinstance(one, list | tuple):
        return len(one) == len(other) and all(map(same, one, other))
    return bool(one == other)


LEFT_TO_PEFT = "left to PEFT's own code"


def assert_right(reports: list[dict[str, Any]], case: str, ranked: int = 4) -> dict[str, Any]:
    """The ranks agree bit for bit, and the budget comes down to the target; return what rank 0 has."""
    cases = [report[case] for report in reports]
    assert [c["error"] for c in cases] == [None, None]
    assert same(cases[0]["result"], cases[1]["result"])
    result: dict[str, Any] = cases[0]["result"]
    pattern = result["history"][-1]["pattern"]
    assert len(pattern) == ranked
    assert sum(map(sum, pattern.values())) == TARGET_R * ranked
    assert result["history"][-1]["budget"] == (INIT * ranked, TARGET_R * ranked)
    return result


def assert_said(reports: list[dict[str, Any]], case: str, reason: str, names: set[str]) -> None:
    """Every name once, on both ranks, at WARNING on the first one only."""
    for report, level in zip(reports, ("WARNING", "DEBUG"), strict=True):
        # At DEBUG on both: PEFT scores by itself here, which test_deepspeed.py and test_fsdp.py look at.
        records = [record for record in report[case]["records"] if LEFT_TO_PEFT not in record["message"]]
        assert {record["level"] for record in records} <= {level}
        assert sorted(name for record in records for name in record["parameters"]) == sorted(names)
        assert {record["reason"] for record in records} <= {reason}


def assert_left_to_peft(reports: list[dict[str, Any]], case: str, why: str) -> None:
    """Scores are not computed together: PEFT's own code computes them, and DEBUG says so once, on each rank."""
    for report in reports:
        said = [record for record in report[case]["records"] if LEFT_TO_PEFT in record["message"]]
        assert [(record["level"], why in record["message"]) for record in said] == [("DEBUG", True)]


def assert_like_ddp(result: dict[str, Any], ddp: dict[str, Any]) -> None:
    """The same ranks at every step, and scores and weights but for the order in which numbers are summed."""
    for one, other in zip(result["history"], ddp["history"], strict=True):
        assert bare(one["pattern"] or {}) == bare(other["pattern"] or {})
        torch.testing.assert_close(bare(one["scores"]), bare(other["scores"]), rtol=1e-3, atol=1e-7)
    torch.testing.assert_close(bare(result["weights"]), bare(ddp["weights"]), rtol=1e-3, atol=1e-5)


def bare(named: dict[str, Any]) -> dict[str, Any]:
    return {name.replace("_fsdp_wrapped_module.", ""): value for name, value in named.items()}


def assert_named(reports: list[dict[str, Any]], case: str, error: str, *parts: str) -> None:
    """Every rank is told at once, in one sentence; nobody is left waiting."""
    for report in reports:
        message = report[case]["error"]
        assert message.startswith(f"{error}: "), message
        assert all(part in message for part in parts), message
        assert report[case]["result"] is None


def factors(*modules: str, of: str = "ABE") -> set[str]:
    return {f"{module}.lora_{factor}.default" for module in modules for factor in of}
