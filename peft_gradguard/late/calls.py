"""One allocator's calls: where they stand in the loop, and the gradients kept because of it."""

from __future__ import annotations

from contextlib import contextmanager
from typing import TYPE_CHECKING

from .kept import KeptGradients
from .order import PATIENCE, Found, Order, verdict

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from ..model.parameters import AdaLoraParameter
    from .order import Verdict


class LateCalls:
    """An allocator's order, and what is kept unless it is ``IN_TIME``: a loop in the documented order pays nothing."""

    def __init__(self) -> None:
        self.order = Order.IN_TIME
        self._kept = KeptGradients()
        self._without_step = 0
        """The calls in a row without gradients, each after a backward, but after no step of an optimizer."""

    @property
    def no_optimizer_steps(self) -> bool:
        """Whether ``PATIENCE`` calls have seen no torch optimizer step these parameters."""
        return self._without_step >= PATIENCE

    def in_time(self) -> Verdict:
        """Take note of a call that has found gradients of its own: what was kept for it is of no use any more."""
        return self._turn(Found.GRADIENTS, never_scored=False)

    @contextmanager
    def lent(self, parameters: Sequence[AdaLoraParameter]) -> Iterator[bool]:
        """Lend the optimizer's gradients for one call that has found none, and give whether there were any.

        For all parameters or none: one of this step's gradients beside those of the last would mix two steps.
        """
        with self._kept.lent(parameters) as any_lent:
            yield any_lent

    def found(self, found: Found, parameters: Sequence[AdaLoraParameter], *, never_scored: bool) -> Verdict:
        """Take note of what a call without gradients of its own has found."""
        if not self._kept.listens:
            self._kept.begin(parameters)
        return self._turn(found, never_scored=never_scored)

    def scored(self, parameters: Sequence[AdaLoraParameter], *, own: bool) -> None:
        """After a call: it has scored these parameters' own gradients, or else those that they were lent, or none."""
        if self._kept.listens:
            self._kept.start_anew(parameters if own else ())
            self._kept.follow(parameters)

    def give_up(self) -> None:
        """Before an error: a loop may swallow it, and what has happened before this call is no matter of the next."""
        if self._kept.listens:
            self._kept.start_anew(())

    def take_up(self, order: Order, parameters: Sequence[AdaLoraParameter]) -> None:
        """Go on in the order of a training before, whose state was put back."""
        self.stop()
        if order is not Order.IN_TIME:
            self.order = order
            self._kept.begin(parameters)
            self._kept.copies = order.copies

    def stop(self) -> None:
        """Let go of what was kept: from the finalising step on nothing is scored."""
        if self._kept.listens:
            self._kept.close()
        self.order = Order.IN_TIME

    def _turn(self, found: Found, *, never_scored: bool) -> Verdict:
        kept = self._kept
        left_out = kept.step_was_left_out()
        if found is Found.ZEROS and kept.zeros_come_from_the_loss():
            never_scored, left_out = False, False
        if found in (Found.ZEROS, Found.NOTHING) and left_out:
            self._without_step += 1
        elif kept.stepped or found is Found.GRADIENTS:
            self._without_step = 0
        hopeless = (never_scored and not left_out) or self.no_optimizer_steps
        turned = verdict(self.order, found, stepped=kept.stepped, hopeless=hopeless)
        if turned.gives_up:
            self.give_up()
        else:
            self.order = turned.order
            kept.copies = turned.order.copies
            if turned.order is Order.IN_TIME:
                self.stop()
        return turned
