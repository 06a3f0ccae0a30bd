"""``peft-gradguard inspect``: how it prints, draws and fails."""

from __future__ import annotations

import json
import subprocess
import sys
from typing import TYPE_CHECKING

import pytest
from saved_adapters import WEIGHTS, lora
from scenarios import LINEARS, adalora_config, branches, build

from peft_gradguard.report.saved import SavedAdapterError, read

if TYPE_CHECKING:
    from pathlib import Path

Inspect = "Callable[..., tuple[int, str, str]]"


def test_it_is_printed(saved: Path, inspect: Inspect) -> None:
    code, out, err = inspect(saved)
    assert (code, err) == (0, "")
    assert "20 of 36 ranks kept" in out
    assert "4 modules share a budget of 24 ranks at the start, 8 in the end; 2 others keep" in out
    assert "layer 0 1 2" in out
    assert "scored" not in out
    assert "trainable" not in out


def test_json(saved: Path, inspect: Inspect) -> None:
    code, out, _ = inspect(saved, "--json")
    assert code == 0
    assert out == json.dumps(json.loads(out), indent=2) + "\n"
    (adapter,) = json.loads(out)["adapters"]
    assert adapter["saved"]
    assert sum(module["rank_kept"] for module in adapter["modules"]) == 20


@pytest.mark.parametrize("ending", ["png", "svg"])
def test_picture(saved: Path, inspect: Inspect, tmp_path: Path, ending: str) -> None:
    code, out, _ = inspect(saved, "--plot", tmp_path / f"ranks.{ending}")
    assert code == 0
    assert out
    assert (tmp_path / f"ranks.{ending}").stat().st_size > 1000


def test_several_adapters(tmp_path: Path, inspect: Inspect) -> None:
    model = build(branches())
    config = adalora_config(target_modules=LINEARS, init_r=3, inference_mode=True)
    model.add_adapter("other", config)
    model.save_pretrained(tmp_path)
    assert [adapter.adapter for adapter in read(tmp_path).adapters] == ["default", "other"]
    code, out, _ = inspect(tmp_path, "--adapter", "other")
    assert code == 0
    assert "'other'" in out
    assert "12 of 12 ranks kept" in out
    code, _, err = inspect(tmp_path, "--adapter", "third")
    assert code == 2
    assert "there is no adapter 'third' in it, only 'default', 'other'" in err
    said = "peft-gradguard: inspect: --plot draws one adapter: give --adapter NAME, one of 'default', 'other'\n"
    assert inspect(tmp_path, "--plot", tmp_path / "ranks.png") == (2, "", said)
    assert not (tmp_path / "ranks.png").exists()
    assert inspect(tmp_path, "--plot", tmp_path / "ranks.png", "--adapter", "other")[::2] == (0, "")
    assert (tmp_path / "ranks.png").exists()


def without_weights(folder: Path) -> str:
    (folder / WEIGHTS).unlink()
    return (
        f"peft-gradguard: inspect: {folder}: its weights are missing, there is neither {WEIGHTS} nor "
        "adapter_model.bin\n"
    )


@pytest.mark.parametrize(("whole", "damaged", "folder"), [("default", "other", "other"), ("other", "default", ".")])
def test_damaged_adapter_beside_a_whole_one(
    two: Path, inspect: Inspect, tmp_path: Path, whole: str, damaged: str, folder: str
) -> None:
    lora(two / "lora")
    forms: tuple[tuple[str, ...], ...] = ((), ("--json",))
    expected = [inspect(two, "--adapter", whole, *form)[1] for form in forms]
    line = without_weights(two / folder)
    for form, out in zip(forms, expected, strict=True):
        assert inspect(two, *form) == (2, out, line)
        assert inspect(two, "--adapter", whole, *form) == (0, out, "")
        assert inspect(two, "--adapter", damaged, *form) == (2, "", line)
    assert [adapter.adapter for adapter in read(two, whole).adapters] == [whole]
    for asked_for in (None, damaged):
        with pytest.raises(SavedAdapterError, match="its weights are missing"):
            read(two, asked_for)
    picture = tmp_path / "ranks.png"
    assert inspect(two, "--plot", picture) == (2, expected[0], line)
    assert picture.exists()
    code, out, err = inspect(two, "--plot", tmp_path / "ranks.pdf")
    assert (code, out) == (2, "")
    assert err.startswith(line + "peft-gradguard: inspect: '")


def test_all_adapters_are_damaged(two: Path, inspect: Inspect, tmp_path: Path) -> None:
    lora(two / "lora")
    lines = without_weights(two) + without_weights(two / "other")
    assert inspect(two) == inspect(two, "--plot", tmp_path / "ranks.png") == (2, "", lines)
    with pytest.raises(SavedAdapterError, match=f"^{two}: "):
        read(two)


def test_adapter_of_another_method_is_asked_for(saved: Path, inspect: Inspect) -> None:
    lora(saved / "other")
    line = f"peft-gradguard: inspect: {saved / 'other'}: holds a LORA adapter, not an AdaLoRA one\n"
    assert inspect(saved, "--adapter", "other") == (2, "", line)


def test_picture_of_an_unknown_kind(saved: Path, inspect: Inspect, tmp_path: Path) -> None:
    code, out, err = inspect(saved, "--plot", tmp_path / "ranks.pdf")
    assert (code, out) == (2, "")
    assert "is written as .png or .svg" in err


def test_neither_torch_nor_peft_is_needed(saved: Path) -> None:
    program = f"""
import sys
from peft_gradguard.cli.main import main
assert main(["inspect", {str(saved)!r}]) == 0
print(sorted({{"torch", "peft", "transformers", "matplotlib"}} & set(sys.modules)))
"""
    found = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert found.stdout.endswith("[]\n"), found
