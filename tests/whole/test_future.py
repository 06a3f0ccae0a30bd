"""A PEFT that has mended the bug itself: the guard on it does no harm, and says that it is not needed."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import peft
import pytest
import torch
from scenarios import PEFT_VERSION, SCENARIOS, branches, train

if TYPE_CHECKING:
    from collections.abc import Callable

pytestmark = pytest.mark.skipif(PEFT_VERSION < (0, 18), reason="what is patched is the text of PEFT 0.18 and later")

SCORED = 'if "lora_" in n and self.adapter_name in n:\n'
FIRST_TEXT = "        # Get the importance score for A, E, B\n        for n, p in model.named_parameters():\n"
MASKED = "        with torch.no_grad():\n            for n, p in model.named_parameters():\n"
LEFT_AT_END = "k=self.init_bgt - budget,"
KEY = 'key = n if not is_adapter_name_truncated else n.replace(f".{self.adapter_name}", "")\n'
KNOWN_KEY = f"{KEY}                    if key not in rank_pattern:\n                        continue\n"
LEFT_OF_SCORED = "k=max(1, sum(map(len, all_score)) - min(budget, sum(map(len, all_score)) - 1)),"


def replaced(text: str, *changes: tuple[str, str]) -> str:
    for old, new in changes:
        assert old in text, old
        text = text.replace(old, new, 1)
    return text


def skips_missing(text: str) -> str:
    """``continue`` where there is no gradient, and where there is no score."""
    in_first = FIRST_TEXT + "            if n not in self.exp_avg_ipt:\n                continue\n"
    in_mask = MASKED.replace("model.named_parameters()", "list(model.named_parameters())")
    return replaced(
        text,
        (SCORED, SCORED.replace(":\n", " and p.grad is not None:\n")),
        (FIRST_TEXT, in_first),
        (LEFT_AT_END, LEFT_OF_SCORED),
        (KEY, KNOWN_KEY),
        (
            MASKED + '                if f"lora_E.{self.adapter_name}" in n:\n                    p.masked_fill_(t',
            in_mask + "                if n in triplet_ipt:\n                    p.masked_fill_(t",
        ),
    )


def filters_in_a_helper(text: str) -> str:
    """One new method decides what takes part."""
    helper = (
        "    def _trainable(self, model, scored=False):\n"
        "        for n, p in model.named_parameters():\n"
        "            if p.requires_grad and (n in self.exp_avg_ipt if scored else p.grad is not None):\n"
        "                yield n, p\n\n"
        "    def update_ipt(self, model):\n"
    )
    trainable = "self._trainable(model, scored=True)"
    text = replaced(
        text,
        ("    def update_ipt(self, model):\n", helper),
        (FIRST_TEXT, FIRST_TEXT.replace("model.named_parameters()", trainable)),
        (LEFT_AT_END, LEFT_OF_SCORED),
        (KEY, KNOWN_KEY),
    )
    scoring, found, masking = text.partition("    def _element_score")
    comment, every = "every weight\n        for n, p in ", "model.named_parameters()"
    scoring = replaced(scoring, (comment + every, comment + "self._trainable(model)"))
    mask = MASKED + '                if f"lora_E.{self.adapter_name}" in n:\n                    p.masked_fill_(t'
    return scoring + found + replaced(masking, (mask, mask.replace("model.named_parameters()", trainable)))


def takes_another_argument(text: str) -> str:
    """The methods take, and hand on, one argument more."""
    return replaced(
        skips_missing(text),
        ("def update_ipt(self, model):", "def update_ipt(self, model, skip_missing=True):"),
        (" and p.grad is not None:", " and not (skip_missing and p.grad is None):"),
        ("def mask_to_budget(self, model, budget):", "def mask_to_budget(self, model, budget, skip_missing=False):"),
        ("force_mask=False):", "force_mask=False, *, skip_missing=True):"),
        ("self.update_ipt(model)", "self.update_ipt(model, skip_missing=skip_missing)"),
        ("self.mask_to_budget(model, budget)", "self.mask_to_budget(model, budget, skip_missing)"),
    )


def called_with_another_argument(text: str) -> str:
    return replaced(text, ("self.model, global_step)", "self.model, global_step, skip_missing=True)"))


FIXES: dict[str, Callable[[str], str]] = {
    "skips what is missing": skips_missing,
    "filters in a helper": filters_in_a_helper,
    "takes another argument": takes_another_argument,
}

ROOT = Path(__file__).resolve().parents[2]
PROBE = str(ROOT / "peft_gradguard" / "cli" / "probe.py")

PROGRAM = """
import runpy, sys, torch
import peft
from scenarios import SCENARIOS, branches, train
folder, file, probe = sys.argv[1:]
assert peft.__file__.startswith(folder), peft.__file__
look = runpy.run_path(probe)["look"]

def outcomes():
    trainings = {"frozen layer": SCENARIOS["frozen layer"], "healthy": branches()}
    found = {name: vars(train(scenario)) for name, scenario in trainings.items()}
    return {"needs_guard": look()["needs_guard"], **found}

plain = outcomes()
assert not any(name.startswith("peft_gradguard") for name in sys.modules)
import peft_gradguard
assert peft_gradguard.is_enabled()
torch.save({"plain": plain, "guarded": outcomes()}, file)
"""


@pytest.fixture(scope="module", params=FIXES)
def fixed_peft(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a mended copy of the installed PEFT."""
    folder = tmp_path_factory.mktemp("fixed")
    shutil.copytree(Path(peft.__file__).parent, folder / "peft", ignore=shutil.ignore_patterns("__pycache__"))
    layer = folder / "peft" / "tuners" / "adalora" / "layer.py"
    layer.write_text(FIXES[request.param](layer.read_text()))
    if request.param == "takes another argument":
        caller = layer.with_name("model.py")
        caller.write_text(called_with_another_argument(caller.read_text()))
    return folder


def run(fixed_peft: Path, *command: str, **environ: str) -> str:
    path = [fixed_peft, ROOT / "tests" / "support", ROOT, *sys.path[1:]]
    environ = {**os.environ, "PYTHONPATH": os.pathsep.join(map(str, path)), **environ}
    found = subprocess.run([sys.executable, *command], env=environ, capture_output=True, text=True)
    assert found.returncode in (0, 1), found.stderr
    assert "Traceback" not in found.stderr, found.stderr
    return found.stdout


def outcomes(fixed_peft: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """What trainings give with the guard and, before it was there, without."""
    file = str(fixed_peft / "outcomes.pt")
    run(fixed_peft, "-c", PROGRAM, str(fixed_peft), file, PROBE)
    found = torch.load(file)
    return found["guarded"], found["plain"]


def assert_same(one: dict[str, Any], other: dict[str, Any]) -> None:
    for name in ("budgets", "patterns", "losses"):
        assert one[name] == other[name], name
    for mine, theirs in zip([one["weights"], *one["scores"]], [other["weights"], *other["scores"]], strict=True):
        assert mine.keys() == theirs.keys()
        assert all(torch.equal(mine[name], theirs[name]) for name in mine)


def test_guard_on_a_mended_peft_does_no_harm(fixed_peft: Path) -> None:
    guarded, plain = outcomes(fixed_peft)
    assert_same(guarded["healthy"], plain["healthy"])
    # The mended PEFT no longer fails; under the guard it allocates as the guard on today's PEFT does.
    assert len(plain["frozen layer"]["losses"]) == len(guarded["frozen layer"]["losses"])
    assert_same(guarded["frozen layer"], vars(train(SCENARIOS["frozen layer"])))
    assert_same(guarded["healthy"], vars(train(branches())))
    # As ``peft-gradguard status`` finds out.
    assert not guarded["needs_guard"]
    assert not plain["needs_guard"]


@pytest.mark.parametrize("fixed_peft", ["skips what is missing"], indirect=True)
def test_status_says_that_a_mended_peft_needs_no_guard(fixed_peft: Path) -> None:
    status = json.loads(run(fixed_peft, "-m", "peft_gradguard", "status", "--json"))
    assert status["needs_guard"] is False
