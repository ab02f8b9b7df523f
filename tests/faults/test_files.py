"""Damaged files: each is refused by its name, or has no effect; nothing hangs."""

import pytest

from faults.bounded import check, chosen, results
from faults.cases import FILES


@pytest.fixture(scope="module")
def outcomes():
    """All cases run once, in processes that may die."""
    return results(FILES)


@pytest.mark.parametrize("name", chosen(FILES), ids=str)
def test_a_case_comes_out_as_it_must(outcomes, name):
    check(outcomes[name])
