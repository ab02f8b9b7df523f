"""Folders of PiSSA, OLoRA and LoftQ adapters, exchanged with PEFT."""

import warnings
from dataclasses import replace

import pytest
import torch
from peft import LoraConfig as PeftConfig
from peft import PeftModel, get_peft_model

from fastlora.adapters.create import lora
from fastlora.errors import CheckpointError
from fastlora.formats.peft import writing
from fastlora.formats.peft.reading import load_adapter
from fastlora.models.init_offset import without_offset
from oracles.init_offset import ALL, BOTH, shaken, start_leaves
from oracles.peft_cases import FORWARD, SEVEN
from oracles.peft_side import (
    difference,
    edit,
    fast,
    hf_logits,
    hugging_face,
    logits,
    peft_read,
    rewrite,
)


@pytest.mark.parametrize(
    "settings",
    ALL,
)
def test_peft_loads_the_export_on_the_untouched_base(settings, tmp_path):
    model = shaken(lora(fast(FORWARD), **BOTH | settings))
    model.save_pretrained(tmp_path)
    base = logits(fast(FORWARD))
    assert difference(hf_logits(peft_read(FORWARD, tmp_path)), logits(model), base) <= 1e-5
    back = load_adapter(model, tmp_path)  # over a base that has start factors already
    assert not start_leaves(back)
    assert difference(logits(back), logits(model), base) <= 1e-5


def test_the_export_has_twice_the_rank_and_the_same_scaling(tmp_path):
    for rslora, alpha in ((False, 24.0), (True, 12 * 2**0.5)):
        model = lora(
            fast(FORWARD), r=4, lora_alpha=12, init_lora_weights="pissa", use_rslora=rslora
        )
        model.save_pretrained(tmp_path)
        back = load_adapter(fast(FORWARD), tmp_path).spec.lora
        assert (back.r, back.lora_alpha, back.init_lora_weights) == (8, alpha, True)
        scalings = [[t.scaling for t in ts] for ts in back.targets]
        expected = [[t.scaling for t in ts] for ts in model.spec.lora.targets]
        torch.testing.assert_close(torch.tensor(scalings), torch.tensor(expected))


def test_an_adapter_without_its_start_factors_is_not_saved(tmp_path):
    model = lora(fast(FORWARD), init_lora_weights="olora")
    model = replace(model, base=without_offset(model.base))
    with pytest.raises(ValueError, match=r"model\.save_pretrained"):
        writing.save_adapter(model, tmp_path / "new")
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize("init", ["pissa", "olora"])
@pytest.mark.parametrize("how", [{}, {"use_rslora": True}, {"use_dora": True}])
def test_folders_of_peft_that_move_the_base_load_with_its_logits(init, how, tmp_path):
    settings = dict(r=4, lora_alpha=8, target_modules=SEVEN, init_lora_weights=init, **how)
    oracle = get_peft_model(hugging_face(FORWARD), PeftConfig(**settings, task_type="CAUSAL_LM"))
    gen = torch.Generator().manual_seed(2)
    for name, p in oracle.named_parameters():
        if "lora_" in name:
            p.data += 0.05 * torch.randn(p.shape, generator=gen)
    oracle.save_pretrained(tmp_path)
    model = load_adapter(fast(FORWARD), tmp_path)
    base = logits(fast(FORWARD))
    assert difference(logits(model), hf_logits(oracle.eval()), base) <= 1e-5
    again = PeftModel.from_pretrained(hugging_face(FORWARD), tmp_path).eval()
    assert difference(logits(model), hf_logits(again), base) <= 1e-5
    model.save_pretrained(tmp_path / "converted")
    converted = hf_logits(peft_read(FORWARD, tmp_path / "converted"))
    assert difference(converted, hf_logits(oracle), base) <= 1e-5
    edit(tmp_path, init_lora_weights=True)  # what forgetting the moved base would give
    wrong = logits(load_adapter(fast(FORWARD), tmp_path))
    assert (wrong - hf_logits(oracle)).abs().max() > 1e-2


def test_a_folder_that_peft_converted_loads(tmp_path):
    settings = dict(r=4, lora_alpha=8, target_modules=SEVEN, init_lora_weights="pissa_niter_4")
    oracle = get_peft_model(hugging_face(FORWARD), PeftConfig(**settings, task_type="CAUSAL_LM"))
    oracle.peft_config["default"].init_lora_weights = True  # as PEFT's examples do
    oracle.save_pretrained(tmp_path / "fresh")
    oracle.peft_config["default"].init_lora_weights = "pissa_niter_4"
    for name, p in oracle.named_parameters():
        if "lora_" in name:
            p.data *= 1.1
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        oracle.save_pretrained(
            tmp_path / "new", path_initial_model_for_weight_conversion=str(tmp_path / "fresh")
        )
    model = load_adapter(fast(FORWARD), tmp_path / "new")
    expected = hf_logits(oracle.eval())
    assert difference(logits(model), expected, logits(fast(FORWARD))) <= 1e-5


@pytest.mark.parametrize("init", ["pissa_niter_4", "loftq", "corda", "lora_ga"])
def test_folders_that_peft_cannot_reproduce_are_refused_with_the_cure(init, tmp_path):
    shaken(lora(fast(FORWARD), r=4)).save_pretrained(tmp_path)
    edit(tmp_path, init_lora_weights=init)
    with pytest.raises(CheckpointError) as refused:
        load_adapter(fast(FORWARD), tmp_path)
    for part in (f"init_lora_weights='{init}'", "not in the folder", "path_initial_model_for"):
        assert part in str(refused.value)


@pytest.mark.parametrize(
    ("fields", "message"),
    [(dict(r=70), "70"), (dict(lora_alpha=0), "root"), (dict(lora_alpha=-8), "root")],
)
def test_settings_no_pissa_has_are_refused(fields, message, tmp_path):
    shaken(lora(fast(FORWARD), r=4)).save_pretrained(tmp_path)
    edit(tmp_path, init_lora_weights="pissa", **fields)
    if "r" in fields:
        grow = lambda x: torch.zeros([70 if n == 4 else n for n in x.shape])
        rewrite(tmp_path, lambda tensors: {k: grow(x) for k, x in tensors.items()})
    with pytest.raises(CheckpointError, match=message):
        load_adapter(fast(FORWARD), tmp_path)
