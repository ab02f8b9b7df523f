"""Each kind of pass over a base in host memory has the bits of the same pass over the device."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._pytree import tree_map

import fastlora
from fastlora import Sketch
from fastlora import functional as FL
from fastlora.distributed.host_shards import HostCopies
from fastlora.models.capture import place_names
from fastlora.models.fused_qkv import QKV
from fastlora.ops.quant.bitsandbytes import quantize_4bit
from fastlora.ops.quant.weights import Weight8bit
from fastlora.runtime import compiled
from oracles.host_bases import in_host_memory
from oracles.pairs import adapted, read_tiny
from oracles.trees import same_bits, token_ids

IDS = token_ids(4, 9, vocab_size=24)
BATCH = {"input_ids": IDS, "labels": IDS}
POLICIES = ("none", "selective", 0.4, "full")


def step(model: Any) -> Any:
    loss = lambda a: FL.loss(a, model.base, model.spec, BATCH, seed=3)
    return fastlora.value_and_grad(loss)(model.adapter)


def same_over_host_memory(model: Any, of: Any = step) -> bool:
    return same_bits(of(in_host_memory(model)), of(model))


@pytest.mark.parametrize("policy", POLICIES)
def test_captured_and_added_tensors(tiny, policy):
    """At every place; the gradient goes through the captured tensors and the added ones."""
    places = place_names(2)
    add = {place: torch.linspace(-1, 1, 16, dtype=torch.float64) for place in places[1::2]}

    def of(model):
        trees = model.base, model.spec

        def total(both):
            how = dict(capture=places, add=both["add"], seed=3)
            _, found = FL.forward(both["adapter"], *trees, IDS, **how)
            return sum(x.square().mean() for x in found.values())

        return fastlora.value_and_grad(total)({"adapter": model.adapter, "add": add})

    assert same_over_host_memory(tiny.with_spec(recompute=policy), of)


@pytest.mark.parametrize("policy", POLICIES)
def test_gradients_by_example(tiny, policy):
    def of(model):
        rows = lambda a: FL.row_losses(a, model.base, model.spec, BATCH, seed=3)[0]
        kinds = (True, "norms", Sketch(16, 5))
        return [fastlora.value_and_grad(rows, per_example=x)(model.adapter) for x in kinds]

    assert same_over_host_memory(tiny.with_spec(recompute=policy), of)


@pytest.mark.parametrize("policy", POLICIES)
def test_a_stack_of_adapters(tiny, policy):
    stack, spec = FL.stack([adapted(fastlora.disable(tiny), seed=i, r=2) for i in range(2)])
    spec = replace(spec, recompute=policy)

    def of(model):
        total = lambda stack: FL.row_losses(stack, model.base, spec, BATCH)[0].sum()
        return fastlora.value_and_grad(total)(stack)

    assert same_over_host_memory(tiny, of)


def test_a_stack_whose_rows_run_one_by_one(tiny):
    """Under torch.vmap, as DoRA's do."""
    models = [adapted(fastlora.disable(tiny), seed=i, r=2, use_dora=True) for i in range(2)]
    stack = tree_map(lambda *xs: torch.stack(xs), *(m.adapter for m in models))
    rows = torch.tensor([1, 0, 0, 1])

    def of(model):
        logits = lambda s: FL.forward(s, model.base, models[0].spec, IDS, adapter_ids=rows)
        return fastlora.value_and_grad(lambda s: logits(s).square().mean())(stack)

    assert same_over_host_memory(tiny, of)


def test_generation_with_added_vectors_and_a_stack(tiny):
    how: Any = dict(max_new_tokens=4, eos_token_id=(), return_logprobs=True)
    add = {"layers.1.attn.out": torch.ones(16), "layers.0.in": torch.ones(16)}
    assert same_over_host_memory(tiny, lambda model: model.generate(IDS[:, :4], add=add, **how))
    stack, spec = FL.stack([adapted(fastlora.disable(tiny), seed=i, r=2) for i in range(4)])
    stacked = replace(tiny, adapter=stack, spec=spec)
    assert same_over_host_memory(
        stacked, lambda m: m.generate(IDS[:, :4], adapter_ids=range(4), **how)
    )


def in_8_bits(weight: torch.Tensor) -> Weight8bit:
    scale = weight.float().abs().amax(1)
    return Weight8bit((weight.float() / scale[:, None] * 127).round().to(torch.int8), scale)


QUANTIZED: dict[str, Any] = {
    "nf4 nested": quantize_4bit,
    "int8": in_8_bits,
}


@pytest.mark.parametrize("family", ["llama_bias", "qwen2", "qwen3_tied", "mistral", "smollm3"])
@pytest.mark.parametrize("kind", ["dense", *QUANTIZED])
def test_families_and_quantized_bases(pair, family, kind):
    """Biases, a tied head, norms of q and k, a window, layers without RoPE; DoRA over each."""
    model = pair(family, torch.bfloat16).model
    if kind != "dense":
        packed = lambda name, x: {**x, "weight": QUANTIZED[kind](x["weight"])} if name in QKV else x
        layers = tuple({n: packed(n, x) for n, x in y.items()} for y in model.base["layers"])
        model = replace(model, base={**model.base, "layers": layers})
    model = adapted(model, r=2, use_dora=True, lora_dropout=0.1)
    assert same_over_host_memory(model.with_spec(recompute="selective"))


def with_fused_weights(model: Any) -> Any:
    """The model with each layer's q, k and v side by side, as on a GPU."""

    def fused(layer: Any) -> Any:
        weights = [layer[n]["weight"] for n in QKV]
        rows = torch.cat(weights).split([w.shape[0] for w in weights])
        return layer | {n: {**layer[n], "weight": w} for n, w in zip(QKV, rows, strict=True)}

    layers = tuple(map(fused, model.base["layers"]))
    return replace(model, base={**model.base, "layers": layers})


@pytest.mark.compile
def test_a_compiled_step_holds_two_layers(tmp_path, monkeypatch, fresh_dynamo):
    """Also while the compiled backward pass has a view of q, k and v."""
    monkeypatch.setattr(
        compiled, "backend", lambda graph, x: torch._dynamo.lookup_backend("aot_eager")(graph, x)
    )
    whole = with_fused_weights(read_tiny(tmp_path, num_hidden_layers=4))
    whole = whole.with_spec(compile=True, recompute="selective")
    model = in_host_memory(whole)
    layers: Any = model.base["layers"]
    alive, most = [], []

    def spy(part, size):
        fetch = HostCopies.begin(layers.shards.source, part, size)
        if size == layers.layouts[0].size:
            alive.append(StorageWeakRef(fetch.target.untyped_storage()))
            most.append(sum(not x.expired() for x in alive))
        return fetch

    layers.shards.source.begin = spy
    assert same_bits(step(model), step(whole))
    assert len(most) == 7 and max(most) == 2
