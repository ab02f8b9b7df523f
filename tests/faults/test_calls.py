"""Bad calls of the whole public API: each is refused by the argument's name; nothing hangs."""

import pytest

from faults.bounded import check, chosen, results
from faults.cases import CALLS
from faults.known import parameters


@pytest.fixture(scope="module")
def outcomes():
    """All cases run once, in processes that may die."""
    return results(CALLS)


@pytest.mark.parametrize("name", parameters(chosen(CALLS)))
def test_a_case_comes_out_as_it_must(outcomes, name):
    check(outcomes[name])
