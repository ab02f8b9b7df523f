"""generate(add=): cached decoding equals a forward pass over every prefix with the same vectors."""

from typing import Any

import pytest
import torch

import fastlora
from fastlora import functional as FL
from fastlora.models.capture import place_names
from oracles.expert_cases import EXPERT_CASES
from oracles.pairs import adapted
from oracles.transformers_side import prompt

NEW = 6
IDS = prompt(2, 5)
CASES: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
    "LoRA": ("llama3.1", dict(r=4), {}),
    "kernels": ("llama2", dict(r=4), dict(kernels="triton")),
    "window": ("mistral", dict(r=4), {}),
    "experts": (*EXPERT_CASES["experts, router and attention"], {}),
    "head": ("llama2", dict(r=4, target_modules=["q_proj", "embed_tokens", "lm_head"]), {}),
}


def vectors(model, places) -> dict[str, torch.Tensor]:
    gen = torch.Generator().manual_seed(0)
    return {x: 0.3 * torch.randn(model.spec.config.hidden_size, generator=gen) for x in places}


@pytest.mark.parametrize("case", CASES)
def test_steered_ids_and_logprobs_equal_an_uncached_forward_pass(case, pair):
    """All places at once, and each alone differs from the model without vectors."""
    family, settings, spec = CASES[case]
    plain = adapted(pair(family).model, **settings)
    model = plain.with_spec(**spec)
    how: dict[str, Any] = dict(max_new_tokens=NEW, eos_token_id=(), return_logprobs=True)
    names = place_names(plain.spec.config.num_hidden_layers)
    for places in (names, ["layers.0.out", "norm"], ["layers.1.attn.out"], ["embed"]):
        add = vectors(model, places)
        ids, logprobs = model.generate(IDS, add=add, **how)
        steered = plain(ids[:, :-1], add=add)[:, 4:]
        assert torch.equal(steered.argmax(-1), ids[:, 5:]), places
        expected = steered.log_softmax(-1).gather(-1, ids[:, 5:, None])[..., 0]
        torch.testing.assert_close(logprobs, expected, rtol=1e-4, atol=1e-5)
        unsteered = plain(ids[:, :-1])[:, 4:]
        assert not torch.allclose(steered, unsteered, atol=1e-3)
        if case == "kernels":
            break


def test_rows_of_a_stack_are_steered(pair):
    base = pair("llama2").model
    models = [adapted(base, seed=i, r=2) for i in range(2)]
    stack, spec = FL.stack(models)
    together = fastlora.Model(spec=spec, base=base.base, adapter=stack)
    add = vectors(base, place_names(2))
    how: dict[str, Any] = dict(max_new_tokens=NEW, eos_token_id=(), add=add)
    ids = together.generate(IDS, adapter_ids=[1, 0], **how)
    for row, model in zip((0, 1), reversed(models), strict=True):
        assert torch.equal(model.generate(IDS[row : row + 1], **how)[0], ids[row])


def test_text_is_steered():
    """A vector along the output row of a token makes the model write that token."""
    model, tokenizer = fastlora.load("demo", dtype="float32", device="cpu")
    token = tokenizer.encode("the")[-1]
    weight = model.base.get("lm_head", model.base["embed_tokens"])
    add = {"norm": 1e3 * weight[token]}
    text = model.generate_text(tokenizer, "a", max_new_tokens=3, eos_token_id=(), add=add)
    assert text == tokenizer.decode([token] * 3)


@pytest.mark.parametrize(
    ("add", "message"),
    [
        ({"layers.9.in": torch.ones(32)}, "add has no place 'layers.9.in'"),
        ({"norm": torch.ones(2, 1, 32)}, r"generation adds one vector \[32\] to all rows"),
        ({"norm": torch.ones(5, 32)}, r"generation adds one vector \[32\]"),
        ({"norm": torch.ones(31)}, r"must broadcast to \[b, t, 32\]"),
        ({"norm": torch.full((32,), torch.nan)}, "holds NaN or infinity"),
        (["norm"], "expected a dict"),
    ],
)
def test_vectors_that_cannot_be_added_are_refused(add, message, pair):
    with pytest.raises((ValueError, TypeError), match=message + "|Type-check"):
        pair("llama2").model.generate(IDS, max_new_tokens=2, add=add)
