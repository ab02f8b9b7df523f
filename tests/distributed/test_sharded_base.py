"""A base sharded over processes: the bits of the base that is whole. Laws in oracles/."""

import pytest
import torch

import fastlora
from fastlora.checkpoints.tensors import read_safetensors, write_safetensors
from oracles.checkpoints import make_checkpoint
from oracles.ranks import run_laws
from oracles.sharding_laws import FOUR, TWO

# A vocabulary and widths that no number of ranks divides.
SIZES = dict(vocab_size=97, hidden_size=24, intermediate_size=52, num_hidden_layers=3)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    root = tmp_path_factory.mktemp("sharded")
    make_checkpoint("llama_bias", root / "llama_bias", torch.bfloat16, config=SIZES)
    make_checkpoint("mixtral", root / "mixtral")
    make_checkpoint("llama_bias", root / "broken", torch.bfloat16, config=SIZES)
    path = root / "broken" / "model.safetensors"
    tensors = {k: x.clone() for k, x in read_safetensors(path).items()}
    tensors["model.layers.0.self_attn.k_proj.weight"][0, 0] = torch.nan
    write_safetensors(path, tensors)
    return root


@pytest.fixture(scope="module")
def results(folder):
    """Law -> what each process found."""
    two, four = folder / "two", folder / "four"
    for run in (two, four):
        run.mkdir()
        for name in ("llama_bias", "mixtral", "broken"):
            (run / name).symlink_to(folder / name)
    return run_laws(2, TWO, two) | run_laws(4, FOUR, four)


@pytest.mark.parametrize("law", [*TWO, *FOUR])
def test_law(law, results):
    assert results[law] == [[]] * (4 if law in FOUR else 2)


def test_several_ranks_are_asked_of_one_process(folder):
    with pytest.raises(ValueError, match="shard=2: this is the only rank"):
        fastlora.load(folder / "llama_bias", device="cpu", shard=2)
