"""Trainings that plain PEFT cannot finish: right with the guard, from the first step to the reload without it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
import torch
from scenarios import INIT_R, PEFT_VERSION, SCENARIOS, TARGET_R, Outcome, plain_failure, reloaded_logits, train

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

pytestmark = pytest.mark.peft

RELOADABLE = [
    name
    for name in SCENARIOS
    # PEFT before 0.16 cannot load such an adapter, with or without the guard, which warns of it.
    if name != "head targeted and in modules_to_save" or PEFT_VERSION >= (0, 16)
]


@pytest.fixture(scope="module")
def guarded(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], tuple[Outcome, Path]]:
    """Train a scenario under the guard, once for all tests that look at it."""
    trained: dict[str, tuple[Outcome, Path]] = {}

    def get(name: str) -> tuple[Outcome, Path]:
        if name not in trained:
            folder = tmp_path_factory.mktemp("adapter")
            trained[name] = train(name, str(folder)), folder
        return trained[name]

    return get


@pytest.mark.parametrize("name", SCENARIOS)
def test_plain_peft_fails(name: str, plain: Callable[..., Any], tmp_path: Path) -> None:
    failure = plain(plain_failure, name, str(tmp_path))
    expected = SCENARIOS[name].plain_error
    assert failure is None if expected is None else isinstance(failure, expected), repr(failure)


@pytest.mark.parametrize("name", [name for name in SCENARIOS if name != "calls that miss the finalising step"])
def test_ranks_come_down_to_the_target(name: str, guarded: Callable[[str], tuple[Outcome, Path]]) -> None:
    outcome, _ = guarded(name)
    final = outcome.patterns[-1]
    assert final
    assert sum(sum(mask) for mask in final.values()) == TARGET_R * len(final)
    assert outcome.budgets[-1] == (TARGET_R * len(final), INIT_R * len(final), TARGET_R * len(final))
    assert len({id(pattern) for pattern in outcome.patterns if pattern is not None}) >= 4, "several masking steps"


@pytest.mark.parametrize("name", SCENARIOS)
def test_only_ranked_triplets_are_named_and_masked(name: str, guarded: Callable[[str], tuple[Outcome, Path]]) -> None:
    outcome, _ = guarded(name)
    pattern = outcome.patterns[-1] or {}
    energies = {n: e for n, e in outcome.weights.items() if n.endswith(".lora_E.default")}
    for full_name, energy in energies.items():
        name_in_pattern = full_name.removeprefix("base_model.model.")
        mask = pattern.get(name_in_pattern) or pattern.get(name_in_pattern.removesuffix(".default"))
        if any(part in full_name for part in SCENARIOS[name].unranked):
            assert mask is None
        if mask is not None:
            assert not energy[~torch.tensor(mask)].any()
    named = {key.removesuffix(".default") for key in pattern}
    ranked = {n.removeprefix("base_model.model.").removesuffix(".default") for n in energies}
    ranked = {n for n in ranked if not any(part in n for part in SCENARIOS[name].unranked)}
    assert named == ranked or name == "calls that miss the finalising step"


@pytest.mark.parametrize("name", RELOADABLE)
def test_saved_adapter_loads_without_the_guard(
    name: str, guarded: Callable[[str], tuple[Outcome, Path]], plain: Callable[..., Any]
) -> None:
    outcome, folder = guarded(name)
    torch.testing.assert_close(plain(reloaded_logits, name, str(folder)), outcome.logits, rtol=0, atol=1e-6)
