"""What the tests with ``transformers.Trainer`` share: its settings, and a data set for the scenario of two branches."""

from __future__ import annotations

from typing import Any

import torch
import transformers
from scenarios import vectors


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
