"""From a saved adapter's folder to its report: no model is needed, and no tensor is kept."""

from __future__ import annotations

import json
import os
import re
import reprlib
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from ..model.exclusions import PEFT_PREFIX
from ..model.parameters import INSIDE_MODULES_TO_SAVE
from .facts import AdapterReport, ModuleReport, ParameterReport
from .report import Report

if TYPE_CHECKING:
    from collections.abc import Iterable

    from ..model.parameters import Factor

CONFIG, WEIGHTS, OLD_WEIGHTS = "adapter_config.json", "adapter_model.safetensors", "adapter_model.bin"
DEFAULT = "default"
"""PEFT saves the adapter of this name in the folder itself, and others in folders of their names inside of it."""

NO_PATTERN = (
    f"No ranks were allocated: {CONFIG} has no rank_pattern. Either the adapter was saved before the first pruning "
    "step (after tinit, every deltaT steps), or update_and_allocate was never called."
)

Shapes = dict[str, tuple[int, ...]]


class SavedAdapterError(Exception):
    """What is wrong with the folder, in one sentence, with what to do."""


class OtherMethodError(SavedAdapterError):
    """An adapter, but not one of AdaLoRA."""


class Tensor(NamedTuple):
    """One factor of one triplet in the file."""

    name: str
    module: str
    factor: Factor
    shape: tuple[int, ...]


def read(path: str | os.PathLike[str], adapter: str | None = None) -> Report:
    """Return the report of the AdaLoRA adapters that ``save_pretrained`` left in this folder.

    ``adapter``: only this one. Of what a report holds the files tell the shapes, the ranks started with and kept, and
    what is not ranked; the rest is None. ``SavedAdapterError`` where the folder, or one of the adapters asked for, is
    not what it should be.
    """
    report, damaged = read_undamaged(path, adapter)
    if damaged:
        raise damaged[0]
    return report


def read_undamaged(path: str | os.PathLike[str], adapter: str | None = None) -> tuple[Report, list[SavedAdapterError]]:
    """Return the report of those adapters that can be read, and what is wrong with the others.

    Without any AdaLoRA adapter, damaged or not, a ``SavedAdapterError``.
    """
    found = _folders(Path(path), str(path))
    if adapter is not None:
        if adapter not in found:
            raise SavedAdapterError(
                f"{path}: there is no adapter {adapter!r} in it, only {', '.join(map(repr, found))}"
            )
        found = {adapter: found[adapter]}
    adapters, damaged, others = [], [], []
    for name, folder in found.items():
        try:
            adapters.append(_adapter(folder, name))
        except OtherMethodError as error:
            others.append(error)
        except SavedAdapterError as error:
            damaged.append(error)
    # Beside an AdaLoRA adapter, those of other methods are not what was asked about.
    if not adapters and not damaged:
        raise others[0]
    return Report(tuple(adapters)), damaged


def _folders(path: Path, given: str) -> dict[str, Path]:
    """Return the folders of the adapters in here, by the adapters' names."""
    if not path.exists():
        hub = re.fullmatch(r"[\w.-]+/[\w.-]+", given)
        raise SavedAdapterError(
            f"{given}: no such folder"
            + ("; an adapter on a hub must be downloaded first (huggingface_hub.snapshot_download)" if hub else "")
        )
    if not path.is_dir():
        raise SavedAdapterError(f"{given}: is a file; give the folder that holds it")
    inside = {folder.name: folder for folder in sorted(path.iterdir()) if _holds_adapter(folder)}
    checkpoints = [name for name in inside if name.startswith("checkpoint-")]
    found = {name: folder for name, folder in inside.items() if name not in checkpoints}
    if _holds_adapter(path):
        found = {DEFAULT: path, **found}
    if not found:
        hint = f"; give one of the folders inside of it: {', '.join(checkpoints)}" if checkpoints else ""
        raise SavedAdapterError(f"{given}: is not a saved adapter, it has no {CONFIG}{hint}")
    return found


def _holds_adapter(folder: Path) -> bool:
    # Path.is_file would raise for a folder that may not be read, before Python 3.14.
    return os.path.isfile(folder / CONFIG)


def _adapter(folder: Path, name: str) -> AdapterReport:
    config = _config(folder)
    pattern = _pattern(folder, config)
    tensors = _tensors(_shapes(folder))
    if not tensors:
        raise SavedAdapterError(f"{folder}: its weights hold no AdaLoRA parameters")
    to_save = tuple(config.get("modules_to_save") or ())
    modules = []
    advice = [] if pattern else [NO_PATTERN]
    for module, parts in _in_order(tensors):
        rows = _rank(parts)
        flags = pattern.get(module)
        started, kept = (rows, rows) if flags is None else (len(flags), sum(flags))
        if rows not in (started, kept):
            advice.append(
                f"{module}: {CONFIG} says that {kept} of {started} ranks are kept, but the weights have {rows}; PEFT "
                "will not load them. Save the adapter again."
            )
        inside = any(parent.endswith(to_save) for parent in _parents(module))
        modules.append(
            ModuleReport(
                name=module,
                rank_started=started,
                rank_kept=kept,
                # Before the first pruning no pattern tells. What is inside modules_to_save is never ranked.
                ranked=flags is not None if pattern or inside else None,
                reason=INSIDE_MODULES_TO_SAVE if inside else None,
                importance=None,
                parameters=tuple(_parameter(part, inside) for part in parts),
            )
        )
    missing = [module for module in pattern if module not in {m.name for m in modules}]
    if missing:
        raise SavedAdapterError(
            f"{folder}: the weights of {missing[0]}, which {CONFIG} names, are missing"
            + (f", and of {len(missing) - 1} more" if missing[1:] else "")
        )
    ranked = [module for module in modules if module.ranked]
    return AdapterReport(
        adapter=name,
        step=None,
        init_budget=sum(module.rank_started for module in ranked) if ranked else None,
        budget=None,
        target_budget=config["target_r"] * len(ranked) if ranked and "target_r" in config else None,
        unranked_ranks=sum(module.rank_kept for module in modules if not module.ranked) if pattern else None,
        modules=tuple(modules),
        advice=tuple(advice),
        saved=True,
    )


def _parameter(part: Tensor, inside: bool) -> ParameterReport:
    """Leave None what the files do not tell; inference_mode is no sign, as what is saved with it can be trained on."""
    return ParameterReport(
        part.name,
        part.factor,
        part.shape,
        trainable=None,
        inside_modules_to_save=inside,
        steps_scored=None,
        steps_skipped=None,
        excluded=None,
    )


def _config(folder: Path) -> dict[str, Any]:
    try:
        config = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
    # A RecursionError: thousands of brackets, one in another.
    except (OSError, ValueError, RecursionError) as error:
        raise SavedAdapterError(f"{folder / CONFIG}: cannot be read ({error})") from error
    kind = config.get("peft_type") if isinstance(config, dict) else None
    if not isinstance(kind, str):
        raise SavedAdapterError(f"{folder / CONFIG}: is not a PEFT configuration, it names no peft_type")
    if kind != "ADALORA":
        raise OtherMethodError(f"{folder}: holds a {kind} adapter, not an AdaLoRA one")
    if type(config.get("target_r", 0)) is not int:
        raise _unexpected(folder, "target_r", config["target_r"], "a whole number")
    to_save = config.get("modules_to_save")
    if to_save is not None and not (isinstance(to_save, list) and all(isinstance(name, str) for name in to_save)):
        raise _unexpected(folder, "modules_to_save", to_save, "a list of names")
    return dict(config)


def _unexpected(folder: Path, setting: str, value: object, expected: str) -> SavedAdapterError:
    return SavedAdapterError(f"{folder / CONFIG}: its {setting} is {reprlib.repr(value)}, not {expected}")


def _shapes(folder: Path) -> Shapes:
    for file, shapes in ((folder / WEIGHTS, _safetensors), (folder / OLD_WEIGHTS, _pickled)):
        if file.exists():
            try:
                return shapes(file)
            except Exception as error:
                # Each library has its own errors for what is damaged, some of them with many lines of advice.
                reason = str(error).strip().partition("\n")[0] or type(error).__name__
                raise SavedAdapterError(f"{file}: is damaged or cannot be read ({reason})") from error
    raise SavedAdapterError(f"{folder}: its weights are missing, there is neither {WEIGHTS} nor {OLD_WEIGHTS}")


def _safetensors(file: Path) -> Shapes:
    from safetensors import safe_open

    # Only the header is read, and torch is not needed.
    with safe_open(file, "numpy") as opened:
        return {name: tuple(opened.get_slice(name).get_shape()) for name in opened.keys()}  # noqa: SIM118


def _pickled(file: Path) -> Shapes:
    import torch

    tensors = torch.load(file, map_location="cpu", weights_only=True)
    return {name: tuple(tensor.shape) for name, tensor in tensors.items()}


def _tensors(shapes: Shapes) -> list[Tensor]:
    found = []
    for name, shape in shapes.items():
        # Saved names end with the factor; those of the file of a Trainer that saves by itself with the adapter too.
        match = re.fullmatch(r"(.+)\.lora_([ABE])(\.[^.]+)?", name)
        if match:
            found.append(Tensor(name, match[1].removeprefix(PEFT_PREFIX), match[2], shape))  # type: ignore[arg-type]
    return found


def _pattern(folder: Path, config: dict[str, Any]) -> dict[str, list[bool]]:
    """Return ``rank_pattern`` by module: its names end with ``.lora_E``, and where not cut, with the adapter."""
    pattern = config.get("rank_pattern") or {}
    if not isinstance(pattern, dict):
        raise _unexpected(folder, "rank_pattern", pattern, "a list of flags for each module")
    for name, flags in pattern.items():
        # LoRA's rank_pattern has a number here.
        if not isinstance(flags, list):
            raise _unexpected(folder, f"rank_pattern of {name}", flags, "a list of flags")
        for flag in flags:
            if not isinstance(flag, bool):
                raise _unexpected(folder, f"rank_pattern of {name} has a flag that", flag, "true or false")
    return {name.partition(".lora_E")[0]: flags for name, flags in pattern.items()}


def _rank(parts: Iterable[Tensor]) -> int:
    """Return the rank that the tensors have: A is ``(r, in)``, B ``(out, r)``, E ``(r, 1)``."""
    ranks = [part.shape[1 if part.factor == "B" else 0] for part in parts if len(part.shape) > (part.factor == "B")]
    return min(ranks, default=0)


def _parents(module: str) -> list[str]:
    parts = module.split(".")
    return [".".join(parts[:count]) for count in range(1, len(parts) + 1)]


def _in_order(tensors: Iterable[Tensor]) -> list[tuple[str, list[Tensor]]]:
    """Group by module, layer 2 before layer 10: files and ``rank_pattern`` are sorted by name, letter by letter."""
    modules: dict[str, list[Tensor]] = {}
    for tensor in sorted(tensors, key=lambda t: (_by_number(t.module), t.factor)):
        modules.setdefault(tensor.module, []).append(tensor)
    return list(modules.items())


def _by_number(module: str) -> list[tuple[int, str]]:
    return [(int(part), "") if part.isdecimal() else (-1, part) for part in module.split(".")]
