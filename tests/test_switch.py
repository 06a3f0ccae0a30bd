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
