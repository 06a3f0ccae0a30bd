"""What PEFT reads from the schedule in an ``AdaLoraConfig``."""

from __future__ import annotations

from typing import Any


def final_step(config: Any) -> int:
    """Return the step at which the final ranks are settled: ``total_step - tfinal`` (AdaLoRA paper, section 3.3)."""
    step: int = config.total_step - config.tfinal
    return step
