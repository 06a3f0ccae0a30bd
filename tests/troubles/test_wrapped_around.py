"""Methods that somebody wraps around the guarded ones: the guard runs inside of them, so nothing is said."""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING, Any

import pytest
from peft.tuners.adalora import RankAllocator
from scenarios import FINALISING
from steps import advance, new_model

if TYPE_CHECKING:
    from collections.abc import Callable

pytestmark = [pytest.mark.peft]


def in_a_closure(method: Any) -> Any:
    def around(self: RankAllocator, *args: Any, **kwargs: Any) -> Any:
        return method(self, *args, **kwargs)

    return around


def as_a_default(method: Any) -> Any:
    def around(self: RankAllocator, *args: Any, _method: Any = method, **kwargs: Any) -> Any:
        return _method(self, *args, **kwargs)

    return around


@pytest.mark.parametrize("name", ["update_ipt", "update_and_allocate", "budget_schedule", "mask_to_budget"])
@pytest.mark.parametrize("wrap", [in_a_closure, as_a_default, functools.partialmethod], ids=lambda wrap: wrap.__name__)
def test_nothing_is_said_of_a_wrapper_around_a_guarded_method(
    wrap: Callable[[Any], Any], name: str, said: Callable[[], list[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(RankAllocator, name, wrap(vars(RankAllocator)[name]))
    model = new_model()
    advance(model, *range(1, FINALISING + 1))
    assert model.peft_config["default"].rank_pattern
    assert not [message for message in said() if "was assigned" in message]
