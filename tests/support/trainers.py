"""What the tests with ``transformers.Trainer`` share: its settings, and a data set for the scenario of two branches."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
import transformers
from scenarios import TARGET_R, TOTAL, frozen, vectors

if TYPE_CHECKING:
    from collections.abc import Callable

    import peft


def training_arguments(steps: int, accumulation: int = 1, **more: Any) -> transformers.TrainingArguments:
    """Train so many steps on the CPU, writing to the current folder, and reporting and saving nothing unless asked."""
    settings: dict[str, Any] = {
        "output_dir": "run", "max_steps": steps, "per_device_train_batch_size": 4,
        "gradient_accumulation_steps": accumulation, "learning_rate": 1e-2, "report_to": [], "save_strategy": "no",
        "use_cpu": True, "disable_tqdm": True, "label_names": ["labels"], "remove_unused_columns": False, **more,
    }  # fmt: skip
    return transformers.TrainingArguments(**settings)


class Examples(torch.utils.data.Dataset[dict[str, torch.Tensor]]):
    def __len__(self) -> int:
        return 1000

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        batch = vectors(index)
        return {"inputs": batch["inputs"][0], "labels": batch["labels"][0]}


class Callback(transformers.TrainerCallback):
    """Calls at the events given; ``ahead`` is what Trainer has not counted yet at that event."""

    def __init__(self, model: peft.PeftModel, event: str, ahead: int = 0, only: Callable[[int], bool] = bool) -> None:
        def act(args: Any, state: Any, control: Any, **_: Any) -> None:
            if only(state.global_step + ahead):
                model.base_model.update_and_allocate(state.global_step + ahead)

        setattr(self, event, act)


def fit(
    model: peft.PeftModel,
    accumulation: int,
    *callbacks: transformers.TrainerCallback,
    trainer: type[transformers.Trainer] = transformers.Trainer,
) -> None:
    """Train the model of two branches, with a part of its trunk frozen."""
    frozen("trunk.0")(model, 0)
    arguments = training_arguments(TOTAL + 2, accumulation)
    trainer(model, arguments, train_dataset=Examples(), callbacks=list(callbacks)).train()


def assert_adapted(model: peft.PeftModel) -> None:
    """Whether ``fit`` has ended with the ranks that it should."""
    pattern = model.peft_config["default"].rank_pattern
    assert sorted(name.split(".lora_E")[0] for name in pattern) == ["branch.0", "branch.2", "trunk.2"]
    assert sum(map(sum, pattern.values())) == 3 * TARGET_R
