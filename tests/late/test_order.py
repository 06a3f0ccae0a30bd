"""The table of late/order.py: a test for each cell."""

from __future__ import annotations

import subprocess
import sys

import pytest

from peft_gradguard.late.order import Found, Order, Verdict, Word, verdict

IN_TIME, ONLY_ZEROS, LATE, LATE_ZEROED = Order.IN_TIME, Order.ONLY_ZEROS, Order.LATE, Order.LATE_ZEROED


@pytest.mark.parametrize(
    ("order", "stepped", "after"),
    [
        (IN_TIME, False, IN_TIME),
        (IN_TIME, True, IN_TIME),
        (ONLY_ZEROS, False, ONLY_ZEROS),
        (ONLY_ZEROS, True, IN_TIME),
        (LATE, False, LATE),
        (LATE, True, LATE),
        (LATE_ZEROED, False, LATE_ZEROED),
        (LATE_ZEROED, True, LATE),
    ],
)
def test_gradients_in_time(order: Order, stepped: bool, after: Order) -> None:
    assert verdict(order, Found.GRADIENTS, stepped=stepped, hopeless=False) == Verdict(after)


@pytest.mark.parametrize("stepped", [False, True])
@pytest.mark.parametrize("hopeless", [False, True])
@pytest.mark.parametrize(
    ("order", "found", "after", "word"),
    [
        (ONLY_ZEROS, Found.LENT, LATE_ZEROED, Word.LATE_AND_ZERO),
        (LATE, Found.LENT, LATE, None),
        (LATE_ZEROED, Found.LENT, LATE_ZEROED, None),
        (ONLY_ZEROS, Found.LENT_ZEROS, ONLY_ZEROS, Word.ZEROS),
        (LATE, Found.LENT_ZEROS, LATE_ZEROED, None),
        (LATE_ZEROED, Found.LENT_ZEROS, LATE_ZEROED, Word.ZEROS),
    ],
)
def test_the_optimizers_gradients_are_lent(
    order: Order, found: Found, after: Order, word: Word | None, stepped: bool, hopeless: bool
) -> None:
    assert verdict(order, found, stepped=stepped, hopeless=hopeless) == Verdict(after, word)


@pytest.mark.parametrize("stepped", [False, True])
@pytest.mark.parametrize("hopeless", [False, True])
@pytest.mark.parametrize(
    ("order", "found", "after", "word", "may_give_up"),
    [
        (IN_TIME, Found.ZEROS, ONLY_ZEROS, None, False),
        (ONLY_ZEROS, Found.ZEROS, ONLY_ZEROS, None, True),
        (LATE, Found.ZEROS, LATE_ZEROED, None, False),
        (LATE_ZEROED, Found.ZEROS, LATE_ZEROED, None, True),
        (IN_TIME, Found.NOTHING, LATE, Word.LATE, False),
        (ONLY_ZEROS, Found.NOTHING, LATE_ZEROED, Word.LATE, True),
        (LATE, Found.NOTHING, LATE, Word.LATE, True),
        (LATE_ZEROED, Found.NOTHING, LATE_ZEROED, Word.LATE, True),
    ],
)
def test_nothing_can_be_lent(
    order: Order, found: Found, after: Order, word: Word | None, may_give_up: bool, stepped: bool, hopeless: bool
) -> None:
    expected = Verdict(after, word, gives_up=may_give_up and hopeless)
    assert verdict(order, found, stepped=stepped, hopeless=hopeless) == expected


def test_copies_are_kept_where_zero_grad_writes_zeros() -> None:
    assert {order for order in Order if order.copies} == {ONLY_ZEROS, LATE_ZEROED}


def test_the_table_needs_no_torch() -> None:
    program = "import sys, peft_gradguard.late.order; print('torch' in sys.modules)"
    found = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert found.stdout == "False\n"
