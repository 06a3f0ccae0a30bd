"""Mutation testing with cosmic-ray: does a test notice each small change of the package?

``make mutants`` changes every file; ``python tests/mutants.py ranking.py gradients.py`` some. Two copies of the project
under ``.mutants`` work side by side. Each has a process that has imported torch, transformers and PEFT, and forks for
each mutant; so a mutant costs its tests and not the imports. A survivor is a change that no test noticed.
"""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
FOLDER = ROOT / ".mutants"
SOCKET = "mutants.sock"
WORKERS = 2
LONGEST = 900
"""Seconds until a mutant counts as noticed, because it hangs."""

CORE = (
    "test_parameters test_rules test_oracle test_exclusions test_late_calls test_overflow test_fused test_scenarios "
    "test_equivalence"
)
START = "test_lifecycle test_autoload"
TESTS = {
    **dict.fromkeys(("hooks", "__init__", "errors"), f"test_lifecycle {CORE} test_autoload"),
    **dict.fromkeys(("settings",), f"{START} test_exclusions test_fused test_report"),
    **dict.fromkeys(("__main__", "probe", "status", "sitecustomize", "_peft_gradguard_start"), START),
    "cli": f"test_inspect {START}",
    **dict.fromkeys(("shards", "zero"), f"test_fsdp test_deepspeed {CORE}"),
    **dict.fromkeys(("fused", "together", "replaced"), f"test_fused {CORE}"),
    **dict.fromkeys(("undo", "log"), f"test_hostile {CORE}"),
    "late": f"test_late_calls {CORE}",
    "exclusions": f"test_exclusions {CORE}",
    "walk": f"test_walk {CORE}",
    "uncalled": f"test_clients {CORE}",
    **dict.fromkeys(
        ("reports", "audit", "advice", "importance", "counts", "sections", "tables", "layers"),
        "test_report test_plots test_inspect test_callback",
    ),
    "saved": "test_inspect",
    "plots": "test_plots test_inspect",
    "transformers": "test_callback",
    "overlap": f"test_rules {CORE}",
}
"""The tests for each file, those that are likely to notice first; every other file has those of ``CORE``."""

UNSEEN = ("TYPE_CHECKING", "strict=True")
"""What only a type checker or a broken invariant would see: lines with it are not changed."""

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
    for name in listed.stdout.splitlines():
        if (ROOT / name).is_file():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, folder / name)
    return folder


def mutate(number: int, modules: list[str]) -> Path:
    """Try every mutant of these modules, and return cosmic-ray's session."""
    folder = copy(number)
    session = FOLDER / f"{number}.sqlite"
    session.unlink(missing_ok=True)
    (folder / "mutants.toml").write_text(
        CONFIGURATION.format(modules=modules, timeout=LONGEST + 60, python=sys.executable, left_out=LEFT_OUT)
    )
    environ = {
        **os.environ, "PYTHONPATH": str(folder), "PYTHONDONTWRITEBYTECODE": "1", "OMP_NUM_THREADS": "1",
        "HF_HUB_OFFLINE": "1",
    }  # fmt: skip
    with subprocess.Popen([sys.executable, "tests/mutants.py", "--serve"], cwd=folder, env=environ) as server:
        try:
            while not (folder / SOCKET).exists():
                time.sleep(0.5)
            for tool, *arguments in (
                ("cosmic-ray", "init", "mutants.toml", session),
                ("cr-filter-operators", session, "mutants.toml"),
                ("cosmic-ray", "exec", "mutants.toml", session),
            ):
                if "exec" in arguments:
                    leave_out_unseen(session, folder)
                subprocess.run([Path(sys.executable).parent / tool, *arguments], cwd=folder, env=environ, check=True)
        finally:
            server.terminate()
    return session


def leave_out_unseen(session: Path, folder: Path) -> None:
    from cosmic_ray.work_db import WorkDB, use_db
    from cosmic_ray.work_item import WorkerOutcome, WorkResult

    with use_db(str(session), WorkDB.Mode.open) as database:
        for item in list(database.pending_work_items):
            (mutation,) = item.mutations
            line = (folder / mutation.module_path).read_text().splitlines()[mutation.start_pos[0] - 1]
            if any(part in line for part in UNSEEN):
                database.set_result(item.job_id, WorkResult(worker_outcome=WorkerOutcome.SKIPPED, output="unseen"))


def serve() -> None:
    """Answer each request by running the tests of the file that is changed now, in a fork."""
    import peft.tuners.adalora  # noqa: F401
    import pytest  # noqa: F401
    import torch
    import transformers  # noqa: F401

    torch.set_num_threads(1)
    sys.path.insert(0, os.getcwd())
    before = {path: path.read_bytes() for path in Path("peft_gradguard").rglob("*.py")}
    with socket.socket(socket.AF_UNIX) as listening:
        listening.bind(SOCKET)
        listening.listen()
        while True:
            connection, _ = listening.accept()
            with connection:
                changed = [path.stem for path, text in before.items() if path.read_bytes() != text]
                connection.sendall(str(in_fork(changed)).encode())


def in_fork(changed: list[str]) -> int:
    child = os.fork()
    if child == 0:
        os.setsid()
        os._exit(run(changed))
    for _ in range(LONGEST * 10):
        done, status = os.waitpid(child, os.WNOHANG)
        if done:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.1)
    os.killpg(child, signal.SIGKILL)
    os.waitpid(child, 0)
    return 124


def run(changed: list[str]) -> int:
    import pytest

    quiet = os.open(os.devnull, os.O_WRONLY)
    for stream in (1, 2):
        os.dup2(quiet, stream)
    names = " ".join(TESTS.get(name, CORE) for name in changed) or CORE
    files = [f"tests/{name}.py" for name in dict.fromkeys(names.split()) if Path(f"tests/{name}.py").exists()]
    return int(
        pytest.main(["-x", "-q", "-p", "no:cacheprovider", "-p", "no:xdist", "--hypothesis-profile=quick", *files])
    )


def ask() -> int:
    with socket.socket(socket.AF_UNIX) as connection:
        connection.connect(SOCKET)
        return abs(int(connection.recv(16)))


def main(names: list[str]) -> int:
    every = sorted((ROOT / "peft_gradguard").rglob("*.py"), key=lambda path: -path.stat().st_size)
    chosen = [str(path.relative_to(ROOT)) for path in every if not names or path.name in names]
    FOLDER.mkdir(exist_ok=True)
    shares = [chosen[number::WORKERS] for number in range(WORKERS)]
    with ThreadPoolExecutor(WORKERS) as pool:
        sessions = list(pool.map(mutate, range(WORKERS), shares))
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
