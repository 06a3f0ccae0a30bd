"""A runtime guard for HuggingFace PEFT's AdaLoRA: parameters without a gradient are left out instead of crashing it.

``import peft_gradguard`` switches it on, before or after ``import peft``, unless ``PEFT_GRADGUARD`` says otherwise.
The import loads neither torch nor PEFT.

Errors: ``NoGradientError``, ``ScheduleError``, ``TrainingStackError``. What ``report`` returns: ``Report``, with
``AdapterReport``, ``ModuleReport``, ``ParameterReport``, ``HistoryPoint``. What ``exclude`` returns: ``Exclusion``. To
stop a training and go on with it: ``AllocatorState``.

Public is what stands here, ``peft_gradguard.integrations.transformers.AdaLoraCallback``, the command
``peft-gradguard`` and the folder ``autoload``. The other modules are private: they may change in any release.
"""

from __future__ import annotations

import os
import sys

from .checkpoints.state import AllocatorState as AllocatorState
from .errors import NoGradientError as NoGradientError
from .errors import ScheduleError as ScheduleError
from .errors import TrainingStackError as TrainingStackError
from .memory.counts import HistoryPoint as HistoryPoint
from .memory.counts import keep_history
from .model.exclusions import Exclusion as Exclusion
from .model.exclusions import exclude
from .report.facts import AdapterReport as AdapterReport
from .report.facts import ModuleReport as ModuleReport
from .report.facts import ParameterReport as ParameterReport
from .report.report import Report as Report  # noqa: TC001 - for the user
from .settings import read_switch
from .switch import hint_at_exit

__version__ = "0.2.0"

# The classes are public too. They are not in this list, by which help() would show all that they inherit.
__all__ = ["__version__", "disable", "disabled", "enable", "exclude", "is_enabled", "keep_history", "report"]


def report(model: object) -> Report:
    """Say what trains, what is skipped and where the ranks went: before training (the audit), during it and after.

    ``model``: a ``PeftModel``, an ``AdaLoraModel``, or whatever holds one (DDP, ``torch.compile``, accelerate,
    DeepSpeed, FSDP, a ``Trainer``). ``print`` what is returned, or see ``Report``. Nothing is changed, and no other
    process is needed. Steps are counted while the guard is on. Raises ``ValueError`` where there is no AdaLoRA model.
    """
    # torch must not be loaded before it is needed.
    from .report.audit import build

    is_enabled()
    return build(model)


def _is_our_command() -> bool:
    """Say whether this is ``peft-gradguard`` or ``python -m peft_gradguard``; an argument may be named so too."""
    if sys.argv[:1] != ["-m"]:
        return bool(sys.argv) and os.path.basename(sys.argv[0]) in ("peft-gradguard", "peft-gradguard.exe")
    module = sys.orig_argv[len(sys.orig_argv) - len(sys.argv)]
    return module == "peft_gradguard" or (module.startswith("-") and module.endswith("mpeft_gradguard"))


try:
    from . import install as hooks  # noqa: F401 - the name of 0.1.0
    from .install import disable, disabled, enable, is_enabled
except Exception:
    # wrapt is missing or broken. Our own command is there to say so in words; every other import fails here.
    if not _is_our_command():
        raise
else:
    if read_switch() is not False:
        enable()
    else:
        hint_at_exit()
