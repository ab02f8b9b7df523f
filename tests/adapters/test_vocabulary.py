"""New tokens: their ids and rows, saved to a folder and read by PEFT."""

import dataclasses
from pathlib import Path

import pytest
import torch
from jaxtyping import TypeCheckError
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

import fastlora
from fastlora import functional as FL
from fastlora.checkpoints.hub import DEMO
from fastlora.text.tokenizer import Tokenizer
from oracles.checkpoints import make_checkpoint
from oracles.trees import randomised, same_bits

NEW = ["<think>", "</think>", "<tool>"]


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    found = Tokenizer.from_folder(DEMO)
    assert found is not None
    return found


@pytest.fixture(scope="module", params=["llama2", "llama3.2"], ids=["untied", "tied"])
def folder(request, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("base")
    make_checkpoint(request.param, folder, config=dict(vocab_size=4096))
    return folder


@pytest.fixture
def base(folder):
    return fastlora.load(folder, device="cpu")[0]


def test_new_rows_are_the_mean_of_the_old(base, tokenizer):
    n = len(tokenizer)
    before = [x.clone() for x in (base.base["embed_tokens"], base.base["norm"])]
    model, grown, ids = fastlora.add_tokens(base, tokenizer, NEW)
    assert ids == [n, n + 1, n + 2] and grown.encode("a<tool>") == [*tokenizer.encode("a"), n + 2]
    for key in {"embed_tokens", "lm_head"} & model.base.keys():
        old, new = base.base[key], model.base[key]
        assert torch.equal(new[:n], old[:n])
        for i in ids:
            torch.testing.assert_close(new[i], old[:n].mean(0))
    assert model.spec.config.vocab_size == max(4096, n + 3)
    assert same_bits((base.base["embed_tokens"], base.base["norm"]), before)
    assert len(tokenizer) == n
    assert model(torch.tensor([ids])).shape[-1] == model.spec.config.vocab_size


def test_rows_to_spare_are_used_before_the_matrix_grows(base, tokenizer):
    spare = {k: torch.cat([v, torch.zeros(5, 32)]) for k, v in base.base.items()
             if k in ("embed_tokens", "lm_head")}  # fmt: skip
    config = dataclasses.replace(base.spec.config, vocab_size=4101)
    roomy = dataclasses.replace(
        base, base={**base.base, **spare}, spec=dataclasses.replace(base.spec, config=config)
    )
    model, _, ids = fastlora.add_tokens(roomy, tokenizer, NEW)
    assert model.spec.config.vocab_size == 4101 and max(ids) < 4101
    assert model.base["embed_tokens"][ids].abs().max() > 0
    assert not model.base["embed_tokens"][4100].any()
    assert not roomy.base["embed_tokens"][ids].any()


def test_an_adapter_over_new_tokens_is_read_by_peft(folder, base, tokenizer, tmp_path):
    model, grown, ids = fastlora.add_tokens(base, tokenizer, NEW)
    rows = {"embed_tokens": ids} | ({"lm_head": ids} if "lm_head" in base.base else {})
    model = fastlora.lora(model, r=2, trainable_token_indices=rows)
    model = model.with_adapter(randomised(model.adapter, 4))
    model.save_pretrained(tmp_path)
    grown.save_pretrained(tmp_path)
    inputs = torch.tensor([[5, *ids, 7]])
    ours = FL.forward(model.adapter, model.base, model.spec, inputs)

    theirs = AutoTokenizer.from_pretrained(tmp_path)
    assert theirs.convert_tokens_to_ids(NEW) == ids
    hf = AutoModelForCausalLM.from_pretrained(folder)
    hf.resize_token_embeddings(model.spec.config.vocab_size)
    peft = PeftModel.from_pretrained(hf, tmp_path).eval()
    with torch.no_grad():
        expected = peft(input_ids=inputs).logits
    assert (ours - expected).abs().max() <= 1e-5 * max(1.0, expected.abs().max().item())

    again, read = fastlora.load(tmp_path, device="cpu")
    assert read.encode("<tool>") == grown.encode("<tool>")
    torch.testing.assert_close(again(inputs), ours, rtol=0, atol=0)
    merged = fastlora.merge(again)
    assert (merged(inputs) - ours).abs().max() <= 1e-5 * max(1.0, ours.abs().max().item())
    merged.save_pretrained_merged(tmp_path / "merged", grown)
    whole, tokenizer = fastlora.load(tmp_path / "merged", device="cpu")
    assert whole.spec.config.vocab_size == model.spec.config.vocab_size
    assert tokenizer.encode("a</think>") == grown.encode("a</think>")


@pytest.mark.parametrize(
    ("tokens", "message"),
    [
        ([], "tokens is empty"),
        ("<think>", "expected a list"),
        (["<a>", "<a>"], "tokens holds '<a>' twice"),
        (["", 3], "tokens holds 3: expected a text"),
        (["the", "<a>"], "tokens holds 'the', which is already in the vocabulary"),
    ],
)
def test_invalid_tokens_are_refused(base, tokenizer, tokens, message):
    # With the type hook on, the hook refuses first.
    with pytest.raises((ValueError, TypeCheckError)) as refused:
        fastlora.add_tokens(base, tokenizer, tokens)
    assert message in str(refused.value) or isinstance(refused.value, TypeCheckError)


def test_an_adapted_model_is_refused(base, tokenizer):
    with pytest.raises(ValueError, match="add tokens first"):
        fastlora.add_tokens(fastlora.lora(base, r=2), tokenizer, NEW)
