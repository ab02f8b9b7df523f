"""Bad calls of the whole public API: each is refused by the argument's name; nothing hangs."""

import pytest

from faults.bounded import check, chosen, results
from faults.cases import CALLS


@pytest.fixture(scope="module")
def outcomes():
    """All cases run once, in processes that may die."""
    return results(CALLS)


@pytest.mark.parametrize("name", chosen(CALLS), ids=str)
def test_a_case_comes_out_as_it_must(outcomes, name):
    check(outcomes[name])
