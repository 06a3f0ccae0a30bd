"""What was said of one allocator's training: each skipped name once, each warning once."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Any

from ..log import logger, said_level, say
from ..model.parameters import EXCLUDED, FROZEN, INSIDE_MODULES_TO_SAVE, NO_GRADIENT, NON_FINITE, WARMING_UP
from .fold import fold

if TYPE_CHECKING:
    from collections.abc import Mapping

    from ..model.parameters import SkipReason

IN_FULL = 24
"""So many names of one record are given in full, one a line; more are folded."""

LEFT_OUT_OF: dict[SkipReason, str] = {
    INSIDE_MODULES_TO_SAVE: "ranking",
    WARMING_UP: "ranking",
    EXCLUDED: "scoring and ranking",
}
"""What a skipped parameter is left out of; for reasons that are not named here, scoring."""

FOLLOWS: dict[SkipReason, str] = {
    FROZEN: "Modules whose lora_E, or both lora_A and lora_B, cannot train keep all their ranks.",
    NO_GRADIENT: "Nothing reached them. A module whose lora_E never gets a gradient keeps all its ranks.",
    NON_FINITE: "It has NaN or inf, which would spoil the scores for good. They keep the scores they have.",
    EXCLUDED: "You asked for it (exclude, PEFT_GRADGUARD_EXCLUDE). They train on, and keep all their ranks.",
    INSIDE_MODULES_TO_SAVE: "PEFT saves such modules whole, so they keep all their ranks.",
    WARMING_UP: "Their modules came late, and keep all ranks until lora_E was scored tinit times, as elsewhere.",
}
"""What each reason means for the parameters."""

HINT = (
    " print(peft_gradguard.report(model)) tells more. To see errors only: "
    'logging.getLogger("peft_gradguard").setLevel(logging.ERROR).'
)


class Said:
    """The names and topics that were spoken of, for one allocator."""

    def __init__(self, adapter: str) -> None:
        self.patterns: set[str] = set()
        """The patterns of ``exclude`` that were looked at for whether they match anything."""
        self._adapter = adapter
        self._names: set[str] = set()
        self._topics: set[str] = set()

    def skips(self, reasons: Mapping[str, SkipReason | None], step: int | None) -> None:
        """Log what is left out, where a name has a reason: one record for each reason, and each name only once."""
        fresh: dict[SkipReason, list[str]] = {}
        for name, reason in reasons.items():
            if reason is not None and name not in self._names:
                fresh.setdefault(reason, []).append(name)
        for reason, names in fresh.items():
            hint = "" if self._names else HINT
            self._names.update(names)
            self._skip(names, reason, step, hint)

    def warn_once(self, topic: str, message: str, *args: Any) -> None:
        """Log a warning about the training as a whole; only the first time for each topic."""
        if topic not in self._topics:
            self._topics.add(topic)
            say(said_level(), message, *args)

    def _skip(self, names: list[str], reason: SkipReason, step: int | None, hint: str) -> None:
        level = said_level()
        if not logger.isEnabledFor(level):
            return
        told = {"reason": reason, "adapter": self._adapter, "step": step}
        in_full = len(names) <= IN_FULL
        say(
            level,
            "peft_gradguard leaves %d AdaLoRA parameter%s out of %s (adapter %r, step %s): %s. %s%s%s",
            len(names),
            "" if len(names) == 1 else "s",
            LEFT_OUT_OF.get(reason, "scoring"),
            self._adapter,
            "unknown" if step is None else step,
            reason,
            FOLLOWS[reason],
            hint,
            "".join(f"\n  {line}" for line in (names if in_full else fold(names))),
            extra={"parameters": names, **told},
        )
        if not in_full and logger.isEnabledFor(logging.DEBUG):
            for name in names:
                say(logging.DEBUG, "%s is left out: %s.", name, reason, extra={"parameter": name, **told})
