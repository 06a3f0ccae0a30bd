"""The rules once more, over plain dictionaries of tensors: no PEFT code, no guard code.

Written from the rules and from the AdaLoRA paper (https://openreview.net/pdf?id=lq62uWRJjiY: equations 8 to 11, the
importance of a triplet in section 3.2, the schedule of the budget in section 3.3). The order of the operations is
PEFT's, because sums of floating-point numbers depend on it. A parameter is known by its module and its factor.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import NamedTuple

import torch


class Key(NamedTuple):
    module: str
    factor: str
    """``"A"``, ``"B"`` or ``"E"``."""


class BrokenLoopError(Exception):
    """The training loop is broken: the guard's ``NoGradientError``."""


@dataclass(frozen=True)
class Schedule:
    init_r: int
    target_r: int
    tinit: int
    tfinal: int
    total: int
    every: int
    """``deltaT``"""
    beta1: float
    beta2: float

    @property
    def finalising(self) -> int:
        return self.total - self.tfinal


@dataclass
class Facts:
    """What there is to see when the allocator is called."""

    weights: dict[Key, torch.Tensor]
    gradients: dict[Key, torch.Tensor | None]
    trainable: dict[Key, bool]


@dataclass
class Late:
    """What is known since the first call that found no gradient, or only zeros."""

    watched: set[Key]
    """Where a backward is seen: what was trainable at the first of these calls, or at one that did not fail since."""
    suspicion: bool
    """Whether nothing has shown yet that calls are late, as all gradients were there and zero."""
    copies: bool = False
    """Whether ``zero_grad`` writes zeros, so that what is lent are copies."""
    kept: dict[Key, torch.Tensor] = field(default_factory=dict)
    """The gradients that optimizers have used, and that no call has scored."""
    scored: set[Key] = field(default_factory=set)
    """What a call has scored of the gradients that are still there. Zeros it has not scored: they stay unscored."""
    backward_seen: bool = False
    """Whether a backward has come since the last call."""
    more_than_zeros: bool = False
    """Whether such a backward has brought more than zeros, or came while nobody had found zeros yet."""
    step_seen: bool = False
    """Whether an optimizer that holds the parameters has stepped since the last call."""
    without_step: int = 0
    """The calls in a row that came after a backward, and after no step."""


PATIENCE = 50


class Oracle:
    """One allocator, and the rank pattern of its adapter."""

    def __init__(self, schedule: Schedule, modules: list[str], saved: set[str]) -> None:
        self.schedule, self.modules, self.saved = schedule, modules, saved
        self.ipt: dict[Key, torch.Tensor] = {}
        self.sensitivity: dict[Key, torch.Tensor] = {}
        self.uncertainty: dict[Key, torch.Tensor] = {}
        self.scored_at: dict[Key, set[int]] = {}
        """The steps in which each was scored, be it once or more often."""
        self.pattern: dict[str, list[bool]] | None = None
        self.counted = list(modules)
        """The modules that the budget describes: at first all of them."""
        self.late: Late | None = None

    @property
    def budgets(self) -> tuple[int, int]:
        """The ranks at the start, and those at the end (``init_bgt`` and ``target_bgt``)."""
        return self.schedule.init_r * len(self.counted), self.schedule.target_r * len(self.counted)

    def backward(self, reached: set[Key], not_zero: set[Key]) -> None:
        """A backward has brought a gradient to what it ``reached``; ``not_zero``: where that is not all zeros."""
        if self.late is not None:
            seen = reached & self.late.watched
            self.late.backward_seen |= bool(seen)
            self.late.more_than_zeros |= bool(seen & not_zero if self.late.copies else seen)
            self.late.scored -= reached

    def optimizer_step(self, held: set[Key], used: dict[Key, torch.Tensor | None]) -> None:
        """An optimizer steps what it ``held``; ``used``: the gradients that it went by."""
        if self.late is None or not held:
            return
        self.late.step_seen = True
        for key in held:
            gradient = used.get(key)
            self.late.kept.pop(key, None)
            if gradient is not None and key not in self.late.scored:
                self.late.kept[key] = gradient.clone() if self.late.copies else gradient

    def optimizer_left_out(self, held: set[Key]) -> None:
        """An optimizer was told of an overflow, and has used nothing."""
        if self.late is not None:
            for key in held:
                self.late.kept.pop(key, None)

    def call(self, step: int, facts: Facts) -> dict[str, torch.Tensor]:
        """Return what the E of each module is after the call."""
        energies = {module: facts.weights[Key(module, "E")].clone() for module in self.modules}
        if step < self.schedule.finalising:
            try:
                self._score(step, facts)
            finally:
                if self.late is not None:
                    self.late.backward_seen = self.late.more_than_zeros = self.late.step_seen = False
                    self.late.kept = {}
        else:
            self.late = None
        if step > self.schedule.finalising:
            for module, keep in (self.pattern or {}).items():
                _mask(energies[module], keep)
            return energies
        ranked = self._ranked(facts.trainable)
        if self.ipt:
            self.counted = ranked
        if ranked and self._masking_is_due(step):
            self.pattern = self._allocate(ranked, self._budget(step), facts.trainable)
            for module, keep in self.pattern.items():
                _mask(energies[module], keep)
        if step == self.schedule.finalising:
            for scores in (self.ipt, self.sensitivity, self.uncertainty):
                scores.clear()
        return energies

    def _score(self, step: int, facts: Facts) -> None:
        there = _there(facts, facts.gradients)
        trainable = {key for key, trains in facts.trainable.items() if trains}
        late, lent, own = self.late, False, _some_are_not_zero(there)
        gradients = facts.gradients
        if late is not None and own:
            # In time. Where the optimizer has stepped, its gradients are those that are there.
            late.without_step = 0
            late.copies = late.copies and not late.step_seen
            self.late = None if late.suspicion and late.step_seen else late
        elif late is not None:
            lent = bool(late.kept)
            gradients = {**gradients, **late.kept}
            there = _there(facts, gradients)
            late.suspicion &= not _some_are_not_zero(there)
        zeroed = bool(there) and not _some_are_not_zero(there)
        usable = {k: g for k, g in there.items() if g.isfinite().all()}
        if not any(gradient.any() for gradient in usable.values()):
            usable = {}
        if not trainable:
            # Gradients that are there, be they zeros, show that all was frozen after the backward.
            if not self.ipt and all(gradient is None for gradient in gradients.values()):
                raise BrokenLoopError
        elif zeroed or not there:
            self._call_is_late(zeroed, lent, trainable)
        elif late is not None and late.step_seen:
            late.without_step = 0
        beta1, beta2 = self.schedule.beta1, self.schedule.beta2
        for key, gradient in usable.items():
            zeros = torch.zeros_like(gradient)
            ipt = (facts.weights[key] * gradient).abs()
            sensitivity = beta1 * self.sensitivity.get(key, zeros) + (1 - beta1) * ipt
            uncertainty = beta2 * self.uncertainty.get(key, zeros) + (1 - beta2) * (ipt - sensitivity).abs()
            self.ipt[key], self.sensitivity[key], self.uncertainty[key] = ipt, sensitivity, uncertainty
            self.scored_at.setdefault(key, set()).add(step)
        if self.late is not None:
            self.late.watched |= trainable
            if own:
                self.late.scored = {key for key, gradient in facts.gradients.items() if gradient is not None}

    def _call_is_late(self, zeroed: bool, lent: bool, trainable: set[Key]) -> None:
        if self.late is None:
            self.late = Late(trainable, suspicion=zeroed)
        else:
            late = self.late
            # What the loss gave is no sign of a broken loop.
            from_the_loss = zeroed and not lent and late.backward_seen and not late.more_than_zeros
            left_out = late.backward_seen and not late.step_seen and not from_the_loss
            if left_out and not lent:
                late.without_step += 1
            elif late.step_seen:
                late.without_step = 0
            forgiven = bool(self.ipt) or left_out or from_the_loss or (zeroed and (lent or not late.copies))
            if not forgiven or late.without_step >= PATIENCE:
                raise BrokenLoopError
        self.late.suspicion &= zeroed
        self.late.copies |= zeroed

    def _ranked(self, trainable: dict[Key, bool]) -> list[str]:
        def counts(module: str, factor: str) -> bool:
            return trainable[Key(module, factor)] and Key(module, factor) in self.ipt

        return [
            module
            for module in self.modules
            if module not in self.saved
            and counts(module, "E")
            and (counts(module, "A") or counts(module, "B"))
            and self._steps_scored(module) >= min(self.schedule.tinit, max(map(self._steps_scored, self.modules)))
        ]

    def _steps_scored(self, module: str) -> int:
        return len(self.scored_at.get(Key(module, "E"), ()))

    def _masking_is_due(self, step: int) -> bool:
        schedule = self.schedule
        return step == schedule.finalising or (step > schedule.tinit and step % schedule.every == 0)

    def _budget(self, step: int) -> int:
        schedule = self.schedule
        start, end = self.budgets
        if step <= schedule.tinit:
            return start
        to_go = 1 - (step - schedule.tinit) / (schedule.finalising - schedule.tinit)
        return int((start - end) * (to_go**3) + end)

    def _allocate(self, ranked: list[str], budget: int, trainable: dict[Key, bool]) -> dict[str, list[bool]]:
        importance = {module: self._importance(module, trainable) for module in ranked}
        ascending = sorted(value for values in importance.values() for value in values.tolist())
        threshold = ascending[len(ascending) - budget - 1]
        return {module: [value > threshold for value in values.tolist()] for module, values in importance.items()}

    def _importance(self, module: str, trainable: dict[Key, bool]) -> torch.Tensor:
        """Per rank: the score of E, and the means over the scores of A's row and B's column."""
        scores = {
            factor: self.sensitivity[key] * self.uncertainty[key]
            for factor in "ABE"
            if (key := Key(module, factor)) in self.ipt and trainable[key]
        }
        means = [scores["A"].mean(dim=1)] if "A" in scores else []
        means += [scores["B"].mean(dim=0)] if "B" in scores else []
        return scores["E"].view(-1) + sum(means[1:], means[0])


def _there(facts: Facts, gradients: dict[Key, torch.Tensor | None]) -> dict[Key, torch.Tensor]:
    return {key: g for key, g in gradients.items() if g is not None and facts.trainable[key]}


def _some_are_not_zero(gradients: dict[Key, torch.Tensor]) -> bool:
    return any(gradient.any() for gradient in gradients.values())


def _mask(energy: torch.Tensor, keep: list[bool]) -> None:
    energy[~torch.tensor(keep)] = 0.0
