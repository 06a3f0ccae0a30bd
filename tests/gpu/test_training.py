"""Trainings on a GPU: equal to plain PEFT's bit for bit, and right where plain PEFT fails."""

from __future__ import annotations

import contextlib
import copy
import threading
from typing import TYPE_CHECKING, Any

import peft
import pytest
import torch

import peft_gradguard

if TYPE_CHECKING:
    from collections.abc import Callable

STEPS = 14


def make(device: torch.device, dtype: torch.dtype = torch.float32, modules: int = 4) -> peft.PeftModel:
    torch.manual_seed(0)
    base = torch.nn.Sequential(*(torch.nn.Linear(16, 16) for _ in range(modules))).to(device)
    config = peft.AdaLoraConfig(
        target_modules=[str(index) for index in range(modules)],
        init_r=6,
        target_r=3,
        tinit=2,
        tfinal=3,
        deltaT=1,
        total_step=STEPS,
    )
    return peft.get_peft_model(base, config).to(device, dtype)


def trained(model: peft.PeftModel) -> list[torch.nn.Parameter]:
    return [parameter for parameter in model.parameters() if parameter.requires_grad]


def inputs(device: torch.device, step: int, dtype: torch.dtype) -> torch.Tensor:
    return torch.randn(8, 16, generator=torch.Generator().manual_seed(step)).to(device, dtype)


def train(
    model: peft.PeftModel,
    device: torch.device,
    *,
    dtype: torch.dtype = torch.float32,
    late: bool = False,
    to_none: bool = True,
    scaler: Any = None,
    autocast: torch.dtype | None = None,
    clip: float | None = None,
    overflow_at: tuple[int, ...] = (),
    first: int = 1,
    **settings: Any,
) -> peft.PeftModel:
    optimizer = torch.optim.AdamW(trained(model), lr=1e-2, **settings)
    for step in range(1, STEPS + 1):
        context = torch.autocast(device.type, autocast) if autocast else contextlib.nullcontext()
        with context:
            loss = model(inputs(device, step, dtype)).float().pow(2).mean()
        if step in overflow_at:
            loss = loss * float("inf")
        if scaler is None:
            loss.backward()
        else:
            scaler.scale(loss).backward()
        if clip is not None:
            if scaler is not None:
                scaler.unscale_(optimizer)
            torch.nn.utils.clip_grad_norm_(trained(model), clip)
        if scaler is None:
            optimizer.step()
        else:
            scaler.step(optimizer)
            scaler.update()
        if late:
            optimizer.zero_grad(set_to_none=to_none)
        if step >= first:
            model.base_model.update_and_allocate(step)
        optimizer.zero_grad()
    return model


def results(model: peft.PeftModel) -> dict[str, Any]:
    allocator = model.base_model.rankallocator
    found: dict[str, Any] = {
        name: value.detach().cpu() for name, value in model.state_dict().items() if "lora_" in name
    }
    for kind in (allocator.ipt, allocator.exp_avg_ipt, allocator.exp_avg_unc):
        found.update({f"{len(found)} {name}": value.detach().cpu() for name, value in kind.items()})
    found["pattern"] = model.peft_config["default"].rank_pattern
    return found


def assert_equal(one: dict[str, Any], other: dict[str, Any]) -> None:
    assert one.keys() == other.keys()
    for name, value in one.items():
        same = torch.equal(value, other[name]) if isinstance(value, torch.Tensor) else value == other[name]
        assert same, name


def plain_and_guarded(run: Callable[[], peft.PeftModel]) -> tuple[dict[str, Any], dict[str, Any]]:
    with peft_gradguard.disabled():
        plain = results(run())
    return plain, results(run())


@pytest.mark.parametrize("settings", [{}, {"foreach": True}, {"fused": True}], ids=["default", "foreach", "fused"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_healthy_training_is_plain_pefts(device: torch.device, settings: dict[str, bool], dtype: torch.dtype) -> None:
    assert_equal(*plain_and_guarded(lambda: train(make(device, dtype), device, dtype=dtype, **settings)))


@pytest.mark.parametrize("autocast", [torch.float16, torch.bfloat16])
def test_autocast_is_plain_pefts(device: torch.device, autocast: torch.dtype) -> None:
    assert_equal(*plain_and_guarded(lambda: train(make(device), device, autocast=autocast)))


@pytest.mark.parametrize("settings", [{}, {"foreach": True}, {"fused": True}], ids=["default", "foreach", "fused"])
@pytest.mark.parametrize("to_none", [True, False])
def test_late_calls_give_what_calls_in_time_give(
    device: torch.device, settings: dict[str, bool], to_none: bool
) -> None:
    # The first late call scores nothing: the guard learns by it.
    in_time = train(make(device), device, first=2, **settings)
    late = train(make(device), device, late=True, to_none=to_none, **settings)
    assert_equal(results(in_time), results(late))


@pytest.mark.parametrize("late", [False, True])
@pytest.mark.parametrize("settings", [{}, {"fused": True}], ids=["default", "fused"])
@pytest.mark.parametrize("overflow_at", [(1,), (6,), (4, 5), (STEPS - 3,)])
def test_overflows_under_a_grad_scaler_spoil_nothing(
    device: torch.device, late: bool, settings: dict[str, bool], overflow_at: tuple[int, ...]
) -> None:
    scaler = torch.amp.GradScaler(device.type, init_scale=2.0**10)
    model = train(
        make(device),
        device,
        scaler=scaler,
        autocast=torch.float16,
        late=late,
        overflow_at=overflow_at,
        clip=1.0,
        **settings,
    )
    allocator = model.base_model.rankallocator
    assert all(value.isfinite().all() for value in allocator.exp_avg_ipt.values())
    pattern = model.peft_config["default"].rank_pattern
    assert sum(map(sum, pattern.values())) == 12


def test_frozen_layers_are_left_out(device: torch.device) -> None:
    model = make(device)
    for name, parameter in model.named_parameters():
        if "lora_" in name and ".0." in name:
            parameter.requires_grad_(False)
    train(model, device)
    pattern = model.peft_config["default"].rank_pattern
    assert sorted({name.split(".")[0] for name in pattern}) == ["1", "2", "3"]
    assert sum(map(sum, pattern.values())) == 9


def test_two_models_in_two_threads_on_two_streams(device: torch.device) -> None:
    alone = results(train(make(device), device))
    found: list[dict[str, Any]] = []

    def work(model: peft.PeftModel) -> None:
        stream = torch.cuda.Stream() if device.type == "cuda" else None
        with torch.cuda.stream(stream) if stream else contextlib.nullcontext():
            found.append(results(train(model, device)))

    threads = [threading.Thread(target=work, args=(make(device),)) for _ in range(2)]
    if device.type == "cuda":
        torch.cuda.synchronize()
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 2
    for one in found:
        assert_equal(alone, one)


def test_compiled_model_and_optimizer(device: torch.device) -> None:
    if device.type == "cpu":
        pytest.skip("slow on a CPU")
    model = make(device)
    compiled = torch.compile(model)
    optimizer = torch.optim.AdamW(trained(model), lr=1e-2)
    step_of = torch.compile(optimizer.step)
    for step in range(1, STEPS + 1):
        compiled(inputs(device, step, torch.float32)).pow(2).mean().backward()
        step_of()
        model.base_model.update_and_allocate(step)
        optimizer.zero_grad()
    assert sum(map(sum, model.peft_config["default"].rank_pattern.values())) == 12


@pytest.mark.cuda_only
def test_an_allocator_call_cannot_be_recorded_in_a_cuda_graph(device: torch.device) -> None:
    """PEFT reads values where it masks. What matters: an error that names it, and a training that can go on."""
    model = make(device)
    train(copy.deepcopy(model), device)
    model(inputs(device, 1, torch.float32)).pow(2).mean().backward()
    graph = torch.cuda.CUDAGraph()
    with pytest.raises(RuntimeError, match="captur"), torch.cuda.graph(graph):
        model.base_model.update_and_allocate(4)
    torch.cuda.synchronize()
    model.zero_grad()
    train(model, device)


@pytest.mark.cuda_only
def test_nccl_with_one_process(device: torch.device, tmp_path: Any) -> None:
    torch.distributed.init_process_group("nccl", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        alone = results(train(make(device), device))
        model = make(device)
        wrapped = torch.nn.parallel.DistributedDataParallel(model)
        optimizer = torch.optim.AdamW(trained(model), lr=1e-2)
        for step in range(1, STEPS + 1):
            wrapped(inputs(device, step, torch.float32)).float().pow(2).mean().backward()
            optimizer.step()
            model.base_model.update_and_allocate(step)
            optimizer.zero_grad()
        assert_equal(alone, results(model))
    finally:
        torch.distributed.destroy_process_group()
