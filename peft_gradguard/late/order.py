"""Where the calls of ``update_and_allocate`` stand in the training loop: four states, and what each call makes of them.

Pure: imports neither torch nor any other file of the package. ``tests/late/test_order.py`` has a test for each cell.

| found at the call        | `IN_TIME`    | `ONLY_ZEROS`              | `LATE`            | `LATE_ZEROED`       |
| ------------------------ | ------------ | ------------------------- | ----------------- | ------------------- |
| `GRADIENTS`              | stays        | `IN_TIME` if stepped      | stays             | `LATE` if stepped   |
| `LENT`                   |              | `LATE_ZEROED`, say so     | stays             | stays               |
| `LENT_ZEROS`             |              | stays, say `ZEROS`        | `LATE_ZEROED`     | stays, say `ZEROS`  |
| `ZEROS` (none is lent)   | `ONLY_ZEROS` | stays, or give up         | `LATE_ZEROED`     | stays, or give up   |
| `NOTHING` (say `LATE`)   | `LATE`       | `LATE_ZEROED`, or give up | stays, or give up | stays, or give up   |

"Stepped": an optimizer that holds these parameters has stepped since the last call. "Give up" where nothing was ever
scored and no optimizer step was left out since the last call, or where none was seen for ``PATIENCE`` calls.
"""

from __future__ import annotations

from enum import Enum
from typing import NamedTuple

PATIENCE = 50
"""The calls in a row, each after a backward, that may see no optimizer step, as a ``GradScaler`` leaves them out."""


class Order(Enum):
    """What is known of where the calls stand."""

    IN_TIME = "in time"
    """Nothing speaks against it: no gradient is kept."""
    ONLY_ZEROS = "only zeros"
    """Gradients were exactly zero: those of ``zero_grad(set_to_none=False)``, or of a loss that gave just these."""
    LATE = "late"
    """Calls come after ``zero_grad``. The optimizer's gradients are kept by reference, as it only lets go of them."""
    LATE_ZEROED = "late, zeroed"
    """Calls come after a ``zero_grad`` that writes zeros: copies are kept."""

    @property
    def copies(self) -> bool:
        """Whether gradients are kept as copies."""
        return self in (Order.ONLY_ZEROS, Order.LATE_ZEROED)


class Found(Enum):
    """What a call has found."""

    GRADIENTS = "gradients in time"
    LENT = "none, but the optimizer's are lent"
    LENT_ZEROS = "the lent ones are all zero"
    ZEROS = "only zeros, none lent"
    NOTHING = "no gradient"


class Word(Enum):
    """What is to be said of a call."""

    LATE = "late"
    LATE_AND_ZERO = "late, after a zero_grad that writes zeros"
    ZEROS = "the optimizer used zeros"


class Verdict(NamedTuple):
    """What becomes of the order by one call."""

    order: Order
    word: Word | None = None
    gives_up: bool = False


def verdict(order: Order, found: Found, *, stepped: bool, hopeless: bool) -> Verdict:
    """Return what a call makes of the order.

    ``stepped``: an optimizer that holds these parameters has stepped since the last call. ``hopeless``: nothing was
    ever scored, and since the last call no optimizer step was left out, as a ``GradScaler`` leaves them out; or none
    was seen for ``PATIENCE`` calls.
    """
    if found is Found.GRADIENTS:
        after = {Order.ONLY_ZEROS: Order.IN_TIME, Order.LATE_ZEROED: Order.LATE}
        return Verdict(after.get(order, order) if stepped else order)
    if found is Found.LENT:
        if order is Order.ONLY_ZEROS:
            return Verdict(Order.LATE_ZEROED, Word.LATE_AND_ZERO)
        return Verdict(order)
    if found is Found.LENT_ZEROS:
        return Verdict(Order.LATE_ZEROED) if order is Order.LATE else Verdict(order, Word.ZEROS)
    if found is Found.ZEROS:
        after = {Order.IN_TIME: Order.ONLY_ZEROS, Order.LATE: Order.LATE_ZEROED}
        return Verdict(after.get(order, order), gives_up=hopeless and order.copies)
    after = {Order.IN_TIME: Order.LATE, Order.ONLY_ZEROS: Order.LATE_ZEROED}
    return Verdict(after.get(order, order), Word.LATE, gives_up=hopeless and order is not Order.IN_TIME)
