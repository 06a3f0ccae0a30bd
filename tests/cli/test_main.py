"""The command ``peft-gradguard`` in this process: its arguments, how it prints, and what ``run`` hands on.

What it starts: test_installed.py; ``status``: test_status.py; ``inspect``: test_inspect.py.
"""

from __future__ import annotations

import io
import os
import runpy
import signal
import subprocess
import sys
from typing import TYPE_CHECKING

import numpy
import pytest
import safetensors.numpy

from peft_gradguard.cli import main as cli

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path
    from typing import BinaryIO


def paths(*entries: str) -> str:
    return os.pathsep.join(entries)


@pytest.mark.parametrize(
    ("before", "after"),
    [
        (None, cli.AUTOLOAD),
        ("", cli.AUTOLOAD),
        ("one", paths(cli.AUTOLOAD, "one")),
        # An empty entry is the working directory.
        (paths("one", "", "two"), paths(cli.AUTOLOAD, "one", "", "two")),
        (paths("one", cli.AUTOLOAD), paths("one", cli.AUTOLOAD)),
    ],
)
def test_environment_of_run(before: str | None, after: str) -> None:
    environ = {"HOME": "here", "PEFT_GRADGUARD": "0", **({} if before is None else {"PYTHONPATH": before})}
    unchanged = dict(environ)
    assert cli.guarded_environment(environ) == {"HOME": "here", "PEFT_GRADGUARD": "1", "PYTHONPATH": after}
    assert environ == unchanged


def test_autoload_is_a_folder_of_the_package() -> None:
    assert os.path.isabs(cli.AUTOLOAD)
    assert os.path.exists(os.path.join(cli.AUTOLOAD, "sitecustomize.py"))


def run(*command: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "peft_gradguard", "run", *command], capture_output=True, text=True, timeout=60
    )


@pytest.mark.parametrize("before", [[], ["--"]])
def test_arguments_of_the_command_are_its_own(before: list[str]) -> None:
    code = "import sys; print(sys.argv[1:])"
    ran = run(*before, sys.executable, "-c", code, "--json", "--", "-h", "run")
    assert (ran.stdout, ran.stderr, ran.returncode) == ("['--json', '--', '-h', 'run']\n", "", 0)


@pytest.mark.skipif(os.name == "nt", reason="signals of POSIX")
def test_signals_are_as_the_shell_has_them() -> None:
    for name in ("PIPE", "XFSZ"):
        ran = run("sh", "-c", f"kill -s {name} $$; echo ignored")
        assert (ran.returncode, ran.stdout) == (-signal.Signals[f"SIG{name}"], "")


@pytest.mark.parametrize("arguments", [["run"], ["run", "--"]])
def test_command_is_missing(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as error:
        cli.main(arguments)
    assert error.value.code == 2
    assert capsys.readouterr().err.endswith("peft-gradguard: error: run: the command to run is missing\n")


@pytest.mark.parametrize("arguments", [[], ["walk"], ["inspect"], ["status", "--yaml"]])
def test_arguments_that_are_not_known(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as error:
        cli.main(arguments)
    assert error.value.code == 2
    assert capsys.readouterr().err.startswith("usage: peft-gradguard ")


def test_help(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as error:
        cli.main(["--help"])
    assert error.value.code == 0
    assert "Run a command with the guard on, say whether it is on, or show the ranks of a saved adapter." in " ".join(
        capsys.readouterr().out.split()
    )


# What is printed


@pytest.mark.parametrize(
    ("encoding", "errors", "written"),
    [
        ("utf-8", "strict", "modèle 模 \\udce8\n".encode()),
        ("ascii", "strict", rb"mod\xe8le \u6a21 \udce8" + b"\n"),
        ("cp1252", "strict", b"mod\xe8le " + rb"\u6a21 \udce8" + b"\n"),
        # So it is in the locale "C": the name of a file comes out as it is.
        ("utf-8", "surrogateescape", "modèle 模 ".encode() + b"\xe8\n"),
    ],
)
def test_characters_that_stdout_does_not_know(
    encoding: str, errors: str, written: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    raw = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(raw, encoding, errors, newline="\n"))
    cli.show("modèle 模 \udce8")
    # It is all there, though nothing here has flushed.
    assert raw.getvalue() == written


def test_nowhere_to_print(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stdout", None)
    cli.show("text")


def closed_pipe() -> BinaryIO:
    reader, writer = os.pipe()
    os.close(reader)
    return open(writer, "wb", 0)


def full_disk() -> BinaryIO:
    if not os.path.exists("/dev/full"):
        pytest.skip("no /dev/full here")
    return open("/dev/full", "wb", 0)


@pytest.mark.skipif(os.name == "nt", reason="pipes of POSIX")
@pytest.mark.parametrize("unbuffered", ["", "1"])
@pytest.mark.parametrize(
    ("stdout", "status", "said"),
    [(closed_pipe, 0, ""), (full_disk, 2, "peft-gradguard: inspect: stdout: No space left on device\n")],
)
def test_stdout_that_takes_nothing(
    stdout: Callable[[], BinaryIO], status: int, said: str, unbuffered: str, tmp_path: Path
) -> None:
    shapes = {"A": (2, 4), "B": (5, 2), "E": (2, 1)}
    tensors = {f"base_model.model.q.lora_{factor}": numpy.zeros(shape) for factor, shape in shapes.items()}
    safetensors.numpy.save_file(tensors, tmp_path / "adapter_model.safetensors")
    (tmp_path / "adapter_config.json").write_text('{"peft_type": "ADALORA"}')
    command = [sys.executable, "-m", "peft_gradguard", "inspect", str(tmp_path)]
    environ = {**os.environ, "PYTHONUNBUFFERED": unbuffered}
    with stdout() as stream:
        ran = subprocess.run(command, stdout=stream, stderr=subprocess.PIPE, text=True, env=environ)
    assert (ran.returncode, ran.stderr) == (status, said)


@pytest.fixture
def signals() -> Iterator[None]:
    """Ignore again, in this process, what a command must not find ignored."""
    before = {number: signal.getsignal(number) for number in (signal.SIGPIPE, signal.SIGXFSZ)}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.mark.skipif(os.name == "nt", reason="the words of POSIX")
@pytest.mark.usefixtures("signals")
def test_command_that_is_not_there(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    # The second one is no option, though it comes before "--" in the order of the alphabet.
    for missing in (str(tmp_path / "missing"), "!missing"):
        assert cli.main(["run", missing, "argument"]) == 127
        assert capsys.readouterr() == ("", f"peft-gradguard: {missing}: command not found\n")
    assert cli.main(["run", str(tmp_path), "argument"]) == 126
    assert capsys.readouterr() == ("", f"peft-gradguard: {tmp_path}: Permission denied\n")


@pytest.mark.skipif(os.name == "nt", reason="the words of POSIX")
@pytest.mark.usefixtures("signals")
@pytest.mark.parametrize(
    ("command", "status", "said"),
    [
        ([""], 127, "'': command not found\n"),
        (["--", "", "argument"], 127, "'': command not found\n"),
        (["a\0b"], 126, r"'a\x00b': "),
        (["sh", "a\0b"], 126, "'sh': embedded null "),
    ],
)
def test_command_that_no_process_can_have(
    command: list[str], status: int, said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["run", *command]) == status
    out, err = capsys.readouterr()
    assert (out, err.count("\n")) == ("", 1)
    assert err.startswith(f"peft-gradguard: {said}")


def test_as_a_module(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(sys, "argv", ["peft_gradguard", "inspect", "no-such-folder"])
    with pytest.raises(SystemExit) as error:
        runpy.run_module("peft_gradguard", run_name="__main__")
    assert error.value.code == 2
    assert capsys.readouterr().err.startswith("peft-gradguard: inspect: ")
    runpy.run_module("peft_gradguard", run_name="imported")
