"""The user's own filter: parameters that AdaLoRA shall neither score nor rank."""

from __future__ import annotations

from fnmatch import fnmatchcase
from typing import TYPE_CHECKING

from ..settings import read_exclusions

if TYPE_CHECKING:
    from collections.abc import Sequence
    from types import TracebackType

    from .parameters import AdaLoraParameter

PEFT_PREFIX = "base_model.model."
"""What ``PeftModel.named_parameters()`` puts before the names that an allocator knows."""


class Exclusion:
    """What ``exclude`` has excluded. ``undo`` ends it, and so does the end of a ``with`` block."""

    def __init__(self, patterns: tuple[str, ...]) -> None:
        self.patterns = patterns
        _exclusions.append(self)

    def undo(self) -> None:
        """Let the parameters take part again, from the next allocator step on. Idempotent."""
        if self in _exclusions:
            _exclusions.remove(self)

    def __enter__(self) -> Exclusion:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.undo()

    def __repr__(self) -> str:
        state = "" if self in _exclusions else ", undone"
        return f"<peft_gradguard.exclude({', '.join(map(repr, self.patterns))}){state}>"


_exclusions: list[Exclusion] = []


def exclude(*patterns: str) -> Exclusion:
    """Leave the AdaLoRA parameters whose names match out of scoring and ranking; they train on, with their full rank.

    ``patterns``: shell-style (``*``, ``?``, ``[...]``), matched with the whole name, case included, as
    ``PeftModel.named_parameters()`` gives it or as the guard logs it (without ``base_model.model.`` at its front):
    ``"*.classifier.*"``. The exact name always matches, whatever signs are in it.

    It holds for every training in this process while the guard is on, from the next allocator
    step until the handle that is returned is undone (``undo()``, or the end of a ``with`` block).
    """
    if not patterns:
        raise ValueError('exclude() needs at least one pattern, such as exclude("*.classifier.*").')
    for pattern in patterns:
        if not isinstance(pattern, str):
            raise TypeError(
                f"exclude() was given {pattern!r}, and needs strings: "
                'exclude("*.classifier.*", "*.lora_E.*"), or exclude(*patterns) for a list.'
            )
        if not pattern.strip():
            raise ValueError(f'exclude() was given the empty pattern {pattern!r}; "*" excludes everything.')
    return Exclusion(patterns)


class Patterns:
    """The patterns in force, and what they say of the names met so far."""

    def __init__(self, patterns: tuple[str, ...]) -> None:
        self.patterns = patterns
        self._known: dict[str, bool] = {}

    def match(self, name: str) -> bool:
        """Say whether any pattern matches this name."""
        known = self._known.get(name)
        if known is None:
            known = self._known[name] = any(_matches(name, pattern) for pattern in self.patterns)
        return known


_last = Patterns(())


def patterns_in_force() -> Patterns | None:
    """Return the patterns of ``exclude`` and of ``PEFT_GRADGUARD_EXCLUDE``, or None where there are none."""
    global _last
    patterns = (*(pattern for exclusion in _exclusions for pattern in exclusion.patterns), *read_exclusions())
    if not patterns:
        return None
    if patterns != _last.patterns:
        _last = Patterns(patterns)
    return _last


def mark_excluded(parameters: list[AdaLoraParameter]) -> list[AdaLoraParameter]:
    """Return the parameters with those marked that the patterns in force exclude."""
    patterns = patterns_in_force()
    if patterns is None:
        return parameters
    return [p._replace(excluded=True) if patterns.match(p.name) else p for p in parameters]


def unmatched_patterns(parameters: Sequence[AdaLoraParameter]) -> list[str]:
    """Return the patterns in force that match none of these parameters."""
    patterns = patterns_in_force()
    return [
        pattern
        for pattern in dict.fromkeys(patterns.patterns if patterns else ())
        if not any(_matches(parameter.name, pattern) for parameter in parameters)
    ]


def _matches(name: str, pattern: str) -> bool:
    # The very name first: a module's name may hold brackets, which are signs in a pattern.
    names = name, PEFT_PREFIX + name
    return pattern in names or any(fnmatchcase(each, pattern) for each in names)
