"""Adapters in folders: the names of their files, and one of another method."""

from __future__ import annotations

from typing import TYPE_CHECKING

import peft
from scenarios import two_branches

if TYPE_CHECKING:
    from pathlib import Path

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"


def lora(folder: Path) -> None:
    peft.get_peft_model(two_branches(), peft.LoraConfig(target_modules=["head"])).save_pretrained(folder)
