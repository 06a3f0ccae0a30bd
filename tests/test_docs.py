"""What README and docs say can be done: every Python block runs, every command exists, every link leads somewhere."""

from __future__ import annotations

import inspect
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from run_docs import STACKS, blocks
from scenarios import PEFT_VERSION

import peft_gradguard
from peft_gradguard import AdapterReport, HistoryPoint, ModuleReport, ParameterReport, settings
from peft_gradguard.cli import main as cli

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "peft_gradguard"
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
PAPERS = [*PAGES, *sorted(ROOT.glob("CONTRIBUTING.md")), *sorted((ROOT / "docs" / "decisions").glob("*.md"))]
"""The pages for users, and those for who works on the project."""
PLACES = [ROOT, PACKAGE, ROOT / "tests"]
"""What the names of files are relative to."""
ELSEWHERE = ("train.py", "sitecustomize.py", "usercustomize.py", "_peft_gradguard_start.py")
"""Files of the user, and those at the top of site-packages."""
OTHERS = [page for page in PAGES if page.name != STACKS]


@pytest.mark.skipif(PEFT_VERSION < (0, 18), reason="the docs are written for a PEFT of today")
@pytest.mark.parametrize("pages", [[ROOT / "docs" / STACKS], OTHERS], ids=["training stacks", "others"])
def test_python_blocks_run(pages: list[Path], tmp_path: Path) -> None:
    path = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")]).strip(os.pathsep)
    environ = {**os.environ, "PYTHONPATH": path}
    environ.pop("PEFT_GRADGUARD", None)
    command = [sys.executable, str(ROOT / "tests" / "support" / "run_docs.py"), *map(str, pages)]
    found = subprocess.run(command, cwd=tmp_path, env=environ, capture_output=True, text=True, timeout=300)
    assert found.returncode == 0, (found.stdout + found.stderr)[-4000:]
    ran = re.findall(r"^(.+\.md), line (\d+)$", found.stdout, re.MULTILINE)
    assert ran == [(page.name, str(line)) for page in pages for line, _ in blocks(page, "python")]


def commands(page: Path) -> list[list[str]]:
    return [shlex.split(line, comments=True) for _, block in blocks(page, "sh") for line in block.splitlines() if line]


def assert_exists(command: list[str]) -> None:
    while re.fullmatch(r"[A-Z_]+=.*", command[0]):
        assert command[0].partition("=")[0] in (settings.SWITCH, settings.EXCLUDE, "PYTHONPATH"), command
        command = command[1:]
    name, *arguments = command
    if name == "make":
        targets = re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
        assert set(arguments) <= set(targets), command
    elif name == "peft-gradguard":
        # argparse ends the program where it does not know something.
        assert cli._parser().parse_args(arguments)
    elif name == "pip":
        extras = re.findall(r"\[(\w+)\]", " ".join(arguments))
        assert all(f"\n{extra} = [" in (ROOT / "pyproject.toml").read_text() for extra in extras), command
    elif name in ("python", ".venv/bin/python"):
        file = arguments[2 if arguments[:2] == ["-m", "pytest"] else 0].partition("::")[0]
        assert (ROOT / file).exists() or arguments == ["train.py"], command
    else:
        assert command == ["torchrun", "train.py"], command


@pytest.mark.parametrize("page", PAPERS, ids=lambda page: page.name)
def test_commands_exist(page: Path) -> None:
    for command in commands(page):
        assert_exists(command)


@pytest.mark.parametrize("page", PAPERS, ids=lambda page: page.name)
def test_named_commands_exist(page: Path) -> None:
    for command in re.findall(r"`(peft-gradguard (?:status|inspect) [^`]+|make [^`]+|pip [^`]+)`", prose(page)):
        assert_exists(shlex.split(command.replace("...", "x")))


@pytest.mark.parametrize("page", PAPERS, ids=lambda page: page.name)
def test_named_files_folders_and_tests_exist(page: Path) -> None:
    named = [word for words in re.findall(r"`([^`]+)`", prose(page)) for word in words.split()]
    for name in named:
        file, _, test = name.partition("::")
        if file in ELSEWHERE or not re.fullmatch(r"[\w./-]+(\.py|\.md|\.toml|/)", file):
            continue
        found = next((place / file for place in PLACES if (place / file).exists()), None)
        assert found, name
        assert not test or f"def {test}(" in found.read_text(encoding="utf-8"), name


def prose(page: Path) -> str:
    """A page without its fenced blocks."""
    return re.sub(r"^```.*?^```", "", page.read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL)


@pytest.mark.parametrize("page", PAPERS, ids=lambda page: page.name)
def test_links_lead_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\(([^)]+)\)", page.read_text(encoding="utf-8")):
        if target.startswith(("https://", "http://")):
            continue
        file, _, anchor = target.partition("#")
        other = page.parent / file if file else page
        assert other.exists(), target
        assert not anchor or anchor in anchors(other), target


def anchors(page: Path) -> set[str]:
    """The anchors that a Markdown page's headings give."""
    headings = re.findall(r"^#+ (.+)$", page.read_text(encoding="utf-8"), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def test_every_page_is_linked_from_the_readme() -> None:
    readme = PAGES[0].read_text(encoding="utf-8")
    # index.md is the front page of `make docs`, as the README is here.
    assert [page.name for page in PAGES[1:] if f"(docs/{page.name}" not in readme] == ["index.md"]


def test_every_public_name_and_field_is_in_the_api_page() -> None:
    page = (ROOT / "docs" / "api.md").read_text(encoding="utf-8").replace(" or None", " | None")
    classes = {name for name, value in vars(peft_gradguard).items() if isinstance(value, type)}
    public = {*peft_gradguard.__all__, *classes}
    assert {name for name in public if f"`{name}" not in page} == set()
    for kind in (AdapterReport, HistoryPoint, ModuleReport, ParameterReport):
        fields = {f: getattr(a, "__forward_arg__", a) for f, a in kind.__annotations__.items()}
        assert [f for f, a in fields.items() if f"`{f}: {a}`" not in page] == [], kind


def test_signatures_in_the_api_page_are_those_of_the_code() -> None:
    page = (ROOT / "docs" / "api.md").read_text(encoding="utf-8")
    for function in (peft_gradguard.enable, peft_gradguard.report, peft_gradguard.keep_history, peft_gradguard.exclude):
        signature = str(inspect.signature(function)).replace("'", "")
        assert f"`{function.__name__}{signature}`" in page


def test_the_picture_is_small() -> None:
    picture = ROOT / "docs" / "ranks.png"
    assert picture.read_bytes().startswith(b"\x89PNG")
    assert picture.stat().st_size < 60_000
