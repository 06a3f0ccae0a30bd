"""Switched off, the guard lets PEFT do as it does."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
from fresh import python
from scenarios import frozen
from steps import advance, new_model

import peft_gradguard

if TYPE_CHECKING:
    import peft


@pytest.fixture
def model() -> peft.PeftModel:
    return new_model()


@pytest.mark.peft
def test_switched_off_guard_lets_peft_fail_as_it_does(model: peft.PeftModel) -> None:
    frozen("trunk.0")(model, 0)
    with peft_gradguard.disabled(), pytest.raises(TypeError, match="'Parameter' and 'NoneType'"):
        advance(model, 1)
    advance(model, 1)


def test_disabled_block_gives_back_what_was_before() -> None:
    states, _ = python("""
        import peft_gradguard as guard
        states = [guard.is_enabled()]
        with guard.disabled():
            states.append(guard.is_enabled())
            with guard.disabled():
                pass
            states.append(guard.is_enabled())
        states.append(guard.is_enabled())
        guard.disable()
        try:
            with guard.disabled():
                1 / 0
        except ZeroDivisionError:
            states.append(guard.is_enabled())
        print(json.dumps(states))
    """)
    assert states == [True, False, False, True, False]


def test_blocks_may_overlap_in_any_order() -> None:
    states, _ = python("""
        import peft_gradguard as guard
        states = []
        for first in (0, 1):
            blocks = guard.disabled(), guard.disabled()
            for block in blocks:
                block.__enter__()
            for block in (blocks[first], blocks[1 - first]):
                states.append(guard.is_enabled())
                block.__exit__(None, None, None)
            states.append(guard.is_enabled())
        print(json.dumps(states))
    """)
    assert states == [False, False, True] * 2


def test_enable_and_disable_inside_of_a_block_mean_what_they_say() -> None:
    states, _ = python("""
        import peft_gradguard as guard
        states = []
        with guard.disabled():
            guard.enable()
            states.append(guard.is_enabled())
        states.append(guard.is_enabled())
        with guard.disabled():
            guard.disable()
        states.append(guard.is_enabled())
        print(json.dumps(states))
    """)
    assert states == [True, True, False]
