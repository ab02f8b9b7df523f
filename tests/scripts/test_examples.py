"""scripts/examples/: scripts of other libraries and their twins have equal losses, as notebooks."""

import json
import os
import random
import runpy
import subprocess
import sys
from pathlib import Path
from typing import Any

import make_notebooks
import nbformat
import numpy as np
import pytest
import torch

EXAMPLES = Path(make_notebooks.__file__).parent
NAMES = [path.stem for path in make_notebooks.scripts()]
# Peers that need older packages than the test environment has. scripts/test.sh installs them here.
TORCHTUNE, UNSLOTH = (
    Path(sys.prefix) / name / "site-packages" for name in ("torchtune", "unsloth")
)


@pytest.fixture
def own_state(tmp_path, monkeypatch):
    """The peers seed global generators and set environment variables; undo that."""
    monkeypatch.chdir(tmp_path)
    environment, numpy_state, state = dict(os.environ), np.random.get_state(), random.getstate()
    with torch.random.fork_rng():
        yield
    np.random.set_state(numpy_state)
    random.setstate(state)
    os.environ.clear()
    os.environ.update(environment)


def run_cells(name: str, folder: Path) -> dict[str, Any]:
    """The variables that the code cells of an example's notebook leave."""
    code = make_notebooks.code((EXAMPLES / f"{name}.py").read_text())
    (folder / f"{name}.py").write_text(code)
    return runpy.run_path(str(folder / f"{name}.py"))


def assert_equal(losses: list[float], expected: list[float]) -> None:
    assert len(losses) == len(expected) == 20
    assert max(abs(a - b) for a, b in zip(losses, expected, strict=True)) <= 1e-4
    assert expected[-1] < expected[0] - 2  # the runs learn


@pytest.mark.parametrize("name", ["peft_trainer", "trl_sft"])
def test_the_losses_of_a_twin_are_equal(name, own_state, tmp_path):
    expected = run_cells(name, tmp_path)
    twin = run_cells(f"{name}_fastlora", tmp_path)
    assert_equal(twin["losses"], expected["losses"])


def test_the_losses_of_torchtune_s_twin_are_equal(own_state, tmp_path, monkeypatch):
    assert TORCHTUNE.exists(), "scripts/test.sh installs scripts/requirements-torchtune.txt"
    (tmp_path / "torchtune_lora.yaml").write_text((EXAMPLES / "torchtune_lora.yaml").read_text())
    tune = tmp_path / "tune"
    tune.write_text(f"#!{sys.executable}\nfrom torchtune._cli.tune import main\nmain()\n")
    tune.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    monkeypatch.setenv("HF_HOME", str(tmp_path))  # of the rows' cache
    monkeypatch.setenv("PYTHONPATH", f"{TORCHTUNE}:{EXAMPLES}")
    expected = run_cells("torchtune_lora", tmp_path)
    assert_equal(run_cells("torchtune_lora_fastlora", tmp_path)["losses"], expected["losses"])


def test_the_losses_of_unsloth_s_twin_are_equal(own_state, tmp_path, monkeypatch):
    """In another process: Unsloth changes transformers, TRL and PEFT when it is imported."""
    assert UNSLOTH.exists(), "scripts/test.sh installs scripts/requirements-unsloth.txt"
    monkeypatch.setenv("PYTHONPATH", str(UNSLOTH))
    monkeypatch.setenv("UNSLOTH_DISABLE_STATISTICS", "1")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    code = make_notebooks.code((EXAMPLES / "unsloth_sft.py").read_text())
    ending = "import json\njson.dump(losses, open('losses.json', 'w'))\n"
    (tmp_path / "unsloth_sft.py").write_text(f"{code}\n{ending}")
    subprocess.run([sys.executable, "unsloth_sft.py"], check=True)
    expected = json.loads((tmp_path / "losses.json").read_text())
    assert_equal(run_cells("unsloth_sft_fastlora", tmp_path)["losses"], expected)


def test_every_script_has_a_twin():
    peers = {name for name in NAMES if not name.endswith("_fastlora")}
    assert peers and {f"{name}_fastlora" for name in peers} == set(NAMES) - peers


def test_notebooks_are_valid_and_hold_the_script(tmp_path):
    subprocess.run([sys.executable, make_notebooks.__file__, tmp_path], check=True)
    assert sorted(path.stem for path in tmp_path.glob("*.ipynb")) == NAMES
    for name in NAMES:
        read = nbformat.read(tmp_path / f"{name}.ipynb", as_version=nbformat.NO_CONVERT)
        nbformat.validate(read)
        kinds = {cell.cell_type for cell in read.cells}
        assert kinds == {"code", "markdown"}
        code = [cell.source for cell in read.cells if cell.cell_type == "code"]
        lines = [line for line in "\n".join(code).splitlines() if line]
        script = (EXAMPLES / f"{name}.py").read_text()
        assert [line for line in script.splitlines() if line in lines] == lines
        assert all(line.startswith("#") for line in set(script.splitlines()) - set(lines) if line)


def test_cells_are_split_at_their_marks():
    text = "# %% [markdown]\n# # A\n#\n# b\n\n# %%\nx = 1\n\n\ny = 2\n\n# %%\n\n# %%\n# c\nz = 3\n"
    found = [(c["cell_type"], "".join(c["source"])) for c in make_notebooks.cells(text)]
    assert found == [
        ("markdown", "# A\n\nb"),
        ("code", "x = 1\n\n\ny = 2"),
        ("code", "# c\nz = 3"),
    ]
    assert json.dumps(make_notebooks.notebook(text))
