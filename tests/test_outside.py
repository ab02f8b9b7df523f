"""Biases, whole tensors, embedding, head and single rows: PEFT's rules and numbers.

Both sides start from the same folders as in test_export.py, whose oracles these cases are run with;
scripts/compare_peft.py prints what they measure.
"""

import copy
import re
import time

import numpy as np
import pytest
import torch
from conftest import same_bits
from jaxtyping import TypeCheckError
from peft import PeftModel, get_peft_model, get_peft_model_state_dict
from safetensors.torch import load_file, save_file
from test_export import (
    IDS,
    checkpoint,
    difference,
    edit,
    export_difference,
    fast,
    hf_logits,
    hugging_face,
    import_difference,
    logits,
    peft_config,
    peft_read,
    peft_saved,
    randomised,
    step_difference,
)
from torch.utils._pytree import tree_leaves, tree_map
from transformers import AutoModelForCausalLM

import fastlora
from fastlora import functional
from fastlora.adapters.create import lora
from fastlora.adapters.edits.combining import combine, disable
from fastlora.adapters.edits.merging import merge
from fastlora.errors import CheckpointError
from fastlora.formats.merged import save_merged
from fastlora.formats.peft.names import peft_state_dict
from fastlora.formats.peft.reading import load_adapter

T, U, B = "llama3.2", "llama2", "llama_bias"  # tied, untied, with biases
Q = ["q_proj", "v_proj", "down_proj"]
ENDS = ["embed_tokens", "lm_head"]

# Name -> (family, arguments that mean the same to fastlora.lora and to peft.LoraConfig).
CASES = {
    "bias=all": (B, dict(target_modules=Q, bias="all")),
    "bias=all, one layer adapted": (B, dict(target_modules=Q, bias="all", layers_to_transform=[1])),
    "bias=lora_only": (B, dict(target_modules=Q, bias="lora_only")),
    "bias=all, lora_bias": (B, dict(target_modules=Q, bias="all", lora_bias=True)),
    "bias=all, DoRA": (B, dict(target_modules=Q, bias="all", use_dora=True)),
    "bias=lora_only, Qwen2": ("qwen2", dict(target_modules=Q, bias="lora_only")),
    "bias=all, a bias saved whole": (
        B,
        dict(target_modules=Q, bias="all", modules_to_save=["0.self_attn.k_proj"]),
    ),
    "save norm (every norm)": (U, dict(target_modules=Q, modules_to_save=["norm"])),
    "save norm, Qwen3": ("qwen3", dict(target_modules=Q, modules_to_save=["norm"])),
    "save model.norm": (U, dict(target_modules=Q, modules_to_save=["model.norm"])),
    "save one layer's norm": (U, dict(target_modules=Q, modules_to_save=["1.input_layernorm"])),
    "save a projection": (U, dict(target_modules=Q, modules_to_save=["v_proj"])),
    "save both ends and norms": (U, dict(target_modules=Q, modules_to_save=[*ENDS, "norm"])),
    "save embed_tokens": (U, dict(target_modules=Q, modules_to_save=["embed_tokens"])),
    "save lm_head": (U, dict(target_modules=Q, modules_to_save=["lm_head"])),
    "tied, save lm_head": (T, dict(target_modules=Q, modules_to_save=["lm_head"])),
    "tied, save embed_tokens": (T, dict(target_modules=Q, modules_to_save=["embed_tokens"])),
    "tied, save both": (T, dict(target_modules=Q, modules_to_save=ENDS)),
    "kept tied, save lm_head": (
        T,
        dict(target_modules=Q, modules_to_save=["lm_head"], ensure_weight_tying=True),
    ),
    "kept tied, save embed_tokens": (
        T,
        dict(target_modules=Q, modules_to_save=["embed_tokens"], ensure_weight_tying=True),
    ),
    "kept tied, save both": (
        T,
        dict(target_modules=Q, modules_to_save=ENDS, ensure_weight_tying=True),
    ),
    "LoRA on embed_tokens": (U, dict(target_modules=[*Q, "embed_tokens"])),
    "LoRA on lm_head": (U, dict(target_modules=[*Q, "lm_head"])),
    "LoRA on both": (U, dict(target_modules=[*Q, *ENDS], lora_alpha=7)),
    "LoRA on both, regex": (U, dict(target_modules=r".*(v_proj|embed_tokens|lm_head)")),
    "LoRA on both, patterns": (
        U,
        dict(
            target_modules=[*Q, *ENDS],
            rank_pattern={"embed_tokens": 3, "lm_head": 6},
            alpha_pattern={"lm_head": 5, "q_proj": 2},
            use_rslora=True,
        ),
    ),
    "LoRA on both, dropout": (U, dict(target_modules=[*Q, *ENDS], lora_dropout=0.3)),
    "LoRA on both, DoRA": (U, dict(target_modules=[*Q, *ENDS], use_dora=True)),
    "LoRA on lm_head, lora_bias": (U, dict(target_modules=[*Q, "lm_head"], lora_bias=True)),
    "LoRA on embed_tokens, lm_head saved": (
        U,
        dict(target_modules=[*Q, "embed_tokens"], modules_to_save=["lm_head"]),
    ),
    "tied, LoRA on embed_tokens": (T, dict(target_modules=[*Q, "embed_tokens"])),
    "tied, LoRA on lm_head": (T, dict(target_modules=[*Q, "lm_head"])),
    "tied, LoRA on both": (T, dict(target_modules=[*Q, *ENDS])),
    "tied, LoRA on both, DoRA": (T, dict(target_modules=[*Q, *ENDS], use_dora=True)),
    "tied, LoRA on lm_head, embed_tokens saved": (
        T,
        dict(target_modules=[*Q, "lm_head"], modules_to_save=["embed_tokens"]),
    ),
    "tied, LoRA on embed_tokens, lm_head saved": (
        T,
        dict(target_modules=[*Q, "embed_tokens"], modules_to_save=["lm_head"]),
    ),
    "kept tied, LoRA on embed_tokens": (
        T,
        dict(target_modules=[*Q, "embed_tokens"], ensure_weight_tying=True),
    ),
    "kept tied, LoRA on lm_head": (
        T,
        dict(target_modules=[*Q, "lm_head"], ensure_weight_tying=True),
    ),
    "kept tied, LoRA on both": (T, dict(target_modules=[*Q, *ENDS], ensure_weight_tying=True)),
    "kept tied, LoRA on both, patterns": (
        T,
        dict(
            target_modules=[*Q, *ENDS],
            ensure_weight_tying=True,
            rank_pattern={"embed_tokens": 3, "lm_head": 3},
            alpha_pattern={"embed_tokens": 5, "lm_head": 5},
        ),
    ),
    "rows": (U, dict(target_modules=Q, trainable_token_indices=[7, 3])),
    "rows, tied": (T, dict(target_modules=Q, trainable_token_indices=[7, 3, 95])),
    "rows of the head": (T, dict(target_modules=Q, trainable_token_indices={"lm_head": [7, 3]})),
    "rows of both alike, tied": (
        T,
        dict(target_modules=Q, trainable_token_indices={"embed_tokens": [3, 7], "lm_head": [3, 7]}),
    ),
    "rows of both, tied": (
        T,
        dict(target_modules=Q, trainable_token_indices={"embed_tokens": [3, 7], "lm_head": [1]}),
    ),
    "rows of both, untied": (
        U,
        dict(target_modules=Q, trainable_token_indices={"embed_tokens": [3, 7], "lm_head": [3, 1]}),
    ),
    "rows, kept tied": (
        T,
        dict(target_modules=Q, trainable_token_indices=[3, 7], ensure_weight_tying=True),
    ),
    "rows, lm_head saved": (
        U,
        dict(target_modules=Q, trainable_token_indices=[3, 7], modules_to_save=["lm_head"]),
    ),
    "rows, LoRA on lm_head": (
        U,
        dict(target_modules=[*Q, "lm_head"], trainable_token_indices=[3, 7]),
    ),
    "rows of the head, LoRA on embed_tokens": (
        U,
        dict(target_modules=[*Q, "embed_tokens"], trainable_token_indices={"lm_head": [3, 7]}),
    ),
}
CASES = {name: (family, dict(r=4) | settings) for name, (family, settings) in CASES.items()}


@pytest.mark.parametrize("case", CASES)
def test_adapters_of_peft_load_with_its_logits(case, tmp_path):
    family, settings = CASES[case]
    assert import_difference(family, tmp_path, **settings) <= 1e-5


@pytest.mark.parametrize("case", CASES)
def test_saved_adapters_have_the_same_logits_in_peft(case, tmp_path):
    family, settings = CASES[case]
    assert export_difference(family, tmp_path, **settings) <= 1e-5


@pytest.mark.parametrize("case", CASES)
def test_a_step_of_training_is_pefts(case, tmp_path):
    family, settings = CASES[case]
    assert step_difference(family, tmp_path, **settings) <= 1e-6


# ── the tree, and what is written of it ───────────────────────────────────────────────────


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("case", CASES)
def test_names_shapes_dtypes_and_counts_are_pefts(case, dtype, tmp_path):
    family, settings = CASES[case]
    model = lora(fast(family, dtype), **settings)
    peft = get_peft_model(hugging_face(family, dtype), peft_config(**settings))
    theirs = get_peft_model_state_dict(peft, save_embedding_layers=False)
    theirs = {k: v for k, v in theirs.items() if not re.search(r"_module\.|_to_save\.", k)}
    ours = peft_state_dict(model.adapter, model.spec.lora)
    kind = lambda x: (tuple(x.shape), x.dtype)
    assert {k: kind(x) for k, x in ours.items()} == {k: kind(x) for k, x in theirs.items()}
    if not (model.spec.lora.extras.tied and model.spec.lora.extras.embed_tokens):
        # There PEFT counts one tensor twice, by both of its names.
        counted = (model.num_parameters(trainable=True), model.num_parameters())
        assert counted == peft.get_nb_trainable_parameters()


@pytest.mark.parametrize("case", CASES)
def test_a_fresh_adapter_is_the_base(case):
    family, settings = CASES[case]
    base = fast(family)
    torch.testing.assert_close(logits(lora(base, **settings)), logits(base), rtol=0, atol=2e-6)


@pytest.mark.parametrize("init", [True, False, "gaussian", "orthogonal"])
def test_fresh_factors_of_embedding_and_head_are_distributed_as_pefts(init):
    settings = dict(r=8, target_modules=ENDS, init_lora_weights=init)
    model = lora(fast(U), **settings)
    peft = get_peft_model(hugging_face(U), peft_config(**settings))
    theirs = get_peft_model_state_dict(peft, save_embedding_layers=False)
    for key, x in peft_state_dict(model.adapter, model.spec.lora).items():
        y = theirs[key]
        assert x.std().item() == pytest.approx(y.std().item(), rel=0.25, abs=1e-12), key


@pytest.mark.parametrize("case", CASES)
def test_round_trips_are_bit_equal(case, tmp_path):
    family, settings = CASES[case]
    model = randomised(lora(fast(family), **settings))
    model.save_pretrained(tmp_path / "once")
    again = load_adapter(fast(family), tmp_path / "once")
    again.save_pretrained(tmp_path / "twice")
    assert same_bits(again.adapter, model.adapter)
    assert again.spec.lora.extras == model.spec.lora.extras
    for name in ("adapter_model.safetensors", "adapter_config.json"):
        assert (tmp_path / "once" / name).read_bytes() == (tmp_path / "twice" / name).read_bytes()


@pytest.mark.parametrize("case", ["save both ends and norms", "kept tied, save both", "rows, tied"])
def test_bf16_is_no_farther_from_exact_than_peft_is(case, tmp_path):
    family, settings = CASES[case]
    bf16 = torch.bfloat16
    peft_saved(family, tmp_path, bf16, **settings)
    model = load_adapter(fast(family, bf16), tmp_path)
    theirs = hf_logits(peft_read(family, tmp_path, bf16))
    exact = tree_map(lambda x: x.double(), (model.adapter, model.base))
    error = lambda x: (x - functional.forward(*exact, model.spec, IDS)).abs().max().item()
    assert error(logits(model)) <= 1.5 * error(theirs)
    assert error(logits(fast(family, bf16))) >= 10 * error(theirs)


def test_the_model_that_was_given_stays_as_it_was():
    family, settings = CASES["save both ends and norms"]
    given = fast(family)
    before = [x.clone() for x in tree_leaves(given.base)]
    model = lora(given, **settings)
    for leaf in tree_leaves(model.adapter):
        leaf.fill_(3.0)
    assert same_bits(tree_leaves(given.base), before)
    assert torch.equal(logits(disable(model)), logits(fast(family)))


# ── merging ───────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("case", [c for c in CASES if "lora_bias" not in c])
def test_merging_equals_applying_and_transformers_reads_it(case, tmp_path):
    family, settings = CASES[case]
    model = randomised(lora(fast(family), **settings))
    merged = merge(model)
    assert merged.adapter is None
    assert difference(logits(merged), logits(model), logits(fast(family))) <= 1e-5
    equal = "lm_head" not in merged.base
    assert merged.spec.config.tie_word_embeddings == equal
    save_merged(merged, tmp_path / "merged")
    save_merged(model, tmp_path / "at once")
    weights = [(tmp_path / n / "model.safetensors").read_bytes() for n in ("merged", "at once")]
    assert weights[0] == weights[1]
    theirs = hf_logits(AutoModelForCausalLM.from_pretrained(tmp_path / "merged").float())
    ours = logits(fastlora.load(tmp_path / "merged", dtype="float32", device="cpu")[0])
    assert difference(ours, theirs, logits(fast(family))) <= 1e-5


def test_a_tied_pair_that_lora_takes_apart_is_merged_into_two():
    """PEFT adds the embedding's delta to the head as well: logits off by 9.77."""
    family, settings = CASES["tied, LoRA on embed_tokens"]
    model = randomised(lora(fast(family), **settings))
    merged = merge(model)
    assert torch.equal(merged.base["lm_head"], model.base["embed_tokens"])
    assert not torch.equal(merged.base["embed_tokens"], model.base["embed_tokens"])


def test_a_bias_of_lora_on_the_head_cannot_be_merged():
    family, settings = CASES["LoRA on lm_head, lora_bias"]
    with pytest.raises(ValueError, match="lm_head"):
        merge(randomised(lora(fast(family), **settings)))


# ── a base with an embedding of its own ───────────────────────────────────────────────────


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
def test_an_adapter_over_a_grown_vocabulary_goes_both_ways(family, case, tmp_path):
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
    family, settings = CASES["tied, LoRA on embed_tokens"]
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
        lambda ts: ts | {EMBED + "base_layer.weight": torch.ones(100, 32)},
        "only one of embedding and head",
    ),
    "fewer rows": (
        "LoRA on embed_tokens",
        lambda ts: ts | {EMBED + "base_layer.weight": torch.ones(90, 32)},
        "the base has 96",
    ),
    "another width": (
        "LoRA on embed_tokens",
        lambda ts: ts | {EMBED + "base_layer.weight": torch.ones(96, 30)},
        "30 columns",
    ),
    "a vector": (
        "LoRA on embed_tokens",
        lambda ts: ts | {EMBED + "base_layer.weight": torch.ones(96)},
        "expected a matrix",
    ),
    "NaN in a base's matrix": (
        "LoRA on embed_tokens",
        lambda ts: ts | {EMBED + "base_layer.weight": torch.full((96, 32), float("nan"))},
        "NaN",
    ),
    "integers": (
        "LoRA on embed_tokens",
        lambda ts: ts | {EMBED + "base_layer.weight": torch.ones(96, 32, dtype=torch.int32)},
        "no floating-point",
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
        lambda ts: ts | {"base_model.model.model.layers.0.self_attn.k_proj.bias": torch.ones(16)},
        "unexpected",
    ),
    "float8 for a base's matrix": (
        "LoRA on embed_tokens",
        lambda ts: ts | {EMBED + "base_layer.weight": torch.ones(96, 32).to(torch.float8_e4m3fn)},
        "no floating-point",
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
        lambda ts: ts | {HEAD + "base_layer.weight": torch.ones(96, 32)},
        "unexpected",
    ),
    "a copy of more rows than a tied base": (
        "tied, save lm_head",
        lambda ts: ts | {HEAD + "weight": torch.ones(100, 32)},
        "no matrix of the base itself",
    ),
    "a copy of the embedding of more rows": (
        "tied, save embed_tokens",
        lambda ts: ts | {EMBED + "weight": torch.ones(100, 32)},
        "no matrix of the base itself",
    ),
    "more than float32 holds": (
        "LoRA on embed_tokens",
        lambda ts: (
            ts | {EMBED + "base_layer.weight": torch.full((96, 32), 1e300, dtype=torch.float64)}
        ),
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
    family, settings = CASES[case]
    randomised(lora(fast(family), **settings)).save_pretrained(tmp_path)
    path = tmp_path / "adapter_model.safetensors"
    save_file({k: v.contiguous().clone() for k, v in change(load_file(path)).items()}, path)
    model = fast(family)
    before = [x.clone() for x in tree_leaves(model.base)]
    with pytest.raises(CheckpointError) as refused:
        load_adapter(model, tmp_path)
    assert message in str(refused.value) and str(path) in str(refused.value)
    assert same_bits(tree_leaves(model.base), before)


# ── what cannot be ────────────────────────────────────────────────────────────────────────

IMPOSSIBLE = {
    "bias='some'": (U, dict(bias="some"), "expected one of ['none', 'all', 'lora_only']"),
    "no biases": (U, dict(bias="all"), "no bias in this model"),
    "no biases on the adapted": (
        "qwen2",
        dict(target_modules=["o_proj"], bias="lora_only"),
        "no bias in the adapted layers",
    ),
    "nothing to save": (U, dict(modules_to_save=["wat"]), "'wat' matches no module"),
    "a whole block": (U, dict(modules_to_save=["mlp"]), "model.layers.0.mlp"),
    "a broken name": (U, dict(modules_to_save=["norm("]), "no end of a module's name"),
    "experts": (
        "mixtral",
        dict(target_modules=["q_proj"], modules_to_save=["experts"]),
        "mlp.experts",
    ),
    "router": (
        "mixtral",
        dict(target_modules=["q_proj"], modules_to_save=["mlp.gate"]),
        "mlp.gate",
    ),
    "an id beyond": (U, dict(trainable_token_indices=[96]), "[96] of 'embed_tokens'"),
    "a negative id": (U, dict(trainable_token_indices=[-1]), "[-1] of 'embed_tokens'"),
    "a text for an id": (U, dict(trainable_token_indices=["a"]), "['a']"),
    "an id twice": (U, dict(trainable_token_indices=[3, 3]), "[3] more than once"),
    "no ids": (U, dict(trainable_token_indices={"lm_head": []}), "has none"),
    "rows of a projection": (U, dict(trainable_token_indices={"q_proj": [1]}), "'q_proj'"),
    "rows and LoRA": (
        U,
        dict(target_modules=["embed_tokens"], trainable_token_indices=[1]),
        "both train embed_tokens",
    ),
    "rows and copy": (
        U,
        dict(modules_to_save=["embed_tokens"], trainable_token_indices=[1]),
        "both train embed_tokens",
    ),
    "shared rows and LoRA on the head": (
        T,
        dict(target_modules=["lm_head"], trainable_token_indices=[1]),
        "both train lm_head",
    ),
    "shared rows and a copy of the head": (
        T,
        dict(modules_to_save=["lm_head"], trainable_token_indices=[1]),
        "both train lm_head",
    ),
    "different rows kept tied": (
        T,
        dict(
            trainable_token_indices={"embed_tokens": [1], "lm_head": [2]}, ensure_weight_tying=True
        ),
        "differ between embed_tokens and lm_head",
    ),
    "kept tied, untied": (
        U,
        dict(modules_to_save=["lm_head"], ensure_weight_tying=True),
        "embedding and head of this model differ",
    ),
    "kept tied, nothing trained": (
        T,
        dict(ensure_weight_tying=True),
        "neither embedding nor head is trained",
    ),
    "kept tied, LoRA on one and a copy of the other": (
        T,
        dict(
            target_modules=["lm_head"], modules_to_save=["embed_tokens"], ensure_weight_tying=True
        ),
        "would have LoRA and a copy",
    ),
    "kept tied, two ranks": (
        T,
        dict(target_modules=ENDS, rank_pattern={"lm_head": 3}, ensure_weight_tying=True),
        "let the patterns give both the same",
    ),
    "kept tied, DoRA": (
        T,
        dict(target_modules=ENDS, use_dora=True, ensure_weight_tying=True),
        "magnitudes",
    ),
    "lora_bias on an embedding": (
        U,
        dict(target_modules=["embed_tokens"], lora_bias=True),
        "lora_bias=True does not go with",
    ),
    "pissa on the head": (
        U,
        dict(target_modules=[*Q, "lm_head"], init_lora_weights="pissa"),
        "does not go with target_modules of lm_head",
    ),
    "qat on the head": (
        U,
        dict(modules_to_save=["lm_head"], qat_scheme="fp8-fp8"),
        "train one or quantise",
    ),
    "LoRA and a copy of one projection": (
        U,
        dict(target_modules=["q_proj"], modules_to_save=["n.q_proj"]),
        "model.layers.0.self_attn.q_proj is in modules_to_save and in target_modules",
    ),
    "a yes for True": (U, dict(ensure_weight_tying="yes"), "ensure_weight_tying='yes'"),
    "None for True": (U, dict(ensure_weight_tying=None), "ensure_weight_tying=None"),
    "a list for bias": (U, dict(bias=["all"]), "bias=['all']"),
    "a number to save": (U, dict(modules_to_save=[1]), "modules_to_save=[1]"),
    "3 to save": (U, dict(modules_to_save=3), "modules_to_save=3"),
    "lists to save": (U, dict(modules_to_save=[["norm"]]), "modules_to_save=[['norm']]"),
    "a number of ids": (U, dict(trainable_token_indices=3.0), "trainable_token_indices=3.0"),
    "a scalar tensor of ids": (
        U,
        dict(trainable_token_indices=torch.tensor(3)),
        "expected a list of ids",
    ),
    "a number of ids of the head": (
        U,
        dict(trainable_token_indices={"lm_head": 3.5}),
        "trainable_token_indices={'lm_head': 3.5}",
    ),
    "pairs for a dict": (
        U,
        dict(trainable_token_indices=[("embed_tokens", [3])]),
        "expected ids in [0, 96)",
    ),
    "True for an id": (U, dict(trainable_token_indices=[True]), "['True']"),
    "half an id": (U, dict(trainable_token_indices=[1.5]), "['1.5']"),
    "rows of a name too short": (U, dict(trainable_token_indices={"s": [3]}), "'s' is neither"),
    "rows of a number": (U, dict(trainable_token_indices={1: [3]}), "'1' is neither"),
    "rows of one end twice": (
        U,
        dict(trainable_token_indices={"embed_tokens": [1], "model.embed_tokens": [2]}),
        "names embed_tokens twice",
    ),
    "an embedding in layers": (
        U,
        dict(target_modules=["q_proj", "embed_tokens"], layers_to_transform=[0]),
        "model.embed_tokens is in no layer",
    ),
    "pissa without a projection": (
        U,
        dict(target_modules=["embed_tokens"], init_lora_weights="pissa"),
        "none is adapted; leave it True",
    ),
    "everything saved, nothing adapted": (
        U,
        dict(target_modules=["q_proj"], modules_to_save=["q_proj"]),
        "beside modules_to_save=('q_proj',)",
    ),
    "no folder": (U, dict(temporary_location=""), "temporary_location=''"),
}


@pytest.mark.parametrize("what", IMPOSSIBLE)
def test_what_cannot_be_is_refused_by_name(what):
    family, settings, message = IMPOSSIBLE[what]
    # Where the type hook is on, it speaks of types before lora does.
    with pytest.raises((ValueError, TypeCheckError)) as refused:
        lora(fast(family), **{"target_modules": Q} | settings)
    assert message in str(refused.value) or isinstance(refused.value, TypeCheckError)


@pytest.mark.parametrize(
    "ids", [{7, 3}, range(3, 8, 4), np.array([3, 7]), torch.tensor([3, 7])], ids=str
)
def test_ids_may_come_in_any_collection_of_whole_numbers(ids):
    model = lora(fast(U), r=4, target_modules=Q, trainable_token_indices=ids)
    assert model.spec.lora.extras.tokens == (("embed_tokens", (3, 7)),)
    assert isinstance(hash(model.spec), int)


@pytest.mark.parametrize("method", ["eva", "corda", "lora_ga"])
def test_data_says_nothing_where_no_projection_is_adapted(method):
    model = lora(fast(U), r=4, target_modules=["embed_tokens"])
    with pytest.raises(ValueError, match="on no projection"):
        fastlora.initialize(model, [{"input_ids": IDS, "labels": IDS}], method)


def test_combine_refuses_what_has_no_weighted_sum():
    family, settings = CASES["save model.norm"]
    base = fast(family)
    models = [randomised(lora(base, **settings)), randomised(lora(base, r=4), seed=2)]
    with pytest.raises(ValueError, match="modules_to_save"):
        combine(models, [1.0, 1.0])


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
    model = randomised(lora(fast(U), r=4, target_modules=Q))
    model.save_pretrained(tmp_path)
    edit(tmp_path, **HOSTILE[what])
    start = time.perf_counter()
    with pytest.raises(CheckpointError):
        load_adapter(fast(U), tmp_path)
    assert time.perf_counter() - start < 2


def test_rows_of_an_untied_pair_need_not_be_alike_to_be_read(tmp_path):
    """PEFT warns that ensure_weight_tying has no effect, and reads it."""
    family, settings = CASES["rows of both, untied"]
    model = randomised(lora(fast(family), **settings))
    model.save_pretrained(tmp_path)
    edit(tmp_path, ensure_weight_tying=True)
    assert torch.equal(logits(load_adapter(fast(family), tmp_path)), logits(model))
