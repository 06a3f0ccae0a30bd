"""What a report states is true: of a training that has ended, ended too early or not begun, and of a saved adapter."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import peft
import pytest
import torch
from made_reports import module
from peft.tuners.adalora import RankAllocator
from torch import nn

import peft_gradguard
from peft_gradguard.report.facts import trained

if TYPE_CHECKING:
    from pathlib import Path


@pytest.mark.parametrize(
    ("tells", "facts"),
    [
        (False, {}),
        (True, {"importance": 0.0}),
        (True, {"kept": 7}),
        (False, {"kept": 7, "ranked": False}),
        (True, {"importance": 0.5, "ranked": False}),
    ],
)
def test_scores_and_pruned_ranks_tell_of_a_training(tells: bool, facts: dict[str, Any]) -> None:
    assert trained([module("k"), module("q", **facts)]) is tells


INIT_R, TARGET_R, TINIT, TFINAL, TOTAL = 4, 2, 2, 3, 12
FINAL = TOTAL - TFINAL


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.q = nn.Linear(6, 6)
        self.experts = nn.ModuleList(nn.Linear(6, 6) for _ in range(2))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.q(x) + sum(expert(x) for expert in self.experts)


class Model(nn.Module):
    """Two layers with two experts each, and a Sequential beside them."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Block() for _ in range(2))
        self.branch = nn.Sequential(nn.Linear(6, 6), nn.Tanh(), nn.Linear(6, 6))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            x = torch.tanh(layer(x))
        return x + self.branch(x)


@pytest.fixture
def model() -> peft.PeftModel:
    torch.manual_seed(0)
    config = peft.AdaLoraConfig(
        target_modules=r".*(q|experts\.\d|branch\.[02])", init_r=INIT_R, target_r=TARGET_R, tinit=TINIT, tfinal=TFINAL,
        deltaT=1, total_step=TOTAL,
    )  # fmt: skip
    return peft.get_peft_model(Model(), config)


def train(model: peft.PeftModel, first: int, last: int) -> None:
    optimizer = torch.optim.AdamW((p for p in model.parameters() if p.requires_grad), lr=0.05)
    inputs, wanted = torch.randn(2, 16, 6, generator=torch.Generator().manual_seed(0))
    for step in range(first, last + 1):
        nn.functional.mse_loss(model(inputs), wanted).backward()
        optimizer.step()
        model.base_model.update_and_allocate(step)
        optimizer.zero_grad()


def text(model: object) -> str:
    """The report in one line, so that it does not matter where lines end."""
    return " ".join(str(peft_gradguard.report(model)).split())


def facts(model: object) -> dict[str, Any]:
    (found,) = json.loads(peft_gradguard.report(model).to_json())["adapters"]
    return dict(found)


@pytest.mark.peft
def test_before_training_nothing_is_said_of_the_end(model: peft.PeftModel) -> None:
    found = facts(model)
    assert (found["step"], found["final_step"], found["final"]) == (None, FINAL, None)
    assert "8 modules share a budget of 32 ranks, 16 in the end no parameter was scored yet" in text(model)
    assert "final" not in text(model)


@pytest.mark.peft
def test_a_training_that_ended_too_early_has_no_final_ranks(model: peft.PeftModel) -> None:
    train(model, 1, FINAL - 1)
    found = facts(model)
    assert (found["step"], found["final_step"], found["final"]) == (FINAL - 1, FINAL, False)
    said = text(model)
    assert f"AdaLoRA adapter 'default', step {FINAL - 1} " in said
    assert (
        f"the ranks are not final: AdaLoRA settles them at step {FINAL} (total_step - tfinal), and the last step it "
        f"saw is {FINAL - 1}; a training that ends here keeps these ranks"
    ) in said


@pytest.mark.peft
@pytest.mark.parametrize("last", [FINAL, TOTAL])
def test_final_ranks_are_dated_by_the_step_that_settled_them(model: peft.PeftModel, last: int) -> None:
    train(model, 1, last)
    found = facts(model)
    assert (found["step"], found["final_step"], found["final"]) == (FINAL, FINAL, True)
    assert f"AdaLoRA adapter 'default', ranks final since step {FINAL} " in text(model)
    assert "8 modules share a budget of 16 ranks, 32 at the start" in text(model)
    assert "not final" not in text(model)


@pytest.mark.peft
def test_nothing_is_claimed_of_ranks_that_were_settled_while_the_guard_was_off(model: peft.PeftModel) -> None:
    train(model, 1, FINAL - 2)
    with peft_gradguard.disabled():
        train(model, FINAL - 1, TOTAL)
    assert (facts(model)["step"], facts(model)["final"]) == (FINAL - 2, None)
    assert f"AdaLoRA adapter 'default', step {FINAL - 2} " in text(model)
    assert "final:" not in text(model)


class OwnScores(RankAllocator):
    """Scores by itself, and fills none of PEFT's."""

    def update_ipt(self, model: nn.Module) -> None:
        pass

    def mask_to_budget(self, model: nn.Module, budget: int) -> Any:
        return None


@pytest.mark.peft
def test_nothing_is_claimed_where_an_allocator_keeps_no_scores(model: peft.PeftModel) -> None:
    model.base_model.rankallocator = OwnScores(model.base_model.model, model.peft_config["default"], "default")
    train(model, 1, FINAL - 1)
    assert facts(model)["final"] is not True
    train(model, FINAL, FINAL)
    assert facts(model)["final"] is True


@pytest.mark.peft
def test_final_ranks_of_one_training_are_not_those_of_the_next(model: peft.PeftModel) -> None:
    train(model, 1, TOTAL)
    train(model, 1, 1)
    assert facts(model)["final"] is False


@pytest.mark.peft
def test_only_layers_are_called_layers(model: peft.PeftModel) -> None:
    train(model, 1, TOTAL)
    lines = str(peft_gradguard.report(model)).splitlines()
    start = lines.index("Ranks kept, by layer")
    assert lines[start + 1].split() == ["layer", "0", "1"]
    assert [line.split()[0] for line in lines[start + 2 : start + 5]] == ["q", "experts.0", "experts.1"]
    start = lines.index("Ranks kept, outside of layers")
    assert [line.split()[0] for line in lines[start + 2 :]] == ["branch.0", "branch.2"]


@pytest.mark.peft
def test_modules_that_ended_with_no_rank_are_named(model: peft.PeftModel) -> None:
    train(model, 1, TOTAL)
    pattern = model.peft_config["default"].rank_pattern
    for name in pattern:
        pattern[name] = [not ("layers.1.experts.0" in name or "branch.2" in name)] * INIT_R
    said = text(model)
    assert "Ended with no rank: these are as in the base model kind layers modules experts.0 1 1 branch.2 1" in said


UNTOLD = {
    "trainable": None,
    "steps_scored": None,
    "steps_skipped": None,
    "first_step": None,
    "last_step": None,
    "excluded": None,
}


@pytest.mark.peft
@pytest.mark.parametrize("last", [1, TOTAL])
def test_a_saved_adapter_is_null_where_the_file_does_not_tell(
    model: peft.PeftModel, tmp_path: Path, capsys: pytest.CaptureFixture[str], last: int
) -> None:
    for name, parameter in model.named_parameters():
        if "layers.0.q.lora" in name:
            parameter.requires_grad = False
    train(model, 1, last)
    model.save_pretrained(str(tmp_path))
    from peft_gradguard.cli.main import main

    capsys.readouterr()
    assert main(["inspect", str(tmp_path), "--json"]) == 0
    (found,) = json.loads(capsys.readouterr().out)["adapters"]
    parameters = [parameter for module in found["modules"] for parameter in module["parameters"]]
    assert len(parameters) == 24
    for parameter in parameters:
        assert {key: parameter[key] for key in UNTOLD} == UNTOLD
    ranked = {module["name"]: module["ranked"] for module in found["modules"]}
    pruned = last == TOTAL
    assert ranked == {name: name != "layers.0.q" if pruned else None for name in ranked}
    assert found["unranked_ranks"] == (INIT_R if pruned else None)
    assert (found["step"], found["budget"], found["final_step"], found["final"]) == (None, None, None, None)
    assert main(["inspect", str(tmp_path)]) == 0
    said = " ".join(capsys.readouterr().out.split())
    assert ("7 modules share a budget of 28 ranks at the start, 14 in the end; 1 other keeps its 4" in said) == pruned
    assert "frozen" not in said
    assert "trainable" not in said


@pytest.mark.peft
@pytest.mark.parametrize(("columns", "widest"), [(20, 32), (32, 32), (79, 79), (80, 80), (160, 160), (500, 160)])
def test_terminals_are_used_as_wide_as_they_are(
    model: peft.PeftModel, monkeypatch: pytest.MonkeyPatch, columns: int, widest: int
) -> None:
    monkeypatch.setenv("COLUMNS", str(columns))
    model.peft_config["default"].rank_pattern = {
        f"layers.{layer}.q.lora_E.default": [True] * INIT_R for layer in range(2)
    }
    report = peft_gradguard.report(model)
    assert max(map(len, str(report).splitlines())) <= widest


def test_forty_layers_stand_in_one_line_of_a_wide_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    model = nn.Module()
    model.layers = nn.ModuleList(nn.ModuleDict({"q": nn.Linear(2, 2)}) for _ in range(40))
    adapted = peft.get_peft_model(model, peft.AdaLoraConfig(target_modules=["q"], init_r=2, target_r=1, total_step=900))
    adapted.peft_config["default"].rank_pattern = {f"layers.{n}.q.lora_E.default": [True, False] for n in range(40)}
    for columns, rows in ((80, 2), (160, 1)):
        monkeypatch.setenv("COLUMNS", str(columns))
        lines = str(peft_gradguard.report(adapted)).splitlines()
        assert sum(line.startswith("  layer ") for line in lines) == rows


@pytest.mark.peft
def test_html_brings_its_style_and_no_colour_but_grey(model: peft.PeftModel) -> None:
    html = peft_gradguard.report(model)._repr_html_()
    assert html.startswith("<div style=")
    assert html.count("<div ") == html.count("</div>")
    assert "overflow-x: auto" in html
    assert "<style" not in html
    colours = {part.split(":")[1].strip() for part in html.replace('"', ";").split(";") if part.strip()[:6] == "color:"}
    assert colours == {"inherit"}
    assert "background" not in html
