"""Gradients by added, given and captured tensors; transforms; stacks; refusals."""

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.func import jvp, vmap

import fastlora
from fastlora import functional as FL
from fastlora.model import Model
from fastlora.models.capture import place_names
from oracles.pairs import adapted
from oracles.trees import relative_error, same_bits, stacked, token_ids

IDS = token_ids(2, 7)
BATCH = {"input_ids": IDS, "labels": torch.where(IDS % 5 == 0, -100, IDS)}
PLACES = place_names(2)


def drawn(*shape: int, seed: int = 0) -> Tensor:
    gen = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=gen, dtype=torch.float64)


def slope(fn, x: Tensor, direction: Tensor, step: float = 1e-4) -> Tensor:
    """Fourth-order central difference."""
    at = lambda k: fn(x + k * step * direction)
    return (at(-2) - at(2) + 8 * (at(1) - at(-1))) / (12 * step)


def loss_of(model: Model, **how: Any):
    """Loss as a function of tensors to add, by place."""
    trees = model.adapter, model.base, model.spec
    return lambda add: FL.loss(*trees, BATCH, add=add, **how)


@pytest.mark.parametrize("policy", ["none", "selective", "full", 0.45, 0.3])
def test_gradients_by_added_vectors_equal_finite_differences(policy, tiny):
    """At all places together: the slope is a sum over them, and each also has its own check."""
    model = tiny.with_spec(recompute=policy)
    fn = loss_of(model, seed=3)
    add = {place: 0.1 * drawn(16, seed=i) for i, place in enumerate(PLACES)}
    _, grads = fastlora.value_and_grad(fn)(add)
    assert relative_error(grads, torch.func.grad(fn)(add)) < 1e-10
    if policy == "selective":
        for i, place in enumerate(PLACES):
            direction = drawn(16, seed=100 + i)
            expected = slope(lambda v, place=place: fn(add | {place: v}), add[place], direction)
            torch.testing.assert_close(
                (grads[place] * direction).sum(), expected, rtol=1e-7, atol=1e-10
            )


@pytest.mark.parametrize("shape", [(16,), (7, 1), (2, 1, 16), (2, 7, 16), ()])
def test_gradients_have_the_shape_of_what_is_added(shape, tiny):
    fn, v, direction = loss_of(tiny), drawn(*shape), drawn(*shape, seed=1)
    at = lambda v: fn({"layers.0.mlp.out": v})
    grad = fastlora.value_and_grad(at)(v)[1]
    torch.testing.assert_close((grad * direction).sum(), slope(at, v, direction))


def test_a_float32_vector_of_a_16_bit_model_has_a_float32_gradient(pair):
    model = adapted(pair("llama2", torch.bfloat16).model, r=2)
    v = torch.full((32,), 0.1)
    _, grad = fastlora.value_and_grad(lambda v: loss_of(model)({"layers.0.out": v}))(v)
    assert grad.dtype == torch.float32 and bool(grad.any())


@pytest.mark.parametrize("fn", [FL.loss, FL.loss_sum, FL.row_losses])
def test_every_loss_takes_add_and_a_soft_prompt(fn, tiny):
    """The prompt's labels are -100. Its gradient is that of a finite difference."""
    trees = tiny.adapter, tiny.base, tiny.spec
    prompt, vector = drawn(3, 16), drawn(16, seed=2)
    embedded = torch.nn.functional.embedding(IDS, tiny.base["embed_tokens"])
    labels = torch.nn.functional.pad(BATCH["labels"], (3, 0), value=-100)

    def value(prompt: Tensor) -> Tensor:
        embeds = torch.cat([prompt.expand(2, 3, 16), embedded], 1)
        batch = {"labels": labels}
        result = fn(*trees, batch, inputs_embeds=embeds, add={"layers.1.in": vector}, seed=1)
        return result if isinstance(result, Tensor) else result[0].sum()

    _, grad = fastlora.value_and_grad(value)(prompt)
    direction = drawn(3, 16, seed=5)
    torch.testing.assert_close((grad * direction).sum(), slope(value, prompt, direction))


def test_captured_tensors_are_differentiable(tiny):
    """By the adapter, and by what is added before: hot path, torch.func and the model's method."""
    vector = drawn(16)

    def value(tree):
        adapter, v = tree
        trees = adapter, tiny.base, tiny.spec
        _, found = FL.forward(*trees, IDS, capture=PLACES, add={"embed": v}, seed=3)
        return torch.stack([(x**3).mean() for x in found.values()]).sum()

    tree = (tiny.adapter, vector)
    _, grads = fastlora.value_and_grad(value)(tree)
    assert relative_error(grads, torch.func.grad(value)(tree)) < 1e-10
    leaf = vector.clone().requires_grad_()
    frozen = tiny.for_inference()
    _, found = frozen(IDS, capture=["norm"], add={"embed": leaf})
    found["norm"].sum().backward()
    assert leaf.grad is not None and bool(leaf.grad.any())
    assert not frozen(IDS, capture=["norm"])[1]["norm"].requires_grad


def test_transforms_over_vectors_and_embeddings(tiny):
    trees, several = (tiny.adapter, tiny.base, tiny.spec), drawn(3, 16)
    run = lambda v: FL.forward(*trees, IDS, capture=["layers.1.attn.out"], add={"layers.0.out": v})
    expected = [run(v) for v in several]
    logits, found = vmap(run)(several)
    assert relative_error(logits, torch.stack([x for x, _ in expected])) < 1e-12
    alone = torch.stack([x["layers.1.attn.out"] for _, x in expected])
    assert relative_error(found["layers.1.attn.out"], alone) < 1e-12
    last = lambda v: run(v)[1]["layers.1.attn.out"]
    direction = drawn(16, seed=9)
    _, tangent = jvp(last, (several[0],), (direction,))
    assert relative_error(tangent, slope(last, several[0], direction)) < 1e-8
    of_embeds = lambda x: FL.forward(*trees, None, inputs_embeds=x)
    many = drawn(3, 2, 7, 16)
    assert relative_error(vmap(of_embeds)(many), torch.stack([*map(of_embeds, many)])) < 1e-12


# ── stacks ────────────────────────────────────────────────────────────────────────────────

ROWS = token_ids(6, 7)


@pytest.mark.parametrize("kind", [{}, {"use_dora": True}], ids=["grouped", "row by row"])
@pytest.mark.parametrize("which", [[2, 0, 2, 1, 1, 0], [2, 0, 2, 2, 0, 2]], ids=str)
def test_rows_of_a_stack_come_back_in_the_batchs_order(which, kind, tiny):
    base = fastlora.disable(tiny)
    models = [adapted(base, seed=i, r=2, lora_dropout=0.2, **kind) for i in range(3)]
    stack, spec = stacked([m.adapter for m in models]), models[0].spec
    embeds = drawn(6, 7, 16, seed=3)
    add = {"layers.0.attn.out": drawn(6, 1, 16), "layers.1.in": drawn(16, seed=1)}
    ids, seeds = torch.tensor(which), torch.tensor([1, 2, 3])
    how: dict[str, Any] = dict(capture=PLACES, add=add, inputs_embeds=embeds)
    trees = stack, base.base, spec
    logits, found = FL.forward(*trees, None, adapter_ids=ids, seed=seeds, **how)
    for i, model in enumerate(models):
        mine = ids == i
        if not mine.any():
            continue
        own = {
            "layers.0.attn.out": add["layers.0.attn.out"][mine],
            "layers.1.in": add["layers.1.in"],
        }
        trees = model.adapter, model.base, model.spec
        alone = dict(capture=PLACES, add=own, inputs_embeds=embeds[mine], seed=i + 1)
        expected, tensors = FL.forward(*trees, None, **alone)
        assert relative_error(logits[mine], expected) < 1e-11
        for place, x in tensors.items():
            assert relative_error(found[place][mine], x) < 1e-11, place


def test_a_stack_of_documents_captures_each_tokens_adapter(tiny):
    base = fastlora.disable(tiny)
    models = [adapted(base, seed=i, r=2) for i in range(2)]
    stack, spec = FL.stack(models)
    segments = (torch.arange(7) // 4).expand(2, 7)
    which = torch.tensor([[0] * 4 + [1] * 3, [1] * 4 + [0] * 3])
    how: dict[str, Any] = dict(segment_ids=segments, capture=["layers.1.mlp.out"])
    _, found = FL.forward(stack, base.base, spec, IDS, adapter_ids=which, **how)
    for i, model in enumerate(models):
        expected = model(IDS, **how)[1]["layers.1.mlp.out"]
        assert relative_error(found["layers.1.mlp.out"][which == i], expected[which == i]) < 1e-11


def test_per_example_gradients_flow_through_captured_and_added_tensors(tiny):
    """And through entropies: equal to a loop over the rows."""
    vector = drawn(2, 1, 16)

    def values(adapter: Any, ids: Tensor, vector: Tensor) -> Tensor:
        trees, add = (adapter, tiny.base, tiny.spec), {"layers.0.attn.out": vector}
        _, found = FL.forward(*trees, ids, capture=["layers.1.mlp.out"], add=add)
        logp, entropy = FL.token_logprobs(*trees, ids, ids, add=add, entropy=True)
        return (found["layers.1.mlp.out"] ** 2).sum((1, 2)) + (logp + entropy).sum(1)

    each = fastlora.value_and_grad(values, per_example=True)(tiny.adapter, IDS, vector)
    one = fastlora.value_and_grad(lambda *args: values(*args)[0])
    loop = [one(tiny.adapter, IDS[i : i + 1], vector[i : i + 1]) for i in range(2)]
    assert relative_error(each, stacked(loop)) < 1e-10


# ── refusals ──────────────────────────────────────────────────────────────────────────────


def test_every_problem_is_named_before_any_work(tiny, monkeypatch):
    def refuse(*args: Any, **kwargs: Any) -> None:
        raise AssertionError("the model ran")

    monkeypatch.setattr("fastlora.models.outputs.hidden_states", refuse)
    add: Any = {"layers.2.in": drawn(16), "norm": drawn(15), "embed": torch.ones(16).long()}
    embeds = drawn(2, 7, 16)
    parts = [
        r"capture has no place 'layers.0', 'embeds'; expected embed, layers.I.in, "
        r"layers.I.attn.out, layers.I.mlp.out, layers.I.out with I from 0 to 1, or norm",
        r"input_ids and inputs_embeds are both given",
        r"add has no place 'layers.2.in'",
        r"add\['norm'\] must broadcast to \[2, 7, 16\], got a Tensor \[15\]",
        r"add\['embed'\] must be a floating-point tensor, got a Tensor \[16\] of torch.int64",
    ]
    how: dict[str, Any] = dict(capture=["norm", "layers.0", "embeds"], add=add)
    for call in (
        lambda: FL.forward(None, tiny.base, tiny.spec, IDS, inputs_embeds=embeds, **how),
        lambda: tiny(IDS, inputs_embeds=embeds, **how),
    ):
        with pytest.raises(ValueError, match="(?s)" + ".*".join(parts)):
            call()


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ({"capture": "embed"}, "capture='embed': expected a list or tuple of names"),
        ({"add": [torch.ones(16)]}, "add=.* expected a dict"),
        ({"add": {"norm": torch.ones(2, 2, 7, 16)}}, r"must broadcast to \[2, 7, 16\]"),
        ({"add": {"norm": torch.ones(16, device="meta")}}, "is on meta, the model on cpu"),
        ({"inputs_embeds": torch.ones(2, 7, 15)}, "inputs_embeds must be a non-empty floating"),
        ({"inputs_embeds": torch.ones(2, 7, 16, device="meta")}, "is on meta, the model on cpu"),
        ({"inputs_embeds": torch.ones(1, 6, 16)}, r"labels must be .* \[1, 6\]"),
        ({"input_ids": None}, "input_ids must be"),
        ({"entropy": 1}, "entropy=1: expected True or False"),
    ],
)
def test_a_wrong_argument_is_named(how, message, tiny):
    trees = tiny.adapter, tiny.base, tiny.spec
    inputs = {"input_ids": None if "inputs_embeds" in how else IDS} | how
    call: Any = FL.forward if "capture" in how else FL.token_logprobs
    more = {} if "capture" in how else {"labels": IDS}
    with pytest.raises((ValueError, TypeError), match="(?s)" + message + "|Type-check"):
        call(*trees, **inputs | more)


def test_too_many_embeddings_are_named(tiny):
    t = tiny.spec.max_seq_length + 1
    with pytest.raises(ValueError, match=f"inputs_embeds has {t} tokens a row; max_seq_length is"):
        tiny(inputs_embeds=torch.ones(1, t, 16))


def test_a_batch_without_ids_needs_embeddings(tiny):
    trees = tiny.adapter, tiny.base, tiny.spec
    with pytest.raises(ValueError, match="missing input_ids"):
        FL.loss(*trees, {"labels": IDS})
    with pytest.raises(ValueError, match="both given"):
        FL.loss(*trees, BATCH, inputs_embeds=drawn(2, 7, 16))
    with pytest.raises(ValueError, match="max_seq_length"):
        tiny(inputs_embeds=drawn(1, 200, 16))


def test_an_empty_capture_returns_a_pair(tiny):
    logits, found = tiny(IDS, capture=())
    assert found == {} and same_bits(logits, tiny(IDS))
