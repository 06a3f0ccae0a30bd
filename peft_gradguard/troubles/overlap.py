"""The overlap of ``target_modules`` and ``modules_to_save``, which some PEFT releases save but cannot load again."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

import peft

from ..errors import are, some_of
from ..model.parameters import modules_inside_modules_to_save

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from ..rules.call import AllocatorCall

# Measured without the guard: 0.5, 0.6 and 0.7 reload with other logits (5e-5 to 8e-4 apart), 0.13 and 0.15 with an
# error; since 0.16 PEFT no longer targets modules inside modules_to_save.
FIRST_MENDED = (0, 16)


def cannot_reload_overlap(peft_version: str) -> bool:
    """Say whether this PEFT release cannot load an adapter with AdaLoRA layers inside a ``modules_to_save`` copy."""
    numbers = re.match(r"(\d+)\.(\d+)", peft_version)
    return numbers is not None and (int(numbers[1]), int(numbers[2])) < FIRST_MENDED


def warn_of_overlap(call: AllocatorCall) -> None:
    """Warn once per allocator of modules inside ``modules_to_save`` that will not load again."""
    if cannot_reload_overlap(peft.__version__):
        inside = modules_inside_modules_to_save({parameter.module for parameter in call.parameters})
        if inside:
            call.memory.said.warn_once(
                "overlap",
                "These modules are targeted by AdaLoRA and lie inside modules_to_save: %s. Training and saving work, "
                "but PEFT %s cannot load the saved adapter again as it was (wrong logits, or an error). Narrow "
                "target_modules so that it leaves them out, or use PEFT 0.16 or later.",
                ", ".join(sorted(inside)),
                peft.__version__,
            )


def advice_on_overlap(inside: Iterable[str]) -> Iterator[str]:
    """Advise on modules that are targeted and inside ``modules_to_save``."""
    modules = sorted(inside)
    if modules:
        hurts = (
            f"PEFT {peft.__version__} cannot load the saved adapter again as it was"
            if cannot_reload_overlap(peft.__version__)
            else "PEFT saves them whole, so they are never pruned"
        )
        yield (
            f"{some_of(modules)} {are(modules)} targeted by AdaLoRA and inside modules_to_save: {hurts}. "
            "Narrow target_modules so that it leaves them out."
        )
