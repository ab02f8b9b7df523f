"""Every torch.func transform of the loss and the log-probabilities, against float64."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.func import hessian, jacrev, jvp, vjp, vmap
from torch.utils._pytree import tree_flatten, tree_leaves, tree_map, tree_unflatten

from fastlora import functional as FL
from fastlora.model import Model
from oracles.batches import batch_of
from oracles.pairs import adapted
from oracles.trees import randomised, relative_error

grad = torch.func.grad


def loss(adapter: Any, model: Model, batch: dict[str, Tensor], seed: Any = None) -> Tensor:
    return FL.loss(adapter, model.base, model.spec, batch, seed=seed)


def logprobs(adapter: Any, model: Model, batch: dict[str, Tensor]) -> Tensor:
    inputs = batch["input_ids"], batch["labels"]
    return FL.token_logprobs(adapter, model.base, model.spec, *inputs)


def with_leaf(adapter: Any, leaf: Tensor) -> Any:
    """The adapter with B of the first layer's v_proj replaced: 8 x 2, the smallest there is."""
    first = adapter["layers"][0]
    return {
        "layers": ({**first, "v_proj": first["v_proj"]._replace(b=leaf)}, *adapter["layers"][1:])
    }


def plain_grad(fn: Callable[..., Tensor], tree: Any) -> Any:
    """autograd.grad outside of torch.func: the fused ops' own backward."""
    leaves, structure = tree_flatten(tree)
    leaves = [x.detach().requires_grad_() for x in leaves]
    value = fn(tree_unflatten(leaves, structure))
    return tree_unflatten(list(torch.autograd.grad(value, leaves)), structure)


def along(tree: Any, direction: Any, step: float) -> Any:
    return tree_map(lambda x, d: x + step * d, tree, direction)


def slope(fn: Callable[[Any], Any], tree: Any, direction: Any, step: float = 1e-4) -> Any:
    """Fourth-order central difference: error of order step**4, 1e-12 from rounding in float64."""
    at = lambda k: fn(along(tree, direction, k * step))
    stencil = lambda a, b, c, d: (a - d + 8 * (c - b)) / (12 * step)
    return tree_map(stencil, at(-2), at(-1), at(1), at(2))


def inner(a: Any, b: Any) -> Tensor:
    return torch.stack(
        [(x * y).sum() for x, y in zip(tree_leaves(a), tree_leaves(b), strict=True)]
    ).sum()


BATCH = batch_of(3, 6)
SEEDS = torch.tensor([7, 8, 2**40])


def stacked(tree: Any, direction: Any) -> Any:
    """Three adapters in one tree."""
    steps = torch.tensor([0.0, 0.5, -0.3], dtype=torch.float64)
    return tree_map(lambda x, d: x + steps.view(3, 1, 1) * d, tree, direction)


def nth(tree: Any, i: int) -> Any:
    return tree_map(lambda x: x[i], tree)


def example(i: int) -> dict[str, Tensor]:
    return {name: x[i : i + 1] for name, x in BATCH.items()}


def one_row(fn: Callable) -> Callable:
    """fn(adapter, model, row of a batch), the row without its batch dimension, as vmap gives it."""
    return lambda a, m, row: fn(a, m, {name: x[None] for name, x in row.items()})


# A transform is a function of (adapter, model, a direction), so that it also compiles whole.
TRANSFORMS: dict[str, Callable[[Any, Model, Any], Any]] = {
    "grad": lambda a, m, d: grad(loss)(a, m, BATCH),
    "grad with dropout": lambda a, m, d: grad(loss)(a, m, BATCH, 7),
    "grad with a seed tensor": lambda a, m, d: grad(loss)(a, m, BATCH, SEEDS[0]),
    "vjp": lambda a, m, d: vjp(lambda a: logprobs(a, m, BATCH), a)[1](COTANGENT)[0],
    "jvp": lambda a, m, d: jvp(lambda a: logprobs(a, m, BATCH), (a,), (d,))[1],
    "vmap over examples": lambda a, m, d: vmap(one_row(loss), in_dims=(None, None, 0))(a, m, BATCH),
    "grads of examples": lambda a, m, d: vmap(grad(one_row(loss)), in_dims=(None, None, 0))(
        a, m, BATCH
    ),
    "vmap over adapters": lambda a, m, d: vmap(lambda a: logprobs(a, m, BATCH))(stacked(a, d)),
    "grads of adapters": lambda a, m, d: vmap(grad(lambda a: loss(a, m, BATCH)))(stacked(a, d)),
    "vmap over seeds": lambda a, m, d: vmap(loss, in_dims=(None, None, None, 0))(
        a, m, BATCH, SEEDS
    ),
    "grads of seeds": lambda a, m, d: vmap(grad(loss), in_dims=(None, None, None, 0))(
        a, m, BATCH, SEEDS
    ),
    "hvp": lambda a, m, d: jvp(lambda a: grad(loss)(a, m, BATCH), (a,), (d,))[1],
    "reverse over reverse": lambda a, m, d: grad(lambda a: inner(grad(loss)(a, m, BATCH), d))(a),
    "jacrev": lambda a, m, d: jacrev(lambda leaf: logprobs(with_leaf(a, leaf), m, BATCH))(
        leaf_of(a)
    ),
    "hessian": lambda a, m, d: hessian(lambda leaf: loss(with_leaf(a, leaf), m, BATCH))(leaf_of(a)),
}

COTANGENT = torch.randn(3, 6, generator=torch.Generator().manual_seed(4), dtype=torch.float64)


def leaf_of(adapter: Any) -> Tensor:
    return adapter["layers"][0]["v_proj"].b


def each(fn: Callable[[int], Any]) -> Any:
    return tree_map(lambda *x: torch.stack(x), *(fn(i) for i in range(3)))


def directions(leaf: Tensor) -> Tensor:
    """Unit vectors of a leaf, [numel, *shape]."""
    return torch.eye(leaf.numel(), dtype=leaf.dtype).view(-1, *leaf.shape)


def columns(fn: Callable[[Tensor], Any], leaf: Tensor) -> Tensor:
    """The Jacobian by finite differences, [*out, *leaf]."""
    slopes = [slope(fn, leaf, d) for d in directions(leaf)]
    return torch.stack(slopes, dim=-1).view(*slopes[0].shape, *leaf.shape)


# The same from plain autograd and finite differences, one example, adapter or seed at a time.
EXPECTED: dict[str, Callable[[Any, Model, Any], Any]] = {
    "grad": lambda a, m, d: plain_grad(lambda a: loss(a, m, BATCH), a),
    "grad with dropout": lambda a, m, d: plain_grad(lambda a: loss(a, m, BATCH, 7), a),
    "grad with a seed tensor": lambda a, m, d: plain_grad(lambda a: loss(a, m, BATCH, 7), a),
    "vjp": lambda a, m, d: plain_grad(lambda a: (logprobs(a, m, BATCH) * COTANGENT).sum(), a),
    "jvp": lambda a, m, d: slope(lambda a: logprobs(a, m, BATCH), a, d),
    "vmap over examples": lambda a, m, d: each(lambda i: loss(a, m, example(i))),
    "grads of examples": lambda a, m, d: each(
        lambda i: plain_grad(lambda a: loss(a, m, example(i)), a)
    ),
    "vmap over adapters": lambda a, m, d: each(lambda i: logprobs(nth(stacked(a, d), i), m, BATCH)),
    "grads of adapters": lambda a, m, d: each(
        lambda i: plain_grad(lambda a: loss(a, m, BATCH), nth(stacked(a, d), i))
    ),
    "vmap over seeds": lambda a, m, d: each(lambda i: loss(a, m, BATCH, int(SEEDS[i]))),
    "grads of seeds": lambda a, m, d: each(
        lambda i: plain_grad(lambda a: loss(a, m, BATCH, int(SEEDS[i])), a)
    ),
    "hvp": lambda a, m, d: slope(lambda a: plain_grad(lambda a: loss(a, m, BATCH), a), a, d),
    "jacrev": lambda a, m, d: columns(
        lambda leaf: logprobs(with_leaf(a, leaf), m, BATCH), leaf_of(a)
    ),
    "hessian": lambda a, m, d: columns(
        lambda leaf: plain_grad(lambda leaf: loss(with_leaf(a, leaf), m, BATCH), leaf), leaf_of(a)
    ),
}

EXPECTED["reverse over reverse"] = EXPECTED["hvp"]


def test_plain_gradients_equal_finite_differences(tiny):
    for seed in (None, 7):
        fn = lambda a, seed=seed: loss(a, tiny, BATCH, seed)
        direction = randomised(tiny.adapter, 9)
        expected = slope(fn, tiny.adapter, direction)
        torch.testing.assert_close(
            inner(plain_grad(fn, tiny.adapter), direction), expected, rtol=1e-8, atol=1e-10
        )


@pytest.mark.parametrize("name", TRANSFORMS)
def test_a_transform_gives_the_plain_value(name, tiny):
    direction = randomised(tiny.adapter, 9)
    actual, expected = (
        table[name](tiny.adapter, tiny, direction) for table in (TRANSFORMS, EXPECTED)
    )
    assert relative_error(actual, expected) <= 1e-8


FORWARD_MODES: dict[str, Callable] = {
    "forward_ad": lambda fn, a, d: dual_tangent(fn, a, d),
    "linearize": lambda fn, a, d: torch.func.linearize(fn, a)[1](d),
}
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "plain": ("llama2", {}),
    "DoRA with dropout": ("llama2", {"use_dora": True, "lora_dropout": 0.3}),
    "lora_bias": ("llama_bias", {"lora_bias": True}),
    "head and embedding": ("llama2", {"target_modules": ["q_proj", "embed_tokens", "lm_head"]}),
    "experts": ("qwen3_moe_mixed", {}),
    "windows": ("qwen2_window", {}),
    "quantisation-aware": ("llama2", {"qat_scheme": "fp8-fp8"}),
}


def dual_tangent(fn: Callable[[Any], Tensor], tree: Any, direction: Any) -> Tensor:
    with forward_ad.dual_level():
        return forward_ad.unpack_dual(fn(tree_map(forward_ad.make_dual, tree, direction))).tangent


@pytest.mark.parametrize("case", MODELS)
@pytest.mark.parametrize("mode", FORWARD_MODES)
def test_forward_mode_gives_the_derivative_of_jvp(mode, case, pair):
    family, settings = MODELS[case]
    model = adapted(pair(family).model, r=2, **settings)
    direction = randomised(model.adapter, 9)
    fn = lambda a: loss(a, model, BATCH, 7)
    expected = jvp(fn, (model.adapter,), (direction,))[1]
    assert relative_error(FORWARD_MODES[mode](fn, model.adapter, direction), expected) <= 1e-4


@pytest.mark.compile
@pytest.mark.parametrize("name", TRANSFORMS)
def test_a_compiled_transform_gives_the_same(name, shallow, fresh_dynamo):
    """fullgraph: a graph break would run the transform eagerly, and prove nothing."""
    run = lambda a, d: TRANSFORMS[name](a, shallow, d)
    arguments = shallow.adapter, randomised(shallow.adapter, 9)
    expected = run(*arguments)
    compiled = torch.compile(run, fullgraph=True, backend="aot_eager")
    assert relative_error(compiled(*arguments), expected) <= 1e-10
