"""What of PEFT is wrapped, and what is left alone."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
from fresh import python, write_peft

if TYPE_CHECKING:
    from pathlib import Path

ODD_PEFTS = {
    "no RankAllocator": ("", "has no class RankAllocator"),
    "method gone": ("class RankAllocator:\n    pass\n", "RankAllocator has no method update_ipt"),
    "other arguments": (
        "class RankAllocator:\n    def update_ipt(self, model, step):\n        pass\n",
        "RankAllocator.update_ipt(self, model, step) does not take (self, model)",
    ),
    "class that cannot be looked at": (
        "class Meta(type):\n    def __getattribute__(cls, name):\n        raise OSError(name)\n"
        "class RankAllocator(metaclass=Meta):\n    pass\n",
        "could not be applied",
    ),
}


@pytest.mark.parametrize("imports", ["peft_gradguard, peft.tuners.adalora", "peft.tuners.adalora, peft_gradguard"])
@pytest.mark.parametrize("kind", ODD_PEFTS)
def test_peft_that_does_not_fit_is_left_untouched(kind: str, imports: str, tmp_path: Path) -> None:
    source, complaint = ODD_PEFTS[kind]
    write_peft(tmp_path, source)
    body = f"""
        import {imports}
        peft_gradguard.enable()
        names = dict(vars(type)["__dict__"].__get__(getattr(peft.tuners.adalora, "RankAllocator", object)))
        print(json.dumps([n for n, v in names.items() if type(v).__module__ == "peft_gradguard.wrapper"]))
    """
    wrapped, stderr = python(body, path=tmp_path)
    assert wrapped == []
    assert complaint in stderr
    assert "AdaLoRA runs unguarded" in stderr
    # With its cause where it is not one that the message knows.
    assert ("Traceback" in stderr) == (complaint == "could not be applied")


def test_broken_logging_does_not_stop_the_import_of_a_peft_that_does_not_fit(tmp_path: Path) -> None:
    write_peft(tmp_path, "class RankAllocator:\n    pass\n")
    body = """
        class Raises(logging.Handler):
            def emit(self, record):
                raise OSError("disk full")

        logging.getLogger().addHandler(Raises())
        import peft_gradguard, peft.tuners.adalora
        print(json.dumps(peft_gradguard.is_enabled()))
    """
    enabled, stderr = python(body, path=tmp_path)
    assert enabled
    assert stderr.startswith("peft_gradguard: peft_gradguard leaves PEFT untouched: RankAllocator has no method")
    assert "disk full" in stderr


@pytest.mark.peft
def test_somebody_elses_wrapper_above_or_beneath_stays() -> None:
    results, _ = python("""
        import wrapt, peft
        from peft.tuners.adalora import RankAllocator
        seen = []

        def observe(wrapped, instance, args, kwargs):
            seen.append(1)
            return wrapped(*args, **kwargs)

        wrapt.wrap_function_wrapper(RankAllocator, "update_ipt", observe)
        import peft_gradguard
        wrapt.wrap_function_wrapper(RankAllocator, "update_ipt", observe)
        peft_gradguard.enable()
        print(json.dumps([wrappers(), survives(), len(seen)]))
    """)
    assert results == [[1] * 6, True, 2]
