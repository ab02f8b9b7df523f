"""Messages of errors never hold characters that do not print."""

import pytest

from fastlora.errors import CheckpointError, printable, raise_problems

CONTROL = "\x1b[2J\x07\r\x9b\u202e\ud800 a"


def test_characters_that_do_not_print_are_escaped_and_lines_stay():
    assert printable("a\nb é …") == "a\nb é …"
    assert printable(CONTROL) == r"\x1b[2J\x07\r\x9b\u202e\ud800 a"


@pytest.mark.parametrize("error", [CheckpointError, ValueError])
def test_a_list_of_problems_is_printable(error):
    with pytest.raises(error) as raised:
        raise_problems(error, f"heading {CONTROL}", [CONTROL], CONTROL)
    assert str(raised.value).replace("\n", "").isprintable()


def test_a_checkpoint_error_is_printable():
    assert str(CheckpointError(f"config.json: {CONTROL}")).isprintable()
