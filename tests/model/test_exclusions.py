"""The user's own filter: what it leaves out, what it says, and that it goes away again."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from typing import TYPE_CHECKING, Any

import peft
import pytest
import torch
from fresh import python_path
from scenarios import FINALISING, INIT_R, TARGET_R, TOTAL, branches, build, frozen, loss_of, train, vectors
from steps import advance, energy

import peft_gradguard
from peft_gradguard.model import exclusions

if TYPE_CHECKING:
    import logging
    from collections.abc import Iterator
    from pathlib import Path

BRANCH = [f"branch.{layer}.lora_{factor}.default" for layer in (0, 2) for factor in "ABE"]


@pytest.fixture(autouse=True)
def _nothing_stays_excluded() -> Iterator[None]:
    yield
    assert exclusions._exclusions == []


@pytest.fixture
def model() -> peft.PeftModel:
    model = build(branches())
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if ".lora_E." in name:
                parameter.normal_(generator=torch.Generator().manual_seed(len(name)))
    return model


def pattern(model: peft.PeftModel) -> dict[str, list[bool]]:
    return model.peft_config["default"].rank_pattern or {}


@pytest.mark.peft
@pytest.mark.parametrize("pattern_", ["branch.*", "*.branch.*", "base_model.model.branch.?.lora_[ABE].default"])
def test_excluded_parameters_are_neither_scored_nor_ranked_and_keep_their_rank(
    model: peft.PeftModel, records: list[logging.LogRecord], pattern_: str
) -> None:
    before = energy(model, "branch.0").clone()
    with peft_gradguard.exclude(pattern_):
        advance(model, *range(1, TOTAL + 1))
    allocator = model.base_model.rankallocator
    assert sorted(pattern(model)) == ["trunk.0.lora_E.default", "trunk.2.lora_E.default"]
    assert (allocator.init_bgt, allocator.target_bgt) == (2 * INIT_R, 2 * TARGET_R)
    assert torch.equal(energy(model, "branch.0"), before)
    said = [(name, record.reason, record.levelname) for record in records for name in record.parameters]
    assert sorted(said) == [(name, "excluded", "WARNING") for name in sorted(BRANCH)]
    assert "out of scoring and ranking (adapter 'default', step 1): excluded" in records[0].getMessage()


@pytest.mark.parametrize("pattern_", ["*.branch.*", "*.branch.*.lora_E.*"])
def test_what_was_scored_before_drops_out_of_the_ranking_and_comes_back(model: peft.PeftModel, pattern_: str) -> None:
    allocator = model.base_model.rankallocator
    advance(model, *range(1, 7))
    assert allocator.init_bgt == 4 * INIT_R
    scores = {name: allocator.exp_avg_ipt[name] for name in BRANCH if "lora_E" in name}
    with peft_gradguard.exclude(pattern_):
        advance(model, 7, 8)
        assert allocator.init_bgt == 2 * INIT_R
        assert not [name for name in pattern(model) if name.startswith("branch.")]
        assert all(allocator.exp_avg_ipt[name] is score for name, score in scores.items())
    advance(model, 9, 10)
    assert allocator.init_bgt == 4 * INIT_R
    assert all(allocator.exp_avg_ipt[name] is not score for name, score in scores.items())
    assert [name for name in pattern(model) if name.startswith("branch.")]


def test_triplet_of_which_only_a_is_excluded_is_ranked_by_the_rest(model: peft.PeftModel) -> None:
    with peft_gradguard.exclude("*.trunk.0.lora_A.*"):
        advance(model, *range(1, FINALISING))
        assert "trunk.0.lora_A.default" not in model.base_model.rankallocator.exp_avg_ipt
        advance(model, FINALISING)
    assert "trunk.0.lora_E.default" in pattern(model)
    assert sum(map(sum, pattern(model).values())) == 4 * TARGET_R


def test_final_phase_goes_on_by_the_pattern_that_is_saved(model: peft.PeftModel) -> None:
    advance(model, *range(1, FINALISING + 1))
    with torch.no_grad():
        energy(model, "branch.0").fill_(1.0)
    with peft_gradguard.exclude("*"):
        advance(model, FINALISING + 1)
    assert (energy(model, "branch.0") != 0).view(-1).tolist() == pattern(model)["branch.0.lora_E.default"]


def test_handle_undoes_just_what_it_did() -> None:
    first, second = peft_gradguard.exclude("a.*", "b.*"), peft_gradguard.exclude("a.*")
    assert repr(first) == "<peft_gradguard.exclude('a.*', 'b.*')>"
    first.undo()
    first.undo()
    assert repr(first) == "<peft_gradguard.exclude('a.*', 'b.*'), undone>"
    patterns = exclusions.patterns_in_force()
    assert patterns is not None
    assert patterns.patterns == ("a.*",)
    with pytest.raises(ZeroDivisionError), second:
        1 / 0  # noqa: B018
    assert exclusions.patterns_in_force() is None


@pytest.mark.parametrize(
    ("patterns", "error", "message"),
    [
        ((), ValueError, "at least one pattern"),
        (("a.*", ""), ValueError, "empty pattern ''"),
        ((" ",), ValueError, "empty pattern ' '"),
        ((None,), TypeError, "given None, and needs strings"),
        ((["a.*"],), TypeError, r"given \['a\.\*'\].*exclude\(\*patterns\) for a list"),
    ],
)
def test_what_is_no_pattern_is_refused(patterns: tuple[Any, ...], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        peft_gradguard.exclude(*patterns)


@pytest.mark.peft
def test_everything_excluded_is_warned_of_once_and_trains_with_full_rank(
    records: list[logging.LogRecord], tmp_path: Path
) -> None:
    with peft_gradguard.exclude("*"):
        outcome = train(branches(regularised=False), str(tmp_path))
    assert not any(outcome.scores)
    assert not any(outcome.patterns)
    warnings = [record for record in records if not hasattr(record, "reason")]
    assert [record.levelname for record in warnings] == ["WARNING"]
    assert "All 12 AdaLoRA parameters are excluded (adapter 'default', step 1)" in warnings[0].getMessage()
    assert warnings[0].getMessage().endswith("until some of them take part again.")
    assert list(tmp_path.glob("adapter_model.*"))


@pytest.mark.parametrize("rest", ["frozen", "unused"])
def test_nothing_but_the_excluded_trains(model: peft.PeftModel, records: list[logging.LogRecord], rest: str) -> None:
    if rest == "frozen":
        frozen("branch")(model, 0)
    with peft_gradguard.exclude("*.trunk.*"):
        advance(model, *range(1, 8), branch=rest == "frozen")
    reasons = {name: r.reason for r in records if hasattr(r, "reason") for name in r.parameters}
    expected = {"frozen": "frozen", "unused": "no gradient"}[rest]
    assert {name: reason for name, reason in reasons.items() if name in BRANCH} == dict.fromkeys(BRANCH, expected)
    assert not model.base_model.rankallocator.exp_avg_ipt
    warnings = [record.getMessage() for record in records if not hasattr(record, "reason")]
    if rest == "frozen":
        assert len(warnings) == 1
        assert "excluded or frozen" in warnings[0]
    else:
        assert warnings == []


@pytest.mark.parametrize("set_to_none", [True, False])
def test_late_calls_are_still_rescued(
    model: peft.PeftModel, records: list[logging.LogRecord], set_to_none: bool
) -> None:
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    with peft_gradguard.exclude("*.branch.*"):
        for step in (1, 2, 3):
            loss_of(model, vectors(step), regularised=False).backward()
            optimizer.step()
            optimizer.zero_grad(set_to_none=set_to_none)
            model.base_model.update_and_allocate(step)
    found = "no gradient (adapter 'default', step 1)"
    if not set_to_none:
        found = "only gradients that are exactly zero (adapter 'default', step 2), but the optimizer used others"
    said = [record.getMessage() for record in records if "AdaLoRA parameters have" in record.getMessage()]
    assert [f"The 12 AdaLoRA parameters have {found}" in message for message in said] == [True]
    scored = model.base_model.rankallocator.exp_avg_ipt
    assert scored
    assert not [name for name in scored if name.startswith("branch.")]


@pytest.mark.parametrize("key", ["block[0]", "block]x[", "[!a]", "q*", "w?", "[a-"])
@pytest.mark.parametrize("front", ["", "base_model.model."])
def test_exact_name_excludes_whatever_signs_are_in_it(key: str, front: str, records: list[logging.LogRecord]) -> None:
    class Net(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.parts = torch.nn.ModuleDict({key: torch.nn.Linear(4, 4), "other": torch.nn.Linear(4, 4)})

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.parts["other"](self.parts[key](x))

    config = peft.AdaLoraConfig(target_modules=r".*parts\..+", init_r=4, target_r=2, total_step=9, tinit=1, tfinal=1)
    model = peft.get_peft_model(Net(), config)
    with peft_gradguard.exclude(f"{front}parts.{key}.lora_E.default"):
        model(torch.ones(2, 4)).pow(2).mean().backward()
        model.base_model.update_and_allocate(1)
    assert len(model.base_model.rankallocator.exp_avg_ipt) == 5
    assert f"parts.{key}.lora_E.default" not in model.base_model.rankallocator.exp_avg_ipt
    assert not [record for record in records if "Nothing is excluded" in record.getMessage()]


def test_names_are_matched_once(model: peft.PeftModel, monkeypatch: pytest.MonkeyPatch) -> None:
    matched: list[str] = []
    matches = exclusions._matches
    monkeypatch.setattr(exclusions, "_matches", lambda name, pattern: (matched.append(name), matches(name, pattern))[1])
    with peft_gradguard.exclude("*.branch.0.*"):
        advance(model, *range(1, 4))
        assert len(matched) == 12
    advance(model, 4)
    assert len(matched) == 12


PROGRAM = """
import json, logging
import peft_gradguard
from scenarios import *
records = []
handler = logging.Handler()
handler.emit = records.append
logging.getLogger("peft_gradguard").addHandler(handler)
outcome = train(branches())
print(json.dumps([
    sorted(outcome.patterns[-1]),
    sorted({r.reason for r in records if hasattr(r, "reason")}),
    [r.getMessage() for r in records if not hasattr(r, "reason")],
]))
"""


def test_patterns_in_the_environment() -> None:
    environ = {**os.environ, "PEFT_GRADGUARD_EXCLUDE": "*.branch.*, *.trunk.0.lora_E.*,,nothing.*,"}
    environ["PYTHONPATH"] = python_path()
    found = subprocess.run([sys.executable, "-c", PROGRAM], env=environ, capture_output=True, text=True, timeout=120)
    assert found.returncode == 0, found.stderr
    pattern_, reasons, warnings = json.loads(found.stdout.splitlines()[-1])
    assert pattern_ == ["trunk.2.lora_E.default"]
    assert reasons == ["excluded"]
    assert len(warnings) == 1
    assert "'nothing.*'" in warnings[0]
