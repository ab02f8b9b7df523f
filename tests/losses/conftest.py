"""A small base with the demo's vocabulary, adapted."""

from pathlib import Path

import pytest

import fastlora
from fastlora.checkpoints.hub import DEMO
from fastlora.model import Model
from oracles.checkpoints import make_checkpoint
from oracles.pairs import adapted


@pytest.fixture(scope="session")
def tokenizer() -> fastlora.Tokenizer:
    found = fastlora.Tokenizer.from_folder(DEMO)
    assert found is not None
    return found


@pytest.fixture(scope="session")
def base_folder(tmp_path_factory) -> Path:
    """Random, two layers of 32."""
    folder: Path = tmp_path_factory.mktemp("base")
    make_checkpoint("llama2", folder, config=dict(vocab_size=4096))
    return folder


@pytest.fixture(scope="session")
def base(base_folder) -> Model:
    """In float64."""
    return fastlora.load(base_folder, dtype="float64", max_seq_length=64, device="cpu")[0]


@pytest.fixture(scope="session")
def quantised(base_folder) -> Model:
    """The same base in NF4, adapted."""
    settings = dict(load_in_4bit=True, max_seq_length=64, device="cpu")
    base = fastlora.load(base_folder, **settings)[0]
    return adapted(base, r=2, target_modules=["q_proj", "v_proj", "down_proj"])


@pytest.fixture(scope="session")
def model(base) -> Model:
    """B is not zero, so that every leaf has a gradient."""
    return adapted(base, r=2, target_modules=["q_proj", "v_proj", "down_proj"])
