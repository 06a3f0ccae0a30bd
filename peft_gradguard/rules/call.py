"""One call of an allocator's method: made once at the door (``guard.py``), and handed to everything."""

from __future__ import annotations

import operator
import threading
from collections.abc import Mapping
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING, Any

from ..memory.memory import memory_of
from ..model.exclusions import mark_excluded
from ..model.schedule import final_step
from ..model.view import ModelView
from ..model.walk import adalora_parameters
from ..stacks.stack import whole
from ..wrapper import METHODS, is_undisturbed

if TYPE_CHECKING:
    from collections.abc import Iterator

    import torch
    from peft.tuners.adalora import RankAllocator

    from ..errors import NoGradientError
    from ..memory.memory import Memory
    from ..model.gradients import StepGradients
    from ..model.parameters import AdaLoraParameter, Triplet


class AllocatorCall:
    """An allocator, the guard's memory of it, the model as PEFT is shown it, and the step."""

    __slots__ = (
        "allocator",
        "any_usable",
        "gradients",
        "is_pefts_alone",
        "memory",
        "nothing_to_score",
        "ranked",
        "scoring_is_due",
        "step",
        "usable",
        "view",
        "was_looked_at",
    )

    def __init__(self, allocator: RankAllocator, model: torch.nn.Module, step: Any) -> None:
        """``step``: the ``global_step`` of ``update_and_allocate``, in whatever type it was given; None if unknown."""
        config = allocator.peft_config
        self.allocator = allocator
        self.memory: Memory = memory_of(allocator)
        self.step = plain_step(step)
        """The step; None for a method that was called by itself."""
        self.scoring_is_due = step is not None and bool(step < final_step(config))
        """Whether ``RankAllocator.update_and_allocate`` scores at this step: before the finalising one."""
        self.is_pefts_alone = all(is_undisturbed(allocator, name) for name in METHODS)
        """Whether nobody else's code takes part in the call: no subclass, no other wrapper."""
        self.view = view_of(model, allocator.adapter_name, others=not self.is_pefts_alone)
        self.was_looked_at = False
        """Whether what is wrong at the door was looked for."""
        self.any_usable: bool | None = None
        """Whether there are usable gradients in the scoring under way; None outside of one."""
        self.usable: list[AdaLoraParameter] = []
        """What the last scoring of this call had to score."""
        self.gradients: StepGradients | None = None
        """What the last scoring of this call has found, until somebody takes it."""
        self.nothing_to_score: NoGradientError | None = None
        """Why the scoring under way scores nothing, where somebody else's code can do without, and PEFT's cannot."""
        self.ranked: list[Triplet] | None = None
        """What was last found to be ranked in this call."""

    @property
    def parameters(self) -> list[AdaLoraParameter]:
        """Every AdaLoRA parameter of the adapter, shown to PEFT or not."""
        return self.view.adalora_parameters

    @property
    def scored(self) -> Mapping[str, torch.Tensor]:
        """PEFT's scores, by the parameters' names; none where a subclass keeps its own elsewhere."""
        return scores_of(self.allocator)

    @property
    def at(self) -> str:
        """Which call it is, in words."""
        return f"(adapter {self.memory.adapter!r}, step {'unknown' if self.step is None else self.step})"


_under_way: dict[tuple[int, int], AllocatorCall] = {}


@contextmanager
def under_way(call: AllocatorCall) -> Iterator[None]:
    """Let the methods that PEFT calls meanwhile, in this thread, find this call."""
    key = _key(call.allocator)
    before = _under_way.get(key)
    _under_way[key] = call
    try:
        yield
    finally:
        call.view.release()
        if before is None:
            del _under_way[key]
        else:
            _under_way[key] = before


def call_under_way(allocator: RankAllocator) -> AllocatorCall | None:
    """Return this allocator's ``update_and_allocate`` in this thread, or None outside of one."""
    return _under_way.get(_key(allocator))


@contextmanager
def call_for(allocator: RankAllocator, model: Any) -> Iterator[AllocatorCall]:
    """Give the call under way if this is its model, else one of its own, as where users call a method directly."""
    call = call_under_way(allocator)
    if call is not None and model is call.view:
        yield call
        return
    call = AllocatorCall(allocator, model, call.step if call is not None else None)
    with under_way(call):
        yield call


def memory_for(allocator: RankAllocator) -> Memory:
    """Return the memory of an allocator outside of a call, as where its adapter is loaded."""
    return memory_of(allocator)


def view_of(model: Any, adapter: str, others: bool) -> ModelView:
    """Walk the model once, and return it as a view that shows all AdaLoRA parameters of the adapter.

    ``others``: whether somebody else's code may look at it. A view that somebody has kept stands for its model.
    """
    model = model.__wrapped__ if type(model) is ModelView else model
    return ModelView(model, mark_excluded(whole(adalora_parameters(model, adapter))), adapter if others else None)


def scores_of(allocator: RankAllocator) -> Mapping[str, torch.Tensor]:
    """Return PEFT's scores (``exp_avg_ipt``), by name; none where a subclass keeps its own elsewhere."""
    scores: Any = getattr(allocator, "exp_avg_ipt", None)
    return scores if isinstance(scores, Mapping) else {}


def plain_step(step: Any) -> int | None:
    """Return a step as an ``int``, whatever integer it is: NumPy's, a tensor that is counted up in place, a float."""
    for number in (operator.index, lambda step: step.item() if hasattr(step, "item") else step):
        # A type of the user's own may raise whatever it likes.
        with suppress(Exception):
            return int(number(step))
    return None


def _key(allocator: RankAllocator) -> tuple[int, int]:
    return id(allocator), threading.get_ident()
