"""``peft-gradguard status`` in this process: what is concluded from what was found, and how it is found.

What it says of whole environments: test_installed.py.
"""

from __future__ import annotations

import json
import os
import sys
from typing import TYPE_CHECKING, Any

import pytest

from peft_gradguard.cli import main as cli
from peft_gradguard.cli import status

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

METHODS = ("update_ipt", "update_and_allocate", "mask_to_budget")
IMPORTED = "import peft_gradguard in somebody's start-up code"


def found(**others: Any) -> dict[str, Any]:
    """What the probe finds where the guard is on."""
    methods = {name: {"guarded": True, "others": []} for name in METHODS}
    return {"enabled": True, "ways_in": [".pth"], "methods": methods, "needs_guard": True, "said": [], **others}


def unguarded(*names: str) -> dict[str, Any]:
    methods = {name: {"guarded": name not in names, "others": []} for name in METHODS}
    return {"methods": methods, "enabled": False}


# From what was found to a sentence


@pytest.mark.parametrize(
    ("ways_in", "why"),
    [
        ([".pth"], "loaded by .pth; RankAllocator's methods are wrapped"),
        ([".start", "sitecustomize"], "loaded by .start, sitecustomize; RankAllocator's methods are wrapped"),
    ],
)
@pytest.mark.parametrize("meaning", ["on", "unset", "off", "not understood"])
def test_what_is_on_is_on(ways_in: list[str], why: str, meaning: str) -> None:
    assert status.judge(found(ways_in=ways_in), meaning) == ("on", why)


@pytest.mark.parametrize(
    ("meaning", "why"),
    [
        ("unset", "PEFT_GRADGUARD is not set. Set it to 1, or import peft_gradguard in the program"),
        ("off", "PEFT_GRADGUARD switches it off"),
        ("not understood", "the value of PEFT_GRADGUARD is not understood. Set it to one of 1, true, yes, on"),
    ],
)
@pytest.mark.parametrize("others", [unguarded(*METHODS), {"error": "no PEFT", "methods": {}, "enabled": None}])
def test_off(meaning: str, why: str, others: dict[str, Any]) -> None:
    assert status.judge(found(ways_in=[], **others), meaning) == ("off", why)


def test_switched_off_in_spite_of_an_import_in_start_up_code() -> None:
    said = status.judge(found(ways_in=[IMPORTED], **unguarded(*METHODS)), "off")
    assert said == ("off", "PEFT_GRADGUARD switches it off")


@pytest.mark.parametrize(
    ("others", "why"),
    [
        (unguarded(*METHODS), "these methods of RankAllocator are not wrapped: " + ", ".join(METHODS)),
        # Somebody has put a method of their own in the place of one of the guarded ones.
        (
            {**unguarded("mask_to_budget"), "enabled": True},
            "these methods of RankAllocator are not wrapped: mask_to_budget",
        ),
        ({**unguarded(*METHODS), "said": ["", "peft_gradguard: why", "more"]}, "peft_gradguard: why"),
        ({"error": "no PEFT", "methods": {}, "enabled": True, "said": ["said"]}, "no PEFT"),
        (
            {**unguarded(*METHODS), "ways_in": []},
            "no start-up file has acted: the .pth file of peft_gradguard is not among those that this Python reads "
            "(install the package into its site-packages, or use peft-gradguard run)",
        ),
    ],
)  # fmt: skip
def test_on_but_not_applied(others: dict[str, Any], why: str) -> None:
    assert status.judge(found(**others), "on") == ("on but not applied", why)


@pytest.mark.parametrize("meaning", ["unset", "not understood"])
def test_start_up_code_that_imports_the_package_asks_for_it(meaning: str) -> None:
    state, why = status.judge(found(ways_in=[IMPORTED], **unguarded(*METHODS)), meaning)
    assert (state, why.partition(":")[0]) == ("on but not applied", "these methods of RankAllocator are not wrapped")


@pytest.mark.parametrize(
    ("value", "meaning"),
    [
        (None, "unset"), ("", "unset"), (" ", "unset"), ("1", "on"), (" On ", "on"), ("off", "off"), ("FALSE", "off"),
        ("perhaps", "not understood"),
    ],
)  # fmt: skip
def test_switch(value: str | None, meaning: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if value is None:
        monkeypatch.delenv("PEFT_GRADGUARD", raising=False)
        read_from = "nowhere: it is not set"
    else:
        monkeypatch.setenv("PEFT_GRADGUARD", value)
        read_from = "the environment variable PEFT_GRADGUARD"
    assert status.read_switch_as_text() == {"value": value, "read_from": read_from, "meaning": meaning}


ON = """\
peft_gradguard is on: loaded by .pth, sitecustomize.

switch         PEFT_GRADGUARD ' Yes' (on; read from the environment variable PEFT_GRADGUARD)
way in         .pth, sitecustomize
needed by PEFT yes: it fails on a parameter without gradient
RankAllocator.update_ipt: guarded, also wrapped by sitecustomize, their.tool
RankAllocator.mask_to_budget: not guarded, also wrapped by their.tool
RankAllocator.update_and_allocate: guarded
python         3.13.1
peft_gradguard 0.1.0
torch          not installed"""

OFF = """\
peft_gradguard is off: it is not set.

switch         PEFT_GRADGUARD is not set
way in         none has acted
needed by PEFT could not be found out
RankAllocator.update_ipt: not guarded"""


def test_in_words() -> None:
    on = status.Status(
        state="on",
        why="loaded by .pth, sitecustomize",
        switch={"value": " Yes", "read_from": "the environment variable PEFT_GRADGUARD", "meaning": "on"},
        ways_in=[".pth", "sitecustomize"],
        methods={
            "update_ipt": {"guarded": True, "others": ["sitecustomize", "their.tool"]},
            "mask_to_budget": {"guarded": False, "others": ["their.tool"]},
            "update_and_allocate": {"guarded": True, "others": []},
        },
        needs_guard=True,
        versions={"python": "3.13.1", "peft_gradguard": "0.1.0", "torch": None},
    )
    assert status.in_words(on) == ON
    switch = {"value": None, "read_from": "nowhere: it is not set", "meaning": "unset"}
    methods = {"update_ipt": {"guarded": False, "others": []}}
    off = status.Status("off", "it is not set", switch, [], methods, None, {})
    assert status.in_words(off) == OFF
    mended = status.Status("off", "it is not set", switch, [], methods, False, {})
    assert status.in_words(mended) == OFF.replace("could not be found out", "no")


# Asking an interpreter


@pytest.fixture
def ask(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Callable[[str], None]:
    """Let the fresh interpreter run this code instead of probe.py."""

    def replace(code: str) -> None:
        (tmp_path / "probe.py").write_text(f"import json, os, sys\n{code}\n")
        monkeypatch.setattr(status, "PROBE", str(tmp_path / "probe.py"))

    return replace


def answer(**values: Any) -> str:
    return f"print('\\n' + sys.argv[-1] + json.dumps({values!r}))"


@pytest.mark.parametrize(
    ("switch", "seen", "exit_status", "state"),
    [
        ("1", found(), 0, "on"),
        ("0", found(ways_in=[], **unguarded(*METHODS)), 1, "off"),
        ("1", found(**unguarded("mask_to_budget")), 2, "on but not applied"),
    ],
)
def test_exit_status_and_forms(
    switch: str,
    seen: dict[str, Any],
    exit_status: int,
    state: str,
    ask: Callable[[str], None],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setenv("PEFT_GRADGUARD", switch)
    ask(answer(**seen, versions={"python": "3", "torch": None}))
    assert cli.main(["status", "--json"]) == exit_status
    printed = capsys.readouterr().out
    said = json.loads(printed)
    assert printed == json.dumps(said, indent=2) + "\n"
    assert said["state"] == state
    assert said["why"]
    assert said["switch"]["value"] == switch
    same = ("ways_in", "methods", "needs_guard")
    assert {key: said[key] for key in same} == {key: seen[key] for key in same}
    assert said["versions"] == {"python": "3", "torch": None}
    assert cli.main(["status"]) == exit_status
    assert capsys.readouterr().out.startswith(f"peft_gradguard is {state}: ")


@pytest.mark.skipif(os.name == "nt", reason="pipes of POSIX")
@pytest.mark.parametrize(("switch", "exit_status"), [("1", 2), ("0", 1)])
def test_reader_who_has_gone(
    switch: str,
    exit_status: int,
    ask: Callable[[str], None],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setenv("PEFT_GRADGUARD", switch)
    ask("")
    reader, writer = os.pipe()
    os.close(reader)
    # Closing it flushes, as the interpreter does at its end.
    with open(writer, "w") as pipe, monkeypatch.context() as patched:
        patched.setattr(sys, "stdout", pipe)
        assert cli.main(["status"]) == exit_status
    assert capsys.readouterr() == ("", "")


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="no /dev/full here")
def test_full_disk(
    ask: Callable[[str], None], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    ask(answer(**found()))
    with open("/dev/full", "w") as full, monkeypatch.context() as patched:
        patched.setattr(sys, "stdout", full)
        assert cli.main(["status"]) == 2
    assert capsys.readouterr() == ("", "peft-gradguard: status: stdout: No space left on device\n")


def test_answer_among_other_lines(ask: Callable[[str], None]) -> None:
    noise = "for stream in (sys.stdout, sys.stderr): print('noise\\npeft_gradguard: said', file=stream)\n"
    noise += "os.write(1, b'\\xff\\n'); sys.stdout.flush(); print('end', end='')\n"
    ask(f"{noise}{answer(enabled=True)}\nprint(sys.argv[-1] + 'too late')")
    assert status.probe() == {"enabled": True, "said": ["peft_gradguard: said"]}


@pytest.mark.parametrize(
    ("code", "last"),
    [
        ("sys.exit(3)", "it ended with status 3"),
        ("print('first', file=sys.stderr); raise RuntimeError('last')", "RuntimeError: last"),
        ("print('no answer')", "it ended with status 0"),
    ],
)
def test_interpreter_that_cannot_be_asked(code: str, last: str, ask: Callable[[str], None]) -> None:
    ask(code)
    assert status.probe() == {"error": f"a fresh interpreter could not be asked: {last}"}
    said = status.find_status()
    assert (said.ways_in, said.methods, said.needs_guard) == ([], {}, None)
    assert said.versions == {"python": sys.version.split()[0]}
