"""README.md's table of model families is the one that oracles/family_table.py prints."""

import pytest

from fastlora.models.families.registry import FAMILIES
from oracles import family_table

README = family_table.ROOT / "README.md"


@pytest.fixture(scope="module")
def table() -> str:
    return family_table.table()


def test_the_readme_has_the_table_of_the_checks(table):
    text = README.read_text()
    assert family_table.in_text(text, table) == text, (
        "PYTHONPATH=tests python -m oracles.family_table --write"
    )


def test_every_family_has_its_row_and_every_check_its_column(table):
    rows = [line.strip("| ").split(" | ") for line in table.splitlines()]
    assert [row[1] for row in rows[2:]] == [f"`{name}`" for name in FAMILIES]
    assert {len(row) for row in rows} == {len(family_table.HEAD)}
    # Every family is run against transformers and PEFT.
    assert all(cell == "yes" for row in rows[2:] for cell in row[2:7])


def test_a_check_that_does_not_run_is_not_claimed():
    found = family_table.covered(*family_table.CHECKS["NF4"])
    assert "llama" in found and "mixtral" not in found
