"""AdaLoRA in a ``transformers.Trainer``: ``Trainer(..., callbacks=[AdaLoraCallback()])``."""

from __future__ import annotations

import sys
import weakref
from typing import TYPE_CHECKING, Any

from transformers import TrainerCallback
from transformers.trainer_callback import CallbackHandler

from ..log import said_level, say
from ..memory.memory import known_memory
from ..report.audit import build, tuners_in

if TYPE_CHECKING:
    import torch
    from peft import AdaLoraConfig
    from peft.tuners.adalora import AdaLoraModel, RankAllocator
    from transformers import TrainerControl, TrainerState, TrainingArguments

if not hasattr(TrainerCallback, "on_optimizer_step"):
    import transformers

    raise ImportError(
        "AdaLoraCallback needs a Trainer with the event on_optimizer_step, which transformers "
        f"{transformers.__version__} has not: install transformers 4.44 or newer."
    )


class AdaLoraCallback(TrainerCallback):
    """Sets AdaLoRA's ``total_step``, calls ``update_and_allocate`` at the right moment, and logs what it does.

    - ``total_step``: where the ``AdaLoraConfig`` has none (None, or not above 0), the run's number of optimizer steps
      (``state.max_steps``). One that is there stays, and a WARNING says so if the run is of another length.
    - ``update_and_allocate(global_step + 1)``, once per optimizer step, in ``on_optimizer_step``: after the optimizer's
      step and before ``zero_grad``. Where somebody else calls it too, this is left to them, with one WARNING.
    - ``adalora/budget``, ``adalora/total_rank`` and ``adalora/skipped`` (parameters left out of the last scoring), in
      whatever the Trainer logs to, each time it logs a loss.

    WARNING at the start of a training with ``load_best_model_at_end``, which fails where the best one has other ranks.
    ``ValueError`` at the start of a training without a trainable AdaLoRA adapter, or too short for its ``tinit`` and
    ``tfinal``.
    """

    def __init__(self) -> None:
        self._tuners: list[AdaLoraModel] = []
        self._left: list[dict[str, weakref.ref[torch.Tensor]]] = []
        """Per tuner, the scores as the last call left them."""
        self._total_step: int | None = None
        """The ``total_step`` that this callback has set."""
        self._somebody_else_calls = False

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, model: Any = None, **_: Any
    ) -> None:
        """Find the adapter, and settle ``total_step``."""
        self._tuners = [tuner for tuner in dict.fromkeys(tuners_in(model)) if hasattr(tuner, "rankallocator")]
        if not self._tuners:
            raise ValueError(
                f"AdaLoraCallback found no trainable AdaLoRA adapter in the Trainer's model, a {type(model).__name__}. "
                "Give the Trainer what get_peft_model returned for an AdaLoraConfig, or leave the callback out."
            )
        for tuner in self._tuners:
            self._settle_total_step(tuner.rankallocator, state.max_steps)
        if args.load_best_model_at_end:
            _warn_of_other_ranks(self._tuners[0].rankallocator)
        self._left = [_scores(tuner) for tuner in self._tuners]
        self._somebody_else_calls = False
        _come_first(self)

    def on_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        """Let AdaLoRA score, allocate and mask. Trainer counts the step only after this event, hence the one more."""
        if not self._somebody_else_calls and not all(map(_untouched, self._tuners, self._left)):
            self._somebody_else_calls = True
            say(
                said_level(),
                "Something else calls update_and_allocate in this training too (step %d): another callback, or the "
                "trainer. AdaLoraCallback leaves the calls to it. Take one of the two out; AdaLoraCallback is enough.",
                state.global_step + 1,
            )
        if not self._somebody_else_calls:
            for tuner in self._tuners:
                tuner.update_and_allocate(state.global_step + 1)  # type: ignore[no-untyped-call]
            self._left = [_scores(tuner) for tuner in self._tuners]

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, float] | None = None,
        **_: Any,
    ) -> None:
        """Add ranks and skips to what is logged with a training loss."""
        if logs is not None and "loss" in logs and self._tuners:
            numbers = _numbers(self._tuners)
            logs.update(numbers)
            # Trainer keeps a copy of its own.
            if state.log_history and state.log_history[-1].get("step") == state.global_step:
                state.log_history[-1].update(numbers)

    def on_train_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Let go of the model."""
        self._tuners, self._left = [], []

    def _settle_total_step(self, allocator: RankAllocator, steps: int) -> None:
        config: AdaLoraConfig = allocator.peft_config
        if config.total_step is None or config.total_step <= 0 or config.total_step == self._total_step:
            _require_room(config, steps)
            allocator.set_total_step(steps)  # type: ignore[no-untyped-call]
            self._total_step = steps
            return
        _require_room(config, config.total_step)
        if config.total_step != steps:
            settled = config.total_step - config.tfinal
            say(
                said_level(),
                "total_step of AdaLoRA's adapter %r is %d, but this run has %d optimizer steps: %s. To have it set for "
                "you, set total_step of the AdaLoraConfig to None before training.",
                allocator.adapter_name,
                config.total_step,
                steps,
                f"the final ranks are settled at step {settled} (total_step - tfinal)"
                if settled <= steps
                else f"the run ends before the final ranks are settled at step {settled} (total_step - tfinal)",
            )


def _require_room(config: AdaLoraConfig, steps: int) -> None:
    if config.tinit + config.tfinal >= steps:
        raise ValueError(
            f"AdaLoRA has no step left in which to allocate ranks: tinit={config.tinit} and tfinal={config.tfinal} "
            f"take up all of total_step={steps}. Train longer, or lower tinit or tfinal."
        )


def _warn_of_other_ranks(allocator: RankAllocator) -> None:
    """Say that Trainer loads the best checkpoint into a model that PEFT has cut to the ranks of the end."""
    config: Any = allocator.peft_config
    say(
        said_level(),
        "load_best_model_at_end is set: this run will fail at its end (size mismatch) if the best checkpoint has other "
        "ranks than the model has then. Only those from step %d on (total_step - tfinal) are sure to have the same. "
        "Leave it out, give metric_for_best_model, and load the best one into a fresh model: "
        "PeftModel.from_pretrained(base_model, trainer.state.best_model_checkpoint).",
        config.total_step - config.tfinal,
    )


def _scores(tuner: AdaLoraModel) -> dict[str, weakref.ref[torch.Tensor]]:
    """Return the last step's scores: PEFT makes a new tensor of each that it updates (``RankAllocator.update_ipt``)."""
    return {name: weakref.ref(score) for name, score in tuner.rankallocator.ipt.items()}


def _untouched(tuner: AdaLoraModel, left: dict[str, weakref.ref[torch.Tensor]]) -> bool:
    # By identity: equal references are those to equal tensors, and there is one reference to each tensor.
    now = _scores(tuner)
    return now.keys() == left.keys() and all(reference is left[name] for name, reference in now.items())


def _numbers(found: list[AdaLoraModel]) -> dict[str, float]:
    adapters = [
        adapter
        for tuner in found
        for adapter in build(tuner).adapters
        if adapter.adapter == tuner.rankallocator.adapter_name
    ]
    numbers: dict[str, float] = {
        "adalora/total_rank": sum(module.rank_kept for adapter in adapters for module in adapter.modules),
    }
    budgets = [adapter.budget for adapter in adapters if adapter.budget is not None]
    if budgets:
        numbers["adalora/budget"] = sum(budgets)
    memories = [memory for tuner in found if (memory := known_memory(tuner.rankallocator))]
    if memories:
        numbers["adalora/skipped"] = sum(memory.counts.skipped for memory in memories)
    return numbers


def _come_first(callback: TrainerCallback) -> None:
    """Move the callback to the front, so that what it adds in ``on_log`` reaches all others.

    Trainer puts those of TensorBoard, wandb and others before the user's, and gives a callback no way to their list but
    the frame that it is called from. Where that is not as expected, only they miss what is added.
    """
    frame = sys._getframe(1)
    while frame is not None:
        handler = frame.f_locals.get("self")
        if isinstance(handler, CallbackHandler):
            if callback in handler.callbacks:
                # One list, rearranged: the loop that is running over it goes on where it was.
                handler.callbacks.remove(callback)
                handler.callbacks.insert(0, callback)
            return
        frame = frame.f_back  # type: ignore[assignment]
