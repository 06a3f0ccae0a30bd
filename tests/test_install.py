"""When and how the guard gets on and off: every order of imports, threads, children, values of the switch."""

from __future__ import annotations

import itertools
import json
import sys
import textwrap
from typing import TYPE_CHECKING

import pytest
from fresh import PROLOGUE, python, run, write_peft

if TYPE_CHECKING:
    from pathlib import Path


def test_import_loads_neither_torch_nor_peft() -> None:
    loaded, _ = python("""
        import peft_gradguard
        print(json.dumps(sorted({"torch", "peft", "transformers", "numpy"} & set(sys.modules))))
    """)
    assert loaded == []


ORDERS = [
    order
    for order in itertools.permutations(["peft", "guard", "enable", "disable"])
    if order.index("guard") < min(order.index("enable"), order.index("disable"))
]


@pytest.mark.peft
def test_every_order_of_imports_and_switching_twice_over() -> None:
    results, _ = python(
        """
        # All that PEFT imports is loaded once, here; PEFT itself anew in each child.
        import peft
        for name in [name for name in sys.modules if name.partition(".")[0] == "peft"]:
            del sys.modules[name]
        del peft

        def run(order):
            for action in [*order, *order]:
                if action == "peft":
                    import peft.tuners.adalora
                elif action == "guard":
                    import peft_gradguard
                else:
                    getattr(peft_gradguard, action)()
            return peft_gradguard.is_enabled(), wrappers(), survives()

        print(json.dumps([in_fork(run, order) for order in json.loads(sys.argv[1])]))
        """.replace("sys.argv[1]", repr(json.dumps(ORDERS)))
    )
    assert len(results) == len(ORDERS) == 8
    for order, (enabled, counts, survived) in zip(ORDERS, results, strict=True):
        expected = order.index("enable") > order.index("disable")
        assert (enabled, survived) == (expected, expected), order
        assert counts == [1] * 6, order


def test_two_threads_at_once() -> None:
    results, _ = python("""
        import torch, transformers

        def run(*bodies):
            barrier = threading.Barrier(len(bodies))

            def start(body):
                barrier.wait()
                exec(body)

            threads = [threading.Thread(target=start, args=(body,)) for body in bodies]
            [thread.start() for thread in threads]
            [thread.join(60) for thread in threads]
            assert not any(thread.is_alive() for thread in threads)
            return wrappers(), survives()

        late = "import time; time.sleep(%s); import peft_gradguard"
        pairs = [
            ("import peft", "import peft_gradguard"),
            *(("import peft", late % wait) for wait in (0.2, 0.5, 0.8)),
            ("import peft_gradguard, peft", "import peft_gradguard, peft"),
            ("import peft_gradguard as g; g.enable()", "import peft, peft_gradguard as g; g.enable()"),
        ]
        print(json.dumps([in_fork(run, *pair) for pair in pairs]))
    """)
    assert results == [[[1] * 6, True]] * 6


HALF_IMPORTED = """
import threading, time
threading.importing.set()
time.sleep(1)

class RankAllocator:
    def update_ipt(self, model): pass
    def update_and_allocate(self, model, global_step, force_mask=False): pass
    def budget_schedule(self, step): pass
    def mask_to_budget(self, model, budget): pass
    def mask_using_rank_pattern(self, model, rank_pattern): pass
    def _set_budget_scheduler(self, model): pass
"""


def test_peft_that_another_thread_is_still_importing_is_waited_for(tmp_path: Path) -> None:
    write_peft(tmp_path, HALF_IMPORTED)
    counts, stderr = python(
        """
        import torch
        threading.importing = threading.Event()
        thread = threading.Thread(target=__import__, args=("peft.tuners.adalora",))
        thread.start()
        threading.importing.wait()
        import peft_gradguard
        print(json.dumps(wrappers()))
        """,
        path=tmp_path,
    )
    assert counts == [1] * 6
    assert stderr == ""


@pytest.mark.peft
def test_forked_child_is_guarded_too() -> None:
    results, _ = python("""
        import peft_gradguard, peft
        print(json.dumps([in_fork(wrappers), in_fork(survives)]))
    """)
    assert results == [[1] * 6, True]


def test_spawned_child_that_imports_the_guard_is_guarded(tmp_path: Path) -> None:
    (tmp_path / "train_like_script.py").write_text(
        PROLOGUE
        + textwrap.dedent("""
            import peft_gradguard

            if __name__ == "__main__":
                with multiprocessing.get_context("spawn").Pool(1) as pool:
                    print(json.dumps([pool.apply(wrappers), pool.apply(survives)]))
        """)
    )
    found = run([sys.executable, str(tmp_path / "train_like_script.py")])
    assert json.loads(found.stdout.splitlines()[-1]) == [[1] * 6, True]


@pytest.mark.parametrize(
    ("value", "on"),
    [
        *((value, True) for value in ("1", "true", "yes", "on", "TRUE", "Yes", " on ", "", None)),
        *((value, False) for value in ("0", "false", "no", "off", "FALSE", "No", " Off ")),
    ],
)
def test_switch_in_the_environment(value: str | None, on: bool) -> None:
    body = """
        finders, hooks = len(sys.meta_path), len(sys.path_hooks)
        import peft_gradguard
        waits = len(sys.meta_path) > finders, len(sys.path_hooks) > hooks
        print(json.dumps([peft_gradguard.is_enabled(), *waits]))
    """
    state, stderr = python(body, **({} if value is None else {"PEFT_GRADGUARD": value}))
    assert state == [on] * 3
    assert stderr == ""


def test_nonsense_in_the_switch_is_named_and_the_default_applies() -> None:
    body = "import peft_gradguard\nprint(json.dumps(peft_gradguard.is_enabled()))"
    enabled, stderr = python(body, PEFT_GRADGUARD="maybe")
    assert enabled
    assert "RuntimeWarning: PEFT_GRADGUARD='maybe' is not understood" in stderr
    assert "1, true, yes, on" in stderr
    assert "0, false, no, off" in stderr


def test_nonsense_in_the_switch_does_not_stop_a_program_whose_warnings_are_errors() -> None:
    body = "import peft_gradguard\nprint(json.dumps(peft_gradguard.is_enabled()))"
    enabled, stderr = python(body, "-W", "error::RuntimeWarning", PEFT_GRADGUARD="maybe")
    assert enabled
    assert "peft_gradguard: PEFT_GRADGUARD='maybe' is not understood" in stderr


@pytest.mark.peft
def test_switched_off_in_the_environment_wraps_nothing_until_enabled() -> None:
    results, _ = python(
        """
        import peft_gradguard, peft
        before = wrappers(), survives()
        peft_gradguard.enable()
        print(json.dumps([before, [wrappers(), survives()]]))
        """,
        PEFT_GRADGUARD="off",
    )
    assert results == [[[0] * 6, False], [[1] * 6, True]]
