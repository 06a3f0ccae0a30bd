"""Runs of parameters whose scores are computed at once."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import nn

from peft_gradguard.model.parameters import AdaLoraParameter
from peft_gradguard.speed import together

if TYPE_CHECKING:
    import pytest


def test_runs_of_parameters_stay_below_their_size(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(together, "CHUNK", 6)
    sizes = (3, 3, 1, 7, 1, 4, 5, 12, 1)
    listed = [AdaLoraParameter("", nn.Parameter(torch.empty(size)), "", "E") for size in sizes]
    runs = [[p.parameter.numel() for p in run] for run in together._chunks(listed)]
    assert runs == [[3, 3], [1], [7], [1, 4], [5], [12], [1]]
