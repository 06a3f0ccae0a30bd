"""What an allocator step costs on a GPU: memory during a call is held; times, launches and waits are printed (-s)."""

from __future__ import annotations

import statistics
import time
from typing import Any

import peft
import pytest
import torch

import peft_gradguard

ORDINARY, MASKING = 5, 60


def make(device: torch.device, modules: int, width: int, rank: int) -> peft.PeftModel:
    torch.manual_seed(0)
    base = torch.nn.Sequential(*(torch.nn.Linear(width, width, bias=False) for _ in range(modules))).to(device)
    names = [str(index) for index in range(modules)]
    config = peft.AdaLoraConfig(
        target_modules=names, init_r=rank, target_r=rank // 2, tinit=20, tfinal=20, deltaT=1, total_step=200
    )
    model = peft.get_peft_model(base, config).to(device)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = torch.randn_like(parameter)
            parameter.grad = torch.randn_like(parameter)
    return model


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()


def milliseconds(model: peft.PeftModel, device: torch.device, step: int, repeat: int = 20) -> float:
    found = []
    for _ in range(repeat):
        synchronize(device)
        begin = time.perf_counter()
        model.base_model.update_and_allocate(step)
        synchronize(device)
        found.append(1000 * (time.perf_counter() - begin))
    return statistics.median(found)


@pytest.mark.parametrize(("modules", "width", "rank"), [(72, 768, 12), (224, 256, 8)], ids=["bert", "llama, narrow"])
def test_times_are_printed(device: torch.device, modules: int, width: int, rank: int) -> None:
    table: dict[str, list[float]] = {}
    for way in ("plain", "guarded"):
        (peft_gradguard.disable if way == "plain" else peft_gradguard.enable)()
        try:
            model = make(device, modules, width, rank)
            milliseconds(model, device, ORDINARY, 5)
            table[way] = [milliseconds(model, device, step) for step in (ORDINARY, MASKING)]
        finally:
            peft_gradguard.enable()
    name = torch.cuda.get_device_name() if device.type == "cuda" else "cpu"
    for index, kind in enumerate(("ordinary", "masking")):
        plain, guarded = table["plain"][index], table["guarded"][index]
        print(
            f"\n{name}, {modules} modules, {kind}: plain {plain:.2f} ms, guarded {guarded:.2f}, {guarded / plain:.2f}"
        )


@pytest.mark.cuda_only
def test_a_call_needs_no_more_memory_than_plain_peft(device: torch.device) -> None:
    needed = {}
    for way in ("plain", "guarded"):
        (peft_gradguard.disable if way == "plain" else peft_gradguard.enable)()
        try:
            model = make(device, 32, 2048, 16)
            milliseconds(model, device, ORDINARY, 6)
            synchronize(device)
            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated()
            model.base_model.update_and_allocate(ORDINARY)
            synchronize(device)
            needed[way] = torch.cuda.max_memory_allocated() - before
            del model
        finally:
            peft_gradguard.enable()
    # One run of numbers in single precision, by which the guard computes, is a megabyte.
    assert needed["guarded"] <= needed["plain"] + 4_000_000, needed


@pytest.mark.cuda_only
def test_launches_and_waits_are_printed(device: torch.device) -> None:
    from torch.profiler import ProfilerActivity, profile

    for way in ("plain", "guarded"):
        (peft_gradguard.disable if way == "plain" else peft_gradguard.enable)()
        try:
            model = make(device, 224, 256, 8)
            milliseconds(model, device, ORDINARY, 6)
            with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as profiled:
                model.base_model.update_and_allocate(ORDINARY)
                synchronize(device)
            events: Any = profiled.key_averages()
            count = {event.key: event.count for event in events}
            launches = sum(number for key, number in count.items() if "LaunchKernel" in key)
            waits = sum(number for key, number in count.items() if "Synchronize" in key or key == "aten::item")
            print(f"\n{way}: {launches} kernel launches, {waits} waits (one of them this test's own)")
        finally:
            peft_gradguard.enable()
