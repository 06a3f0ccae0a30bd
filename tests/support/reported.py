"""What a report says of a model, taken apart."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import nn

import peft_gradguard

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    import peft

    from peft_gradguard.report.facts import AdapterReport, ModuleReport, ParameterReport


def only(model: object) -> AdapterReport:
    (adapter,) = peft_gradguard.report(model).adapters
    return adapter


def modules(adapter: AdapterReport) -> dict[str, ModuleReport]:
    return {module.name: module for module in adapter.modules}


def parameters(adapter: AdapterReport) -> dict[str, ParameterReport]:
    return {parameter.name: parameter for module in adapter.modules for parameter in module.parameters}


def in_ddp(model: peft.PeftModel, folder: Path) -> Iterator[nn.Module]:
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder / 'rendezvous'}", rank=0, world_size=1)
    try:
        yield nn.parallel.DistributedDataParallel(model)
    finally:
        torch.distributed.destroy_process_group()
