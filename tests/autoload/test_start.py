"""The functions of the start-up files in this process; what they do at a real start: test_autoload.py."""

from __future__ import annotations

import io
import os
import sys
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from collections.abc import Callable
    from types import ModuleType

AUTOLOAD = Path(__file__).parents[2] / "peft_gradguard" / "autoload"


def load(name: str, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """Execute a start-up file as a module of its own."""
    spec = spec_from_file_location(name, AUTOLOAD / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = module_from_spec(spec)
    monkeypatch.setitem(sys.modules, name, module)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def start(monkeypatch: pytest.MonkeyPatch) -> Any:
    return load("_peft_gradguard_start", monkeypatch)


@pytest.fixture
def without_package(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in sys.modules if name.split(".")[0] in ("peft", "peft_gradguard")]:
        monkeypatch.delitem(sys.modules, name)


def test_stderr_that_is_closed_or_full_stops_nothing(start: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    closed = io.StringIO()
    closed.close()
    monkeypatch.setattr(sys, "stderr", closed)
    start.say("closed")
    if os.path.exists("/dev/full"):
        with open("/dev/full", "wb", buffering=0) as device:
            full = io.TextIOWrapper(device, write_through=True)
            monkeypatch.setattr(sys, "stderr", full)
            start.say("full")
            full.detach()
    heard = io.StringIO()
    monkeypatch.setattr(sys, "stderr", heard)
    start.say("heard")
    assert heard.getvalue() == "peft_gradguard: heard\n"


@pytest.mark.usefixtures("without_package")
def test_the_first_finder_is_asked_first(start: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    finders = list(sys.meta_path)
    monkeypatch.setattr(sys, "meta_path", list(finders))
    monkeypatch.setenv("PEFT_GRADGUARD", "1")
    for way in (".pth", ".pth", "sitecustomize"):
        start.start(way)
    assert isinstance(sys.meta_path[0], start.PeftIsComing)
    assert sys.meta_path[1:] == finders
    assert start.ways == [".pth", "sitecustomize"]


def test_the_guard_is_loaded_once_and_for_peft_alone(start: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    loaded: list[bool] = []
    finder = start.PeftIsComing()
    monkeypatch.setattr(start, "load_guard", lambda: loaded.append(finder.done))
    monkeypatch.setattr(sys, "meta_path", [finder, *sys.meta_path])
    monkeypatch.delitem(sys.modules, "peft", raising=False)
    for name in ("pefta", "peft.tuners", "a", "z"):
        assert finder.find_spec(name) is None
    assert loaded == []
    for _ in range(2):
        assert finder.find_spec("peft") is None
    # While it loads, another thread that imports PEFT has to wait.
    assert loaded == [False]


@pytest.fixture
def package(
    tmp_path: Path, start: Any, monkeypatch: pytest.MonkeyPatch, without_package: None
) -> Callable[[str], None]:
    """A package of this text beside sitecustomize, and none on ``sys.path``."""

    def write(text: str) -> None:
        folder = tmp_path / "peft_gradguard"
        folder.mkdir()
        (folder / "__init__.py").write_text(text)
        (folder / "part.py").write_text("there = True")
        start.package = str(folder)
        monkeypatch.setattr(sys, "path", [])
        monkeypatch.setattr(sys, "meta_path", [finder for finder in sys.meta_path if not is_editable(finder)])
        monkeypatch.setattr(sys, "path_importer_cache", {})

    return write


def is_editable(finder: Any) -> bool:
    return "editable" in getattr(finder, "__name__", type(finder).__name__).lower()


def stderr_of(call: Callable[[], None], capsys: pytest.CaptureFixture[str]) -> str:
    call()
    return capsys.readouterr().err


def test_package_beside_sitecustomize(
    package: Callable[[str], None], start: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    package("from . import part")
    assert stderr_of(start.load_guard, capsys) == ""
    assert sys.modules["peft_gradguard"].part.there


UNGUARDED = "peft_gradguard: PEFT_GRADGUARD is on, but the guard could not be loaded, so AdaLoRA runs unguarded "


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("raise OSError('broken\\nin two lines')", "(OSError: broken)"),
        ("import no_such_module", "(ModuleNotFoundError: No module named 'no_such_module')"),
    ],
)
def test_broken_package_beside_sitecustomize(
    text: str, reason: str, package: Callable[[str], None], start: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    package(text)
    assert stderr_of(start.load_guard, capsys) == f"{UNGUARDED}{reason}\n"
    assert "peft_gradguard" not in sys.modules


@pytest.mark.parametrize("missing", ["a_module", "wrapt"])
def test_what_the_package_on_the_path_misses_is_not_sought_beside_sitecustomize(
    missing: str,
    package: Callable[[str], None],
    start: Any,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    package("raise AssertionError")
    (tmp_path / "path" / "peft_gradguard").mkdir(parents=True)
    text = f"raise ModuleNotFoundError('missing', name={missing!r})"
    (tmp_path / "path" / "peft_gradguard" / "__init__.py").write_text(text)
    monkeypatch.setattr(sys, "path", [str(tmp_path / "path")])
    assert stderr_of(start.load_guard, capsys) == f"{UNGUARDED}(ModuleNotFoundError: missing)\n"


def test_no_package_anywhere(package: Callable[[str], None], start: Any, capsys: pytest.CaptureFixture[str]) -> None:
    package("")
    start.package = None
    reason = "(ModuleNotFoundError: No module named 'peft_gradguard')"
    assert stderr_of(start.load_guard, capsys) == f"{UNGUARDED}{reason}\n"


def test_path_after_our_folder(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("PEFT_GRADGUARD", raising=False)
    monkeypatch.setattr(sys, "path", [])
    # Whatever it puts there goes again.
    monkeypatch.setitem(sys.modules, "_peft_gradguard_start", None)
    monkeypatch.delitem(sys.modules, "_peft_gradguard_start")
    path_after = load("sitecustomize", monkeypatch).path_after
    here = str(AUTOLOAD)
    for path, after in (
        (["0", "1", here, "2", here, "3"], ["2", "3"]),
        ([here, "0"], ["0"]),
        # Ours is not there under its own name, as with a link to it: everything is looked at.
        (["0", "1"], ["0", "1"]),
        # It is known by its name alone, and not by its place in the alphabet.
        ([here, "/", f"{here}/..", f"{here}0"], ["/", f"{here}/..", f"{here}0"]),
        (["0", f"{here}/../autoload", "1"], ["1"]),
    ):
        monkeypatch.setattr(sys, "path", path)
        assert path_after(here) == after
