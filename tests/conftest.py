"""What several test files share: tiny checkpoints, read once here and once by transformers."""

import copy
import os
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch

from fastlora.runtime import cuda_graph

# Triton's interpreter, for the kernels' tests; transformers imports triton, which reads this then.
os.environ["TRITON_INTERPRET"] = "0" if torch.cuda.is_available() else "1"

from models import make_checkpoint
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map
from transformers import PreTrainedModel

import fastlora
from fastlora.model import Model
from fastlora.runtime.compiled import _region as compiled_regions
from fastlora.runtime.cuda_graph import CUDAGraphed
from fastlora.runtime.tree import leaves


class Pair(NamedTuple):
    """One checkpoint, read by both sides."""

    folder: Path
    model: Model
    oracle: PreTrainedModel

    def fresh_oracle(self) -> PreTrainedModel:
        """A copy: dynamic RoPE remembers the longest input it has seen."""
        return copy.deepcopy(self.oracle)

    @torch.no_grad()
    def theirs(self, input_ids: Tensor, **inputs: Any) -> Tensor:
        """transformers' logits."""
        return self.fresh_oracle()(input_ids, **inputs).logits


def read_pair(family: str, folder: Path, dtype: torch.dtype = torch.float32, **config: Any) -> Pair:
    """Write a checkpoint of a family, and read it with transformers and with fastlora.

    128 tokens are allowed, beyond dynamic RoPE's trained 16.
    """
    oracle = make_checkpoint(family, folder, dtype, config=config)
    model, _ = fastlora.load(folder, max_seq_length=128, device="cpu")
    return Pair(folder, model, oracle)


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


def read_tiny(folder: Path, **config: Any) -> Model:
    sizes = dict(vocab_size=24, hidden_size=16, intermediate_size=20)
    heads = dict(num_attention_heads=2, num_key_value_heads=1)
    make_checkpoint("llama2", folder, config=sizes | heads | config)
    model, _ = fastlora.load(folder, dtype="float64", device="cpu")
    return adapted(model, r=2, lora_dropout=0.2)


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


def adapted(model: Model, seed: int = 0, **settings: Any) -> Model:
    """The model with LoRA whose A and B are both random, in the base's dtype or wider."""
    model = fastlora.lora(model, **settings)
    wide = torch.promote_types(model.base["norm"].dtype, torch.float32)
    return model.with_adapter(randomised(tree_map(lambda x: x.to(wide), model.adapter), seed))


def randomised(tree: Any, seed: int, std: float = 0.2) -> Any:
    """A tree of the same shapes and dtypes, drawn from a normal distribution."""
    gen = torch.Generator().manual_seed(seed)
    return tree_map(lambda x: std * torch.randn(x.shape, generator=gen, dtype=x.dtype), tree)


def token_ids(*shape: int, seed: int = 0, vocab_size: int = 24) -> Tensor:
    """Random ids."""
    return torch.randint(vocab_size, shape, generator=torch.Generator().manual_seed(seed))


def relative_error(actual: Any, expected: Any) -> float:
    """Largest over the leaves of |actual - expected|max / |expected|max; inf where a leaf is zero
    that should not be, so that a dropped gradient cannot pass."""
    errors = []
    pairs = zip(tree_leaves(actual), tree_leaves(expected), strict=True)
    for a, e in pairs:
        assert a.shape == e.shape
        errors.append(((a - e).abs().max() / e.abs().max()).item() if e.any() else float("inf"))
    return max(errors)


def same_bits(actual: Any, expected: Any) -> bool:
    """Whether two trees are equal bit for bit, signed zeros apart."""
    pairs = zip(tree_leaves(actual), tree_leaves(expected), strict=True)
    return all(torch.equal(a, e) for a, e in pairs)


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
