"""The report: plain data, and one adapter of it by name."""

from __future__ import annotations

import dataclasses
import json
import re
from typing import TYPE_CHECKING, Any

import pytest
from scenarios import branches, build
from steps import advance

import peft_gradguard
from peft_gradguard.memory.counts import HistoryPoint
from peft_gradguard.report.facts import AdapterReport, ModuleReport, ParameterReport
from peft_gradguard.report.report import Report
from peft_gradguard.report.sections import sections

if TYPE_CHECKING:
    import peft


@pytest.fixture
def model() -> peft.PeftModel:
    return build(branches())


def test_report_is_plain_data(model: peft.PeftModel) -> None:
    advance(model, 1, branch=False)
    report = peft_gradguard.report(model)
    found = report.to_dict()
    assert json.loads(report.to_json(indent=2)) == found
    branch = found["adapters"][0]["modules"][2]
    assert (branch["name"], branch["reason"]) == ("branch.0", "no gradient")
    assert branch["parameters"][0]["steps_skipped"] == {"no gradient": 1}


def test_no_adapter() -> None:
    assert str(Report(())) == "AdaLoRA: no adapter"
    assert ">AdaLoRA: no adapter</p>" in Report(())._repr_html_()


def plain() -> Report:
    parameter = ParameterReport("q.lora_A.default", "A", (2, 3), True, False)
    skipped = ParameterReport("q.lora_B.default", "B", (), False, True, 3, {"frozen": 2}, 1, 4, True)
    several = AdapterReport(
        "default", 4, 8, 6, 4, 2, (ModuleReport("q", 2, 1, False, "frozen", 0.5, (parameter, skipped)),),
        ("Change it.",), (HistoryPoint(1, 8, 9, 2), HistoryPoint(2, 7, 8, 0)), final_step=6, final=False,
    )  # fmt: skip
    return Report((several, AdapterReport("other", None, None, None, None, 0, (), saved=True)))


PLAIN = {
    "adapters": [
        {
            "adapter": "default",
            "step": 4,
            "init_budget": 8,
            "budget": 6,
            "target_budget": 4,
            "unranked_ranks": 2,
            "modules": [
                {
                    "name": "q",
                    "rank_started": 2,
                    "rank_kept": 1,
                    "ranked": False,
                    "reason": "frozen",
                    "importance": 0.5,
                    "parameters": [
                        {
                            "name": "q.lora_A.default",
                            "factor": "A",
                            "shape": [2, 3],
                            "trainable": True,
                            "inside_modules_to_save": False,
                            "steps_scored": 0,
                            "steps_skipped": {},
                            "first_step": None,
                            "last_step": None,
                            "excluded": False,
                        },
                        {
                            "name": "q.lora_B.default",
                            "factor": "B",
                            "shape": [],
                            "trainable": False,
                            "inside_modules_to_save": True,
                            "steps_scored": 3,
                            "steps_skipped": {"frozen": 2},
                            "first_step": 1,
                            "last_step": 4,
                            "excluded": True,
                        },
                    ],
                }
            ],
            "advice": ["Change it."],
            "history": [
                {"step": 1, "budget": 8, "total_rank": 9, "skipped": 2},
                {"step": 2, "budget": 7, "total_rank": 8, "skipped": 0},
            ],
            "saved": False,
            "final_step": 6,
            "final": False,
        },
        {
            "adapter": "other",
            "step": None,
            "init_budget": None,
            "budget": None,
            "target_budget": None,
            "unranked_ranks": 0,
            "modules": [],
            "advice": [],
            "history": [],
            "saved": True,
            "final_step": None,
            "final": None,
        },
    ]
}


def test_adapter_to_plot_is_given_by_name() -> None:
    for plot in (plain().plot, plain().plot_history):
        with pytest.raises(TypeError, match="positional argument"):
            plot(None, "default")


def test_to_dict() -> None:
    found = plain().to_dict()
    assert found == PLAIN
    assert list(found["adapters"][0]) == list(PLAIN["adapters"][0])
    assert Report(()).to_dict() == {"adapters": []}


def test_to_json() -> None:
    assert plain().to_json() == json.dumps(PLAIN)
    assert plain().to_json(indent=2) == json.dumps(PLAIN, indent=2)


def test_only_one_adapter_or_the_one_that_is_named() -> None:
    report = plain()
    first, second = report.adapters
    assert report._only("default") is first
    assert report._only("other") is second
    assert Report((second,))._only(None) is second
    assert Report((second,))._only("other") is second


@pytest.mark.parametrize(
    ("count", "name", "said"),
    [
        (2, None, "adapter=None: give one of the report's adapters, 'default', 'other'."),
        (2, "none", "adapter='none': give one of the report's adapters, 'default', 'other'."),
        (1, "other", "adapter='other': give one of the report's adapters, 'default'."),
        (0, None, "adapter=None: give one of the report's adapters, ."),
    ],
)
def test_no_such_adapter(count: int, name: str | None, said: str) -> None:
    with pytest.raises(ValueError, match=f"^{re.escape(said)}$"):
        Report(plain().adapters[:count])._only(name)


@pytest.mark.parametrize(
    "facts",
    [
        plain(),
        plain().adapters[0],
        plain().adapters[0].modules[0],
        plain().adapters[0].modules[0].parameters[0],
        sections(plain().adapters[0])[0],
    ],
    ids=lambda facts: type(facts).__name__,
)
def test_what_was_reported_cannot_be_changed(facts: Any) -> None:
    field = dataclasses.fields(facts)[0].name
    with pytest.raises(dataclasses.FrozenInstanceError):
        setattr(facts, field, None)
    assert facts == dataclasses.replace(facts)
