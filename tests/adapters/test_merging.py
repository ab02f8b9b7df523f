"""merge(): the merged model computes what the adapted one does, and rounds once."""

import dataclasses

import pytest
import torch
from torch.utils._pytree import tree_map

from fastlora.adapters.create import lora
from fastlora.adapters.edits.merging import merge
from fastlora.formats.peft.writing import save_adapter
from fastlora.models.names import projection_path, tensors_from_base
from oracles.peft_cases import ADAPTER_CASES, FORWARD
from oracles.peft_side import difference, fast, logits, peft_read, with_random_adapter


@pytest.mark.parametrize("case", ["seven names", "both patterns, rslora", "one layer"])
def test_merging_equals_applying(case):
    model = with_random_adapter(lora(fast(FORWARD), **ADAPTER_CASES[case]))
    merged = merge(model)
    assert merged.adapter is None and merged.spec.lora is None
    assert difference(logits(merged), logits(model), logits(fast(FORWARD))) <= 1e-5


def test_merging_equals_merging_in_peft(tmp_path):
    model = with_random_adapter(lora(fast(FORWARD), r=4))
    save_adapter(model, tmp_path)
    theirs = peft_read(FORWARD, tmp_path).merge_and_unload().state_dict()
    ours = tensors_from_base(model.spec.config, merge(model).base)
    assert max((ours[k] - theirs[k]).abs().max().item() for k in ours) <= 1e-6


def test_merging_lora_bias_needs_a_bias_in_the_base():
    settings = dict(r=4, lora_alpha=8, lora_bias=True)
    model = with_random_adapter(lora(fast("llama_bias"), **settings))
    found, expected = logits(merge(model)), logits(model)
    assert difference(found, expected, logits(fast("llama_bias"))) <= 1e-5
    with pytest.raises(ValueError, match="lora_bias cannot be merged") as refused:
        merge(lora(fast("qwen2"), **settings))
    assert "o_proj" in str(refused.value) and "q_proj" not in str(refused.value)


@pytest.mark.parametrize("family", [FORWARD, "llama_bias"])
def test_merging_dora_equals_applying_it(family):
    model = with_random_adapter(lora(fast(family), r=4, use_dora=True))
    assert difference(logits(merge(model)), logits(model), logits(fast(family))) <= 1e-5


def test_merging_copies_only_what_it_touches():
    model = with_random_adapter(
        lora(fast(FORWARD), r=4, target_modules=["v_proj"], layers_to_transform=1)
    )
    before = tensors_from_base(model.spec.config, model.base)
    kept = {k: t.clone() for k, t in before.items()}
    after = tensors_from_base(model.spec.config, merge(model).base)
    new = {k for k in before if after[k].data_ptr() != before[k].data_ptr()}
    assert new == {f"{projection_path(1, 'v_proj')}.weight"}
    assert all(torch.equal(before[k], kept[k]) for k in before)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_merging_rounds_once(dtype):
    model = fast(FORWARD)
    model = dataclasses.replace(model, base=tree_map(lambda t: t.to(dtype), model.base))
    model = with_random_adapter(lora(model, r=4, target_modules=["up_proj"]))
    name = "up_proj"
    a, b = (t.double() for t in model.adapter["layers"][0][name])
    weight = model.base["layers"][0][name]["weight"]
    exact = weight.double() + model.spec.lora.targets[0][0].scaling * (b @ a)
    merged = merge(model).base["layers"][0][name]["weight"]
    assert merged.dtype == dtype
    # Half a unit in the last place, and fp32's own error where the sum is fp32.
    allowed = exact.abs() * (torch.finfo(dtype).eps / 2 + 1e-6 * (dtype != torch.float64)) + 1e-7
    assert ((merged.double() - exact).abs() <= allowed).all()


def test_a_merge_that_would_overflow_is_refused_by_name():
    model = fast(FORWARD)
    model = dataclasses.replace(model, base=tree_map(lambda t: t.half(), model.base))
    model = lora(model, r=4, target_modules=["up_proj", "v_proj"])
    huge = tree_map(lambda t: torch.full_like(t, 1e3), model.adapter)
    with pytest.raises(ValueError, match="Merging would put NaN or infinity") as refused:
        merge(model.with_adapter(huge))
    assert str(refused.value).count("v_proj.weight") == 2


def test_merging_nothing_is_refused():
    with pytest.raises(ValueError, match="no adapter"):
        merge(fast(FORWARD))
