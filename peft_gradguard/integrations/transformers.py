"""AdaLoRA in a ``transformers.Trainer``: ``Trainer(..., callbacks=[AdaLoraCallback()])``."""

from __future__ import annotations

import contextlib
import sys
import weakref
from typing import TYPE_CHECKING, Any

from transformers import TrainerCallback
from transformers.trainer_callback import CallbackHandler

from ..log import said_level, say
from ..memory.memory import known_memory
from ..model.gradients import skip_reason
from ..model.schedule import final_step
from ..model.tuners import tuners_that_train
from ..model.walk import adalora_parameters
from ..report.audit import build
from ..switch import is_enabled
from .resume import read, resumed_from, write, write_with

if TYPE_CHECKING:
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
    - ``adalora_state.safetensors`` in each checkpoint, so that a training that is resumed ends as if it had never been
      stopped (``peft_gradguard.AllocatorState``); not with ``save_only_model``.

    ``ValueError`` at the start of a training without a trainable AdaLoRA adapter, or too short for its ``tinit`` and
    ``tfinal``.
    """

    def __init__(self) -> None:
        self._runs: list[_Run] = []

    def __getstate__(self) -> dict[str, Any]:
        """Copy and pickle without the trainings that are going on: a copy takes part in none of them."""
        return {**vars(self), "_runs": []}

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, model: Any = None, **_: Any
    ) -> None:
        """Find the adapters that train, and settle ``total_step``."""
        before = self._run_of(state)
        if before is not None and before.step is None:
            # The Trainer was given this callback twice.
            return
        tuners = tuners_that_train(model)
        if not tuners:
            raise ValueError(
                f"AdaLoraCallback found no trainable AdaLoRA adapter in the Trainer's model, a {type(model).__name__}. "
                "Give the Trainer what get_peft_model returned for an AdaLoraConfig, or leave the callback out."
            )
        for tuner in tuners:
            _settle_total_step(tuner.rankallocator, state.max_steps)
        if args.load_best_model_at_end and not is_enabled():
            _warn_of_other_ranks(tuners[0].rankallocator)
        checkpoint = resumed_from() if state.global_step else None
        if checkpoint is not None:
            read(checkpoint, tuners, state.global_step)
        if before is not None:
            self._forget(before)
        run = _Run(state, tuners)
        self._runs.append(run)
        if not args.save_only_model:
            write_with(state, run.write)
        _come_first(self)

    def on_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        """Let AdaLoRA score, allocate and mask. Trainer counts the step only after this event, hence the one more."""
        run = self._run_of(state)
        if run is not None and run.step != state.global_step:
            run.step = state.global_step
            run.allocate(state.global_step + 1)

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, float] | None = None,
        **_: Any,
    ) -> None:
        """Add ranks and skips to what is logged with a training loss."""
        run = self._run_of(state)
        if logs is not None and "loss" in logs and run is not None:
            numbers = _numbers(run.tuners())
            logs.update(numbers)
            # Trainer keeps a copy of its own.
            if state.log_history and state.log_history[-1].get("step") == state.global_step:
                state.log_history[-1].update(numbers)

    def on_train_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Forget the training."""
        run = self._run_of(state)
        if run is not None:
            self._forget(run)

    def _run_of(self, state: TrainerState) -> _Run | None:
        # By identity: one callback may serve several Trainers at once, and states are equal where their numbers are.
        for run in tuple(self._runs):
            if run.state() is None:
                self._forget(run)
            elif run.state() is state:
                return run
        return None

    def _forget(self, run: _Run) -> None:
        # Other threads may be here too.
        with contextlib.suppress(ValueError):
            self._runs.remove(run)


class _Run:
    """One training. It keeps none of its objects alive, so that one that ends with an error leaves no model behind."""

    def __init__(self, state: TrainerState, tuners: list[AdaLoraModel]) -> None:
        self.state = weakref.ref(state)
        self.step: int | None = None
        """The ``global_step`` at which the last call was due."""
        self._shares = [_Share(tuner) for tuner in tuners]

    def tuners(self) -> list[AdaLoraModel]:
        """Return the AdaLoRA models that are trained."""
        return [tuner for share in self._shares if (tuner := share.tuner()) is not None]

    def write(self, folder: str) -> None:
        """Write the allocators' state into a checkpoint."""
        write(folder, self.tuners())

    def allocate(self, step: int) -> None:
        """Call ``update_and_allocate`` where nobody else does."""
        # A copy without gradients beside the adapter that trains (a teacher, an average) was never meant to be called.
        reached = [share for share in self._shares if share.is_reached()] or self._shares
        for share in reached:
            share.allocate(step)


class _Share:
    """Whose share the calls of one allocator are: ours, unless somebody else is seen to score in this training."""

    def __init__(self, tuner: AdaLoraModel) -> None:
        self.tuner = weakref.ref(tuner)
        self._reached = False
        self._left_to_others = False
        self._calls, self._scorings = _calls_and_scorings(tuner.rankallocator)

    def is_reached(self) -> bool:
        """Say whether gradients have ever come to this adapter."""
        tuner = self.tuner()
        if tuner is not None and not self._reached:
            parameters = adalora_parameters(tuner.model, tuner.rankallocator.adapter_name)
            self._reached = any(skip_reason(parameter.parameter) is None for parameter in parameters)
        return self._reached

    def allocate(self, step: int) -> None:
        """Call, unless another caller is there; look for it, as it may come and go."""
        tuner = self.tuner()
        if tuner is None:
            return
        allocator: Any = tuner.rankallocator
        config, (calls, scorings) = allocator.peft_config, _calls_and_scorings(allocator)
        finalising = final_step(config)
        if scorings > self._scorings:
            self._leave_to_others(step)
        elif step < finalising or calls == self._calls:
            self._left_to_others = False
        # A second finalising call does no harm, and one that nobody makes costs the whole training.
        if not self._left_to_others or (step == finalising and allocator.exp_avg_ipt):
            tuner.update_and_allocate(step)  # type: ignore[no-untyped-call]
        self._calls, self._scorings = _calls_and_scorings(allocator)

    def _leave_to_others(self, step: int) -> None:
        if not self._left_to_others:
            say(
                said_level(),
                "peft_gradguard's AdaLoraCallback leaves update_and_allocate to something else that calls it in this "
                "training too (step %d): another callback, or the trainer. Both would score each step twice. Take one "
                "of the two out; AdaLoraCallback is enough.",
                step,
            )
        self._left_to_others = True


def _calls_and_scorings(allocator: RankAllocator) -> tuple[int, int]:
    """Return how many calls of this allocator the guard has seen, and how many of them have scored."""
    memory = known_memory(allocator)
    return (memory.calls, memory.scorings) if memory else (0, 0)


class _SetByCallback(int):
    """A ``total_step`` that this callback has set. The user's own is a plain int, be it the same number."""

    def __copy__(self) -> _SetByCallback:
        return self

    def __deepcopy__(self, memo: object) -> _SetByCallback:
        return self

    def __reduce__(self) -> tuple[type[int], tuple[int]]:
        # What is pickled loads without the guard.
        return int, (int(self),)


def _settle_total_step(allocator: RankAllocator, steps: int) -> None:
    config: AdaLoraConfig = allocator.peft_config
    if config.total_step is None or config.total_step <= 0 or isinstance(config.total_step, _SetByCallback):
        _require_room(config, steps)
        allocator.set_total_step(_SetByCallback(steps))  # type: ignore[no-untyped-call]
        return
    _require_room(config, config.total_step)
    if config.total_step != steps:
        settled = final_step(config)
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
            f"AdaLoRA has no step left for pruning: tinit={config.tinit} and tfinal={config.tfinal} "
            f"take up all of total_step={steps}. Train longer, or lower tinit or tfinal."
        )


def _warn_of_other_ranks(allocator: RankAllocator) -> None:
    """Say that plain PEFT, without the guard, cannot load a checkpoint into an adapter that has other ranks by then."""
    config: Any = allocator.peft_config
    say(
        said_level(),
        "peft_gradguard is off, and load_best_model_at_end is set: this run fails at its end (size mismatch) if the "
        "best checkpoint has other ranks than the model has then. Only those from step %d on (total_step - tfinal) are "
        "sure to have the same. Switch the guard on (peft_gradguard.enable()), or leave the setting out.",
        final_step(config),
    )


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
