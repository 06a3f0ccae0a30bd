"""Patterns of ``exclude`` that match nothing: a typing error, most likely."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ..errors import some_of
from ..model.exclusions import PEFT_PREFIX, patterns_in_force, unmatched_patterns

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from ..model.parameters import AdaLoraParameter
    from ..rules.call import AllocatorCall


def warn_of_unmatched_patterns(call: AllocatorCall) -> None:
    """Warn once per allocator and pattern of those that exclude nothing."""
    patterns, judged = patterns_in_force(), call.memory.said.patterns
    if patterns is None or judged.issuperset(patterns.patterns):
        return
    unmatched = [pattern for pattern in unmatched_patterns(call.parameters) if pattern not in judged]
    judged.update(patterns.patterns)
    if unmatched and call.parameters:
        call.memory.said.warn_once(
            f"exclude {unmatched}",
            "peft_gradguard excludes nothing by %s: no AdaLoRA parameter of adapter %r has such a name. Patterns are "
            "matched with whole names, such as %r.",
            ", ".join(map(repr, unmatched)),
            call.memory.adapter,
            PEFT_PREFIX + call.parameters[0].name,
        )


def advice_on_exclusions(parameters: Sequence[AdaLoraParameter]) -> Iterator[str]:
    """Advise on patterns that match nothing, and on those that match everything."""
    unmatched = [repr(pattern) for pattern in unmatched_patterns(parameters)] if parameters else []
    if unmatched:
        yield (
            f"Nothing is excluded by {some_of(unmatched)}: patterns are matched with whole names, such as "
            f"{PEFT_PREFIX}{parameters[0].name}."
        )
    elif parameters and all(parameter.excluded for parameter in parameters):
        yield "Everything is excluded: no rank will be pruned, as in plain LoRA."
