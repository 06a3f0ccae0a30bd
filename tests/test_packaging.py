"""The built packages: what they hold, that they install and uninstall without trace, and company from the index."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tarfile
import zipfile
from typing import TYPE_CHECKING

import pytest
from environments import (
    CURRENT,
    GUARDED_STEP,
    REPOSITORY,
    Environment,
    add_stand_ins,
    new_environment,
    pip,
    real,
    sdist,
    wheel,
)
from long_description import long_description, relative_targets

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

TOP = {"peft_gradguard", "peft_gradguard.pth", "peft_gradguard.start", "_peft_gradguard_start.py"}


def files(root: Path) -> set[str]:
    return {str(path.relative_to(root)) for path in root.rglob("*") if path.name != "__pycache__"}


def test_wheel_places_the_start_up_files() -> None:
    with zipfile.ZipFile(wheel()) as archive:
        names = archive.namelist()
        assert {name.split("/")[0] for name in names if ".dist-info" not in name} == TOP
        assert "peft_gradguard/autoload/sitecustomize.py" in names
        for name in ("peft_gradguard.pth", "peft_gradguard.start"):
            assert archive.read(name) == (REPOSITORY / "startup" / name).read_bytes()


def test_long_description_stands_alone() -> None:
    text = long_description(str(wheel()))
    assert relative_targets(text) == []
    linked = re.findall(r"\]\(https://\S+?/peft-gradguard/peft_gradguard/(?:blob/)?main/([^)#]+)", text)
    assert linked
    assert [name for name in linked if not (REPOSITORY / name).exists()] == []


@pytest.mark.parametrize(
    "breach",
    [
        "![A picture](docs/ranks.png)",
        "[a page](docs/report.md)",
        "[`code`](../x)",
        "[x][y]\n\n[y]: docs/faq.md",
        '<img src="docs/ranks.png">',
    ],
)
def test_relative_link_or_picture_in_the_long_description_fails(breach: str, tmp_path: Path) -> None:
    text = long_description(str(wheel()))
    broken = tmp_path / "broken.whl"
    with zipfile.ZipFile(broken, "w") as archive:
        archive.writestr("peft_gradguard-0.dist-info/METADATA", f"Name: peft-gradguard\n\n{text}\n{breach}\n")
    looked = subprocess.run(
        [sys.executable, REPOSITORY / "tests" / "support" / "long_description.py", broken],
        capture_output=True,
        text=True,
    )
    assert looked.returncode == 1
    assert "relative links or pictures" in looked.stderr


def test_wheel_from_the_sdist_is_the_same(tmp_path: Path) -> None:
    with tarfile.open(sdist()) as archive:
        archive.extractall(tmp_path, **({"filter": "data"} if sys.version_info >= (3, 12) else {}))
    (root,) = tmp_path.iterdir()
    subprocess.run(
        [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", tmp_path / "dist"],
        cwd=root, check=True, capture_output=True,
    )  # fmt: skip
    (again,) = (tmp_path / "dist").iterdir()
    with zipfile.ZipFile(again) as mine, zipfile.ZipFile(wheel()) as theirs:
        assert {n: mine.read(n) for n in mine.namelist()} == {n: theirs.read(n) for n in theirs.namelist()}


def install_wheel(environment: Environment) -> None:
    pip(environment.python, "install", "--no-deps", "--no-index", wheel())


def install_editable(environment: Environment) -> None:
    """Install the wheel that ``pip install --editable`` builds, without fetching hatchling from the index."""
    code = f"import hatchling.build as b; print(b.build_editable({str(environment.root)!r}))"
    built = subprocess.run([sys.executable, "-c", code], cwd=REPOSITORY, check=True, capture_output=True, text=True)
    pip(environment.python, "install", "--no-deps", "--no-index", environment.root / built.stdout.split()[-1])
    (environment.root / built.stdout.split()[-1]).unlink()


@pytest.mark.parametrize("install", [install_wheel, install_editable])
def test_install_start_and_uninstall_without_trace(install: Callable[[Environment], None]) -> None:
    environment = new_environment(CURRENT, install.__name__)
    add_stand_ins(environment.site_packages)
    before = files(environment.root)
    install(environment)
    seen = environment.look(PEFT_GRADGUARD="1")
    assert (seen["guarded"], seen["ways"]) == (True, [environment.way])
    assert seen["from"].startswith(str(REPOSITORY)) == (install is install_editable)
    assert environment.look()["at_start"] == environment.at_rest
    assert environment.run("-m", "peft_gradguard", "run", environment.python, "-c", "print('runs')").stdout == "runs\n"
    pip(environment.python, "uninstall", "--yes", "peft-gradguard")
    left = {name for name in files(environment.root) - before if not name.startswith("lib64")}
    # Byte code of wrapt and peft is theirs.
    assert not [name for name in left if "gradguard" in name]
    assert environment.look(PEFT_GRADGUARD="1")["at_start"] == []


@pytest.mark.packaging
def test_pip_install_editable_from_the_index() -> None:
    environment = new_environment(CURRENT, "editable")
    add_stand_ins(environment.site_packages)
    pip(environment.python, "install", "--no-deps", "--editable", REPOSITORY)
    assert environment.look(PEFT_GRADGUARD="1")["from"] == str(REPOSITORY / "peft_gradguard" / "__init__.py")


@pytest.fixture(scope="module")
def company() -> Environment:
    """Return an environment with other tools that load by themselves, and torch and PEFT beside."""
    environment = new_environment(CURRENT, "company")
    pip(environment.python, "install", "ddtrace", "opentelemetry-instrumentation", "autowrapt")
    install_wheel(environment)
    beside = (real().site_packages / "zz_beside.pth").read_text()
    (environment.site_packages / "zz_beside.pth").write_text(beside)
    return environment


QUIET = {"DD_TRACE_ENABLED": "false", "DD_INSTRUMENTATION_TELEMETRY_ENABLED": "false",
         "DD_REMOTE_CONFIGURATION_ENABLED": "false", "OTEL_SDK_DISABLED": "true"}  # fmt: skip
OTHERS = {"ddtrace": "ddtrace/bootstrap", "opentelemetry": "opentelemetry/instrumentation/auto_instrumentation"}
SEE = "\nprint([m in sys.modules for m in ('ddtrace', 'opentelemetry')], sys.modules['_peft_gradguard_start'].ways)\n"


@pytest.mark.packaging
@pytest.mark.parametrize("order", ["ours first", "theirs first"])
@pytest.mark.parametrize("other", OTHERS)
def test_sitecustomize_of_another_tool(company: Environment, other: str, order: str, tmp_path: Path) -> None:
    step = tmp_path / "step.py"
    step.write_text(GUARDED_STEP + SEE)
    folders = [company.site_packages / "peft_gradguard" / "autoload", company.site_packages / OTHERS[other]]
    path = os.pathsep.join(map(str, folders if order == "ours first" else folders[::-1]))
    ran = company.run(step, PEFT_GRADGUARD="1", PYTHONPATH=path, **QUIET)
    assert ran.stdout.startswith("guarded alone\n"), ran.stderr
    # OpenTelemetry's runs no other sitecustomize; there our .pth file acts.
    ways = "['.pth']" if (other, order) == ("opentelemetry", "theirs first") else "['.pth', 'sitecustomize']"
    assert ran.stdout.splitlines()[-1].endswith(ways)
    assert "True" in ran.stdout.splitlines()[-1]


@pytest.mark.packaging
@pytest.mark.parametrize("switch", [None, "0"])
def test_autowrapt(company: Environment, switch: str | None, tmp_path: Path) -> None:
    step = tmp_path / "step.py"
    step.write_text("import sys\nfrom peft.tuners.adalora import RankAllocator\n"
                    "print(type(vars(RankAllocator)['update_ipt']).__name__)\n")  # fmt: skip
    variables = {} if switch is None else {"PEFT_GRADGUARD": switch}
    ran = company.run(step, AUTOWRAPT_BOOTSTRAP="peft_gradguard", **variables)
    assert ran.stdout == ("GuardWrapper\n" if switch is None else "function\n"), ran.stderr
