"""Which texts of ``update_ipt`` are computed in PEFT's place: those of PEFT's releases, and no other."""

from __future__ import annotations

import ast
import functools
import importlib.util
import inspect
import json
import os
import py_compile
import shutil
import subprocess
import sys
from pathlib import Path
from types import FunctionType
from typing import TYPE_CHECKING, Any

import peft
import pytest
import torch
from peft.tuners.adalora import RankAllocator
from torch import nn

if TYPE_CHECKING:
    from collections.abc import Callable
    from importlib.machinery import ModuleSpec

# This module is imported by the worker without the guard as well: no import of the guard at the top.

SOURCE = Path(str(inspect.getsourcefile(RankAllocator))).resolve()
ROOT = Path(__file__).resolve().parents[2]

TRAINING = """
import hashlib, json, logging
import peft, torch
torch.set_num_threads(1)

def train():
    torch.manual_seed(0)
    base = torch.nn.Sequential(torch.nn.Linear(8, 8), torch.nn.ReLU(), torch.nn.Linear(8, 8))
    settings = dict(target_modules=["0", "2"], init_r=4, target_r=2, total_step=100, tinit=50, tfinal=10)
    model = peft.get_peft_model(base, peft.AdaLoraConfig(**settings))
    allocator = model.base_model.rankallocator
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    for step in range(1, 31):
        model(torch.randn(4, 8)).pow(2).mean().backward()
        optimizer.step()
        model.base_model.update_and_allocate(step)
        optimizer.zero_grad()
    scores = [t for kind in (allocator.ipt, allocator.exp_avg_ipt, allocator.exp_avg_unc) for t in kind.values()]
    return hashlib.sha256(b"".join(t.numpy().tobytes() for t in scores)).hexdigest(), allocator.mark

plain = train()
import peft_gradguard
logging.disable(logging.CRITICAL)
print(json.dumps([plain, train()]))
"""

SQUARED = ("(p * p.grad).abs().detach()", "((p * p.grad).abs() if self.mark < 10 else (p * p.grad) ** 2).detach()")
MARKED = (
    "def update_ipt(self, model):\n",
    "def update_ipt(self, model):\n        self.mark = getattr(self, 'mark', 0) + 1\n",
)
SAME_LINES = (SQUARED[0], SQUARED[1].replace("self.mark", "len(self.ipt)"))


def is_known(function: object) -> bool:
    from peft_gradguard.speed import known

    return known.is_known(function)


def text(*changes: tuple[str, str]) -> str:
    """The file in which PEFT has ``RankAllocator``, edited."""
    found = SOURCE.read_text(encoding="utf-8")
    for old, new in changes:
        assert found.count(old) == 1, old
        found = found.replace(old, new)
    return found


def load(file: Path, source: str) -> FunctionType:
    """The ``update_ipt`` of such a file, imported from there as PEFT's own."""
    file.write_text(source, encoding="utf-8")
    return function_in(importlib.util.spec_from_file_location(f"{RankAllocator.__module__}_{file.stem}", file))


def function_in(spec: ModuleSpec | None) -> FunctionType:
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    try:
        spec.loader.exec_module(module)
    finally:
        del sys.modules[spec.name]
    function = module.RankAllocator.update_ipt
    assert isinstance(function, FunctionType)
    return function


def released() -> FunctionType:
    function = inspect.unwrap(RankAllocator.update_ipt)
    assert isinstance(function, FunctionType)
    return function


@pytest.mark.peft
def test_the_installed_peft_is_known() -> None:
    """Where this fails, PEFT has a new text: ``python tests/known_texts.py`` names it. Read it, then add it."""
    assert is_known(released())


def test_peft_edited_in_place_scores_as_it_was_edited(tmp_path: Path) -> None:
    """As PEFT for ten steps, so that no comparison at the start tells, then otherwise; and it counts its calls."""
    package = Path(peft.__file__).resolve().parent
    shutil.copytree(package, tmp_path / "peft", ignore=shutil.ignore_patterns("__pycache__"))
    (tmp_path / "peft" / SOURCE.relative_to(package)).write_text(text(MARKED, SQUARED), encoding="utf-8")
    path = os.pathsep.join([str(tmp_path), str(ROOT), *filter(None, sys.path)])
    environ = {**os.environ, "PYTHONPATH": path, "PYTHONWARNINGS": "ignore"}
    found = subprocess.run([sys.executable, "-c", TRAINING], env=environ, capture_output=True, text=True)
    assert found.returncode == 0, found.stderr[-3000:]
    plain, guarded = json.loads(found.stdout.splitlines()[-1])
    assert guarded == plain
    assert plain[1] == 30


@pytest.mark.peft
def test_other_blanks_and_comments_are_the_same_text(tmp_path: Path) -> None:
    changes = [
        ("# Sensitivity smoothing", "#   smoothed,\n\n                    # as in the paper"),
        ("def update_ipt(self, model):\n", "def update_ipt(\n        self,\n        model,\n    ):\n"),
        (
            SQUARED[0],
            "(\n p*p.grad ).abs() . detach()" if released().__code__.co_names.count("deepspeed") else SQUARED[0],
        ),
    ]
    assert is_known(load(tmp_path / "spaced.py", text(*changes)))


def test_an_import_that_python_315_calls_not_lazy_is_the_import_of_before() -> None:
    from peft_gradguard.speed import known

    def told(**lazy: int) -> str:
        (function,) = ast.parse("def update_ipt(self):\n    import deepspeed").body
        assert isinstance(function, ast.FunctionDef)
        for name, value in lazy.items():
            statement = function.body[0]
            statement._fields = ("names", name)
            setattr(statement, name, value)
        return known.fingerprint(function)

    assert told(is_lazy=0) == told()
    assert told(is_lazy=1) != told()
    assert told(another=0) != told()


OTHERWISE = {
    "another formula": SQUARED,
    "one more line": MARKED,
    "another number": ("(1 - self.beta1)", "(1.0 - self.beta1)"),
    "another name": ("self.exp_avg_unc[n] = (\n", "self.exp_avg_und[n] = (\n"),
    "another argument": ("def update_ipt(self, model):", "def update_ipt(self, model, rest=None):"),
    "a decorator": ("    def update_ipt(self, model):", "    @torch.no_grad()\n    def update_ipt(self, model):"),
}


@pytest.mark.peft
@pytest.mark.parametrize("change", OTHERWISE)
def test_another_text_is_not_known(change: str, tmp_path: Path) -> None:
    assert not is_known(load(tmp_path / "edited.py", text(OTHERWISE[change])))


@pytest.mark.peft
def test_new_code_in_the_old_function_is_not_known(tmp_path: Path) -> None:
    """As tools put it there that reload edited modules in a running session."""
    function = load(tmp_path / "before.py", text())
    assert is_known(function)
    function.__code__ = load(tmp_path / "after.py", text(SAME_LINES)).__code__
    assert not is_known(function)


@pytest.mark.peft
@pytest.mark.parametrize("edited", ["what runs", "what is read"])
def test_file_edited_since_it_was_imported_is_not_believed(edited: str, tmp_path: Path) -> None:
    """Neither old code under a new text, nor new code under the old text, is taken for what the file says."""
    runs, reads = (text(SAME_LINES), text()) if edited == "what runs" else (text(), text(SAME_LINES))
    function = load(tmp_path / "file.py", runs)
    (tmp_path / "file.py").write_text(reads, encoding="utf-8")
    assert not is_known(function)


@pytest.mark.peft
def test_without_a_source_nothing_is_known(tmp_path: Path) -> None:
    (tmp_path / "lost.py").write_text(text(), encoding="utf-8")
    cached = tmp_path / "lost.pyc"
    py_compile.compile(str(tmp_path / "lost.py"), cfile=str(cached), dfile="nowhere/lost.py", doraise=True)
    name = f"{RankAllocator.__module__}_lost"
    assert not is_known(function_in(importlib.util.spec_from_file_location(name, cached)))


NO_FUNCTIONS: dict[str, Callable[[], Any]] = {
    "what wraps it": lambda: functools.wraps(released())(lambda self, model: None),
    "with another torch": lambda: FunctionType(released().__code__, {**released().__globals__, "torch": object()}),
    "bound": lambda: released().__get__(object()),
    "nothing": lambda: None,
    "built in": lambda: len,
}


@pytest.mark.peft
@pytest.mark.parametrize("name", NO_FUNCTIONS)
def test_what_is_no_such_function_is_not_known(name: str) -> None:
    assert not is_known(NO_FUNCTIONS[name]())


# -- What is set for the whole program


def scores_of(setting: str) -> list[torch.Tensor]:
    torch.manual_seed(0)
    base = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 8))
    settings = {"init_r": 4, "target_r": 2, "tinit": 2, "tfinal": 4, "deltaT": 2, "total_step": 30}
    model = peft.get_peft_model(base, peft.AdaLoraConfig(target_modules=["0", "1", "2"], **settings))
    for parameter in model.parameters():
        parameter.data.normal_()
    low = model.base_model.model[1]
    for factor in ("lora_A", "lora_B", "lora_E"):
        getattr(low, factor)["default"].data = getattr(low, factor)["default"].data.to(torch.bfloat16)
    allocator, found = model.base_model.rankallocator, []
    for step in range(1, 31):
        torch.manual_seed(step)
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.grad = torch.randn(parameter.shape).to(parameter.dtype)
        # Those of one layer, too large and too small for the norm that is asked first.
        for parameter, size in zip(model.base_model.model[2].lora_E.values(), (1e30, 1e-30), strict=False):
            parameter.grad.mul_(size)
        if setting == "context":
            with torch.device("meta"):
                model.base_model.update_and_allocate(step)
        elif setting == "device":
            torch.set_default_device("meta")
            try:
                model.base_model.update_and_allocate(step)
            finally:
                torch.set_default_device(None)
        else:
            torch.set_default_dtype(torch.float64)
            try:
                model.base_model.update_and_allocate(step)
            finally:
                torch.set_default_dtype(torch.float32)
        kinds = (allocator.ipt, allocator.exp_avg_ipt, allocator.exp_avg_unc)
        found += [t.clone() for kind in kinds for t in kind.values()]
    found += [parameter.detach().clone() for name, parameter in model.named_parameters() if "lora_" in name]
    return found


@pytest.mark.peft
@pytest.mark.parametrize("setting", ["context", "device", "dtype"])
def test_defaults_of_torch_reach_nothing(setting: str, plain: Callable[..., Any]) -> None:
    ours, theirs = scores_of(setting), plain(scores_of, setting)
    assert len(ours) == len(theirs) > 0
    for mine, pefts in zip(ours, theirs, strict=True):
        assert (mine.device, mine.dtype) == (pefts.device, pefts.dtype)
        assert torch.equal(mine, pefts)
