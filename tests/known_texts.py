"""Print the table of ``peft_gradguard/speed/known.py``: the texts that ``update_ipt`` has had in PEFT's releases.

    python tests/known_texts.py [RELEASE ...]

Each release (all from 0.5.0 on, unless some are named) is downloaded into a folder that goes away again, and read as
text: nothing of it is run. Of two releases in a row with the same text, the table names the first and the last.
"""

from __future__ import annotations

import ast
import re
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

from peft_gradguard.speed.known import KNOWN, fingerprint

FILES = ("peft/tuners/adalora/layer.py", "peft/tuners/adalora.py")
"""Where ``RankAllocator`` stands: since 0.6, and before."""
FIRST = (0, 5, 0)
PIP = (sys.executable, "-m", "pip", "--disable-pip-version-check")


def released() -> list[str]:
    """All releases of PEFT that the guard takes, the oldest first."""
    listed = subprocess.run([*PIP, "index", "versions", "peft"], capture_output=True, text=True, check=True).stdout
    found = re.search(r"Available versions: (.*)", listed)
    assert found, listed
    numbers = {tuple(map(int, release.split("."))) for release in found[1].split(", ")}
    return [".".join(map(str, release)) for release in sorted(numbers) if release >= FIRST]


def text_of(release: str) -> ast.FunctionDef:
    with tempfile.TemporaryDirectory() as folder:
        command = [
            *PIP,
            "download",
            "--quiet",
            "--no-deps",
            "--only-binary",
            ":all:",
            "--dest",
            folder,
            f"peft=={release}",
        ]
        subprocess.run(command, check=True, stderr=subprocess.DEVNULL)
        with zipfile.ZipFile(next(Path(folder).glob("*.whl"))) as wheel:
            source = wheel.read(next(name for name in FILES if name in wheel.namelist()))
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.ClassDef) and node.name == "RankAllocator":
            return next(f for f in node.body if isinstance(f, ast.FunctionDef) and f.name == "update_ipt")
    raise SystemExit(f"PEFT {release} has no RankAllocator.update_ipt")


def main(releases: list[str]) -> int:
    having: dict[str, list[str]] = {}
    for release in releases or released():
        having.setdefault(fingerprint(text_of(release)), []).append(release)
    for text, those in having.items():
        print(f"{text}  {those[0]} to {those[-1]}, {len(those)} releases{'' if text in KNOWN else '  NOT KNOWN'}")
    return 0 if having.keys() <= KNOWN.keys() else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
