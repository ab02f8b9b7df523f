"""Per-example gradients, their norms and sketches equal a loop of value_and_grad over examples."""

from collections import Counter

import pytest
import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map

import fastlora
from fastlora import Sketch, value_and_grad
from fastlora import functional as FL
from oracles.pairs import adapted
from oracles.trees import relative_error, token_ids

IDS = token_ids(4, 9)
LENGTHS = [4, 2, 3]  # of the documents of a packed row
KINDS = (True, "norms", Sketch(16, 5))


def batch_of(ids: Tensor, **more: Tensor) -> dict[str, Tensor]:
    labels = torch.where(ids % 5 == 0, -100, ids)
    return {"input_ids": ids, "labels": labels, **more}


def row_losses(model, batch=None, **how):
    batch = batch_of(IDS) if batch is None else batch
    return lambda adapter: FL.row_losses(adapter, model.base, model.spec, batch, **how)[0]


def looped(fn, model, n):
    """(values, gradients): the gradient of value i of the whole batch, one i after the other."""
    each = [value_and_grad(lambda a, i=i: fn(a)[i])(model.adapter) for i in range(n)]
    stacked = lambda *xs: torch.stack(xs)
    return stacked(*(x[0] for x in each)), tree_map(stacked, *(x[1] for x in each))


def norms_of(grads):
    return sum(x.double().flatten(1).square().sum(1) for x in tree_leaves(grads)).sqrt()


def error(actual, expected):
    """The largest difference beside the largest value of all leaves. relative_error would divide by
    zero for an expert that no token of an example reaches."""
    pairs = [*zip(tree_leaves(actual), tree_leaves(expected), strict=True)]
    assert all(a.shape == e.shape for a, e in pairs)
    return max((a - e).abs().max() for a, e in pairs) / max(e.abs().max() for _, e in pairs)


def assert_equal(fn, model, tolerance, n=4, kinds=KINDS):
    """The results of these kinds against the loop."""
    values, grads = looped(fn, model, n)
    assert all(x.any() for x in tree_leaves(grads))
    for kind in kinds:
        mine = value_and_grad(fn, per_example=kind)(model.adapter)
        expected = kind.of(grads) if isinstance(kind, Sketch) else grads
        expected = norms_of(grads) if kind == "norms" else expected
        assert error(mine[0], values) < tolerance
        assert error(mine[1], expected) < tolerance, kind
        assert not any(x.requires_grad for x in tree_leaves(mine))


# ── equal to the loop ─────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("seed", [None, 3])
@pytest.mark.parametrize("policy", ["none", "selective", "full", "offload", 0.4])
def test_every_recompute_policy_and_dropout(policy, seed, tiny):
    """In float64. The masks of row i are those that it has in the batch."""
    model = tiny.with_spec(recompute=policy)
    assert_equal(row_losses(model, seed=seed), model, 1e-10)


def test_a_row_in_a_batch_of_its_own_has_the_same_gradient(tiny):
    """Without dropout, whose masks depend on a row's place. The sum over rows is the gradient."""
    _, grads = value_and_grad(row_losses(tiny), per_example=True)(tiny.adapter)
    for i in range(4):
        alone = row_losses(tiny, batch_of(IDS[i : i + 1]))
        expected = value_and_grad(lambda a, alone=alone: alone(a)[0])(tiny.adapter)[1]
        assert relative_error(tree_map(lambda x, i=i: x[i], grads), expected) < 1e-10
    total = value_and_grad(lambda a: row_losses(tiny)(a).sum())(tiny.adapter)[1]
    assert relative_error(tree_map(lambda x: x.sum(0), grads), total) < 1e-10


@pytest.mark.parametrize(
    "family", ["qwen2", "qwen3_moe_mixed", "mixtral", "smollm3", "gemma3", "phi3"]
)
def test_every_kind_of_layer(family, pair):
    """Biases, norms of q and k, experts and router, layers without RoPE, fused; padded rows."""
    attention = ["qkv_proj" if family == "phi3" else "q_proj", "o_proj"]
    how: dict = {"lora_dropout": 0.2}
    if family in ("qwen3_moe_mixed", "mixtral"):
        how = {"target_parameters": ["gate.weight", "gate_up_proj", "down_proj"]}
    model = adapted(pair(family).model, r=3, target_modules=attention, **how)
    mask = torch.ones_like(IDS)
    mask[1, :4] = 0
    fn = row_losses(model, batch_of(IDS, attention_mask=mask), seed=1)
    assert_equal(fn, model, 2e-5)


@pytest.mark.parametrize("kind", ["nf4", "int8"])
def test_quantised_bases(kind, quantised_folder):
    base, _ = fastlora.load(quantised_folder(kind), device="cpu")
    model = adapted(base, r=3, lora_dropout=0.2)
    assert_equal(row_losses(model, seed=1), model, 2e-5)


def test_a_bfloat16_base(pair):
    model = adapted(pair("llama2", torch.bfloat16).model, r=4)
    assert_equal(row_losses(model), model, 2e-2)
    grads = value_and_grad(row_losses(model), per_example=True)(model.adapter)[1]
    assert {x.dtype for x in tree_leaves(grads)} == {torch.float32}


# Each takes rows out of the ordinary pass: they run under torch.vmap.
SLOW = {
    "DoRA": dict(use_dora=True),
    "lora_bias": dict(lora_bias=True),
    "embedding and head": dict(target_modules=["embed_tokens", "lm_head", "q_proj"]),
    "copies": dict(modules_to_save=["lm_head"], target_modules=["q_proj"]),
    "token rows": dict(trainable_token_indices=[1, 3, 5]),
    "PiSSA": dict(init_lora_weights="pissa"),
}


@pytest.mark.parametrize("case", SLOW)
def test_adapters_that_run_row_by_row(case, shallow):
    base = fastlora.disable(shallow)
    if case == "PiSSA":
        model = fastlora.lora(base, r=2, lora_dropout=0.2, **SLOW[case])
        model = model.with_adapter(tree_map(torch.Tensor.double, model.adapter))
    else:
        model = adapted(base, r=2, lora_dropout=0.2, **SLOW[case])
    fn = row_losses(model, seed=2)
    values, grads = looped(fn, model, 4)
    for kind in KINDS:
        mine = value_and_grad(fn, per_example=kind)(model.adapter)
        expected = kind.of(grads) if isinstance(kind, Sketch) else grads
        expected = norms_of(grads) if kind == "norms" else expected
        assert max(error(mine[0], values), error(mine[1], expected)) < 1e-9


def test_losses_of_the_package_take_it(tiny):
    def mean(adapter):
        logps, tokens = fastlora.losses.row_logprobs(
            adapter, tiny.base, tiny.spec, batch_of(IDS), seed=1
        )
        return -logps / tokens

    assert_equal(mean, tiny, 1e-10, kinds=(True,))


# ── which rows are an example ─────────────────────────────────────────────────────────────


def test_packed_documents_are_examples(tiny):
    """adapter_ids [b, t]: each document has the gradient that it has alone; any order."""
    ids, place = IDS[:2], torch.arange(3).repeat_interleave(torch.tensor(LENGTHS))
    segments = place.expand(2, -1)
    document = torch.stack([torch.tensor([4, 0, 2])[place], torch.tensor([1, 3, 5])[place]])
    batch = {"input_ids": ids, "labels": ids, "segment_ids": segments}

    def losses(adapter):
        where = dict(segment_ids=segments, adapter_ids=document)
        args = tiny.base, tiny.spec, ids, FL.trained_labels(batch)
        logp = FL.token_logprobs(adapter, *args, **where)
        return -logp.new_zeros(6).index_add(0, document.flatten(), logp.flatten())

    values, grads = value_and_grad(losses, per_example=True)(tiny.adapter)
    for row in range(2):
        owners = document[row].unique_consecutive().tolist()
        for owner, piece in zip(owners, ids[row].split(LENGTHS), strict=True):
            alone = row_losses(tiny, {"input_ids": piece[None], "labels": piece[None]})
            value, expected = value_and_grad(lambda a, alone=alone: alone(a)[0])(tiny.adapter)
            assert relative_error(values[owner], value) < 1e-10
            # The first token attends to itself alone: gradients of q and k are roundings.
            assert error(tree_map(lambda x, i=owner: x[i], grads), expected) < 1e-10
    norms = value_and_grad(losses, per_example="norms")(tiny.adapter)[1]
    assert relative_error(norms, norms_of(grads)) < 1e-10
    sketches = value_and_grad(losses, per_example=Sketch(8))(tiny.adapter)[1]
    assert relative_error(sketches, Sketch(8).of(grads)) < 1e-10


def preference(model, calls):
    """DPO's form over two pairs: chosen and rejected replies in one call, or in one call each."""
    chosen, rejected = IDS[:2], IDS[2:]

    def margin(adapter):
        run = lambda ids, **how: FL.row_losses(
            adapter, model.base, model.spec, batch_of(ids), **how
        )[0]
        if calls == 2:
            return -torch.nn.functional.logsigmoid(run(rejected) - run(chosen))
        both = run(IDS, adapter_ids=torch.tensor([0, 1, 0, 1]))
        return -torch.nn.functional.logsigmoid(both[2:] - both[:2])

    return margin


def test_two_rows_of_one_example(tiny):
    """adapter_ids [b]; and two calls, whose gradients and sketches add up."""
    _, grads = looped(preference(tiny, 2), tiny, 2)
    assert all(x.any() for x in tree_leaves(grads))
    for calls, kind, expected in (
        (1, True, grads),
        (1, "norms", norms_of(grads)),
        (1, Sketch(16), Sketch(16).of(grads)),
        (2, True, grads),
        (2, Sketch(16), Sketch(16).of(grads)),
    ):
        mine = value_and_grad(preference(tiny, calls), per_example=kind)(tiny.adapter)[1]
        assert error(mine, expected) < 1e-10
    with pytest.raises(ValueError, match=r"twice.*adapter_ids"):
        value_and_grad(preference(tiny, 2), per_example="norms")(tiny.adapter)


def test_a_reference_without_gradient_does_not_count(tiny):
    def against_reference(adapter):
        with torch.no_grad():
            reference = row_losses(tiny)(adapter)
        return (row_losses(tiny)(adapter) - 0.5 * reference).tanh()

    assert_equal(against_reference, tiny, 1e-10)


def test_sketches_multiply_with_weights_first(tiny):
    weights = tree_map(lambda x: torch.rand_like(x), tiny.adapter)
    _, grads = looped(row_losses(tiny), tiny, 4)
    weighted = tree_map(lambda g, w: g * w, grads, weights)
    expected = Sketch(16, 5).of(weighted)
    sketch = Sketch(16, 5, weights)
    _, mine = value_and_grad(row_losses(tiny), per_example=sketch)(tiny.adapter)
    assert relative_error([mine, sketch.of(grads)], [expected, expected]) < 1e-10
    with pytest.raises(ValueError, match="weights"):
        wrong = Sketch(16, 5, {"layers": ()})
        value_and_grad(row_losses(tiny), per_example=wrong)(tiny.adapter)


def test_nothing_is_trained_by_a_function_that_ignores_the_adapter(tiny):
    constant = lambda adapter: torch.ones(3)
    values, grads = value_and_grad(constant, per_example=True)(tiny.adapter)
    assert torch.equal(values, torch.ones(3))
    assert all(x.shape[0] == 3 and not x.any() for x in tree_leaves(grads))
    for kind, shape in (("norms", (3,)), (Sketch(5), (3, 5))):
        mine = value_and_grad(constant, per_example=kind)(tiny.adapter)[1]
        assert mine.shape == shape and not mine.any()


# ── cost and wrong use ────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("kind", [True, "norms", Sketch(16)])
def test_one_pass_with_the_products_of_an_ordinary_one(kind, tiny):
    """Every frozen matrix is multiplied once forward."""
    counts = Counter()

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out = func(*args, **kwargs or {})
            counts[str(func)] += 1
            return out

    with Watch():
        value_and_grad(row_losses(tiny), per_example=kind)(tiny.adapter)
    assert counts["fastlora.lora_linear.default"] == 7 * tiny.spec.config.num_hidden_layers
    # q, k and v share a product with A, and so do gate and up.
    assert counts["fastlora.stacked_outer.default"] == 11 * tiny.spec.config.num_hidden_layers


def test_wrong_use_is_refused(tiny):
    run = lambda fn, kind=True, tree=tiny.adapter: value_and_grad(fn, per_example=kind)(tree)
    losses = row_losses(tiny)
    with pytest.raises(
        ValueError, match=r"one value for each example, a tensor \[4\]; got .* \[\]"
    ):
        run(lambda a: losses(a).sum())
    with pytest.raises(ValueError, match=r"\[4\]; got a tensor \[2\]"):
        run(lambda a: losses(a)[:2])
    with pytest.raises(ValueError, match=r"\[4\]; got a tensor \[4, 9\]"):
        run(lambda a: FL.token_logprobs(a, tiny.base, tiny.spec, IDS, IDS))
    with pytest.raises(ValueError, match="had 4 examples, and this one has 2"):
        run(lambda a: losses(a) + row_losses(tiny, batch_of(IDS[:2]))(a).sum())
    with pytest.raises(ValueError, match=r"pass model\.adapter"):
        run(losses, tree=torch.ones(2))
    stack, spec = FL.stack([fastlora.lora(fastlora.disable(tiny), r=2)] * 2)
    with pytest.raises(ValueError, match="is a stack"):
        run(lambda a: FL.row_losses(a, tiny.base, spec, batch_of(IDS))[0], tree=stack)
    with pytest.raises(TypeError, match=r"functions of fastlora\.functional"):
        run(lambda a: losses(a) + a["layers"][0]["q_proj"].a.sum())
    with pytest.raises(AttributeError, match=r"functions of fastlora\.functional.*'square'"):
        run(lambda a: losses(a) + sum(x.square().sum() for x in tree_leaves(a)))
    for wrong in ("norm", "True", ""):
        with pytest.raises(ValueError, match="per_example="):
            value_and_grad(losses, per_example=wrong)
    with pytest.raises(ValueError, match=r"(?s)k=0.*seed=-1"):
        Sketch(0, -1)


def test_inside_a_transform_it_is_refused_and_its_advice_works(tiny):
    fn = value_and_grad(row_losses(tiny), per_example=True)
    with pytest.raises(RuntimeError, match=r"torch.vmap\(value_and_grad"):
        torch.func.jvp(fn, (tiny.adapter,), (tiny.adapter,))
    one = lambda a, ids: row_losses(tiny, batch_of(ids[None]))(a)[0]
    theirs = torch.vmap(value_and_grad(one), in_dims=(None, 0))(tiny.adapter, IDS)
    assert relative_error(fn(tiny.adapter), theirs) < 1e-10


def test_a_recorded_step_gives_the_same(captures, tiny):
    fn = lambda a, ids: row_losses(tiny, batch_of(ids))(a)
    run = value_and_grad(fn, per_example="norms", cuda_graph=True)
    for seed in range(4):
        ids = token_ids(4, 9, seed=seed)
        expected = value_and_grad(fn, per_example="norms")(tiny.adapter, ids)
        assert relative_error(run(tiny.adapter, ids), expected) < 1e-12
    assert len(captures) == 1


# ── compiled ──────────────────────────────────────────────────────────────────────────────


@pytest.mark.compile
@pytest.mark.parametrize(
    ("kind", "policy", "ids"),
    [(True, "selective", [2, 0, 2, 1]), ("norms", "full", None), (Sketch(16), "none", None)],
    ids=["all", "norms", "sketches"],
)
def test_compiled_layers_give_the_eager_results(kind, policy, ids, shallow, region_backend):
    region_backend("aot_eager")
    model = shallow.with_spec(recompute=policy)
    which = torch.arange(4) if ids is None else torch.tensor(ids)

    def losses(adapter, model):
        how = {} if ids is None else dict(adapter_ids=which)
        rows = row_losses(model, seed=1, **how)(adapter)
        return rows.new_zeros(max(which) + 1).index_add(0, which, rows)

    run = value_and_grad(losses, per_example=kind)
    fast = model.with_spec(compile=True)
    assert relative_error(run(model.adapter, fast), run(model.adapter, model)) < 1e-9


@pytest.mark.compile
def test_inductor_gives_the_eager_norms(shallow, fresh_dynamo):
    model = adapted(fastlora.disable(shallow), r=2, target_modules=["q_proj", "down_proj"])
    run = lambda model: value_and_grad(row_losses(model), per_example="norms")(model.adapter)
    assert relative_error(run(model.with_spec(compile=True)), run(model)) < 1e-9


@pytest.mark.compile
def test_one_dynamic_graph_serves_every_number_of_examples(tiny, graphs):
    """The first number gets a static graph, the second a dynamic one, the others none."""
    counts = []
    for n in (2, 3, 5, 8):
        fn = row_losses(tiny.with_spec(compile=True), batch_of(token_ids(n, 7 + n)))
        value_and_grad(fn, per_example=Sketch(16))(tiny.adapter)
        counts.append(len(graphs))
    assert counts[1] > counts[0] > 0
    assert counts[1:] == [counts[1]] * 3
