"""Runs on a bare machine: with the torch, PEFT, transformers, wrapt and pytest that are there; nothing is installed."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

DEVICE = os.environ.get("GPU_TESTS_DEVICE", "cuda")
"""``GPU_TESTS_DEVICE=cpu`` tries the tests themselves where there is no GPU; it says nothing of one."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if Path(__file__).parent in item.path.parents:
            item.add_marker(pytest.mark.gpu)
            if DEVICE == "cuda" and not torch.cuda.is_available():
                item.add_marker(pytest.mark.skip(reason="there is no CUDA here"))
            elif DEVICE != "cuda" and item.get_closest_marker("cuda_only"):
                item.add_marker(pytest.mark.skip(reason="only on CUDA"))


@pytest.fixture
def device() -> torch.device:
    return torch.device(DEVICE)
