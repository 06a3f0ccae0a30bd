"""What the tables of a report say: modules grouped by kind, the interesting ones first. ``tables.py`` lays them out."""

from __future__ import annotations

import re
from collections import Counter
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

from .facts import trained
from .layers import places, short_labels

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from ..model.parameters import SkipReason
    from .facts import AdapterReport, ModuleReport, ParameterReport

MANY_KINDS = 16
"""Where there are more kinds than this (a mixture of experts numbers its own), those that differ in numbers are one."""
MANY_ROWS = 24


@dataclass(frozen=True)
class Section:
    """One table. The first column names kinds of modules, and is the one to shorten."""

    title: str
    head: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    note: str = ""
    """What follows beneath it."""


class Left(NamedTuple):
    """Parameters of one kind that are left out for the same reason."""

    kind: str
    ranked: bool | None
    factors: str
    reason: SkipReason


def moment(adapter: AdapterReport) -> str:
    """Return when the report was made, as far as known: ``step 20``, ``ranks final since step 320`` or nothing."""
    if adapter.step is None:
        return ""
    return f"ranks final since step {adapter.final_step}" if adapter.final else f"step {adapter.step}"


def sharing(adapter: AdapterReport) -> str:
    """Return ``17 modules share a budget of``, which a number of ranks follows; nothing where none is ranked."""
    ranked = sum(bool(module.ranked) for module in adapter.modules)
    return f"{_number(ranked, 'module')} {'has' if ranked == 1 else 'share'} a budget of" if ranked else ""


def others(adapter: AdapterReport) -> str:
    """Return ``3 others keep their 24``: the ranks that are not under the budget; nothing where there are none."""
    count = sum(module.ranked is False for module in adapter.modules)
    if not (count and adapter.unranked_ranks):
        return ""
    return f"{_number(count, 'other')} {'keeps its' if count == 1 else 'keep their'} {adapter.unranked_ranks}"


def summary(adapter: AdapterReport) -> list[str]:
    """Return the facts about the whole, one sentence each."""
    modules = adapter.modules
    parameters = [parameter for module in modules for parameter in module.parameters]
    trainable = sum(bool(parameter.trainable) for parameter in parameters)
    started, kept = (sum(getattr(module, field) for module in modules) for field in ("rank_started", "rank_kept"))
    counted = f"{_number(len(modules), 'module')} with {_number(len(parameters), 'AdaLoRA parameter')}"
    if not adapter.saved:
        every = "none" if not trainable else "all" if trainable == len(parameters) else f"{trainable} of them"
        counted += f", {every} trainable"
    lines = [counted, f"{kept} of {_number(started, 'rank')} kept"]
    if adapter.init_budget is not None:
        lines.append(_budget(adapter))
    if adapter.saved:
        return lines
    if adapter.init_budget is None:
        return [*lines, "not trained here: it has no rank allocator"]
    if adapter.final is False and sharing(adapter):
        lines.append(
            f"the ranks are not final: AdaLoRA settles them at step {adapter.final_step} (total_step - tfinal), and "
            f"the last step it saw is {adapter.step}; a training that ends here keeps these ranks"
        )
    return [*lines, _scored(adapter, parameters)]


def _budget(adapter: AdapterReport) -> str:
    init, now, target = adapter.init_budget, adapter.budget, adapter.target_budget
    assert init is not None
    if not sharing(adapter):
        return "no module is ranked, so no rank is pruned"
    end = "" if target is None else f", {target} in the end"
    if adapter.saved:
        ranks = f"{_number(init, 'rank')} at the start{end}"
    elif now is None:
        ranks = f"{_number(init, 'rank')} at the start{end} (how many now is not known)"
    elif now == init:
        ranks = f"{_number(init, 'rank')}{end}"
    elif now == target:
        ranks = f"{_number(now, 'rank')}, {init} at the start"
    else:
        ranks = f"{_number(init, 'rank')} at the start, {now} now{end}"
    ranked = [module for module in adapter.modules if module.ranked]
    rows = sum(module.rows for module in ranked)
    if not has_begun(adapter) and rows < sum(module.rank_started for module in ranked):
        ranks += f", but {'has' if len(ranked) == 1 else 'have'} only {rows}"
    return "; ".join(filter(None, [f"{sharing(adapter)} {ranks}", others(adapter)]))


def sections(adapter: AdapterReport) -> list[Section]:
    """Return the tables of one adapter."""
    kinds = _Kinds(adapter.modules)
    found = [] if adapter.init_budget is None else _left_out(adapter, kinds)
    found.append(_by_kind(adapter, kinds))
    found.append(_no_rank_left(adapter, kinds))
    if any(module.rank_kept != module.rank_started for module in adapter.modules):
        found += _by_layer(adapter, kinds)
    return [section for section in found if section.rows]


def has_begun(adapter: AdapterReport) -> bool:
    """Say whether the report is one of a training under way or done, or of what it left, not an audit before it."""
    return adapter.saved or adapter.step is not None or trained(adapter.modules) or _counted(adapter)


def _counted(adapter: AdapterReport) -> bool:
    return any(p.steps_scored or p.steps_skipped for module in adapter.modules for p in module.parameters)


def ranges(layers: Iterable[int | None]) -> str:
    """Return ``0-3, 5, 7-9``; the modules without a layer's number add nothing."""
    runs: list[list[int]] = []
    for layer in sorted({layer for layer in layers if layer is not None}):
        if runs and layer == runs[-1][1] + 1:
            runs[-1][1] = layer
        else:
            runs.append([layer, layer])
    return ", ".join(_span(first, last) for first, last in runs)


def _span(first: int, last: int, join: str = "-") -> str:
    return str(first) if first == last else f"{first}{join}{last}"


def _number(count: int, thing: str) -> str:
    return f"{count} {thing}{'' if count == 1 else 's'}"


def _scored(adapter: AdapterReport, parameters: Sequence[ParameterReport]) -> str:
    if not has_begun(adapter):
        return "no parameter was scored yet"
    if trained(adapter.modules) and not _counted(adapter):
        return "how often parameters were scored is not known: the guard was off"
    always = [p for p in parameters if p.steps_scored and not p.steps_skipped]
    never = [p for p in parameters if not p.steps_scored]
    sometimes = len(parameters) - len(always) - len(never)
    if len(never) == len(parameters):
        return "no parameter was ever scored"
    reasons = {reason for p in never for reason in p.steps_skipped or ()}
    why = f" ({', '.join(reasons)})" if len(reasons) == 1 else ""
    counts = ((len(always), "at every step"), (sometimes, "at some steps"), (len(never), f"never{why}"))
    (first, often), *rest = [(count, words) for count, words in counts if count]
    parts = [f"{_number(first, 'parameter')} {'was' if first == 1 else 'were'} scored {often}"]
    parts += [f"{count} {words}" for count, words in rest]
    steps = [p.last_step for p in parameters if p.last_step is not None]
    return ", ".join(parts) + (f"; the last scoring was at step {max(steps)}" if steps else "")


class _Kinds:
    """The modules by kind. Where there are too many kinds, those that differ in numbers alone are merged."""

    def __init__(self, modules: Sequence[ModuleReport]) -> None:
        found = places(module.name for module in modules)
        self.layer = {name: place.layer for name, place in found.items()}
        own = {name: place.kind for name, place in found.items()}
        unmerged = set(own.values())
        wider = {kind: re.sub(r"\d+", "*", kind) for kind in unmerged}
        alike = Counter(wider.values())
        self.merged = {kind for kind, count in alike.items() if count > 1 and len(unmerged) > MANY_KINDS}
        self.of = {name: wider[kind] if wider[kind] in self.merged else kind for name, kind in own.items()}
        """The kind of each module, by its name."""
        self.modules: dict[str, list[ModuleReport]] = {}
        for module in modules:
            self.modules.setdefault(self.of[module.name], []).append(module)
        self.labels = short_labels(self.modules)
        """A short label for each kind."""
        short = short_labels(own.values())
        self.one_by_one = {name: short[kind] for name, kind in own.items()}
        """A short label for each module: of its own kind, whatever that is merged with."""

    def label(self, kind: str, modules: Sequence[ModuleReport]) -> str:
        """Return a label for these modules of a kind; where it is merged, one that tells which or how many they are."""
        if kind not in self.merged:
            return self.labels[kind]
        if len(modules) == 1:
            return self.one_by_one[modules[0].name]
        return f"{self.labels[kind]} ({len(modules)} of {len(self.modules[kind])})"


def _left_out(adapter: AdapterReport, kinds: _Kinds) -> list[Section]:
    begun = has_begun(adapter)
    groups: dict[Left, list[tuple[ModuleReport, list[ParameterReport]]]] = {}
    for module in adapter.modules:
        for reason, parameters in _reasons(module, begun).items():
            factors = "".join(parameter.factor for parameter in parameters)
            group = Left(kinds.of[module.name], module.ranked, factors, reason)
            groups.setdefault(group, []).append((module, parameters))
    return [
        _left_section(title, begun, kinds, {left: found for left, found in groups.items() if left.ranked is ranked})
        for ranked, title in (
            (False, f"{'Not' if begun else 'Will not be'} ranked: these keep their full rank"),
            (True, f"{'Ranked' if begun else 'Will be ranked'}, but some parts are not always scored"),
        )
    ]


def _left_section(
    title: str,
    begun: bool,
    kinds: _Kinds,
    groups: dict[Left, list[tuple[ModuleReport, list[ParameterReport]]]],
) -> Section:
    shares: dict[tuple[str, ...], float] = {}
    labels: dict[tuple[str, ...], list[str]] = {}
    for left, found in groups.items():
        steps, share = _times(left.reason, [parameter for _, several in found for parameter in several])
        layers = ranges(kinds.layer[module.name] for module, _ in found)
        part = "all" if left.factors == "ABE" else ", ".join(left.factors)
        row = (layers, part, left.reason, *([steps] if begun else []))
        shares[row] = share
        labels.setdefault(row, []).append(kinds.label(left.kind, [module for module, _ in found]))
    every = {kinds.label(kind, modules) for kind, modules in kinds.modules.items()}
    rows = [
        (label, *row)
        for row in sorted(labels, key=lambda row: -shares[row])
        for label in (labels[row] if len(every) < 2 or set(labels[row]) != every else [f"all {len(every)} kinds"])
    ]
    head = ("kind", "layers", "part", "why", *(["steps left out"] if begun else []))
    more = len(rows) - MANY_ROWS
    return Section(title, head, tuple(rows[:MANY_ROWS]), _more(more, "such group"))


def _reasons(module: ModuleReport, begun: bool) -> dict[SkipReason, list[ParameterReport]]:
    """Return why parts of the module are or were left out."""
    if not module.ranked and module.reason in ("inside modules_to_save", "warming up"):
        return {module.reason: list(module.parameters)}
    found: dict[SkipReason, list[ParameterReport]] = {}
    for parameter in module.parameters:
        skipped = parameter.steps_skipped or {}
        for reason in skipped:
            found.setdefault(reason, []).append(parameter)
        now: SkipReason | None = (
            "excluded" if parameter.excluded else "frozen" if parameter.trainable is False else None
        )
        # What is frozen now was left out of nothing yet, but may be why the module is not ranked.
        if now and now not in skipped and not (begun and module.ranked):
            found.setdefault(now, []).append(parameter)
    if not module.ranked and module.reason and not found:
        found[module.reason] = list(module.parameters)
    return found


def _times(reason: SkipReason, parameters: Sequence[ParameterReport]) -> tuple[str, float]:
    """Return ``3 to 5 of 20``, and the largest share."""
    skipped = [(parameter.steps_skipped or {}).get(reason, 0) for parameter in parameters]
    steps = [(p.steps_scored or 0) + sum((p.steps_skipped or {}).values()) for p in parameters]
    if not any(steps) or reason == "warming up":
        return "", 0.0
    share = max(some / max(every, 1) for some, every in zip(skipped, steps, strict=True))
    return f"{_span(min(skipped), max(skipped), ' to ')} of {max(steps)}", share


def _by_kind(adapter: AdapterReport, kinds: _Kinds) -> Section:
    important = sum(module.importance or 0.0 for module in adapter.modules)
    rows = []
    for kind, modules in kinds.modules.items():
        row = [kinds.labels[kind], ranges(kinds.layer[module.name] for module in modules), str(len(modules))]
        if has_begun(adapter) or adapter.init_budget is None:
            started, kept = (
                sum(getattr(module, field) for module in modules) for field in ("rank_started", "rank_kept")
            )
            row.append(f"{kept} of {started}")
            if important:
                known = [module.importance for module in modules if module.importance is not None]
                row.append(f"{100 * sum(known) / important:.0f} %" if known else "-")
        else:
            row += [_shapes(modules, "A"), _shapes(modules, "B"), _trainable(modules)]
        rows.append(tuple(row))
    head = ["kind", "layers", "modules"]
    if has_begun(adapter) or adapter.init_budget is None:
        head += ["ranks kept", *(["importance"] if important else [])]
    else:
        head += ["A", "B", "trainable"]
    return Section("By kind of module", tuple(head), tuple(rows[:MANY_ROWS]), _more(len(rows) - MANY_ROWS, "kind"))


def _more(count: int, thing: str) -> str:
    return f"and {_number(count, f'more {thing}')}" if count > 0 else ""


def _shapes(modules: Sequence[ModuleReport], factor: str) -> str:
    shapes = {p.shape for module in modules for p in module.parameters if p.factor == factor}
    first = min(shapes, default=())
    return ("x".join(map(str, first)) or "?") + (" ..." if len(shapes) > 1 else "")


def _trainable(modules: Sequence[ModuleReport]) -> str:
    parameters = [parameter for module in modules for parameter in module.parameters]
    count = sum(bool(parameter.trainable) for parameter in parameters)
    return "none" if not count else "all" if count == len(parameters) else f"{count} of {len(parameters)} parameters"


def _no_rank_left(adapter: AdapterReport, kinds: _Kinds) -> Section:
    """Return the modules that are as the base model has them: all their ranks are pruned."""
    empty: dict[str, list[int | None]] = {}
    for module in adapter.modules:
        if not module.rank_kept:
            empty.setdefault(kinds.one_by_one[module.name], []).append(kinds.layer[module.name])
    rows = [(label, ranges(layers), str(len(layers))) for label, layers in empty.items()]
    ended = adapter.final or adapter.saved or adapter.init_budget is None
    title = f"{'Ended with no rank' if ended else 'No rank left'}: these are as in the base model"
    more = _more(len(rows) - MANY_ROWS, "kind")
    return Section(title, ("kind", "layers", "modules"), tuple(rows[:MANY_ROWS]), more)


def _by_layer(adapter: AdapterReport, kinds: _Kinds) -> list[Section]:
    """Return the ranks kept, kinds down and layers across; and one by one those without a layer's number."""
    cells: dict[str, dict[int, list[int]]] = {}
    alone = []
    for module in adapter.modules:
        layer = kinds.layer[module.name]
        if layer is None:
            alone.append((kinds.one_by_one[module.name], f"{module.rank_kept} of {module.rank_started}"))
        else:
            cells.setdefault(kinds.of[module.name], {}).setdefault(layer, []).append(module.rank_kept)
    layers = sorted({layer for row in cells.values() for layer in row})
    rows = [
        (kinds.labels[kind], *(_span(min(row[layer]), max(row[layer])) if layer in row else "" for layer in layers))
        for kind, row in cells.items()
    ]
    more = len(rows) - MANY_ROWS
    return [
        Section("Ranks kept, by layer", ("layer", *map(str, layers)), tuple(rows[:MANY_ROWS]), _more(more, "kind")),
        Section(
            "Ranks kept, outside of layers",
            ("module", "ranks kept"),
            tuple(alone[:MANY_ROWS]),
            _more(len(alone) - MANY_ROWS, "module"),
        ),
    ]
