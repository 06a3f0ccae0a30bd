"""A runtime guard for HuggingFace PEFT's AdaLoRA: parameters without a gradient are left out instead of crashing it.

``import peft_gradguard`` switches it on, before or after ``import peft``, unless ``PEFT_GRADGUARD`` says otherwise.
The import loads neither torch nor PEFT.
"""

from __future__ import annotations

from .errors import NoGradientError
from .hooks import disable, disabled, enable, is_enabled
from .settings import read_switch

__version__ = "0.1.0"

__all__ = ["NoGradientError", "__version__", "disable", "disabled", "enable", "is_enabled"]

if read_switch() is not False:
    enable()
