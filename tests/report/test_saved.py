"""What a saved adapter kept, read without a model."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import safetensors.torch
import torch
from saved_adapters import CONFIG, WEIGHTS, lora
from scenarios import INIT_R, PEFT_VERSION, TARGET_R, branches, build
from scenarios import train as train_scenario

from peft_gradguard.report.saved import SavedAdapterError, read

if TYPE_CHECKING:
    from collections.abc import Callable

    from peft_gradguard.report.facts import ModuleReport

Inspect = "Callable[..., tuple[int, str, str]]"


def by_name(folder: Path) -> dict[str, ModuleReport]:
    (adapter,) = read(folder).adapters
    return {module.name: module for module in adapter.modules}


def change(folder: Path, **settings: Any) -> None:
    config = json.loads((folder / CONFIG).read_text())
    (folder / CONFIG).write_text(json.dumps({**config, **settings}))


@pytest.mark.peft
def test_ranks_are_those_of_the_training(tmp_path: Path) -> None:
    outcome = train_scenario("frozen layer", str(tmp_path))
    expected = {name.removesuffix(".lora_E.default"): flags for name, flags in (outcome.patterns[-1] or {}).items()}
    modules = by_name(tmp_path)
    assert {name: module.rank_kept for name, module in modules.items() if module.ranked} == {
        name: sum(flags) for name, flags in expected.items()
    }
    others = [module for module in modules.values() if not module.ranked]
    assert {module.name for module in others} == {name for name in modules if "layer.0." in name}
    assert {(m.rank_started, m.rank_kept) for m in others} == {(INIT_R, INIT_R)}
    for module in modules.values():
        assert {parameter.trainable for parameter in module.parameters} == {None}
        assert {p.factor: p.shape for p in module.parameters} == {
            "A": (module.rank_kept, 16), "B": (16, module.rank_kept), "E": (module.rank_kept, 1)
        }  # fmt: skip
    (adapter,) = read(tmp_path).adapters
    assert (adapter.init_budget, adapter.target_budget, adapter.unranked_ranks) == (24, 4 * TARGET_R, 2 * INIT_R)
    assert adapter.advice == ()


def test_ten_layers_are_in_order(saved: Path) -> None:
    tensors = {
        f"base_model.model.layer.{layer}.q.lora_{factor}": torch.zeros(shape)
        for layer in range(12)
        for factor, shape in (("A", (3, 4)), ("B", (5, 3)), ("E", (3, 1)))
    }
    safetensors.torch.save_file(tensors, saved / WEIGHTS)
    change(saved, rank_pattern={f"layer.{layer}.q.lora_E": [True] * 3 + [False] for layer in range(11)})
    assert list(by_name(saved)) == [f"layer.{layer}.q" for layer in range(12)]
    assert [module.rank_started for module in by_name(saved).values()] == [4] * 11 + [3]


def test_numbers_come_after_words(saved: Path) -> None:
    names = ["block.0.q", "block.head.q", "block.1.q", "block.q"]
    tensors = {f"base_model.model.{name}.lora_A": torch.zeros(3, 4) for name in names}
    safetensors.torch.save_file(tensors, saved / WEIGHTS)
    change(saved, rank_pattern={})
    assert list(by_name(saved)) == ["block.head.q", "block.q", "block.0.q", "block.1.q"]


def test_saved_before_the_first_pruning(tmp_path: Path, inspect: Inspect) -> None:
    build(branches()).save_pretrained(tmp_path)
    code, out, _ = inspect(tmp_path)
    assert code == 0
    assert "24 of 24 ranks kept" in out
    assert "No ranks were allocated" in out
    (adapter,) = read(tmp_path).adapters
    assert (adapter.init_budget, adapter.budget, adapter.target_budget) == (None, None, None)


def test_configuration_without_target_r(saved: Path) -> None:
    config = json.loads((saved / CONFIG).read_text())
    del config["target_r"]
    (saved / CONFIG).write_text(json.dumps(config))
    (adapter,) = read(saved).adapters
    assert (adapter.init_budget, adapter.target_budget) == (24, None)


def test_old_weights_file(saved: Path) -> None:
    expected = read(saved)
    tensors = safetensors.torch.load_file(saved / WEIGHTS)
    (saved / WEIGHTS).unlink()
    torch.save(tensors, saved / "adapter_model.bin")
    assert read(saved) == expected


class Evil:
    def __reduce__(self) -> Any:
        return (Path.touch, (Path("touched"),))


def test_old_weights_file_runs_no_code(
    saved: Path, inspect: Inspect, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (saved / WEIGHTS).unlink()
    torch.save({"base_model.model.q.lora_A": Evil()}, saved / "adapter_model.bin")
    code, _, err = inspect(saved)
    assert code == 2
    assert "adapter_model.bin: is damaged or cannot be read (Weights only load failed" in err
    assert err.count("\n") == 1
    assert not Path("touched").exists()


def test_names_with_the_adapter(saved: Path) -> None:
    expected = by_name(saved)
    tensors = safetensors.torch.load_file(saved / WEIGHTS)
    safetensors.torch.save_file(
        {f"{n}.default" if ".lora_" in n else n: t for n, t in tensors.items()}, saved / WEIGHTS
    )
    pattern = json.loads((saved / CONFIG).read_text())["rank_pattern"]
    change(saved, rank_pattern={f"{name}.default": flags for name, flags in pattern.items()})
    assert {n: m.rank_kept for n, m in by_name(saved).items()} == {n: m.rank_kept for n, m in expected.items()}


@pytest.mark.skipif(PEFT_VERSION >= (0, 16), reason="PEFT of today targets nothing inside modules_to_save")
@pytest.mark.peft
def test_inside_modules_to_save(tmp_path: Path) -> None:
    train_scenario("head targeted and in modules_to_save", str(tmp_path))
    inside = {module.name for module in by_name(tmp_path).values() if not module.ranked}
    assert inside == {name for name in by_name(tmp_path) if name.startswith("classifier.")} != set()


def test_adapters_of_other_methods_beside_it_are_left_out(saved: Path, inspect: Inspect) -> None:
    lora(saved / "other")
    assert [adapter.adapter for adapter in read(saved).adapters] == ["default"]
    (saved / CONFIG).unlink()
    shutil.copytree(saved / "other", saved / "third")
    assert inspect(saved) == (
        2,
        "",
        f"peft-gradguard: inspect: {saved / 'other'}: holds a LORA adapter, not an AdaLoRA one\n",
    )


@pytest.mark.parametrize("hide", [lambda file: file.symlink_to(file.name), lambda file: file.mkdir()])
def test_no_file_for_a_configuration_beside_an_adapter(saved: Path, hide: Callable[[Path], object]) -> None:
    (saved / "other").mkdir()
    hide(saved / "other" / CONFIG)
    assert [adapter.adapter for adapter in read(saved).adapters] == ["default"]


@pytest.mark.skipif(os.name == "nt", reason="permissions of POSIX")
def test_folder_that_may_not_be_read_beside_an_adapter(two: Path) -> None:
    # Root may read everything, and reads as somebody else here, from within the folder: pytest's may not be entered.
    if os.geteuid() == 0:
        for path in (two, *two.rglob("*")):
            os.chown(path, 65534, 65534)
    (two / "other").chmod(0)
    program = f"""
import os
import numpy, safetensors
from peft_gradguard.report.saved import read
os.chdir({str(two)!r})
if os.geteuid() == 0:
    os.seteuid(65534)
assert not os.access("other/{CONFIG}", os.F_OK, effective_ids=True)
print([adapter.adapter for adapter in read(".").adapters])
"""
    # Whoever may not read the project may not write to its coverage either.
    environ = {name: value for name, value in os.environ.items() if not name.startswith("COV")}
    ran = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, env=environ)
    (two / "other").chmod(0o700)
    assert (ran.stdout, ran.stderr, ran.returncode) == ("['default']\n", "", 0)


@pytest.mark.parametrize(("factor", "shape"), [("A", (2, 4)), ("B", (5, 2)), ("E", (2, 1))])
def test_weights_of_different_ranks(saved: Path, factor: str, shape: tuple[int, ...]) -> None:
    shapes = {"A": (3, 4), "B": (5, 3), "E": (3, 1), factor: shape}
    tensors = {f"base_model.model.q.lora_{name}": torch.zeros(shape) for name, shape in shapes.items()}
    safetensors.torch.save_file(tensors, saved / WEIGHTS)
    change(saved, rank_pattern={"q.lora_E": [True] * 3 + [False]})
    assert "says that 3 of 4 ranks are kept, but the weights have 2; PEFT" in read(saved).adapters[0].advice[0]


def test_weights_without_any_dimension(saved: Path) -> None:
    tensors = {f"base_model.model.q.lora_{factor}": torch.zeros(()) for factor in "ABE"}
    safetensors.torch.save_file(tensors, saved / WEIGHTS)
    change(saved, rank_pattern={})
    assert (by_name(saved)["q"].rank_kept, by_name(saved)["q"].rank_started) == (0, 0)


@pytest.mark.parametrize(
    "others",
    [{"A": ()}, {"B": ()}, {"B": (3,)}, {"E": ()}, {"A": (3,), "B": (), "E": ()}],
)
def test_weights_without_their_dimensions(saved: Path, others: dict[str, tuple[int, ...]]) -> None:
    shapes = {"A": (3, 4), "B": (5, 3), "E": (3, 1), **others}
    tensors = {f"base_model.model.q.lora_{name}": torch.zeros(shape) for name, shape in shapes.items()}
    safetensors.torch.save_file(tensors, saved / WEIGHTS)
    change(saved, rank_pattern={"q.lora_E": [True] * 3 + [False]})
    assert (by_name(saved)["q"].rank_kept, by_name(saved)["q"].rank_started) == (3, 4)
    assert read(saved).adapters[0].advice == ()


def test_modules_to_save_at_the_top_and_deeper(saved: Path) -> None:
    names = ["head", "head.dense", "ahead", "layers.0.q", "layers.0.score", "layers.0.scores", "classifier"]
    shapes = (("A", (3, 4)), ("B", (5, 3)), ("E", (3, 1)))
    tensors = {f"base_model.model.{n}.lora_{factor}": torch.zeros(shape) for n in names for factor, shape in shapes}
    safetensors.torch.save_file(tensors, saved / WEIGHTS)
    change(saved, rank_pattern={}, modules_to_save=["head", "score"])
    inside = {name for name, module in by_name(saved).items() if module.reason == "inside modules_to_save"}
    assert inside == {"head", "head.dense", "ahead", "layers.0.score"}


def test_mismatch_is_told(saved: Path) -> None:
    pattern = json.loads((saved / CONFIG).read_text())["rank_pattern"]
    name = next(name for name, flags in pattern.items() if 0 < sum(flags) < INIT_R - 1)
    change(saved, rank_pattern={**pattern, name: [True] * (INIT_R - 1) + [False]})
    (advice,) = read(saved).adapters[0].advice
    assert advice.startswith(name.removesuffix(".lora_E"))
    assert "says that 5 of 6 ranks are kept, but the weights have" in advice


def checkpoints(folder: Path) -> None:
    for steps in (10, 20):
        (folder / f"checkpoint-{steps}").mkdir()
        shutil.copy(folder / CONFIG, folder / f"checkpoint-{steps}" / CONFIG)
    (folder / CONFIG).unlink()


def other_weights(folder: Path) -> None:
    safetensors.torch.save_file({"head.weight": torch.zeros(1)}, folder / WEIGHTS)


def some_missing(folder: Path) -> None:
    tensors = safetensors.torch.load_file(folder / WEIGHTS)
    safetensors.torch.save_file({n: t for n, t in tensors.items() if "layer.0." in n}, folder / WEIGHTS)


PROBLEMS: dict[str, tuple[Callable[[Path], object], str]] = {
    "no folder": (shutil.rmtree, "no such folder"),
    "no configuration": (lambda f: (f / CONFIG).unlink(), "is not a saved adapter, it has no adapter_config.json"),
    "checkpoints": (checkpoints, "give one of the folders inside of it: checkpoint-10, checkpoint-20"),
    "broken configuration": (lambda f: (f / CONFIG).write_text("{"), "adapter_config.json: cannot be read (Expecting"),
    "a list": (lambda f: (f / CONFIG).write_text("[]"), "is not a PEFT configuration, it names no peft_type"),
    "no peft_type": (lambda f: change(f, peft_type=None), "is not a PEFT configuration, it names no peft_type"),
    "LoRA": (lora, "holds a LORA adapter, not an AdaLoRA one"),
    "of another kind": (lambda f: change(f, peft_type="A"), "holds a A adapter, not an AdaLoRA one"),
    "of a name in two lines": (lambda f: change(f, peft_type="A\nB"), "holds a A B adapter, not an AdaLoRA one"),
    "a number for peft_type": (lambda f: change(f, peft_type=5), "is not a PEFT configuration, it names no peft_type"),
    "brackets without end": (lambda f: (f / CONFIG).write_text("[" * 200_000), "adapter_config.json: cannot be read ("),
    "no weights": (lambda f: (f / WEIGHTS).unlink(), "its weights are missing"),
    "empty weights": (lambda f: (f / WEIGHTS).write_bytes(b""), f"{WEIGHTS}: is damaged or cannot be read"),
    "cut weights": (
        lambda f: (f / WEIGHTS).write_bytes((f / WEIGHTS).read_bytes()[:-9]),
        f"{WEIGHTS}: is damaged or cannot be read",
    ),
    "other weights": (other_weights, "hold no AdaLoRA parameters"),
    "some weights": (
        some_missing,
        "layer.1.attention.self.query, which adapter_config.json names, are missing, and of 3 more",
    ),
}


def test_two_modules_that_are_missing(saved: Path) -> None:
    shapes = {"A": (3, 4), "B": (5, 3), "E": (3, 1)}
    tensors = {f"base_model.model.q.lora_{factor}": torch.zeros(shape) for factor, shape in shapes.items()}
    safetensors.torch.save_file(tensors, saved / WEIGHTS)
    for missing, more in ((["k"], "are missing$"), (["k", "v"], "are missing, and of 1 more$")):
        change(saved, rank_pattern={f"{module}.lora_E": [True] * 3 for module in ["q", *missing]})
        with pytest.raises(SavedAdapterError, match=f"the weights of k, .*{more}"):
            read(saved)


@pytest.mark.parametrize("problem", PROBLEMS)
def test_problem_is_one_line_on_stderr(saved: Path, inspect: Inspect, problem: str) -> None:
    spoil, expected = PROBLEMS[problem]
    spoil(saved)
    code, out, err = inspect(saved)
    assert (code, out) == (2, "")
    assert err.count("\n") == 1
    assert err.startswith(f"peft-gradguard: inspect: {saved}")
    assert expected in err


@pytest.mark.parametrize(
    ("setting", "value", "said"),
    [
        ("target_r", None, "target_r is None, not a whole number"),
        ("target_r", "2", "target_r is '2', not a whole number"),
        ("target_r", True, "target_r is True, not a whole number"),
        ("target_r", 2.0, "target_r is 2.0, not a whole number"),
        ("modules_to_save", 5, "modules_to_save is 5, not a list of names"),
        ("modules_to_save", "head", "modules_to_save is 'head', not a list of names"),
        ("modules_to_save", ["head", None], "modules_to_save is ['head', None], not a list of names"),
        ("rank_pattern", ["q"], "rank_pattern is ['q'], not a list of flags for each module"),
        # What LoRA has there.
        ("rank_pattern", {"q": 8}, "rank_pattern of q is 8, not a list of flags"),
        ("rank_pattern", {"q": [True, "x"]}, "rank_pattern of q has a flag that is 'x', not true or false"),
        ("rank_pattern", {"p": [True], "q": [1]}, "rank_pattern of q has a flag that is 1, not true or false"),
        # Long ones are cut.
        ("target_r", [0] * 9, "target_r is [0, 0, 0, 0, 0, 0, ...], not a whole number"),
    ],
)
def test_setting_of_a_wrong_kind(saved: Path, inspect: Inspect, setting: str, value: object, said: str) -> None:
    change(saved, **{setting: value})
    assert inspect(saved) == (2, "", f"peft-gradguard: inspect: {saved / CONFIG}: its {said}\n")


@pytest.mark.parametrize("to_save", [None, [], ["classifier"]])
def test_modules_to_save_or_none(saved: Path, to_save: list[str] | None) -> None:
    change(saved, modules_to_save=to_save)
    assert len(by_name(saved)) == 6


def test_hub_id(inspect: Inspect, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    code, _, err = inspect("someone/an-adapter")
    assert code == 2
    assert "no such folder; an adapter on a hub must be downloaded first" in err


def test_file_instead_of_its_folder(saved: Path, inspect: Inspect) -> None:
    code, _, err = inspect(saved / WEIGHTS)
    assert code == 2
    assert "is a file; give the folder that holds it" in err
