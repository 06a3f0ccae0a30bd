"""Marks of tests that need what not every release of torch or transformers has: there they are skipped, with why."""

from __future__ import annotations

import pytest
import torch
import transformers

HAS_OPTIMIZER_STEP = hasattr(transformers.TrainerCallback, "on_optimizer_step")
SCORES_TOGETHER = hasattr(torch.Tensor, "_use_count")
"""Torch before 2.4 does not tell who holds a tensor: there PEFT's own code scores."""
NO_OPTIMIZER_STEP = "this transformers has no event on_optimizer_step (before 4.44)"

optimizer_step_event = pytest.mark.skipif(not HAS_OPTIMIZER_STEP, reason=NO_OPTIMIZER_STEP)
grad_scaler = pytest.mark.skipif(
    not hasattr(torch.amp, "GradScaler"), reason="torch before 2.3 has no GradScaler for the CPU"
)
hook_after_accumulation = pytest.mark.skipif(
    not hasattr(torch.Tensor, "register_post_accumulate_grad_hook"),
    reason="torch before 2.1 has no hook after a gradient is accumulated",
)
dynamo = pytest.mark.skipif(
    not hasattr(torch, "compiler"), reason="torch before 2.1 compiles nothing with every Python that it has"
)


def _ranks_in_half() -> bool:
    try:
        torch.zeros(2, dtype=torch.float16).kthvalue(1)
    except RuntimeError:
        return False
    return True


kthvalue_in_half = pytest.mark.skipif(not _ranks_in_half(), reason="this torch has no kthvalue in float16 on the CPU")
