"""From the environment to settings: the one place that reads ``PEFT_GRADGUARD`` and the variables named after it.

Imports nothing that an interpreter has not already loaded, because start-up code uses it.
"""

from __future__ import annotations

import os
import sys
from contextlib import suppress

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Mapping

SWITCH = "PEFT_GRADGUARD"
EXCLUDE = "PEFT_GRADGUARD_EXCLUDE"
FUSED = "PEFT_GRADGUARD_FUSED"
ON = ("1", "true", "yes", "on")
OFF = ("0", "false", "no", "off")


def read_switch(environ: Mapping[str, str] = os.environ) -> bool | None:
    """Return what ``PEFT_GRADGUARD`` asks for: True, False, or None where the default applies.

    Case and surrounding blanks do not matter; an empty value counts as unset. A value that is neither on nor off gives
    a ``RuntimeWarning`` that names the accepted ones, and None.
    """
    return _read(SWITCH, "guard on", "guard off", environ)


def read_fused(environ: Mapping[str, str] = os.environ) -> bool:
    """Say whether the guard may compute PEFT's scores itself (``speed/``): yes, unless ``PEFT_GRADGUARD_FUSED=0``."""
    return _read(FUSED, "score all parameters at once", "leave scoring to PEFT", environ) is not False


def read_exclusions(environ: Mapping[str, str] = os.environ) -> tuple[str, ...]:
    """Return the patterns in ``PEFT_GRADGUARD_EXCLUDE``, which commas separate; blanks around them do not matter."""
    patterns = environ.get(EXCLUDE)
    return tuple(pattern for pattern in map(str.strip, patterns.split(",")) if pattern) if patterns else ()


def _read(name: str, on: str, off: str, environ: Mapping[str, str]) -> bool | None:
    value = environ.get(name, "").strip().lower()
    if value in ON:
        return True
    if value in OFF:
        return False
    if value and not (name == SWITCH and environ[name] == _warned_of_at_start()):
        warn(
            f"{name}={environ[name]!r} is not understood and is ignored: set it to one of "
            f"{', '.join(ON)} ({on}) or {', '.join(OFF)} ({off}), in any case."
        )
    return None


def _warned_of_at_start() -> str | None:
    """Return the value that start-up code has warned of already."""
    warned_of: str | None = getattr(sys.modules.get("_peft_gradguard_start"), "warned_of", None)
    return warned_of


def warn(message: str) -> None:
    """Give a ``RuntimeWarning``; where warnings are errors (``python -W error``), write to stderr instead.

    The guard runs inside somebody else's start-up: it may speak there, but must not stop the program.
    """
    import warnings

    try:
        warnings.warn(message, RuntimeWarning, stacklevel=4)
    except Exception:
        # It may be an error here, or somebody's way to show it fails; and stderr may be closed.
        with suppress(Exception):
            print(f"peft_gradguard: {message}", file=sys.stderr)
