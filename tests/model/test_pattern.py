"""Names that are PEFT's."""

from __future__ import annotations

import peft
import pytest
from scenarios import TwoBranches, adalora_config

from peft_gradguard.model.parameters import triplets
from peft_gradguard.model.pattern import budget_name
from peft_gradguard.model.walk import adalora_parameters

pytestmark = [pytest.mark.peft]


@pytest.mark.parametrize("adapter", ["default", "lora_A", "lora_E"])
def test_triplets_have_the_names_that_pefts_budget_gives_them(adapter: str) -> None:
    config = adalora_config(target_modules=["trunk.0", "trunk.2", "branch.0"])
    model = peft.get_peft_model(TwoBranches(), config, adapter_name=adapter)
    found = triplets(adalora_parameters(model.base_model.model, adapter))
    assert sorted(map(budget_name, found)) == list(model.base_model.rankallocator.name_set)
