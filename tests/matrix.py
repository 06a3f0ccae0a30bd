"""Run the tests that face PEFT on every supported release, and print a table with one row a release.

``make matrix`` runs all rows; ``python tests/matrix.py 0.5.0 newest`` some. One installation of torch serves all: each
release goes into a folder of its own under ``.matrix`` (``pip install --no-deps --target``) that comes first on the
path. The row ``newest`` takes whatever PEFT is the newest now; it reports, and fails nothing.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
FOLDER = ROOT / ".matrix"
AT_ONCE = 2

OLD_TRANSFORMERS = (
    "transformers==4.44.2",
    "tokenizers==0.19.1",
    "huggingface_hub==0.36.0",
    "accelerate==0.34.2",
    "datasets==3.6.0",
)
CURRENT = "0.21.2"


@dataclass(frozen=True)
class Row:
    peft: str
    packages: tuple[str, ...] = ()
    """What comes before the installed packages on the path, each set in a folder of its own."""
    binding: bool = True
    """Whether a failure fails the matrix."""

    @property
    def name(self) -> str:
        wrapt = [package for package in self.packages if package.startswith("wrapt")]
        return " ".join([self.peft, *wrapt])


ROWS = [
    *(Row(release, OLD_TRANSFORMERS) for release in ("0.5.0", "0.6.2", "0.7.1", "0.10.0", "0.13.2", "0.15.2")),
    Row("0.18.1"),
    Row(CURRENT),  # with the wrapt of constraints.txt, 2.5
    Row(CURRENT, ("wrapt==1.14.0",)),
    Row("newest", binding=False),
]


def install(*requirements: str) -> Path:
    """Install these packages, without what they need, into a folder of their own, once."""
    folder = FOLDER / "_".join(re.sub(r"[^\w.]+", "-", requirement) for requirement in requirements)
    if "peft" in requirements or not (folder / "ready").exists():
        pip = [sys.executable, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", "--no-deps"]
        subprocess.run([*pip, "--upgrade", "--target", folder, *requirements], check=True, stderr=subprocess.DEVNULL)
        (folder / "ready").touch()
    return folder


def path_of(row: Row) -> list[Path]:
    peft = "peft" if row.peft == "newest" else f"peft=={row.peft}"
    return [install(peft), *([install(*row.packages)] if row.packages else [])]


def report(row: Row, path: list[Path]) -> tuple[bool, str]:
    """Run the tests that face PEFT and return whether all passed, and the row of the table."""
    if row.peft == "newest" and (path[0] / f"peft-{CURRENT}.dist-info").exists():
        return True, f"{row.peft:8} {CURRENT:9} is the newest, and has a row of its own"
    started = time.perf_counter()
    environ = {**os.environ, "PYTHONPATH": os.pathsep.join(map(str, path))}
    found = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-m", "peft", "-p", "no:cacheprovider"],
        cwd=ROOT,
        env=environ,
        capture_output=True,
        text=True,
    )
    versions = "import peft, transformers, wrapt; print(peft.__version__, transformers.__version__, wrapt.__version__)"
    asked = subprocess.run([sys.executable, "-c", versions], env=environ, capture_output=True, text=True)
    peft, transformers, wrapt = (asked.stdout.split() or ["?"] * 3)[-3:]
    counts = ", ".join(re.findall(r"\d+ (?:passed|failed|skipped|errors?)", found.stdout.rpartition("\n=")[2]))
    if not counts:
        counts = ", ".join(re.findall(r"\d+ (?:passed|failed|skipped|errors?)", found.stdout))
    passed = found.returncode == 0
    if not passed:
        print(f"---- {row.name}\n{found.stdout[-6000:]}\n{found.stderr[-2000:]}", flush=True)
    verdict = "ok" if passed else "FAILED" if row.binding else "failed (not binding)"
    seconds = time.perf_counter() - started
    line = f"{row.peft:8} {peft:9} {transformers:13} {wrapt:8} {counts:40} {seconds:5.0f} s  {verdict}"
    print(line, flush=True)
    return passed or not row.binding, line


def main(names: list[str]) -> int:
    unknown = set(names) - {row.peft for row in ROWS}
    if unknown:
        print(f"No such row: {', '.join(sorted(unknown))}. There are: {', '.join(row.peft for row in ROWS)}.")
        return 2
    rows = [row for row in ROWS if not names or row.peft in names]
    print(
        f"Installing {len(rows)} sets of packages into {FOLDER.name} (the first time), then testing {AT_ONCE} at once."
    )
    paths = [path_of(row) for row in rows]
    with ThreadPoolExecutor(AT_ONCE) as pool:
        results = list(pool.map(report, rows, paths))
    print(f"\n{'row':8} {'PEFT':9} {'transformers':13} {'wrapt':8} {'tests':40} {'time':>7}  verdict")
    print("\n".join(line for _, line in results))
    return 0 if all(good for good, _ in results) else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
