"""The command ``peft-gradguard``: run a command under the guard, say whether it is on, inspect a saved adapter.

Imports neither the guard nor wrapt: ``status`` is there to say what is missing.
"""

from __future__ import annotations

import argparse
import os
import signal
import sys
from typing import TYPE_CHECKING

from ..settings import SWITCH

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from typing import NoReturn

    from ..report.report import Report

AUTOLOAD = os.path.join(os.path.dirname(os.path.dirname(os.path.abspath(__file__))), "autoload")
"""The folder whose ``sitecustomize`` loads the guard where the ``.pth`` file is not read."""

CANNOT_RUN, NOT_FOUND = 126, 127
"""The exit statuses of a shell."""

FAILED = 2
"""The exit status of ``inspect`` and ``status`` where something could not be shown."""


def main(argv: Sequence[str] | None = None) -> int:
    """Do what the command line asks for, and return the exit status."""
    parser = _parser()
    options = parser.parse_args(argv)
    if options.action == "run":
        command = options.command[options.command[:1] == ["--"] :]
        if not command:
            parser.error("run: the command to run is missing")
        return run(command, guarded_environment(os.environ))
    if options.action == "path":
        print(AUTOLOAD)
        return 0
    if options.action == "inspect":
        return inspect(options.path, options.adapter, options.plot, as_json=options.json)
    return status(as_json=options.json)


def guarded_environment(environ: Mapping[str, str]) -> dict[str, str]:
    """Return the environment in which every Python, and every Python that it starts, loads the guard."""
    path = environ.get("PYTHONPATH", "")
    folders = path.split(os.pathsep) if path else []
    if AUTOLOAD not in folders:
        folders.insert(0, AUTOLOAD)
    return {**environ, SWITCH: "1", "PYTHONPATH": os.pathsep.join(folders)}


def run(command: list[str], environ: dict[str, str]) -> int:
    """Become this command. Returns only where that is not possible."""
    if not command[0]:
        return _fail("'': command not found", NOT_FOUND)
    try:
        _become(command, environ)
    except FileNotFoundError:
        return _fail(f"{command[0]}: command not found", NOT_FOUND)
    except OSError as error:
        return _fail(f"{command[0]}: {error.strerror}", CANNOT_RUN)
    except ValueError as error:
        # A null character, which no argument of a process can hold.
        return _fail(f"{command[0]!r}: {error}", CANNOT_RUN)


def _become(command: list[str], environ: dict[str, str]) -> NoReturn:
    sys.stdout.flush()
    sys.stderr.flush()
    if os.name == "nt":
        # There os.exec starts a second process, and the first one ends at once with status 0.
        import subprocess

        sys.exit(subprocess.run(command, env=environ).returncode)
    # Python ignores these for itself, and what is ignored stays so in the command.
    for name in ("SIGPIPE", "SIGXFSZ"):
        if hasattr(signal, name):
            signal.signal(getattr(signal, name), signal.SIG_DFL)
    os.execvpe(command[0], command, environ)


def status(as_json: bool) -> int:
    """Print whether the guard is on, and why (not)."""
    from .status import report

    text, exit_status = report(as_json)
    try:
        show(text)
    except OSError as error:
        return _fail(f"status: {error}", FAILED)
    return exit_status


def inspect(path: str, adapter: str | None, picture: str | None, as_json: bool) -> int:
    """Print the report of a saved adapter, and draw it where a file for the picture is given."""
    from ..report.saved import SavedAdapterError, read_undamaged

    problems: list[Exception] = []
    try:
        report, damaged = read_undamaged(path, adapter)
        problems += damaged
        if report.adapters:
            if picture is not None:
                _draw(report, picture)
            show(report.to_json(indent=2) if as_json else str(report))
    except (SavedAdapterError, ValueError, ImportError, OSError) as error:
        problems.append(error)
    for problem in problems:
        _fail(f"inspect: {' '.join(str(problem).splitlines())}", FAILED)
    return FAILED if problems else 0


def _draw(report: Report, picture: str) -> None:
    if len(report.adapters) > 1:
        names = ", ".join(repr(found.adapter) for found in report.adapters)
        raise ValueError(f"--plot draws one adapter: give --adapter NAME, one of {names}")
    report.plot(picture)


def show(text: str) -> None:
    """Print this, with escapes for characters that stdout does not know; ``OSError`` where it cannot be written.

    A reader who has gone, as ``head`` goes, is no error.
    """
    try:
        try:
            print(text, flush=True)
        except UnicodeEncodeError:
            encoding = sys.stdout.encoding
            print(text.encode(encoding, "backslashreplace").decode(encoding), flush=True)
    except OSError as error:
        # The interpreter flushes once more at its end. What is left would fail again then, with an exit status of 120.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        if not isinstance(error, BrokenPipeError):
            raise OSError(f"stdout: {error.strerror}") from error


def _fail(message: str, status: int) -> int:
    print(f"peft-gradguard: {message}", file=sys.stderr)
    return status


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="peft-gradguard",
        description="Run a command with the guard on, say whether it is on, or show the ranks of a saved adapter.",
    )
    parser.add_argument("--version", action="version", version=f"peft-gradguard {_version()}")
    actions = parser.add_subparsers(dest="action", required=True, metavar="{run,status,path,inspect}")
    run = actions.add_parser(
        "run",
        help="run a command with the guard on in it and in all that it starts",
        usage="peft-gradguard run COMMAND [ARGUMENT ...]",
        description="Run a command (python, torchrun, accelerate launch, pytest, ...) with the guard on, in it and in "
        "all that it starts.",
    )
    run.add_argument("command", nargs="...", metavar="COMMAND [ARGUMENT ...]")
    status = actions.add_parser(
        "status",
        help="say whether the guard is on for a Python started here, and why (not)",
        description="Say whether the guard is on for a Python started here, and why (not). Exit status: 0 on, 1 off, "
        "2 on but not applied.",
    )
    status.add_argument("--json", action="store_true", help="the same for programs, as one JSON object")
    actions.add_parser(
        "path",
        help="print the folder for PYTHONPATH, where .pth files are not read",
        description="Print the folder that holds a sitecustomize.py for PYTHONPATH, for where .pth files are not read: "
        'PEFT_GRADGUARD=1 PYTHONPATH="$(peft-gradguard path)" python train.py',
    )
    inspect = actions.add_parser(
        "inspect",
        help="show which ranks a saved adapter has kept, without its model",
        description="Show which ranks a saved AdaLoRA adapter has kept, module by module. Needs only the folder that "
        "save_pretrained wrote, and no model. Exit status: 0, or 2 where there is none, or a damaged one.",
    )
    inspect.add_argument("path", metavar="PATH", help="the folder with adapter_config.json")
    inspect.add_argument("--adapter", metavar="NAME", help="only this one of the adapters in the folder")
    inspect.add_argument("--plot", metavar="FILE", help="draw the ranks, as .png or .svg (needs matplotlib)")
    inspect.add_argument("--json", action="store_true", help="the same for programs, as one JSON object")
    return parser


def _version() -> str:
    """Return the version as the source says it. The package itself stands above this room."""
    with open(os.path.join(os.path.dirname(AUTOLOAD), "__init__.py"), encoding="utf-8") as source:
        return next(line.split('"')[1] for line in source if line.startswith("__version__"))
