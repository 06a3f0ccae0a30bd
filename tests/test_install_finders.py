"""Other tools' import hooks: whichever finder finds PEFT, and in whatever way it comes, it is guarded, once.

One process loads what PEFT needs; each way runs in a child forked off it, in which PEFT itself is imported anew.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import textwrap
from typing import TYPE_CHECKING, Any

import pytest
from scenarios import PEFT_VERSION

if TYPE_CHECKING:
    from pathlib import Path

pytestmark = [pytest.mark.peft, pytest.mark.skipif(not hasattr(os, "fork"), reason="forks")]

PROLOGUE = """
import faulthandler, importlib, importlib.util, json, logging, multiprocessing, os, sys, threading, zipfile
from importlib.machinery import PathFinder, SourceFileLoader, FileFinder, SOURCE_SUFFIXES

NAMES = ["update_ipt", "update_and_allocate", "budget_schedule", "mask_to_budget", "mask_using_rank_pattern",
         "_set_budget_scheduler"]

def chain(method):
    while method is not None:
        yield method
        method = getattr(method, "__wrapped__", None)

def once(owner=None):
    "Whether each method has our wrapper just once."
    if owner is None:
        owner = sys.modules["peft.tuners.adalora"].RankAllocator
    ours = [sum("GuardWrapper" in type(m).__name__ for m in chain(vars(owner)[name])) for name in NAMES]
    return ours == [1] * 6

def is_pefts(name):
    return name == "peft" or name.startswith("peft.")

def reload(module):
    try:
        importlib.reload(module)
    except KeyError as error:
        # PEFT since 0.15 registers its methods once only.
        assert "already" in str(error)

def forget(package):
    for name in [name for name in sys.modules if name.partition(".")[0] == package]:
        del sys.modules[name]

class ByPathFinder:
    "As typeguard's: first, and by PathFinder alone."
    @staticmethod
    def find_spec(name, path=None, target=None):
        return PathFinder.find_spec(name, path, target) if is_pefts(name) else None

class Instruments(SourceFileLoader):
    pass

class ReplacesTheLoader(ByPathFinder):
    @staticmethod
    def find_spec(name, path=None, target=None):
        spec = ByPathFinder.find_spec(name, path, target)
        if spec is not None and isinstance(spec.loader, SourceFileLoader):
            spec.loader = Instruments(spec.loader.name, spec.loader.path)
        return spec

class AsksTheOthers:
    "Takes what any other finder has found, and puts its own loader in place."
    asked = False
    @classmethod
    def find_spec(cls, name, path=None, target=None):
        if not is_pefts(name) or cls.asked:
            return None
        cls.asked = True
        try:
            spec = importlib.util.find_spec(name)
        finally:
            cls.asked = False
        if spec is not None and isinstance(spec.loader, SourceFileLoader):
            spec.loader = Instruments(spec.loader.name, spec.loader.path)
        return spec

class ByItself:
    "Asks neither PathFinder nor the hooks on paths."
    @staticmethod
    def find_spec(name, path=None, target=None):
        if not is_pefts(name):
            return None
        for folder in path or sys.path:
            spec = FileFinder(folder, (SourceFileLoader, SOURCE_SUFFIXES)).find_spec(name)
            if spec is not None and spec.loader is not None:
                return spec

class Lazy(ByPathFinder):
    @staticmethod
    def find_spec(name, path=None, target=None):
        spec = PathFinder.find_spec(name, path, target) if name.startswith("peft.tuners.adalora") else None
        if spec is not None:
            spec.loader = importlib.util.LazyLoader(spec.loader)
        return spec

class WantsToBeFirst(ByPathFinder):
    def find_spec(self, name, path=None, target=None):
        if sys.meta_path[0] is not self and len(sys.meta_path) < 1000:
            sys.meta_path.insert(0, self)
        return ByPathFinder.find_spec(name, path, target)

TOOLS = [ByPathFinder, ReplacesTheLoader, AsksTheOthers, ByItself, Lazy, WantsToBeFirst()]
finders = list(sys.meta_path)

def in_fork(function, *args):
    receive, send = multiprocessing.Pipe(duplex=False)
    def run():
        try:
            send.send(function(*args))
        except BaseException as error:
            import traceback
            send.send(traceback.format_exc())
    child = multiprocessing.get_context("fork").Process(target=run)
    child.start()
    send.close()
    result = receive.recv()
    child.join()
    return result

import peft, torch, transformers
folder = os.path.dirname(os.path.dirname(peft.__file__))
forget("peft")
del peft
for place in [place for place in sys.path_importer_cache if "peft" in place]:
    del sys.path_importer_cache[place]
"""


def ways(body: str, tmp_path: Path) -> dict[str, Any]:
    """Run each function of ``body`` whose name begins with ``way_`` in a child; what they return, by name."""
    epilogue = "print(json.dumps({n: in_fork(f) for n, f in list(globals().items()) if n.startswith('way_')}))"
    program = tmp_path / "program.py"
    program.write_text("\n".join([PROLOGUE, textwrap.dedent(body), epilogue]))
    environ = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path[1:])}
    command = [sys.executable, "-W", "ignore", str(program)]
    found = subprocess.run(command, env=environ, capture_output=True, text=True, timeout=300, cwd=tmp_path)
    assert found.returncode == 0, found.stderr
    results: dict[str, Any] = json.loads(found.stdout.splitlines()[-1])
    return results


@pytest.mark.skipif(PEFT_VERSION < (0, 6), reason="one of these tools, which fights to be first, wins in PEFT 0.5")
def test_tools_that_come_first(tmp_path: Path) -> None:
    results = ways(
        """
        def first(tool, ours_before):
            if ours_before:
                import peft_gradguard
            sys.meta_path.insert(0, tool)
            if not ours_before:
                import peft_gradguard
            import peft
            if tool is ByItself and ours_before:
                # The next import of anything, or whoever asks.
                assert peft_gradguard.is_enabled()
            return once() and len(sys.meta_path) < 100

        def way_after_ours():
            return [in_fork(first, tool, True) for tool in TOOLS]

        def way_before_ours():
            return [in_fork(first, tool, False) for tool in TOOLS]

        def way_by_itself_and_then_any_import():
            import peft_gradguard
            sys.meta_path.insert(0, ByItself)
            import peft
            import this
            return once()
        """,
        tmp_path,
    )
    assert results == {
        "way_after_ours": [True] * 6,
        "way_before_ours": [True] * 6,
        "way_by_itself_and_then_any_import": True,
    }


def test_module_comes_again_or_in_parts(tmp_path: Path) -> None:
    results = ways(
        """
        def way_reload():
            import peft_gradguard, peft.tuners.adalora
            reload(peft.tuners.adalora)
            return once()

        def way_reload_of_the_classes():
            import peft_gradguard, peft.tuners.adalora
            layer = sys.modules.get("peft.tuners.adalora.layer", peft.tuners.adalora)
            before = layer.RankAllocator
            reload(layer)
            reload(peft.tuners.adalora)
            return once(before) and once(layer.RankAllocator) and once() and before is not layer.RankAllocator

        def way_reload_by_a_tool():
            import peft_gradguard, peft.tuners.adalora
            layer = sys.modules.get("peft.tuners.adalora.layer", peft.tuners.adalora)
            sys.meta_path.insert(0, ReplacesTheLoader)
            reload(layer)
            reload(peft.tuners.adalora)
            return peft_gradguard.is_enabled() and once()

        def way_imported_anew():
            import peft_gradguard, peft
            before = sys.modules["peft.tuners.adalora"].RankAllocator
            forget("peft")
            import peft
            return once() and before is not sys.modules["peft.tuners.adalora"].RankAllocator

        def way_anew_by_a_tool():
            import peft_gradguard, peft
            forget("peft")
            sys.meta_path.insert(0, ReplacesTheLoader)
            import peft
            return peft_gradguard.is_enabled() and once()

        def way_layer_alone():
            import peft_gradguard
            if importlib.util.find_spec("peft.tuners.adalora").submodule_search_locations:
                importlib.import_module("peft.tuners.adalora.layer")
            else:
                import peft
            return once()

        def way_zipped():
            with zipfile.ZipFile("peft.zip", "w") as archive:
                for place, _, files in os.walk(os.path.join(folder, "peft")):
                    for file in files:
                        if file.endswith((".py", ".json")):
                            path = os.path.join(place, file)
                            archive.write(path, os.path.relpath(path, folder))
            sys.path.insert(0, os.path.abspath("peft.zip"))
            import peft_gradguard
            import peft.tuners.adalora
            return once() and "peft.zip" in peft.__file__

        def way_finders_put_back():
            import peft_gradguard
            sys.meta_path[:] = finders
            import peft
            return peft_gradguard.is_enabled() and once()

        def way_guard_imported_anew():
            import peft_gradguard, peft
            sys.modules["peft.tuners.adalora"].RankAllocator
            forget("peft_gradguard")
            import peft_gradguard
            peft_gradguard.disable()
            switch = sys.modules["peft_gradguard.switch"]
            wrapper = vars(sys.modules["peft.tuners.adalora"].RankAllocator)["update_ipt"]
            return once() and type(wrapper) is sys.modules["peft_gradguard.wrapper"].GuardWrapper

        def way_guard_anew_before_peft():
            import peft_gradguard
            forget("peft_gradguard")
            import peft_gradguard, peft
            wrapper = vars(sys.modules["peft.tuners.adalora"].RankAllocator)["update_ipt"]
            return once() and type(wrapper) is sys.modules["peft_gradguard.wrapper"].GuardWrapper
        """,
        tmp_path,
    )
    assert results == dict.fromkeys(results, True)
    assert len(results) == 10


def test_what_is_found_is_as_without_the_guard(tmp_path: Path) -> None:
    results = ways(
        """
        def way_spec():
            import peft_gradguard
            spec = importlib.util.find_spec("peft.tuners.adalora")
            assert isinstance(spec.loader, SourceFileLoader)
            assert spec.loader.get_source("peft.tuners.adalora")
            import peft.tuners.adalora as module
            return [type(module.__loader__) is SourceFileLoader, type(module.__spec__.loader) is SourceFileLoader,
                    type(importlib.util.find_spec("peft.tuners.adalora").loader) is SourceFileLoader]

        def way_missing_module():
            import peft_gradguard
            try:
                import peft.tuners.adalora.nonsense
            except ModuleNotFoundError as error:
                return error.name.endswith("nonsense") or error.name == "peft.tuners.adalora.nonsense"

        def way_lazy_stays_lazy():
            import peft_gradguard
            import peft
            forget("peft")
            sys.meta_path.insert(0, Lazy)
            spec = importlib.util.find_spec("peft")
            from importlib.util import LazyLoader, module_from_spec
            import peft
            return once()
        """,
        tmp_path,
    )
    assert results == {"way_spec": [True] * 3, "way_missing_module": True, "way_lazy_stays_lazy": True}


def test_module_that_is_executed_on_first_use_is_wrapped_then(tmp_path: Path) -> None:
    package = tmp_path / "peft" / "tuners"
    package.mkdir(parents=True)
    for folder in (tmp_path / "peft", package):
        (folder / "__init__.py").write_text("")
    methods = {
        "update_ipt": "model",
        "update_and_allocate": "model, global_step, force_mask=False",
        "budget_schedule": "step",
        "mask_to_budget": "model, budget",
        "mask_using_rank_pattern": "model, rank_pattern",
        "_set_budget_scheduler": "model",
    }
    source = [
        "executed = True",
        "class RankAllocator:",
        *(f"    def {n}(self, {a}): pass" for n, a in methods.items()),
    ]
    (package / "adalora.py").write_text("\n".join(source))
    results = ways(
        """
        sys.path.insert(0, os.getcwd())

        def lazily(ours_before):
            if ours_before:
                import peft_gradguard
            sys.meta_path.insert(0, Lazy)
            import peft.tuners.adalora as module
            if not ours_before:
                import peft_gradguard
            left = "executed" not in object.__getattribute__(module, "__dict__")
            module.RankAllocator
            return [left, once()]

        def way_ours_before():
            return lazily(True)

        def way_ours_after():
            return lazily(False)
        """,
        tmp_path,
    )
    assert results == {"way_ours_before": [True, True], "way_ours_after": [True, True]}


def test_threads_and_children(tmp_path: Path) -> None:
    results = ways(
        """
        def together(*bodies):
            barrier = threading.Barrier(len(bodies))
            def start(body):
                barrier.wait()
                exec(body)
            threads = [threading.Thread(target=start, args=(body,)) for body in bodies]
            [thread.start() for thread in threads]
            [thread.join(60) for thread in threads]
            return not any(thread.is_alive() for thread in threads) and once()

        def way_threads():
            sys.setswitchinterval(1e-4)
            faulthandler.dump_traceback_later(50, exit=True)
            return together("import peft", *["import peft_gradguard, peft"] * 3, "import peft_gradguard")

        def way_threads_and_a_tool():
            import peft_gradguard
            return together("import peft", "sys.meta_path.insert(0, ReplacesTheLoader)", "import peft.tuners.adalora",
                            "import peft_gradguard; peft_gradguard.enable()") or peft_gradguard.is_enabled() and once()

        def way_forked_before_peft():
            import peft_gradguard
            def child():
                import peft
                return once()
            return in_fork(child)

        def way_off_in_a_block_while_peft_comes():
            import peft_gradguard
            with peft_gradguard.disabled():
                import peft
            return peft_gradguard.is_enabled() and once()
        """,
        tmp_path,
    )
    assert results == dict.fromkeys(results, True)


@pytest.mark.skipif(PEFT_VERSION < (0, 6), reason="one of these tools, which fights to be first, wins in PEFT 0.5")
def test_start_file_with_tools_that_come_first(tmp_path: Path) -> None:
    results = ways(
        """
        spec = importlib.util.find_spec("peft_gradguard")
        sys.path.insert(0, os.path.join(os.path.dirname(spec.origin), "autoload"))
        sys.modules.pop("_peft_gradguard_start", None)

        def started(tool):
            import _peft_gradguard_start as start
            os.environ["PEFT_GRADGUARD"] = "1"
            start.start("test")
            sys.meta_path.insert(0, tool)
            assert "peft_gradguard" not in sys.modules
            import peft
            if tool is ByItself:
                import this
            return "peft_gradguard" in sys.modules and once()

        def way_all():
            return [in_fork(started, tool) for tool in TOOLS]
        """,
        tmp_path,
    )
    assert results == {"way_all": [True] * 6}


def test_name_of_the_module_in_version_0_1_0() -> None:
    program = """
import peft_gradguard.hooks
from peft_gradguard.hooks import METHODS, GuardWrapper, apply_if_enabled, enable, is_enabled, is_guarded
assert peft_gradguard.hooks.is_guarded is is_guarded
assert is_enabled() and len(METHODS) == 6
"""
    environ = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path[1:])}
    assert subprocess.run([sys.executable, "-c", program], env=environ).returncode == 0
