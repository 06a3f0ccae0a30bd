"""``peft-gradguard status``: whether the guard is on for a Python started here, and why (not).

A fresh interpreter is asked (``probe.py``), because importing this very module may switch the guard on.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import asdict, dataclass
from typing import Any, Literal

from ..settings import OFF, ON, SWITCH

State = Literal["on", "off", "on but not applied"]

EXIT_STATUS: dict[State, int] = {"on": 0, "off": 1, "on but not applied": 2}

PROBE = os.path.join(os.path.dirname(os.path.abspath(__file__)), "probe.py")

MARK = "peft_gradguard probe: "
"""What the probe's own line begins with, so that it can be told from what other start-up code prints."""


@dataclass(frozen=True)
class Status:
    """What ``peft-gradguard status`` says."""

    state: State
    why: str
    switch: dict[str, str | None]
    """``value``, ``read_from`` (where the value was read) and ``meaning``."""
    ways_in: list[str]
    """Which way in acted in the fresh interpreter."""
    methods: dict[str, dict[str, Any]]
    """For each method of ``RankAllocator``: ``guarded``, and ``others``, by whom else it is wrapped or replaced."""
    needs_guard: bool | None
    """Whether this PEFT fails on a parameter without gradient; None where that could not be found out."""
    versions: dict[str, str | None]
    """By package, and python; None for what is not installed."""


def report(as_json: bool) -> tuple[str, int]:
    """Return what to print, and the exit status: 0 on, 1 off, 2 on but not applied."""
    status = find_status()
    return json.dumps(asdict(status), indent=2) if as_json else in_words(status), EXIT_STATUS[status.state]


def find_status() -> Status:
    """Ask a fresh interpreter, and judge its answers."""
    found = probe()
    switch = read_switch_as_text()
    state, why = judge(found, switch["meaning"])
    return Status(
        state=state,
        why=why,
        switch=switch,
        ways_in=found.get("ways_in", []),
        methods=found.get("methods", {}),
        needs_guard=found.get("needs_guard"),
        versions=found.get("versions", {"python": sys.version.split()[0]}),
    )


def probe() -> dict[str, Any]:
    """Return what a fresh interpreter says of itself, or only ``error``."""
    # run_path leaves sys.path alone. A script's own folder on it would hide modules of the names that the package uses.
    code = "import runpy, sys; runpy.run_path(sys.argv[1], run_name='__main__')"
    ran = subprocess.run([sys.executable, "-c", code, PROBE, MARK], capture_output=True, text=True, errors="replace")
    for line in ran.stdout.splitlines():
        if line.startswith(MARK):
            answer: dict[str, Any] = json.loads(line.removeprefix(MARK))
            return {**answer, "said": _own_lines(ran.stderr)}
    last = ran.stderr.strip().splitlines()[-1:] or [f"it ended with status {ran.returncode}"]
    return {"error": f"a fresh interpreter could not be asked: {last[0]}"}


def _own_lines(stderr: str) -> list[str]:
    return [line for line in stderr.splitlines() if line.startswith("peft_gradguard")]


def read_switch_as_text() -> dict[str, str | None]:
    """Return the switch's value, where it was read, and what it means."""
    value = os.environ.get(SWITCH)
    word = (value or "").strip().lower()
    meanings = {"": "unset", **dict.fromkeys(ON, "on"), **dict.fromkeys(OFF, "off")}
    read_from = "nowhere: it is not set" if value is None else f"the environment variable {SWITCH}"
    return {"value": value, "read_from": read_from, "meaning": meanings.get(word, "not understood")}


def judge(found: dict[str, Any], meaning: str | None) -> tuple[State, str]:
    """Return the state, and why it is so, in a sentence."""
    methods = found.get("methods", {})
    if found.get("enabled") and methods and all(method["guarded"] for method in methods.values()):
        return "on", f"loaded by {', '.join(found['ways_in'])}; RankAllocator's methods are wrapped"
    if meaning == "off":
        # Start-up code that imports the package has acted too, and wraps nothing then.
        return "off", f"{SWITCH} switches it off"
    if meaning != "on" and not found.get("ways_in"):
        if meaning == "not understood":
            return "off", f"the value of {SWITCH} is not understood. Set it to one of {', '.join(ON)}"
        return "off", f"{SWITCH} is not set. Set it to 1, or import peft_gradguard in the program"
    return "on but not applied", _why_not_applied(found)


def _why_not_applied(found: dict[str, Any]) -> str:
    for reason in (found.get("error"), *found.get("said", [])):
        if reason:
            return str(reason)
    if not found["ways_in"]:
        return (
            "no start-up file has acted: the .pth file of peft_gradguard is not among those that this Python reads "
            "(install the package into its site-packages, or use peft-gradguard run)"
        )
    missing = [name for name, method in found["methods"].items() if not method["guarded"]]
    return f"these methods of RankAllocator are not wrapped: {', '.join(missing)}"


def in_words(status: Status) -> str:
    """Return the status as a few lines of text."""
    lines = [f"peft_gradguard is {status.state}: {status.why}.", ""]
    value, meaning, read_from = (status.switch[key] for key in ("value", "meaning", "read_from"))
    said = "is not set" if value is None else f"{value!r} ({meaning}; read from {read_from})"
    lines.append(f"switch         {SWITCH} {said}")
    lines.append(f"way in         {', '.join(status.ways_in) or 'none has acted'}")
    needs = {True: "yes: it fails on a parameter without gradient", False: "no", None: "could not be found out"}
    lines.append(f"needed by PEFT {needs[status.needs_guard]}")
    for name, method in status.methods.items():
        lines.append(f"RankAllocator.{name}: {_of_method(method)}")
    lines += [f"{name:<14} {version or 'not installed'}" for name, version in status.versions.items()]
    return "\n".join(lines)


def _of_method(method: dict[str, Any]) -> str:
    guarded = "guarded" if method["guarded"] else "not guarded"
    return f"{guarded}, also wrapped by {', '.join(method['others'])}" if method["others"] else guarded
