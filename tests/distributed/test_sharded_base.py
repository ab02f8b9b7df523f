"""A base sharded over processes: the bits of the base that is whole. Laws in oracles/."""

import json

import pytest
import torch

import fastlora
from fastlora.checkpoints.tensors import read_safetensors, write_safetensors
from oracles.checkpoints import make_checkpoint
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
    make_checkpoint("llama_bias", root / "int8", torch.bfloat16, config=SIZES)
    write_in_8_bits(root / "int8")
    return root


def write_in_8_bits(folder):
    """Rewrite the projections of a folder in bitsandbytes' 8 bits."""
    path, config = folder / "model.safetensors", folder / "config.json"
    tensors = {k: x.clone() for k, x in read_safetensors(path).items()}
    for name in [n for n in tensors if n.endswith("_proj.weight")]:
        scale = tensors[name].float().abs().amax(1)
        values = (tensors[name].float() / scale[:, None] * 127).round()
        tensors |= {name: values.to(torch.int8), f"{name.removesuffix('weight')}SCB": scale}
    write_safetensors(path, tensors)
    how = {"quant_method": "bitsandbytes", "load_in_8bit": True}
    config.write_text(json.dumps(json.loads(config.read_text()) | {"quantization_config": how}))


@pytest.fixture(scope="module")
def failures(folder, results):
    """Law -> what each process found."""
    found = {}
    for ranks, laws in ((2, TWO), (4, FOUR)):
        run = folder / str(ranks)
        run.mkdir()
        for name in ("llama_bias", "mixtral", "broken", "int8"):
            (run / name).symlink_to(folder / name)
        every = results("sharding", ranks, names=[*laws], scratch=run)
        found |= {law: [of_rank[law] for of_rank in every] for law in laws}
    return found


@pytest.mark.parametrize("law", [*TWO, *FOUR])
def test_law(law, failures):
    assert failures[law] == [[]] * (4 if law in FOUR else 2)


def test_several_ranks_are_asked_of_one_process(folder):
    with pytest.raises(ValueError, match="shard=2: this is the only rank"):
        fastlora.load(folder / "llama_bias", device="cpu", shard=2)


def test_rank_0_writes_gguf_files(results):
    assert results("gguf", 2) == [[True, True]] * 2
