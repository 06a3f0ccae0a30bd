"""What an allocator's calls have shown of its training as a whole, in names and numbers. ``troubles/`` judges it."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ..late.optimizers import listen_no_more
from ..model.parameters import NO_GRADIENT, energies
from ..model.pattern import is_uncut

if TYPE_CHECKING:
    from collections.abc import Container, Mapping, Sequence

    from ..late.optimizers import StepListener
    from ..model.gradients import StepGradients
    from ..model.parameters import AdaLoraParameter
    from ..model.pattern import RankPattern


class Seen:
    """What was seen since the allocator was made."""

    def __init__(self) -> None:
        self.unreached = 0
        """The scoring steps in a row in which no trainable E had a gradient, but an A or B."""
        self.came_back = False
        """Whether that had gone, after it was said."""
        self.final_step: int | None = None
        """``total_step - tfinal``, as of the last call that tells."""
        self.zero_steps: set[int | None] = set()
        """The masking steps at which all scores of E were zero, and some gradients were scored."""
        self.settled = False
        """Whether the finalising step, or a call after it, has come since the last scoring."""
        self.came_with: RankPattern | None = None
        """The ``rank_pattern`` that the config had when the allocator was made."""
        self.troubles: dict[str, str] = {}
        """What is wrong with the training, in words, by topic. What is no more so is taken out."""
        self.listeners: dict[str, StepListener | None] = {}
        """Who listens to optimizers, by topic; None where it is known what they do."""
        self._step: int | None = None

    def close(self, topic: str) -> None:
        """Hear of no step for this topic any more: it is known what the optimizers do."""
        listener = self.listeners.get(topic)
        self.listeners[topic] = None
        if listener is not None:
            listen_no_more(listener)

    def note_scoring(self, step: int | None, parameters: Sequence[AdaLoraParameter], gradients: StepGradients) -> None:
        """Take note of a scoring step; a second call of the same step tells nothing new."""
        self.settled = False
        reasons = gradients.reasons
        if NO_GRADIENT not in reasons.values() and not gradients.zeros:
            self.unreached = 0
            return
        reached = {
            parameter.factor == "E"
            for parameter in parameters
            if has_gradient(parameter.name, reasons, gradients.zeros)
        }
        waiting = any(reasons[p.name] in (NO_GRADIENT, None) for p in energies(parameters))
        if True in reached:
            self.unreached = 0
        elif reached and waiting and (step is None or step != self._step):
            self.unreached += 1
            self._step = step

    def own_pattern(
        self, pattern: RankPattern | None, adapter: str, parameters: Sequence[AdaLoraParameter]
    ) -> RankPattern:
        """Return the pattern of this training, given that of the config: none where that came with the config.

        PEFT writes a pattern into the user's config object, and the next training may be given the same. A loaded
        adapter comes with its own pattern, and is cut to it.
        """
        if not pattern or self.came_with is None:
            return pattern or {}
        # save_pretrained cuts the adapter's name out of the names.
        is_another = _short(pattern, adapter) == _short(self.came_with, adapter)
        return {} if is_another and is_uncut(parameters, pattern, adapter) else pattern


def has_gradient(name: str, reasons: Mapping[str, str | None], zeros: Container[str]) -> bool:
    """Say whether a parameter has a gradient that is not zero, be it one that is not finite."""
    return reasons[name] in (None, "non-finite gradient") and name not in zeros


def _short(pattern: Mapping[str, list[bool]], adapter: str) -> dict[str, list[bool]]:
    return {name.replace(f".{adapter}", ""): keep for name, keep in pattern.items()}
