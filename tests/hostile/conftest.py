"""A good model and a good adapter, copied for each test that breaks them."""

import shutil
from pathlib import Path

import pytest
from tokenizers import Tokenizer as Backend
from tokenizers.models import WordLevel

import fastlora
from fastlora.model import Model
from oracles.checkpoints import make_checkpoint


@pytest.fixture(scope="session")
def folder(tmp_path_factory) -> Path:
    """A good model with a tokenizer."""
    folder = tmp_path_factory.mktemp("base")
    make_checkpoint("llama2", folder)
    words = WordLevel({"<unk>": 0, "<s>": 1, "</s>": 2}, unk_token="<unk>")
    Backend(words).save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text('{"eos_token": "</s>"}')
    return folder


@pytest.fixture(scope="session")
def model(folder) -> Model:
    return fastlora.load(folder, device="cpu")[0]


@pytest.fixture(scope="session")
def adapter(model, tmp_path_factory) -> Path:
    """A good adapter of that model: 14 kB in 8 tensors."""
    folder = tmp_path_factory.mktemp("adapter")
    fastlora.lora(model, r=2, target_modules=["q_proj", "v_proj"]).save_pretrained(folder)
    return folder


@pytest.fixture
def broken_model(folder, tmp_path) -> Path:
    return Path(shutil.copytree(folder, tmp_path / "model"))


@pytest.fixture
def broken_adapter(adapter, tmp_path) -> Path:
    return Path(shutil.copytree(adapter, tmp_path / "adapter"))
