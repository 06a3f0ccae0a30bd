"""What an allocator knows, as tensors of the same names and shapes at each step, and back again.

`torch.distributed.checkpoint` reads into tensors that are there already, so nothing may come or go with a step: what
has no scores yet has zeros, and a flag beside it.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any, NamedTuple

import torch

from ..errors import some_of
from ..late.order import Order
from ..memory.counts import Count
from ..memory.memory import Memory, known_memory
from ..model.marks import is_dtensor, whole_shape
from ..model.parameters import energies, whole_triplets
from ..model.pattern import budget_name, pattern_by_full_name
from ..model.walk import adalora_parameters
from ..rules.call import memory_for

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

    from peft.tuners.adalora import AdaLoraModel

    from ..model.parameters import AdaLoraParameter, Triplet

FORMAT = 1
VERSION = "format"
SCORES = ("ipt", "exp_avg_ipt", "exp_avg_unc")
SCHEDULE = ("init_r", "target_r", "tinit", "tfinal", "total_step", "deltaT", "beta1", "beta2")
ORDERS = list(Order)
NOWHERE = -1
"""Stands for a step that is not known."""
NO_PATTERN, FULL_NAMES, SHORT_NAMES = range(3)
"""How the pattern names its modules: ``save_pretrained`` cuts the adapter's name out."""

State = dict[str, torch.Tensor]


def take(tuners: Sequence[AdaLoraModel]) -> State:
    """Return copies of all that the allocators of these models know."""
    with torch.device("cpu"):
        state = {VERSION: torch.tensor([FORMAT])}
        for number, tuner in enumerate(tuners):
            state.update({f"{number}.{name}": tensor for name, tensor in _Allocator(tuner).take().items()})
    return state


def put_back(tuners: Sequence[AdaLoraModel], state: Mapping[str, torch.Tensor]) -> None:
    """Put a state back into the allocators of these models; ``ValueError``, and nothing done, where it is another's."""
    _refuse_other_formats(state)
    _refuse_other_models(take(tuners), state)
    allocators = [_Allocator(tuner) for tuner in tuners]
    parts = [_part(state, f"{number}.") for number in range(len(tuners))]
    for allocator, part in zip(allocators, parts, strict=True):
        allocator.refuse_others(part)
    for allocator, part in zip(allocators, parts, strict=True):
        allocator.put_back(part)


class _Allocator:
    """An allocator with its model's parameters, in the model's order."""

    def __init__(self, tuner: AdaLoraModel) -> None:
        self.tuner = tuner
        self.allocator: Any = tuner.rankallocator
        self.adapter: str = self.allocator.adapter_name
        self.config: Any = tuner.peft_config[self.adapter]
        self.parameters = adalora_parameters(tuner.model, self.adapter)
        self.triplets = whole_triplets(self.parameters)

    def take(self) -> State:
        """Return the state of this allocator."""
        self._refuse_pieces()
        counts = self._counts()
        pattern = self._pattern()
        counted = set(self.allocator.name_set)
        scored = self.allocator.exp_avg_ipt
        state = {
            "schedule": _numbers(getattr(self.config, name) for name in SCHEDULE),
            "budget": torch.tensor([self.allocator.init_bgt, self.allocator.target_bgt]),
            "progress": torch.tensor([counts.step, counts.skipped, counts.order, self._names_of_pattern()]),
            "scored": torch.tensor([p.name in scored for p in self.parameters], dtype=torch.bool),
            "counts": torch.tensor([counts.of(p.name) for p in self.parameters]).reshape(-1, 3),
            "behind": _numbers(counts.behind.get(p.name) for p in self.parameters),
            "counted": torch.tensor([budget_name(t) in counted for t in self.triplets], dtype=torch.bool),
            "named": torch.tensor([t.E.name in pattern for t in self.triplets], dtype=torch.bool),
            "importance": _numbers(counts.importance.get(t.E.module) for t in self.triplets),
        }
        for parameter in self.parameters:
            shape = whole_shape(parameter.parameter)
            for kind in SCORES:
                score = getattr(self.allocator, kind).get(parameter.name)
                missing = torch.zeros(shape, dtype=parameter.parameter.dtype)
                state[f"{kind}.{parameter.name}"] = missing if score is None else _copy(score)
            if _is_whole(parameter):
                state[f"weight.{parameter.name}"] = _copy(parameter.parameter)
        for energy in energies(self.parameters):
            keep = pattern.get(energy.name, [True] * whole_shape(energy.parameter)[0])
            state[f"kept.{energy.name}"] = torch.tensor(keep, dtype=torch.bool)
        return state

    def refuse_others(self, state: State) -> None:
        """Raise where the state is one of another schedule, or not to be understood."""
        here = _numbers(getattr(self.config, name) for name in SCHEDULE).tolist()
        there = state["schedule"].tolist()
        differences = [
            f"{name} is {_plain(was)} in the state and {_plain(now)} here"
            for name, was, now in zip(SCHEDULE, there, here, strict=True)
            if was != now and not (math.isnan(was) and math.isnan(now))
        ]
        if differences:
            raise ValueError(
                f"This state of AdaLoRA's adapter {self.adapter!r} has another schedule: {'; '.join(differences)}."
            )
        order = state["progress"].tolist()[2]
        if order not in range(len(ORDERS)):
            raise ValueError(f"This peft_gradguard does not know the order of calls {order} that is in the state.")

    def put_back(self, state: State) -> None:
        """Put the state of this allocator back."""
        allocator, adapter = self.allocator, self.adapter
        scored = [p for p, has in zip(self.parameters, state["scored"].tolist(), strict=True) if has]
        for kind in SCORES:
            scores = {p.name: state[f"{kind}.{p.name}"].to(device=_device_of(p), copy=True) for p in scored}
            setattr(allocator, kind, scores)
        with torch.no_grad():
            for parameter in self.parameters:
                if _is_whole(parameter):
                    parameter.parameter.copy_(state[f"weight.{parameter.name}"])
        allocator.init_bgt, allocator.target_bgt = state["budget"].tolist()
        allocator.name_set = sorted(map(budget_name, _those(self.triplets, state["counted"])))
        last, skipped, order, names = state["progress"].tolist()
        step = _step(last)
        self.config.rank_pattern = (
            None
            if names == NO_PATTERN
            else {
                t.E.name if names == FULL_NAMES else t.E.name.replace(f".{adapter}", ""): state[
                    f"kept.{t.E.name}"
                ].tolist()
                for t in _those(self.triplets, state["named"])
            }
        )
        memory = memory_for(allocator)
        memory.called = memory.called or step is not None
        memory.loaded = memory.other_ranks = False
        memory.seen.came_with = None
        memory.late.take_up(ORDERS[order], self.parameters)
        memory.counts.step = step
        memory.counts.skipped = skipped
        memory.counts.importance = {
            t.E.module: value
            for t, value in zip(self.triplets, state["importance"].tolist(), strict=True)
            if not math.isnan(value)
        }
        memory.counts.take_up(
            {
                p.name: Count(scored=often, first=_step(first), last=_step(last))
                for p, (often, first, last) in zip(self.parameters, state["counts"].tolist(), strict=True)
                if often
            },
            {
                p.name: value
                for p, value in zip(self.parameters, state["behind"].tolist(), strict=True)
                if not math.isnan(value)
            },
            allocator.exp_avg_ipt,
        )

    def _refuse_pieces(self) -> None:
        piece = next((p.name for p in self.parameters if not whole_shape(p.parameter)), None)
        if piece is not None or not self.parameters:
            raise ValueError(
                "The state of AdaLoRA's allocator cannot be saved or put back here: FSDP has only flat pieces of "
                f"{piece or 'the parameters'}. Do it inside of FSDP.summon_full_params(model)."
            )

    def _counts(self) -> _Counts:
        memory = known_memory(self.allocator) or Memory(self.adapter)
        counts = memory.counts
        step = NOWHERE if counts.step is None else counts.step
        behind = counts.scored_of([p.name for p in self.parameters])
        order = ORDERS.index(memory.late.order)
        return _Counts(step, counts.skipped, order, counts.of_each(), behind, counts.importance)

    def _pattern(self) -> dict[str, list[bool]]:
        those = energies(self.parameters)
        named = dict(pattern_by_full_name(those, self.config.rank_pattern or {}, self.adapter))
        # One that came with the configuration of another training may have other lengths.
        return {p.name: named[p.name] for p in those if len(named.get(p.name, ())) == whole_shape(p.parameter)[0]}

    def _names_of_pattern(self) -> int:
        if self.config.rank_pattern is None:
            return NO_PATTERN
        full = {p.name for p in self.parameters}
        return FULL_NAMES if all(name in full for name in self.config.rank_pattern) else SHORT_NAMES


class _Counts(NamedTuple):
    """What the guard has counted for one allocator."""

    step: int
    skipped: int
    order: int
    each: Mapping[str, Count]
    behind: Mapping[str, float]
    importance: Mapping[str, float]

    def of(self, name: str) -> tuple[int, int, int]:
        """Return how often the parameter was scored, and the first and the last step."""
        count = self.each.get(name, Count())
        first, last = (NOWHERE if step is None else step for step in (count.first, count.last))
        return count.scored, first, last


def _refuse_other_formats(state: Mapping[str, torch.Tensor]) -> None:
    wrong = next((name for name, value in state.items() if not isinstance(value, torch.Tensor)), None)
    if wrong is not None or VERSION not in state:
        raise ValueError(
            "This is no state of an AllocatorState: "
            + (f"{wrong!r} is no tensor." if wrong is not None else f"it has no entry {VERSION!r}.")
        )
    found = state[VERSION].tolist()
    if found != [FORMAT]:
        raise ValueError(
            f"This state of AdaLoRA's allocator has format {found}, and this peft_gradguard knows format [{FORMAT}]: "
            "use the release that has written it."
        )


def _refuse_other_models(here: State, there: Mapping[str, torch.Tensor]) -> None:
    missing, extra = [repr(k) for k in here if k not in there], [repr(k) for k in there if k not in here]
    if missing or extra:
        only = [
            f"{side} has {some_of(names)}"
            for side, names in (("only this model", missing), ("only the state", extra))
            if names
        ]
        raise ValueError(f"This is the state of another model or adapter: {', and '.join(only)}.")
    for name, tensor in here.items():
        other = there[name]
        if other.shape != tensor.shape:
            raise ValueError(
                f"This is the state of another model: {name!r} has the shape {tuple(other.shape)} in it, and "
                f"{tuple(tensor.shape)} here."
            )
        if other.dtype != tensor.dtype:
            raise ValueError(
                f"This is the state of another model: {name!r} is {other.dtype} in it, and {tensor.dtype} here."
            )


def _part(state: Mapping[str, torch.Tensor], prefix: str) -> State:
    return {name.removeprefix(prefix): tensor for name, tensor in state.items() if name.startswith(prefix)}


def _those(every: Iterable[Triplet], wanted: torch.Tensor) -> list[Triplet]:
    return [triplet for triplet, is_wanted in zip(every, wanted.tolist(), strict=True) if is_wanted]


def _is_whole(parameter: AdaLoraParameter) -> bool:
    """Say whether the weights are here; stacks that spread them keep all their ranks in checkpoints of their own."""
    return parameter.parameter.dim() == 2 and not is_dtensor(parameter.parameter)


def _device_of(parameter: AdaLoraParameter) -> torch.device:
    return parameter.parameter.device


def _copy(tensor: torch.Tensor) -> torch.Tensor:
    if is_dtensor(tensor):
        raise ValueError("The scores of AdaLoRA's allocator are shards (FSDP2 without the guard) and cannot be saved.")
    return tensor.detach().to("cpu", copy=True, memory_format=torch.contiguous_format)


def _numbers(values: Iterable[float | None]) -> torch.Tensor:
    return torch.tensor([math.nan if value is None else float(value) for value in values], dtype=torch.float64)


def _plain(value: float) -> str:
    return "not set" if math.isnan(value) else f"{value:g}"


def _step(step: int) -> int | None:
    return None if step == NOWHERE else step
