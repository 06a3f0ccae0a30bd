"""What was said of one allocator: one record for each step and reason, each name once, in full or folded."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Any

import peft
import pytest
import torch
from scenarios import frozen
from steps import advance, new_model
from torch import nn

if TYPE_CHECKING:
    from collections.abc import Iterator


@pytest.fixture
def model() -> peft.PeftModel:
    return new_model()


@pytest.mark.peft
def test_each_skipped_name_is_logged_once_with_its_reason(
    model: peft.PeftModel, records: list[logging.LogRecord]
) -> None:
    frozen("trunk.0", "lora_A")(model, 0)
    advance(model, 1)
    advance(model, 2, 3, branch=False)
    skips = [(name, r.reason, r.adapter, r.step, r.levelname) for r in records for name in r.parameters]
    assert len(records) == 2
    unused = [
        (f"branch.{layer}.lora_{factor}.default", "no gradient", "default", 2, "WARNING")
        for layer in (0, 2)
        for factor in "ABE"
    ]
    assert sorted(skips) == sorted([*unused, ("trunk.0.lora_A.default", "frozen", "default", 1, "WARNING")])
    assert {record.name for record in records} == {"peft_gradguard"}
    message = next(r.getMessage() for r in records if r.parameters == ["trunk.0.lora_A.default"])
    assert all(word in message for word in ("trunk.0.lora_A.default", "frozen", "'default'", "step 1"))
    assert not any(record.exc_info for record in records)


@pytest.mark.peft
def test_another_allocator_logs_the_same_names_again(records: list[logging.LogRecord]) -> None:
    for _ in range(2):
        model = new_model()
        frozen("trunk.0", "lora_A")(model, 0)
        advance(model, 1)
    assert [record.parameters for record in records] == [["trunk.0.lora_A.default"]] * 2


HINT = 'logging.getLogger("peft_gradguard").setLevel(logging.ERROR)'


class Stack(nn.Module):
    def __init__(self, layers: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.ModuleDict({"q": nn.Linear(3, 3), "v": nn.Linear(3, 3)}) for _ in range(layers))
        self.head = nn.Linear(3, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            x = layer["v"](layer["q"](x))
        return self.head(x)


def stack_of(layers: int, **more: Any) -> peft.PeftModel:
    settings = {"init_r": 2, "target_r": 1, "tinit": 1, "tfinal": 2, "deltaT": 1, "total_step": 12, **more}
    return peft.get_peft_model(Stack(layers), peft.AdaLoraConfig(target_modules=r".*\.(q|v)|head", **settings))


def freeze(model: peft.PeftModel, count: int) -> list[str]:
    """Freeze so many AdaLoRA parameters of layers, and return their names as an allocator knows them."""
    names = []
    for name, parameter in model.base_model.model.named_parameters():
        if "layers" in name and ".lora_" in name and len(names) < count:
            parameter.requires_grad = False
            names.append(name)
    assert len(names) == count
    return names


def go(model: peft.PeftModel, *steps: int) -> None:
    for step in steps:
        model.zero_grad()
        model.base_model.model(torch.randn(2, 3)).pow(2).sum().backward()
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.grad is not None:
                    parameter -= 0.01 * parameter.grad
        model.base_model.update_and_allocate(step)


@pytest.fixture
def warnings(caplog: pytest.LogCaptureFixture) -> Iterator[list[logging.LogRecord]]:
    """The records at WARNING, as they come where nobody asks for more."""
    found: list[logging.LogRecord] = []
    handler, logger = logging.Handler(), logging.getLogger("peft_gradguard")
    handler.emit = found.append  # type: ignore[method-assign]
    logger.addHandler(handler)
    yield found
    logger.removeHandler(handler)


@pytest.mark.peft
@pytest.mark.parametrize("count", [1, 3, 24])
def test_few_names_are_given_in_full(warnings: list[logging.LogRecord], count: int) -> None:
    model = stack_of(5)
    names = freeze(model, count)
    go(model, 1, 2, 3)
    (record,) = warnings
    first, *lines = record.getMessage().splitlines()
    assert [line.strip() for line in lines] == names == record.parameters
    assert (record.reason, record.adapter, record.step, record.levelname) == ("frozen", "default", 1, "WARNING")
    plural = "" if count == 1 else "s"
    assert first.startswith(f"peft_gradguard leaves {count} AdaLoRA parameter{plural} out of scoring (")
    assert all(
        words in first
        for words in ("adapter 'default'", "step 1", "frozen", "keep all their ranks", "report(model)", HINT)
    )
    assert len(first) <= 4 * 100


@pytest.mark.peft
def test_many_names_are_folded(records: list[logging.LogRecord]) -> None:
    model = stack_of(6)
    names = freeze(model, 36)
    go(model, 1)
    record, *each = records
    assert record.getMessage().splitlines()[1:] == ["  layers.{0..5}.{q,v}.lora_{A,B,E}.default"]
    assert record.parameters == names
    assert [(one.levelname, one.getMessage()) for one in each] == [
        ("DEBUG", f"{name} is left out: frozen.") for name in names
    ]
    assert [(one.parameter, one.reason, one.adapter, one.step) for one in each] == [
        (name, "frozen", "default", 1) for name in names
    ]
    assert not any(hasattr(one, "parameters") for one in each)


def test_twenty_five_names_are_folded_without_a_record_for_each_where_nobody_wants_it(
    warnings: list[logging.LogRecord],
) -> None:
    model = stack_of(5)
    freeze(model, 25)
    go(model, 1)
    (record,) = warnings
    assert record.getMessage().splitlines()[1:] == [
        "  layers.{0..3}.{q,v}.lora_{A,B,E}.default",
        "  layers.4.q.lora_A.default",
    ]


def test_each_reason_has_a_record_of_its_own_and_only_the_first_says_how_to_silence(
    warnings: list[logging.LogRecord],
) -> None:
    model = stack_of(2)
    names = freeze(model, 2)
    inner = model.base_model.model
    for step in (1, 2, 3):
        model.zero_grad()
        inner(torch.randn(2, 3)).pow(2).sum().backward()
        if step > 1:
            inner.head.lora_A["default"].grad.fill_(float("nan"))
            inner.head.lora_B["default"].grad = None
        # It was named already, for another reason.
        inner.layers[0]["q"].lora_A["default"].requires_grad = True
        model.base_model.update_and_allocate(step)
    # Others speak of a training in which no optimizer steps.
    warnings = [record for record in warnings if hasattr(record, "reason")]
    assert [(record.step, record.reason, record.parameters) for record in warnings] == [
        (1, "no gradient", names[:1]),
        (1, "frozen", names[1:]),
        (2, "non-finite gradient", ["head.lora_A.default"]),
        (2, "no gradient", ["head.lora_B.default"]),
    ]
    assert [HINT in record.getMessage() for record in warnings] == [True, False, False, False]
    assert all(len(record.getMessage().splitlines()[0]) <= 400 for record in warnings)


def test_nothing_is_said_where_the_logger_is_silenced(capsys: pytest.CaptureFixture[str]) -> None:
    logger = logging.getLogger("peft_gradguard")
    logger.setLevel(logging.ERROR)
    try:
        model = stack_of(5)
        freeze(model, 30)
        go(model, 1)
    finally:
        logger.setLevel(logging.NOTSET)
    assert capsys.readouterr().err == ""


@pytest.mark.peft
def test_a_healthy_training_says_nothing(records: list[logging.LogRecord]) -> None:
    model = stack_of(5)
    go(model, *range(1, 12))
    assert [record for record in records if record.levelno > logging.DEBUG] == []
