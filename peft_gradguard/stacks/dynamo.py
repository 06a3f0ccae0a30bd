"""torch.compile: where a compiled function meets the guard, its graph breaks, and the guard's code runs as it is."""

from __future__ import annotations

from functools import cache
from typing import TYPE_CHECKING, Any

import wrapt

from ..log import harmless

if TYPE_CHECKING:
    from types import ModuleType

WHERE = ("torch._dynamo.trace_rules", "torch._dynamo.skipfiles")
"""What knows which files are not compiled; under its second name until torch 2.1."""


@cache
def keep_compilers_out() -> None:
    """Have the guard's files left uncompiled, as soon as torch's compiler is there."""
    for name in WHERE:
        wrapt.register_post_import_hook(_leave_out, name)


def _leave_out(rules: ModuleType) -> None:
    with harmless("keep its code from being compiled"):
        add: Any = rules.add  # type: ignore[attr-defined, unused-ignore]
        add(__package__.partition(".")[0])
