"""The texts of ``RankAllocator.update_ipt`` that the guard knows, and so may compute in PEFT's place.

What a function does is told by its text alone: one that an editable install, a fork or an import hook has changed may
score as PEFT's does for hundreds of steps, and otherwise after them.
"""

from __future__ import annotations

import ast
import hashlib
import inspect
from functools import lru_cache
from types import CodeType, FunctionType
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from collections.abc import Iterator
    from typing import TypeGuard

KNOWN = {
    "cbcc69c59e5b1b6652a864aea14123ee": "0.5.0 to 0.10.0",
    "b1ef17fe4be41448be1580e14012415b": "0.11.0 to 0.21.2",  # these ask whether DeepSpeed holds the gradients
}
"""By the hash of the text (``fingerprint``), the PEFT releases that have it. ``tests/known_texts.py`` makes the table.

All of them compute the same (AdaLoRA paper, equations 8 to 10): ``ipt = |p * grad|``, ``exp_avg_ipt = beta1 *
exp_avg_ipt + (1 - beta1) * ipt`` and ``exp_avg_unc = beta2 * exp_avg_unc + (1 - beta2) * |ipt - exp_avg_ipt|``.
"""


def is_known(function: object) -> bool:
    """Say whether this is, and runs as, the ``update_ipt`` of a PEFT release that the table names.

    False wherever that cannot be told: no source, a file that was edited since it was imported, no plain function.
    """
    return (
        type(function) is FunctionType
        and function.__globals__.get("torch") is torch
        # By the code that runs, as tools that reload a module put new code into the old function.
        and _is_known(function.__code__, function.__code__.co_filename)
    )


def fingerprint(function: ast.FunctionDef) -> str:
    """Return a hash of what the text of a function says: the same for other blanks, line breaks and comments."""
    return hashlib.sha256(repr(_plain(function)).encode()).hexdigest()[:32]


@lru_cache(maxsize=16)
def _is_known(code: CodeType, filename: str) -> bool:
    # Once for each code of each file: code that is equal may come from elsewhere.
    try:
        source = "".join(inspect.findsource(code)[0])
        function = next(node for node in ast.walk(ast.parse(source)) if _stands_there(node, code))
        if fingerprint(function) not in KNOWN:
            return False
        # The file may have been edited since it was imported, and import hooks run something else than it says: so
        # what runs must be what comes of this file. Of the whole of it, as Python compiles a call of an imported name
        # in its own way.
        return code in _all_code(compile(source, filename, "exec", dont_inherit=True))
    except Exception:
        # Whatever a file that does not go with the code may lead to.
        return False


def _stands_there(node: ast.AST, code: CodeType) -> TypeGuard[ast.FunctionDef]:
    return isinstance(node, ast.FunctionDef) and (node.name, node.lineno) == (code.co_name, code.co_firstlineno)


def _all_code(code: CodeType) -> Iterator[CodeType]:
    """Yield this code and what is defined in it."""
    yield code
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            yield from _all_code(constant)


def _is_empty(name: str, value: object) -> bool:
    # From Python 3.15 on an import says whether it is lazy: 0, if it is not.
    return value is None or value == [] or (name == "is_lazy" and value == 0)


def _plain(node: Any) -> Any:
    """Return a syntax tree as nested tuples. Without empty fields: Python releases differ in those that they have."""
    if isinstance(node, ast.AST):
        fields = [(name, _plain(value)) for name, value in ast.iter_fields(node) if not _is_empty(name, value)]
        return (type(node).__name__, *fields)
    return tuple(map(_plain, node)) if isinstance(node, list) else node
