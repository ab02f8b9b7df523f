"""What several test files share: checkpoints, the other libraries' side, and the measures."""

from pathlib import Path

import pytest

# Failed assertions of these modules show their values, as those of the tests do.
pytest.register_assert_rewrite(
    *(f"oracles.{path.stem}" for path in Path(__file__).parent.glob("[a-z]*.py"))
)
