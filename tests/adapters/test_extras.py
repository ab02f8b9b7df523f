"""Trained biases, modules, embeddings, heads and single rows. Oracle: PEFT's rules and numbers."""

import re

import pytest
import torch
from peft import get_peft_model, get_peft_model_state_dict
from torch.utils._pytree import tree_leaves, tree_map
from transformers import AutoModelForCausalLM

import fastlora
from fastlora import functional
from fastlora.adapters.create import lora
from fastlora.adapters.edits.combining import disable
from fastlora.adapters.edits.merging import merge
from fastlora.formats.merged import save_merged
from fastlora.formats.peft.names import peft_state_dict
from fastlora.formats.peft.reading import load_adapter
from oracles.extras_cases import ENDS, EXTRAS_CASES, U
from oracles.peft_side import (
    IDS,
    difference,
    fast,
    hf_logits,
    hugging_face,
    logits,
    peft_config,
    peft_read,
    peft_saved,
    with_random_adapter,
)
from oracles.trees import same_bits

# ── the tree and the files ────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("case", EXTRAS_CASES)
def test_names_shapes_dtypes_and_counts_equal_pefts(case, dtype, tmp_path):
    family, settings = EXTRAS_CASES[case]
    model = lora(fast(family, dtype), **settings)
    peft = get_peft_model(hugging_face(family, dtype), peft_config(**settings))
    theirs = get_peft_model_state_dict(peft, save_embedding_layers=False)
    theirs = {k: v for k, v in theirs.items() if not re.search(r"_module\.|_to_save\.", k)}
    ours = peft_state_dict(model.adapter, model.spec.lora)
    kind = lambda x: (tuple(x.shape), x.dtype)
    assert {k: kind(x) for k, x in ours.items()} == {k: kind(x) for k, x in theirs.items()}
    if not (model.spec.lora.extras.tied and model.spec.lora.extras.embed_tokens):
        # PEFT counts a tied tensor twice, once for each name.
        counted = (model.num_parameters(trainable=True), model.num_parameters())
        assert counted == peft.get_nb_trainable_parameters()


@pytest.mark.parametrize("case", EXTRAS_CASES)
def test_a_fresh_adapter_is_the_base(case):
    family, settings = EXTRAS_CASES[case]
    base = fast(family)
    torch.testing.assert_close(logits(lora(base, **settings)), logits(base), rtol=0, atol=2e-6)


@pytest.mark.parametrize("init", [True, False, "gaussian", "orthogonal"])
def test_fresh_factors_of_embedding_and_head_have_the_distribution_of_pefts(init):
    settings = dict(r=8, target_modules=ENDS, init_lora_weights=init)
    model = lora(fast(U), **settings)
    # PEFT draws from the global generator. Without a seed, one of a hundred of its draws of 256
    # numbers is more than 2.2 standard errors away, and with ours beyond the tolerance.
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        peft = get_peft_model(hugging_face(U), peft_config(**settings))
    theirs = get_peft_model_state_dict(peft, save_embedding_layers=False)
    for key, x in peft_state_dict(model.adapter, model.spec.lora).items():
        y = theirs[key]
        assert x.std().item() == pytest.approx(y.std().item(), rel=0.25, abs=1e-12), key


@pytest.mark.parametrize("case", EXTRAS_CASES)
def test_round_trips_are_bit_equal(case, tmp_path):
    family, settings = EXTRAS_CASES[case]
    model = with_random_adapter(lora(fast(family), **settings))
    model.save_pretrained(tmp_path / "once")
    again = load_adapter(fast(family), tmp_path / "once")
    again.save_pretrained(tmp_path / "twice")
    assert same_bits(again.adapter, model.adapter)
    assert again.spec.lora.extras == model.spec.lora.extras
    for name in ("adapter_model.safetensors", "adapter_config.json"):
        assert (tmp_path / "once" / name).read_bytes() == (tmp_path / "twice" / name).read_bytes()


@pytest.mark.parametrize("case", ["save both ends and norms", "kept tied, save both", "rows, tied"])
def test_bf16_errs_no_more_than_peft(case, tmp_path):
    family, settings = EXTRAS_CASES[case]
    bf16 = torch.bfloat16
    peft_saved(family, tmp_path, bf16, **settings)
    model = load_adapter(fast(family, bf16), tmp_path)
    theirs = hf_logits(peft_read(family, tmp_path, bf16))
    exact = tree_map(lambda x: x.double(), (model.adapter, model.base))
    error = lambda x: (x - functional.forward(*exact, model.spec, IDS)).abs().max().item()
    assert error(logits(model)) <= 1.5 * error(theirs)
    assert error(logits(fast(family, bf16))) >= 10 * error(theirs)


def test_the_given_model_is_not_changed():
    family, settings = EXTRAS_CASES["save both ends and norms"]
    given = fast(family)
    before = [x.clone() for x in tree_leaves(given.base)]
    model = lora(given, **settings)
    for leaf in tree_leaves(model.adapter):
        leaf.fill_(3.0)
    assert same_bits(tree_leaves(given.base), before)
    assert torch.equal(logits(disable(model)), logits(fast(family)))


# ── merging ───────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("case", [c for c in EXTRAS_CASES if "lora_bias" not in c])
def test_merging_equals_applying_and_transformers_reads_it(case, tmp_path):
    family, settings = EXTRAS_CASES[case]
    model = with_random_adapter(lora(fast(family), **settings))
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


def test_a_tied_pair_with_separate_lora_is_merged_into_two_matrices():
    """PEFT adds the embedding's delta to the head as well: logits off by 9.77."""
    family, settings = EXTRAS_CASES["tied, LoRA on embed_tokens"]
    model = with_random_adapter(lora(fast(family), **settings))
    merged = merge(model)
    assert torch.equal(merged.base["lm_head"], model.base["embed_tokens"])
    assert not torch.equal(merged.base["embed_tokens"], model.base["embed_tokens"])


def test_merging_lora_bias_on_the_head_is_refused():
    family, settings = EXTRAS_CASES["LoRA on lm_head, lora_bias"]
    with pytest.raises(ValueError, match="lm_head"):
        merge(with_random_adapter(lora(fast(family), **settings)))
