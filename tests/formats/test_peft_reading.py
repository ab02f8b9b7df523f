"""Folders that PEFT wrote, loaded by fastlora. Oracle: PEFT's logits."""

import dataclasses
import json
import warnings

import peft
import pytest
import torch
from peft import PeftModel
from torch.utils._pytree import tree_leaves

from fastlora.adapters.create import lora
from fastlora.errors import CheckpointError
from fastlora.formats.peft.reading import load_adapter
from fastlora.formats.peft.writing import save_adapter
from oracles.checkpoints import FAMILIES
from oracles.peft_cases import ADAPTER_CASES, FORWARD, SEVEN, every_projection
from oracles.peft_side import (
    difference,
    edit,
    fast,
    hf_logits,
    hugging_face,
    import_difference,
    logits,
    peft_read,
    peft_saved,
    rewrite,
    with_random_adapter,
)


@pytest.mark.parametrize("case", ADAPTER_CASES)
def test_adapters_of_peft_load_with_its_logits(case, tmp_path):
    assert import_difference(FORWARD, tmp_path, **ADAPTER_CASES[case]) <= 1e-5


@pytest.mark.parametrize("family", FAMILIES)
def test_adapters_of_peft_load_for_every_family(family, tmp_path):
    assert import_difference(family, tmp_path, **every_projection(family)) <= 1e-5


@pytest.mark.parametrize("init", [False, "orthogonal", "eva"])
def test_initialisations_that_keep_the_base_load(init, tmp_path):
    peft_saved(FORWARD, tmp_path, r=4, target_modules=SEVEN)
    edit(tmp_path, init_lora_weights=init)
    plain = dataclasses.replace(load_adapter(fast(FORWARD), tmp_path))
    assert plain.spec.lora.init_lora_weights == init
    expected = hf_logits(PeftModel.from_pretrained(hugging_face(FORWARD), tmp_path).eval())
    assert difference(logits(plain), expected, logits(fast(FORWARD))) <= 1e-5


def test_overlapping_patterns_are_read_as_peft_reads_them(tmp_path):
    # PEFT writes sorted keys: after the reload the narrow pattern comes second and never matches.
    patterns = {r"layers\.1\.self_attn\.q_proj": 60, "layers.1.self_attn..*": 2}
    assert (
        import_difference(FORWARD, tmp_path, r=4, target_modules=SEVEN, alpha_pattern=patterns)
        <= 1e-5
    )


def test_overlapping_ranks_that_peft_cannot_reload_are_refused_by_name(tmp_path):
    patterns = {"q_proj": 2, r"layers\.1\.self_attn\.q_proj": 6}
    first_wins = {r"layers\.1\.self_attn\.q_proj": 6, "q_proj": 2}
    peft_saved(FORWARD, tmp_path, r=4, target_modules=["q_proj"], rank_pattern=first_wins)
    edit(tmp_path, rank_pattern=patterns)
    with pytest.raises(CheckpointError, match=r"layers\.1\.self_attn\.q_proj\.lora_A"):
        load_adapter(fast(FORWARD), tmp_path)


def test_a_config_of_three_fields_is_enough(tmp_path):
    peft_saved(FORWARD, tmp_path, r=4, lora_alpha=8, target_modules=["q_proj", "v_proj"])
    whole = logits(load_adapter(fast(FORWARD), tmp_path))
    for config in (
        {"peft_type": "LORA", "r": 4, "target_modules": ["v_proj", "q_proj"]},
        {"peft_type": "LORA", "r": 4, "target_modules": None, "lora_alpha": 8.0},
        {"peft_type": "LORA", "r": 4, "base_model_name_or_path": "no/such/model"},
        {"peft_type": "LORA", "r": 4, "a_field_of_tomorrow": None, "another": {}, "third": False},
    ):
        (tmp_path / "adapter_config.json").write_text(json.dumps(config))
        assert torch.equal(logits(load_adapter(fast(FORWARD), tmp_path)), whole)


def test_fields_that_peft_ignores_are_accepted(tmp_path):
    peft_saved(FORWARD, tmp_path, r=4, target_modules=["q_proj", "v_proj"])
    plain = load_adapter(fast(FORWARD), tmp_path)
    edit(
        tmp_path,
        target_modules=["q_proj", "v_proj", "query_key_value"],
        exclude_modules=["wq"],
        layers_to_transform=[0, 1, 2],
        rank_pattern={"wq": 8},
        fan_in_fan_out=True,
    )
    found = load_adapter(fast(FORWARD), tmp_path)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        expected = hf_logits(PeftModel.from_pretrained(hugging_face(FORWARD), tmp_path).eval())
    assert torch.equal(logits(found), logits(plain))
    assert difference(logits(found), expected, logits(fast(FORWARD))) <= 1e-5


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_files_of_other_widths_load_as_float32(dtype, tmp_path):
    peft_saved(FORWARD, tmp_path, r=4, target_modules=SEVEN)
    rewrite(tmp_path, lambda tensors: {k: t.to(dtype) for k, t in tensors.items()})
    model = load_adapter(fast(FORWARD), tmp_path)
    assert {t.dtype for t in tree_leaves(model.adapter)} == {torch.float32}
    expected = hf_logits(peft_read(FORWARD, tmp_path))
    assert difference(logits(model), expected, logits(fast(FORWARD))) <= 1e-5


@pytest.mark.parametrize(
    "rename",
    [
        lambda k: k.replace("base_model.model.", "base_model.model._orig_mod."),
        lambda k: f"_orig_mod.{k}",
        lambda k: k.replace(".weight", ".default.weight"),
    ],
)
def test_keys_of_a_compiled_or_named_adapter_load(rename, tmp_path):
    peft_saved(FORWARD, tmp_path, r=4, target_modules=SEVEN)
    plain = tree_leaves(load_adapter(fast(FORWARD), tmp_path).adapter)
    rewrite(tmp_path, lambda tensors: {rename(k): t for k, t in tensors.items()})
    renamed = tree_leaves(load_adapter(fast(FORWARD), tmp_path).adapter)
    assert all(torch.equal(x, y) for x, y in zip(plain, renamed, strict=True))


def test_loading_replaces_the_adapter_and_does_not_change_the_model(tmp_path):
    first, second = (with_random_adapter(lora(fast(FORWARD), r=r), seed=r) for r in (2, 4))
    save_adapter(second, tmp_path)
    before = logits(first)
    swapped = load_adapter(first, tmp_path)
    assert torch.equal(logits(swapped), logits(second))
    assert torch.equal(logits(first), before)


def test_the_installed_peft_has_the_expected_version():
    assert tuple(int(x) for x in peft.__version__.split(".")[:2]) >= (0, 21)
