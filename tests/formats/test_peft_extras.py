"""Folders of adapters that train more than projections: grown vocabularies, wrong files."""

import copy
import re
import time

import pytest
import torch
from peft import PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from torch.utils._pytree import tree_leaves

from fastlora import functional
from fastlora.adapters.create import lora
from fastlora.errors import CheckpointError
from fastlora.formats.peft.reading import load_adapter
from oracles.extras_cases import ENDS, EXTRAS_CASES, Q, T, U
from oracles.peft_side import (
    checkpoint,
    difference,
    edit,
    fast,
    hf_logits,
    hugging_face,
    logits,
    peft_config,
    peft_saved,
    with_random_adapter,
)
from oracles.trees import same_bits

# ── a file with another embedding ─────────────────────────────────────────────────────────


def resized_peft(family, rows, folder, **settings):
    """PEFT over a base with `rows` tokens more, with random adapter, saved."""
    hf = hugging_face(family)
    hf.resize_token_embeddings(96 + rows)
    hf.name_or_path = str(checkpoint(family)[0])
    hf.config._name_or_path = hf.name_or_path
    resized = copy.deepcopy(hf)
    model = get_peft_model(hf, peft_config(r=4, **settings))
    gen = torch.Generator().manual_seed(2)
    for p in model.parameters():
        if p.requires_grad:
            p.data.copy_(0.15 * torch.randn(p.shape, generator=gen))
    model.save_pretrained(folder)
    return model.eval(), resized


GROWN = {
    "LoRA": dict(target_modules=Q),
    "rows": dict(target_modules=Q, trainable_token_indices=[97, 99, 3]),
    "LoRA on both": dict(target_modules=[*Q, *ENDS]),
    "both saved": dict(target_modules=Q, modules_to_save=ENDS),
}

LONG_IDS = torch.randint(0, 100, (2, 11), generator=torch.Generator().manual_seed(8))


@pytest.mark.parametrize("case", GROWN)
@pytest.mark.parametrize("family", [U, T])
def test_peft_and_fastlora_exchange_an_adapter_over_a_grown_vocabulary(family, case, tmp_path):
    peft, resized = resized_peft(family, 4, tmp_path / "theirs", **GROWN[case])
    model = load_adapter(fast(family), tmp_path / "theirs")
    assert model.spec.config.vocab_size == 100
    ours = functional.forward(model.adapter, model.base, model.spec, LONG_IDS)
    with torch.no_grad():
        expected = peft(input_ids=LONG_IDS).logits
    assert difference(ours, expected, torch.zeros_like(expected)) <= 1e-5
    model.save_pretrained(tmp_path / "ours")
    theirs, again = (
        load_file(tmp_path / n / "adapter_model.safetensors") for n in ("theirs", "ours")
    )
    twice = r"_module\.|_to_save\.|lm_head\.token_adapter\.trainable"
    assert all(re.search(twice, key) for key in theirs.keys() - again.keys())
    assert all(torch.equal(theirs[k], again[k]) for k in again if k in theirs)
    back = PeftModel.from_pretrained(resized, tmp_path / "ours").eval()
    with torch.no_grad():
        assert difference(back(input_ids=LONG_IDS).logits, expected, torch.zeros_like(ours)) <= 1e-5


def test_a_base_layer_of_the_file_overrides_the_bases(tmp_path):
    """PEFT's save_embedding_layers writes the base's matrix, and PEFT reads it back."""
    family, settings = EXTRAS_CASES["tied, LoRA on embed_tokens"]
    peft_saved(family, tmp_path, **settings)
    key = "base_model.model.model.embed_tokens.base_layer.weight"
    path = tmp_path / "adapter_model.safetensors"
    tensors = load_file(path)
    assert key in tensors
    plain = load_adapter(fast(family), tmp_path)
    assert plain.spec.changed == () and same_bits(plain.base, fast(family).base)
    save_file(tensors | {key: tensors[key] * 1.5}, path)
    model = load_adapter(fast(family), tmp_path)
    assert model.spec.changed == ("model.embed_tokens.weight",)
    expected = hf_logits(PeftModel.from_pretrained(hugging_face(family), tmp_path).eval())
    assert difference(logits(model), expected, hf_logits(checkpoint(family)[1])) <= 1e-5
    model.save_pretrained(tmp_path / "again")
    again = load_adapter(fast(family), tmp_path / "again")
    assert torch.equal(logits(again), logits(model))


# ── wrong files ───────────────────────────────────────────────────────────────────────────


EMBED, HEAD = "base_model.model.model.embed_tokens.", "base_model.model.lm_head."


def added(key, tensor):
    return lambda tensors: tensors | {key: tensor}


WRONG_FILES = {
    "a head that is not the embedding's": (
        "kept tied, save both",
        lambda ts: ts | {HEAD + "weight": ts[HEAD + "weight"] + 1},
        "untied",
    ),
    "a head's factors that are not the embedding's": (
        "kept tied, LoRA on both",
        lambda ts: ts | {HEAD + "lora_A.weight": ts[HEAD + "lora_A.weight"] + 1},
        "untied",
    ),
    "two base matrices over a tied base": (
        "tied, LoRA on both",
        lambda ts: (
            ts
            | {HEAD + "base_layer.weight": torch.ones(96, 32)}
            | {EMBED + "base_layer.weight": torch.zeros(96, 32)}
        ),
        "two heads",
    ),
    "only one matrix grown": (
        "LoRA on embed_tokens",
        added(EMBED + "base_layer.weight", torch.ones(100, 32)),
        "only one of embedding and head",
    ),
    "fewer rows": (
        "LoRA on embed_tokens",
        added(EMBED + "base_layer.weight", torch.ones(90, 32)),
        "the base has 96",
    ),
    "another width": (
        "LoRA on embed_tokens",
        added(EMBED + "base_layer.weight", torch.ones(96, 30)),
        "30 columns",
    ),
    "a vector": (
        "LoRA on embed_tokens",
        added(EMBED + "base_layer.weight", torch.ones(96)),
        "expected a matrix",
    ),
    "NaN in a base's matrix": (
        "LoRA on embed_tokens",
        added(EMBED + "base_layer.weight", torch.full((96, 32), float("nan"))),
        "NaN",
    ),
    "integers": (
        "LoRA on embed_tokens",
        added(EMBED + "base_layer.weight", torch.ones(96, 32, dtype=torch.int32)),
        "is not a floating-point dtype",
    ),
    "rows missing": (
        "rows",
        lambda ts: {k: v for k, v in ts.items() if "delta" not in k},
        "missing",
    ),
    "too few rows": (
        "rows",
        lambda ts: {k: v[:1].clone() if "delta" in k else v for k, v in ts.items()},
        "shape",
    ),
    "a bias too many": (
        "bias=lora_only",
        added("base_model.model.model.layers.0.self_attn.k_proj.bias", torch.ones(16)),
        "unexpected",
    ),
    "float8 for a base's matrix": (
        "LoRA on embed_tokens",
        added(EMBED + "base_layer.weight", torch.ones(96, 32).to(torch.float8_e4m3fn)),
        "is not a floating-point dtype",
    ),
    "a base's matrix twice": (
        "LoRA on embed_tokens",
        lambda ts: (
            ts
            | {EMBED + "base_layer.weight": torch.ones(96, 32)}
            | {EMBED + "weight": torch.ones(96, 32)}
        ),
        "twice",
    ),
    "a base's matrix beside a copy": (
        "save lm_head",
        added(HEAD + "base_layer.weight", torch.ones(96, 32)),
        "unexpected",
    ),
    "a copy of more rows than a tied base": (
        "tied, save lm_head",
        added(HEAD + "weight", torch.ones(100, 32)),
        "no matrix of the base itself",
    ),
    "a copy of the embedding of more rows": (
        "tied, save embed_tokens",
        added(EMBED + "weight", torch.ones(100, 32)),
        "no matrix of the base itself",
    ),
    "more than float32 holds": (
        "LoRA on embed_tokens",
        added(EMBED + "base_layer.weight", torch.full((96, 32), 1e300, dtype=torch.float64)),
        "too large",
    ),
    "a norm missing": (
        "save model.norm",
        lambda ts: {k: v for k, v in ts.items() if "norm" not in k},
        "missing",
    ),
}


@pytest.mark.parametrize("wrong", WRONG_FILES)
def test_a_wrong_file_is_refused_by_name(wrong, tmp_path):
    case, change, message = WRONG_FILES[wrong]
    family, settings = EXTRAS_CASES[case]
    with_random_adapter(lora(fast(family), **settings)).save_pretrained(tmp_path)
    path = tmp_path / "adapter_model.safetensors"
    save_file({k: v.contiguous().clone() for k, v in change(load_file(path)).items()}, path)
    model = fast(family)
    before = [x.clone() for x in tree_leaves(model.base)]
    with pytest.raises(CheckpointError) as refused:
        load_adapter(model, tmp_path)
    assert message in str(refused.value) and str(path) in str(refused.value)
    assert same_bits(tree_leaves(model.base), before)


# ── hostile configs ───────────────────────────────────────────────────────────────────────


HOSTILE = {
    "many names": dict(modules_to_save=[f"layer{i}norm" for i in range(9000)]),
    "many ids": dict(trainable_token_indices={"embed_tokens": [3] * 60_000}),
    "ids beyond words": dict(trainable_token_indices={"embed_tokens": [2**40]}),
    "text for ids": dict(trainable_token_indices={"embed_tokens": "abc"}),
    "lists for ids": dict(trainable_token_indices={"embed_tokens": [[3]]}),
    "a name": dict(modules_to_save="norm"),
    "nested names": dict(modules_to_save=[["norm"]]),
    "a pattern": dict(modules_to_save=["([a-z.]+)+!"]),
    "null for bias": dict(bias=None),
    "yes": dict(ensure_weight_tying="yes"),
    "nothing to copy": dict(modules_to_save=["norm"]),
}


@pytest.mark.parametrize("what", HOSTILE)
def test_a_hostile_config_is_refused_in_a_second(what, tmp_path):
    model = with_random_adapter(lora(fast(U), r=4, target_modules=Q))
    model.save_pretrained(tmp_path)
    edit(tmp_path, **HOSTILE[what])
    start = time.process_time()
    with pytest.raises(CheckpointError):
        load_adapter(fast(U), tmp_path)
    assert time.process_time() - start < 2


def test_rows_of_an_untied_pair_need_not_be_alike_to_be_read(tmp_path):
    """PEFT warns that ensure_weight_tying has no effect, and reads it."""
    family, settings = EXTRAS_CASES["rows of both, untied"]
    model = with_random_adapter(lora(fast(family), **settings))
    model.save_pretrained(tmp_path)
    edit(tmp_path, ensure_weight_tying=True)
    assert torch.equal(logits(load_adapter(fast(family), tmp_path)), logits(model))
