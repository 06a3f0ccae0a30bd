"""The guard for ``PYTHONPATH``, where ``.pth`` files are not read: put this file's folder on it.

Python runs the first ``sitecustomize`` that it finds, and only that one. So this one then runs the next, as if it were
not there itself.
"""

import os
import sys

import _peft_gradguard_start  # type: ignore[import-not-found, import-untyped, unused-ignore]


def run_next_sitecustomize() -> None:
    """Run the ``sitecustomize`` that Python would have run without this one; its errors show as they would then."""
    from importlib.machinery import PathFinder

    for entry in _path_after(os.path.dirname(os.path.abspath(__file__))):
        spec = PathFinder.find_spec("sitecustomize", [entry])
        # A folder of that name is found too, as a namespace package, which has no loader that could run anything.
        if spec is None or spec.origin is None or spec.loader is None or spec.origin in _peft_gradguard_start.chained:
            continue
        from importlib.util import module_from_spec

        _peft_gradguard_start.chained.add(spec.origin)
        # Under its own name, in sys.modules too: the import system returns what it finds there afterwards.
        sys.modules["sitecustomize"] = module = module_from_spec(spec)
        spec.loader.exec_module(module)
        return


def _path_after(folder: str) -> "list[str]":
    """Return the part of ``sys.path`` after this folder, without it: it can be there twice."""
    same = [os.path.abspath(entry) == folder for entry in sys.path]
    first = same.index(True) + 1 if True in same else 0
    return [entry for entry, ours in zip(sys.path[first:], same[first:], strict=True) if not ours]


_peft_gradguard_start.start("sitecustomize")
run_next_sitecustomize()
