"""Mutation testing with cosmic-ray: does a test notice each small change of the package?

``make mutants`` changes every file; ``python tests/mutants.py rules/ranking.py settings.py`` some. ``make
coverage`` comes first: it tells which tests run a line, and how long they take. A mutant gets the tests of its line:
those of its own room, and some of the others, the quickest first. ``python tests/mutants.py --on`` goes on where it was
interrupted.

Two copies of the project under ``.mutants`` work side by side. Each has a process that has imported torch, transformers
and PEFT, and forks for each mutant; so a mutant costs its tests and not the imports. A survivor is a change that no
test noticed.
"""

from __future__ import annotations

import ast
import contextlib
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
import xml.etree.ElementTree as ET
import zlib
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from itertools import accumulate, zip_longest
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterable

ROOT = Path(__file__).resolve().parent.parent
FOLDER = ROOT / ".mutants"
SOCKET = "mutants.sock"
COVERAGE = (".coverage", ".durations.xml")
WORKERS = 2
LONGEST = 900
"""Seconds until a mutant counts as noticed, because it hangs."""
OWN, OTHERS = 60, 25
"""Seconds of tests, as measured by ``make coverage``, of the mutant's own room and of the others: what only later ones
would notice counts as a survivor."""

CORE = ("model", "late", "rules", "whole/test_oracle.py", "whole/test_scenarios.py")
"""What shows most changes: rooms of the tests, and single files."""
START = ("autoload", "cli")
"""What shows how the guard comes in: the single files at the top of the package have these too."""
OUTSIDE = (*START, "integrations", "report")
"""Rooms of the package that no training goes through: their own tests alone see what changes there."""

WHOLE = ("stacks/test_ddp", "stacks/test_deepspeed", "stacks/test_fsdp", "test_docs")
"""Files whose tests share what was run once: a line that one of them runs has the whole file."""

UNSEEN = ("TYPE_CHECKING", "strict=True", "CHUNK", ", *, ")
"""What only a type checker, a broken invariant or a clock would see: lines with it are not changed."""

# Annotations are never run (BitOr), and `is` instead of `==` on short strings or None changes nothing in CPython.
LEFT_OUT = ["core/ReplaceBinaryOperator_.*BitOr.*", "core/ReplaceComparisonOperator_.*_Is(Not)?$",
            "core/ReplaceComparisonOperator_Is_(Eq|LtE|GtE|Lt|Gt|NotEq)$",
            "core/ReplaceComparisonOperator_IsNot_(Eq|LtE|GtE|Lt|Gt|NotEq)$"]  # fmt: skip

CONFIGURATION = """
[cosmic-ray]
module-path = {modules}
timeout = {timeout}.0
excluded-modules = []
test-command = "{python} tests/mutants.py --ask"
[cosmic-ray.distributor]
name = "local"
[cosmic-ray.filters.operators-filter]
exclude-operators = {left_out}
"""


def copy(number: int) -> Path:
    """Copy what git knows of, and what is new, into a folder of its own."""
    folder = FOLDER / str(number)
    shutil.rmtree(folder, ignore_errors=True)
    listed = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard"], cwd=ROOT, capture_output=True, text=True
    )
    for name in (*listed.stdout.splitlines(), *COVERAGE):
        if (ROOT / name).is_file():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, folder / name)
    return folder


def mutate(number: int, modules: list[str] | None) -> Path:
    """Try this worker's part of the mutants of these modules, and return cosmic-ray's session."""
    folder = copy(number)
    session = FOLDER / f"{number}.sqlite"
    environ = {
        **os.environ, "PYTHONPATH": str(folder), "PYTHONDONTWRITEBYTECODE": "1", "OMP_NUM_THREADS": "1",
        "HF_HUB_OFFLINE": "1",
    }  # fmt: skip

    def call(tool: str, *arguments: object) -> None:
        command = [Path(sys.executable).parent / tool, *map(str, arguments)]
        subprocess.run(command, cwd=folder, env=environ, check=True)

    if modules is not None:
        session.unlink(missing_ok=True)
        (FOLDER / "mutants.toml").write_text(
            CONFIGURATION.format(modules=modules, timeout=LONGEST + 60, python=sys.executable, left_out=LEFT_OUT)
        )
        call("cosmic-ray", "init", FOLDER / "mutants.toml", session)
        call("cr-filter-operators", session, FOLDER / "mutants.toml")
        leave_out(session, folder, number)
    with subprocess.Popen([sys.executable, "tests/mutants.py", "--serve"], cwd=folder, env=environ) as server:
        try:
            while not (folder / SOCKET).exists():
                time.sleep(0.5)
            call("cosmic-ray", "exec", FOLDER / "mutants.toml", session)
        finally:
            server.terminate()
    return session


def leave_out(session: Path, folder: Path, number: int) -> None:
    """Leave out what the other workers try, and what no test could see."""
    from cosmic_ray.work_db import WorkDB, use_db
    from cosmic_ray.work_item import WorkerOutcome, WorkResult

    with use_db(str(session), WorkDB.Mode.open) as database:
        for item in list(database.pending_work_items):
            (mutation,) = item.mutations
            name = f"{mutation.module_path} {mutation.operator_name} {mutation.occurrence}"
            others = zlib.crc32(name.encode()) % WORKERS != number
            line = (folder / mutation.module_path).read_text().splitlines()[mutation.start_pos[0] - 1]
            if others or any(part in line for part in UNSEEN):
                database.set_result(item.job_id, WorkResult(worker_outcome=WorkerOutcome.SKIPPED, output="left out"))


def serve() -> None:
    """Answer each request by running the tests of the line that is changed now, in a fork."""
    import hypothesis  # noqa: F401
    import matplotlib.pyplot  # noqa: F401
    import peft.tuners.adalora  # noqa: F401
    import pytest  # noqa: F401
    import torch
    import transformers  # noqa: F401

    torch.set_num_threads(1)
    sys.path.insert(0, os.getcwd())
    before = {path: path.read_text() for path in Path("peft_gradguard").rglob("*.py")}
    with socket.socket(socket.AF_UNIX) as listening:
        listening.bind(SOCKET)
        listening.listen()
        while True:
            connection, _ = listening.accept()
            with connection:
                tests = [test for path, text in before.items() for test in tests_for(path, text)]
                began, status = time.monotonic(), in_fork(tests)
                print(f"{len(tests)} tests, {time.monotonic() - began:.1f} s, status {status}, {tests[:3]}", flush=True)
                # Whoever asked may have given up meanwhile.
                with contextlib.suppress(OSError):
                    connection.sendall(str(status).encode())


def tests_for(path: Path, before: str) -> list[str]:
    """Choose the tests for what is changed in this file now; none if nothing is."""
    lines, now = before.splitlines(), path.read_text().splitlines()
    if lines == now:
        return []
    changed = next(number for number, pair in enumerate(zip_longest(lines, now), 1) if pair[0] != pair[1])
    ran = contexts(str(path))
    chosen = {test for line in statement(before, changed) for test in ran.get(line, ())} or {*tests_beside(path)}
    room = tuple(f"tests/{name}" for name in (f"{path.parts[1]}/", f"test_{path.parts[1]}"))
    own = {test for test in chosen if test.startswith(room)}
    return [*quickest(own, OWN), *quickest(chosen - own, OTHERS)]


def quickest(tests: Iterable[str], room: float) -> list[str]:
    """Return the quickest of these tests, as many as take so many seconds together, but three at least."""
    seconds = durations()
    found = sorted(tests, key=lambda test: (seconds[test], test))
    together = accumulate(seconds[test] for test in found)
    return [
        test for number, (test, total) in enumerate(zip(found, together, strict=True)) if number < 3 or total < room
    ]


def tests_beside(path: Path) -> list[str]:
    """Return the test files for what runs at import, in no test: those of the room, and the core."""
    room = path.parent.relative_to("peft_gradguard").as_posix()
    places = [room] if room in OUTSIDE else [room, *(START if room == "." else ()), *CORE]
    found = [file for place in places for file in files_in(Path("tests") / place)]
    return list(dict.fromkeys(file.as_posix() for file in found))


def files_in(place: Path) -> list[Path]:
    return [place] if place.suffix else sorted(place.glob("test_*.py"))


def statement(text: str, line: int) -> set[int]:
    """Return the lines of the innermost statement that holds this one, for a function's head those of its body.

    There are none for what is not inside of a function.
    """
    spans = []
    for function in ast.walk(ast.parse(text)):
        if isinstance(function, ast.FunctionDef):
            first = min(node.lineno for node in (function, *function.decorator_list))
            spans.append((first, function.end_lineno or 0))
            spans += [
                (node.lineno, node.end_lineno or 0)
                for node in ast.walk(function) if isinstance(node, ast.stmt) and node is not function
            ]  # fmt: skip
    holding = [span for span in spans if span[0] <= line <= span[1]]
    first, last = min(holding, key=lambda span: span[1] - span[0], default=(1, 0))
    return set(range(first, last + 1))


@cache
def contexts(path: str) -> dict[int, set[str]]:
    """Return, for each line of this file, the tests that ran it in ``make coverage``."""
    from coverage import CoverageData

    data = CoverageData(str(ROOT / ".coverage"))
    data.read()
    (name,) = [name for name in data.measured_files() if name.endswith(f"/{path}") or name == path]
    return {
        line: {as_test(context) for context in found} - {""} for line, found in data.contexts_by_lineno(name).items()
    }


def as_test(context: str) -> str:
    """Turn coverage's name of a test, or pytest's with its parameters and phase, into one that selects it."""
    found = re.match(r"tests/([\w/]+)\.py::(\w+)|tests\.([\w.]+)\.(test_\w+)$", context)
    if not found:
        return ""
    file, name = filter(None, found.groups())
    file = file.replace(".", "/")
    return f"tests/{file}.py" if file in WHOLE else f"tests/{file}.py::{name}"


@cache
def durations() -> Counter[str]:
    """Return the seconds of each test, all its parameters together, and of each file, in ``make coverage``."""
    seconds: Counter[str] = Counter()
    for case in ET.parse(ROOT / ".durations.xml").iter("testcase"):
        file = f"{case.attrib['classname'].replace('.', '/')}.py"
        for name in (file, f"{file}::{case.attrib['name'].split('[')[0]}"):
            seconds[name] += float(case.attrib["time"])  # type: ignore[assignment]
    return seconds


def in_fork(tests: list[str]) -> int:
    child = os.fork()
    if child == 0:
        os.setsid()
        os._exit(run(tests))
    for _ in range(LONGEST * 10):
        done, status = os.waitpid(child, os.WNOHANG)
        if done:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.1)
    os.killpg(child, signal.SIGKILL)
    os.waitpid(child, 0)
    return 124


def run(tests: list[str]) -> int:
    import pytest

    if not tests:
        return 0
    quiet = os.open(os.devnull, os.O_WRONLY)
    for stream in (1, 2):
        os.dup2(quiet, stream)
    options = ["-x", "-q", "--assert=plain", "--hypothesis-profile=quick", "-p", "no:cacheprovider", "-p", "no:xdist"]
    return int(pytest.main([*options, *tests]))


def ask() -> int:
    """Return the status of the tests; that of success where nobody answers, so that no mutant counts as noticed."""
    try:
        with socket.socket(socket.AF_UNIX) as connection:
            connection.connect(SOCKET)
            return abs(int(connection.recv(16)))
    except (OSError, ValueError):
        return 0


def main(names: list[str]) -> int:
    missing = [name for name in COVERAGE if not (ROOT / name).exists()]
    if missing:
        print(f"{' and '.join(missing)} are not there: which tests run a line comes from `make coverage`.")
        return 1
    package = ROOT / "peft_gradguard"
    every = {str(path.relative_to(package)): str(path.relative_to(ROOT)) for path in sorted(package.rglob("*.py"))}
    on = names == ["--on"]
    unknown = [name for name in names if name not in every and not on]
    if unknown:
        print(f"No file of the package is called {', '.join(unknown)}.")
        return 1
    chosen = None if on else [every[name] for name in names or every]
    FOLDER.mkdir(exist_ok=True)
    with ThreadPoolExecutor(WORKERS) as pool:
        sessions = list(pool.map(mutate, range(WORKERS), [chosen] * WORKERS))
    report(sessions)
    return 0


def report(sessions: list[Path]) -> None:
    from cosmic_ray.work_db import WorkDB, use_db
    from cosmic_ray.work_item import WorkerOutcome

    killed = tried = 0
    for session in sessions:
        with use_db(str(session), WorkDB.Mode.open) as database:
            for item, result in database.completed_work_items:
                if result.worker_outcome == WorkerOutcome.SKIPPED:
                    continue
                tried += 1
                killed += result.is_killed
                if not result.is_killed:
                    (mutation,) = item.mutations
                    print(f"{mutation.module_path}:{mutation.start_pos[0]} {mutation.operator_name}\n{result.diff}")
    print(f"{killed} of {tried} mutants noticed ({killed / max(tried, 1):.1%})")


if __name__ == "__main__":
    if sys.argv[1:] == ["--serve"]:
        serve()
    elif sys.argv[1:] == ["--ask"]:
        sys.exit(ask())
    else:
        sys.exit(main(sys.argv[1:]))
