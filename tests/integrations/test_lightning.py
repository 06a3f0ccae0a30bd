"""A ``LightningModule`` that calls ``update_and_allocate`` from each of the hooks that people use."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Any

import pytest
import torch
from situations import TOTAL, loss_of, make

import peft_gradguard

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

lightning = pytest.importorskip("lightning", reason="lightning is not installed")

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")

ORDER = "is called before the optimizer's step"
LATE = "have no gradient"
MICRO_BATCHES = 7


class Module(lightning.LightningModule):
    """Two layers. The step decides on the data, so that a resumed training sees what the other one has seen."""

    def __init__(self, hook: str) -> None:
        super().__init__()
        self.model = make()
        self.hook = hook
        self.automatic_optimization = not hook.startswith("manual")
        self.accumulates = 1
        self.called: list[int] = []

    def call(self, hook: str, step: int) -> None:
        if hook == self.hook:
            self.called.append(step)
            self.model.base_model.update_and_allocate(step)

    def training_step(self, batch: torch.Tensor, index: int) -> torch.Tensor | None:
        loss = loss_of(self.model, self.global_step)
        if self.automatic_optimization:
            return loss
        optimizer = self.optimizers()
        self.manual_backward(loss / self.accumulates)
        if (index + 1) % self.accumulates == 0:
            self.clip_gradients(optimizer, gradient_clip_val=0.1)
            self.call("manual, before the step", self.global_step + 1)
            optimizer.step()
            self.call("manual, in time", self.global_step)
            optimizer.zero_grad()
            self.call("manual, late", self.global_step)
        return None

    def validation_step(self, batch: torch.Tensor, index: int) -> None:
        loss_of(self.model, index)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW([p for p in self.parameters() if p.requires_grad], lr=1e-2)

    def optimizer_step(self, epoch: int, index: int, optimizer: Any, closure: Any = None) -> None:
        super().optimizer_step(epoch, index, optimizer, closure)
        self.call("optimizer_step", self.global_step + 1)

    def on_before_optimizer_step(self, optimizer: Any) -> None:
        self.call("on_before_optimizer_step", self.global_step + 1)

    def on_after_backward(self) -> None:
        self.call("on_after_backward", self.global_step + 1)

    def on_before_zero_grad(self, optimizer: Any) -> None:
        self.call("on_before_zero_grad", self.global_step)

    def on_train_batch_end(self, outputs: Any, batch: torch.Tensor, index: int) -> None:
        self.call("on_train_batch_end", self.global_step)


class Resumable(Module):
    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        checkpoint["adalora"] = peft_gradguard.AllocatorState(self.model).state_dict()

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        peft_gradguard.AllocatorState(self.model).load_state_dict(checkpoint["adalora"])


def fit(
    module: Module, *, accumulates: int = 1, steps: int = TOTAL, start: Path | None = None, **settings: Any
) -> None:
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    module.accumulates = accumulates
    if module.automatic_optimization:
        settings["accumulate_grad_batches"] = accumulates
    trainer = lightning.Trainer(
        accelerator="cpu", devices=1, max_steps=steps, logger=False, enable_progress_bar=False,
        enable_model_summary=False, num_sanity_val_steps=1, **{"enable_checkpointing": False, **settings},
    )  # fmt: skip
    batches = torch.utils.data.DataLoader(range(MICRO_BATCHES * accumulates))
    trainer.fit(module, batches, torch.utils.data.DataLoader(range(2)), ckpt_path=start)


@pytest.mark.parametrize("accumulates", [1, 2])
@pytest.mark.parametrize("clip", [None, 0.1])
@pytest.mark.parametrize("hook", ["optimizer_step", "on_train_batch_end"])
def test_hooks_after_the_step_are_in_time(
    said: Callable[[], list[str]], hook: str, accumulates: int, clip: float | None
) -> None:
    module = Module(hook)
    fit(module, accumulates=accumulates, gradient_clip_val=clip)
    assert said() == []
    assert sorted({0, *module.called}) == list(range(TOTAL + 1))
    assert len(module.called) == TOTAL * (accumulates if hook == "on_train_batch_end" else 1)
    pattern = module.model.peft_config["default"].rank_pattern
    assert sum(map(sum, pattern.values())) == 4


@pytest.mark.parametrize("accumulates", [1, 2])
@pytest.mark.parametrize("clip", [None, 0.1])
@pytest.mark.parametrize("hook", ["on_before_optimizer_step", "on_after_backward"])
def test_hooks_before_the_step_are_named_by_their_order(
    said: Callable[[], list[str]], hook: str, accumulates: int, clip: float | None
) -> None:
    fit(Module(hook), accumulates=accumulates, gradient_clip_val=clip)
    (text,) = said()
    assert ORDER in text


@pytest.mark.parametrize("accumulates", [1, 2])
@pytest.mark.parametrize(
    ("hook", "word"), [("manual, before the step", ORDER), ("manual, in time", None), ("manual, late", LATE)]
)
def test_manual_optimization(said: Callable[[], list[str]], hook: str, word: str | None, accumulates: int) -> None:
    module = Module(hook)
    fit(module, accumulates=accumulates)
    assert module.called == list(range(1, TOTAL + 1))
    assert [word in text for text in said()] == [True] * (word is not None)


def test_hook_between_forward_and_backward_cannot_mask() -> None:
    # Lightning clears gradients there. The error is torch's, and the docs tell of it.
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        fit(Module("on_before_zero_grad"))


@pytest.mark.parametrize("precision", ["bf16-mixed", "64-true"])
def test_precision(said: Callable[[], list[str]], precision: str) -> None:
    fit(Module("optimizer_step"), precision=precision)
    assert said() == []


def state(module: Module) -> dict[str, Any]:
    allocator = module.model.base_model.rankallocator
    averages = {f"{name} {kind}": value for kind in ("exp_avg_ipt", "exp_avg_unc")
                for name, value in getattr(allocator, kind).items()}  # fmt: skip
    return {**module.model.state_dict(), **averages}


@pytest.mark.parametrize("stop", [2, 3, 10, 15, 16, 17])
@pytest.mark.parametrize("hook", ["optimizer_step", "manual, in time"])
def test_stopped_and_resumed_training_ends_bit_for_bit(
    said: Callable[[], list[str]], tmp_path: Path, hook: str, stop: int
) -> None:
    whole, first, second = (Resumable(hook) for _ in range(3))
    fit(whole)
    saving = lightning.pytorch.callbacks.ModelCheckpoint(dirpath=tmp_path, save_last=True, every_n_train_steps=1)
    fit(first, steps=stop, enable_checkpointing=True, callbacks=[saving])
    fit(second, start=tmp_path / "last.ckpt")
    assert second.called == list(range(stop + 1, TOTAL + 1))
    assert said() == []
    expected, found = state(whole), state(second)
    assert expected.keys() == found.keys()
    assert all(torch.equal(expected[name], found[name]) for name in expected)
    assert whole.model.peft_config["default"].rank_pattern == second.model.peft_config["default"].rank_pattern
