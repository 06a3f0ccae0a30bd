"""Schedules that leave nothing to prune, or no step to prune in."""

from __future__ import annotations

from contextlib import contextmanager
from typing import TYPE_CHECKING

from ..errors import ScheduleError
from ..model.schedule import final_step

if TYPE_CHECKING:
    from collections.abc import Iterator

    from peft import AdaLoraConfig

    from ..rules.call import AllocatorCall


def warn_of_schedule(call: AllocatorCall) -> None:
    """Warn at the first call of a schedule that cannot do what AdaLoRA is for."""
    for topic, words in wrong_schedule(call.allocator.peft_config):
        call.memory.said.warn_once(topic, "%s", words)


def wrong_schedule(config: AdaLoraConfig) -> Iterator[tuple[str, str]]:
    """Yield what is wrong with a schedule: a topic, and words."""
    if config.target_r >= config.init_r:
        yield (
            "target_r",
            f"AdaLoRA's target_r={config.target_r} is not below init_r={config.init_r}: there is nothing to prune, and "
            "PEFT fails at its first masking step. Choose a target_r below init_r, or plain LoRA.",
        )
    total: int | None = config.total_step
    if total is None:
        yield (
            "total_step",
            "AdaLoRA's total_step is not set: PEFT fails at the first update_and_allocate. Set it to the number of "
            "optimizer steps of the whole training.",
        )
        return
    final = final_step(config)
    if config.tinit >= final:
        yield (
            "no room",
            f"AdaLoRA's tinit={config.tinit} and tfinal={config.tfinal} leave none of the total_step={total} steps for "
            "pruning. Set total_step to the number of optimizer steps of the whole training, or lower tinit or tfinal.",
        )
    elif config.deltaT and (final - 1) // config.deltaT * config.deltaT <= config.tinit:
        yield (
            "deltaT",
            f"AdaLoRA does all its pruning at once, at step {final} (total_step - tfinal): deltaT={config.deltaT} "
            f"leaves no masking step between tinit={config.tinit} and it. Lower deltaT to prune in more steps.",
        )


@contextmanager
def explained(call: AllocatorCall, budget: int) -> Iterator[None]:
    """Where PEFT's ``torch.kthvalue`` fails in this block because of the budget, raise ``ScheduleError`` from that."""
    try:
        yield
    except RuntimeError as error:
        words = _beyond_the_ranks(call, budget)
        if words is None:
            raise
        raise ScheduleError(words) from error


def _beyond_the_ranks(call: AllocatorCall, budget: int) -> str | None:
    allocator, config = call.allocator, call.allocator.peft_config
    there = sum(len(triplet.E.parameter) for triplet in call.ranked or ())
    to_go = allocator.init_bgt - budget
    if 1 <= to_go <= there:
        return None
    why = f"AdaLoRA cannot prune {to_go} of {there} ranks {call.at}"
    if config.target_r >= config.init_r:
        return (
            f"{why}: target_r={config.target_r} is not below init_r={config.init_r}, and PEFT fails in torch.kthvalue. "
            "Choose a target_r below init_r, or plain LoRA."
        )
    if config.tinit >= final_step(config):
        return (
            f"{why}: its warm-up, tinit={config.tinit}, lasts until the step at which the final ranks are settled, "
            f"total_step - tfinal = {final_step(config)}, and PEFT fails in torch.kthvalue. Raise "
            "total_step to the number of optimizer steps of the whole training, or lower tinit or tfinal."
        )
    return (
        f"{why}: its budget began at {allocator.init_bgt} ranks, and is {budget} now, which PEFT cannot come down to "
        "(it fails in torch.kthvalue). Train an adapter that has all its ranks, or leave out update_and_allocate."
    )
