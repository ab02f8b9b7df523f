"""Merged mixtures of experts, and the layouts of their files."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch.utils._pytree import tree_leaves

from fastlora.adapters.create import lora
from fastlora.adapters.edits.merging import merge
from fastlora.checkpoints.reading import read_base
from fastlora.errors import CheckpointError
from fastlora.formats.merged import save_merged
from fastlora.loading import load
from fastlora.models.names import tensors_from_base
from oracles.checkpoints import make_checkpoint, mapped_from
from oracles.expert_cases import BOTH, EXPERT_CASES
from oracles.peft_side import difference, fast, logits, with_random_adapter


@pytest.mark.parametrize("name", ["both", "down_proj", "all-linear", "rank_pattern"])
def test_a_merge_is_the_adapter(name):
    family, settings = EXPERT_CASES[name]
    model = with_random_adapter(lora(fast(family), **settings))
    merged = merge(model)
    assert difference(logits(merged), logits(model), logits(fast(family))) <= 1e-5
    kept, before = tree_leaves(merged.base), tree_leaves(model.base)
    shared = {x.data_ptr() for x in before} & {x.data_ptr() for x in kept}
    touched = sum(len(t) for t in model.spec.lora.targets)
    assert len(shared) == len(before) - touched


@pytest.mark.parametrize("family", ["mixtral", "qwen3_moe_mixed"])
def test_merged_folders_spell_every_expert_and_load(family, tmp_path):
    model = with_random_adapter(lora(fast(family, torch.bfloat16), r=4, target_parameters=BOTH))
    save_merged(model, tmp_path)
    names = load_file(tmp_path / "model.safetensors").keys()
    make_checkpoint(family, tmp_path / "theirs", torch.bfloat16)
    assert names == load_file(tmp_path / "theirs" / "model.safetensors").keys()
    config, base = read_base(tmp_path)
    expected = tensors_from_base(model.spec.config, merge(model).base)
    for name, tensor in tensors_from_base(config, base).items():
        assert torch.equal(tensor, expected[name]), name


def spelled_as_one(folder: Path) -> None:
    """Rewrite a checkpoint with all experts of a layer in one tensor."""
    config, base = read_base(folder)
    tensors = {k: v.clone() for k, v in tensors_from_base(config, base).items()}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


@pytest.mark.parametrize("family", ["mixtral", "qwen3_moe_mixed"])
def test_a_base_with_all_experts_in_one_tensor_stays_mapped(family, tmp_path):
    hf = make_checkpoint(family, tmp_path)
    spelled_as_one(tmp_path)
    config, base = read_base(tmp_path)
    for name, tensor in tensors_from_base(config, base).items():
        assert torch.equal(tensor, hf.state_dict()[name])
        assert mapped_from(tensor) == str(tmp_path / "model.safetensors")


def test_every_wrong_expert_of_a_base_is_named(tmp_path):
    make_checkpoint("mixtral", tmp_path)
    path, prefix = tmp_path / "model.safetensors", "model.layers.1.block_sparse_moe.experts"
    tensors = load_file(path)
    del tensors[f"{prefix}.2.w3.weight"]
    tensors[f"{prefix}.9.w3.weight"] = torch.zeros(56, 32)
    tensors[f"{prefix}.0.w2.weight"] = torch.zeros(56, 32)
    tensors[f"{prefix}.1.w2.weight"] = torch.zeros(32, 56, dtype=torch.int32)
    save_file(tensors, path)
    with pytest.raises(CheckpointError) as error:
        load(tmp_path, device="cpu")
    for words in (
        f"missing     {prefix}.2.w3.weight (56, 32)",
        f"unexpected  {prefix}.9.w3.weight",
        f"shape       {prefix}.0.w2.weight",
        f"dtype       {prefix}.1.w2.weight",
    ):
        assert words in str(error.value)


def test_shards_of_experts_load(tmp_path):
    hf = make_checkpoint("qwen3_moe", tmp_path, max_shard_size="20kB")
    config, base = read_base(tmp_path, dtype=torch.float64)
    for name, tensor in tensors_from_base(config, base).items():
        assert torch.equal(tensor, hf.state_dict()[name].double())


def test_a_merge_that_overflows_is_refused(tmp_path):
    model = with_random_adapter(
        lora(fast("mixtral", torch.float16), r=4, target_parameters=BOTH), std=1e3
    )
    with pytest.raises(ValueError, match=r"mlp\.experts\.gate_up_proj"):
        merge(model)
