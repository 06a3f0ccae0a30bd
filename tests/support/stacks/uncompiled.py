"""DeepSpeed without its compiled operators."""

from __future__ import annotations


def leave_out_shared_memory() -> None:
    """Keep DeepSpeed from compiling its collectives over shared memory at the start: gloo's do as well.

    It takes minutes, and where a time limit ends it, the lock file that is left stops every later start on the machine.
    """
    import deepspeed.ops

    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
