"""How public code calls AdaLoRA, with the real trainers: it trains right, or one message says what is wrong."""

from __future__ import annotations

import contextlib
import gc
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch
import transformers
from peft.tuners.adalora import AdaLoraModel, RankAllocator
from scenarios import (
    FINALISING,
    LINEARS,
    PEFT_VERSION,
    TARGET_R,
    TOTAL,
    adalora_config,
    branches,
    build,
    frozen,
    loss_of,
    vectors,
)
from trainers import Examples, training_arguments

import peft_gradguard

if TYPE_CHECKING:
    from collections.abc import Callable

    import peft

pytestmark = pytest.mark.skipif(PEFT_VERSION < (0, 18), reason="the trainers of today need a PEFT of today")


class Callback(transformers.TrainerCallback):
    """Calls at the events given; ``ahead`` is what Trainer has not counted yet at that event."""

    def __init__(self, model: peft.PeftModel, event: str, ahead: int = 0, only: Callable[[int], bool] = bool) -> None:
        def act(args: Any, state: Any, control: Any, **_: Any) -> None:
            if only(state.global_step + ahead):
                model.base_model.update_and_allocate(state.global_step + ahead)

        setattr(self, event, act)


class Swallowing(Callback):
    """Hides whatever the call raises, as two public callbacks do."""

    def __init__(self, model: peft.PeftModel, event: str) -> None:
        super().__init__(model, event)
        act = getattr(self, event)

        def swallow(*args: Any, **kwargs: Any) -> None:
            with contextlib.suppress(Exception):
                act(*args, **kwargs)

        setattr(self, event, swallow)


class PerMicroBatch(transformers.Trainer):
    """Calls in ``training_step``, so once per micro-batch and more than once with the same step."""

    def training_step(self, model: Any, *args: Any, **kwargs: Any) -> torch.Tensor:
        loss = super().training_step(model, *args, **kwargs)
        model.base_model.update_and_allocate(self.state.global_step)
        return loss


class OnlyIfThereIsAPattern(transformers.TrainerCallback):
    def __init__(self, model: peft.PeftModel) -> None:
        self.model = model

    def on_optimizer_step(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if self.model.peft_config["default"].rank_pattern is not None:
            self.model.base_model.update_and_allocate(state.global_step + 1)


def fit(
    model: peft.PeftModel,
    accumulation: int,
    *callbacks: transformers.TrainerCallback,
    trainer: type[transformers.Trainer] = transformers.Trainer,
) -> None:
    frozen("trunk.0")(model, 0)
    arguments = training_arguments(TOTAL + 2, accumulation)
    trainer(model, arguments, train_dataset=Examples(), callbacks=list(callbacks)).train()


@pytest.fixture
def model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> peft.PeftModel:
    monkeypatch.chdir(tmp_path)
    return build(branches())


def assert_adapted(model: peft.PeftModel) -> None:
    pattern = model.peft_config["default"].rank_pattern
    assert sorted(name.split(".lora_E")[0] for name in pattern) == ["branch.0", "branch.2", "trunk.2"]
    assert sum(map(sum, pattern.values())) == 3 * TARGET_R


both = pytest.mark.parametrize("accumulation", [1, 2])


@both
def test_on_optimizer_step(model: peft.PeftModel, accumulation: int, said: Callable[[], list[str]]) -> None:
    fit(model, accumulation, Callback(model, "on_optimizer_step", ahead=1))
    assert_adapted(model)
    assert said() == []


@both
@pytest.mark.parametrize("event", ["on_step_end", "on_step_begin"])
@pytest.mark.parametrize("callback", [Callback, Swallowing])
def test_after_zero_grad(
    model: peft.PeftModel, accumulation: int, event: str, callback: type[Callback], said: Callable[[], list[str]]
) -> None:
    fit(model, accumulation, callback(model, event))
    assert_adapted(model)
    assert len(said()) == 1
    assert "from on_optimizer_step" in said()[0]


@both
def test_on_pre_optimizer_step(model: peft.PeftModel, accumulation: int, said: Callable[[], list[str]]) -> None:
    fit(model, accumulation, Callback(model, "on_pre_optimizer_step", ahead=1))
    assert_adapted(model)
    assert said() == []


@both
def test_once_per_micro_batch(model: peft.PeftModel, accumulation: int, said: Callable[[], list[str]]) -> None:
    fit(model, accumulation, trainer=PerMicroBatch)
    assert_adapted(model)
    assert said() == []


@both
@pytest.mark.parametrize("extra_zero_grad", [False, True], ids=["", "and zero_grad elsewhere"])
def test_zero_grad_wrapped_and_methods_assigned(
    model: peft.PeftModel,
    accumulation: int,
    extra_zero_grad: bool,
    said: Callable[[], list[str]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    mask, forward = RankAllocator.mask_to_budget.__wrapped__, AdaLoraModel.forward
    monkeypatch.setattr(RankAllocator, "mask_to_budget", lambda self, model, budget: mask(self, model, budget))
    monkeypatch.setattr(AdaLoraModel, "forward", lambda self, *args, **kwargs: forward(self, *args, **kwargs))
    zero_grad, calls = model.zero_grad, []

    def call_first(*args: Any, **kwargs: Any) -> None:
        calls.append(1)
        # Trainer asks for zeroed gradients once before the first step, too.
        step = trainer_state.global_step + 1
        if len(calls) > 1:
            model.base_model.update_and_allocate(step)
        zero_grad(*args, **kwargs)

    class State(transformers.TrainerCallback):
        def on_step_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            nonlocal trainer_state
            trainer_state = state
            if extra_zero_grad and state.global_step == 3:
                model.zero_grad()

    trainer_state: Any = transformers.TrainerState()
    monkeypatch.setattr(model, "zero_grad", call_first)
    fit(model, accumulation, State())
    assert_adapted(model)
    assert "RankAllocator.mask_to_budget was assigned" in said()[0]
    assert len(said()) == 1 + extra_zero_grad


def zeros_where_there_is_no_gradient(self: RankAllocator, model: Any) -> None:
    for name, parameter in model.named_parameters():
        if "lora_" in name and self.adapter_name in name:
            for scores in (self.ipt, self.exp_avg_ipt, self.exp_avg_unc):
                scores.setdefault(name, torch.zeros_like(parameter))
            with torch.no_grad():
                gradient = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
                self.ipt[name] = (parameter * gradient).abs().detach()
                self.exp_avg_ipt[name] = self.beta1 * self.exp_avg_ipt[name] + (1 - self.beta1) * self.ipt[name]
                change = (self.ipt[name] - self.exp_avg_ipt[name]).abs()
                self.exp_avg_unc[name] = self.beta2 * self.exp_avg_unc[name] + (1 - self.beta2) * change


@both
@pytest.mark.parametrize("event", ["on_optimizer_step", "on_step_end"])
def test_update_ipt_assigned(
    model: peft.PeftModel, accumulation: int, event: str, said: Callable[[], list[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(RankAllocator, "update_ipt", zeros_where_there_is_no_gradient)
    fit(model, accumulation, Callback(model, event, ahead=event == "on_optimizer_step"))
    assert_adapted(model)
    assert "RankAllocator.update_ipt was assigned" in said()[0]
    assert len(said()) == 1 + (event == "on_step_end")


def test_method_assigned_to_one_allocator(model: peft.PeftModel, said: Callable[[], list[str]]) -> None:
    allocator = model.base_model.rankallocator
    allocator.update_ipt = zeros_where_there_is_no_gradient.__get__(allocator)
    fit(model, 1, Callback(model, "on_optimizer_step", ahead=1))
    assert_adapted(model)
    assert ["RankAllocator.update_ipt was assigned" in message for message in said()] == [True]


def test_finalising_step_needs_no_gradient_with_a_method_assigned_either(
    model: peft.PeftModel, said: Callable[[], list[str]]
) -> None:
    allocator = model.base_model.rankallocator
    allocator.update_ipt = zeros_where_there_is_no_gradient.__get__(allocator)
    for step in range(1, FINALISING + 1):
        model.base_model(**vectors(step)).loss.backward()
        if step == FINALISING:
            model.zero_grad()
        model.base_model.update_and_allocate(step)
    assert ["RankAllocator.update_ipt was assigned" in message for message in said()] == [True]
    assert sum(map(sum, model.peft_config["default"].rank_pattern.values())) == 4 * TARGET_R


@pytest.mark.parametrize("calls_super", [False, True])
def test_subclass_that_overrides_update_ipt(
    model: peft.PeftModel, calls_super: bool, said: Callable[[], list[str]]
) -> None:
    class Mine(RankAllocator):
        def update_ipt(self, model: Any) -> None:
            if calls_super:
                super().update_ipt(model)
            else:
                zeros_where_there_is_no_gradient(self, model)

    config = model.peft_config["default"]
    model.base_model.rankallocator = Mine(model.base_model.model, config, "default")
    fit(model, 1, Callback(model, "on_optimizer_step", ahead=1))
    assert_adapted(model)
    assert said() == []


@both
def test_every_fifth_step(model: peft.PeftModel, accumulation: int, said: Callable[[], list[str]]) -> None:
    only = lambda step: step % 5 == 0  # noqa: E731
    fit(model, accumulation, Callback(model, "on_optimizer_step", ahead=1, only=only))
    assert len(said()) == 1
    assert f"never called with step {FINALISING}" in said()[0]


@both
@pytest.mark.parametrize("callbacks", [[OnlyIfThereIsAPattern], []], ids=["only if there is a pattern", "never"])
def test_never_called(
    model: peft.PeftModel, accumulation: int, callbacks: list[Any], said: Callable[[], list[str]]
) -> None:
    fit(model, accumulation, *(callback(model) for callback in callbacks))
    assert said() == []
    # What ends with the interpreter in a script ends here with the allocator.
    del model.base_model.rankallocator
    gc.collect()
    assert len(said()) == 1
    assert "update_and_allocate was never called" in said()[0]


def test_never_called_where_no_rank_could_be_pruned(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, said: Callable[[], list[str]]
) -> None:
    """With E frozen AdaLoRA trains as plain LoRA does, and needs no calls."""
    monkeypatch.chdir(tmp_path)
    # With E at zero, as PEFT starts it, A and B would have gradients of zero.
    model = build(branches(config={"target_modules": LINEARS, "init_lora_weights": False}))
    frozen("lora_E")(model, 0)
    fit(model, 1)
    del model.base_model.rankallocator
    gc.collect()
    assert said() == []


def test_adapter_that_was_only_loaded_was_not_trained(
    model: peft.PeftModel, tmp_path: Path, said: Callable[[], list[str]]
) -> None:
    values = {name: torch.ones_like(value) for name, value in model.state_dict().items() if "lora_E" in name}
    model.load_state_dict(values, strict=False)
    # Somebody else's training goes on meanwhile.
    other = torch.nn.Parameter(torch.ones(1))
    for _ in range(2):
        other.grad = torch.ones(1)
        torch.optim.SGD([other], 0.1).step()
    del model.base_model.rankallocator
    gc.collect()
    assert said() == []


def test_trained_after_something_was_loaded(model: peft.PeftModel, said: Callable[[], list[str]]) -> None:
    model.load_state_dict({name: value.clone() for name, value in model.state_dict().items()})
    optimizer = torch.optim.AdamW(model.parameters())
    for step in (1, 2):
        loss_of(model, vectors(step), True).backward()
        optimizer.step()
    del model.base_model.rankallocator
    gc.collect()
    assert ["update_and_allocate was never called" in message for message in said()] == [True]


@pytest.mark.parametrize("switch", ["disabled", "disable"])
def test_calls_made_while_the_guard_is_off_are_not_missed(
    model: peft.PeftModel, switch: str, said: Callable[[], list[str]]
) -> None:
    optimizer = torch.optim.AdamW(model.parameters())
    off: Any = peft_gradguard.disabled() if switch == "disabled" else contextlib.nullcontext(peft_gradguard.disable())
    with off:
        for step in (1, 2):
            loss_of(model, vectors(step), True).backward()
            optimizer.step()
            model.base_model.update_and_allocate(step)
            optimizer.zero_grad()
    peft_gradguard.enable()
    del model.base_model.rankallocator
    gc.collect()
    assert said() == []


def test_optimizers_are_watched_until_every_allocator_was_called() -> None:
    program = f"""
import sys; sys.path[:0] = {[str(Path(__file__).parent)]!r}
import peft_gradguard, torch
from scenarios import branches, build, loss_of, vectors
from torch.optim import optimizer as torch_optimizer
counts = []
def count():
    counts.append(len(torch_optimizer._global_optimizer_pre_hooks))
models = [build(branches()), build(branches())]
count()
for model in models:
    optimizer = torch.optim.AdamW(model.parameters())
    loss_of(model, vectors(1), True).backward()
    optimizer.step()
    model.base_model.update_and_allocate(1)
    count()
    model.base_model.update_and_allocate(2)
models.append(build(branches()))
count()
models[-1].base_model.update_and_allocate(100)
count()
print(counts)
"""
    found = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert found.stdout == "[2, 1, 0, 1, 0]\n"


@pytest.mark.parametrize(("steps", "warned"), [(0, False), (TOTAL, True)])
def test_never_called_is_said_at_exit(steps: int, warned: bool) -> None:
    program = f"""
import sys; sys.path[:0] = {[str(Path(__file__).parent)]!r}
import peft_gradguard, torch
from scenarios import branches, build, loss_of, vectors
model = build(branches())
optimizer = torch.optim.AdamW(model.parameters())
for step in range({steps}):
    loss_of(model, vectors(step), True).backward()
    optimizer.step()
"""
    found = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert ("update_and_allocate was never called" in found.stderr) == warned


@both
def test_optimizer_steps_inside_backward(
    model: peft.PeftModel, accumulation: int, said: Callable[[], list[str]]
) -> None:
    frozen("trunk.0")(model, 0)
    for parameter in model.parameters():
        if parameter.requires_grad:
            optimizer = torch.optim.SGD([parameter], lr=1e-2)

            def step_at_once(parameter: torch.Tensor, optimizer: torch.optim.Optimizer = optimizer) -> None:
                optimizer.step()
                optimizer.zero_grad()

            parameter.register_post_accumulate_grad_hook(step_at_once)
    for step in range(1, TOTAL + 1):
        for micro in range(accumulation):
            loss_of(model, vectors(step * 10 + micro), True).backward()
        model.base_model.update_and_allocate(step)
    assert_adapted(model)
    assert len(said()) == 1


@both
@pytest.mark.parametrize("event", ["on_optimizer_step", "on_step_end"])
def test_trl(
    accumulation: int, event: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, said: Callable[[], list[str]]
) -> None:
    trl = pytest.importorskip("trl")
    datasets = pytest.importorskip("datasets")
    tokenizers = pytest.importorskip("tokenizers")
    monkeypatch.chdir(tmp_path)
    words = {word: number for number, word in enumerate(["<pad>", "<eos>", *"abcdefghij"])}
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="<pad>")),
        pad_token="<pad>", eos_token="<eos>",
    )  # fmt: skip
    config = transformers.LlamaConfig(
        vocab_size=16, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2,
        max_position_embeddings=32,
    )  # fmt: skip
    rows = [{"input_ids": [2 + (start + place) % 10 for place in range(8)]} for start in range(64)]
    trainer = trl.SFTTrainer(
        transformers.LlamaForCausalLM(config),
        args=trl.SFTConfig(
            output_dir="run", max_steps=TOTAL, per_device_train_batch_size=4, gradient_accumulation_steps=accumulation,
            learning_rate=1e-2, report_to=[], save_strategy="no", use_cpu=True, disable_tqdm=True, bf16=False,
            dataset_kwargs={"skip_prepare_dataset": True},
        ),
        train_dataset=datasets.Dataset.from_list(rows),
        processing_class=tokenizer,
        peft_config=adalora_config(target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM"),
    )  # fmt: skip
    frozen("layers.0.")(trainer.model, 0)
    trainer.add_callback(Callback(trainer.model, event, ahead=event == "on_optimizer_step"))
    trainer.train()
    pattern = trainer.model.peft_config["default"].rank_pattern
    assert len(pattern) == 2
    assert sum(map(sum, pattern.values())) == 2 * TARGET_R
    assert len(said()) == (event == "on_step_end")
