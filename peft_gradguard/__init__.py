"""A runtime guard for HuggingFace PEFT's AdaLoRA: parameters without a gradient are left out instead of crashing it.

``import peft_gradguard`` switches it on, before or after ``import peft``, unless ``PEFT_GRADGUARD`` says otherwise.
The import loads neither torch nor PEFT.
"""

from __future__ import annotations

import os
import sys

from .errors import NoGradientError, TrainingStackError
from .settings import read_switch

__version__ = "0.1.0"

__all__ = ["NoGradientError", "TrainingStackError", "__version__", "disable", "disabled", "enable", "is_enabled"]

try:
    from .hooks import disable, disabled, enable, is_enabled
except Exception:
    # wrapt is missing or broken. Our own command is there to say so in words; every other import fails here.
    if not {"peft_gradguard", "peft-gradguard", "peft-gradguard.exe"} & set(map(os.path.basename, sys.orig_argv)):
        raise
else:
    if read_switch() is not False:
        enable()
