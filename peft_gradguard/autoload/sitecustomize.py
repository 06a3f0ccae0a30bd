"""The guard for ``PYTHONPATH``, where ``.pth`` files are not read: put this file's folder on it.

Python runs the first ``sitecustomize`` that it finds, and only that one. So this one then runs the next, as if it were
not there itself.
"""

import os
import sys

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

HERE = os.path.dirname(os.path.abspath(__file__))


def wait_for_peft() -> "set[str]":
    """Do what the ``.pth`` file does, and return the files that this one has run before, if it runs again."""
    start: Any = sys.modules.get("_peft_gradguard_start")
    if start is None:
        # Not by its name: another release may have one on the path. It lies beside this file, or, by the wheel, two up.
        from importlib.util import module_from_spec, spec_from_file_location

        files = [os.path.join(folder, "_peft_gradguard_start.py") for folder in (HERE, f"{HERE}/../..")]
        spec = spec_from_file_location("_peft_gradguard_start", next(filter(os.path.exists, files), ""))
        # There is none for a file without a name.
        if spec is None or spec.loader is None:
            raise ImportError(f"there is no {' and no '.join(files)}")
        start = module_from_spec(spec)
        spec.loader.exec_module(start)
        sys.modules["_peft_gradguard_start"] = start
    start.package = os.path.dirname(HERE)
    start.start("sitecustomize")
    chained: set[str] = start.chained
    return chained


def run_next_sitecustomize(chained: "set[str]") -> None:
    """Run the ``sitecustomize`` that Python would have run without this one; its errors show as they would then."""
    from importlib.machinery import PathFinder

    for entry in path_after(HERE):
        spec = PathFinder.find_spec("sitecustomize", [entry])
        # A folder of that name is found too, as a namespace package, which has no loader that could run anything.
        if spec is None or spec.origin is None or spec.loader is None or spec.origin in chained:
            continue
        from importlib.util import module_from_spec

        chained.add(spec.origin)
        # Under its own name, in sys.modules too: the import system returns what it finds there afterwards.
        sys.modules["sitecustomize"] = module = module_from_spec(spec)
        spec.loader.exec_module(module)
        return


def path_after(folder: str) -> "list[str]":
    """Return the part of ``sys.path`` after this folder, without it: it can be there twice."""
    ours = [os.path.abspath(entry) == folder for entry in sys.path]
    first = ours.index(True) if True in ours else 0
    return [entry for entry, skipped in zip(sys.path[first:], ours[first:], strict=True) if not skipped]


try:
    _chained = wait_for_peft()
except Exception as error:
    _chained = set()
    print(f"peft_gradguard: cannot start by itself: {error!r}", file=sys.stderr)
run_next_sitecustomize(_chained)
