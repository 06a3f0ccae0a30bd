"""How far the scores that ``speed/`` computes are known to be PEFT's, for one allocator."""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

    Group = tuple[torch.device, torch.dtype, float, float]
    """Device, data type, ``beta1`` and ``beta2`` of what is computed and compared together."""


class Trust:
    """What was seen of PEFT's scores and those computed here."""

    def __init__(self) -> None:
        self.agreed: Counter[Group] = Counter()
        """The steps in which both ways gave the same."""
        self.objection: str | None = None
        """Why this allocator's scores are left to PEFT for good; None where they are not."""
        self.switch_was_read = False
        self.said = False
        self.plans: dict[tuple[object, ...], Any] = {}
        """By device and data type, where the scores lie that are computed together (``speed/flat.py``). No tensors."""
