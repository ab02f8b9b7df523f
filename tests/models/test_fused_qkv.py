"""q, k and v stored next to each other in memory: the tree and its gradients do not change."""

from dataclasses import replace

import pytest
import torch

import fastlora
from fastlora import functional as FL
from fastlora.models import decoder
from fastlora.models.fused_qkv import QKV, fuse_qkv, fused_qkv
from fastlora.models.names import base_from_tensors, tensors_from_base
from fastlora.ops.attention.flash import flash_attention
from oracles.pairs import adapted
from oracles.trees import relative_error, token_ids


@pytest.fixture
def together(pair):
    """together(family): a checkpoint's model, and the same model with fused q, k and v."""

    def of(family, **settings):
        model = adapted(pair(family).model, **(settings or dict(r=4)))
        config = model.spec.config
        tensors = {n: t.clone() for n, t in tensors_from_base(config, model.base).items()}
        fuse_qkv(config, tensors)
        return model, replace(model, base=base_from_tensors(config, tensors))

    return of


def test_fusing_changes_no_value_and_no_key_of_the_tree(together):
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


def test_weights_in_another_order_copied_or_trained_are_not_fused(together):
    _, ours = together("llama2")
    params = ours.base["layers"][0]
    swapped = params | {"q_proj": params["k_proj"], "k_proj": params["q_proj"]}
    assert fused_qkv(swapped) is None
    other = params | {"v_proj": {"weight": params["v_proj"]["weight"].clone()}}
    assert fused_qkv(other) is None
    trained = params | {"v_proj": {"weight": params["v_proj"]["weight"].detach().requires_grad_()}}
    assert fused_qkv(trained) is None


def test_a_quantised_base_is_not_changed(pair):
    model = fastlora.quantize(pair("llama2").model)
    tensors = tensors_from_base(model.spec.config, model.base)
    before = dict(tensors)
    fuse_qkv(model.spec.config, tensors)
    assert all(tensors[name] is x for name, x in before.items())
    assert fused_qkv(model.base["layers"][0]) is None


@pytest.mark.compile
@pytest.mark.parametrize("family", ["llama_bias", "qwen3"])
def test_fused_weights_give_the_same_gradients_in_compiled_code(
    together, family, monkeypatch, region_backend
):
    if family != "qwen3":  # one family runs Inductor's C++, which takes most of the time
        region_backend("aot_eager")
    apart, ours = together(family)
    seen, real = [], decoder.with_fused_qkv
    keep = lambda params: seen.append(real(params)) or seen[-1]
    monkeypatch.setattr(decoder, "with_fused_qkv", keep)
    ids = token_ids(2, 12, vocab_size=96)
    batch, found = {"input_ids": ids, "labels": ids}, []
    for model in (apart, ours):
        model = model.with_spec(compile=True, recompute="selective")
        found.append(fastlora.value_and_grad(FL.loss)(model.adapter, model.base, model.spec, batch))
    torch.testing.assert_close(found[1], found[0], rtol=1e-5, atol=1e-5)
    layers = ours.spec.config.num_hidden_layers
    assert ["qkv" in params for params in seen] == [False] * layers + [True] * layers


# Whether the gradient of q, k and v is one tensor does not depend on what is recomputed, so the
# policies run with one kind of each sort.
KINDS = [
    ("llama_bias", dict(r=4, bias="all"), True),
    ("llama3.2", dict(r=4, target_modules=["v_proj"]), True),
    ("llama3.2", dict(r=4, target_modules=["up_proj"]), True),
    ("llama3.2", dict(r=4, finetune_last_n_layers=1), True),  # the first without a gradient
    ("llama3.2", dict(r=4, use_dora=True), False),
    ("qwen3", dict(r=4), False),  # norms between the products and attention
]
WITH_POLICIES = [
    ("llama3.2", dict(r=4, lora_dropout=0.3), True),
    ("llama_bias", dict(r=4, lora_bias=True), False),
]


@pytest.mark.compile
@pytest.mark.parametrize(
    ("family", "settings", "joined", "recompute"),
    [
        *((*kind, "none") for kind in KINDS),
        *((*kind, policy) for kind in WITH_POLICIES for policy in ("none", "selective", "full")),
    ],
    ids=str,
)
def test_attention_writes_the_gradients_of_q_k_and_v_into_one_tensor(
    together, family, settings, joined, recompute, monkeypatch, region_backend
):
    pytest.importorskip("triton")
    if recompute != "selective":  # Inductor's C++ takes most of the time, so few cases need it
        region_backend("aot_eager")
    for name in ("kernel_supports", "kernel_is_faster"):
        monkeypatch.setattr(f"fastlora.models.attention.flash.{name}", lambda *_: True)
    monkeypatch.setattr("fastlora.models.decoder.kernel_supports", lambda *_: True)
    given = []

    def watched(*args):
        given.append(args[5] is not None)  # joint
        return flash_attention(*args)

    if recompute == "none":  # inside a checkpoint, dynamo refuses writes to a list
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
