"""The house: every file in its layer, imports only downwards, no circle, and what must never know what."""

from __future__ import annotations

import ast
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

PACKAGE = Path(__file__).resolve().parent.parent / "peft_gradguard"

# From the ground up: a file imports its own room, and layers below. Parts of one line do not import each other.
LAYERS = [
    ["errors"],
    ["log"],
    ["settings"],
    ["switch"],
    ["wrapper"],
    ["model"],
    ["stacks"],
    ["late"],
    ["memory"],
    ["rules"],
    ["troubles"],
    ["speed", "checkpoints", "report"],
    ["guard", "integrations", "cli"],
    ["install"],
    ["__init__", "__main__"],
    ["autoload"],
]
FLOOR = {part: floor for floor, parts in enumerate(LAYERS) for part in parts}

GROUND = {"errors", "log", "settings", "switch", "wrapper"}
MAY_IMPORT = {
    "model": GROUND,
    "stacks": GROUND | {"model"},
    "late": GROUND | {"model"},
    "memory": GROUND | {"model", "late"},
    "rules": GROUND | {"model", "stacks", "late", "memory"},
    "guard": set(FLOOR) - {"report", "cli", "integrations"},
}
IMPORTED_BY = {"guard": {"install"}, "install": {"__init__"}}


def part_of(name: str) -> str:
    """The room, or the single file, that a module of the package belongs to."""
    return name.split(".")[0]


def imports_of(file: Path) -> set[str]:
    """The modules of the package that a file imports, anywhere in it: in functions and under TYPE_CHECKING too."""
    folder = list(file.relative_to(PACKAGE).parent.parts)
    found = set()
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and node.level:
            base = folder[: len(folder) - node.level + 1] + (node.module.split(".") if node.module else [])
        elif isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == PACKAGE.name:
            base = (node.module or "").split(".")[1:]
        elif isinstance(node, ast.Import):
            found |= {
                name.name.partition(".")[2] or "__init__" for name in node.names if part_of(name.name) == PACKAGE.name
            }
            continue
        else:
            continue
        for name in node.names:
            whole = [*base, name.name]
            is_module = PACKAGE.joinpath(*whole).with_suffix(".py").exists()
            found.add(".".join(whole if is_module else base) or "__init__")
    return found


HOUSE = {
    ".".join(file.relative_to(PACKAGE).with_suffix("").parts): imports_of(file)
    for file in sorted(PACKAGE.rglob("*.py"))
    if "__pycache__" not in file.parts
}


def test_every_file_has_a_layer() -> None:
    assert {part_of(name) for name in HOUSE} <= set(FLOOR)


def test_no_circle() -> None:
    try:
        list(TopologicalSorter(HOUSE).static_order())
    except CycleError as error:
        pytest.fail(f"these import each other: {' -> '.join(error.args[1])}")


@pytest.mark.parametrize("name", HOUSE)
def test_imports_go_down(name: str) -> None:
    part = part_of(name)
    # The start-up files stand outside of the package: of what they load they know the face only.
    for imported in HOUSE[name]:
        other = part_of(imported)
        assert other == part or FLOOR[other] < FLOOR[part], f"{name} imports {imported}"
        assert other == part or other in MAY_IMPORT.get(part, set(FLOOR)), f"{name} must not know {imported}"
        assert other == part or part in IMPORTED_BY.get(other, set(FLOOR)), f"{name} must not know {imported}"


@pytest.mark.parametrize("name", [name for name in HOUSE if name.endswith(".__init__")])
def test_the_init_of_a_room_imports_nothing(name: str) -> None:
    assert HOUSE[name] == set()


def test_the_memory_is_looked_up_in_one_place() -> None:
    calls = {
        name
        for name in HOUSE
        for node in ast.walk(ast.parse((PACKAGE / f"{name.replace('.', '/')}.py").read_text(encoding="utf-8")))
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "memory_of"
    }
    assert calls == {"rules.call"}


def test_few_files_stand_at_the_top() -> None:
    assert len(list(PACKAGE.glob("*.py"))) <= 9
