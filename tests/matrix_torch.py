"""Run the tests that face PEFT on other releases of torch: ``make matrix-torch``, by hand, as it downloads gigabytes.

Each row gets a virtual environment of its own under ``.matrix``. ``python tests/matrix_torch.py 2.4.1`` runs one row,
and another Python runs the rows with that Python. Rows for which it has no torch are named and left out.
"""

from __future__ import annotations

import re
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
FOLDER = ROOT / ".matrix"

OLD = ("transformers==4.35.2", "peft==0.6.2", "accelerate==0.25.0", "numpy<2")
MIDDLE = ("transformers==4.44.2", "peft==0.13.2", "accelerate==0.34.2")
NEWEST = ("transformers", "peft", "accelerate")
TOOLS = ("pytest", "hypothesis", "pytest-benchmark", "safetensors", "wrapt", "requests", "matplotlib", "tensorboard")


@dataclass(frozen=True)
class Row:
    torch: str
    packages: tuple[str, ...]

    @property
    def folder(self) -> Path:
        return FOLDER / f"torch-{self.torch}-python-{sys.version_info.major}.{sys.version_info.minor}"

    @property
    def python(self) -> Path:
        return self.folder / "bin" / "python"


ROWS = [Row("2.0.1", OLD), Row("2.4.1", MIDDLE), Row("newest", NEWEST)]


def install(row: Row) -> bool:
    """Make the row's environment, once; say so and return False where there is no such torch for this Python."""
    if (row.folder / "ready").exists() and row.torch != "newest":
        return True
    print(f"Installing torch {row.torch} into {row.folder.relative_to(ROOT)} (gigabytes) ...", flush=True)
    subprocess.run([sys.executable, "-m", "venv", row.folder], check=True)
    torch = "torch" if row.torch == "newest" else f"torch=={row.torch}"
    pip = [str(row.python), "-m", "pip", "install", "--quiet", "--disable-pip-version-check", "--upgrade"]
    if subprocess.run([*pip, torch, *row.packages, *TOOLS]).returncode:
        print(f"torch {row.torch}: cannot be installed for this Python ({sys.version.split()[0]}); left out.")
        return False
    (row.folder / "ready").touch()
    return True


def test(row: Row) -> tuple[bool, str]:
    """Run the tests, and return whether all passed, and the row of the table."""
    command = [str(row.python), "-m", "pytest", "-q", "-m", "peft", "-p", "no:cacheprovider"]
    found = subprocess.run(command, cwd=ROOT, env={"PYTHONPATH": str(ROOT), "PATH": ""}, capture_output=True, text=True)
    versions = "import torch, peft, transformers; print(torch.__version__, peft.__version__, transformers.__version__)"
    asked = subprocess.run([str(row.python), "-c", versions], capture_output=True, text=True)
    counts = ", ".join(re.findall(r"\d+ (?:passed|failed|skipped|errors?)", found.stdout))
    if found.returncode:
        print(f"---- torch {row.torch}: pytest ended with {found.returncode}")
        print(f"{found.stdout[-6000:]}\n{found.stderr[-2000:]}", flush=True)
    return found.returncode == 0, f"{row.torch:8} {asked.stdout.strip():30} {counts or 'no test ended'}"


def main(names: list[str]) -> int:
    rows = [row for row in ROWS if not names or row.torch in names]
    results = [test(row) for row in rows if install(row)]
    print("\nrow      torch, PEFT, transformers      tests")
    print("\n".join(line for _, line in results))
    return 0 if all(good for good, _ in results) else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
