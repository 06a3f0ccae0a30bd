"""Run PEFT's own tests of AdaLoRA twice, with the guard and without, and compare test by test.

``make conformity`` calls it. The tests come from PEFT's source distribution, unpacked under ``.matrix``; none of them
is part of this project. Those that load models from a hub fail without a network, in both runs alike.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tarfile
import xml.etree.ElementTree as ElementTree
from collections import Counter
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
FOLDER = ROOT / ".matrix"
RELEASE = "0.21.2"
FILES = ("custom_models", "initialization", "low_level_api", "mixed", "config")


def unpacked() -> Path:
    """Download and unpack PEFT's source distribution, once."""
    source = FOLDER / f"peft-{RELEASE}"
    if not (source / "tests").is_dir():
        FOLDER.mkdir(exist_ok=True)
        pip = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--no-binary", "peft"]
        subprocess.run([*pip, "--dest", FOLDER, f"peft=={RELEASE}"], check=True, stderr=subprocess.DEVNULL)
        with tarfile.open(FOLDER / f"peft-{RELEASE}.tar.gz") as archive:
            archive.extractall(FOLDER, filter="data")
        # The source distribution leaves out what makes its tests a package, and they import each other relatively.
        (source / "tests" / "__init__.py").touch()
    return source


def outcomes(source: Path, guarded: bool) -> dict[str, str]:
    """Run PEFT's tests and return the outcome of each."""
    results = FOLDER / f"conformity-{'guarded' if guarded else 'plain'}.xml"
    files = [f"tests/test_{name}.py" for name in FILES]
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-q",
        "-k",
        "adalora",
        "-o",
        "addopts=",
        "-p",
        "no:cacheprovider",
        f"--junitxml={results}",
    ]
    environ = {**os.environ, "HF_HUB_OFFLINE": "1", "PEFT_GRADGUARD": "1" if guarded else "0"}
    # The guard comes in as a plug-in of pytest, so that PEFT's files stay as they are.
    plugin = ["-p", "peft_gradguard"] if guarded else []
    subprocess.run([*command, *plugin, *files], cwd=source, env=environ, stdout=subprocess.DEVNULL)
    return {
        f"{case.get('classname')}::{case.get('name')}": next((child.tag for child in case), "passed")
        for case in ElementTree.parse(results).getroot().iter("testcase")
    }


def main() -> int:
    source = unpacked()
    plain, guarded = outcomes(source, guarded=False), outcomes(source, guarded=True)
    for name, found in (("without the guard", plain), ("with the guard", guarded)):
        print(f"{name:18} {dict(sorted(Counter(found.values()).items()))}")
    differing = sorted(test for test in plain.keys() | guarded.keys() if plain.get(test) != guarded.get(test))
    print(f"{len(plain)} tests, {len(differing)} with another outcome")
    for test in differing:
        print(f"  {test}: {plain.get(test)} without, {guarded.get(test)} with")
    return 1 if differing or not plain else 0


if __name__ == "__main__":
    sys.exit(main())
