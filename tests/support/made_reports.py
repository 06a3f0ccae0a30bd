"""Reports made by hand, for the tests of how they read."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from peft_gradguard.report.facts import AdapterReport, ModuleReport, ParameterReport

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence


def module(
    name: str,
    kept: int = 8,
    started: int = 8,
    *,
    inputs: int = 16,
    outputs: int = 32,
    parts: Mapping[str, Mapping[str, Any]] | None = None,
    every: Mapping[str, Any] | None = None,
    **facts: Any,
) -> ModuleReport:
    """A module with its three parameters; ``every``: what differs in all of them, ``parts``: in one of them."""
    shapes = {"A": (started, inputs), "B": (outputs, started), "E": (started, 1)}
    parameters = tuple(
        ParameterReport(
            **{
                "name": f"{name}.lora_{factor}.default",
                "factor": factor,
                "shape": shape,
                "trainable": True,
                "inside_modules_to_save": False,
                **(every or {}),
                **(parts or {}).get(factor, {}),
            }
        )
        for factor, shape in shapes.items()
    )
    more = {"ranked": True, "reason": None, "importance": None, **facts}
    return ModuleReport(name, started, kept, parameters=parameters, **more)


def adapter(name: str, modules: Sequence[ModuleReport], **facts: Any) -> AdapterReport:
    unranked = sum(m.rank_kept for m in modules if not m.ranked)
    budgets = {"init_budget": 64, "budget": 40, "target_budget": 16}
    more = {"step": None, "unranked_ranks": unranked, **budgets, **facts}
    return AdapterReport(adapter=name, modules=tuple(modules), **more)


def scored(steps: int, **skipped: int) -> dict[str, Any]:
    """Steps left out and then scored, ``no_gradient=3`` for 3 steps without a gradient."""
    out = sum(skipped.values())
    return {
        "steps_scored": steps,
        "steps_skipped": {REASONS.get(reason, reason): count for reason, count in skipped.items()},
        "first_step": out + 1 if steps else None,
        "last_step": out + steps if steps else None,
    }


REASONS = {"no_gradient": "no gradient", "non_finite": "non-finite gradient", "inside": "inside modules_to_save"}
FROZEN = {"trainable": False}
EXCLUDED = {"excluded": True}
UNTRAINED = {"init_budget": None, "budget": None, "target_budget": None}


def stack(layers: Sequence[int], kinds: Sequence[str], **facts: Any) -> list[ModuleReport]:
    return [module(f"layers.{layer}.{kind}", **facts) for layer in layers for kind in kinds]
