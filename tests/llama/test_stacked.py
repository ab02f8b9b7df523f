"""q, k and v side by side in memory: the same tree, the same gradients."""

from dataclasses import replace

import pytest
import torch
from conftest import adapted, relative_error, token_ids

import fastlora
from fastlora import functional as FL
from fastlora.models import decoder
from fastlora.models.fused_qkv import QKV, fuse_qkv, fused_qkv
from fastlora.models.names import base_from_tensors, tensors_from_base
from fastlora.ops.attention.flash import flash_attention


@pytest.fixture
def together(pair):
    """together(family): the checkpoint's model, and the same as a load on CUDA lays it out."""

    def of(family, **settings):
        model = adapted(pair(family).model, **(settings or dict(r=4)))
        config = model.spec.config
        tensors = {n: t.clone() for n, t in tensors_from_base(config, model.base).items()}
        fuse_qkv(config, tensors)
        return model, replace(model, base=base_from_tensors(config, tensors))

    return of


def test_the_tree_is_as_it_was(together):
    apart, ours = together("llama_bias")
    for mine, theirs in zip(ours.base["layers"], apart.base["layers"], strict=True):
        assert fused_qkv(theirs) is None
        whole, rows = fused_qkv(mine), [theirs[name]["weight"] for name in QKV]
        assert whole is not None and whole.equal(torch.cat(rows))
        for name in QKV:
            assert mine[name]["weight"].equal(theirs[name]["weight"])
            assert mine[name]["weight"].is_contiguous()
            storages = [x.untyped_storage().data_ptr() for x in (whole, mine[name]["weight"])]
            assert storages[0] == storages[1]


def test_what_does_not_lie_so_is_no_stack(together):
    _, ours = together("llama2")
    params = ours.base["layers"][0]
    swapped = params | {"q_proj": params["k_proj"], "k_proj": params["q_proj"]}
    assert fused_qkv(swapped) is None
    other = params | {"v_proj": {"weight": params["v_proj"]["weight"].clone()}}
    assert fused_qkv(other) is None
    trained = params | {"v_proj": {"weight": params["v_proj"]["weight"].detach().requires_grad_()}}
    assert fused_qkv(trained) is None


def test_a_quantised_base_stays_as_it_is(pair):
    model = fastlora.quantize(pair("llama2").model)
    tensors = tensors_from_base(model.spec.config, model.base)
    before = dict(tensors)
    fuse_qkv(model.spec.config, tensors)
    assert all(tensors[name] is x for name, x in before.items())
    assert fused_qkv(model.base["layers"][0]) is None


@pytest.mark.compile
@pytest.mark.parametrize("family", ["llama_bias", "qwen3"])
def test_gradients_are_the_same_and_made_of_one_product(together, family, monkeypatch):
    apart, ours = together(family)
    seen, real = [], decoder.stacked
    monkeypatch.setattr(decoder, "fused_qkv", lambda params: seen.append(real(params)) or seen[-1])
    ids = token_ids(2, 12, vocab_size=96)
    batch, found = {"input_ids": ids, "labels": ids}, []
    for model in (apart, ours):
        model = model.with_spec(compile=True, recompute="selective")
        found.append(fastlora.value_and_grad(FL.loss)(model.adapter, model.base, model.spec, batch))
    torch.testing.assert_close(found[1], found[0], rtol=1e-5, atol=1e-5)
    layers = ours.spec.config.num_hidden_layers
    assert [whole is not None for whole in seen] == [False] * layers + [True] * layers


@pytest.mark.compile
@pytest.mark.parametrize("recompute", ["none", "selective", "full"])
@pytest.mark.parametrize(
    ("family", "settings", "joined"),
    [
        ("llama_bias", dict(r=4, bias="all"), True),
        ("llama3.2", dict(r=4, lora_dropout=0.3), True),
        ("llama3.2", dict(r=4, target_modules=["v_proj"]), True),
        ("llama3.2", dict(r=4, target_modules=["up_proj"]), True),
        ("llama3.2", dict(r=4, finetune_last_n_layers=1), True),  # the first without a gradient
        ("llama3.2", dict(r=4, use_dora=True), False),
        ("llama_bias", dict(r=4, lora_bias=True), False),
        ("qwen3", dict(r=4), False),  # norms between the products and attention
    ],
    ids=str,
)
def test_attention_gives_all_three_gradients_in_one_piece(
    together, family, settings, joined, recompute, monkeypatch
):
    pytest.importorskip("triton")
    for name in ("decoder.takes", "layer.flash.takes", "layer.flash.pays"):
        monkeypatch.setattr(f"fastlora.llama.{name}", lambda *_: True)
    given = []

    def watched(*args):
        given.append(args[-1] is not None)
        return flash_attention(*args)

    if recompute == "none":  # dynamo lets no checkpoint write to a list
        monkeypatch.setattr("fastlora.models.attention.flash_attention", watched)
    apart, ours = together(family, **settings)
    ids = token_ids(2, 12, vocab_size=96)
    batch, found = {"input_ids": ids, "labels": ids}, []
    for model, how in (
        (apart, dict(kernels="torch", recompute="none")),
        (ours, dict(kernels="triton", recompute=recompute, compile=True)),
    ):
        spec = model.with_spec(**how).spec
        step = fastlora.value_and_grad(FL.loss)
        found.append(step(model.adapter, model.base, spec, batch, seed=3))
    assert abs(found[0][0] - found[1][0]) <= 1e-5
    assert relative_error(found[1][1], found[0][1]) <= 2e-4
    assert recompute != "none" or (given and set(given) == {joined})
