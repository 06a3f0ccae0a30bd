"""``AdaLoraCallback``. The test file that imports it is skipped where transformers is too old for it."""

from __future__ import annotations

import pytest
from needs import HAS_OPTIMIZER_STEP, NO_OPTIMIZER_STEP

if not HAS_OPTIMIZER_STEP:
    pytest.skip(NO_OPTIMIZER_STEP, allow_module_level=True)

from peft_gradguard.integrations.transformers import AdaLoraCallback

__all__ = ["AdaLoraCallback"]
