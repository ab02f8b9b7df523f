"""Adapters of experts, and of more than projections, out to PEFT and back. Oracle: PEFT's numbers.

test_peft_reading.py and test_peft_writing.py do the same for adapters of projections.
"""

import pytest

from oracles.expert_cases import EXPERT_CASES
from oracles.extras_cases import EXTRAS_CASES
from oracles.peft_cases import FUSED_CASES
from oracles.peft_side import export_difference, import_difference, step_difference

# Name -> (family, arguments that mean the same to fastlora.lora and to peft.LoraConfig).
CASES = EXPERT_CASES | EXTRAS_CASES | FUSED_CASES


@pytest.mark.parametrize("case", CASES)
def test_adapters_of_peft_load_with_its_logits(case, tmp_path):
    family, settings = CASES[case]
    assert import_difference(family, tmp_path, **settings) <= 1e-5


@pytest.mark.parametrize("case", CASES)
def test_saved_adapters_have_the_same_logits_in_peft(case, tmp_path):
    family, settings = CASES[case]
    assert export_difference(family, tmp_path, **settings) <= 1e-5


@pytest.mark.parametrize("case", CASES)
def test_a_step_of_training_equals_pefts(case, tmp_path):
    family, settings = CASES[case]
    assert step_difference(family, tmp_path, **settings) <= 1e-6


def test_no_case_hides_another():
    assert len(CASES) == len(EXPERT_CASES) + len(EXTRAS_CASES) + len(FUSED_CASES)
