"""The guard against an independent model of its rules, in whole random trainings: equal bit for bit at every step."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from trainings import Run, Training, trainings

pytestmark = pytest.mark.filterwarnings("ignore:Adapter name .* should not be contained in the prefix")


@given(trainings())
def test_guard_and_oracle_agree(training: Training) -> None:
    Run(training).train()


@pytest.mark.peft
@settings(max_examples=30)
@given(trainings())
def test_guard_and_oracle_agree_on_every_release(training: Training) -> None:
    Run(training).train()
