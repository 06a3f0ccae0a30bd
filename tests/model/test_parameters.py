"""Names alone: what needs no model."""

from __future__ import annotations

from peft_gradguard.model.parameters import modules_inside_modules_to_save


def test_copies_and_their_original_are_inside_modules_to_save() -> None:
    inside = {"head.modules_to_save.default.dense", "head.original_module.dense", "modules_to_save.default.q"}
    outside = {"body.original_module.q", "head.dense", "my_modules_to_save.default.q", "original_module2.q"}
    assert modules_inside_modules_to_save(inside | outside) == inside
