"""A small base with the vocabulary of the demo, adapted, and a run to compare with."""

from pathlib import Path

import pytest

import fastlora
from fastlora.checkpoints.hub import DEMO
from fastlora.model import Model
from oracles.checkpoints import make_checkpoint
from oracles.pairs import adapted
from oracles.training_runs import Killed, long_run, stop_at


@pytest.fixture(scope="session")
def tokenizer() -> fastlora.Tokenizer:
    found = fastlora.Tokenizer.from_folder(DEMO)
    assert found is not None
    return found


@pytest.fixture(scope="session")
def folder(tmp_path_factory) -> Path:
    """A random base with the demo's vocabulary, two layers of 32."""
    folder = tmp_path_factory.mktemp("base")
    make_checkpoint("llama2", folder, config=dict(vocab_size=4096))
    return folder


@pytest.fixture(scope="session")
def base(folder) -> Model:
    return fastlora.load(folder, max_seq_length=64, device="cpu")[0]


@pytest.fixture(scope="session")
def model(base) -> Model:
    """B is not zero, so that every leaf has a gradient from the first step on."""
    return adapted(base, r=2, target_modules=["q_proj", "v_proj", "down_proj"])


@pytest.fixture(scope="session")
def exact(folder) -> Model:
    """The same in float64, where differences by rounding are tiny."""
    model, _ = fastlora.load(folder, dtype="float64", max_seq_length=64, device="cpu")
    return adapted(model, r=2, target_modules=["q_proj", "v_proj", "down_proj"])


@pytest.fixture(scope="session")
def dropping(base) -> Model:
    return adapted(base, r=2, lora_dropout=0.2, target_modules=["q_proj", "down_proj"])


@pytest.fixture(scope="session")
def cut(dropping, tokenizer, tmp_path_factory) -> Path:
    """output_dir of a run that stopped after checkpoint-4."""
    folder = tmp_path_factory.mktemp("cut")
    with pytest.raises(Killed):
        long_run(dropping, tokenizer, folder, log=stop_at(4))
    return folder
