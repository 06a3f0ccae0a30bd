"""What is left in the end: no pattern, other ranks than asked for, or ranks that were never settled."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from ..model.parameters import NON_FINITE, energies
from ..model.schedule import final_step
from ..wrapper import is_own
from .ended import Ending, judge_at_the_end, not_judged

if TYPE_CHECKING:
    from ..memory.memory import Memory
    from ..model.pattern import RankPattern
    from ..rules.call import AllocatorCall

HALF = (torch.float16, torch.bfloat16)
TWICE = 2


def warn_of_ranks(call: AllocatorCall, budget: int, pattern: RankPattern | None) -> None:
    """Warn after a masking step where the ranks are not what the budget asks for, or nothing was there to rank."""
    seen, finalising = call.memory.seen, not call.scoring_is_due
    first, seen.settled = finalising and not seen.settled, seen.settled or finalising
    if call.ranked is None or not all(is_own(call.allocator, name) for name in ("mask_to_budget", "budget_schedule")):
        # A subclass may rank in its own way.
        return
    if first and not call.ranked:
        _found(call, "nothing ranked", _nothing_ranked(call, pattern))
    elif pattern and call.ranked:
        kept, there = sum(map(sum, pattern.values())), sum(map(len, pattern.values()))
        if budget > there:
            # It was counted before PEFT cut the ranks (pruned.py).
            return
        all_lost = budget > 0 and not kept
        if all_lost and not first and _may_not_have_begun(call):
            return
        if all_lost or (first and kept != budget):
            _found(call, "other ranks" if kept else "no rank left", _other_ranks(call, kept, budget))
        elif first:
            # What an earlier masking step has pruned, this one may have given back.
            seen.troubles.pop("no rank left", None)


def warn_of_lost_names(call: AllocatorCall, pattern: RankPattern | None, masked: RankPattern) -> None:
    """Warn in the final phase where the pattern names what the model has not: PEFT alone would fail there."""
    entries = [name for name, keep in (pattern or {}).items() if not isinstance(keep, int)]
    lost = len(entries) - len(masked)
    if lost > 0:
        there = next((p.name for p in energies(call.parameters)), "nothing")
        words = (
            f"AdaLoRA's pruned ranks come back (adapter {call.memory.adapter!r}): of the {len(entries)} modules in "
            f"its rank pattern, {lost} are not in the model. The pattern has {entries[0]!r}, the model {there!r}. "
            "Names change where a module is wrapped, as by torch.compile(module): wrap it before the training, or use "
            "module.compile()."
        )
        _found(call, "names lost", words)


def warn_in_final_phase(call: AllocatorCall, pattern: RankPattern | None) -> None:
    """Warn where the final phase begins without its first step, at which PEFT settles the ranks."""
    memory, config = call.memory, call.allocator.peft_config
    seen = memory.seen
    if seen.settled or config.total_step is None:
        # Without a schedule, the pattern is masked by hand.
        return
    seen.settled, final = True, final_step(config)
    if call.scored:
        last = memory.counts.step
        jump = "" if last is None else f" The last call before it was step {last}."
        follows = "The ranks of the last masking step stay." if pattern else "So no rank is pruned at all."
        words = (
            f"AdaLoRA's final ranks were not settled (adapter {memory.adapter!r}): update_and_allocate was never "
            f"called with step {final} (total_step - tfinal).{jump} {follows} Call it at every optimizer step, with "
            "the number of that step, not of samples or micro-batches."
        )
    elif not pattern and memory.counts.step is None:
        words = (
            f"AdaLoRA prunes nothing (adapter {memory.adapter!r}): the first call of update_and_allocate came with a "
            f"step beyond {final} (total_step - tfinal), so nothing was ever scored, and there is no rank pattern. "
            "Give it the number of the optimizer step, from 1 on, not of samples or micro-batches, or raise total_step."
        )
    else:
        return
    _found(call, "finalising step missed", words)


def judge_the_end_of(call: AllocatorCall) -> None:
    """From the first call on, see at the allocator's end whether its ranks were settled."""
    judge_at_the_end(call.allocator, _Early(call.memory))


def note_that_a_copy_goes_on(call: AllocatorCall) -> None:
    """At an allocator's first call, see whether it is a copy (``copy.deepcopy(model)``) that trains another's on.

    A copy comes with the scores of what it was copied from.
    """
    for other in not_judged() if call.scored else ():
        if isinstance(other, _Early):
            counts = other.memory.counts
            scored = {name for name, count in counts.of_each().items() if count.scored}
            if scored == call.scored.keys():
                other.copied_at = counts.step


class _Early(Ending):
    """Whether a training stops before its final ranks are settled."""

    copied_at: int | None = None
    """The last step before a copy of the model has gone on with the training."""

    def judge(self) -> None:
        # Both are None where the steps are not known.
        words = stopped_early(self.memory) if self.copied_at != self.memory.counts.step else None
        if words is not None and self.has_seen_all():
            self.memory.said.warn_once("stopped early", "%s", words)


ENOUGH = 5
"""The steps of a training; fewer are a trial."""


def stopped_early(memory: Memory) -> str | None:
    """Return what to say of a training whose last call came before the finalising step, if it is over."""
    step, final = memory.counts.step, memory.seen.final_step
    if memory.seen.settled or final is None:
        return None
    if not any(count.scored >= ENOUGH for count in memory.counts.of_each().values()):
        return None
    return (
        f"AdaLoRA's ranks were never settled (adapter {memory.adapter!r}): the training stopped after step {step}, but "
        f"they are settled at step {final} (total_step - tfinal), so target_r is not reached. If it stopped early "
        "on purpose, nothing is wrong; else set total_step to the number of its optimizer steps."
    )


def _found(call: AllocatorCall, topic: str, words: str | None) -> None:
    if words is not None:
        call.memory.seen.troubles[topic] = words
        call.memory.said.warn_once(topic, "%s", words)


def _nothing_ranked(call: AllocatorCall, pattern: RankPattern | None) -> str | None:
    memory = call.memory
    trainable = [p for p in call.parameters if p.parameter.requires_grad]
    if not trainable or all(p.excluded for p in trainable):
        # That was said, or asked for.
        return None
    scored = {name for name, count in memory.counts.of_each().items() if count.scored}
    ranking = [p.name for p in energies(trainable) if not p.excluded]
    if scored and not ranking:
        why = "No lora_E is trainable."
    elif scored and not scored.intersection(ranking):
        why = "No lora_E ever had a gradient."
    elif scored:
        why = "No module has scores for lora_E and for lora_A or lora_B."
    elif any(NON_FINITE in count.skipped for count in memory.counts.of_each().values()):
        why = "No gradient was ever finite: the loss has overflowed or was NaN at every step before it."
    elif memory.counts.of_each():
        why = "Nothing was ever scored: no call before it has found a gradient."
    else:
        why = "Nothing was ever scored, as this is the first call: call it at every step, from 1 on."
    left = "the pattern that was there stays" if pattern else "no rank is pruned"
    return (
        f"AdaLoRA has nothing to rank at step {call.step} (adapter {memory.adapter!r}), at which the final ranks are "
        f"settled, so {left}. {why} print(peft_gradguard.report(model)) tells more."
    )


def _may_not_have_begun(call: AllocatorCall) -> bool:
    """Say whether all scores are zero for the first time, as where a warm-up begins with a learning rate of zero.

    E is zero there anyway, and the next step brings the ranks back.
    """
    if any(bool(score.any()) for score in _scores_of_energies(call)):
        return False
    seen = call.memory.seen
    if call.usable:
        # Steps of which nothing was scored, as a GradScaler's overflows, tell nothing new.
        seen.zero_steps.add(call.step)
    return len(seen.zero_steps) < TWICE


def _scores_of_energies(call: AllocatorCall) -> list[torch.Tensor]:
    return [call.scored[triplet.E.name] for triplet in call.ranked or () if triplet.E.name in call.scored]


def _other_ranks(call: AllocatorCall, kept: int, budget: int) -> str:
    settles = "keeps" if call.scoring_is_due else "ends with"
    return f"AdaLoRA {settles} {kept} ranks where its budget allows {budget} {call.at}. {_why_other_ranks(call)}"


def _why_other_ranks(call: AllocatorCall) -> str:
    scores = _scores_of_energies(call)
    kinds = {triplet.E.parameter.dtype for triplet in call.ranked or ()}.intersection(HALF)
    if not all(bool(torch.isfinite(score).all()) for score in scores):
        return "Some scores are not finite, as of gradients with NaN or inf that were scored without the guard."
    if kinds:
        kind = str(min(kinds, key=str)).removeprefix("torch.")
        return (
            f"Scores of adapters in {kind} underflow to zero or become equal, and ranks with equal scores are pruned "
            "together. Keep the adapter in float32: get_peft_model(..., autocast_adapter_dtype=True), and no "
            "model.half() or .to(dtype) after it; with older PEFT, make the lora_ parameters float() before training."
        )
    if not any(bool(score.any()) for score in scores):
        return (
            "All scores of lora_E are zero, as if the adapter did not train, and ranks with equal scores are pruned "
            "together. Does an optimizer hold its parameters, is its learning rate above zero, and did its steps take "
            "place (a GradScaler skips those that have overflowed)?"
        )
    return (
        "Some ranks have equal scores, and PEFT prunes them together. Likely causes: gradients clipped by value, a "
        "lora_E that does not train, parts of lora_A, lora_B and lora_E set to the same values."
    )
