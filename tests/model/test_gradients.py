"""Which gradients are there, and which are zero or not finite."""

from __future__ import annotations

import math

import pytest
import torch
from named import Named
from scenarios import PEFT_VERSION

from peft_gradguard.model.gradients import StepGradients, magnitudes, skip_reason, step_gradients
from peft_gradguard.model.walk import adalora_parameters


@pytest.mark.parametrize(
    ("mark", "reason"), [(None, "no gradient"), ("_hp_mapping", None), ("ds_id", None)], ids=["plain", "ZeRO 1/2", "3"]
)
def test_gradient_that_deepspeed_holds_is_not_missing(mark: str | None, reason: str | None) -> None:
    parameter = torch.nn.Parameter(torch.zeros(1))
    if mark:
        setattr(parameter, mark, None)  # On a rank without its share DeepSpeed leaves None there.
    assert skip_reason(parameter) == reason
    parameter.requires_grad = False
    assert skip_reason(parameter) == "frozen"


def test_zeros_beside_gradients_that_cannot_be_looked_at_prove_nothing() -> None:
    zeros, held = adalora_parameters(Named("q.lora_A.default", "q.lora_E.default"), "default")
    zeros.parameter.grad = torch.zeros(1)
    alone = StepGradients(
        {"q.lora_A.default": "no gradient"}, zeroed=True, came=False, zeros=frozenset({"q.lora_A.default"})
    )
    assert step_gradients([zeros]) == alone
    held.parameter.ds_id = 1
    reasons = {"q.lora_A.default": None, "q.lora_E.default": None}
    beside = StepGradients(reasons, zeroed=False, came=True, zeros=frozenset({"q.lora_A.default"}))
    assert step_gradients([zeros, held]) == beside


@pytest.mark.peft
@pytest.mark.skipif(PEFT_VERSION < (0, 21), reason="no PEFT in it: once is enough")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float64])
def test_magnitudes_neither_overflow_nor_vanish(dtype: torch.dtype) -> None:
    info = torch.finfo(dtype)
    nan, inf = torch.zeros(300, dtype=dtype), torch.zeros(300, dtype=dtype)
    nan[137], inf[299] = float("nan"), -float("inf")
    tensors = [
        torch.full((300,), info.max, dtype=dtype),
        torch.full((3, 4), -info.tiny, dtype=dtype),
        torch.zeros(2, dtype=dtype),
        torch.zeros(0, dtype=dtype),
        nan,
        inf,
        torch.tensor([-3.0, 4.0], dtype=dtype),
        torch.tensor([-3.0], dtype=torch.float32),
    ]
    found = magnitudes(tensors)
    assert found[1] > 0
    assert found[2:4] == [0, 0]
    assert [math.isfinite(value) for value in found] == [True] * 4 + [False] * 2 + [True] * 2
    assert found[6:] == [5, 3]
