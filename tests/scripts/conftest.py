"""A fixture for the examples that end in a figure."""

import numpy as np
import pytest
from PIL import Image


@pytest.fixture
def quick(tmp_path):
    """quick(example): what its main returns; checks that it has drawn something."""

    def of(example):
        found = example.main(True, tmp_path / "figure.png")
        assert [path.name for path in tmp_path.iterdir()] == ["figure.png"]
        assert len(np.unique(np.asarray(Image.open(tmp_path / "figure.png").convert("L")))) > 10
        return found

    return of
