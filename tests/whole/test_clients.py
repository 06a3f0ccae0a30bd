"""How public code calls AdaLoRA, with the real trainers: it trains right, or one message says what is wrong."""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING, Any

import pytest
import torch
import transformers
from scenarios import (
    FINALISING,
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
from trainers import Callback, assert_adapted, fit

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    import peft

pytestmark = pytest.mark.skipif(PEFT_VERSION < (0, 18), reason="the trainers of today need a PEFT of today")


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


@pytest.fixture
def model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> peft.PeftModel:
    monkeypatch.chdir(tmp_path)
    return build(branches())


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
    assert ["called before the optimizer's step" in message for message in said()] == [True]


@both
def test_once_per_micro_batch(model: peft.PeftModel, accumulation: int, said: Callable[[], list[str]]) -> None:
    fit(model, accumulation, trainer=PerMicroBatch)
    assert_adapted(model)
    assert ["called before the optimizer's step" in message for message in said()] == [True]


@both
def test_every_fifth_step(model: peft.PeftModel, accumulation: int, said: Callable[[], list[str]]) -> None:
    only = lambda step: step % 5 == 0  # noqa: E731
    fit(model, accumulation, Callback(model, "on_optimizer_step", ahead=1, only=only))
    assert len(said()) == 1
    assert f"never called with step {FINALISING}" in said()[0]


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
