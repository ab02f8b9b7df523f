"""Parity with transformers for every family, and every torch.func transform against float64."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from conftest import Pair, randomised, relative_error, token_ids
from models import FAMILIES
from torch import Tensor
from torch.func import hessian, jacrev, jvp, vjp, vmap
from torch.utils._pytree import tree_flatten, tree_leaves, tree_map, tree_unflatten

from fastlora import functional as FL
from fastlora.model import Model

grad = torch.func.grad
LENGTHS = (1, 7, 24)  # 24 passes the windows (5) and dynamic RoPE's context (16)


def difference(ours: Tensor, theirs: Tensor) -> float:
    """Worst difference in units of max(1, absmax): T32 of peft-format.md asks for 1e-5."""
    return ((ours - theirs).abs().max() / max(1.0, theirs.abs().max().item())).item()


# ── parity with transformers ──────────────────────────────────────────────────────────────
# The measures are also scripts/compare_transformers.py's.


@torch.no_grad()
def prompts(pair: Pair, t: int) -> float:
    ids = token_ids(2, t, vocab_size=96)
    return difference(pair.model(ids), pair.theirs(ids))


def padding(side: str, t: int = 24) -> Tensor:
    """[3, t] attention mask of rows with 24, 17 and 5 real tokens."""
    right = (torch.arange(t) < torch.tensor([[24], [17], [5]])).long()
    return right if side == "right" else right.flip(-1)


@torch.no_grad()
def padded(pair: Pair, side: str) -> float:
    """Real positions of a padded batch, against transformers' batch with the same positions.

    Dynamic RoPE takes its base from the longest row there and from each row itself here, so that
    a row's logits do not depend on its neighbours: there transformers reads row by row.
    """
    ids, mask = token_ids(3, 24, vocab_size=96), padding(side)
    ours = pair.model(ids, attention_mask=mask)[mask.bool()]
    if pair.model.spec.config.rope_parameters.rope_type == "dynamic":
        alone = [pair.theirs(row[m.bool()][None])[0] for row, m in zip(ids, mask, strict=True)]
        return difference(ours, torch.cat(alone))
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    theirs = pair.theirs(ids, attention_mask=mask, position_ids=positions)
    return difference(ours, theirs[mask.bool()])


@torch.no_grad()
def packed(pair: Pair) -> float:
    """Documents side by side in two rows, against transformers on each alone."""
    ids, lengths = token_ids(2, 24, vocab_size=96), ([9, 8, 7], [20, 4])
    segments = torch.stack(
        [torch.arange(len(n)).repeat_interleave(torch.tensor(n)) for n in lengths]
    )
    ours = pair.model(ids, segment_ids=segments)
    documents = [d for row, n in zip(ids, lengths, strict=True) for d in row.split(n)]
    return difference(ours.flatten(0, 1), torch.cat([pair.theirs(d[None])[0] for d in documents]))


@torch.no_grad()
def losses(pair: Pair) -> float:
    """The loss of a batch whose first labels are ignored, relative."""
    ids = token_ids(2, 24, vocab_size=96)
    labels = torch.where(torch.arange(24) < 5, -100, ids)
    ours = pair.model.loss({"input_ids": ids, "labels": labels})
    theirs = pair.fresh_oracle()(ids, labels=labels).loss
    return (ours / theirs - 1).abs().item()


@torch.no_grad()
def rounding(pair: Pair, exact: Pair, t: int) -> tuple[float, float]:
    """(ours, transformers') relative error of bfloat16 logits by Frobenius norm.

    Of a mixture of experts, the median token's: near a tie of the router's, rounding sends a token
    to another expert (1 to 6 tokens of 100 in these models, on both sides alike), and those alone
    would be the norm.

    `exact` holds the same numbers in float32. 16 rows, so that one lucky rounding decides nothing.
    """
    ids = token_ids(16, t, vocab_size=96)
    reference = exact.theirs(ids)
    mixture = any(pair.model.spec.config.sparse_layers)

    def error(logits: torch.Tensor) -> float:
        wrong = logits.float() - reference
        if mixture:
            return (wrong.norm(dim=-1) / reference.norm(dim=-1)).median().item()
        return (wrong.norm() / reference.norm()).item()

    return error(pair.model(ids)), error(pair.theirs(ids))


def widened(pair: Pair) -> Pair:
    """The same weights in float32. A new oracle: .float() would keep bfloat16's rotary tables."""
    oracle = type(pair.oracle).from_pretrained(pair.folder, dtype=torch.float32).eval()
    return pair._replace(oracle=oracle)


@pytest.mark.parametrize("family", FAMILIES)
def test_logits_equal_transformers(family, pair):
    for t in LENGTHS:
        assert prompts(pair(family), t) <= 1e-5, f"{t} tokens"


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("family", FAMILIES)
def test_padded_batches_equal_transformers(family, side, pair):
    assert padded(pair(family), side) <= 1e-5


@pytest.mark.parametrize("family", FAMILIES)
def test_packed_documents_equal_the_documents_alone(family, pair):
    assert packed(pair(family)) <= 1e-5


@pytest.mark.parametrize("family", FAMILIES)
def test_the_loss_equals_transformers(family, pair):
    assert losses(pair(family)) <= 1e-5


@pytest.mark.parametrize("family", FAMILIES)
def test_bfloat16_errs_no_more_than_transformers(family, pair):
    rounded = pair(family, torch.bfloat16)
    exact = widened(rounded)
    for t in LENGTHS:
        ours, theirs = rounding(rounded, exact, t)
        assert ours <= 1.5 * theirs, f"{t} tokens: {ours:.1e} against {theirs:.1e}"


def test_given_positions_are_used(pair):
    one = pair("llama3.1")
    ids, positions = token_ids(2, 7, vocab_size=96), torch.tensor([[0, 2, 3, 5, 8, 9, 30]])
    theirs = one.theirs(ids, position_ids=positions.expand(2, 7))
    assert difference(one.model(ids, position_ids=positions), theirs) <= 1e-5
    assert difference(one.model(ids), theirs) > 1e-3


# ── what the functions mean ───────────────────────────────────────────────────────────────


def batch_of(b: int, t: int, seed: int = 0) -> dict[str, Tensor]:
    """Ids with about a quarter of the labels ignored."""
    ids = token_ids(b, t, seed=seed)
    ignored = token_ids(b, t, seed=seed + 100, vocab_size=4) == 0
    return {"input_ids": ids, "labels": torch.where(ignored, -100, ids)}


def log_softmax_of(logits: Tensor, labels: Tensor) -> Tensor:
    """token_logprobs, as its contract says, from whole logits."""
    logp = logits[:, :-1].log_softmax(-1)
    picked = logp.gather(-1, labels[:, 1:].clamp(min=0)[..., None])[..., 0]
    return F.pad(torch.where(labels[:, 1:] == -100, 0.0, picked), (1, 0))


@pytest.mark.parametrize("seed", [None, 3, torch.tensor(3)], ids=["no dropout", "int", "tensor"])
def test_token_logprobs_are_those_of_the_whole_logits(seed, tiny):
    batch = batch_of(2, 9)
    args = (tiny.adapter, tiny.base, tiny.spec)
    logp = FL.token_logprobs(*args, batch["input_ids"], batch["labels"], seed=seed)
    expected = log_softmax_of(FL.forward(*args, batch["input_ids"], seed=seed), batch["labels"])
    torch.testing.assert_close(logp, expected, rtol=1e-12, atol=1e-12)
    assert not logp[:, 0].any()
    assert not logp[batch["labels"] == -100].any()
    assert (logp[:, 1:][batch["labels"][:, 1:] != -100] < 0).all()


def test_the_loss_is_the_mean_over_trained_labels(tiny):
    batch = batch_of(2, 9)
    args = (tiny.adapter, tiny.base, tiny.spec)
    logp = FL.token_logprobs(*args, batch["input_ids"], batch["labels"])
    count = (batch["labels"][:, 1:] != -100).sum()
    torch.testing.assert_close(FL.loss(*args, batch), -logp.sum() / count)


def test_a_batch_without_targets_has_loss_zero(tiny):
    ids = token_ids(2, 5)
    for labels in (torch.full_like(ids, -100), F.pad(ids[:, :1], (0, 4), value=-100)):
        loss = FL.loss(tiny.adapter, tiny.base, tiny.spec, {"input_ids": ids, "labels": labels})
        assert loss.item() == 0.0


def test_a_packed_loss_is_the_documents_together(tiny):
    ids, lengths = token_ids(1, 12), [5, 1, 6]
    segments = torch.arange(3).repeat_interleave(torch.tensor(lengths))[None]
    args = (tiny.adapter, tiny.base, tiny.spec)
    ours = FL.loss(*args, {"input_ids": ids, "labels": ids, "segment_ids": segments})
    documents = [d for d in ids.split(lengths, dim=1)]
    sums = [FL.loss_sum(*args, {"input_ids": d, "labels": d}) for d in documents]
    torch.testing.assert_close(ours, sum(s for s, _ in sums) / sum(n for _, n in sums))


def test_no_adapter_is_the_base_model(tiny, pair):
    ids = token_ids(2, 9)
    plain = tiny.with_adapter(None)
    with_none = FL.forward(None, tiny.base, tiny.spec, ids, seed=1)
    assert torch.equal(with_none, FL.forward(None, plain.base, plain.spec, ids))
    zero_b = tree_map(torch.zeros_like, tiny.adapter)
    torch.testing.assert_close(FL.forward(zero_b, tiny.base, tiny.spec, ids), with_none)
    assert not torch.equal(tiny(ids), with_none)


def test_dropout_happens_where_a_seed_is_given(tiny):
    ids = token_ids(2, 9)
    forward = lambda seed: FL.forward(tiny.adapter, tiny.base, tiny.spec, ids, seed=seed)
    assert torch.equal(forward(5), forward(torch.tensor(5)))
    assert torch.equal(forward(5), forward(5))
    assert not torch.equal(forward(5), forward(6))
    assert not torch.equal(forward(5), forward(5 + 2**32))
    assert not torch.equal(forward(5), forward(None))


def test_dropout_keeps_the_mean(tiny):
    """With an adapter so small that the logits are linear in its masks."""
    ids, small = token_ids(1, 4), tree_map(lambda x: 1e-3 * x, tiny.adapter)
    forward = lambda seed: FL.forward(small, tiny.base, tiny.spec, ids, seed=seed)
    drawn = vmap(forward)(torch.arange(400))
    # The mean of 400 draws is off by 1/20 of their spread; 0.8 of that on average.
    assert ((drawn.mean(0) - forward(None)).abs() / drawn.std(0)).mean() < 0.08


# ── torch.func ────────────────────────────────────────────────────────────────────────────


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


@pytest.mark.compile
@pytest.mark.parametrize("name", TRANSFORMS)
def test_a_compiled_transform_gives_the_same(name, shallow, fresh_dynamo):
    """fullgraph: a graph break would run the transform eagerly, and prove nothing."""
    run = lambda a, d: TRANSFORMS[name](a, shallow, d)
    arguments = shallow.adapter, randomised(shallow.adapter, 9)
    expected = run(*arguments)
    compiled = torch.compile(run, fullgraph=True, backend="aot_eager")
    assert relative_error(compiled(*arguments), expected) <= 1e-10
