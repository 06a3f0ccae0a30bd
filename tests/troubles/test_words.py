"""What the guard says, as it comes out of real situations: one file with all the words, and a page that explains them.

``PYTHONPATH=tests/support python tests/troubles/test_words.py`` writes ``words.txt`` anew.
"""

from __future__ import annotations

import gc
import logging
import os
import re
import textwrap
from pathlib import Path
from typing import TYPE_CHECKING, Any

import peft
import pytest
import torch
from situations import FINAL, TOTAL, TwoLayers, call, config, loss_of, make, optimizer_of, train, train_with_two

import peft_gradguard

if TYPE_CHECKING:
    from collections.abc import Callable

WORDS = Path(__file__).with_name("words.txt")
PAGE = Path(__file__).parent.parent.parent / "docs" / "messages.md"
PEFT_VERSION = tuple(int(part) for part in peft.__version__.split(".")[:2])
COLUMNS, LINES = 100, 4


def nothing(model: Any, step: int) -> None:
    pass


def freeze(model: Any, *parts: str, trainable: bool = False) -> Any:
    for name, parameter in model.named_parameters():
        if ".lora_" in name and "ranknum" not in name and any(part in name for part in parts):
            parameter.requires_grad = trainable
    return model


def some_frozen() -> None:
    train(freeze(make(), "first"), range(1, 3))


def late() -> None:
    train(make(), range(1, 3), order="late")


def late_and_zeroed() -> None:
    train(make(), range(1, 4), order="late", set_to_none=False)


def zeros() -> None:
    train(make(), range(1, 4), loss=lambda model, step: 0.0 * model(torch.ones(2, 6)).logits.sum())


def all_frozen_later() -> None:
    model = make()
    optimizer = optimizer_of(model)
    train(model, range(1, 3), optimizer=optimizer)
    freeze(model, "lora_")
    model.base_model.model.head.requires_grad_(True)
    train(model, range(3, 5), optimizer=optimizer)


def all_frozen() -> None:
    call(freeze(make(), "lora_"), 1)


def no_gradient_twice() -> None:
    model = make()
    call(model, 1)
    call(model, 2)


def no_optimizer_steps() -> None:
    model = make(total_step=100)
    for step in range(1, 60):
        loss_of(model, step).backward()
        model.zero_grad()
        call(model, step)


def no_parameters() -> None:
    model = make()
    model.base_model.rankallocator.update_and_allocate(nn_without_adapters(), 1)


def nn_without_adapters() -> torch.nn.Module:
    return torch.nn.Linear(2, 2)


def detached() -> Any:
    model = make()
    model.base_model.model.detached = True
    train(model, range(1, 5))
    return model


def merged() -> None:
    model = make()
    model.merge_adapter()
    train(model, range(1, 5))


def disabled() -> None:
    model = make()
    model.base_model.disable_adapter_layers()
    train(freeze(model, "lora_", trainable=True), range(1, 5))


def another_is_active() -> None:
    model = make("one")
    model.add_adapter("two", config(inference_mode=True))
    model.set_adapter("two")
    train(freeze(model, "lora_", trainable=True), range(1, 5))


def reentrant_checkpoints() -> None:
    from types import SimpleNamespace

    base = TwoLayers()
    base.gradient_checkpointing = base.detached = True
    base._gradient_checkpointing_func = SimpleNamespace(keywords={"use_reentrant": True})
    train(peft.get_peft_model(base, config()), range(1, 5))


def half_precision() -> None:
    model = make()
    for name, parameter in model.named_parameters():
        if ".lora_" in name and "ranknum" not in name:
            parameter.data = parameter.data.half()
    tiny = lambda model, step: sum(  # noqa: E731
        (1e-6 * p).sum() for n, p in model.named_parameters() if ".lora_" in n and p.requires_grad
    )
    train(model, range(1, 5), loss=tiny, optimizer=torch.optim.SGD(model.parameters(), lr=1e-4))


def untrained() -> None:
    model = make()
    model.base_model.model.head.requires_grad_(True)
    train(
        model,
        range(1, 5),
        optimizer=torch.optim.AdamW(model.base_model.model.head.parameters(), lr=1e-2),
        loss=lambda model, step: model(torch.ones(2, 6)).logits.square().mean(),
    )


def equal_scores() -> None:
    model = make()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if ".lora_" in name and parameter.dim() == 2:
                parameter.fill_(0.5)
    same = lambda model, step: sum(  # noqa: E731
        p.sum() for n, p in model.named_parameters() if ".lora_" in n and p.requires_grad
    )
    train(model, loss=same)


def nothing_is_ranked() -> None:
    train(freeze(make(), "lora_E"))


def first_call_is_the_finalising_one() -> None:
    train(make(), range(FINAL, TOTAL))


def samples_as_steps() -> None:
    train(make(), range(64, 64 * 4, 64))


def finalising_step_missed() -> None:
    train(make(), range(3, 2 * TOTAL, 3))


def names_change_at_the_end() -> None:
    model = make()
    train(model, range(1, FINAL + 1))
    model.base_model.model.first = torch.nn.Sequential(model.base_model.model.first)
    train(model, range(FINAL + 1, FINAL + 3))


def stopped_early() -> None:
    train(make(), range(1, 10))
    gc.collect()
    make()


def never_called() -> None:
    train(make(), range(1, 4), allocate=nothing)
    gc.collect()
    make()


def before_the_step() -> None:
    train(make(), range(1, 8), order="before")


def cleared_before_the_call() -> None:
    train_with_two(make(), range(1, 5))


def scheduled(**settings: Any) -> Any:
    model = make()
    for name, value in settings.items():
        setattr(model.peft_config["default"], name, value)
    model.base_model.rankallocator._set_budget_scheduler(model.base_model.model)
    return model


def target_is_not_below() -> None:
    train(scheduled(target_r=4))


def no_step_is_left() -> None:
    train(scheduled(tinit=FINAL))


def no_masking_step() -> None:
    train(scheduled(deltaT=50), range(1, 3))


def budget_beyond_the_ranks() -> None:
    model = make()
    model.base_model.rankallocator.init_bgt = 40
    train(model, range(1, 5))


def two_adapters() -> Any:
    model = make("one")
    train(model, loss=lambda model, step: model(torch.ones(2, 6)).logits.square().mean())
    model.peft_config["one"].inference_mode = True
    model.add_adapter("two", config())
    model.set_adapter("two")
    return model


def second_adapter() -> None:
    call(two_adapters(), 1)


def second_adapter_on_an_untrained_one() -> None:
    model = make("one")
    model.peft_config["one"].inference_mode = True
    model.add_adapter("two", config())
    model.set_adapter("two")
    with peft_gradguard.exclude("nothing"):
        call(model, 1)


def one_config_for_two_trainings() -> None:
    shared = config()
    for steps in (range(1, TOTAL + 1), range(1, 2)):
        train(peft.get_peft_model(TwoLayers(), shared), steps)


def pattern_of_numbers() -> None:
    train(make(rank_pattern={"first": 3}), range(1, 2))


def without_allocator() -> None:
    model = peft.inject_adapter_in_model(config(), TwoLayers(), adapter_name="ada")
    train(freeze(model, "lora_", trainable=True), range(1, 5), allocate=nothing)


def report_without_allocator() -> None:
    peft_gradguard.report(peft.inject_adapter_in_model(config(), TwoLayers(), adapter_name="ada"))


def replaced_method() -> None:
    model = make()
    allocator = model.base_model.rankallocator
    allocator.budget_schedule = type(allocator).budget_schedule.__wrapped__.__get__(allocator)
    train(model, range(1, 2))


def excludes_nothing() -> None:
    with peft_gradguard.exclude("*.classifier.*"):
        train(make(), range(1, 4))


SITUATIONS: dict[str, Callable[[], Any]] = {
    situation.__name__.replace("_", " "): situation
    for situation in (
        some_frozen, late, late_and_zeroed, zeros, all_frozen_later, all_frozen, no_gradient_twice, no_optimizer_steps,
        no_parameters, detached, merged, disabled, another_is_active, reentrant_checkpoints, half_precision, untrained,
        equal_scores, nothing_is_ranked, first_call_is_the_finalising_one, samples_as_steps, finalising_step_missed,
        names_change_at_the_end, stopped_early, never_called, before_the_step, cleared_before_the_call,
        target_is_not_below, no_step_is_left, no_masking_step, budget_beyond_the_ranks, second_adapter,
        second_adapter_on_an_untrained_one,
        one_config_for_two_trainings, pattern_of_numbers, without_allocator, report_without_allocator, replaced_method,
        excludes_nothing,
    )
}  # fmt: skip


def said_in(situation: Callable[[], Any]) -> str:
    """What is said in a situation, wrapped as a terminal would; the error that ends it, if any, comes last."""
    from peft_gradguard.troubles import ended

    ended._endings.clear()
    ended._ended.clear()
    gc.collect()
    records: list[logging.LogRecord] = []
    handler, logger = logging.Handler(), logging.getLogger("peft_gradguard")
    handler.emit = records.append  # type: ignore[method-assign]
    logger.addHandler(handler)
    error = None
    try:
        situation()
    except Exception as raised:
        error = raised
    finally:
        logger.removeHandler(handler)
    texts = [f"{record.levelname}: {record.getMessage()}" for record in records]
    texts += [f"{type(error).__name__}: {error}"] if error else []
    return "\n\n".join("\n".join(wrapped(text)) for text in texts)


def wrapped(text: str) -> list[str]:
    return [line for part in text.splitlines() for line in textwrap.wrap(part, COLUMNS, break_on_hyphens=False)]


def messages(words: str) -> list[str]:
    """The messages of a text: without what kind they are, and without lists of names."""
    found = [re.sub(r"^\w+: ", "", message) for message in words.split("\n\n")]
    return [" ".join(line for line in message.splitlines() if "  " not in line[:2]) for message in found]


def golden() -> dict[str, str]:
    parts = re.split(r"^# (.+)$\n", WORDS.read_text(encoding="utf-8"), flags=re.MULTILINE)[1:]
    return {name: words.strip() for name, words in zip(parts[::2], parts[1::2], strict=True)}


@pytest.mark.skipif(PEFT_VERSION < (0, 16), reason="older releases begin with other values and words of their own")
@pytest.mark.parametrize("name", SITUATIONS)
def test_words_are_those_of_the_file(name: str) -> None:
    assert said_in(SITUATIONS[name]) == golden()[name]


@pytest.mark.parametrize("name", SITUATIONS)
def test_words_are_short_and_say_who_speaks(name: str) -> None:
    assert golden()[name], "something is said"
    for message in golden()[name].split("\n\n"):
        lines = [line for line in re.sub(r"^\w+: ", "", message).splitlines() if not line.startswith("  ")]
        assert len(textwrap.wrap(" ".join(lines), COLUMNS, break_on_hyphens=False)) <= LINES, message
        assert re.search("peft_gradguard|AdaLoRA", lines[0]), message


@pytest.mark.parametrize("name", SITUATIONS)
def test_each_message_has_its_row(name: str) -> None:
    beginnings = re.findall(r"^### `(.+)`$", PAGE.read_text(encoding="utf-8"), flags=re.MULTILINE)
    patterns = [".*".join(map(re.escape, beginning.split("..."))) for beginning in beginnings]
    for message in messages(golden()[name]):
        assert [p for p in patterns if re.match(p, message)], message


def test_the_file_has_nothing_else() -> None:
    assert list(golden()) == list(SITUATIONS)


if __name__ == "__main__":
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    WORDS.write_text(
        "".join(f"# {name}\n{said_in(situation)}\n\n" for name, situation in SITUATIONS.items()), encoding="utf-8"
    )
