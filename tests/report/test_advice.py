"""What a report advises to change."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import peft
import pytest
import torch
from reported import in_ddp, only
from scenarios import (
    FINALISING,
    FIRST_MASKING,
    INIT_R,
    LINEARS,
    PEFT_VERSION,
    TFINAL,
    TINIT,
    TOTAL,
    adalora_config,
    add_inference_adapter,
    branches,
    build,
    frozen,
    in_turn,
    two_branches,
)
from steps import advance

import peft_gradguard

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path


@pytest.fixture
def model() -> peft.PeftModel:
    return build(branches())


ADVICE: dict[str, tuple[dict[str, Any], Callable[[peft.PeftModel, int], None] | None, str]] = {
    "nothing trainable": ({}, frozen(), "Nothing is trainable: all 12 AdaLoRA parameters are frozen"),
    "E frozen": ({}, frozen("trunk", "lora_E"), "lora_E of trunk.0 and trunk.2 is frozen while"),
    "only E": (
        {},
        in_turn(frozen("trunk.0", "lora_A"), frozen("trunk.0", "lora_B")),
        "Only lora_E of trunk.0 trains",
    ),
    "three frozen": (
        {},
        in_turn(frozen("trunk", "lora_E"), frozen("branch.0", "lora_E")),
        "lora_E of trunk.0 and 2 more is frozen while",
    ),
    "A frozen": ({}, frozen("lora_A"), "One of lora_A and lora_B of trunk.0 and 3 more is frozen"),
    "names": ({}, add_inference_adapter("default_eval"), "adapter 'default_eval' contains 'default'"),
    "names in front": ({}, add_inference_adapter("a_default"), "adapter 'a_default' contains 'default'"),
    "more ranks": ({"target_r": INIT_R + 1}, None, f"target_r={INIT_R + 1} is not below init_r={INIT_R}"),
    "ranks": ({"target_r": INIT_R}, None, f"target_r={INIT_R} is not below init_r={INIT_R}"),
}


@pytest.mark.peft
@pytest.mark.parametrize("case", ADVICE)
def test_advice(case: str) -> None:
    config, prepare, said = ADVICE[case]
    model = build(branches(config={"target_modules": LINEARS, **config}))
    if prepare:
        prepare(model, 0)
    advice = peft_gradguard.report(model).adapters[0].advice
    assert len(advice) == 1
    assert said in advice[0]


@pytest.mark.peft
@pytest.mark.parametrize("how", ["frozen", "another adapter"])
@pytest.mark.parametrize(
    ("last", "hurts"),
    [
        (0, "update_and_allocate will raise NoGradientError"),
        (1, "nothing is scored or pruned as long as they are"),
        (FINALISING - 1, "nothing is scored or pruned as long as they are"),
        (FINALISING, None),
        (TOTAL, None),
    ],
)
def test_advice_on_an_adapter_of_which_nothing_trains_any_more(
    model: peft.PeftModel, last: int, hurts: str | None, how: str
) -> None:
    if how != "frozen" and PEFT_VERSION < (0, 6):
        pytest.skip("PEFT 0.5 freezes no adapter for another one")
    advance(model, *range(1, last + 1), optimise=True)
    if how == "frozen":
        frozen()(model, 0)
    else:
        add_inference_adapter("other")(model, 0)
        model.set_adapter("other")
    adapter = peft_gradguard.report(model).adapters[0]
    assert adapter.advice == (
        (
            f"Nothing is trainable: all 12 AdaLoRA parameters are frozen, and {hurts}. model.set_adapter('default') "
            "makes them trainable.",
        )
        if hurts
        else ()
    )
    text = str(peft_gradguard.report(model))
    counted = min(last, FINALISING - 1)
    said = f"12 parameters were scored at every step; the last scoring was at step {counted}"
    assert (said in text) == (last > 0)
    # Not ranked as long as it could be, and not left out of anything.
    assert (f"frozen  0 of {counted}\n" in text) == (0 < last < FINALISING)
    assert ("frozen" in text) == (last < FINALISING)
    if "raise" in (hurts or ""):
        with pytest.raises(peft_gradguard.NoGradientError):
            model.base_model.update_and_allocate(1)
    else:
        model.base_model.update_and_allocate(last + 1)


def test_advice_on_steps_that_cannot_fit(model: peft.PeftModel) -> None:
    config = model.peft_config["default"]
    for total in (TINIT + TFINAL, TINIT + TFINAL - 1):
        config.total_step = total
        assert f"leave none of the total_step={total} steps" in only(model).advice[0]
    config.total_step = TINIT + TFINAL + 1
    assert "leaves no masking step between" in only(model).advice[0]
    config.total_step += 1
    assert only(model).advice == ()
    config.tinit, config.total_step = TFINAL, 2 * TFINAL
    assert f"leave none of the total_step={2 * TFINAL} steps" in only(model).advice[0]
    config.total_step = None
    assert "total_step is not set" in only(model).advice[0]


def test_advice_on_flat_parameters(model: peft.PeftModel, tmp_path: Path) -> None:
    from torch.distributed.fsdp import FullyShardedDataParallel

    model.requires_grad_(True)
    holding = in_ddp(model, tmp_path)
    next(holding)
    flat = FullyShardedDataParallel(model, device_id=torch.device("cpu"), use_orig_params=False)
    assert "FSDP has made flat parameters of them (wrap with use_orig_params=True)" in only(flat).advice[0]
    assert not list(holding)


IN_MODULES = "occurs in names of modules (trunk.0): PEFT mixes the two up"
IN_LORA_E = "occurs in lora_E, which is in all names of the rank pattern: PEFT mixes the two up"
A_FACTOR = "contains that of a factor (lora_A, lora_B or lora_E): PEFT replaces it there too"


@pytest.mark.peft
@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("trunk", IN_MODULES),
        ("0", IN_MODULES),
        ("r", IN_MODULES),
        ("lora", IN_LORA_E),
        ("lora_", IN_LORA_E),
        ("lo", IN_LORA_E),
        ("E", IN_LORA_E),
        ("_E", IN_LORA_E),
        ("lora_E", A_FACTOR),
        ("lora_A", A_FACTOR),
        ("my_lora_B", A_FACTOR),
        ("lora_C", None),
        ("my_lora", None),
        ("A", None),
        ("head", None),
    ],
)
def test_advice_on_names_with_which_saving_or_training_fails(name: str, said: str | None, tmp_path: Path) -> None:
    model = peft.get_peft_model(two_branches(), adalora_config(target_modules=LINEARS), adapter_name=name)
    advice = only(model).advice
    assert len(advice) == (said is not None)
    if said is None:
        advance(model, *range(1, FIRST_MASKING + 1), optimise=True)
        model.save_pretrained(str(tmp_path))
        loaded = peft.PeftModel.from_pretrained(two_branches(), str(tmp_path / name), adapter_name=name)
        assert sum(m.rank_kept for m in only(loaded).modules) == sum(m.rank_kept for m in only(model).modules)
        return
    assert advice[0].startswith(f"The adapter's name {name!r} {said}")
    assert advice[0].endswith(
        "and training fails with KeyError. Choose another name."
        if said == A_FACTOR
        else "where it tells them apart by the adapter's name, and save_pretrained fails. Choose another name."
    )
    if said == A_FACTOR:
        with pytest.raises(KeyError):
            advance(model, *range(1, FIRST_MASKING + 1), optimise=True)
        return
    advance(model, *range(1, FIRST_MASKING + 1), optimise=True)
    with pytest.raises(KeyError):
        model.save_pretrained(str(tmp_path))
