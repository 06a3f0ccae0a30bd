"""A pruned adapter loads into one that lives, through PEFT's own functions; everything else loads as in plain PEFT."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import TYPE_CHECKING, Any

import peft
import pytest
import safetensors.torch
import torch
from scenarios import (
    FINALISING,
    INIT_R,
    PEFT_VERSION,
    TARGET_R,
    TOTAL,
    adalora_config,
    branches,
    build,
    loss_of,
    two_branches,
    vectors,
)

import peft_gradguard

if TYPE_CHECKING:
    import logging
    from collections.abc import Callable

SCENARIO = branches()
MASKED, BETWEEN = 10, 11
"""A step that masks, and one after which the optimizer has written over the mask."""


def train(model: peft.PeftModel, first: int, last: int, optimizer: Any = None, call: bool = True) -> Any:
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = optimizer or torch.optim.AdamW(trainable, lr=1e-2)
    for step in range(first, last + 1):
        model.train()
        loss_of(model, vectors(step), regularised=False).backward()
        optimizer.step()
        if call:
            model.base_model.update_and_allocate(step)
        optimizer.zero_grad()
    return optimizer


def trained(last: int, first: int = 1) -> peft.PeftModel:
    model = build(SCENARIO)
    train(model, first, last)
    return model


def base() -> torch.nn.Module:
    torch.manual_seed(0)
    return two_branches()


def logits(model: torch.nn.Module) -> torch.Tensor:
    model.eval()
    with torch.no_grad():
        return model(inputs=vectors(0)["inputs"]).logits


def loaded(folder: str) -> peft.PeftModel:
    """As plain PEFT loads it for inference; the guard has no hand in that."""
    with peft_gradguard.disabled():
        return peft.PeftModel.from_pretrained(base(), folder)


def bits(model: peft.PeftModel) -> dict[str, list[bool]] | None:
    pattern = model.peft_config["default"].rank_pattern
    return pattern and {name.removesuffix(".default"): keep for name, keep in pattern.items()}


def energies(model: peft.PeftModel) -> dict[str, torch.Tensor]:
    return {name: p for name, p in model.base_model.model.named_parameters() if name.endswith(".lora_E.default")}


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def into_a_fresh_one(folder: str) -> peft.PeftModel:
    model = build(SCENARIO)
    model.load_adapter(folder, "default", is_trainable=True)
    return model


def into_the_one_that_trains(folder: str) -> peft.PeftModel:
    model = trained(14)
    model.load_adapter(folder, "default")
    return model


def to_train_on(folder: str) -> peft.PeftModel:
    return peft.PeftModel.from_pretrained(base(), folder, is_trainable=True)


def with_a_new_configuration(folder: str) -> peft.PeftModel:
    config = adalora_config(**SCENARIO.config, beta1=0.7)
    return peft.PeftModel.from_pretrained(base(), folder, is_trainable=True, config=config)


WAYS = [into_a_fresh_one, into_the_one_that_trains, to_train_on, with_a_new_configuration]


@pytest.mark.peft
@pytest.mark.parametrize("step", [2, MASKED, BETWEEN, FINALISING, TOTAL])
@pytest.mark.parametrize("way", WAYS)
def test_the_function_is_that_of_the_saved_adapter(
    step: int, way: Callable[[str], peft.PeftModel], said: Callable[[], list[str]]
) -> None:
    trained(step).save_pretrained("saved")
    expected = loaded("saved")
    model = way("saved")
    assert torch.allclose(logits(model), logits(expected), atol=1e-6)
    assert bits(model) == bits(expected)
    allocator = model.base_model.rankallocator
    assert (allocator.init_bgt, allocator.target_bgt) == (4 * INIT_R, 4 * TARGET_R)
    assert {len(energy) for energy in energies(model).values()} == {INIT_R}
    for name, keep in (bits(model) or {}).items():
        assert not energies(model)[f"{name}.default"][torch.tensor(keep).logical_not()].any()
    model.save_pretrained("again")
    again = loaded("again")
    assert torch.allclose(logits(again), logits(expected), atol=1e-6)
    assert bits(again) == bits(expected)
    assert not [message for message in said() if "never" not in message]


@pytest.mark.peft
@pytest.mark.parametrize("way", WAYS)
def test_ranks_are_allocated_anew(way: Callable[[str], peft.PeftModel]) -> None:
    trained(TOTAL).save_pretrained("saved")
    model = way("saved")
    before = bits(model)
    assert before is not None
    train(model, 1, 6)
    grown = bits(model)
    assert grown is not None
    assert sum(map(sum, grown.values())) > sum(map(sum, before.values()))
    assert any(now and not was for name in grown for now, was in zip(grown[name], before[name], strict=True))
    train(model, 7, TOTAL)
    assert sum(map(sum, bits(model).values())) == 4 * TARGET_R  # type: ignore[union-attr]
    model.save_pretrained("again")
    assert torch.allclose(logits(loaded("again")), logits(model), atol=1e-6)


@pytest.mark.peft
@pytest.mark.parametrize("calls", [True, False])
def test_what_is_saved_before_the_first_new_mask_is_what_is_there(calls: bool) -> None:
    """The loaded pattern would cut ranks that train by then."""
    trained(TOTAL).save_pretrained("saved")
    model = to_train_on("saved")
    train(model, 1, 3, call=calls)
    model.save_pretrained("again")
    assert torch.allclose(logits(loaded("again")), logits(model), atol=1e-6)


@pytest.mark.peft
def test_the_rows_are_the_true_ones_and_the_parameters_the_same() -> None:
    model = trained(MASKED)
    kept = {name: p.detach().clone() for name, p in model.base_model.model.named_parameters() if "lora_" in name}
    pattern = bits(model)
    assert pattern is not None
    assert any(not all(keep) for keep in pattern.values())
    model.save_pretrained("saved")
    parameters = dict(model.named_parameters())
    train(model, BETWEEN, 15)
    model.load_adapter("saved", "default")
    assert all(parameter is parameters[name] for name, parameter in model.named_parameters())
    now = dict(model.base_model.model.named_parameters())
    for name, keep in pattern.items():
        rows = torch.tensor(keep)
        for factor in "ABE":
            part = f"{name.replace('lora_E', f'lora_{factor}')}.default"
            was, has = (kept[part], now[part]) if factor != "B" else (kept[part].T, now[part].T)
            assert torch.equal(was[rows], has[rows])


@pytest.mark.peft
def test_the_rows_of_a_fresh_adapter_are_as_they_were_made() -> None:
    trained(MASKED).save_pretrained("saved")
    model = build(SCENARIO)
    made = {name: p.detach().clone() for name, p in model.base_model.model.named_parameters()}
    model.load_adapter("saved", "default")
    for name, keep in bits(model).items():  # type: ignore[union-attr]
        part = f"{name.replace('lora_E', 'lora_A')}.default"
        cut = torch.tensor(keep).logical_not()
        assert torch.equal(dict(model.base_model.model.named_parameters())[part][cut], made[part][cut])


@pytest.mark.peft
def test_a_state_that_a_program_puts_back() -> None:
    model = trained(8)
    state = copy.deepcopy(peft.get_peft_model_state_dict(model))
    model.save_pretrained("saved")
    pattern = bits(model)
    optimizer = train(model, 9, 15)
    peft.get_peft_model_state_dict(model)
    assert bits(model) != pattern
    peft.set_peft_model_state_dict(model, state)
    assert bits(model) == pattern
    assert torch.allclose(logits(model), logits(loaded("saved")), atol=1e-6)
    train(model, 16, TOTAL, optimizer)
    model.save_pretrained("again")
    assert torch.allclose(logits(loaded("again")), logits(model), atol=1e-6)


@pytest.mark.peft
def test_a_whole_state_that_a_program_puts_back() -> None:
    """It is of the warm-up, and the pattern of a later step would cut what it has."""
    model = trained(2)
    state = copy.deepcopy(peft.get_peft_model_state_dict(model))
    expected = logits(model)
    train(model, 3, 12)
    peft.set_peft_model_state_dict(model, state)
    assert torch.equal(logits(model), expected)
    model.save_pretrained("saved")
    assert torch.allclose(logits(loaded("saved")), expected, atol=1e-6)


@pytest.mark.peft
@pytest.mark.parametrize("fresh", [True, False])
def test_tensors_that_torch_puts_back(fresh: bool) -> None:
    """By ``load_state_dict``, without any function of PEFT's; what is trained since is saved whole."""
    trained(TOTAL).save_pretrained("saved")
    model = to_train_on("saved")
    cut = {f"{name}.default": value.clone() for name, value in peft.get_peft_model_state_dict(model).items()}
    if fresh:
        model = build(SCENARIO)
    train(model, 1, 2, call=False)
    assert not model.load_state_dict(cut, strict=False).unexpected_keys
    assert torch.allclose(logits(model), logits(loaded("saved")), atol=1e-6)
    train(model, 1, 3, call=False)
    model.save_pretrained("again")
    assert torch.allclose(logits(loaded("again")), logits(model), atol=1e-6)


@pytest.mark.peft
def test_a_whole_state_that_torch_puts_back() -> None:
    """It is the one of now, and what is saved of it is cut as before."""
    model = trained(BETWEEN)
    model.load_state_dict(copy.deepcopy(model.state_dict()))
    assert model.peft_config["default"].rank_pattern
    pattern = bits(model)
    saved = peft.get_peft_model_state_dict(model)
    assert bits(model) == pattern
    assert {len(value) for name, value in saved.items() if "lora_E" in name} != {INIT_R}


@pytest.mark.peft
def test_a_state_without_the_adapter_changes_no_pattern() -> None:
    trained(TOTAL).save_pretrained("saved", safe_serialization=True)
    model = trained(BETWEEN)
    pattern = bits(model)
    tensors = safetensors.torch.load_file("saved/adapter_model.safetensors")
    safetensors.torch.save_file({"of another": tensors.popitem()[1]}, "saved/adapter_model.safetensors")
    model.load_adapter("saved", "default")
    assert bits(model) == pattern


@pytest.mark.peft
def test_only_the_last_patterns_are_remembered() -> None:
    from peft_gradguard.memory.memory import known_memory

    model, patterns = trained(MASKED), []
    config = model.peft_config["default"]
    names, (_, _, *others) = list(config.rank_pattern), config.rank_pattern.values()
    for number in range(70):
        first = [bool((number % 63 + 1) >> row & 1) for row in range(INIT_R)]
        patterns.append([first, [True] * (INIT_R - 1) + [number < 63], *others])
        config.rank_pattern = dict(zip(names, patterns[-1], strict=True))
        peft.get_peft_model_state_dict(model)
    memory = known_memory(model.base_model.rankallocator)
    assert memory is not None
    assert [list(pattern.values()) for pattern in memory.cut] == patterns[-64:]


@pytest.mark.peft
def test_tensors_whose_pattern_nobody_knows(said: Callable[[], list[str]]) -> None:
    first = trained(BETWEEN)
    state = peft.get_peft_model_state_dict(first)
    first.save_pretrained("saved")
    model = build(SCENARIO)
    peft.set_peft_model_state_dict(model, state)
    assert torch.allclose(logits(model), logits(loaded("saved")), atol=1e-6)
    assert ["a rank_pattern which peft_gradguard does not know" in message for message in said()] == [True]


@pytest.mark.peft
@pytest.mark.parametrize("spoilt", [float("nan"), float("inf")])
def test_the_best_of_a_training_that_diverged(spoilt: float) -> None:
    model = trained(BETWEEN)
    model.save_pretrained("saved")
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.fill_(spoilt)
    model.load_adapter("saved", "default")
    assert torch.allclose(logits(model), logits(loaded("saved")), atol=1e-6)


@pytest.mark.peft
@pytest.mark.parametrize("changes", [{"init_r": INIT_R + 2}, {"init_r": INIT_R - 1}])
def test_an_adapter_of_another_size_is_refused_as_ever(changes: dict[str, Any]) -> None:
    trained(BETWEEN).save_pretrained("saved")
    torch.manual_seed(0)
    model = peft.get_peft_model(two_branches(), adalora_config(**SCENARIO.config, **changes))
    before = model.peft_config["default"].rank_pattern
    with pytest.raises(RuntimeError, match="size mismatch"):
        model.load_adapter("saved", "default")
    assert model.peft_config["default"].rank_pattern == before


@pytest.mark.peft
def test_an_adapter_of_layers_of_another_size_is_refused_as_ever() -> None:
    trained(BETWEEN).save_pretrained("saved", safe_serialization=True)
    tensors = safetensors.torch.load_file("saved/adapter_model.safetensors")
    name = next(name for name in tensors if "lora_A" in name)
    tensors[name] = tensors[name][:, 1:].contiguous()
    safetensors.torch.save_file(tensors, "saved/adapter_model.safetensors")
    model = build(SCENARIO)
    with pytest.raises(RuntimeError, match="size mismatch"):
        model.load_adapter("saved", "default")
    assert model.peft_config["default"].rank_pattern is None


@pytest.mark.peft
def test_a_whole_adapter_of_another_size_is_refused_as_ever() -> None:
    torch.manual_seed(0)
    small = peft.get_peft_model(two_branches(), adalora_config(**SCENARIO.config, init_r=3))
    model = build(SCENARIO)
    with pytest.raises(RuntimeError, match="size mismatch"):
        peft.set_peft_model_state_dict(model, peft.get_peft_model_state_dict(small))


def same(one: torch.nn.Module, other: torch.nn.Module) -> bool:
    mine, theirs = one.state_dict(), other.state_dict()
    return mine.keys() == theirs.keys() and all(torch.equal(value, theirs[name]) for name, value in mine.items())


@pytest.mark.peft
def test_loading_for_inference_is_pefts(records: list[logging.LogRecord]) -> None:
    trained(TOTAL).save_pretrained("saved")
    torch.manual_seed(3)
    plain = loaded("saved")
    random = torch.random.get_rng_state()
    records.clear()
    torch.manual_seed(3)
    model = peft.PeftModel.from_pretrained(base(), "saved")
    assert same(model, plain)
    assert torch.equal(torch.random.get_rng_state(), random)
    assert {len(energy) for energy in energies(model).values()} != {INIT_R}
    assert records == []
    for name in ("another", "other"):
        guarded, unguarded = build(SCENARIO), build(SCENARIO)
        torch.manual_seed(4)
        guarded.load_adapter("saved", name)
        with peft_gradguard.disabled():
            torch.manual_seed(4)
            unguarded.load_adapter("saved", name)
        assert same(guarded, unguarded)


@pytest.mark.peft
def test_lora_loads_as_ever() -> None:
    def lora() -> peft.PeftModel:
        torch.manual_seed(5)
        return peft.get_peft_model(two_branches(), peft.LoraConfig(target_modules=["trunk.0"], r=2))

    lora().save_pretrained("saved")
    model = lora()
    model.load_adapter("saved", "default", is_trainable=True)
    assert same(model, lora())


@pytest.mark.peft
@pytest.mark.parametrize("step", [BETWEEN, TOTAL])
def test_one_that_was_cut_without_the_guard(step: int) -> None:
    """PEFT refuses to load into it, and writes nothing of what it cannot load whole."""
    trained(step).save_pretrained("saved")
    with peft_gradguard.disabled():
        model = peft.PeftModel.from_pretrained(base(), "saved", is_trainable=True)
    expected = logits(model)
    trained(MASKED).save_pretrained("other")
    with pytest.raises(IndexError):
        model.load_adapter("other", "default", is_trainable=True)
    assert torch.equal(logits(model), expected)


@pytest.mark.peft
def test_a_program_may_still_cut_its_model() -> None:
    model = trained(TOTAL)
    pattern = model.peft_config["default"].rank_pattern
    model.base_model.resize_modules_by_rank_pattern(pattern, "default")
    assert {name: len(energy) for name, energy in energies(model).items()} == {
        name: sum(keep) for name, keep in pattern.items()
    }


def test_switched_off_it_loads_as_in_plain_peft() -> None:
    trained(TOTAL).save_pretrained("saved")
    with peft_gradguard.disabled():
        model = build(SCENARIO)
        with pytest.raises(RuntimeError, match="size mismatch"):
            model.load_adapter("saved", "default")
        assert {len(e) for e in energies(to_train_on("saved")).values()} != {INIT_R}


@pytest.mark.skipif(PEFT_VERSION < (0, 12), reason="this PEFT does not take it")
def test_sizes_that_are_to_be_ignored_are_pefts() -> None:
    trained(TOTAL).save_pretrained("saved")
    model = peft.PeftModel.from_pretrained(base(), "saved", is_trainable=True, ignore_mismatched_sizes=True)
    assert torch.allclose(logits(model), logits(loaded("saved")), atol=1e-6)


@pytest.mark.skipif(PEFT_VERSION < (0, 13), reason="this PEFT does not take it")
def test_made_without_values_first() -> None:
    trained(TOTAL).save_pretrained("saved")
    model = peft.PeftModel.from_pretrained(base(), "saved", is_trainable=True, low_cpu_mem_usage=True)
    assert torch.allclose(logits(model), logits(loaded("saved")), atol=1e-6)
    assert all(parameter.isfinite().all() for parameter in model.parameters())
    train(model, 1, TOTAL)
    assert sum(map(sum, bits(model).values())) == 4 * TARGET_R  # type: ignore[union-attr]


@pytest.mark.peft
def test_under_another_name() -> None:
    trained(TOTAL).save_pretrained("saved")
    model = peft.PeftModel.from_pretrained(base(), "saved", adapter_name="second", is_trainable=True)
    assert torch.allclose(logits(model), logits(loaded("saved")), atol=1e-6)
    assert model.base_model.rankallocator.init_bgt == 4 * INIT_R


@pytest.mark.peft
def test_a_folder_without_its_configuration_asks_no_hub(monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub

    trained(BETWEEN).save_pretrained("saved")
    (Path("saved") / "adapter_config.json").rename("elsewhere.json")
    asked: list[Any] = []
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", lambda *which, **_: asked.append(which))
    model = build(SCENARIO)
    model.load_adapter("saved", "default")
    assert asked == []
    Path("elsewhere.json").rename(Path("saved") / "adapter_config.json")
    assert torch.allclose(logits(model), logits(loaded("saved")), atol=1e-6)


@pytest.mark.peft
@pytest.mark.parametrize("given", ["path", "subfolder"])
def test_where_the_folder_is_given_in_other_ways(given: str) -> None:
    trained(BETWEEN).save_pretrained("there/saved")
    model = build(SCENARIO)
    if given == "path":
        model.load_adapter(Path("there") / "saved", "default")
    else:
        model.load_adapter("there", "default", subfolder="saved")
    expected = loaded("there/saved")
    assert bits(model) == bits(expected)
    assert torch.allclose(logits(model), logits(expected), atol=1e-6)


@pytest.mark.peft
def test_a_frozen_adapter_stays_frozen() -> None:
    trained(BETWEEN).save_pretrained("saved")
    model = build(SCENARIO).requires_grad_(False)
    model.load_adapter("saved", "default")
    assert torch.allclose(logits(model), logits(loaded("saved")), atol=1e-6)
    assert not any(parameter.requires_grad for parameter in model.parameters())
