"""One allocator's calls: where they stand in the loop, and the gradients kept because of it."""

from __future__ import annotations

from contextlib import contextmanager, nullcontext
from typing import TYPE_CHECKING

from .kept import KeptGradients
from .order import Found, Order, verdict

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from ..model.parameters import AdaLoraParameter
    from .order import Verdict


class LateCalls:
    """An allocator's order, and what is kept unless it is ``IN_TIME``: a loop in the documented order pays nothing."""

    def __init__(self) -> None:
        self.order = Order.IN_TIME
        self._kept: KeptGradients | None = None

    def in_time(self) -> Verdict:
        """Take note of a call that has found this step's gradients: what was kept for it is of no use any more."""
        return self._turn(Found.GRADIENTS, never_scored=False)

    @contextmanager
    def lent(self, parameters: Sequence[AdaLoraParameter]) -> Iterator[bool]:
        """Lend the optimizer's gradients for one call that has found none, and give whether there were any."""
        with self._kept.lent(parameters) if self._kept else nullcontext(False) as any_lent:
            yield any_lent

    def found(self, found: Found, parameters: Sequence[AdaLoraParameter], *, never_scored: bool) -> Verdict:
        """Take note of what a call without gradients of its own has found."""
        if self._kept is None:
            self._kept = KeptGradients(parameters)
        return self._turn(found, never_scored=never_scored)

    def watch(self, parameters: Sequence[AdaLoraParameter], *, never_scored: bool) -> None:
        """After a call: from now on, keep the gradients of these parameters."""
        if self._kept:
            self._kept.watch(parameters, backward=never_scored)

    def stop(self) -> None:
        """Let go of what was kept: from the finalising step on nothing is scored."""
        if self._kept:
            self._kept.close()
        self._kept, self.order = None, Order.IN_TIME

    @contextmanager
    def undone_on_error(self) -> Iterator[None]:
        """Keep what was kept where the call fails, because it may be made again."""
        with self._kept.undone_on_error() if self._kept else nullcontext():
            yield

    def _turn(self, found: Found, *, never_scored: bool) -> Verdict:
        kept = self._kept
        if kept is None:
            return verdict(self.order, found, stepped=False, hopeless=False)
        hopeless = never_scored and not kept.step_was_left_out()
        turned = verdict(self.order, found, stepped=kept.stepped, hopeless=hopeless)
        if found is Found.GRADIENTS:
            kept.forget()
        if not turned.gives_up:
            self.order = turned.order
            kept.copies = turned.order.copies
            if turned.order is Order.IN_TIME:
                self.stop()
        return turned
