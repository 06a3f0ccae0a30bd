"""The arithmetic of PEFT's ``update_ipt`` for hundreds of parameters at once, in place, at the speed of memory.

PEFT starts a dozen small tensor operations for each parameter, and puts three new tensors. Here the scores of many
parameters lie one behind the other in three flat tensors, and ten operations serve them all. What the allocator has are
windows on these, each with a storage of its own, so that they are copied, pickled and saved as PEFT's tensors are.

Who keeps one of PEFT's scores sees it unchanged by the next step. So it is here: what anybody else holds, be it by a
reference, a view or an array of numpy, is not written to; the allocator gets new windows instead.
"""

from __future__ import annotations

import sys
import weakref
from functools import cache
from itertools import repeat
from operator import is_
from typing import TYPE_CHECKING, Any

import torch
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils.dlpack import from_dlpack, to_dlpack

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    Scores = dict[str, torch.Tensor]
    Betas = tuple[float, float]
    Waiting = dict[str, torch.nn.Parameter]

CHUNK = 1 << 16
"""The numbers of a run, unless one parameter has more: a quarter of a megabyte of float32, so that what is at work
stays in the cache."""

NEEDED = (
    (torch._C, "_storage_Use_Count"),
    (torch._C._nn, "flatten_dense_tensors"),
    (torch.UntypedStorage, "_new_with_weak_ptr"),
    (torch.Tensor, "_use_count"),
    (torch, "_foreach_copy_"),
)
"""What is used here of torch that it does not promise."""


def is_possible() -> bool:
    """Say whether this torch has all that is needed."""
    return all(hasattr(place, name) for place, name in NEEDED)


class Plan:
    """Where the scores of one device and data type lie. It is checked at each step, and never trusted."""

    def __init__(self) -> None:
        self._runs: list[_Run] = []

    def advance(self, kinds: Sequence[Scores], waiting: Waiting, betas: Betas) -> None:
        """Make the scores of one step, in place. ``kinds``: ``ipt``, ``exp_avg_ipt`` and ``exp_avg_unc``.

        All parameters have scores, are contiguous, and of the same kind as their gradients. A parameter leaves
        ``waiting`` when its scores are made; those whose scores are of another kind stay. What may fail, the
        allocations, comes before any average of a run has changed.
        """
        runs, self._runs = self._runs, []
        with torch.no_grad():
            buffer = _Buffer()
            for run in runs:
                places = [place for place, name in enumerate(run.names) if name in waiting]
                windows = run.windows(kinds, places)
                if windows is None:
                    # What waits of it is laid out anew, from what the allocator has.
                    continue
                self._runs.append(run)
                names = [run.names[place] for place in places]
                if len(names) == len(run.names):
                    _advance(*run.flats(), [waiting[name] for name in names], betas, buffer)
                elif names:
                    _advance_some(*windows, [waiting[name] for name in names], betas)
                for name in names:
                    del waiting[name]
            for names in _runs(waiting, kinds):
                parameters = [waiting[name] for name in names]
                run = _Run(kinds, names, parameters)
                _advance(*run.flats(), parameters, betas, buffer)
                self._runs.append(run)
                for name in names:
                    del waiting[name]


def advanced(
    parameters: Waiting, kinds: Sequence[Scores], betas: Betas
) -> Iterator[tuple[str, torch.Tensor, torch.Tensor, torch.Tensor]]:
    """Yield each name with its new ``ipt``, ``exp_avg_ipt`` and ``exp_avg_unc``; nothing that is there changes."""
    for names in _runs(parameters, kinds):
        weights = [parameters[name] for name in names]
        with torch.no_grad():
            flats = _flats(names, kinds)
            _advance(*flats, weights, betas, _Buffer())
            new = [_windows(flat, weights) for flat in flats]
        yield from zip(names, *new, strict=True)


class _Run:
    """Parameters whose scores lie one behind the other. Holds no tensor: PEFT forgets its scores when it likes."""

    def __init__(self, kinds: Sequence[Scores], names: list[str], parameters: Sequence[torch.Tensor]) -> None:
        self.names = names
        flats = _flats(names, kinds)
        windows = [_windows(flat, parameters) for flat in flats]
        self._dtype, self._device = flats[0].dtype, flats[0].device
        self._flats = [StorageWeakRef(flat.untyped_storage()) for flat in flats]
        self._storages = [[StorageWeakRef(window.untyped_storage()) for window in kind] for kind in windows]
        self._windows = [[weakref.ref(window) for window in kind] for kind in windows]
        for kind, those in zip(kinds, windows, strict=True):
            kind.update(zip(names, those, strict=True))

    def windows(self, kinds: Sequence[Scores], places: Sequence[int]) -> list[list[torch.Tensor]] | None:
        """Return, by kind, the windows at these places; None where one is gone from there, or also somebody else's."""
        names = [self.names[place] for place in places]
        found = []
        for kind, references, storages in zip(kinds, self._windows, self._storages, strict=True):
            windows: list[Any] = [references[place]() for place in places]
            if not all(map(is_, windows, map(kind.get, names, repeat(0)))):
                return None
            if places and _holders(windows, [storages[place].cdata for place in places]) != _holders_of_ours():
                return None
            found.append(windows)
        return found

    def flats(self) -> Iterator[torch.Tensor]:
        """Yield the flat tensors, which live as long as any window does."""
        for reference in self._flats:
            storage = torch.UntypedStorage._new_with_weak_ptr(reference.cdata)
            yield torch.empty(0, dtype=self._dtype, device=self._device).set_(storage)


class _Buffer:
    """Memory for what lies between, the same for all runs of a step."""

    def __init__(self) -> None:
        self._tensor: torch.Tensor | None = None

    def like(self, flat: torch.Tensor) -> torch.Tensor:
        """Return as many numbers, of the same device and data type."""
        if self._tensor is None or len(self._tensor) < len(flat):
            self._tensor = flat.new_empty(max(len(flat), CHUNK))
        return self._tensor[: len(flat)]


def _advance(
    ipt: torch.Tensor,
    average: torch.Tensor,
    uncertainty: torch.Tensor,
    parameters: Sequence[torch.nn.Parameter],
    betas: Betas,
    buffer: _Buffer,
) -> None:
    """Advance flat scores by one step (AdaLoRA paper, equations 8 to 10).

    In PEFT's order and by PEFT's numbers. Each product and each sum is made by itself: a fused multiply-add
    (``alpha=``, ``addcmul``, ``lerp``) rounds otherwise.
    """
    beta1, beta2 = betas
    flatten = torch._C._nn.flatten_dense_tensors
    between = buffer.like(ipt)
    torch.mul(flatten(parameters), flatten([parameter.grad for parameter in parameters]), out=ipt).abs_()
    torch.mul(ipt, 1 - beta1, out=between)
    average.mul_(beta1).add_(between)
    torch.sub(ipt, average, out=between).abs_().mul_(1 - beta2)
    uncertainty.mul_(beta2).add_(between)


def _advance_some(
    ipt: list[torch.Tensor],
    averages: list[torch.Tensor],
    uncertainties: list[torch.Tensor],
    parameters: list[torch.nn.Parameter],
    betas: Betas,
) -> None:
    """Do the same for some windows of a run, where the other parameters rest at this step."""
    beta1, rest1, beta2, rest2 = _factors(betas, parameters[0].dtype)
    between = torch._foreach_mul(parameters, [parameter.grad for parameter in parameters])  # type: ignore[arg-type]
    torch._foreach_abs_(between)
    torch._foreach_copy_(ipt, between)
    torch._foreach_mul_(between, rest1)
    torch._foreach_mul_(averages, beta1)
    torch._foreach_add_(averages, between)
    torch._foreach_copy_(between, ipt)
    torch._foreach_sub_(between, averages)
    torch._foreach_abs_(between)
    torch._foreach_mul_(between, rest2)
    torch._foreach_mul_(uncertainties, beta2)
    torch._foreach_add_(uncertainties, between)


def _factors(betas: Betas, dtype: torch.dtype) -> list[torch.Tensor]:
    """Return the four factors as tensors. ``_foreach_mul`` would round a number to half precision first.

    On the CPU, where numbers are, whatever the default device.
    """
    beta1, beta2 = betas
    wide = torch.promote_types(dtype, torch.float32)
    return [torch.tensor(factor, dtype=wide, device="cpu") for factor in (beta1, 1 - beta1, beta2, 1 - beta2)]


def _runs(parameters: Waiting, kinds: Sequence[Scores]) -> list[list[str]]:
    """Cut the names into runs of at most ``CHUNK`` numbers, or of one parameter; those that do not fit are left out."""
    runs: list[list[str]] = []
    room = 0
    for name, parameter in parameters.items():
        numbers = parameter.numel()
        if numbers and all(_fits(kind[name], parameter) for kind in kinds[1:]):
            if not runs or numbers > room:
                runs.append([])
                room = CHUNK
            runs[-1].append(name)
            room -= numbers
    return runs


def _fits(score: object, parameter: torch.nn.Parameter) -> bool:
    """Say whether this is a score as PEFT makes them: users may have put others."""
    return (
        type(score) is torch.Tensor
        and score.dtype is parameter.dtype
        and score.device == parameter.device
        and score.is_contiguous()
        and score.is_same_size(parameter)
    )


def _flats(names: list[str], kinds: Sequence[Scores]) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return the scores of these, flat, in new memory; that for ``ipt``, which is not read any more, as it comes."""
    flats = [torch._C._nn.flatten_dense_tensors([kind[name] for name in names]) for kind in kinds[1:]]
    # What torch flattens is the tensor itself where there is only one.
    average, uncertainty = flats if len(names) > 1 else [flat.clone() for flat in flats]
    return torch.empty_like(average), average, uncertainty


def _windows(flat: torch.Tensor, like: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    """Cut a flat tensor into those of these shapes: no views of it to torch, but tensors with storages of their own.

    Views would share one storage, which is pickled once for each of them, and refused by safetensors.
    """
    parts = flat.split([tensor.numel() for tensor in like])
    windows: list[torch.Tensor] = [from_dlpack(to_dlpack(part)) for part in parts]
    return [window.as_strided_(t.shape, t.stride()) for window, t in zip(windows, like, strict=True)]


def _holders(windows: list[torch.Tensor], storages: list[int]) -> tuple[set[int], ...]:
    """Return by how many each is held: in Python, by torch itself (for a backward), and its memory by other tensors."""
    return (
        set(map(sys.getrefcount, windows)),
        set(map(torch.Tensor._use_count, windows)),
        set(map(torch._C._storage_Use_Count, storages)),
    )


@cache
def _holders_of_ours() -> tuple[set[int], ...]:
    """Return what ``_holders`` finds where windows are held by an allocator's dictionary only."""
    kind = {"one": torch.zeros(1, device="cpu"), "other": torch.zeros(1, device="cpu")}
    run = _Run([kind] * 3, list(kind), list(kind.values()))
    references, storages = run._windows[2], run._storages[2]
    windows: list[Any] = [references[place]() for place in range(2)]
    return _holders(windows, [storages[place].cdata for place in range(2)])
