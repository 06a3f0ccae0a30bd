"""What the environment says, and what is said of it where it is not understood."""

from __future__ import annotations

import sys
import types
import warnings
from typing import TYPE_CHECKING

import pytest

from peft_gradguard.settings import read_exclusions, read_fused, read_switch

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping


@pytest.mark.parametrize(
    ("value", "meaning"),
    [("1", True), (" True ", True), ("YES", True), ("on", True), ("0", False), ("false", False), ("No", False),
     (" off", False), ("", None), ("  ", None)],
)  # fmt: skip
def test_switch(value: str, meaning: bool | None) -> None:
    assert read_switch({"PEFT_GRADGUARD": value}) is meaning
    assert read_fused({"PEFT_GRADGUARD_FUSED": value}) is (meaning is not False)


def test_nothing_is_set() -> None:
    assert read_switch({}) is None
    assert read_fused({})
    assert read_exclusions({}) == ()


@pytest.mark.parametrize(
    ("value", "patterns"), [("", ()), (" , ", ()), ("*.q.*", ("*.q.*",)), (" a b ,,*.k.* ", ("a b", "*.k.*"))]
)
def test_exclusions(value: str, patterns: tuple[str, ...]) -> None:
    assert read_exclusions({"PEFT_GRADGUARD_EXCLUDE": value}) == patterns


@pytest.mark.parametrize(
    ("read", "name", "meaning"), [(read_switch, "PEFT_GRADGUARD", None), (read_fused, "PEFT_GRADGUARD_FUSED", True)]
)
def test_nonsense_is_named_where_it_was_asked_for(
    read: Callable[[Mapping[str, str]], bool | None], name: str, meaning: bool | None
) -> None:
    with pytest.warns(
        RuntimeWarning, match=f"{name}='Maybe' is not understood and is ignored: set it to one of 1, "
    ) as said:
        assert read({name: "Maybe"}) is meaning
    assert [warning.filename for warning in said] == [__file__]


@pytest.mark.parametrize(("read", "name"), [(read_switch, "PEFT_GRADGUARD"), (read_fused, "PEFT_GRADGUARD_FUSED")])
def test_nonsense_stops_nothing_where_warnings_are_errors(
    read: Callable[[Mapping[str, str]], bool | None], name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        read({name: "maybe"})
    assert capsys.readouterr().err.startswith(f"peft_gradguard: {name}='maybe' is not understood")


@pytest.mark.parametrize(("value", "again"), [("a", True), ("b", False), ("B", True), ("c", True)])
def test_what_start_up_code_has_named_is_not_named_again(
    value: str, again: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "_peft_gradguard_start", types.SimpleNamespace(warned_of="b"))
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        assert read_switch({"PEFT_GRADGUARD": value}) is None
    assert len(said) == again


def test_a_warning_that_cannot_be_shown_stops_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*_: object, **__: object) -> None:
        raise ValueError("I/O operation on closed file")

    monkeypatch.setattr(warnings, "warn", fails)
    monkeypatch.setattr(sys, "stderr", types.SimpleNamespace(write=fails))
    assert read_switch({"PEFT_GRADGUARD": "maybe"}) is None
