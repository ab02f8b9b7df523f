"""The law for hostile files: load or refuse within a second of work and 300 MB."""

import json
import resource
import time
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch

import fastlora
from fastlora.errors import CheckpointError
from fastlora.model import Model
from fastlora.text.tokenizer import Tokenizer
from oracles.raw_files import raw_file

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
BASE_WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
SECONDS = 1.0  # of CPU time, which other processes do not add to
WAITING = 30.0  # of wall time: more means that the call waits for something
MEMORY = 300 * 2**20  # bytes by which a refusal may grow the process: a 32 MB JSON, parsed
HUGE = 10**400  # JSON can hold this integer, a float cannot
header_file = raw_file  # a safetensors file with any header
REFUSALS = (CheckpointError, FileNotFoundError, NotImplementedError)


@contextmanager
def bounded():
    """Within SECONDS, and without MEMORY bytes more than the process ever had (Linux: kB)."""
    start, peak = time.process_time(), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    begun = time.monotonic()
    yield
    assert time.process_time() - start < SECONDS
    assert time.monotonic() - begun < WAITING
    assert (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - peak) * 1024 < MEMORY


def refused(call, *named: str) -> str:
    """The message of a refusal, which names all of `named`; anything else fails."""
    with bounded(), pytest.raises(REFUSALS) as error:
        call()
    text = str(error.value)
    assert all(name in text for name in named), text
    assert len(text) < 5000, f"{len(text)} characters"
    return text


def loads_or_refuses(call) -> None:
    """The call returns, or raises one of REFUSALS with a text, in the time and memory allowed."""
    with bounded():
        try:
            call()
        except REFUSALS as error:
            assert str(error)


def load(folder: Path) -> tuple[Model, Tokenizer | None]:
    return fastlora.load(folder, device="cpu", local_files_only=True)


def runs(folder: Path) -> None:
    """Load the folder and run the model. The logits may be infinite or NaN."""
    model, _ = load(folder)
    assert model(torch.tensor([[1, 2, 3]])).shape == (1, 3, model.spec.config.vocab_size)


def edit(path: Path, **fields) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))


READ_OF_MODEL = ("config.json", "generation_config.json", "tokenizer_config.json", "tokenizer.json")
