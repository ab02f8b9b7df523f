"""restore_adapter: the values of a saved folder come back, in place, into the same model only."""

from dataclasses import replace

import pytest
import torch
from torch.utils._pytree import tree_leaves, tree_map

from fastlora import lora
from fastlora.errors import CheckpointError
from fastlora.formats.peft.restoring import restore_adapter
from fastlora.models.init_offset import offsets
from oracles.peft_cases import FORWARD
from oracles.peft_side import fast, with_random_adapter
from oracles.trees import same_bits


def own_copy(model):
    """The model with an adapter of zeros in memory of its own."""
    return replace(model, adapter=tree_map(torch.zeros_like, model.adapter))


@pytest.mark.parametrize("family", [FORWARD, "qwen3_moe"])
def test_values_are_restored_in_place(family, tmp_path):
    saved = with_random_adapter(lora(fast(family), r=4))
    saved.save_pretrained(tmp_path)
    model = own_copy(saved)
    before = tree_leaves(model.adapter)
    assert restore_adapter(model, tmp_path) is model
    assert all(a is b for a, b in zip(tree_leaves(model.adapter), before, strict=True))
    assert same_bits(model.adapter, saved.adapter)


def test_the_initial_offset_of_the_folder_is_restored(tmp_path):
    saved = with_random_adapter(lora(fast(FORWARD), r=4, init_lora_weights="pissa"))
    saved.save_pretrained(tmp_path)
    model = own_copy(lora(fast(FORWARD), r=4, init_lora_weights="olora"))
    restored = restore_adapter(model, tmp_path)
    assert same_bits(restored.adapter, saved.adapter)
    for layer, expected in zip(restored.base["layers"], saved.base["layers"], strict=True):
        assert same_bits(offsets(layer), offsets(expected))


def test_every_difference_from_the_folder_is_listed(tmp_path):
    lora(fast(FORWARD), r=4, target_modules=["q_proj", "v_proj"]).save_pretrained(tmp_path)
    model = lora(fast(FORWARD), r=8, target_modules=["q_proj", "k_proj"])
    before = tree_map(torch.clone, model.adapter)
    with pytest.raises(CheckpointError) as refused:
        restore_adapter(model, tmp_path)
    assert same_bits(model.adapter, before)
    for words in (r"q_proj.lora_A.weight: the file has (4, ", "no such tensor", "k_proj"):
        assert words in str(refused.value), words
