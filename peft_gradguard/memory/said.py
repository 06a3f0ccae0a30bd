"""What was said of one allocator's training: each skipped name once, each warning once."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from ..log import said_level, say
from ..model.parameters import EXCLUDED, INSIDE_MODULES_TO_SAVE

if TYPE_CHECKING:
    from ..model.parameters import SkipReason

LEFT_OUT_OF: dict[SkipReason, str] = {INSIDE_MODULES_TO_SAVE: "ranking", EXCLUDED: "scoring and ranking"}
"""What a skipped parameter is left out of; for reasons that are not named here, scoring."""


class Said:
    """The names and topics that were spoken of, for one allocator."""

    def __init__(self, adapter: str) -> None:
        self.patterns: set[str] = set()
        """The patterns of ``exclude`` that were looked at for whether they match anything."""
        self._adapter = adapter
        self._names: set[str] = set()
        self._topics: set[str] = set()

    def skip(self, name: str, reason: SkipReason, step: int | None) -> None:
        """Log that a parameter is left out; only the first time for each name."""
        if name in self._names:
            return
        self._names.add(name)
        say(
            said_level(),
            "%s is left out of AdaLoRA's %s: %s (adapter %r, step %s). It is said once for each parameter.",
            name,
            LEFT_OUT_OF.get(reason, "scoring"),
            reason,
            self._adapter,
            "unknown" if step is None else step,
            extra={"parameter": name, "reason": reason, "adapter": self._adapter, "step": step},
        )

    def skips(self, reasons: dict[str, SkipReason | None], step: int | None) -> None:
        """Log what is left out, where a name has a reason."""
        for name, reason in reasons.items():
            if reason is not None:
                self.skip(name, reason, step)

    def warn_once(self, topic: str, message: str, *args: Any) -> None:
        """Log a warning about the training as a whole; only the first time for each topic."""
        if topic not in self._topics:
            self._topics.add(topic)
            say(said_level(), message, *args)
