"""A pruned adapter that is trained on: warned of, and advised on."""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING

import peft
import pytest
import torch
from reported import only
from scenarios import (
    FINALISING,
    INIT_R,
    LINEARS,
    TARGET_R,
    TOTAL,
    adalora_config,
    branches,
    build,
    frozen,
    loss_of,
    train,
    two_branches,
    vectors,
)
from steps import advance
from torch import nn

import peft_gradguard

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path


def trained_on(
    folder: Path, target_r: int, prepare: Callable[[peft.PeftModel, int], None] | None = None
) -> tuple[nn.Module, peft.PeftModel]:
    """A base model, and the adapter of a whole training, loaded into it to be trained on."""
    train(branches(config={"target_modules": LINEARS, "target_r": target_r}), str(folder))
    torch.manual_seed(0)
    base = two_branches()
    # With the guard on it would get all its rows back.
    with peft_gradguard.disabled():
        model = peft.PeftModel.from_pretrained(copy.deepcopy(base), str(folder), is_trainable=True)
    if prepare:
        prepare(model, 0)
    return base, model


@pytest.mark.peft
def test_more_ranks_than_were_counted_are_no_such_case(said: Callable[[], list[str]]) -> None:
    model = build(branches(config={"target_modules": LINEARS}))
    model.base_model.rankallocator.init_bgt = INIT_R
    advance(model, 1)
    assert said() == []
    assert not [text for text in only(model).advice if "budget begins" in text]


@pytest.mark.peft
@pytest.mark.parametrize(
    ("target_r", "will"),
    [
        (TARGET_R, "fail in torch.kthvalue"),
        (INIT_R // 2, "leave 0 of 12 ranks"),
        (INIT_R // 2 + 1, "leave 8 of 16 ranks"),
    ],
)
def test_advice_on_training_a_pruned_adapter_on(target_r: int, will: str, tmp_path: Path) -> None:
    base, model = trained_on(tmp_path, target_r)
    adapter, there = only(model), 4 * target_r
    (advice,) = adapter.advice
    assert advice == (
        f"This adapter has {there} ranks, but its budget begins at {4 * INIT_R}: PEFT cut it when it was loaded, "
        f"without peft_gradguard or with ignore_mismatched_sizes. update_and_allocate will {will}, and PEFT cannot "
        "load what is saved after it. Load it again with the guard on; to train just these ranks, never call "
        "update_and_allocate (no AdaLoraCallback either)."
    )
    assert f"4 modules share a budget of {4 * INIT_R} ranks, {there} in the end, but have only {there}" in " ".join(
        str(peft_gradguard.report(model)).split()
    )
    if "kthvalue" in will:
        with pytest.raises(RuntimeError, match="kthvalue"):
            advance(model, *range(1, FINALISING + 1), optimise=True)
        return
    advance(model, *range(1, FINALISING + 1), optimise=True)
    assert sum(map(sum, model.peft_config["default"].rank_pattern.values())) == int(will.split()[1])
    assert ", but have only" not in str(peft_gradguard.report(model))
    model.save_pretrained(str(tmp_path))
    with pytest.raises(IndexError):
        peft.PeftModel.from_pretrained(base, str(tmp_path))


@pytest.mark.peft
def test_first_call_for_a_pruned_adapter_warns(tmp_path: Path, said: Callable[[], list[str]]) -> None:
    _, model = trained_on(tmp_path, INIT_R // 2)
    assert said() == []
    advance(model, 1, 2)
    assert said() == [
        "AdaLoRA's adapter 'default' has 12 ranks, but its budget begins at 24: PEFT cut it when it was loaded, "
        "without peft_gradguard or with ignore_mismatched_sizes. So update_and_allocate prunes too many ranks, or "
        "fails in torch.kthvalue, and PEFT cannot load what is saved after it. Load it again with the guard on; to "
        "train just these ranks, leave out the calls."
    ]


@pytest.mark.peft
def test_first_call_for_an_adapter_beside_a_pruned_one_warns_of_nothing(
    tmp_path: Path, said: Callable[[], list[str]]
) -> None:
    train(branches(config={"target_modules": LINEARS}), str(tmp_path))
    model = build(branches(config={"target_modules": LINEARS}))
    # PEFT's own substring test counts the names of both.
    model.load_adapter(str(tmp_path), "default_eval")
    model.set_adapter("default")
    advance(model, 1)
    assert not [message for message in said() if "its budget begins" in message]


@pytest.mark.peft
def test_a_pruned_adapter_that_is_trained_on_without_allocating_loads(tmp_path: Path) -> None:
    base, model = trained_on(tmp_path, TARGET_R)
    ranks = {module.name: module.rank_kept for module in only(model).modules}
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for step in range(1, 5):
        optimizer.zero_grad()
        loss_of(model, vectors(step), regularised=False).backward()
        optimizer.step()
    model.save_pretrained(str(tmp_path))
    loaded = peft.PeftModel.from_pretrained(base, str(tmp_path))
    assert {module.name: module.rank_kept for module in only(loaded).modules} == ranks
    assert torch.equal(loaded.eval()(**vectors(0)).logits, model.eval()(**vectors(0)).logits)


@pytest.mark.peft
def test_a_fresh_adapter_on_a_merged_one_is_allocated(tmp_path: Path) -> None:
    _, model = trained_on(tmp_path, TARGET_R)
    fresh = peft.get_peft_model(model.merge_and_unload(), adalora_config(target_modules=LINEARS))
    assert only(fresh).advice == ()
    advance(fresh, *range(1, TOTAL + 1), optimise=True)
    assert sum(map(sum, fresh.peft_config["default"].rank_pattern.values())) == 4 * TARGET_R


@pytest.mark.peft
@pytest.mark.parametrize(
    ("target_r", "part"), [(2, "trunk"), (2, "branch"), (2, "branch.0"), (3, "trunk"), (4, "trunk"), (4, "branch")]
)
def test_advice_on_training_a_pruned_adapter_on_with_a_part_of_it_frozen(
    target_r: int, part: str, tmp_path: Path
) -> None:
    # What is ranked is another set then, so that the guard lets PEFT count anew.
    _, model = trained_on(tmp_path, target_r, frozen(part))
    ranked = [module for module in only(model).modules if not module.name.startswith(part)]
    there, target = sum(module.rank_kept for module in ranked), target_r * len(ranked)
    will = f"leave {target} of {there} ranks" if there > target else "fail in torch.kthvalue"
    (advice,) = only(model).advice
    assert f"has {4 * target_r} ranks, but its budget begins at {4 * INIT_R}" in advice
    assert f"update_and_allocate will {will}, and" in advice
    if "leave" in will:
        advance(model, *range(1, FINALISING + 1), optimise=True)
        assert sum(map(sum, model.peft_config["default"].rank_pattern.values())) == target
    else:
        with pytest.raises(RuntimeError, match="kthvalue"):
            advance(model, *range(1, FINALISING + 1), optimise=True)


@pytest.mark.peft
def test_no_advice_on_training_an_adapter_on_that_was_not_pruned(tmp_path: Path) -> None:
    build(branches()).save_pretrained(str(tmp_path))
    model = peft.PeftModel.from_pretrained(two_branches(), str(tmp_path), is_trainable=True)
    assert only(model).advice == ()
    assert "4 modules share a budget of 24 ranks, 8 in the end\n" in str(peft_gradguard.report(model))
