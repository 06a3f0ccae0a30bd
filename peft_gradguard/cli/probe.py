"""What a program finds that imports PEFT here: run in a fresh interpreter by ``peft-gradguard status``.

Stands alone and imports nothing of the package, which would switch the guard on.
"""

from __future__ import annotations

import json
import os
import sys
from importlib import metadata
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

PACKAGES = ("torch", "peft", "transformers", "wrapt", "peft_gradguard")
AUTOLOADING = "_peft_gradguard_start"
METHODS = (
    "update_ipt", "update_and_allocate", "budget_schedule", "mask_to_budget", "mask_using_rank_pattern",
    "_set_budget_scheduler",
)  # fmt: skip
"""Those that the guard wraps, as in ``wrapper.py``."""


def look() -> dict[str, Any]:
    """Import PEFT as a program would, and return what is then seen."""
    seen: dict[str, Any] = {"versions": versions()}
    try:
        from peft.tuners.adalora import RankAllocator
    except Exception as error:
        seen["error"] = f"peft.tuners.adalora cannot be imported ({type(error).__name__}: {error})".splitlines()[0]
        seen["ways_in"] = ways_in()
        return seen
    switch = sys.modules.get("peft_gradguard.switch")
    seen["ways_in"] = ways_in()
    seen["enabled"] = switch is not None and switch.is_enabled()
    seen["methods"] = {name: wrappers(vars(RankAllocator).get(name)) for name in METHODS}
    seen["needs_guard"] = fails_without_gradient(innermost(RankAllocator.update_ipt))
    return seen


def ways_in() -> list[str]:
    """Return which way in has acted in this interpreter."""
    ways = list(getattr(sys.modules.get(AUTOLOADING), "ways", ()))
    if "peft_gradguard" in sys.modules and not ways:
        groups = os.environ.get("AUTOWRAPT_BOOTSTRAP", "").split(",")
        autowrapt = "autowrapt" in sys.modules and "peft_gradguard" in [group.strip() for group in groups]
        ways = ["autowrapt"] if autowrapt else ["import peft_gradguard in somebody's start-up code"]
    return ways


def chain(method: Any) -> Iterator[Any]:
    """Yield a method's wrappers from the outermost to what they wrap in the end."""
    while method is not None:
        yield method
        method = getattr(method, "__wrapped__", None)


def innermost(method: Any) -> Any:
    """Return what all wrappers wrap in the end."""
    return list(chain(method))[-1]


def wrappers(method: Any) -> dict[str, Any]:
    """Say whether the guard is among a method's wrappers, and name the modules of the others."""
    # By type, as a wrapt proxy answers with the class, and the module, of what it wraps.
    layers = [layer for layer in chain(method) if not is_guard(layer)]
    others = [origin(layer) for layer in layers]
    return {
        "guarded": len(layers) < len(list(chain(method))),
        "others": [other for other in others if other.split(".")[0] != "peft"],
    }


def is_guard(layer: Any) -> bool:
    """Say whether this wrapper is the guard's."""
    # What somebody else wraps may be the method bound to the class, which has the wrapper for its parent.
    types = type(layer), type(getattr(layer, "_self_parent", None))
    return any(kind.__module__ == "peft_gradguard.wrapper" for kind in types)


def origin(layer: Any) -> str:
    """Return the module that a wrapper, or a function put in a method's place, comes from."""
    function = getattr(layer, "_self_wrapper", layer)
    # functools.wraps copies __module__, so the file where the code was written decides.
    file = getattr(getattr(function, "__code__", None), "co_filename", None)
    files = {getattr(module, "__dict__", {}).get("__file__"): name for name, module in list(sys.modules.items())}
    return files.get(file, file) if file else type(function).__module__


def fails_without_gradient(update_ipt: Callable[..., Any]) -> bool | None:
    """Say whether PEFT's own scoring fails on a parameter without gradient; None where that could not be tried."""
    try:
        import peft
        import torch

        config = peft.AdaLoraConfig(target_modules=["0"], total_step=10)
        model = peft.get_peft_model(torch.nn.Sequential(torch.nn.Linear(2, 2)), config)
        allocator = model.base_model.rankallocator
    except Exception:
        return None
    try:
        update_ipt(allocator, model)
    except TypeError:
        return True
    except Exception:
        return None
    return False


def versions() -> dict[str, str | None]:
    """Return the versions of Python and of the packages that matter, None for those that are not installed."""
    found: dict[str, str | None] = {"python": sys.version.split()[0]}
    for package in PACKAGES:
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            found[package] = None
    return found


if __name__ == "__main__":
    print(f"\n{sys.argv[-1]}{json.dumps(look())}")
