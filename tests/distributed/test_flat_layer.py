"""A layer as one run of bytes, and the base in host memory of a single process."""

import pytest
import torch
from torch.utils._pytree import tree_leaves

import fastlora
from fastlora.distributed.flat_layer import ALIGN, layout_of, pack, unpack
from fastlora.distributed.host_shards import HostCopies
from fastlora.models import decoder
from fastlora.models.fused_qkv import QKV, fused_qkv
from fastlora.runtime import host_offload, layer_fetching
from fastlora.runtime.host_offload import HostStash
from oracles.host_bases import in_host_memory
from oracles.sharding_laws import BATCH, Passes, step
from oracles.trees import same_bits

FEW = {name: x % 24 for name, x in BATCH.items()}  # ids of the vocabulary of `tiny`


def layers(pair, **changes):
    model = pair("llama_bias", torch.bfloat16).model
    if changes.get("load_in_4bit"):
        model = fastlora.quantize(model)
    return model.base["layers"]


@pytest.mark.parametrize("how", [{}, {"load_in_4bit": True}])
@pytest.mark.parametrize("ranks", [1, 2, 3])
def test_the_parts_of_all_ranks_are_the_layer(pair, how, ranks):
    tree = layers(pair, **how)[0]
    layout = layout_of(tree, ranks)
    parts = [pack(layout, tree, rank, ranks) for rank in range(ranks)]
    assert layout.size % (ALIGN * ranks) == 0 and len({len(p) for p in parts}) == 1
    flat = torch.cat(parts)
    back = unpack(layout, flat)
    assert same_bits(back, tree)
    assert [x.stride() for x in tree_leaves(back)] == [x.stride() for x in tree_leaves(tree)]
    storage = flat.untyped_storage().data_ptr()
    assert all(x.untyped_storage().data_ptr() == storage for x in tree_leaves(back))


def test_equal_layers_have_equal_layouts_and_little_padding(pair):
    first, second = layers(pair)
    assert layout_of(first, 2) == layout_of(second, 2)
    # 256 bytes for each of 16 tensors at most.
    assert layout_of(first).size - sum(x.nbytes for x in tree_leaves(first)) < 17 * ALIGN


def test_a_tensor_that_is_there_twice_stays_one_tensor():
    levels = torch.arange(16.0)
    tree = {"a": (torch.ones(3), levels), "b": (torch.zeros(5), levels)}
    layout = layout_of(tree)
    back = unpack(layout, pack(layout, tree))
    assert same_bits(back, tree) and back["a"][1] is back["b"][1]


@pytest.mark.parametrize("fused", [False, True])
def test_q_k_and_v_lie_side_by_side_only_if_they_did(pair, fused):
    # No biases, whose slots would lie in between.
    tree = dict(pair("llama2", torch.bfloat16).model.base["layers"][0])
    if fused:
        weights = [tree[n]["weight"] for n in QKV]
        rows = torch.cat(weights).split([w.shape[0] for w in weights])
        tree |= {n: {**tree[n], "weight": w} for n, w in zip(QKV, rows, strict=True)}
    layout = layout_of(tree)
    back = unpack(layout, pack(layout, tree))
    assert (fused_qkv(tree) is not None) == (fused_qkv(back) is not None) == fused
    assert same_bits(back, tree)


# ── host memory, one process ──────────────────────────────────────────────────────────────


@pytest.mark.parametrize("prefetch", [0, 1, 2])
def test_any_prefetch_gives_the_same_bits(tiny, prefetch):
    sharded = in_host_memory(tiny)
    sharded.base["layers"].prefetch = prefetch
    with Passes() as made:
        assert same_bits(step(sharded, FEW), step(tiny, FEW))
    assert (made[0].fetches, made[0].most) == (3, min(1 + prefetch, 2))


def test_offload_and_fetched_layers_share_their_hooks(tiny, monkeypatch):
    """Only the innermost hooks act, so one stash replaces activations, casts and weights."""
    model = tiny.with_spec(recompute="offload")
    packed: list = []
    monkeypatch.setattr(host_offload, "_MIN_BYTES", 1)
    monkeypatch.setattr(decoder, "_stash", lambda spec, x: HostStash(x.device))
    # Eager checkpoints would have hooks of their own inside.
    monkeypatch.setattr(decoder, "offload_levels", lambda *_: ("none", "none"))
    unpack_ = HostStash._unpack
    monkeypatch.setattr(HostStash, "_unpack", lambda self, x: packed.append(x) or unpack_(self, x))
    want = step(model, FEW)
    packed.clear()
    assert same_bits(step(in_host_memory(model), FEW), want)
    homes = {type(x[0]) for x in packed if isinstance(x, tuple)}
    assert homes == {int, layer_fetching.Refetched}


def test_autograd_keeps_no_weight(tiny):
    """After the forward pass, nothing refers to the layers but the last one's pass."""
    model = in_host_memory(tiny.with_spec(recompute="none"))
    alive, begin = [], HostCopies.begin

    def spy(self, part, size):
        fetch = begin(self, part, size)
        alive.append(
            torch.multiprocessing.reductions.StorageWeakRef(fetch.target.untyped_storage())
        )
        return fetch

    source = model.base["layers"].shards.source
    source.begin = spy.__get__(source)
    loss = model.for_training().loss(FEW)
    # The embedding, layer 0 and 1, the head.
    assert len(alive) == 4 and [x.expired() for x in alive] == [True, True, False, True]
    loss.backward()


def test_a_second_backward_pass_fetches_again(tiny):
    model = in_host_memory(tiny.with_spec(recompute="none")).for_training()
    loss = model.loss(FEW)
    leaves = tree_leaves(model.adapter)
    first = torch.autograd.grad(loss, leaves, retain_graph=True)
    assert same_bits(torch.autograd.grad(loss, leaves), first)


def test_add_tokens_over_host_memory(pair):
    model, tokenizer = fastlora.load("demo", device="cpu")
    sharded, _ = fastlora.load("demo", device="cpu", shard="host")
    want, got = (fastlora.add_tokens(m, tokenizer, ["<new>"])[0] for m in (model, sharded))
    assert isinstance(got.base["embed_tokens"], layer_fetching.FetchedMatrix)
    assert want.spec == got.spec and same_bits(fastlora.gathered(got).base, want.base)


def test_a_forward_pass_in_the_users_compile_is_refused(tiny, monkeypatch):
    layers = in_host_memory(tiny).base["layers"]
    with monkeypatch.context() as patch, pytest.raises(RuntimeError, match="sharded base"):
        patch.setattr(torch.compiler, "is_compiling", lambda: True)
        layer_fetching.open_pass(layers)


def test_indexing_fetches_each_layer_once(tiny):
    model = in_host_memory(tiny)
    kept = model.base["layers"]
    assert kept[0] is kept[0] and kept[-1] is kept[1]
    assert len(kept[:1]) == 1 and len(list(kept)) == 2
    with pytest.raises(IndexError):
        kept[2]


def test_a_run_over_host_memory_has_the_losses_of_a_run_over_the_device(tmp_path):
    rows = [{"prompt": "a", "completion": "b c"}] * 4
    losses = []
    for shard in (None, "host"):
        model, tokenizer = fastlora.load("demo", device="cpu", dtype="float32", shard=shard)
        model = fastlora.lora(model, r=2)
        how = dict(max_steps=2, batch_size=1, eval_data=rows[:1], progress=False)
        out = tmp_path / str(shard)
        trained, history = fastlora.train(model, tokenizer, rows, output_dir=out, **how)
        losses.append((history.losses, history.eval_losses))
        trained.save_pretrained(out / "adapter")
    assert losses[0] == losses[1]
    files = [
        (tmp_path / s / "adapter/adapter_model.safetensors").read_bytes() for s in ("None", "host")
    ]
    assert files[0] == files[1]
