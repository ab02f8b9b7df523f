"""Arguments of fastlora.lora that PEFT does not know: what comes out is PEFT's all the same."""

import pytest

from oracles.peft_side import export_difference, step_difference
from oracles.unknown_to_peft import UNKNOWN_TO_PEFT


@pytest.mark.parametrize("case", UNKNOWN_TO_PEFT)
def test_saved_adapters_have_the_same_logits_in_peft(case, tmp_path):
    family, settings = UNKNOWN_TO_PEFT[case]
    assert export_difference(family, tmp_path, **settings) <= 1e-5


@pytest.mark.parametrize("case", UNKNOWN_TO_PEFT)
def test_a_step_of_training_equals_pefts(case, tmp_path):
    family, settings = UNKNOWN_TO_PEFT[case]
    assert step_difference(family, tmp_path, **settings) <= 1e-6
