"""Arguments for biases, modules and rows that lora() refuses."""

import numpy as np
import pytest
import torch
from jaxtyping import TypeCheckError

import fastlora
from fastlora.adapters.create import lora
from fastlora.adapters.edits.combining import combine
from oracles.extras_cases import ENDS, EXTRAS_CASES, Q, T, U
from oracles.peft_side import IDS, fast, with_random_adapter

IMPOSSIBLE = {
    "bias='some'": (U, dict(bias="some"), "bias='some': expected 'none' or 'all' or 'lora_only'"),
    "no biases": (U, dict(bias="all"), "no bias in this model"),
    "no biases on the adapted": (
        "qwen2",
        dict(target_modules=["o_proj"], bias="lora_only"),
        "no bias in the adapted layers",
    ),
    "nothing to save": (U, dict(modules_to_save=["wat"]), "'wat' matches no module"),
    "a whole block": (U, dict(modules_to_save=["mlp"]), "model.layers.0.mlp"),
    "a broken name": (U, dict(modules_to_save=["norm("]), "cannot be the end of a module's name"),
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
    "lists to save": (U, dict(modules_to_save=[["norm"]]), "modules_to_save=a list of (list)"),
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
        "no projection is adapted; leave it True",
    ),
    "everything saved, nothing adapted": (
        U,
        dict(target_modules=["q_proj"], modules_to_save=["q_proj"]),
        "beside modules_to_save=('q_proj',)",
    ),
    "no folder": (U, dict(temporary_location=""), "temporary_location=''"),
}


@pytest.mark.parametrize("what", IMPOSSIBLE)
def test_impossible_arguments_are_refused_by_name(what):
    family, settings, message = IMPOSSIBLE[what]
    # With the type hook on, the hook refuses wrong types first.
    with pytest.raises((ValueError, TypeCheckError)) as refused:
        lora(fast(family), **{"target_modules": Q} | settings)
    assert message in str(refused.value) or isinstance(refused.value, TypeCheckError)


@pytest.mark.parametrize(
    "ids", [{7, 3}, range(3, 8, 4), np.array([3, 7]), torch.tensor([3, 7])], ids=str
)
def test_ids_may_be_any_collection_of_integers(ids):
    model = lora(fast(U), r=4, target_modules=Q, trainable_token_indices=ids)
    assert model.spec.lora.extras.tokens == (("embed_tokens", (3, 7)),)
    assert isinstance(hash(model.spec), int)


@pytest.mark.parametrize("method", ["eva", "corda", "lora_ga"])
def test_initialising_from_data_needs_an_adapted_projection(method):
    model = lora(fast(U), r=4, target_modules=["embed_tokens"])
    with pytest.raises(ValueError, match="on no projection"):
        fastlora.initialize(model, [{"input_ids": IDS, "labels": IDS}], method)


def test_combine_refuses_adapters_without_a_weighted_sum():
    family, settings = EXTRAS_CASES["save model.norm"]
    base = fast(family)
    models = [
        with_random_adapter(lora(base, **settings)),
        with_random_adapter(lora(base, r=4), seed=2),
    ]
    with pytest.raises(ValueError, match="modules_to_save"):
        combine(models, [1.0, 1.0])
