"""The allocator's state in the checkpoints of a ``Trainer``: one more file in each folder, written and read again."""

from __future__ import annotations

import os
import sys
import weakref
from typing import TYPE_CHECKING, Any

import wrapt
from safetensors.torch import load_file, save_file
from transformers import TrainerState
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from ..checkpoints.snapshot import put_back, take
from ..log import said_level, say

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from peft.tuners.adalora import AdaLoraModel

FILE = "adalora_state.safetensors"

LOST = (
    "AdaLoRA's scores and counts begin anew at step %d, so that other ranks may be left than without the interruption."
)

_writers: dict[int, Callable[[str], None]] = {}


def write_with(state: TrainerState, write: Callable[[str], None]) -> None:
    """Let ``write(folder)`` be called for each checkpoint of the training with this state. It must hold no model."""
    if id(state) not in _writers:
        weakref.finalize(state, _writers.pop, id(state), None).atexit = False
    _writers[id(state)] = write


def write(folder: str, tuners: Sequence[AdaLoraModel]) -> None:
    """Write the state of these models' allocators. One that cannot be written is said, and stops no training."""
    path = os.path.join(folder, FILE)
    try:
        save_file(take(tuners), f"{path}.unfinished")
        # All at once: a file half written is never taken for a whole one.
        os.replace(f"{path}.unfinished", path)
    except Exception as error:
        say(
            said_level(),
            "peft_gradguard's AdaLoraCallback could not write %s (%s). A training that is resumed from this checkpoint "
            "begins AdaLoRA's scores anew.",
            path,
            error,
        )


def read(folder: str, tuners: Sequence[AdaLoraModel], step: int) -> None:
    """Put the state beside a checkpoint back, or say what is lost without it."""
    path = os.path.join(folder, FILE)
    if not os.path.exists(path):
        say(
            said_level(),
            "peft_gradguard's AdaLoraCallback finds no %s in %s: the checkpoint was saved without it. " + LOST,
            FILE,
            folder,
            step,
        )
        return
    try:
        put_back(tuners, load_file(path))
    except Exception as error:
        say(
            said_level(),
            "peft_gradguard's AdaLoraCallback could not use %s. %s " + LOST,
            path,
            error,
            step,
        )


def resumed_from() -> str | None:
    """Return the checkpoint that the training which is about to begin goes on from; the Trainer tells no callback."""
    frame = sys._getframe(1)
    while frame is not None:
        folder = frame.f_locals.get("resume_from_checkpoint")
        if isinstance(folder, (str, os.PathLike)) and os.path.isdir(folder):
            return os.fspath(folder)
        frame = frame.f_back  # type: ignore[assignment]
    return None


def _save_to_json(save: Callable[..., Any], state: TrainerState, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    writer = _writers.get(id(state))
    path = args[0] if args else kwargs.get("json_path", "")
    folder = os.path.dirname(path)
    if writer is not None and os.path.basename(folder).startswith(f"{PREFIX_CHECKPOINT_DIR}-"):
        writer(folder)
    return save(*args, **kwargs)


# ``trainer_state.json`` is the last file of a checkpoint, and says that it is whole. Callbacks are told only after it:
# a process that is killed in between would leave a checkpoint that seems whole and lacks ours.
wrapt.wrap_function_wrapper(TrainerState, "save_to_json", _save_to_json)
