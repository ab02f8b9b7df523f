"""The decoder: masks, keys, the tensors that it keeps in memory, and the graphs that it builds."""

from dataclasses import replace

import pytest
import torch
from torch.utils._pytree import tree_leaves, tree_map

from fastlora import functional as FL
from fastlora.models import decoder
from fastlora.models.decoder import dropout_key, hidden_states, position_tables
from fastlora.models.graph_input import requires_grad
from fastlora.models.head import head
from fastlora.ops.attention.flash import Spans
from oracles.pairs import adapted
from oracles.trees import token_ids


def test_masks_are_built_once_per_layer_type(pair):
    config = pair("qwen2_window").model.spec.config
    at = position_tables(config, token_ids(2, 9, vocab_size=96), torch.float32, None, None, None)
    assert at.masks["full_attention"] is None
    assert at.masks["sliding_attention"].shape == (1, 1, 9, 9)
    assert set(at.masks) == set(config.layer_types)


@pytest.mark.parametrize(
    ("packed", "padded", "window", "dtype", "fused", "spanned"),
    [
        (True, False, None, torch.bfloat16, True, True),
        (False, False, 100, torch.float16, True, True),
        (False, False, None, torch.bfloat16, True, False),  # causal
        (False, False, 256, torch.bfloat16, True, False),  # a window of all there is
        (True, True, None, torch.bfloat16, True, False),
        (True, False, None, torch.float32, True, False),
        (True, False, None, torch.bfloat16, False, False),
    ],
)
def test_spans_replace_masks_where_kernels_support_them(
    packed, padded, window, dtype, fused, spanned, tiny
):
    kind = "full_attention" if window is None else "sliding_attention"
    config = replace(tiny.spec.config, head_dim=64, sliding_window=window, layer_types=(kind,) * 2)
    spec = replace(tiny.spec, config=config)
    x, ids = torch.empty(2, 256, 128, dtype=dtype), torch.ones(2, 256, dtype=torch.int64)
    seen = decoder.attention_masks(spec, x, ids if padded else None, ids if packed else None, fused)
    assert isinstance(seen[kind], Spans) is spanned


def test_a_tied_head_is_the_embedding_itself(pair):
    base, spec = pair("llama3.2").model.base, pair("llama3.2").model.spec
    assert head(None, base, spec)["weight"] is base["embed_tokens"]
    untied = pair("llama2").model.base
    assert head(None, untied, pair("llama2").model.spec)["weight"] is untied["lm_head"]


def test_hidden_states_times_the_head_are_the_logits(tiny):
    ids = token_ids(2, 7)
    hidden = hidden_states(tiny.adapter, tiny.base, tiny.spec, ids)
    torch.testing.assert_close(
        hidden @ head(None, tiny.base, tiny.spec)["weight"].t(), tiny(ids), rtol=1e-12, atol=1e-12
    )


@pytest.mark.parametrize("compile", [False, pytest.param(True, marks=pytest.mark.compile)])
def test_layers_below_the_first_adapter_keep_nothing(compile, pair, region_backend):
    """finetune_last_n_layers: below the first adapter flows no gradient, so nothing is saved."""
    region_backend("aot_eager")

    def saved(layers: list[int]) -> int:
        model = adapted(pair("smollm3").model, r=4, layers_to_transform=layers)
        model = model.with_spec(compile=compile, recompute="none").for_training()
        found: set[tuple[int, int]] = set()
        weights = {x.data_ptr() for x in tree_leaves((model.base, model.adapter))}

        def pack(x: torch.Tensor) -> torch.Tensor:
            if x.data_ptr() not in weights:
                found.add((x.data_ptr(), x.numel()))
            return x

        ids = token_ids(2, 9, vocab_size=96)
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
            held = hidden_states(model.adapter, model.base, model.spec, ids)
        assert held.requires_grad
        return sum(numel for _, numel in found)

    assert saved([3]) <= saved([0, 1, 2, 3]) / 3


def test_without_a_seed_or_dropout_there_are_no_keys(tiny, pair):
    cpu = torch.device("cpu")
    assert dropout_key(tiny.spec, None, cpu) is None
    assert dropout_key(pair("llama2").model.spec, 3, cpu) is None
    assert dropout_key(adapted(pair("llama2").model, r=2).spec, 3, cpu) is None
    assert dropout_key(tiny.spec, 3, cpu).dtype == torch.int64


def test_requires_grad_finds_any_leaf():
    x = torch.ones(1)
    assert not requires_grad(None) and not requires_grad({"a": (x,)})
    assert requires_grad({"a": (x, x.clone().requires_grad_())})


def test_base_training_differentiates_the_base(tiny):
    """scripts/make_demo trains the base. Then every op runs its differentiable reference."""
    ids = token_ids(2, 7)
    batch = {"input_ids": ids, "labels": ids}
    base = tree_map(lambda x: x.detach().requires_grad_(), tiny.base)
    loss = FL.loss(tiny.adapter, base, tiny.spec, batch)
    grads = torch.autograd.grad(loss, tree_leaves(base))
    expected = torch.func.grad(lambda b: FL.loss(tiny.adapter, b, tiny.spec, batch))(tiny.base)
    for g, e in zip(grads, tree_leaves(expected), strict=True):
        assert g.any()
        torch.testing.assert_close(g, e, rtol=1e-9, atol=1e-12)
