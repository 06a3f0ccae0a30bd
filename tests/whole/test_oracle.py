"""The guard against an independent model of its rules, in whole random trainings: equal bit for bit at every step."""

from __future__ import annotations

import gc
import logging
from typing import TYPE_CHECKING

import pytest
from hypothesis import given, settings
from oracle import Schedule
from trainings import Run, Step, Training, trainings

if TYPE_CHECKING:
    from collections.abc import Iterator

pytestmark = pytest.mark.filterwarnings("ignore:Adapter name .* should not be contained in the prefix")


@pytest.fixture(autouse=True, scope="module")
def quiet() -> Iterator[None]:
    """Log nothing, neither in these trainings nor when their allocators go."""
    logger = logging.getLogger("peft_gradguard")
    logger.setLevel(logging.CRITICAL)
    yield
    gc.collect()
    logger.setLevel(logging.NOTSET)


SCHEDULE = Schedule(init_r=1, target_r=0, tinit=0, tfinal=0, total=4, every=1, beta1=0.85, beta2=0.85)

FOUND = {
    # Then too, gradients that came and that no optimizer used are a step left out, and no broken loop.
    "a step left out after an error that the loop has swallowed": Training(
        modules=("a",),
        shapes=((1, 1),),
        schedule=SCHEDULE,
        adapter="default",
        steps=(
            Step(order="late"),
            Step(order="late", unused=((0, "ABE"),)),
            Step(order="late", optimizer_steps=False),
            Step(order="late"),
        ),
    ),
    # No backward is seen of what was frozen at the first late call: by the rule, the second call in a row is an error.
    "a step left out in which only what was frozen before has gradients": Training(
        modules=("a", "ba"),
        shapes=((1, 1), (1, 1)),
        schedule=SCHEDULE,
        adapter="default",
        steps=(
            Step(order="late", freeze=((1, "ABE"),)),
            Step(order="late", freeze=((0, "ABE"),), thaw=((1, "ABE"),), optimizer_steps=False),
            Step(order="late"),
        ),
    ),
}
"""Where guard and oracle have disagreed, in runs of ``make proof``, shrunk by Hypothesis."""


@pytest.mark.parametrize("name", FOUND)
def test_found_disagreement(name: str) -> None:
    Run(FOUND[name]).train()


@given(trainings())
def test_guard_and_oracle_agree(training: Training) -> None:
    Run(training).train()


@pytest.mark.peft
@settings(max_examples=30)
@given(trainings())
def test_guard_and_oracle_agree_on_every_release(training: Training) -> None:
    Run(training).train()
