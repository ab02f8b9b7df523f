"""Fixtures that several folders of tests use: tiny checkpoints read by both libraries."""

import os
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from _pytest import runner

from oracles import deep_stack, quick_checks

if quick_checks.hook_is_installed():
    quick_checks.install()  # before fastlora is imported

# Triton's interpreter runs the kernels where no GPU is. Triton reads this when transformers
# imports it, so it comes before the imports below.
os.environ["TRITON_INTERPRET"] = "0" if torch.cuda.is_available() else "1"

from torch import fx
from torch.utils._pytree import tree_map

from fastlora.model import Model
from fastlora.runtime import cuda_graph
from fastlora.runtime.compiled import _region as compiled_regions
from fastlora.runtime.cuda_graph import CUDAGraphed
from fastlora.runtime.tree import leaves
from oracles.bitsandbytes_cpu import plain_dequantisation
from oracles.checkpoints import make_checkpoint
from oracles.pairs import Pair, read_pair, read_tiny
from oracles.quantized_bases import FAMILY, oracle


def pytest_addoption(parser: pytest.Parser) -> None:
    """--full: 60 s of streams and 1,000 requests in the server's tests, instead of 1 s and 250, and
    2,000 training steps in test_long_run.py, instead of 90."""
    parser.addoption("--full", action="store_true", help="the long forms of some tests")


def pytest_ignore_collect(collection_path: Path, config: pytest.Config) -> bool | None:
    """`-m compile` imports only the fifth of the files that has such tests."""
    if config.option.markexpr == "compile" and collection_path.suffix == ".py":
        return "mark.compile" not in collection_path.read_text() or None
    return None


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_protocol(item: pytest.Item, nextitem: pytest.Item | None) -> bool:
    """Each test, with its fixtures, runs where Python's calls are cheap."""
    return deep_stack.run(runner.pytest_runtest_protocol, item, nextitem)


@pytest.fixture(scope="module")
def right_bitsandbytes() -> Iterator[None]:
    """bitsandbytes gives right values on the CPU also where blocks of 4 bits span rows.

    For fastlora too, which calls it where rows end with blocks. tests/ops/test_dequantize.py
    compares the two there, without this fixture.
    """
    with plain_dequantisation():
        yield


@pytest.fixture(scope="session")
def pair(tmp_path_factory) -> Callable[..., Pair]:
    """pair(family, dtype): made once a session."""

    @cache
    def of(family: str, dtype: torch.dtype = torch.float32) -> Pair:
        return read_pair(family, tmp_path_factory.mktemp(family), dtype)

    return of


@pytest.fixture(scope="session")
def tiny(tmp_path_factory) -> Model:
    """Two layers in float64, rank 2, dropout 0.2, B not zero: small enough for Hessians."""
    return read_tiny(tmp_path_factory.mktemp("tiny"), num_hidden_layers=2)


@pytest.fixture(scope="session")
def shallow(tmp_path_factory) -> Model:
    """`tiny` with one layer: half of what dynamo traces."""
    return read_tiny(tmp_path_factory.mktemp("shallow"), num_hidden_layers=1)


@pytest.fixture
def fresh_dynamo():
    """Forget what other tests compiled: dynamo's limit of 8 graphs counts per code object."""
    torch._dynamo.reset()
    compiled_regions.cache_clear()
    yield
    compiled_regions.cache_clear()


@pytest.fixture
def region_backend(monkeypatch, fresh_dynamo) -> Callable[[Any], None]:
    """region_backend(backend): what fastlora's own regions compile with from here on."""

    return lambda backend: monkeypatch.setattr("fastlora.runtime.compiled.backend", backend)


@pytest.fixture
def graphs(region_backend) -> list[fx.GraphModule]:
    """A list that gets every graph that dynamo makes of fastlora's regions. They run eagerly."""
    made: list[fx.GraphModule] = []

    def keep(module: fx.GraphModule, _: Any) -> Any:
        made.append(module)
        return module.forward

    region_backend(keep)
    return made


@pytest.fixture
def captures(monkeypatch):
    """CUDA graphs without CUDA: every recording made, each played by running again, into the same
    results."""
    made = []

    def capture(self, run):
        results = tree_map(lambda x: torch.full_like(x, torch.nan), run())  # it runs nothing
        made.append(results)

        def replay():
            for old, new in zip(leaves(results), leaves(run()), strict=True):
                old.copy_(new)

        return replay, results

    monkeypatch.setattr(CUDAGraphed, "_capture", capture)
    monkeypatch.setattr(cuda_graph, "_check_devices", lambda given: None)
    return made


@pytest.fixture(scope="session")
def dense_folder(tmp_path_factory):
    """dense_folder(family, dtype): the folder of a checkpoint in 16 or 32 bits."""

    @cache
    def of(family: str = FAMILY, dtype: torch.dtype = torch.float32) -> Path:
        folder = tmp_path_factory.mktemp(family)
        make_checkpoint(family, folder, dtype)
        return folder

    return of


@pytest.fixture(scope="session")
def quantised_folder(dense_folder, tmp_path_factory):
    """quantised_folder(kind, dtype): a folder that transformers wrote in 4 or 8 bits."""

    @cache
    def of(kind: str, dtype: torch.dtype = torch.float32, storage: str = "uint8") -> Path:
        folder = tmp_path_factory.mktemp("stored")
        more = {} if kind == "int8" else {"bnb_4bit_quant_storage": storage}
        oracle(dense_folder(FAMILY, dtype), kind, dtype, **more).save_pretrained(folder)
        return folder

    return of
