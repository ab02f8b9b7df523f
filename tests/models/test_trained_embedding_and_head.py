"""Trained embedding, head, norms and biases: gradients, transforms, chunks, generation.

formats/test_peft_parity.py compares the values with PEFT's. Here all ways of
running them give the values of plain torch functions.
"""

import pytest
import torch
import torch.nn.functional as F
from torch.func import grad_and_value, hessian, jvp, vmap
from torch.utils._pytree import tree_leaves, tree_map

import fastlora
from fastlora import functional as FL
from fastlora.ops.loss import linear_cross_entropy
from oracles.pairs import adapted
from oracles.trees import randomised, relative_error, same_bits, token_ids

Q = ["q_proj", "v_proj", "down_proj"]
BOTH = [*Q, "embed_tokens", "lm_head"]

# Name -> (family, settings). Together they use every field of spec.Extras.
MODELS = {
    "biases and norms": (
        "llama_bias",
        dict(target_modules=Q, bias="all", modules_to_save=["norm"]),
    ),
    "copies of both": (
        "llama2",
        dict(target_modules=Q, modules_to_save=["embed_tokens", "lm_head"]),
    ),
    "one copy of a tied pair": (
        "llama3.2",
        dict(target_modules=Q, modules_to_save=["lm_head"], ensure_weight_tying=True),
    ),
    "LoRA on both": ("llama2", dict(target_modules=BOTH)),
    "DoRA on both": ("llama2", dict(target_modules=BOTH, use_dora=True)),
    "lora_bias on the head": ("llama2", dict(target_modules=[*Q, "lm_head"], lora_bias=True)),
    "one LoRA of a tied pair": ("llama3.2", dict(target_modules=BOTH, ensure_weight_tying=True)),
    "shared rows": ("llama3.2", dict(target_modules=Q, trainable_token_indices=[3, 7, 90])),
    "rows beside LoRA": (
        "llama2",
        dict(target_modules=[*Q, "embed_tokens"], trainable_token_indices={"lm_head": [3, 7]}),
    ),
}

IDS = token_ids(2, 9, vocab_size=96)
BATCH = {"input_ids": IDS, "labels": torch.where(torch.arange(9) < 2, -100, IDS)}


@pytest.fixture(params=MODELS)
def model(request, pair):
    """A model in float64 whose trained tensors are random."""
    return made(request.param, pair)


def made(name, pair, **more):
    family, settings = MODELS[name]
    base = pair(family, torch.float64).model
    model = fastlora.lora(base, r=3, adapter_dtype="float64", **settings, **more)
    return model.with_adapter(randomised(model.adapter, 1))


def both_ways(model, seed=None):
    """(value, gradient) by value_and_grad, and by torch.func over plain functions."""
    args = (model.adapter, model.base, model.spec, BATCH)
    fused = fastlora.value_and_grad(FL.loss)(*args, seed=seed)
    gradient, value = grad_and_value(FL.loss)(*args, seed=seed)
    return fused, (value, gradient)


def assert_same(ours, theirs, tolerance):
    assert abs(ours[0] - theirs[0]) <= tolerance
    assert relative_error(ours[1], theirs[1]) <= tolerance


@pytest.mark.parametrize("name", [n for n in MODELS if "DoRA" not in n])  # its norms are constants
def test_plain_gradients_equal_finite_differences(name, pair):
    model = made(name, pair)
    gradient, _ = grad_and_value(FL.loss)(model.adapter, model.base, model.spec, BATCH)
    direction = randomised(model.adapter, 2)
    along = sum(
        (g * d).sum() for g, d in zip(*map(tree_leaves, (gradient, direction)), strict=True)
    )
    at = lambda h: FL.loss(
        tree_map(lambda x, d: x + h * d, model.adapter, direction), model.base, model.spec, BATCH
    )
    h = 1e-5
    expected = (at(h) - at(-h)) / (2 * h)
    torch.testing.assert_close(along, expected, rtol=1e-5, atol=1e-8)


@pytest.mark.parametrize("recompute", ["none", "selective", "full", 0.4, "offload"])
def test_every_policy_gives_torch_funcs_gradient(recompute, model):
    assert_same(*both_ways(model.with_spec(recompute=recompute)), 1e-11)


def test_many_chunks_give_the_gradient_of_one(model, monkeypatch):
    _, plain = both_ways(model)
    monkeypatch.setattr(linear_cross_entropy, "_CHUNK_ELEMENTS", 4 * 96)  # 4 rows at a time
    assert linear_cross_entropy.rows_per_chunk(96) == 4
    fused, chunked_reference = both_ways(model)
    assert_same(fused, plain, 1e-11)
    assert_same(chunked_reference, plain, 1e-11)


@pytest.mark.parametrize("name", ["LoRA on both", "DoRA on both", "one LoRA of a tied pair"])
def test_all_ways_to_compute_the_loss_drop_the_same_inputs_of_the_head(name, pair, monkeypatch):
    model = made(name, pair, lora_dropout=0.4)
    fused, plain = both_ways(model, seed=5)
    assert_same(fused, plain, 1e-11)
    logits = FL.forward(model.adapter, model.base, model.spec, IDS, seed=5)
    labels = BATCH["labels"][:, 1:].flatten()
    whole = F.cross_entropy(logits[:, :-1].flatten(0, 1), labels)
    torch.testing.assert_close(fused[0], whole, rtol=1e-12, atol=1e-12)
    monkeypatch.setattr(linear_cross_entropy, "_CHUNK_ELEMENTS", 4 * 96)
    assert_same(both_ways(model, seed=5)[0], plain, 1e-11)
    other = FL.forward(model.adapter, model.base, model.spec, IDS, seed=6)
    assert not torch.allclose(logits, other)


def test_the_loss_of_a_trained_head_never_holds_all_logits(pair, monkeypatch):
    model = made("LoRA on both", pair)
    monkeypatch.setattr(linear_cross_entropy, "_CHUNK_ELEMENTS", 4 * 96)
    seen = []
    plain = linear_cross_entropy.label_logprobs

    def watched(logits, labels):
        seen.append(len(logits))
        return plain(logits, labels)

    monkeypatch.setattr("fastlora.models.head_logprobs.label_logprobs", watched)
    fastlora.value_and_grad(FL.loss)(model.adapter, model.base, model.spec, BATCH)
    assert seen == [4, 4, 4, 4, 2]


def test_a_second_derivative_of_the_fused_loss_is_refused(pair):
    model = made("LoRA on both", pair)
    leaves = tree_map(lambda x: x.detach().requires_grad_(), model.adapter)
    loss = FL.loss(leaves, model.base, model.spec, BATCH)
    with pytest.raises(RuntimeError, match=r"no second derivative.*torch\.func"):
        torch.autograd.grad(loss, tree_leaves(leaves), create_graph=True)


def test_transforms_compose(pair):
    """Hessian-vector products computed in two ways, per-example gradients, a stack of adapters."""
    model = made("rows beside LoRA", pair)
    loss = lambda adapter, batch=BATCH: FL.loss(adapter, model.base, model.spec, batch)
    direction = randomised(model.adapter, 3)
    _, forward_over_reverse = jvp(torch.func.grad(loss), (model.adapter,), (direction,))
    h = 1e-5
    shifted = lambda s: torch.func.grad(loss)(
        tree_map(lambda x, d: x + s * d, model.adapter, direction)
    )
    central = tree_map(lambda a, b: (a - b) / (2 * h), shifted(h), shifted(-h))
    assert relative_error(forward_over_reverse, central) <= 1e-5
    each = vmap(
        torch.func.grad(lambda a, x: loss(a, {"input_ids": x[None], "labels": x[None]})),
        in_dims=(None, 0),
    )(model.adapter, IDS)
    alone = torch.func.grad(lambda a: loss(a, {"input_ids": IDS[:1], "labels": IDS[:1]}))
    assert relative_error(tree_map(lambda x: x[0], each), alone(model.adapter)) <= 1e-10
    rows = lambda x: loss({**model.adapter, "tokens": {"lm_head": x}})
    assert hessian(rows)(model.adapter["tokens"]["lm_head"]).isfinite().all()


def test_each_row_of_a_batch_may_have_another_adapter(model):
    other = model.with_adapter(randomised(model.adapter, 9))
    stack = tree_map(lambda x, y: torch.stack([x, y]), model.adapter, other.adapter)
    which = torch.tensor([1, 0])
    mixed = FL.forward(stack, model.base, model.spec, IDS, adapter_ids=which)
    torch.testing.assert_close(mixed[:1], other(IDS[:1]), rtol=0, atol=1e-10)
    torch.testing.assert_close(mixed[1:], model(IDS[1:]), rtol=0, atol=1e-10)


def test_generation_chooses_the_likeliest_tokens(model):
    prompt, new = IDS[:, :4], 4
    ids = model.generate(prompt, max_new_tokens=new, eos_token_id=())
    logits = model(ids)
    for i in range(4, 4 + new):
        assert torch.equal(ids[:, i], logits[:, i - 1].argmax(-1))
    assert not torch.equal(
        ids, fastlora.disable(model).generate(prompt, max_new_tokens=new, eos_token_id=())
    )


@pytest.mark.compile
@pytest.mark.parametrize("name", ["biases and norms", "LoRA on both", "one copy of a tied pair"])
def test_compiled_gradients_equal_the_plain_ones(name, pair, region_backend):
    model = made(name, pair).with_spec(compile=True)
    # Inductor for the default policy, first; its C++ takes nine tenths of the time.
    for recompute in ("selective", "none", "full"):
        if recompute != "selective":
            region_backend("aot_eager")
        assert_same(*both_ways(model.with_spec(recompute=recompute)), 1e-10)


@pytest.mark.compile
def test_the_callers_own_torch_compile_works(pair, fresh_dynamo):
    model = made("rows beside LoRA", pair)
    whole = torch.compile(lambda a: FL.loss(a, model.base, model.spec, BATCH), backend="aot_eager")
    torch.testing.assert_close(
        whole(model.adapter), FL.loss(model.adapter, model.base, model.spec, BATCH)
    )


def test_the_triton_kernel_works_with_a_trained_head(pair):
    pytest.importorskip("triton")
    family, settings = MODELS["LoRA on both"]
    model = adapted(pair(family).model, r=3, **settings)
    args = (model.adapter, model.base, model.spec, BATCH)
    plain = fastlora.value_and_grad(FL.loss)(*args)
    kernel = model.with_spec(kernels="triton").spec
    fused = fastlora.value_and_grad(FL.loss)(model.adapter, model.base, kernel, BATCH)
    assert_same(fused, plain, 2e-5)


def test_given_tensors_are_not_written_to(model):
    before = [x.clone() for x in tree_leaves((model.base, model.adapter))]
    fastlora.value_and_grad(FL.loss)(model.adapter, model.base, model.spec, BATCH)
    model.generate(IDS[:, :3], max_new_tokens=2)
    fastlora.merge(model) if not model.spec.lora.lora_bias else None
    leaves = tree_leaves((model.base, model.adapter))
    assert same_bits(leaves, before) and not any(x.requires_grad for x in leaves)
