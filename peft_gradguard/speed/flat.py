"""The arithmetic of PEFT's ``update_ipt`` for hundreds of parameters at once, in place, at the speed of memory.

PEFT starts a dozen small tensor operations for each parameter, and puts three new tensors. Here the scores of many
parameters lie one behind the other, and ten operations serve them all. What the allocator has are windows on this
memory, each with a storage of its own, so that they are copied, pickled and saved as PEFT's tensors are.

Who keeps one of PEFT's scores sees it unchanged by the next step. So it is here: what anybody else holds, be it by a
reference, a view or an array of numpy, is not written to; the allocator gets new windows instead.
"""

from __future__ import annotations

import sys
import weakref
from collections import Counter
from itertools import chain, repeat
from operator import attrgetter, is_
from typing import TYPE_CHECKING, Any

import torch
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils.dlpack import from_dlpack, to_dlpack  # type: ignore[attr-defined]

from ..model.gradients import CPU_CHUNK

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    Scores = dict[str, torch.Tensor]
    Betas = tuple[float, float]
    Waiting = dict[str, torch.nn.Parameter]
    Holders = tuple[set[int], ...]

CHUNK = 1 << 17
"""The numbers of a run, unless one parameter has more. On the CPU it is worked on by ``CPU_CHUNK`` of them at once."""
OFTEN = 2
"""Who was found to hold the scores of a parameter so often will go on: PEFT makes them from then on."""

# What torch does not promise to have.
_flatten: Any = getattr(torch._C._nn, "flatten_dense_tensors", None)
_use_count: Any = getattr(torch.Tensor, "_use_count", None)
_storage_use_count: Any = getattr(torch._C, "_storage_Use_Count", None)
_storage_at: Any = getattr(torch.UntypedStorage, "_new_with_weak_ptr", None)
_foreach_copy: Any = getattr(torch, "_foreach_copy_", None)

_needs_grad = attrgetter("requires_grad")


def is_possible() -> bool:
    """Say whether this torch has all that it takes."""
    return None not in (_flatten, _use_count, _storage_use_count, _storage_at, _foreach_copy)


class Plan:
    """Where the scores of one device and data type lie. It is checked at each step, and never trusted."""

    def __init__(self) -> None:
        self._runs: list[_Run] = []
        self._held: Counter[str] = Counter()
        """How often somebody else was found to hold scores of a parameter."""

    def advance(self, kinds: Sequence[Scores], waiting: Waiting, betas: Betas) -> None:
        """Make the scores of one step, in place. ``kinds``: ``ipt``, ``exp_avg_ipt`` and ``exp_avg_unc``.

        All parameters are contiguous, and their gradients as they are. A parameter leaves ``waiting`` when its scores
        are made. Those stay that have none yet, or others than PEFT makes, or some that somebody else holds: PEFT makes
        new ones. What may fail, the allocations, comes before any average of a run has changed.
        """
        runs, self._runs = self._runs, []
        held: set[str] = set()
        with torch.no_grad():
            ours = _holders_of_ours() if runs else ()
            for run in runs:
                names = [name for name in run.names if name in waiting]
                windows = run.windows(kinds, names, waiting, ours) if names else []
                if windows is None:
                    # What waits of it, and is not held, is laid out anew, from what the allocator has.
                    held |= run.held(kinds, names, waiting, ours)
                    continue
                self._runs.append(run)
                if len(names) == len(run.names):
                    run.advance(waiting, betas)
                elif names:
                    _advance_some(windows, [waiting[name] for name in names], betas)
                    _take_out(names, waiting)
            self._held.update(held)
            new = {n: p for n, p in waiting.items() if n not in held and self._held[n] < OFTEN}
            for names in _runs_of(new, kinds):
                run = _Run(kinds, names, waiting)
                run.advance(waiting, betas)
                self._runs.append(run)


def advanced(
    parameters: Waiting, kinds: Sequence[Scores], betas: Betas
) -> Iterator[tuple[str, torch.Tensor, torch.Tensor, torch.Tensor]]:
    """Yield each name with its new ``ipt``, ``exp_avg_ipt`` and ``exp_avg_unc``; nothing that is there changes."""
    # PEFT begins anew, from zeros, where there is no ipt, whatever the averages are.
    scored = {name: parameter for name, parameter in parameters.items() if name in kinds[0]}
    for names in chain.from_iterable(_pieces(run, scored) for run in _runs_of(scored, kinds[1:])):
        weights = [parameters[name] for name in names]
        with torch.no_grad():
            flats = _laid_out([names], kinds)
            _advance(flats, weights, betas)
            new = [_windows(flat, weights) for flat in flats]
        yield from zip(names, *new, strict=True)


class _Run:
    """Parameters whose scores lie one behind the other. Holds no tensor: PEFT forgets its scores when it likes."""

    def __init__(self, kinds: Sequence[Scores], names: list[str], waiting: Mapping[str, torch.Tensor]) -> None:
        self.names = {name: place for place, name in enumerate(names)}
        parameters = [waiting[name] for name in names]
        self._pieces = _pieces(names, waiting)
        self._lengths = _lengths(self._pieces, waiting)
        flats = _laid_out(self._pieces, kinds)
        self._dtype, self._device = flats[0].dtype, flats[0].device
        self._memory = [_weakly(flat) for flat in flats]
        windows = [window for flat in flats for window in _windows(flat, parameters)]
        self._references = [weakref.ref(window) for window in windows]
        self._storages = [_weakly(window) for window in windows]
        self._addresses = [storage.cdata for storage in self._storages]
        self._places = [window.data_ptr() for window in windows]
        self._sizes = [parameter.shape for parameter in parameters]
        for kind, those in zip(kinds, _in_three(windows), strict=True):
            kind.update(zip(names, those, strict=True))

    def windows(
        self, kinds: Sequence[Scores], names: list[str], waiting: Waiting, ours: Holders
    ) -> list[torch.Tensor] | None:
        """Return the windows of these, kind by kind. ``ours``: who holds them, where nobody else does.

        None where one is gone from there, or also somebody else's, has other memory, or is not of its parameter's size.
        """
        references, addresses, places, sizes = self._references, self._addresses, self._places, self._sizes
        count = len(self.names)
        if len(names) < count:
            chosen = [self.names[name] for name in names]
            sizes = [sizes[place] for place in chosen]
            in_three = [place + kind * count for kind in range(3) for place in chosen]
            references = [references[place] for place in in_three]
            addresses = [addresses[place] for place in in_three]
            places = [places[place] for place in in_three]
        windows: list[Any] = [reference() for reference in references]
        theirs = chain.from_iterable(map(kind.get, names, repeat(0)) for kind in kinds)
        is_there = all(map(is_, windows, theirs))
        del theirs
        is_ours = (
            is_there
            and _holders(windows, addresses) == ours
            and not any(map(_needs_grad, windows))
            # Who sets ``data`` gives a tensor other memory, and may keep this one; torch moves what it shares.
            and [*map(torch.Tensor.data_ptr, windows)] == places
            and [waiting[name].shape for name in names] == sizes
        )
        return windows if is_ours else None

    def held(self, kinds: Sequence[Scores], names: list[str], waiting: Waiting, ours: Holders) -> set[str]:
        """Return those of these of which the allocator has a window that is not, or not only, this run's own."""
        there = [name for name in names if self._is_there(kinds, name)]
        return {name for name in there if self.windows(kinds, [name], waiting, ours) is None}

    def advance(self, waiting: Waiting, betas: Betas) -> None:
        """Advance the whole run, piece by piece: a parameter leaves ``waiting`` when its scores are made."""
        # The memory lives as long as any window does.
        flats = [_flat(_storage_at(memory.cdata), self._dtype, self._device) for memory in self._memory]
        for names, *piece in zip(self._pieces, *(torch.split(flat, self._lengths) for flat in flats), strict=True):
            _advance(piece, [waiting[name] for name in names], betas)
            _take_out(names, waiting)

    def _is_there(self, kinds: Sequence[Scores], name: str) -> bool:
        references = self._references[self.names[name] :: len(self.names)]
        return all(kind.get(name, 0) is reference() for kind, reference in zip(kinds, references, strict=True))


def _advance(flats: Sequence[torch.Tensor], parameters: Sequence[torch.nn.Parameter], betas: Betas) -> None:
    """Advance flat scores by one step (AdaLoRA paper, equations 8 to 10).

    In PEFT's order and by PEFT's numbers. Each product and each sum is made by itself: a fused multiply-add
    (``alpha=``, ``addcmul``, ``lerp``) rounds otherwise.
    """
    beta1, beta2 = betas
    ipt, average, uncertainty = flats
    gradients = _flatten([parameter.grad for parameter in parameters])
    torch.mul(_flatten(parameters), gradients, out=ipt).abs_()
    # What torch flattens is the tensor itself where there is only one.
    between = gradients if len(parameters) > 1 else torch.empty_like(ipt)
    torch.mul(ipt, 1 - beta1, out=between)
    average.mul_(beta1).add_(between)
    torch.sub(ipt, average, out=between).abs_().mul_(1 - beta2)
    uncertainty.mul_(beta2).add_(between)


def _advance_some(windows: list[torch.Tensor], parameters: list[torch.nn.Parameter], betas: Betas) -> None:
    """Do the same for some windows of a run, where the other parameters rest at this step."""
    ipt, averages, uncertainties = _in_three(windows)
    beta1, rest1, beta2, rest2 = _factors(betas, parameters[0])
    weights: list[Any] = list(parameters)
    between = torch._foreach_mul(weights, [weight.grad for weight in weights])
    torch._foreach_abs_(between)
    _foreach_copy(ipt, between)
    torch._foreach_mul_(between, rest1)
    torch._foreach_mul_(averages, beta1)
    torch._foreach_add_(averages, between)
    _foreach_copy(between, ipt)
    torch._foreach_sub_(between, averages)
    torch._foreach_abs_(between)
    torch._foreach_mul_(between, rest2)
    torch._foreach_mul_(uncertainties, beta2)
    torch._foreach_add_(uncertainties, between)


def _factors(betas: Betas, like: torch.Tensor) -> list[Any]:
    """Return the four factors; on the CPU as tensors: torch multiplies a list by one of its type in half the time.

    Half precision is multiplied in single precision, by the factor as it is there. A GPU does so with numbers too, and
    would have to wait for tensors.
    """
    beta1, beta2 = betas
    factors = [beta1, 1 - beta1, beta2, 1 - beta2]
    if like.device.type != "cpu":
        return factors
    wide = torch.promote_types(like.dtype, torch.float32)
    return [torch.tensor(factor, dtype=wide, device="cpu") for factor in factors]  # whatever the default device


def _runs_of(parameters: Waiting, kinds: Sequence[Scores]) -> list[list[str]]:
    """Cut the names into runs of so many numbers, or of one parameter; those that do not fit are left out.

    By size, so that those of E lie together: who keeps these, and keeps the memory of their runs, keeps no others.
    """
    fit = [n for n, p in parameters.items() if p.numel() and all(_fits(kind.get(n), p) for kind in kinds)]
    return _cut(sorted(fit, key=lambda name: parameters[name].numel()), parameters, CHUNK)


def _pieces(names: list[str], parameters: Mapping[str, torch.Tensor]) -> list[list[str]]:
    """Cut a run into what is worked on at once."""
    return _cut(names, parameters, CPU_CHUNK) if parameters[names[0]].is_cpu else [names]


def _cut(names: list[str], parameters: Mapping[str, torch.Tensor], room: int) -> list[list[str]]:
    """Cut the names into lists of so many numbers, or of one parameter."""
    lists: list[list[str]] = []
    left = 0
    for name in names:
        numbers = parameters[name].numel()
        if not lists or numbers > left:
            lists.append([])
            left = room
        lists[-1].append(name)
        left -= numbers
    return lists


def _lengths(pieces: list[list[str]], tensors: Mapping[str, torch.Tensor]) -> list[int]:
    return [sum(tensors[name].numel() for name in names) for names in pieces]


def _take_out(names: list[str], waiting: Waiting) -> None:
    for name in names:
        del waiting[name]


def _fits(score: torch.Tensor | None, parameter: torch.nn.Parameter) -> bool:
    """Say whether this is a score as PEFT makes them: users may have put others."""
    return (
        type(score) is torch.Tensor
        and score.dtype is parameter.dtype
        and score.device == parameter.device
        and score.is_contiguous()
        and score.is_same_size(parameter)
    )


def _laid_out(pieces: list[list[str]], kinds: Sequence[Scores]) -> list[torch.Tensor]:
    """Return the scores of these in new memory, flat, kind by kind. ``ipt``, which is made anew, has any values."""
    like, lengths = kinds[1][pieces[0][0]], _lengths(pieces, kinds[1])
    # Not torch.empty, which fills what it gives where algorithms are to be deterministic.
    size = sum(lengths) * like.element_size()
    memory = [torch.UntypedStorage(size, device=like.device) for _ in range(3)]  # type: ignore[no-untyped-call]
    flats = [_flat(each, like.dtype, like.device) for each in memory]
    for kind, flat in zip(kinds[1:], flats[1:], strict=True):
        for names, part in zip(pieces, torch.split(flat, lengths), strict=True):
            part.copy_(_flatten([kind[name] for name in names]))
    return flats


def _flat(memory: torch.UntypedStorage, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    return torch.empty(0, dtype=dtype, device=device).set_(memory)


def _windows(flat: torch.Tensor, like: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    """Cut a flat tensor into those of these shapes: no views of it to torch, but tensors with storages of their own.

    Views would share one storage, which is pickled once for each of them, and refused by safetensors.
    """
    parts = torch.split(flat, [tensor.numel() for tensor in like])
    windows: list[torch.Tensor] = [from_dlpack(to_dlpack(part)) for part in parts]
    return [window.as_strided_(t.shape, t.stride()) for window, t in zip(windows, like, strict=True)]


def _in_three(windows: list[torch.Tensor]) -> list[list[torch.Tensor]]:
    third = len(windows) // 3
    return [windows[:third], windows[third : 2 * third], windows[2 * third :]]


def _weakly(tensor: torch.Tensor) -> StorageWeakRef:
    return StorageWeakRef(tensor.untyped_storage())  # type: ignore[no-untyped-call]


def _holders(windows: list[torch.Tensor], storages: list[int]) -> Holders:
    """Return by how many each is held: in Python, by torch itself (for a backward), and its memory by other tensors.

    Torch has one Python object for a storage, which may be held too.
    """
    return (
        set(map(sys.getrefcount, windows)),
        set(map(_use_count, windows)),
        set(map(_storage_use_count, storages)),
        set(map(sys.getrefcount, map(torch.Tensor.untyped_storage, windows))),
    )


def _holders_of_ours() -> Holders:
    """Return what ``_holders`` finds where windows are held by an allocator's dictionaries only.

    Asked at each step: a mode, or a tracer, may hold what is made while it is there.
    """
    kinds = [{name: torch.zeros(1, device="cpu") for name in "ab"} for _ in range(3)]
    run = _Run(kinds, ["a", "b"], kinds[0])
    windows: list[Any] = [reference() for reference in run._references]
    return _holders(windows, run._addresses)
