"""What ``peft-gradguard status`` looks at, in this process."""

from __future__ import annotations

import functools
import json
import sys
from importlib import metadata
from types import ModuleType
from typing import TYPE_CHECKING, Any

import wrapt
from peft.tuners.adalora import RankAllocator

from peft_gradguard import switch, wrapper
from peft_gradguard.cli import probe

if TYPE_CHECKING:
    from collections.abc import Callable

    import pytest

IMPORTED = "import peft_gradguard in somebody's start-up code"


def test_look_in_this_process(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = probe.look()
    assert list(seen) == ["versions", "ways_in", "enabled", "methods", "needs_guard"]
    assert (seen["enabled"], seen["needs_guard"], seen["ways_in"]) == (True, True, [IMPORTED])
    assert seen["methods"] == {name: {"guarded": True, "others": []} for name in wrapper.METHODS}
    with switch.disabled():
        assert probe.look()["enabled"] is False
    monkeypatch.delitem(sys.modules, "peft_gradguard.switch")
    without = probe.look()
    assert (without["enabled"], list(without["methods"])) == (False, list(wrapper.METHODS)), "on and off the same"


def test_peft_that_cannot_be_imported(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "peft.tuners.adalora", None)
    seen = probe.look()
    assert list(seen) == ["versions", "error", "ways_in"]
    assert seen["error"].startswith("peft.tuners.adalora cannot be imported (ModuleNotFoundError: ")
    assert seen["ways_in"] == [IMPORTED]


class Odd(ModuleType):
    @property
    def RankAllocator(self) -> None:  # noqa: N802
        raise RuntimeError("in\ntwo lines")


def test_error_of_two_lines_is_told_in_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "peft.tuners.adalora", Odd("peft.tuners.adalora"))
    assert probe.look()["error"] == "peft.tuners.adalora cannot be imported (RuntimeError: in"


def test_ways_in(monkeypatch: pytest.MonkeyPatch) -> None:
    assert probe.ways_in() == [IMPORTED]
    for groups, way in {
        "peft_gradguard": "autowrapt", "ddtrace, peft_gradguard ": "autowrapt", "ddtrace": IMPORTED, "": IMPORTED,
    }.items():  # fmt: skip
        monkeypatch.setitem(sys.modules, "autowrapt", ModuleType("autowrapt"))
        monkeypatch.setenv("AUTOWRAPT_BOOTSTRAP", groups)
        assert probe.ways_in() == [way]
        monkeypatch.delitem(sys.modules, "autowrapt")
        assert probe.ways_in() == [IMPORTED]
    start = ModuleType("_peft_gradguard_start")
    monkeypatch.setitem(sys.modules, "_peft_gradguard_start", start)
    assert probe.ways_in() == [IMPORTED]
    start.ways = [".pth", "sitecustomize"]  # type: ignore[attr-defined]
    assert probe.ways_in() == [".pth", "sitecustomize"]
    monkeypatch.delitem(sys.modules, "peft_gradguard")
    assert probe.ways_in() == [".pth", "sitecustomize"]
    start.ways = []  # type: ignore[attr-defined]
    assert probe.ways_in() == []


def around(method: Callable[..., Any]) -> Callable[..., Any]:
    return functools.wraps(method)(lambda *arguments: method(*arguments))


class Counting:
    """A wrapper that is no function."""

    def __init__(self, wrapped: Callable[..., Any]) -> None:
        functools.update_wrapper(self, wrapped)


def test_wrappers_of_a_guarded_method() -> None:
    guarded = vars(RankAllocator)["update_ipt"]
    assert probe.wrappers(guarded) == {"guarded": True, "others": []}
    # What somebody else wraps is the method as it is got from the class.
    for method in (guarded, RankAllocator.update_ipt):
        assert probe.wrappers(around(method)) == {"guarded": True, "others": [__name__]}
        assert probe.wrappers(around(around(method))) == {"guarded": True, "others": [__name__] * 2}
    assert probe.wrappers(wrapt.FunctionWrapper(guarded, json.dumps)) == {"guarded": True, "others": ["json"]}
    assert probe.wrappers(Counting(guarded)) == {"guarded": True, "others": [__name__]}
    plain = probe.innermost(guarded)
    assert plain.__module__.startswith("peft.")
    assert probe.innermost(around(guarded)) is plain
    assert probe.wrappers(plain) == {"guarded": False, "others": []}
    assert probe.wrappers(wrapt.FunctionWrapper(plain, json.dumps)) == {"guarded": False, "others": ["json"]}
    assert probe.wrappers(Counting(plain)) == {"guarded": False, "others": [__name__]}
    assert probe.wrappers(around(plain)) == {"guarded": False, "others": [__name__]}
    assert probe.wrappers(None) == {"guarded": False, "others": []}


def test_origin() -> None:
    def other(wrapped: Any, instance: Any, args: Any, kwargs: Any) -> Any:
        raise AssertionError

    assert probe.origin(around(probe.innermost(RankAllocator.update_ipt))) == __name__
    assert probe.origin(wrapt.FunctionWrapper(json.dumps, other)) == __name__
    assert probe.origin(json.dumps) == "json"
    namespace: dict[str, Any] = {}
    exec(compile("def typed(): pass", "<typed in>", "exec"), namespace)
    assert probe.origin(namespace["typed"]) == "<typed in>"
    assert probe.origin(len) == "builtins"


def raises(error: type[Exception]) -> Callable[..., None]:
    def update_ipt(allocator: Any, model: Any) -> None:
        assert isinstance(allocator, RankAllocator)
        assert [name for name, _ in model.named_parameters() if "lora_" in name]
        raise error

    return update_ipt


def test_fails_without_gradient(monkeypatch: pytest.MonkeyPatch) -> None:
    assert probe.fails_without_gradient(probe.innermost(RankAllocator.update_ipt)) is True
    assert probe.fails_without_gradient(raises(TypeError)) is True
    assert probe.fails_without_gradient(raises(KeyError)) is None
    assert probe.fails_without_gradient(lambda allocator, model: None) is False
    monkeypatch.setitem(sys.modules, "peft", None)
    assert probe.fails_without_gradient(lambda allocator, model: None) is None


def test_versions(monkeypatch: pytest.MonkeyPatch) -> None:
    python = {"python": ".".join(map(str, sys.version_info[:3]))}
    assert probe.versions() == {**python, **{name: metadata.version(name) for name in probe.PACKAGES}}
    monkeypatch.setattr(probe, "PACKAGES", ("no-such-package", "torch"))
    assert probe.versions() == {**python, "no-such-package": None, "torch": metadata.version("torch")}
